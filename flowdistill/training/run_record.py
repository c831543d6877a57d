"""What a run folder says of itself, read from its files alone: also while the run goes on, and after a crash."""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowdistill.config import MISSING, RunConfig, load_config, run_settings
from flowdistill.training.checkpoint import checkpoints
from flowdistill.training.environment import Start, recorded_starts
from flowdistill.utils.charts import Point
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.text import JsonObject, read_lines

if TYPE_CHECKING:
    from flowdistill.evaluation import Report

CONFIG, METRICS, REPORT, SAMPLES = "config.yaml", "metrics.jsonl", "report.json", "samples"
COUNTERS = ("step", "images", "seconds", "best_step")
"""Of a line of metrics.jsonl: where it stands, and no figure."""
GRID = re.compile(r"step-(\d+)\.png")


@dataclass(frozen=True)
class Setting:
    """One setting of a run; ``value`` and ``default`` as texts, the default None where it is not known or there is
    none."""

    key: str
    value: str
    default: str | None

    @property
    def changed(self) -> bool:
        return self.default is None or self.value != self.default


@dataclass
class Part:
    """One run of the loop: the run folder itself, or one of several in it.

    Attributes:
        name: of its folder below the run's; "" of the run itself.
        figures: what was logged, name -> (step, value) in the order of steps; None where it was not finite.
        last: the finite numbers in the last line of its metrics.jsonl; empty before the first.
        damaged: lines that could not be read.
        grids: (step, file) of the sample grids, by step.
        rate: median of the logged images a second.
        starts: where it was trained; empty where it is not recorded.
    """

    folder: Path
    name: str
    figures: dict[str, list[Point]] = field(default_factory=dict)
    last: JsonObject = field(default_factory=dict)
    damaged: int = 0
    grids: list[tuple[int, Path]] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step that is known to be done."""
        saved = checkpoints(self.folder / "checkpoints")
        return max(int(self.last.get("step", 0)), saved[-1][0] if saved else 0)

    @property
    def rate(self) -> float | None:
        found = [value for _, value in self.figures.get("images_per_second", []) if value is not None]
        return statistics.median(found) if found else None

    @property
    def written(self) -> datetime | None:
        """When its metrics.jsonl was written last; None before it is there."""
        file = self.folder / METRICS
        return datetime.fromtimestamp(file.stat().st_mtime).astimezone() if file.is_file() else None


@dataclass
class RunRecord:
    """A run folder as it is now.

    Attributes:
        folder: as it was given.
        name: what it is called beside others.
        values: its settings as they are written, in sections.
        settings: the same, one by one, with their defaults.
        parts: the runs of the loop in it, those without any line too.
        pictures: what it shows of its end, name -> file: teacher and student, the student alone, those of its cards.
        report: its evaluation; None where there is none.
        problems: what is there and could not be read, a sentence each.
    """

    folder: Path
    name: str
    values: JsonObject
    settings: list[Setting]
    parts: list[Part]
    pictures: dict[str, Path]
    report: Report | None
    problems: list[str]

    @property
    def finished(self) -> bool:
        """Whether it has come to its end: its last picture is there, and goes as soon as training goes on."""
        return (self.folder / SAMPLES / "final.png").is_file()

    @property
    def planned(self) -> int | None:
        steps = self.section("train").get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def seconds(self) -> float | None:
        """Of training, over all parts and resumes, without measurements and files."""
        found = [part.last["seconds"] for part in self.parts if isinstance(part.last.get("seconds"), (int, float))]
        return sum(found) if found else None

    def section(self, name: str) -> JsonObject:
        """A section of the settings; empty where it is missing."""
        found = self.values.get(name)
        return found if isinstance(found, dict) else {}


def read_run(folder: str | os.PathLike[str], name: str) -> RunRecord:
    """Read a run folder. What is missing in it is missing in the record, and what is damaged is said there.

    Raises:
        UserError: no run folder, or its config.yaml cannot be read.
    """
    path = local_path(folder)
    if not (path / CONFIG).is_file():
        raise UserError(f"{folder} is no run folder: it has no {CONFIG}" if path.is_dir() else
                        f"{folder} {'is a file' if path.exists() else 'does not exist'}; give the folder of a run")
    values, problems = run_settings(path), list[str]()
    parts = [read_part(each, "" if each == path else each.name) for each in _part_folders(path)]
    for part in parts:
        if part.damaged:
            lines = "1 line" if part.damaged == 1 else f"{part.damaged} lines"
            problems.append(f"without {lines} of {part.folder / METRICS} that could not be read")
    report = None
    if (path / REPORT).is_file():
        from flowdistill.evaluation import Report

        try:
            report = Report.read_json(path / REPORT)
        except UserError as error:
            problems.append(str(error))
    defaults, reason = _defaults(path)
    if reason:
        problems.append(f"without the defaults of its settings: {reason}")
    settings = [Setting(key, as_text(value), None if key not in defaults or defaults[key] == MISSING
                        else as_text(defaults[key])) for key, value in leaves(values)]
    return RunRecord(path, name, values, settings, parts, _pictures(path), report, problems)


def read_part(folder: Path, name: str) -> Part:
    """What one run of the loop has written so far."""
    part = Part(folder, name, starts=recorded_starts(folder))
    if (folder / METRICS).is_file():
        for text in read_lines(folder / METRICS, strict=False):
            try:
                line = _line(text)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                part.damaged += bool(text.strip())
                continue
            part.last = {name: value for name, value in line.items() if value is not None}
            for figure, value in line.items():
                if figure not in COUNTERS:
                    part.figures.setdefault(figure, []).append((line["step"], value))
    found = [(GRID.fullmatch(file.name), file) for file in _files(folder / SAMPLES)]
    part.grids = sorted((int(match[1]), file) for match, file in found if match)
    return part


def _line(text: str) -> JsonObject:
    """The numbers in a line of metrics.jsonl, None for those that are not finite; its step and images are whole.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is no such line.
    """
    found: JsonObject = {}
    for name, value in json.loads(text).items():
        if name in ("step", "images", "best_step") and value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
                raise ValueError(f"{name} is no number of steps or images")
            found[name] = value
        elif value is None:
            found[name] = None
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            # json reads an integer of any length, which may be beyond every float.
            found[name] = float(value) if abs(value) <= sys.float_info.max else None
    if found["step"] is None:
        raise ValueError("a line without a step")
    return found


def leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings in sections as dotted keys and values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_text(value: object) -> str:
    """A setting's value as it may be written in YAML and on the command line."""
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)


def _part_folders(folder: Path) -> list[Path]:
    """The run folder, where it is a run of the loop, and those in it, in the order of their names."""
    inner = [entry for entry in sorted(folder.iterdir(), key=_by_number)
             if entry.is_dir() and any((entry / name).is_file() for name in (METRICS, CONFIG))]
    alone = (folder / METRICS).is_file() or (folder / "checkpoints").is_dir() or not inner
    return [folder, *inner] if alone else inner


def _by_number(path: Path) -> list[tuple[str, int]]:
    """student-2 before student-10."""
    return [(words, int(number or -1)) for words, number in re.findall(r"(\D+)(\d*)", path.name)]


def _pictures(folder: Path) -> dict[str, Path]:
    found = {"teacher and student from the same noise": folder / SAMPLES / "comparison.png",
             "the student": folder / SAMPLES / "final.png"}
    found |= {f"validation pictures in {entry.name}/": entry / "validation.png"
              for entry in sorted(folder.iterdir(), reverse=True) if entry.is_dir()}
    return {name: file for name, file in found.items() if file.is_file()}


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _defaults(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The default of each setting of a run's method by its dotted key, or nothing and why."""
    from omegaconf import OmegaConf

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method = load_config(folder / CONFIG).method
        plain = OmegaConf.to_container(OmegaConf.structured(RunConfig(method=type(method)())))
    except UserError as error:
        return {}, str(error)
    found = dict(leaves(plain)) if isinstance(plain, dict) else {}
    # The name is what selects the method, and whoever writes a configuration chooses it.
    return {key: value for key, value in found.items() if key != "method.name"}, None
