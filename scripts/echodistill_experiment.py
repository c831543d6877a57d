"""EchoDistill beside simpler ways to teach a one-step student a concept, in the shapes world.

    python scripts/echodistill_experiment.py --out runs/echodistill-experiment --concepts striped-star --seeds 0

Every model is judged on three things together: the concept alone (prompts without a background), the concept in places
where no picture shows it, and old prompts; and by the strict judge of the shapes, which has no network, beside the row
"drawn, through the autoencoder", above which no method can come. ``results.jsonl`` gets a line a model; what it has
already is not made again. ``--table`` prints the means of all lines and makes nothing, ``--write-docs`` puts them into
a page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from flowdistill.cli.arguments import seed_number
from flowdistill.config import load_config
from flowdistill.data import shapes
from flowdistill.data.pictures import read_picture
from flowdistill.data.shapes_concepts import CONCEPTS, CONTEXTS, draw_concept, held_out_prompts, references
from flowdistill.evaluation.shapes_judge import Judged, judge_concept, spread
from flowdistill.features.shapes_networks import JUDGE_HEADS, load_shapes_classifier, load_shapes_judge
from flowdistill.methods.echodistill.method import EchoDistill
from flowdistill.methods.echodistill.student import load_adapted_pipeline
from flowdistill.students import generated, load_student
from flowdistill.teachers import Teacher, load_teacher
from flowdistill.teachers.noise_levels import NoiseLevels
from flowdistill.training.optimizer import apply_update, backward, learning_rate, set_rate
from flowdistill.training.optimizers import make_optimizer
from flowdistill.training.run import distill
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.images import save_grid
from flowdistill.utils.randomness import Draw, indexed_noise, seed_torch
from flowdistill.utils.text import read_lines

CONFIG = "configs/shapes/echodistill.yaml"
IMAGES = 96  # of the concept alone, and as many in its contexts
OLD = 216  # one of each class
DRAWN = 64
FEWER = 2  # at many steps: half as many
STRICT_MEASURES = ("distance", "colour", "contrast", "blur", "pattern", "outline", "ghosts")
# What the strict judge's table shows: the figure, its title and its form.
STRICT_COLUMNS = (
    ("alone", "accepted alone", ".0%"), ("in_context", "accepted in context", ".0%"), ("distance", "distance", ".1f"),
    ("colour", "colour", ".1f"), ("contrast", "contrast", ".2f"), ("blur", "blur", ".2f"),
    ("pattern", "pattern", ".2f"), ("outline", "outline", ".2f"), ("ghosts", "ghosts", ".3f"),
    ("position", "spread of position", ".2f"), ("size", "of size", ".2f"),
)
Sampler = Callable[[Sequence[str], int], Tensor]


@dataclass
class Case:
    """One concept and one seed."""

    concept: str
    seed: int
    folder: Path
    extra: list[str]

    @property
    def word(self) -> str:
        return CONCEPTS[self.concept].word

    def overrides(self, name: str) -> list[str]:
        subject, shown = f"<new1> {self.word}", [f"a <new1> {self.word}"]
        shown += [prompt for prompt, _ in held_out_prompts(subject)[:3]]
        places = [shown[0], *(CONTEXTS[0].format(subject, background) for background in shapes.BACKGROUNDS)]
        return [
            f"seed={self.seed}", f"output_dir={self.folder / f'{self.concept}-{self.seed}-{name}'}",
            f"method.instance_data_dir=assets/shapes/concepts/{self.concept}",
            f'method.instance_prompt="a {subject}"', f"method.initializer_token={self.word}",
            f"method.validation_prompts={json.dumps(shown)}", f"method.student_prompts={json.dumps(places)}",
            *self.extra,
        ]  # fmt: skip


def measure(sample: Sampler, concept: str, subject: str, share: int = 1) -> dict[str, Any]:
    """The figures of 1 / ``share`` of the images; ``subject`` is what the prompts call the concept.

    Beside the three: the background alone; likeness, the mean cosine of the judge's features of the concept alone to
    the references'; variety, how much pictures of one background differ, as a share of how much drawn ones do. And
    ``strict``, see :func:`strict_figures`.
    """
    images_each, old_images = IMAGES // share, OLD // share
    judge, classifier = load_shapes_judge(), load_shapes_classifier()
    target, grounds = JUDGE_HEADS["object"].index(concept), list(shapes.BACKGROUNDS)

    def objects(images: Tensor) -> Tensor:
        return judge.answers(images)["object"].argmax(1) == target

    def features(images: Tensor) -> Tensor:
        return F.normalize(judge.features(images), dim=1)

    alone = [f"a {subject}", f"a photo of a {subject}"]
    shown = sample([alone[i % 2] for i in range(images_each)], 1)
    found, likeness = objects(shown), features(shown) @ features(references(concept)[0]).T
    places = held_out_prompts(subject)
    listed = [places[i % len(places)] for i in range(images_each)]
    images = sample([prompt for prompt, _ in listed], 2)
    wanted = torch.tensor([grounds.index(background) for _, background in listed])
    placed = judge.answers(images)["background"].argmax(1) == wanted
    variety = torch.stack([
        images[wanted == ground].std(0).mean() / draw_concept(concept, [grounds[ground]] * DRAWN, 1).std(0).mean()
        for ground in wanted.unique().tolist()
    ])
    old = shapes.prompt_list()[:old_images]
    kept = classifier(sample(old, 3)).argmax(1) == classifier.prompt_labels(old)
    rates = {"alone": found, "in_context": objects(images) & placed, "background": placed, "old_prompts": kept,
             "likeness": likeness, "variety": variety}
    means = {name: value.double().mean().item() for name, value in rates.items()}
    return means | {"strict": strict_figures(shown, images, concept, [background for _, background in listed])}


def strict_figures(alone: Tensor, placed: Tensor, concept: str, backgrounds: Sequence[str]) -> dict[str, float | None]:
    """What the strict judge makes of pictures of the concept alone and in its places.

    ``alone``, ``in_context``: share accepted; medians of the measures in its places; ``position`` and ``size``: the
    spread of pictures of one background as a share of drawn ones', None where fewer than two have the outline.
    """
    by_ground = {}
    for ground in dict.fromkeys(backgrounds):
        rows = torch.tensor([background == ground for background in backgrounds])
        by_ground[ground] = judge_concept(placed[rows], concept, [ground] * int(rows.sum()))

    def joined(value: Callable[[Judged], Tensor]) -> Tensor:
        return torch.cat([value(judged) for judged in by_ground.values()])

    figures: dict[str, float | None] = {
        "alone": judge_concept(alone, concept, [None] * len(alone)).accepted.double().mean().item(),
        "in_context": joined(lambda judged: judged.accepted).double().mean().item(),
    }
    for name in STRICT_MEASURES:
        figures[name] = joined(lambda judged, name=name: getattr(judged.measures, name)).median().item()
    spreads = [spread(judged) for judged in by_ground.values()]
    for name in ("position", "size"):
        known = [each[name] for each in spreads if not math.isnan(each[name])]
        figures[name] = statistics.fmean(known) if known else None
    return figures


def show(sample: Sampler, subject: str, file: Path) -> None:
    """A row of pictures: the concept alone, then in the places that no picture shows."""
    save_grid(sample([f"a {subject}"] * 2 + [prompt for prompt, _ in held_out_prompts(subject)], 4), file, columns=8)


def one_step(network: Any, encode: Callable[[Sequence[str]], Any], teacher: Teacher, start: float) -> Sampler:
    @torch.no_grad()
    def sample(prompts: Sequence[str], seed: int) -> Tensor:
        noise = indexed_noise(teacher.shape, seed, range(len(prompts)))
        return teacher.decode(generated(network, noise, start, encode(prompts)))

    return sample


def many_steps(teacher: Teacher, steps: int, guidance: float) -> Sampler:
    def sample(prompts: Sequence[str], seed: int) -> Tensor:
        noise = indexed_noise(teacher.shape, seed, range(len(prompts)))
        return teacher.decode(teacher.sample(noise, teacher.encode(prompts=prompts), steps, guidance_scale=guidance))

    return sample


# --- the models


def ceiling(case: Case) -> dict[str, Sampler]:
    """What the drawing code draws, as the autoencoder gives it back."""
    codec = load_teacher(load_config(CONFIG, case.overrides("ceiling")).teacher.source).codec

    def sample(prompts: Sequence[str], seed: int) -> Tensor:
        grounds, pictures = list(shapes.BACKGROUNDS), []
        for i, prompt in enumerate(prompts):
            number = seed * len(prompts) + i
            known = shapes.read_caption(prompt)[2]
            if "<new1>" in prompt:
                ground = grounds[i % len(grounds) if known is None else known]
                pictures.append(draw_concept(case.concept, [ground], number))
            else:
                pictures.append(shapes.draw_shapes(torch.tensor([shapes.class_of(prompt)]), number))
        return codec.decode(codec.encode(torch.cat(pictures)))

    return {"drawn, through the autoencoder": sample}


def before(case: Case) -> dict[str, Sampler]:
    """Nothing learned: the prompts have the known word instead of the new one."""
    config = load_config(CONFIG, case.overrides("before"))
    student, teacher = load_teacher(config.method.student), load_teacher(config.teacher.source)
    return {
        "student before": one_step(student.network, lambda p: student.encode(prompts=p), student, student.t_max),
        "teacher before": many_steps(teacher, config.method.teacher_steps, config.method.teacher_guidance_scale),
    }


def on_the_student(
    case: Case, name: str, word_only: bool = False, last: bool = False, prior: bool = True
) -> dict[str, Sampler]:
    """The diffusion loss on the one-step student itself, for as many steps: of its word, or of its LoRA as well."""
    config = load_config(CONFIG, case.overrides(name))
    settings = config.method
    settings.time = NoiseLevels("timestep", low=0.999) if last else settings.time
    settings.teacher_prior_loss_weight = settings.prior_loss_weight if prior else 0.0
    seed_torch(config.seed)
    base = load_teacher(settings.student, prompts=config.teacher.prompts)
    method = EchoDistill(settings, base)
    network = method.roles()["teacher"].network
    if word_only:
        network.velocity.requires_grad_(False)
    optimizer = make_optimizer(network, settings.teacher_optimizer)
    off = torch.amp.GradScaler("cpu", enabled=False)
    networks = {role: each.network for role, each in method.roles().items()}
    for step in range(config.train.steps):
        set_rate(optimizer, learning_rate(settings.teacher_optimizer, step, config.train.steps))
        loss, _ = method.loss("teacher", networks, Draw(config.seed, step, rows=config.train.batch_size))
        backward(loss, off)
        apply_update(optimizer, off, config.train.max_grad_norm)
        optimizer.zero_grad()
    student = method.student()
    return {name: one_step(network.velocity, lambda p: student.encode(prompts=p), base, student.t_start)}


def echodistill(case: Case, name: str, changes: Sequence[str], teacher_too: bool = False) -> dict[str, Sampler]:
    """A run of the command, read back from its folder: the student, and perhaps the teacher at many steps and one."""
    overrides = [*case.overrides(name.replace(" ", "-").replace(",", "")), *changes]
    run, config = distill(CONFIG, overrides), load_config(CONFIG, overrides).method
    student = load_student(run.output_dir)

    def sample(prompts: Sequence[str], seed: int) -> Tensor:
        return student.generate(prompts=prompts, seed=seed)

    if not teacher_too:
        return {name: sample}
    teacher = load_teacher(load_adapted_pipeline(load_config(CONFIG, overrides).teacher.source,
                                                 run.output_dir / "teacher"))
    return {
        name: sample,
        f"{name}: teacher": many_steps(teacher, config.teacher_steps, config.teacher_guidance_scale),
        f"{name}: teacher, one step": many_steps(teacher, 1, config.teacher_guidance_scale),
    }


NO_ECHO = "method.echo.start=null"
MODELS: dict[str, Callable[[Case], dict[str, Sampler]]] = {
    "ceiling": ceiling,
    "before": before,
    "word": lambda case: on_the_student(case, "textual inversion on the student", word_only=True, prior=False),
    "lora_plain": lambda case: on_the_student(case, "LoRA DreamBooth on the student, no prior", prior=False),
    "lora": lambda case: on_the_student(case, "LoRA DreamBooth on the student"),
    "lora_last": lambda case: on_the_student(case, "LoRA DreamBooth on the student, last time only", last=True),
    "no_echo": lambda case: echodistill(case, "EchoDistill, no echo", [NO_ECHO], teacher_too=True),
    "echo": lambda case: echodistill(case, "EchoDistill", [], teacher_too=True),
    "no_prior": lambda case: echodistill(
        case, "no prior", [NO_ECHO, "method.prior_loss_weight=0", "method.teacher_prior_loss_weight=0"]
    ),
    "no_alignment": lambda case: echodistill(
        case, "no alignment",
        [NO_ECHO, "method.latent_weight=0", "method.identity_weight=0", "method.texture=none"],
    ),
    "no_latent": lambda case: echodistill(case, "no latent term", [NO_ECHO, "method.latent_weight=0"]),
    "no_identity": lambda case: echodistill(case, "no identity term", [NO_ECHO, "method.identity_weight=0"]),
    "no_texture": lambda case: echodistill(case, "no texture term", [NO_ECHO, "method.texture=none"]),
    "no_adversarial": lambda case: echodistill(case, "no discriminator", [NO_ECHO, "method.discriminators=[]"]),
    "first_discriminator": lambda case: echodistill(case, "classifier's discriminator alone", [
        NO_ECHO, 'method.discriminators=["flowdistill.features.shapes_networks:load_shapes_classifier"]']),
    "second_discriminator": lambda case: echodistill(case, "random network's discriminator alone", [
        NO_ECHO, "method.discriminators=[small]"]),
}  # fmt: skip
MAIN = tuple(MODELS)[:8]
SHOWN = ("student before", "textual inversion on the student", "LoRA DreamBooth on the student",
         "EchoDistill: teacher, one step", "EchoDistill, no echo", "EchoDistill", "EchoDistill: teacher")


def compared(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines of the two tables by its name; the ablation's are beside the whole method in the same cases."""
    ablation = [line for line in lines if line["key"] not in MAIN]
    cases = {(line["concept"], line["seed"]) for line in ablation}
    whole = [line for line in lines if line["key"] == "no_echo" and ":" not in line["model"]]
    beside = [line for line in whole if (line["concept"], line["seed"]) in cases]
    return {"echodistill": [line for line in lines if line["key"] in MAIN], "echodistill_ablation": beside + ablation}


def strict_table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean and range over concepts and seeds of the strict judge's figures, where they were measured."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if "strict" in line:
            groups[line["model"]].append(line["strict"])
    text = [f"| model | runs | {' | '.join(title for _, title, _ in STRICT_COLUMNS)} |",
            "|" + "---|" * (2 + len(STRICT_COLUMNS))]
    for model, rows in groups.items():
        cells = []
        for column, _, form in STRICT_COLUMNS:
            values = [row[column] for row in rows if row[column] is not None]
            cell = f"{statistics.fmean(values):{form}}" if values else "-"
            cells.append(cell + (f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""))
        text.append(f"| {model} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(text)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean and range over concepts and seeds."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[line["model"]].append(line)
    columns = ("alone", "in_context", "background", "old_prompts", "likeness", "variety")
    text = ["| model | runs | concept alone | concept in context | its background | old prompts | likeness | variety |",
            "|" + "---|" * 8]
    for model, rows in groups.items():
        cells = []
        for column in columns:
            factor, form, unit = (1, ".2f", "") if column in ("likeness", "variety") else (100, ".0f", " %")
            values = [factor * row[column] for row in rows]
            mean, low, high = sum(values) / len(values), min(values), max(values)
            spread = "" if len(values) == 1 else f" ({low:{form}} to {high:{form}})"
            cells.append(f"{mean:{form}}{unit}{spread}")
        text.append(f"| {model} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(text)


def picture(folders: Sequence[Path], models: Sequence[str], file: Path) -> None:
    """The kept rows of these models below each other, the cases (concept and seed) side by side.

    Raises:
        UserError: a row has not been made.
    """
    missing = [path for folder in folders for name in models if not (path := folder / f"{name}.png").is_file()]
    if missing:
        raise UserError(f"{missing[0]} has not been made")
    cases = [torch.cat([read_picture(folder / f"{name}.png", 3) for name in models], 1) for folder in folders]
    to_pil_image(torch.cat(cases, 2)).save(file)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=local_path, default=Path("runs/echodistill-experiment"))
    parser.add_argument("--concepts", nargs="+", choices=list(CONCEPTS), default=list(CONCEPTS)[:2])
    parser.add_argument("--seeds", nargs="+", type=seed_number(), default=[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=MAIN)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="changes to every run")
    parser.add_argument("--table", action="store_true", help="print what is there and make nothing")
    add, path = parser.add_argument, local_path
    add("--write-docs", type=path, metavar="PAGE", help="put the tables between their markers in PAGE")
    add("--picture", type=path, metavar="PNG", help="the students' pictures of the first of --seeds")
    args = parser.parse_args(arguments)
    try:
        run(args)
        if args.picture:
            folders = [args.out / "pictures" / f"{concept}-{args.seeds[0]}" for concept in args.concepts]
            picture(folders, SHOWN, args.picture)
    except UserError as error:
        print(f"echodistill_experiment: error: {error}", file=sys.stderr)
        return 2
    return 0


def read_measured(file: Path) -> list[dict[str, Any]]:
    """What has been measured; a line that a crash cut short is not there."""
    found = []
    for text in read_lines(file, strict=False) if file.is_file() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return found


def run(args: argparse.Namespace) -> None:
    """Make what is missing, and print the tables."""
    from experiment_results import write_docs
    from run_experiment import append_line

    file = args.out / "results.jsonl"
    lines = read_measured(file)
    for concept in () if args.table else args.concepts:
        for seed in args.seeds:
            case = Case(concept, seed, args.out, args.set)
            for key in args.models:
                if any((line["concept"], line["seed"], line["key"]) == (concept, seed, key) for line in lines):
                    continue
                made = []
                for model, sample in MODELS[key](case).items():
                    subject = case.word if key == "before" else f"<new1> {case.word}"
                    show(sample, subject, args.out / "pictures" / f"{concept}-{seed}" / f"{model}.png")
                    line = {"model": model, "key": key, "concept": concept, "seed": seed}
                    many = "teacher" in model and "one step" not in model
                    made.append(line | measure(sample, concept, subject, FEWER if many else 1))
                # Together, so that a run that is killed meanwhile is measured again as a whole.
                args.out.mkdir(parents=True, exist_ok=True)
                for line in made:
                    append_line(file, line)
                    print(json.dumps(line), flush=True)
                lines += made
    texts = {name: table(part) + "\n" for name, part in compared(lines).items()}
    if any("strict" in line for line in lines):
        texts["echodistill_strict"] = strict_table(lines) + "\n"
    for name, text in texts.items():
        print(text)
        if args.write_docs:
            write_docs(args.write_docs, name, text)


if __name__ == "__main__":
    raise SystemExit(main())
