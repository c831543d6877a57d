"""Show that the strict judge of the shapes agrees with an eye: a sheet of twenty pictures from good to bad.

    python scripts/shapes_judge_sheet.py --write-docs docs/experiments/shapes.md

Sixteen are renderings with one fault of some size, four are what EchoDistill's student makes in one step and its
teacher in ten. What an eye made of each, looking at the sheet without any figure, is written down in ``EYE``; the
thresholds of ``flowdistill.evaluation.shapes_judge`` were then set on this sheet. ``--blind`` writes the sheet in a
mixed order and without figures, to look at it anew, and ``--run RUN`` takes the four from another run folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from flowdistill import load_student, load_teacher
from flowdistill.config import load_config
from flowdistill.data import shapes
from flowdistill.data.assets import asset_path
from flowdistill.data.pictures import read_picture
from flowdistill.data.shapes import Scenes
from flowdistill.data.shapes_concepts import CONTEXTS, place_concept
from flowdistill.evaluation.shapes_judge import Judged, Measures, judge_concept
from flowdistill.methods.echodistill.student import load_adapted_pipeline
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_writable, local_path
from flowdistill.utils.images import save_picture
from flowdistill.utils.randomness import indexed_noise

CONCEPT = "striped-star"
MADE = Path("docs/images/shapes_judge_made.png")  # four pictures of 32 x 32 beside each other
BY_STUDENT: tuple[str | None, ...] = (None, "pink")  # backgrounds asked for
BY_TEACHER: tuple[str | None, ...] = ("white", "gray")
RUN_SEED = 4
SCALE, COLUMNS = 6, 5
DIGITS = {"colour": 1, "background": 1, "distance": 1, "ghosts": 3}


def _layers(scenes: Scenes) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The object's share of each pixel, the second colour's share of the object, first, second and ground colour."""
    whole, other = shapes.coverage(scenes)
    colours = [colour[:, :, None, None] for colour in (scenes.first, scenes.second, scenes.ground)]
    return whole, other / whole.clamp(min=1e-6), colours


def _painted(whole: Tensor, share: Tensor, first: Tensor, second: Tensor, ground: Tensor) -> Tensor:
    return whole * ((1 - share) * first + share * second) + (1 - whole) * ground


def rendering(scenes: Scenes) -> Tensor:
    return shapes.render(scenes)


def decoded(scenes: Scenes) -> Tensor:
    """As every generated picture is."""
    codec = load_teacher(asset_path("shapes/teacher")).codec
    return codec.decode(codec.encode(shapes.render(scenes)))


def blurred(width: float) -> Callable[[Scenes], Tensor]:
    """The border between the two colours by a Gaussian of this standard deviation, the outline as it was."""
    def paint(scenes: Scenes) -> Tensor:
        whole, share, colours = _layers(scenes)
        line = torch.exp(-0.5 * (torch.arange(-6, 7) / width).square())
        kernel = torch.outer(line, line)[None, None]
        soft = F.conv2d(whole * share, kernel, padding=6) / F.conv2d(whole, kernel, padding=6).clamp(min=1e-6)
        return _painted(whole, soft, *colours)

    return paint


def soft_outline(width: float) -> Callable[[Scenes], Tensor]:
    """The outline by a Gaussian, the pattern inside as it was."""
    def paint(scenes: Scenes) -> Tensor:
        whole, share, colours = _layers(scenes)
        line = torch.exp(-0.5 * (torch.arange(-6, 7) / width).square())
        kernel = torch.outer(line, line)[None, None]
        near = F.max_pool2d(share, 3, stride=1, padding=1)  # colours just outside, where the soft edge shows them
        soft = F.conv2d(whole, kernel / kernel.sum(), padding=6)
        return _painted(soft, torch.where(whole > 0, share, near), *colours)

    return paint


def faint(contrast: float) -> Callable[[Scenes], Tensor]:
    """Both colours nearer to their middle."""
    def paint(scenes: Scenes) -> Tensor:
        whole, share, (first, second, ground) = _layers(scenes)
        middle = (first + second) / 2
        return _painted(whole, share, *(torch.lerp(middle, colour, contrast) for colour in (first, second)), ground)

    return paint


def recoloured(second: tuple[int, int, int]) -> Callable[[Scenes], Tensor]:
    return lambda scenes: shapes.render(replace(scenes, second=torch.tensor([second]) / 255))


def on_ground(ground: tuple[int, int, int]) -> Callable[[Scenes], Tensor]:
    return lambda scenes: shapes.render(replace(scenes, ground=torch.tensor([ground]) / 255))


def with_ghost(strength: float) -> Callable[[Scenes], Tensor]:
    """The object once more, faintly, five pixels higher and behind."""
    def paint(scenes: Scenes) -> Tensor:
        whole, share, (first, second, ground) = _layers(scenes)
        above = strength * whole.roll(-5, dims=2)
        return _painted(whole, share, first, second, torch.lerp(ground.expand_as(first + above), first, above))

    return paint


def reshaped(name: str) -> Callable[[Scenes], Tensor]:
    """The same colours and stripes in another shape."""
    return lambda scenes: shapes.render(replace(scenes, shape=torch.tensor([shapes.SHAPES.index(name)])))


# What is drawn, on which background, and how.
DRAWN: tuple[tuple[str, str, Callable[[Scenes], Tensor]], ...] = (
    ("a rendering", "pink", rendering),
    ("the teacher's autoencoder", "gray", decoded),
    ("stripes blurred by 0.5", "black", blurred(0.5)),
    ("stripes blurred by 0.9", "white", blurred(0.9)),
    ("stripes blurred by 1.5", "cyan", blurred(1.5)),
    ("contrast 0.8", "cyan", faint(0.8)),
    ("contrast 0.5", "gray", faint(0.5)),
    ("teal a little bluer", "white", recoloured((0, 105, 145))),
    ("dark blue for teal", "pink", recoloured((20, 40, 110))),
    ("a ghost of 0.04", "cyan", with_ghost(0.04)),
    ("a ghost of 0.12", "white", with_ghost(0.12)),
    ("a ghost of 0.35", "gray", with_ghost(0.35)),
    ("outline blurred by 0.8", "brown", soft_outline(0.8)),
    ("pink a little pale", "pink", on_ground((252, 202, 216))),
    ("pink too purple", "pink", on_ground((225, 165, 235))),
    ("stripes in a heart", "black", reshaped("heart")),
)

SEED = 21


def pictures() -> tuple[Tensor, list[str], list[str | None]]:
    """Images (20, 3, 32, 32), what each is, and the background that it was asked for."""
    scenes = place_concept(CONCEPT, [ground for _, ground, _ in DRAWN], SEED)
    drawn = [paint(scenes[i : i + 1]).clamp(0, 1) for i, (_, _, paint) in enumerate(DRAWN)]
    made = torch.stack((read_picture(MADE, 3) / 255).split(shapes.SIZE, dim=2))
    names = [name for name, _, _ in DRAWN] + ["the student's"] * len(BY_STUDENT) + ["the teacher's"] * len(BY_TEACHER)
    return torch.cat([*drawn, made]), names, [*(ground for _, ground, _ in DRAWN), *BY_STUDENT, *BY_TEACHER]


def write_made(run: Path) -> None:
    """The first picture of each prompt, beside each other."""
    config = load_config(run / "config.yaml", [])
    method = config.method
    subject = f"{method.placeholder_token} {method.initializer_token}"

    def prompts(grounds: Sequence[str | None]) -> list[str]:
        return [f"a {subject}" if ground is None else CONTEXTS[0].format(subject, ground) for ground in grounds]

    images = load_student(run).generate(prompts=prompts(BY_STUDENT), seed=RUN_SEED)
    teacher = load_teacher(load_adapted_pipeline(config.teacher.source, run / "teacher"))
    noise = indexed_noise(teacher.shape, RUN_SEED, range(len(BY_TEACHER)))
    latents = teacher.sample(noise, teacher.encode(prompts=prompts(BY_TEACHER)), method.teacher_steps,
                             guidance_scale=method.teacher_guidance_scale)
    row = torch.cat([*images, *teacher.decode(latents)], 2)
    save_picture(to_pil_image(row.clamp(0, 1)), MADE)


def sheet(images: Tensor, titles: Sequence[str]) -> Image.Image:
    """Pictures, enlarged, each above its title."""
    size, band, gap = shapes.SIZE * SCALE, 34, 8
    rows = -(-len(images) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * (size + gap) + gap, rows * (size + band + gap) + gap), "white")
    drawing, font = ImageDraw.Draw(whole), ImageFont.load_default(13)
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(number, COLUMNS)
        left, top = gap + column * (size + gap), gap + row * (size + band + gap)
        whole.paste(to_pil_image(image).resize((size, size), Image.Resampling.NEAREST), (left, top))
        drawing.multiline_text((left, top + size + 2), title, fill="black", font=font, spacing=2)
    return whole


# An eye's order, from good to bad, by the number of a picture in :func:`pictures`, and how many of the first it takes.
EYE = (0, 2, 13, 9, 3, 5, 12, 7, 4, 10, 6, 14, 8, 11, 15, 18, 17, 1, 16, 19)
TAKEN = 7


def failed(judged: Judged, number: int) -> list[str]:
    return [name for name, passed in judged.passed.items() if not passed[number]]


def table(judged: Judged, names: Sequence[str]) -> str:
    """Markdown: the pictures in the eye's order."""
    columns = [field.name for field in fields(Measures)]
    lines = [f"| | picture | eye | judge | {' | '.join(columns)} |", "|" + "---|" * (4 + len(columns))]
    for place, number in enumerate(EYE):
        wrong = failed(judged, number)
        values = []
        for name in columns:
            value = float(getattr(judged.measures, name)[number])
            text = f"{value:.{DIGITS.get(name, 2)}f}"
            values.append(f"**{text}**" if name in wrong else text)
        eye, verdict = ("takes" if place < TAKEN else "refuses"), ("refuses" if wrong else "takes")
        lines.append(f"| {place + 1} | {names[number]} | {eye} | {verdict} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=local_path, default=Path("docs/images/shapes_judge.png"))
    parser.add_argument("--run", type=local_path, metavar="RUN", help="take the four made pictures from a run")
    parser.add_argument("--blind", action="store_true", help="in a mixed order, without figures")
    parser.add_argument("--write-docs", type=local_path, metavar="PAGE", help="put the table between its marks in PAGE")
    args = parser.parse_args(arguments)
    try:
        check_writable(args.out)
        if args.out.suffix.lower() != ".png":
            raise UserError(f"--out {args.out} must be a .png file")
        if args.run:
            write_made(args.run)
        images, names, asked = pictures()
        if args.blind:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED)).tolist()
            titles = [f"{number}: asked for {asked[number] or 'any ground'}" for number in order]
            save_picture(sheet(images[order], titles), args.out)
            return 0
        judged = judge_concept(images, CONCEPT, asked)
        titles = []
        for place, number in enumerate(EYE):
            wrong = failed(judged, number)
            said = wrong[0] + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "") if wrong else "judge takes"
            titles.append(f"{place + 1}: {names[number]}\neye {'takes' if place < TAKEN else 'refuses'}; {said}")
        save_picture(sheet(images[list(EYE)], titles), args.out)
        text = table(judged, names)
        print(text)
        if args.write_docs:
            from experiment_results import write_docs

            write_docs(args.write_docs, "shapes_judge", text)
    except UserError as error:
        print(f"shapes_judge_sheet: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
