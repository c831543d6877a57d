"""What a run shows while it trains: metrics.jsonl, trackers, a progress bar or plain lines, sample grids, FID."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from flowdistill.conditioning.prompts import read_prompts
from flowdistill.config import RunConfig, TrainConfig
from flowdistill.evaluation import Evaluator, Reference, prompt_conditions, student_sampler
from flowdistill.evaluation.comparison import save_by_calls
from flowdistill.evaluation.evaluate import prompts_used
from flowdistill.evaluation.metrics import ranking_metric
from flowdistill.evaluation.metrics.prompt_scores import PromptScores
from flowdistill.students import Student
from flowdistill.training.stopping import KEY
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import disk_errors
from flowdistill.utils.images import save_grid
from flowdistill.utils.logging import on_terminal, say
from flowdistill.utils.text import read_lines

PROJECT = "flowdistill"
METRICS = "metrics.jsonl"
WIDEST_GRID = 20
ROW = 10
SAMPLE_SEED = 0
ONE_IMAGE = ("aim", "clearml")
"""accelerate's trackers whose ``log_images`` takes an image; that of the others takes several."""


def tracker_names(config: TrainConfig) -> list[str]:
    """Trackers to start: as configured, or tensorboard when it is installed.

    Raises:
        UserError: a name accelerate does not know, or one whose package is not installed.
    """
    if config.trackers is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(name) for name in get_available_trackers()}
    for name in config.trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"train.trackers names '{name}'; accelerate has {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in available:
            raise UserError(f"train.trackers names '{name}', which is not installed; run: pip install {name}")
    return list(config.trackers)


class Reporter:
    """Writes figures where people look; everything but ``__init__`` acts on the main process only.

    Args:
        config: settings of the run.
        folder: the run folder.
        accelerator: made with the trackers of ``tracker_names``.
        shown: figures that the progress shows in place of a role's loss, by role (:meth:`Method.shown`).
    """

    def __init__(
        self, config: RunConfig, folder: Path, accelerator: Accelerator, shown: Mapping[str, str] | None = None
    ) -> None:
        self.config, self.folder, self.accelerator, self.shown = config, folder, accelerator, shown or {}
        self.main = accelerator.is_main_process
        self._bar: tqdm[Any] | None = None

    def start(self, step: int, anew: bool) -> None:
        """Open everything at ``step``; lines of metrics.jsonl after it are dropped, for they will come again.

        Args:
            anew: no checkpoint is there to go on from, so all lines will come again.
        """
        if self.main:
            with disk_errors(str(self.folder / METRICS)):
                truncate_metrics(self.folder / METRICS, -1 if anew else step)
        with disk_errors(f"the trackers' files in {self.folder}"):
            asked = self.accelerator.log_with or self.accelerator.trackers  # nobody else wants the settings
            settings = flat(self.config) if asked else None
            self.accelerator.init_trackers(PROJECT, config=settings)
        if self.main and on_terminal():
            self._bar = tqdm(
                total=self.config.train.steps,
                initial=step,
                desc=self.config.method.name,
                unit="step",
                dynamic_ncols=True,
            )

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def log(self, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl with a ``step``, and the same to the trackers; None is null."""
        if not self.main:
            return
        with disk_errors(str(self.folder / METRICS)), open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({name: _finite(value) for name, value in values.items()}, allow_nan=False) + "\n")
        numbers = {name: value for name, value in values.items() if _finite(value) is not None and name != "step"}
        self.accelerator.log(numbers, step=values["step"])
        shown = dict(self._progress(name, numbers) for name in numbers if name.startswith("loss/"))
        rate = {"images/s": numbers["images_per_second"]} if "images_per_second" in numbers else {}
        wanted = self.config.train.stop_when
        names = ["fid", "fd", *([] if wanted is None else [wanted.metric, "best_step"])]
        measured = {name: numbers[name] for name in names if name in numbers}
        texts = {name: f"{value:.4g}" for name, value in (shown | rate | measured).items()}
        if self._bar is not None:
            self._bar.set_postfix(texts)
        else:
            listed = "".join(f", {name} {text}" for name, text in texts.items())
            say(f"{self.config.method.name}: step {values['step']} of {self.config.train.steps}{listed}")

    def picture(self, name: str, path: Path, step: int) -> None:
        """The grid in the file ``path`` to those trackers that accelerate gives images to, under ``name``."""
        takers = [tracker for tracker in self.accelerator.trackers if hasattr(tracker, "log_images")]
        if not self.main or not takers:
            return
        with Image.open(path) as image:
            picture = image.convert("RGB")
        for tracker in takers:
            how = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            images = picture if tracker.name in ONE_IMAGE else np.asarray(picture)[None]
            tracker.log_images({name: images}, step=step, **how)

    def _progress(self, loss: str, numbers: Mapping[str, Any]) -> tuple[str, Any]:
        """What the progress shows of a role's loss: name and value."""
        role = loss.removeprefix("loss/")
        figure = f"{role}/{self.shown.get(role)}"
        return (figure, numbers[figure]) if figure in numbers else (role, numbers[loss])

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def save_samples(student: Student, path: Path, count: int) -> None:
    """A grid of ``count`` images, always of the same noise and labels or prompts; a column each of a few.

    Of a student of several calls it has a row for each number of them, with at most ``count`` images.
    """
    listed = getattr(getattr(student, "prompts", None), "prompts", None)
    classes = getattr(student, "classes", None)
    shown = min(len(listed), count) if listed is not None else 0 if classes is None else len(classes.shown)
    columns = shown if 1 < shown <= WIDEST_GRID else None
    if student.num_steps > 1:
        with disk_errors(str(path)):
            save_by_calls(student, path, min(count, columns or ROW), SAMPLE_SEED)
        return
    images = student.generate(num_images=count, seed=SAMPLE_SEED)
    with disk_errors(str(path)):
        save_grid(images, path, columns)


class FidCallback:
    """Figures of the averaged student with all its calls during training; features and reference are loaded once.

    All processes make the same calls and share the work.

    Args:
        reference: the settings' reference, where it is open already.

    Raises:
        UserError: a figure of ``train.stop_when`` that no metric ranks models by.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, reference: Reference | None = None) -> None:
        settings = config.evaluation
        self.prompts = None if settings.prompts is None else read_prompts(settings.prompts)
        names, self.expected = ["frechet", "accuracy"], {"fid", "accuracy"}
        if config.train.stop_when is not None:
            names.append(ranking_metric(config.train.stop_when.metric, KEY).name)
            self.expected |= {config.train.stop_when.metric}
        self.evaluator = Evaluator(
            settings.features,
            reference or settings.reference,
            settings.num_images,
            0,
            settings.batch_size,
            metrics=list(dict.fromkeys(names)),
            scorers=settings.scorers if PromptScores.name in names else (),
            own=config.teacher.labels,
            device=accelerator.device,
            progress=False,
        )

    def __call__(self, student: Student) -> dict[str, Any]:
        """``fid``, or ``fd`` of features whose distance is no FID, ``accuracy`` and those beside the figure of
        ``train.stop_when``; None: could not be measured."""
        with prompts_used([student], self.prompts):
            row = self.evaluator.measure(
                student_sampler(student), tuple(student.shape), student.num_classes, calls=student.num_steps,
                condition=prompt_conditions(student),
            )
        names = [name for metric in self.evaluator.metrics for name in metric.figures]
        figures = {name: row.figures.get(name) for name in names}
        return {name: value for name, value in figures.items() if value is not None or name in self.expected}


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to ``step``; a line cut short by a crash goes too."""
    if not path.is_file():
        return
    kept = []
    for line in read_lines(path, strict=False):
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def flat(config: RunConfig) -> dict[str, Any]:
    """The configuration as dotted names and plain values, as trackers want it."""
    from omegaconf import OmegaConf

    result: dict[str, Any] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}{name}.", inner)
        else:
            result[prefix[:-1]] = value if isinstance(value, (int, float, str, bool)) else str(value)

    walk("", OmegaConf.to_container(OmegaConf.structured(config)))
    return result


def _finite(value: object) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
