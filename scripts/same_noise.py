#!/usr/bin/env python
"""Draw what several students, and the teacher that they share, make of the same noise.

    python scripts/same_noise.py runs/fashion-dmd2 --out picture.png
    python scripts/same_noise.py DMD2=runs/fashion-dmd2 map=runs/fashion-flow-map-matching@1,4 --out picture.png

The picture has a block for the teacher at each number of Euler steps, and one for each student at each number of calls
that it goes by, or at those behind an @. Every block starts from the same noise, with the labels or prompts in turn,
one a column.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from flowdistill.utils.errors import UserError, shown
from flowdistill.utils.files import check_writable, local_path
from flowdistill.utils.seeds import check_seed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="[TITLE=]RUN[@K,...]", help="run folders of one teacher, and the "
                        "calls that are drawn (default: all that the student goes by); the title defaults to the name "
                        "of the method")
    parser.add_argument("--out", type=local_path, required=True, metavar="FILE.png", help="where the picture goes")
    parser.add_argument("--teacher-steps", type=int, nargs="*", default=[50, 1], metavar="N",
                        help="blocks of the teacher (default: 50 1)")
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="of a block (default: 2)")
    parser.add_argument("--columns", type=int, default=10, metavar="N", help="images in a row (default: 10)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the noise (default: 0)")
    options = parser.parse_args(arguments)
    try:
        draw(options)
    except UserError as error:
        print(f"same_noise: error: {error}", file=sys.stderr)
        return 2
    return 0


def draw(options: argparse.Namespace) -> None:
    """Load what is asked for, and write the picture."""
    import dataclasses

    import torch

    from flowdistill import load_student, load_teacher
    from flowdistill.config import load_config, teacher_found_again
    from flowdistill.evaluation import student_sampler, teacher_sampler
    from flowdistill.evaluation.comparison import calls_in_words
    from flowdistill.teachers.weight_files import check_weights
    from flowdistill.utils.images import grid, save_picture, stacked
    from flowdistill.utils.randomness import indexed_noise

    for name in ("rows", "columns"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if any(steps < 1 for steps in options.teacher_steps):
        raise UserError(f"--teacher-steps has {min(options.teacher_steps)}; each must be at least 1")
    check_seed(options.seed, "--seed")
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out {options.out} must be a .png file")
    check_writable(options.out)
    asked = [_asked(text) for text in options.runs]
    named = [(title, folder) for title, folder, _ in asked]
    for _, folder in named:
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder} has no config.yaml; give the folder of a run")
    configs = [load_config(folder / "config.yaml", []) for _, folder in named]
    settings = [teacher_found_again(dataclasses.asdict(config.teacher), folder)
                for config, (_, folder) in zip(configs, named, strict=True)]
    for (_, folder), other in zip(named, settings, strict=True):
        if other != settings[0]:
            raise UserError(f"{folder} has another teacher than {named[0][1]}: {_difference(settings[0], other)}; one "
                            "picture has the students of one teacher")
    students = [load_student(folder) for _, folder in named]
    scales = sorted({student.info.guidance_scale for student in students})
    if len(scales) > 1:
        raise UserError(f"the runs have learnt the guidance scales {scales[0]:g} and {scales[1]:g}; one picture has "
                        "the students of one")
    teacher = load_teacher(**settings[0])
    for _, folder in named:
        check_weights(folder, teacher.files, "or leave this run out")

    count = options.rows * options.columns
    noise = indexed_noise(teacher.shape, options.seed, range(count))
    condition = teacher.examples(range(options.columns)) if options.rows == 1 else teacher.examples(
        [column for _ in range(options.rows) for column in range(options.columns)])
    blocks = {f"teacher, {calls_in_words(steps)}": teacher_sampler(teacher, steps, guidance_scale=scales[0])
              for steps in dict.fromkeys(options.teacher_steps)}
    for (title, folder, counts), config, student in zip(asked, configs, students, strict=True):
        for steps in dict.fromkeys(counts or student.step_counts):
            if steps not in student.step_counts:
                own = " or ".join(map(str, student.step_counts))
                raise UserError(f"{folder} is asked for {calls_in_words(steps)} an image, and goes by {own}")
            name = f"{title or config.method.name}, {calls_in_words(steps)}"
            if name in blocks:
                raise UserError(f"two blocks would be called {name!r}; give the runs titles, such as first=RUN")
            blocks[name] = student_sampler(student, steps=steps)
    with torch.no_grad():
        drawn = {title: grid(sampler(noise, condition), options.columns) for title, sampler in blocks.items()}
    save_picture(stacked(drawn), options.out)
    print(f"from top to bottom: {'; '.join(drawn)}")


def _asked(text: str) -> tuple[str, Path, list[int]]:
    """The title and the calls, either of which may be empty, and the folder; both names may have = and @ in them.

    Of several ways to read it the first whose folder is there: one without calls, and with the shortest title.

    Raises:
        UserError: no way leads to a folder.
    """
    before, _, calls = text.rpartition("@")
    counted = before and re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", calls)
    counts = [int(count) for count in calls.split(",")] if counted else []
    for rest, found in ((text, []), (before, counts)):
        titles = ["", *(rest[:place] for place, sign in enumerate(rest) if sign == "=")]
        folders = [rest, *(rest[len(title) + 1:] for title in titles[1:])]
        for title, folder in zip(titles, folders, strict=True):
            if not folder or not os.path.isdir(os.path.expanduser(folder)):
                continue
            if rest == before and not counted:
                raise UserError(f"{text} ends in @{calls}; behind the @ are calls of the student, such as @1,4")
            return title, local_path(folder), found
    form = ", with TITLE= before it and @1,4 or other calls behind it" if "=" in text or "@" in text else ""
    raise UserError(f"{shown(text, quoted=False)} has no config.yaml; give the folder of a run{form}" if text else
                    "a run is an empty text; give the folder of a run")


def _difference(first: dict[str, object], second: dict[str, object]) -> str:
    name = next(key for key in first if first[key] != second[key])
    return f"teacher.{name} is {second[name]}, not {first[name]}"


if __name__ == "__main__":
    sys.exit(main())
