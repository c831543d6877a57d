"""EchoDistill beside simpler ways to teach a one-step student a concept, in the shapes world.

    python scripts/echodistill_experiment.py --out runs/echodistill-experiment --concepts striped-star --seeds 0

Every model is judged on three things together: the concept alone (prompts without a background), the concept in places
where no picture shows it, and old prompts; and by the strict judge of the shapes, which has no network, beside the row
"drawn, through the autoencoder", above which no method can come. The pictures that the echo stage kept and refused come
before the strict judge too. ``results.jsonl`` gets a line a model; the same command goes on with what it has not.
``--table`` prints the tables of all lines and makes nothing, ``--write-docs`` puts them into a page, ``--picture``
draws the models' pictures below each other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowdistill.cli.arguments import seed_number
from flowdistill.config import load_config, save_config
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
from flowdistill.teachers.weight_files import check_weights, record_weights
from flowdistill.training.checkpoint import checkpoints
from flowdistill.training.optimizer import apply_update, backward, learning_rate, set_rate
from flowdistill.training.optimizers import make_optimizer
from flowdistill.training.run import distill, has_begun
from flowdistill.utils.errors import UserError, listed
from flowdistill.utils.files import atomic_folder, check_writable, local_path
from flowdistill.utils.images import grid, save_grid, save_picture
from flowdistill.utils.randomness import Draw, indexed_noise, seed_torch
from flowdistill.utils.text import read_json, read_json_lines, read_lines

CONFIG = "configs/shapes/echodistill.yaml"
FLOW_MAP = "configs/shapes/flow_map_matching.yaml"
RESULTS = "results.jsonl"
FORMAT = 2  # of a line: 2 has the strict figures, the settings of the run and the models of its key
IMAGES = 60  # of the concept alone, and as many in its contexts
OLD = 216  # one of each class
DRAWN = 64
FEWER = 2  # at many steps: half as many
KEYS_VALUES_RATE = 3.0e-4  # of matrices of full rank, which move further at a rate than the product of a LoRA's two
STRICT_MEASURES = ("distance", "colour", "contrast", "blur", "pattern", "outline", "ghosts")
# What the strict judge's table shows: the figure, its title and its form.
STRICT_COLUMNS = (
    ("alone", "accepted alone", ".0%"), ("in_context", "accepted in context", ".0%"), ("distance", "distance", ".1f"),
    ("colour", "colour", ".1f"), ("contrast", "contrast", ".2f"), ("blur", "blur", ".2f"),
    ("pattern", "pattern", ".2f"), ("outline", "outline", ".2f"), ("ghosts", "ghosts", ".3f"),
    ("position", "spread of position", ".2f"), ("size", "of size", ".2f"),
)
# Of the pairs: the figure, its title, its form, what it is shown in and whether more is better.
PAIRED = (("alone", "accepted alone", "+.1f", 100, True), ("in_context", "accepted in context", "+.1f", 100, True),
          ("distance", "distance", "+.2f", 1, False))
FAST = ("train.sample_every=0", "train.num_samples=4")  # pictures that nobody looks at here; they teach nothing
COLUMNS = 8
ENLARGED = 2  # of the picture: 64 pixels each
Line = dict[str, Any]
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

    def run_folder(self, name: str) -> Path:
        """Of the run that makes the model ``name``."""
        return self.folder / f"{self.concept}-{self.seed}-{name.replace(' ', '-').replace(',', '')}"

    def overrides(self, name: str) -> list[str]:
        subject, shown = f"<new1> {self.word}", [f"a <new1> {self.word}"]
        places = [shown[0], *(CONTEXTS[0].format(subject, background) for background in shapes.BACKGROUNDS)]
        return [
            *FAST, f"seed={self.seed}", f"output_dir={self.run_folder(name)}",
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


def filter_figures(folder: Path, concept: str) -> dict[str, Any]:
    """What the strict judge makes of the pictures that the echo stage kept and refused, all rounds together.

    For each of the two their number, the share accepted and the medians of the measures, None of no pictures;
    ``closer``: share of pairs of one of each in which the kept one is nearer to a rendering, 0.5 for chance;
    ``d_prime`` of the identity network and ``taken_back`` (the names of what fell) as the stage reports them.
    """
    figures: dict[str, Any] = {}
    distances = {}
    for part in ("kept", "refused"):
        pictures, grounds = [], []
        for file in sorted(folder.glob(f"round-*/{part}/metadata.jsonl")):
            for _, (name, text) in read_json_lines(file, lambda line: (line["file_name"], line["text"]), "a picture"):
                ground = shapes.read_caption(text)[2]
                pictures.append(read_picture(file.parent / name, 3).float() / 255)
                grounds.append(None if ground is None else list(shapes.BACKGROUNDS)[ground])
        figures[part] = {"pictures": len(pictures)} | dict.fromkeys(("accepted", *STRICT_MEASURES))
        if pictures:
            judged = judge_concept(torch.stack(pictures), concept, grounds)
            distances[part] = judged.measures.distance
            figures[part]["accepted"] = judged.accepted.double().mean().item()
            figures[part] |= {name: getattr(judged.measures, name).median().item() for name in STRICT_MEASURES}
    figures["closer"] = None
    if len(distances) == 2:
        ahead = distances["refused"][None, :] - distances["kept"][:, None]
        figures["closer"] = ((ahead > 0).double() + 0.5 * (ahead == 0)).mean().item()
    report = read_json(folder / "report.json")
    return figures | {"d_prime": report[0]["separation"]["d_prime"],
                      "taken_back": [entry["taken_back_for"] for entry in report]}


def show(sample: Sampler, subject: str, file: Path) -> None:
    """A row of pictures: the concept alone, then in the places that no picture shows."""
    prompts = [f"a {subject}"] * 2 + [prompt for prompt, _ in held_out_prompts(subject)]
    save_grid(sample(prompts, 4), file, columns=COLUMNS)


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
    codec = load_teacher(load_config(CONFIG, case.overrides("ceiling")).teacher, prompts=None).codec

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
    teacher = load_teacher(config.teacher, prompts=None)
    student = load_teacher(replace(config.teacher, source=config.method.student, prompts=None))
    return {
        "student before": one_step(student.network, lambda p: student.encode(prompts=p), student, student.t_max),
        "teacher before": many_steps(teacher, config.method.teacher_steps, config.method.teacher_guidance_scale),
    }


def on_the_student(
    case: Case, name: str, word_only: bool = False, last: bool = False, prior: bool = True, keys_values: bool = False
) -> dict[str, Sampler]:
    """The diffusion loss on the one-step student itself, for as many steps: of its word, or of its LoRA as well, or, as
    Custom Diffusion, of the cross-attention's keys and values freely."""
    config = load_config(CONFIG, case.overrides(name))
    settings = config.method
    settings.time = NoiseLevels("timestep", low=0.999) if last else settings.time
    settings.teacher_prior_loss_weight = settings.prior_loss_weight if prior else 0.0
    if keys_values:
        settings.adapter = "kv_full"
        settings.teacher_optimizer.lr = KEYS_VALUES_RATE
    seed_torch(config.seed)
    base = load_teacher(replace(config.teacher, source=settings.student))
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


def fork(case: Case, name: str, plain: str) -> None:
    """Begin the run ``name``, which has the echo stage, at the last checkpoint before it of ``plain``, which has not.

    Until then both are the same run, bit for bit, so it is trained once. Nothing where ``name`` has begun already, or
    where ``plain`` has not.

    Raises:
        UserError: the checkpoint is not among those of ``plain``.
    """
    source, target = case.run_folder(plain), case.run_folder(name)
    if target.exists() or not has_begun(source):
        return
    config = load_config(CONFIG, case.overrides(name))
    start, found = config.method.echo.start, dict(checkpoints(source / "checkpoints"))
    if start not in found:
        there = listed(f"step {step}" for step in found) or "none"
        raise UserError(f"{target} begins at step {start} of {source}, whose checkpoints there are {there}; train that "
                        f"run again with more of them (--set train.keep_checkpoints=N, an --out of its own), or remove "
                        f"{source} to train this one from the start")
    with atomic_folder(target) as partial:
        shutil.copytree(found[start], partial / "checkpoints" / found[start].name)
        begun = load_config(source / "config.yaml", [f"method.echo.start={start}"])
        save_config(replace(begun, output_dir=config.output_dir), partial / "config.yaml")


def echodistill(
    case: Case, name: str, changes: Sequence[str], teacher_too: bool = False, like: str | None = None
) -> dict[str, Sampler]:
    """A run of the command, read back from its folder: the student, and perhaps the teacher at many steps and one.

    Args:
        like: the run without the echo stage, see :func:`fork`.

    Raises:
        UserError: a signal stopped the run.
    """
    overrides = [*case.overrides(name), *changes]
    if like is not None:
        fork(case, name, like)
    run, config = distill(CONFIG, overrides), load_config(CONFIG, overrides)
    if not run.completed:
        raise UserError(f"{run.output_dir} was stopped at step {run.steps}; the same command goes on")
    student, scale = load_student(run.output_dir), config.method.teacher_guidance_scale
    known = load_teacher(config.teacher, prompts=None)
    student.codec = known.codec

    def sample(prompts: Sequence[str], seed: int) -> Tensor:
        return student.generate(prompts=prompts, seed=seed)

    if not teacher_too:
        return {name: sample}
    teacher = load_teacher(load_adapted_pipeline(config.teacher.source, run.output_dir / "teacher"))
    teacher.codec = known.codec
    return {
        name: sample,
        f"{name}: teacher": many_steps(teacher, config.method.teacher_steps, scale),
        f"{name}: teacher, one step": many_steps(teacher, 1, scale),
    }


WHOLE, PLAIN = "EchoDistill", "EchoDistill, no echo"
NO_ECHO = "method.echo.start=null"


def of_several_calls(case: Case, name: str) -> dict[str, Sampler]:
    """A flow map of the teacher that the run without the echo stage left, which is trained first if it is not there.

    Half of its prompts are the concept's, the others all captions; the one student is asked for one call and for four.

    Raises:
        UserError: a signal stopped one of the two runs, or the first has left another teacher since the flow map began.
    """
    run = distill(CONFIG, [*case.overrides(PLAIN), NO_ECHO])
    if not run.completed:
        raise UserError(f"{run.output_dir} was stopped at step {run.steps}; the same command goes on")
    config = load_config(CONFIG, case.overrides(PLAIN))
    folder = case.run_folder(name)
    source = folder.with_name(f"{folder.name}-of")
    weights = (run.output_dir / "teacher").glob("*.safetensors")
    made_of = {"the personalised teacher": {file.name: file for file in weights}}
    if source.exists():
        check_weights(source, lambda: made_of, f"or remove {source} and {folder}")
    else:
        pipeline = load_adapted_pipeline(config.teacher.source, run.output_dir / "teacher", vae=config.teacher.vae)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        old, own = shapes.prompt_list(), config.method.student_prompts
        with atomic_folder(source) as partial:
            pipeline.save_pretrained(partial)
            lines = [*old, *(own[i % len(own)] for i in range(len(old)))]
            (partial / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            record_weights(partial, made_of)
    scale = config.method.teacher_guidance_scale
    run = distill(FLOW_MAP, [
        f"seed={case.seed}", f"output_dir={folder}", f"teacher.source={source}",
        f"teacher.prompts={source / 'prompts.txt'}", f"method.guidance_min={scale}", f"method.guidance_max={scale}",
        "train.sample_every=0", "evaluation.at_end=false",
    ])  # fmt: skip
    if not run.completed:
        raise UserError(f"{run.output_dir} was stopped at step {run.steps}; the same command goes on")
    student = load_student(folder)
    student.codec = load_teacher(config.teacher, prompts=None).codec

    def sampler(steps: int) -> Sampler:
        return lambda prompts, seed: student.generate(prompts=prompts, seed=seed, steps=steps)

    return {f"{name}: one call": sampler(1), f"{name}: four calls": sampler(4)}


# About three times more and three times less than the configuration has: 1, 1 and 0.1 of the three terms of the
# alignment, and 0.03 of each discriminator.
WEIGHTS = {
    "alignment_less": ("alignment 0.3", ["method.latent_weight=0.3", "method.identity_weight=0.3",
                                         "method.texture_weight=0.03"]),
    "alignment_more": ("alignment 3", ["method.latent_weight=3", "method.identity_weight=3",
                                       "method.texture_weight=0.3"]),
    "texture_less": ("texture 0.03", ["method.texture_weight=0.03"]),
    "texture_more": ("texture 0.3", ["method.texture_weight=0.3"]),
    "adversarial_less": ("discriminators 0.01", ["method.adversarial_weight=0.01"]),
    "adversarial_more": ("discriminators 0.1", ["method.adversarial_weight=0.1"]),
}  # fmt: skip
MODELS: dict[str, Callable[[Case], dict[str, Sampler]]] = {
    "ceiling": ceiling,
    "before": before,
    "word": lambda case: on_the_student(case, "textual inversion on the student", word_only=True, prior=False),
    "lora_plain": lambda case: on_the_student(case, "LoRA DreamBooth on the student, no prior", prior=False),
    "lora": lambda case: on_the_student(case, "LoRA DreamBooth on the student"),
    "keys_values": lambda case: on_the_student(case, "keys and values on the student", keys_values=True),
    "no_echo": lambda case: echodistill(case, PLAIN, [NO_ECHO], teacher_too=True),
    "echo": lambda case: echodistill(case, WHOLE, [], teacher_too=True, like=PLAIN),
    "lora_last": lambda case: on_the_student(case, "LoRA DreamBooth on the student, last time only", last=True),
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
    "several_calls": partial(of_several_calls, name="flow map of its teacher"),
    **{key: partial(echodistill, name=name, changes=[NO_ECHO, *changes]) for key, (name, changes) in WEIGHTS.items()},
}  # fmt: skip
SEVERAL = "several_calls"
MAIN = tuple(MODELS)[:8]
BASELINES = (*MAIN, "lora_last")  # what the first tables have, where it was made
SHOWN = ("drawn, through the autoencoder", "student before", "textual inversion on the student",
         "keys and values on the student", "LoRA DreamBooth on the student, no prior", "LoRA DreamBooth on the student",
         f"{WHOLE}: teacher, one step", PLAIN, WHOLE, f"{WHOLE}: teacher")


def tables(lines: Sequence[Line]) -> dict[str, str]:
    """Markdown by its name, of those for which there are lines, the strict judge's first.

    Those of the ablation, of other weights and of several calls are beside the whole method in the same cases.
    """
    main = [line for line in lines if line["key"] in BASELINES]
    ablation = beside_whole(lines, [key for key in MODELS if key not in (*BASELINES, *WEIGHTS, SEVERAL)])
    weights, several = beside_whole(lines, WEIGHTS), beside_whole(lines, [SEVERAL])
    texts = {
        "echodistill_strict": strict_table(main),
        "echodistill_pairs": pairs_table(main),
        "echodistill_filter": filter_table(main),
        "echodistill": table(main),
        "echodistill_ablation_strict": strict_table(ablation),
        "echodistill_ablation": table(ablation),
        "echodistill_weights_strict": strict_table(weights),
        "echodistill_weights": table(weights),
        "echodistill_calls_strict": strict_table(several),
        "echodistill_calls": table(several),
    }
    return {name: text for name, text in texts.items() if text}


def beside_whole(lines: Sequence[Line], keys: Collection[str]) -> list[Line]:
    """The lines of these keys, after those of the whole method without the echo stage in the same cases."""
    mine = [line for line in lines if line["key"] in keys]
    cases = {(line["concept"], line["seed"]) for line in mine}
    whole = [line for line in lines if line["model"] == PLAIN and (line["concept"], line["seed"]) in cases]
    return whole + mine


def mean_and_range(values: Sequence[float | None], form: str) -> str:
    """Of the values that are known, in one cell."""
    known = [value for value in values if value is not None]
    cell = f"{statistics.fmean(known):{form}}" if known else "-"
    return cell + (f" ({min(known):{form}} to {max(known):{form}})" if len(known) > 1 else "")


def by_model(lines: Sequence[Line]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        groups[line["model"]].append(line)
    return groups


def rows_of(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; nothing without rows."""
    if not rows:
        return ""
    first, *others = ("| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others])


def strict_table(lines: Sequence[Line]) -> str:
    """Mean and range over concepts and seeds of the strict judge's figures."""
    rows = [[model, len(mine), *(mean_and_range([line["strict"][column] for line in mine], form)
                                 for column, _, form in STRICT_COLUMNS)] for model, mine in by_model(lines).items()]
    return rows_of(["model", "runs", *(title for _, title, _ in STRICT_COLUMNS)], rows)


def pairs_table(lines: Sequence[Line]) -> str:
    """What the echo stage changes: with it minus without it for the same concept, seed and number of steps.

    Mean and standard deviation over the pairs, and in how many of them it is better and worse.
    """
    found = {(line["model"], (line["concept"], line["seed"])): line["strict"] for line in lines}
    parts = {"": "student, one step", ": teacher": "teacher", ": teacher, one step": "teacher, one step"}
    rows = []
    for part, title in parts.items():
        pairs = [(strict, found[PLAIN + part, case]) for (model, case), strict in found.items()
                 if model == WHOLE + part and (PLAIN + part, case) in found]
        cells = [change_of([factor * (one[column] - other[column]) for one, other in pairs], form, more)
                 for column, _, form, factor, more in PAIRED]
        rows += [[title, len(pairs), *cells]] if pairs else []
    titles = [title + (", points" if factor == 100 else "") for _, title, _, factor, _ in PAIRED]
    return rows_of(["with the echo stage minus without", "pairs", *titles], rows)


def change_of(changes: Sequence[float], form: str, more: bool) -> str:
    """A cell of :func:`pairs_table`; ``more``: whether a change above 0 is a better one."""
    if not changes:
        return ""
    spread = f" ± {statistics.stdev(changes):{form.lstrip('+')}}" if len(changes) > 1 else ""
    up, down = (sum(sign * change > 0 for change in changes) for sign in (1, -1))
    better, worse = (up, down) if more else (down, up)
    return f"{statistics.fmean(changes):{form}}{spread} ({better} better, {worse} worse)"


def filter_table(lines: Sequence[Line]) -> str:
    """Mean and range over concepts and seeds of what the strict judge makes of the echo stage's pictures."""
    known = [line["filter"] for line in lines if "filter" in line]
    rows = []
    for part in ("kept", "refused") if known else ():
        cells = [mean_and_range([found[part][name] for found in known], form) for name, form in (
            ("pictures", ".0f"), ("accepted", ".0%"),
            *((name, form) for name, _, form in STRICT_COLUMNS if name in STRICT_MEASURES))]
        closer = mean_and_range([found["closer"] for found in known], ".0%") if part == "kept" else ""
        rows.append([part, len(known), *cells, closer])
    titles = [title for name, title, _ in STRICT_COLUMNS if name in STRICT_MEASURES]
    text = rows_of(["pictures", "runs", "number", "accepted", *titles, "nearer than a refused one"], rows)
    rounds = [names for found in known for names in found["taken_back"]]
    separation = mean_and_range([found["d_prime"] for found in known], ".1f")
    return text and (f"{text}\n\nd' of the identity network: {separation}. Rounds taken back: "
                     f"{sum(map(bool, rounds))} of {len(rounds)}.")


def table(lines: Sequence[Line]) -> str:
    """Mean and range over concepts and seeds of the networks' figures."""
    titles = {"alone": "concept alone", "in_context": "concept in context", "background": "its background",
              "old_prompts": "old prompts", "likeness": "likeness", "variety": "variety"}
    rows = []
    for model, mine in by_model(lines).items():
        cells = []
        for column in titles:
            factor, form, unit = (1, ".2f", "") if column in ("likeness", "variety") else (100, ".0f", " %")
            values = [factor * line[column] for line in mine]
            spread = "" if len(values) == 1 else f" ({min(values):{form}} to {max(values):{form}})"
            cells.append(f"{statistics.fmean(values):{form}}{unit}{spread}")
        rows.append([model, len(mine), *cells])
    return rows_of(["model", "runs", *titles.values()], rows)


def picture(folders: Mapping[str, Path], models: Sequence[str], file: Path) -> None:
    """For each concept (with the folder of its rows) its references, then the kept row of each model, all of the same
    noises, enlarged and with their names at the left.

    Raises:
        UserError: a row has not been made.
    """
    missing = [path for folder in folders.values() for name in models if not (path := folder / f"{name}.png").is_file()]
    if missing:
        raise UserError(f"{missing[0]} has not been made")
    rows: list[tuple[str, Image.Image]] = []
    for concept, folder in folders.items():
        rows.append((f"{concept}: the references", grid(references(concept)[0], COLUMNS)))
        for name in models:
            with Image.open(folder / f"{name}.png") as row:
                rows.append((name, row.convert("RGB")))
    font = ImageFont.load_default(15)
    left = math.ceil(max(font.getlength(name) for name, _ in rows)) + 16
    width, height = (ENLARGED * max(row.size[axis] for _, row in rows) for axis in (0, 1))
    whole = Image.new("RGB", (left + width, height * len(rows)), "white")
    drawing = ImageDraw.Draw(whole)
    for number, (name, row) in enumerate(rows):
        large = row.resize((ENLARGED * row.width, ENLARGED * row.height), Image.Resampling.NEAREST)
        whole.paste(large, (left, number * height))
        drawing.text((8, number * height + height // 2), name, fill="black", font=font, anchor="lm")
    save_picture(whole, file)


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
    add("--picture", type=path, metavar="PNG", help="the models' pictures for the first of --seeds; of --models, where "
                                                    "they are given")
    args = parser.parse_args(arguments)
    try:
        for file in [*([] if args.table else [args.out / RESULTS]), *([args.picture] if args.picture else [])]:
            check_writable(file)
        run(args)
        if args.picture:
            folders = {concept: args.out / "pictures" / f"{concept}-{args.seeds[0]}" for concept in args.concepts}
            picture(folders, shown(args), args.picture)
    except UserError as error:
        print(f"echodistill_experiment: error: {error}", file=sys.stderr)
        return 2
    return 0


def shown(args: argparse.Namespace) -> Sequence[str]:
    """Which rows the picture has: ``SHOWN``, or what ``--models`` have been measured as."""
    if args.models is MAIN:
        return SHOWN
    lines = read_measured(args.out / RESULTS)
    return list(dict.fromkeys(line["model"] for key in args.models for line in lines if line["key"] == key))


def read_measured(file: Path) -> list[dict[str, Any]]:
    """What has been measured; a line that a crash cut short is not there, and of a model that two processes measured
    for one case only the first."""
    found: dict[str, dict[str, Any]] = {}
    for text in read_lines(file, strict=False) if file.is_file() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            same = [line.get(name) for name in ("settings", "concept", "seed", "key", "model")]
            found.setdefault(json.dumps(same), line)
    return list(found.values())


def check_lines(file: Path, lines: Sequence[Line], settings: Sequence[str] | None) -> None:
    """UserError unless the lines can stand beside each other, and beside new ones with these ``--set``."""
    for line in lines:
        if line.get("format") != FORMAT:
            raise UserError(f"{file} has lines of an older form of this script, which measured otherwise; give a new "
                            "--out")
        before = line["settings"]
        if before != list(lines[0]["settings"] if settings is None else settings):
            what = f"lines with --set {' '.join(before)}" if before else "lines without --set"
            raise UserError(f"{file} has {what} beside others; give each --set an --out of its own")


def run(args: argparse.Namespace) -> None:
    """Make what is missing, and print the tables."""
    from experiment_results import write_docs
    from run_experiment import append_line

    file = args.out / RESULTS
    lines = read_measured(file)
    check_lines(file, lines, None if args.table else args.set)
    for concept in () if args.table else args.concepts:
        for seed in args.seeds:
            case = Case(concept, seed, args.out, args.set)
            if "echo" in args.models and not is_measured(case, "echo", lines):
                fork(case, WHOLE, PLAIN)  # what cannot begin is refused before the others are trained
            for key in args.models:
                lines = read_measured(file)  # another process may have added to them
                check_lines(file, lines, args.set)
                for line in measured(case, key, lines):
                    args.out.mkdir(parents=True, exist_ok=True)
                    append_line(file, line)
                    print(json.dumps(line), flush=True)
                    lines.append(line)
    for name, text in tables(lines).items():
        print(text + "\n")
        if args.write_docs:
            write_docs(args.write_docs, name, text + "\n")


def lines_of(case: Case, key: str, lines: Sequence[Line]) -> list[Line]:
    """Those of one key of one case."""
    return [line for line in lines if (line["concept"], line["seed"], line["key"]) == (case.concept, case.seed, key)]


def is_measured(case: Case, key: str, lines: Sequence[Line]) -> bool:
    """Whether every model of the key has its line."""
    mine = lines_of(case, key, lines)
    return bool(mine) and {line["model"] for line in mine}.issuperset(mine[0]["models"])


def measured(case: Case, key: str, lines: Sequence[Line]) -> Iterator[Line]:
    """A line of each model of ``key`` that ``lines`` do not have yet; nothing is trained where they have all."""
    if is_measured(case, key, lines):
        return
    done = {line["model"] for line in lines_of(case, key, lines)}
    samplers = MODELS[key](case)
    for model, sample in samplers.items():
        if model in done:
            continue
        subject = case.word if key == "before" else f"<new1> {case.word}"
        show(sample, subject, case.folder / "pictures" / f"{case.concept}-{case.seed}" / f"{model}.png")
        many = "teacher" in model and "one step" not in model
        line = {"format": FORMAT, "settings": list(case.extra), "model": model, "models": list(samplers), "key": key,
                "concept": case.concept, "seed": case.seed}
        line |= measure(sample, case.concept, subject, FEWER if many else 1)
        if model == WHOLE and (case.run_folder(model) / "echo").is_dir():
            line["filter"] = filter_figures(case.run_folder(model) / "echo", case.concept)
        yield line


if __name__ == "__main__":
    raise SystemExit(main())
