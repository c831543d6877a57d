"""The echo stage: the student's own best pictures join the concept's images, and all networks train on.

The paper says that high-quality samples of the student refine both models, and its code does not have the stage; how
samples are filtered, mixed, gated and taken back is ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from flowdistill.config import needs, option
from flowdistill.methods.echodistill.judge import Judge
from flowdistill.training.snapshots import WeightSnapshots
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_folder, atomic_write, disk_errors
from flowdistill.utils.images import save_grid, save_images
from flowdistill.utils.logging import say
from flowdistill.utils.processes import Processes
from flowdistill.utils.text import JsonObject

FOLDER = "echo"
VALIDATION_SEED = 77_001
POOL_SEED = 88_001
SHOWN = 64
METADATA = "metadata.jsonl"


@dataclass
class EchoConfig:
    """Settings of the echo stage; all are ours, for the published code has none of it."""

    start: int | None = option(None, "step before which the first round's pictures are made; null: no echo stage",
                               at_least=1)
    rounds: int = option(1, "times that pictures are made and trained on", at_least=1, only=needs("start"))
    steps: int = option(300, "steps of a round; train.steps counts all", at_least=1, only=needs("start"))
    prompts: list[str] = option([], "prompts of the student's samples, with the new word; []: those it is trained on",
                                only=needs("start"))
    num_samples: int = option(200, "pictures the student makes in a round", at_least=1, only=needs("start"))
    keep_fraction: float = option(0.25, "at most this share of all pictures, and of each prompt's, is kept, those most "
                                        "like the concept", above=0, at_most=1, only=needs("start"))
    min_level: float = option(0.5, "a picture must be this much like the concept: 0 is a picture of the initializer's "
                                   "word, 1 as alike as the concept's own images are", only=needs("start"))
    min_separation: float | None = option(1.5, "d' at which the identity network must tell the concept's pictures, "
                                               "each left out in turn, from ordinary ones of the same prompts; below "
                                               "it the run is refused; null: do not ask", at_least=0,
                                               only=needs("start"))
    identity: str | None = option(None, "the network of the level, as method.identity; null: that one, which a student "
                                        "trained on its features may please without being more like the concept",
                                  only=needs("start"))
    features: str = option("pooled", "what the level compares: pooled, the identity network's features of the whole "
                                     "picture; patches, each of a reference's places with the one most like it",
                           choices=("pooled", "patches"), only=needs("start"))
    real_fraction: float = option(0.5, "share of the concept's own images in the batches of the stage", at_least=0,
                                  at_most=1, only=needs("start"))
    rate: float = option(0.5, "factor on the learning rates", above=0, only=needs("start"))
    tolerance: float | None = option(0.05, "a round after which the score of the student or of the teacher is lower by "
                                           "more than this is taken back; null: none is", at_least=0,
                                           only=needs("start"))
    num_validation: int = option(32, "pictures of each model that make its score", at_least=2, only=needs("start"))

    def check_steps(self, steps: int) -> str | None:
        """A sentence about a run of ``steps`` that ends before the stage does; None for a longer one, and without a
        stage."""
        if self.start is None or steps >= (end := self.start + self.rounds * self.steps):
            return None
        ends = f"train.steps is {steps}, which ends "
        if steps <= self.start:
            return (f"{ends}before the echo stage begins (method.echo.start is {self.start}), so it is left out; raise "
                    f"train.steps to {end}, lower method.echo.start, or set it to null")
        return (f"{ends}in round {-(-(steps - self.start) // self.steps)} of the echo stage, whose end is step {end} "
                f"(method.echo: start {self.start}, rounds {self.rounds} of steps {self.steps}); raise train.steps to "
                "that, or lower one of these")


class Pool(NamedTuple):
    """Kept pictures (N, 3, H, W) in [0, 1] and the numbers (N,) of their prompts."""

    images: Tensor
    prompts: Tensor


class Scores(NamedTuple):
    """The judge's two scores, each (N,), of a round's pictures."""

    levels: Tensor
    margins: Tensor


class EchoStage:
    """When a round begins and ends, and what it leaves behind in ``echo/`` of the run folder.

    Args:
        judge: makes the judge when the stage first needs one.
        sample: (``"student"`` or ``"teacher"``, numbers of prompts (B,), seed) -> latents and pictures on the CPU.
        tensors: everything that trains, by name, to take a round back.
        prompts: their numbers (M,).
        texts: every prompt with the new word, by its number.
    """

    def __init__(
        self,
        config: EchoConfig,
        judge: Callable[[], Judge],
        sample: Callable[[str, Tensor, int], tuple[Tensor, Tensor]],
        tensors: Callable[[], Mapping[str, Tensor]],
        prompts: Tensor,
        texts: Sequence[str],
    ) -> None:
        self.config, self.sample, self.tensors, self.prompts, self.texts = config, sample, tensors, prompts, texts
        self._make_judge = judge
        self._judge: Judge | None = None
        self.history: list[JsonObject] = []
        self.pool: Pool | None = None
        self._current = -1  # the round whose pool is in memory
        self._checked = config.min_separation is None

    def rate(self, step: int) -> float:
        return 1.0 if self.config.start is None or step < self.config.start else self.config.rate

    def begin(self, step: int, folder: Path) -> bool:
        """Whatever is due before the updates of ``step``; tells whether the last round was taken back.

        Raises:
            UserError: before the first update, if the identity network cannot tell the concept; a lost file of a round.
        """
        if self.config.start is None:
            return False
        self.check()
        if step < self.config.start:
            return False
        number, inside = divmod(step - self.config.start, self.config.steps)
        taken_back = False
        if inside == 0 and number <= self.config.rounds:
            taken_back = number > 0 and self._close(number - 1, folder)
            if number < self.config.rounds:
                self._open(number, folder)
        number = min(number, self.config.rounds - 1)
        if self._current != number:
            self.pool, self._current = self._read(self._file(number, folder)), number
        return taken_back

    def conclude(self, step: int, folder: Path) -> None:
        """The end of training: judge the round that ends here, finished or not."""
        start = self.config.start
        if start is not None and start < step <= start + self.config.rounds * self.config.steps:
            self._close((step - start - 1) // self.config.steps, folder)

    def check(self) -> None:
        """Refuse a stage that would choose by chance; asked once.

        Raises:
            UserError: the identity network cannot tell the concept.
        """
        if self.config.start is None or self._checked:
            return
        limit = self.config.min_separation

        def refusal() -> str:
            found = self.judge.separation
            if math.isnan(found.d_prime):
                return "one picture of the concept cannot be compared with others"
            figures = (f"d' {found.d_prime:.2f}, {100 * found.overlap:.0f} % of pairs in which the ordinary one is at "
                       "least as alike")
            if limit is None or found.d_prime >= limit:
                say(f"echo stage: the identity network tells the concept's pictures from ordinary ones ({figures})")
                return ""
            return (f"the identity network hardly tells the concept's pictures from ordinary ones of the same prompts "
                    f"({figures}; method.echo.min_separation asks for d' {limit:g})")

        reason = Processes.current().on_main(refusal)
        if reason:
            named = "method.identity" if self.config.identity is None else "method.echo.identity"
            raise UserError(f"the echo stage would choose by chance: {reason}; give another network as "
                            f"{named}, masks beside the pictures (NAME.mask.png) or more pictures, or train "
                            "without the stage (method.echo.start=null)")
        self._checked = True

    def _open(self, number: int, folder: Path) -> None:
        """Measure, remember the weights, make the student's pictures and keep the best."""
        WeightSnapshots(folder / FOLDER).write(number, self.tensors(), self.tensors())

        def make() -> JsonObject:
            before = self.measure()
            which = self._numbers(self.config.num_samples)
            latents, images = self.sample("student", which, POOL_SEED + number)
            scores = Scores(self.judge.levels(images), self.judge.margins(latents, which))
            kept, figures = self.choose(scores, which)
            content = {"images": images[kept].contiguous(), "prompts": which[kept].contiguous()}
            with disk_errors(str(self._file(number, folder))), atomic_write(self._file(number, folder)) as output:
                output.write(save(content))
            if len(kept):
                save_grid(images[kept[:SHOWN]], self._file(number, folder).with_suffix(".png"))
            self._show(self._file(number, folder).with_suffix(""), images, which, scores, kept)
            separation = {name: _finite(value) for name, value in asdict(self.judge.separation).items()}
            return {"round": number + 1, "separation": separation, **figures, "before": before}

        entry = Processes.current().on_main(make)
        self.history = [*self.history[:number], entry]
        self._current = -1
        self._report(folder)

    def choose(self, scores: Scores, which: Tensor) -> tuple[Tensor, JsonObject]:
        """Numbers of the pictures to keep, the best first, and what was found; ``which``: the numbers (N,) of prompts.

        One must reach the level and fit its own prompt better than any other; then only the most alike of each prompt
        are kept. Over all prompts together some places would be in every picture, because a network takes part of the
        background for the object, and others in none.
        """
        levels, margins = scores
        passed = (levels >= self.config.min_level) & (margins > 0)
        order = levels.argsort(descending=True, stable=True)
        rank = torch.full_like(order, -1)  # of a picture among its prompt's, 0 the best; -1: out
        for prompt in which.unique():
            most = max(1, int(self.config.keep_fraction * int((which == prompt).sum())))
            rows = order[(which == prompt)[order] & passed[order]][:most]
            rank[rows] = torch.arange(len(rows))
        # With few pictures a prompt its one at least may be more than the share of all: then the best of them.
        found = order[rank[order] >= 0]
        found = found[rank[found].argsort(stable=True)][: max(1, int(self.config.keep_fraction * len(levels)))]
        kept = found[levels[found].argsort(descending=True, stable=True)]
        return kept, {
            "samples": len(levels),
            "reached_level": int((levels >= self.config.min_level).sum()),
            "fit_their_prompt": int((margins > 0).sum()),
            "kept": len(kept),
        }

    def _show(self, folder: Path, images: Tensor, which: Tensor, scores: Scores, kept: Tensor) -> None:
        """A round's pictures as files, ``kept/`` and ``refused/``, each the most alike first, with what was found of
        each in ``metadata.jsonl``, which data sets of image folders read."""
        order = scores.levels.argsort(descending=True, stable=True)
        parts = {"kept": kept, "refused": order[~torch.isin(order, kept)]}
        with disk_errors(str(folder)), atomic_folder(folder) as partial:
            for name, rows in parts.items():
                if not len(rows):
                    continue
                files = save_images(images[rows], partial / name)
                about = [{"file_name": file.name, "text": self.texts[int(which[row])],
                          "level": _finite(float(scores.levels[row])), "margin": _finite(float(scores.margins[row]))}
                         for file, row in zip(files, rows.tolist(), strict=True)]
                lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in about)
                (partial / name / METADATA).write_text(lines, encoding="utf-8")

    def _close(self, number: int, folder: Path) -> bool:
        """Measure after a round; take it back if a score fell too far."""
        after = Processes.current().on_main(self.measure)
        before, entry = self.history[number]["before"], dict(self.history[number])
        limit = self.config.tolerance
        fell = [name for name in after if limit is not None and after[name]["score"] < before[name]["score"] - limit]
        if fell:
            WeightSnapshots(folder / FOLDER).read_into(number, self.tensors())
        self.history = [*self.history[:number], entry | {"after": after, "taken_back_for": fell}]
        self._report(folder)
        return bool(fell)

    def measure(self) -> dict[str, dict[str, float]]:
        """Mean level (each picture's from 0 to 1), share of pictures that fit their prompt, and the mean of both."""
        result = {}
        which = self._numbers(self.config.num_validation)
        for name in ("student", "teacher"):
            latents, images = self.sample(name, which, VALIDATION_SEED)
            level = self.judge.levels(images).clamp(0, 1).mean().item()
            fits = (self.judge.margins(latents, which) > 0).float().mean().item()
            result[name] = {"level": level, "fits": fits, "score": (level + fits) / 2}
        return result

    @property
    def judge(self) -> Judge:
        self._judge = self._judge or self._make_judge()
        return self._judge

    def _numbers(self, count: int) -> Tensor:
        """``count`` prompts in turn."""
        return self.prompts.cpu()[torch.arange(count) % len(self.prompts)]

    def _file(self, number: int, folder: Path) -> Path:
        return folder / FOLDER / f"round-{number + 1}.safetensors"

    def _read(self, file: Path) -> Pool | None:
        try:
            content = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is missing or damaged ({' '.join(str(error).split())}), and the run cannot go on "
                            "without it; put it back, or start anew in another output_dir") from error
        return Pool(content["images"], content["prompts"]) if len(content["images"]) else None

    def _report(self, folder: Path) -> None:
        def write() -> None:
            file = folder / FOLDER / "report.json"
            with disk_errors(str(file)), atomic_write(file) as output:
                output.write((json.dumps(self.history, indent=2) + "\n").encode())

        Processes.current().on_main(write)


def _finite(value: float) -> float | None:
    """The value for JSON, which knows no infinity; None in its place."""
    return value if math.isfinite(value) else None
