"""Folders of images in the layouts that benchmarks of text-to-image models read: GenEval, DPG-Bench, HPSv2, DrawBench.

The benchmarks' own programs score them; they list what is in the folder, so nothing else is written there. Image j of
prompt i has the noise of index i * M + j, M images a prompt, whatever the number of processes. An image is complete or
absent: the same command goes on where one was stopped or killed, and makes the same files.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm.auto import tqdm

from flowdistill.conditioning.prompts import read_prompts
from flowdistill.data.image_sets import batches_of
from flowdistill.evaluation.generation import Sampler
from flowdistill.students import Student
from flowdistill.teachers import Teacher
from flowdistill.teachers.autoencoder import BaseVae
from flowdistill.teachers.codec import VaeCodec
from flowdistill.utils.errors import UserError, listed, shown
from flowdistill.utils.files import atomic_write, check_place, local_path
from flowdistill.utils.hashing import json_sha256, module_sha256
from flowdistill.utils.images import to_uint8
from flowdistill.utils.processes import Processes
from flowdistill.utils.randomness import indexed_noise
from flowdistill.utils.text import (
    JsonObject,
    iter_csv_rows,
    read_json,
    read_json_lines,
    read_json_object,
    read_text,
    text_of,
)


@dataclass(frozen=True)
class SuitePrompt:
    """A prompt of a benchmark.

    Attributes:
        text: the prompt.
        place: of its images below the folder: a folder, or the name of a file without its ending.
        line: what the benchmark wants beside the images, as it is; None for nothing.
    """

    text: str
    place: str
    line: str | None = None


class Suite(ABC):
    """A benchmark.

    Attributes:
        name: as it is asked for.
        prompts: how many it has; another number is warned of.
        each: images of a prompt.
        bring: what its prompts are read from, in words.
        square: whether only square images fit its layout.
    """

    name: ClassVar[str]
    prompts: ClassVar[int]
    each: ClassVar[int] = 1
    bring: ClassVar[str]
    square: ClassVar[bool] = False

    @abstractmethod
    def read(self, path: Path) -> list[SuitePrompt]:
        """The prompts, in the benchmark's order.

        Raises:
            UserError: something that is not what the benchmark has.
        """

    def files(self, prompt: SuitePrompt) -> list[str]:
        """Where the pictures of a prompt are, below the folder."""
        return [f"{prompt.place}.jpg"]

    def pictures(self, images: Tensor) -> list[Image.Image]:
        """A picture for each of the files, of a prompt's images (M, C, H, W) in [0, 1]."""
        return [to_pil_image(pixels).convert("RGB") for pixels in _pixels(images)]


class GenEval(Suite):
    """GenEval (Ghosh et al. 2023, arXiv 2310.11513): ``00000/samples/0000.png`` to ``0003.png``, and the prompt's line
    as ``00000/metadata.jsonl``."""

    name = "geneval"
    prompts = 553
    each = 4
    bring = "GenEval's evaluation_metadata.jsonl"

    def read(self, path: Path) -> list[SuitePrompt]:
        form = '{"tag": "colors", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a red bench"}'

        def record(value: JsonObject) -> tuple[str, str]:
            _ = text_of(value["tag"]), [text_of(each["class"]) for each in value["include"]]
            return text_of(value["prompt"]), json.dumps(value)

        records = [record for _, record in read_json_lines(path, record, form)]
        return [SuitePrompt(text, f"{number:05d}", line) for number, (text, line) in enumerate(records)]

    def files(self, prompt: SuitePrompt) -> list[str]:
        return [f"{prompt.place}/samples/{number:04d}.png" for number in range(self.each)]


class DPGBench(Suite):
    """DPG-Bench (Hu et al. 2024, arXiv 2403.05135): ``NAME.png`` for ``NAME.txt``, four images in two rows."""

    name = "dpg"
    prompts = 1_065
    each = 4
    bring = "the folder dpg_bench/prompts, a .txt file for each prompt"
    square = True

    def read(self, path: Path) -> list[SuitePrompt]:
        if not path.is_dir():
            raise UserError(f"{path} is no folder of .txt files, a prompt each")
        files = sorted(file for file in path.iterdir() if file.suffix == ".txt" and not file.name.startswith("."))
        found = [SuitePrompt(read_text(file).strip(), file.name.split(".")[0]) for file in files]
        twice = [name for name, count in Counter(prompt.place for prompt in found).items() if count > 1]
        if twice:
            raise UserError(f"{path} has several prompts named {listed(twice)}, and a name ends at its first dot")
        return found

    def files(self, prompt: SuitePrompt) -> list[str]:
        return [f"{prompt.place}.png"]

    def pictures(self, images: Tensor) -> list[Image.Image]:
        first, second, third, fourth = _pixels(images)
        rows = [torch.cat([first, second], dim=-1), torch.cat([third, fourth], dim=-1)]
        return [to_pil_image(torch.cat(rows, dim=-2)).convert("RGB")]


class HPSv2(Suite):
    """HPSv2 (Wu et al. 2023, arXiv 2306.09341): ``anime/00000.jpg`` and so on for four styles."""

    name = "hps"
    prompts = 3_200
    bring = ("the folder with HPSv2's anime.json, concept-art.json, paintings.json and photo.json, each a list of "
             "prompts")
    styles = ("anime", "concept-art", "paintings", "photo")

    def read(self, path: Path) -> list[SuitePrompt]:
        missing = [f"{style}.json" for style in self.styles if not (path / f"{style}.json").is_file()]
        if missing:
            raise UserError(f"{path} has no {listed(missing)}")
        return [SuitePrompt(text, f"{style}/{number:05d}") for style in self.styles
                for number, text in enumerate(_list(path / f"{style}.json"))]


class DrawBench(Suite):
    """DrawBench (Saharia et al. 2022, arXiv 2205.11487) as HPSv2's program reads it: ``00000.jpg`` and so on."""

    name = "drawbench"
    prompts = 200
    bring = "HPSv2's drawbench.json, DrawBench's .csv with a column Prompts, or a text file with one a line"

    def read(self, path: Path) -> list[SuitePrompt]:
        if path.suffix.lower() == ".json":
            texts: Sequence[str] = _list(path)
        elif path.suffix.lower() == ".csv":
            rows = [row for _, row in iter_csv_rows(path)]
            names = rows[0] if rows else []
            column = next((n for n, name in enumerate(names) if name.strip().lower() in ("prompts", "prompt")), None)
            if column is None:
                raise UserError(f"{path} has no column Prompts, but {listed(names) or 'none'}")
            texts = [row[column] if column < len(row) else "" for row in rows[1:]]
        else:
            texts = read_prompts(path).prompts
        return [SuitePrompt(text, f"{number:05d}") for number, text in enumerate(texts)]


SUITES: dict[str, Suite] = {suite.name: suite for suite in (GenEval(), DPGBench(), HPSv2(), DrawBench())}


def _list(file: Path) -> list[str]:
    """A JSON list of texts."""
    value = read_json(file)
    try:
        if not isinstance(value, list):
            raise ValueError
        return [text_of(text) for text in value]
    except ValueError:
        raise UserError(f"{file} must hold a list of prompts like [\"a cat\", \"a dog\"], not {shown(value)}") from None


def _pixels(images: Tensor) -> Tensor:
    return to_uint8(images.detach().cpu())


def read_suite(name: str, path: str | os.PathLike[str]) -> list[SuitePrompt]:
    """The prompts of the benchmark ``name``.

    Raises:
        UserError: what was given is not what the benchmark has, with what to bring; a warning for another number.
    """
    suite, place = SUITES[name], local_path(path)
    needs = f"--suite {name} reads {suite.bring}"
    if not place.exists():
        raise UserError(f"{needs}, and {place} does not exist")
    try:
        found = suite.read(place)
        empty = [prompt.place for prompt in found if not prompt.text.strip()]
        if empty:
            raise UserError(f"{place} has no prompt for {listed(empty)}")
    except UserError as error:
        raise UserError(f"{needs}: {error}") from error
    if not found:
        raise UserError(f"{needs}, and {place} has no prompt")
    if len(found) != suite.prompts and Processes.current().is_main:
        warnings.warn(f"{place} has {len(found):,} prompts and {name} has {suite.prompts:,}, so scores are not "
                      "comparable with others'", stacklevel=2)
    return found


def write_suite(
    name: str,
    prompts: Sequence[SuitePrompt],
    model: Teacher | Student,
    sampler: Sampler,
    out: str | os.PathLike[str],
    seed: int = 0,
    batch_size: int = 64,
    how: JsonObject | None = None,
    progress: bool = True,
) -> int:
    """Make what is missing of a benchmark's images; all processes share the work.

    What they are made with is written beside the folder, ``<out>.suite.json``, and images of something else are never
    mixed in.

    Args:
        sampler: of the model, see :func:`flowdistill.evaluation.generation.generate`.
        out: a folder, new, empty, or begun by the same command.
        batch_size: images in one call of the sampler.
        how: steps, guidance and whatever else decides the images besides the model's weights.

    Returns:
        The number of images, with those that were there.

    Raises:
        UserError: the folder holds something else; a model without prompts, or with images that do not fit the layout.
    """
    suite, folder, processes = SUITES[name], local_path(out).absolute(), Processes.current()
    if model.prompts is None:
        raise UserError(f"--suite {name} is for text-to-image models, and this one takes no prompts")
    beside = record_of(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    facts = _facts(name, prompts, model, seed, how or {})
    if suite.square and not beside.is_file():
        with torch.no_grad():
            first = sampler(indexed_noise(tuple(model.shape), seed, range(1)), model.encode(None, [prompts[0].text]))
        height, width = first.shape[-2:]
        if height != width:
            raise UserError(f"--suite {name} takes square images, and these are {width} x {height}")
    processes.on_main(lambda: _begin(folder, beside, facts))
    per = max(1, batch_size // suite.each)  # prompts whose images are made together, the same for any processes
    mine = processes.span(len(prompts), per)
    groups = [group for group in batches_of(mine, per)]
    done = [_is_done(suite, folder, [prompts[i] for i in group]) for group in groups]
    total = len(mine) * suite.each
    there = sum(len(group) * suite.each for group, complete in zip(groups, done, strict=True) if complete)
    # None: no bar either where standard error is no terminal, as its redrawing would fill a log file.
    hidden = None if progress and processes.is_main else True

    def work() -> None:
        if all(done):
            return
        conditions = model.encode(None, [prompts[i].text for i in mine])
        assert conditions is not None  # it takes prompts
        partial.mkdir(parents=True, exist_ok=True)
        with tqdm(total=total, initial=there, desc=name, unit="img", leave=False, disable=hidden) as bar:
            for group, complete in zip(groups, done, strict=True):
                if complete:
                    continue
                indices = range(group.start * suite.each, group.stop * suite.each)
                images = []
                for part in batches_of(indices, batch_size):
                    rows = torch.tensor([index // suite.each - mine.start for index in part], device=model.device)
                    noise = indexed_noise(tuple(model.shape), seed, part)
                    images.append(sampler(noise, conditions[rows]).cpu())
                    bar.update(len(part))
                for prompt, own in zip(group, torch.cat(images).split(suite.each), strict=True):
                    _write(suite, folder, partial, prompts[prompt], own, processes.rank)

    with torch.no_grad():
        processes.together(work)
    processes.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
    return len(prompts) * suite.each


def record_of(folder: Path) -> Path:
    """Where it is written what the images in a folder are made with."""
    return folder.with_name(f"{folder.name}.suite.json")


def _facts(
    name: str, prompts: Sequence[SuitePrompt], model: Teacher | Student, seed: int, how: JsonObject
) -> JsonObject:
    """What decides the images."""
    networks = model.networks if isinstance(model, Student) else [model.network]
    weights: list[object] = [*(module_sha256(network) for network in networks), module_sha256(model.codec)]
    if isinstance(model.codec, VaeCodec) and _vae_of(model) is not None:  # whose weights may be scaled in two ways
        codec = model.codec
        weights += [codec.scale, codec.shift, codec.mean.flatten().tolist(), codec.std.flatten().tolist()]
    return {"suite": name, "prompts_sha256": json_sha256([[prompt.text, prompt.place] for prompt in prompts]),
            "weights_sha256": json_sha256(weights), "seed": seed, **how}


def _vae_of(model: Teacher | Student) -> BaseVae | None:
    return model.info.base_vae if isinstance(model, Student) else model.vae


def _begin(folder: Path, beside: Path, facts: JsonObject) -> None:
    """Make the folder, or see that what is in it was made with the same."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} must be a folder, and is a file")
    check_place(folder, f"--out {folder}")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not beside.is_file():
        raise UserError(f"--out {folder} is not empty and was not begun by this command ({beside.name} is not beside "
                        "it); choose a new folder")
    if occupied:
        before = read_json_object(beside)
        for key in dict.fromkeys([*before, *facts]):
            if before.get(key) != facts.get(key):
                raise UserError(f"--out {folder} was begun with another {key} ({shown(before.get(key))}, and here "
                                f"{shown(facts.get(key))}); choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(beside) as file:
        file.write((json.dumps(facts, indent=1) + "\n").encode())


def _is_done(suite: Suite, folder: Path, prompts: Iterable[SuitePrompt]) -> bool:
    """Whether everything of these prompts is there."""
    return all((folder / name).is_file() for prompt in prompts for name in
               [*suite.files(prompt), *([] if prompt.line is None else [_line_of(prompt)])])


def _line_of(prompt: SuitePrompt) -> str:
    return f"{prompt.place}/metadata.jsonl"


def _write(suite: Suite, folder: Path, partial: Path, prompt: SuitePrompt, images: Tensor, rank: int) -> None:
    """The files of a prompt that are missing, the line last."""
    for name, picture in zip(suite.files(prompt), suite.pictures(images), strict=True):
        content = io.BytesIO()
        picture.save(content, "png" if name.endswith(".png") else "jpeg")
        _place(folder / name, partial / f"{rank}", content.getvalue())
    if prompt.line is not None:
        _place(folder / _line_of(prompt), partial / f"{rank}", prompt.line.encode())


def _place(path: Path, passing: Path, content: bytes) -> None:
    """Write a file under a passing name in another folder, and move it to its place when it is on disk: programs that
    list the folder see complete images only."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(passing, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(passing, path)
