#!/usr/bin/env python
"""A world at full size on a GPU: a teacher within ten minutes, then a student of each configuration within five.

    python scripts/full_size.py fashion
    python scripts/full_size.py emoji
    python scripts/full_size.py fashion --only dmd2,dmd2_4step
    python scripts/full_size.py fashion train.gradient_accumulation=2         an override of all students

The teacher is trained by the world's own script. How many steps a student gets is found by a short trial of the same
command, so that training them takes --student-minutes with all that belongs to a step; it is then written down, and the
same command goes on where it was stopped. OUT gets teacher/, a run folder for each student, full_size.json with what
was asked and measured, and full_size.md, the table; every figure in both is measured. --device cpu with --tiny goes
through all of it with small networks and a few steps, to test the command itself.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flowdistill.config import load_config
from flowdistill.evaluation.report import Report
from flowdistill.features import load_features
from flowdistill.utils.devices import usable_device
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_write, check_writable, disk_errors, local_path
from flowdistill.utils.text import read_json_object, read_lines

ROOT = Path(__file__).resolve().parents[1]
RECORD, TABLE = "full_size.json", "full_size.md"
TRIAL_STEPS = 120
"""Of which the last third is timed: DisBack's first stage, of 60 steps, is over by then."""
SHARE = 0.9
"""Of a student's time that its steps are planned to take; the rest is for their spread."""
ON_GPU = ["train.precision=bf16", "train.compile=true", "teacher.dtype=bfloat16", "train.sample_every=0",
          "train.checkpoint_every=1000", "train.trackers=[]"]


@dataclass(frozen=True)
class World:
    """What is trained.

    Attributes:
        teacher: the script and its options on a GPU; of --tiny.
        pipeline: where in the teacher's folder the pipeline is.
        configs: folder of the students' configurations.
        overrides: of all students.
    """

    teacher: tuple[str, ...]
    tiny: tuple[str, ...]
    pipeline: str
    configs: str
    overrides: tuple[str, ...] = field(default=())


WORLDS = {
    "fashion": World(
        ("scripts/train_fashion_teacher.py", "--path", "flow", "--channels", "128,256,256", "--blocks", "2",
         "--batch-size", "512", "--compile", "--save-every", "1000"),
        ("scripts/train_fashion_teacher.py", "--path", "flow", "--channels", "8,8,8", "--batch-size", "4"),
        ".", "fashion", ("train.batch_size=512",)),
    "emoji": World(
        ("scripts/train_emoji_teacher.py", "--size", "64", "--batch-size", "256", "--vae-batch-size", "128",
         "--compile"),
        ("scripts/train_emoji_teacher.py", "--size", "64", "--batch-size", "2", "--vae-batch-size", "2"),
        "pipeline", "emoji", ("train.batch_size=256", "evaluation.reference=emoji64")),
}
TINY = ["train.batch_size=2", "train.precision=fp32", "train.compile=false", "teacher.dtype=float32", "train.steps=2",
        "evaluation.num_images=4", "evaluation.teacher_steps=[]", "evaluation.features=null",
        "evaluation.reference=null"]
"""Of students that only show that the command works."""


def student_configs(world: World) -> dict[str, Path]:
    """The students' configuration files by name, without those of a DDPM: the teacher trained here is a flow."""
    files = sorted((ROOT / "configs" / world.configs).glob("*.yaml"))
    return {file.stem: file for file in files if not file.stem.endswith("_ddpm")}


def student_overrides(
    world: World, out: Path, name: str, device: str, tiny: bool = False, more: Sequence[str] = ()
) -> list[str]:
    """What a student's configuration is changed by, but for its steps; ``more`` comes last."""
    pipeline = out / "teacher" / world.pipeline
    texts = [*world.overrides, *ON_GPU, f"teacher.source={pipeline}", f"output_dir={out / name}",
             f"train.device={device}"]
    config = load_config(student_configs(world)[name])
    if getattr(config.method, "derivative", None) == "jvp":  # forward mode through compiled blocks is untried
        texts += ["method.derivative=finite_difference", "method.finite_difference_step=0.05"]
    if config.teacher.prompts is not None:
        texts.append(f"teacher.prompts={pipeline / 'captions.txt'}")
    if tiny:
        texts += TINY
        texts += [f"method.pairs={2}"] if getattr(config.method, "pairs", 0) else []
        texts += ["method.degradation_steps=1", "method.degradation_every=1"] if config.method.name == "disback" else []
    return [*texts, *more]


def teacher_command(world: World, out: Path, device: str, minutes: float, tiny: bool) -> list[str]:
    """The arguments of the teacher's script."""
    folder = out / "teacher"
    command = [*(world.tiny if tiny else world.teacher), "--device", device, "--out", str(folder / world.pipeline)]
    if world.pipeline == ".":
        command += ["--state", str(out / "teacher.pt")]
    else:
        command += ["--work", str(out / "teacher-state")]
    if not tiny:
        return [*command, "--within", f"{minutes:g}"]
    return [*command, "--steps", "2", *(("--vae-steps", "2") if world.pipeline != "." else ())]


def run(arguments: Sequence[str]) -> None:
    """A command of Python in the repository.

    Raises:
        UserError: it ended with another code than 0.
    """
    print(f"$ python {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode
    if code:
        raise UserError(f"'python {' '.join(arguments[:3])} ...' ended with {code}; the same command goes on")


def logged_runs(folder: Path) -> list[list[dict[str, Any]]]:
    """The lines about speed of each metrics.jsonl of a run: of one student or of several, one after another."""
    runs = []
    for file in sorted(folder.rglob("metrics.jsonl")):
        try:
            lines = [json.loads(text) for text in read_lines(file)]
            runs.append([line for line in lines if "images_per_second" in line])
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} has a line that no run wrote ({error}); delete {folder}, and try again") from error
    return runs


def seconds_a_step(folder: Path, rows: int) -> float:
    """Of the last third of a trial, over all its students."""
    total = 0.0
    for lines in logged_runs(folder):
        late = [line for line in lines if line["step"] > 2 * lines[-1]["step"] / 3] or lines[-1:]
        total += rows / (sum(line["images_per_second"] for line in late) / len(late))
    if not total:
        raise UserError(f"the trial in {folder} left no metrics.jsonl; delete the folder, and try again")
    return total


class Recorded:
    """full_size.json: what was found and measured, by name of the student."""

    def __init__(self, out: Path, options: argparse.Namespace) -> None:
        self.file = out / RECORD
        device = torch.device(options.device)
        # With other minutes or overrides the table would say the steps of one command and the figures of another.
        asked = {
            "world": options.world,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "minutes": [options.teacher_minutes, options.student_minutes],
            "tiny": options.tiny,
            "overrides": options.overrides,
        }
        with disk_errors(str(out)):
            out.mkdir(parents=True, exist_ok=True)
        found = read_json_object(self.file) if self.file.is_file() else {}
        if found and found.get("asked") != asked:
            raise UserError(f"{self.file} is of {found.get('asked')}, and this is {asked}; give the same, or name "
                            "another --out")
        self.values: dict[str, Any] = found or {"asked": asked, "students": {}}

    def student(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = self.values["students"].setdefault(name, {})
        return entry

    def save(self) -> None:
        with atomic_write(self.file) as file:
            file.write((json.dumps(self.values, indent=1) + "\n").encode())

    def table(self) -> str:
        """Markdown: the teacher, then a row for each student's number of calls."""
        lines = [f"{self.values['asked']['device']}, torch {self.values['asked']['torch']}", "",
                 "| model | calls | FID | recall | trained (s) | steps | images/s in training | images/s |",
                 "| --- | --- | --- | --- | --- | --- | --- | --- |"]
        teacher = self.values.get("teacher", {})
        for name, entry in [("teacher", teacher), *self.values["students"].items()]:
            for row in entry.get("rows", []):
                figures = row.get("fid", row.get("fd")), row.get("recall"), entry.get("seconds"), entry.get("steps")
                speeds = entry.get("images_per_second"), row.get("images_per_second")
                lines.append(f"| {name} | {row['calls']} | " + " | ".join(_cell(x) for x in (*figures, *speeds)) + " |")
        return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def train_student(name: str, world: World, out: Path, options: argparse.Namespace, record: Recorded) -> None:
    """Find how many steps there is time for, train, and keep the rows of the report."""
    file, entry = student_configs(world)[name], record.student(name)
    overrides = student_overrides(world, out, name, options.device, options.tiny, options.overrides)
    rows = load_config(file, overrides).train.batch_size
    if "steps" not in entry:
        trial = out / "trials" / name
        steps = 2 if options.tiny else TRIAL_STEPS
        run(["-m", "flowdistill", "distill", str(file), *overrides, f"output_dir={trial}", f"train.steps={steps}",
             "train.log_every=1" if options.tiny else "train.log_every=20", "evaluation.at_end=false"])
        entry["trial_seconds_a_step"] = seconds_a_step(trial, rows)
        wanted = SHARE * 60 * options.student_minutes / entry["trial_seconds_a_step"]
        entry["steps"] = 2 if options.tiny else max(TRIAL_STEPS, int(wanted))
        record.save()
    run(["-m", "flowdistill", "distill", str(file), *overrides, f"train.steps={entry['steps']}",
         *(["train.log_every=1"] if options.tiny else [])])
    logs = logged_runs(out / name)
    entry["seconds"] = sum(lines[-1]["seconds"] for lines in logs)
    entry["images_per_second"] = rows * sum(lines[-1]["step"] for lines in logs) / entry["seconds"]
    report = Report.read_json(out / name / "report.json")
    measured = [row.to_dict() for row in report.rows]
    entry["rows"] = [row for row in measured if row["model"] != "teacher"]
    if any(row["model"] == "teacher" for row in measured) and len(measured) > len(record.values["teacher"]["rows"]):
        record.values["teacher"]["rows"] = [row for row in measured if row["model"] == "teacher"]
    record.save()


def full_size(options: argparse.Namespace) -> None:
    """Teacher, students and table."""
    world, out = WORLDS[options.world], options.out or local_path(f"runs/full-size-{options.world}")
    check_writable(out / RECORD)
    out = out.resolve()
    names = list(student_configs(world)) if options.only is None else options.only.split(",")
    for name in names:
        if name not in student_configs(world):
            raise UserError(f"--only has '{name}'; the configurations are {', '.join(student_configs(world))}")
        overrides = student_overrides(world, out, name, options.device, options.tiny, options.overrides)
        # What is wrong, or not installed, is said before anything is trained.
        config = load_config(student_configs(world)[name], overrides)
        if config.evaluation.features is not None:
            load_features(config.evaluation.features, "cpu")
    record = Recorded(out, options)
    run(teacher_command(world, out, options.device, options.teacher_minutes, options.tiny))
    made = read_json_object(out / "teacher" / world.pipeline / "flowdistill.json")
    seconds = made.get("training_seconds", made.get("training_cpu_seconds"))
    record.values.setdefault("teacher", {"rows": []}).update(
        seconds=sum(seconds.values()) if isinstance(seconds, dict) else seconds, parameters=made["parameters"],
        steps=sum(made["steps"].values()) if isinstance(made["steps"], dict) else made["steps"])
    record.save()
    for name in names:
        train_student(name, world, out, options, record)
        (out / TABLE).write_text(record.table(), encoding="utf-8")
    print(record.table())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 for input that cannot be used or a command that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("world", choices=tuple(WORLDS))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all students' configurations")
    parser.add_argument("--device", default="cuda", help="cuda (the default), cuda:N, or cpu with --tiny")
    parser.add_argument("--out", type=local_path, metavar="FOLDER", help="default: runs/full-size-WORLD")
    parser.add_argument("--only", metavar="A,B", help="names of configurations; default: all of the world's")
    parser.add_argument("--teacher-minutes", type=float, default=10.0, metavar="M", help="default: 10")
    parser.add_argument("--student-minutes", type=float, default=5.0, metavar="M", help="of each student; default: 5")
    parser.add_argument("--tiny", action="store_true", help="small networks and two steps, to test the command")
    options = parser.parse_intermixed_args(arguments)
    try:
        usable_device(options.device, "--device")
        for name in ("teacher_minutes", "student_minutes"):
            if not 0 < getattr(options, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be a number above 0")
        full_size(options)
    except UserError as error:
        print(f"full_size: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
