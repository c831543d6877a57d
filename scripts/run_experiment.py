#!/usr/bin/env python
"""Run a comparison: every setting with every seed, then a table with mean and spread and a figure.

    python scripts/run_experiment.py configs/experiments/freeflow_quick.yaml
    python scripts/run_experiment.py configs/experiments/freeflow_ablation.yaml --jobs 2 \\
        --write-docs docs/experiments/freeflow.md

Run it where the base configuration's own paths hold (the repository). The same command goes on where it stopped. An
experiment file has the keys:

    name         of the experiment
    base         configuration file of all runs
    seeds        list of integers
    fewer_seeds  label: those of the seeds with which that label runs, in place of all (optional)
    overrides    key=value texts for all runs (optional)
    runs         label: list of key=value texts; without it one run with the experiment's name
    bases        label: configuration file of that label's runs in place of base (optional)
    curve        {num_images, every}: measure the averaged student every so many steps too (optional)
    speed        true: a column with images a second (optional)

OUT gets LABEL/seed-S/ (run folders; LABEL/seed-S.log is what they print), results.jsonl with one line a run, table.md
and figure.png. The paired error is the root mean square difference, in latents, between the student's images and its
teacher's 50-step ODE from the same 256 noises.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowdistill.utils.errors import UserError, shown
from flowdistill.utils.files import check_writable, local_path
from flowdistill.utils.seeds import check_seed
from flowdistill.utils.text import parse_yaml, read_lines, read_text

RESULTS = "results.jsonl"
KEEP_ALL = 1_000_000
Line = dict[str, Any]


@dataclass
class Experiment:
    """An experiment file; see the top of this script."""

    name: str
    base: str
    seeds: list[int]
    overrides: list[str] = field(default_factory=list)
    runs: dict[str, list[str]] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)
    fewer_seeds: dict[str, list[int]] = field(default_factory=dict)
    curve: dict[str, int] | None = None
    speed: bool = False

    def base_of(self, label: str) -> str:
        """The configuration file of a label's runs."""
        return self.bases.get(label, self.base)

    def all_runs(self) -> list[tuple[str, int]]:
        """Label and seed of every run; seeds outside, so that an experiment that is stopped early has all labels."""
        return [(label, seed) for seed in self.seeds for label in self.runs
                if seed in self.fewer_seeds.get(label, self.seeds)]

    def settings(self, label: str, seed: int) -> list[str]:
        """The overrides of one run, without its output_dir; later ones win."""
        curve = []
        if self.curve:  # the checkpoints hold the averaged student, so measuring costs the training no time
            curve = [f"train.checkpoint_every={self.curve['every']}", f"train.keep_checkpoints={KEEP_ALL}"]
        return [*curve, *self.overrides, *self.runs[label], f"seed={seed}"]

    def asked(self, label: str, seed: int) -> Line:
        """What decides the line of a run in results.jsonl: with other values it is measured anew."""
        return {"base": self.base_of(label), "overrides": self.settings(label, seed), "measured": self.curve}


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment file, including the configuration of every run.

    Raises:
        UserError: not readable, an unknown or missing key, a value of the wrong kind, or a run that cannot be.
    """
    from flowdistill.config import load_config

    text = read_text(path)
    values, texts = (parse_yaml(text, str(path), as_written) for as_written in (False, True))
    known = list(Experiment.__dataclass_fields__)
    if not isinstance(values, dict) or set(values) - set(known) or {"name", "base", "seeds"} - set(values):
        raise UserError(f"{path} must have the keys name, base and seeds, and no others than {', '.join(known)}")
    # What is a text stays as it is written, whatever YAML would make of it.
    typed = ("seeds", "fewer_seeds", "curve", "speed")
    experiment = Experiment(**texts | {key: values[key] for key in typed if key in values})
    experiment.runs = experiment.runs or {experiment.name: []}
    seeds, curve = experiment.seeds, experiment.curve
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{path}: seeds must be a list of integers, such as [0, 1, 2]")
    for seed in seeds:
        check_seed(seed, f"{path}: a seed")
    texts = {"overrides": experiment.overrides, **experiment.runs}
    for label, items in texts.items():
        if not re.fullmatch(r"[\w.-]+", str(label)):
            raise UserError(f"{path}: the label {shown(label)} must be letters, digits, '.', '_' and '-': it names a "
                            "folder")
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise UserError(f"{path}: {label} must be a list of key=value texts")
    if not isinstance(experiment.bases, dict) or set(experiment.bases) - set(experiment.runs):
        raise UserError(f"{path}: bases must be {{label: FILE.yaml}}; the runs are {', '.join(experiment.runs)}")
    fewer = experiment.fewer_seeds
    if not isinstance(fewer, dict) or set(fewer) - set(experiment.runs) or not all(
        isinstance(some, list) and some and all(seed in seeds for seed in some) for some in fewer.values()
    ):
        raise UserError(f"{path}: fewer_seeds must be {{label: [SEED, ...]}} with some of the seeds {seeds}; the runs "
                        f"are {', '.join(experiment.runs)}")
    if curve is not None and (set(curve) != {"num_images", "every"} or any(value < 1 for value in curve.values())):
        raise UserError(f"{path}: curve must be {{num_images: N, every: STEPS}} with positive numbers")
    if type(experiment.speed) is not bool:
        raise UserError(f"{path}: speed must be true or false, not {shown(experiment.speed)}")
    for label in experiment.runs:
        load_config(experiment.base_of(label), experiment.settings(label, 0))
    return experiment


def read_results(experiment: Experiment, out: Path, left: str = "report.json") -> dict[tuple[str, int], Line]:
    """The finished runs in OUT that were made with the experiment's present settings.

    ``left`` is what a finished run leaves in its folder.
    """
    found: dict[tuple[str, int], Line] = {}
    asked = set(experiment.all_runs())
    file = out / RESULTS
    for text in read_lines(file, strict=False) if file.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:  # cut short by a crash: that run is measured again
            continue
        label, seed = line["label"], line["seed"]
        if (label, seed) not in asked:
            continue
        same = all(line.get(key) == value for key, value in experiment.asked(label, seed).items())
        if same and (out / label / f"seed-{seed}" / left).exists():
            found[label, seed] = line
    return found


def append_line(file: Path, line: Line) -> None:
    """Add a line to a file whose last one may have been cut short."""
    with open(file, "a+b") as output:
        output.seek(0)
        broken = output.read()[-1:] not in (b"", b"\n")
        output.write(b"\n" * broken + json.dumps(line).encode() + b"\n")


class Runner:
    """Starts training processes and measures what they leave; one object an experiment."""

    def __init__(self, experiment: Experiment, out: Path, jobs: int) -> None:
        self.experiment, self.out, self.jobs = experiment, out, jobs
        self.threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        self.running: list[subprocess.Popen[bytes]] = []
        self.stopping = False
        self._lock = threading.Lock()

    def run(self, label: str, seed: int) -> Line:
        """Train (or go on), measure, and append the line to results.jsonl."""
        folder = self.out / label / f"seed-{seed}"
        command = [sys.executable, "-m", "flowdistill", "distill", self.experiment.base_of(label)]
        command += [*self.experiment.settings(label, seed), f"output_dir={folder}"]
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        if self.stopping:
            raise UserError("not started")
        with open(log, "ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **threads})
            self.running.append(process)
            if self.stopping:
                process.terminate()
            code = process.wait()
        if code:
            last = (read_lines(log, strict=False) or [""])[-1]
            raise UserError(f"exit code {code}, see {log}: {last}")
        from experiment_results import measure

        with self._lock:
            line = {"label": label, "seed": seed, **self.experiment.asked(label, seed), "jobs": self.jobs}
            line |= {"threads": self.threads, **measure(folder, self.experiment.curve, self.threads)}
            append_line(self.out / RESULTS, line)
        from flowdistill.training.checkpoint import checkpoints

        for _, old in checkpoints(folder / "checkpoints")[:-1] if self.experiment.curve else ():
            shutil.rmtree(old)  # it was kept for the curve
        return line

    def stop(self) -> None:
        """Start nothing more and ask the running trainings to save and end."""
        self.stopping = True
        for process in self.running:
            if process.poll() is None:
                process.terminate()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, 2 for bad input or a run that failed, 130 after a signal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("experiment", type=local_path, metavar="EXPERIMENT.yaml")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    parser.add_argument("--out", type=local_path, metavar="DIR", help="default: runs/experiments/NAME")
    parser.add_argument("--only", metavar="LABEL", help="start runs of this label only")
    parser.add_argument("--seed", type=int, metavar="S", help="start runs of this seed only")
    parser.add_argument(
        "--write-docs", type=local_path, metavar="PAGE.md",
        help="also put the table between <!-- table:NAME --> and <!-- /table:NAME --> in this page",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        return run_all(options)
    except UserError as error:
        print(f"run_experiment: error: {error}", file=sys.stderr)
        return 2


def run_all(options: argparse.Namespace) -> int:
    """Start what is missing, then write table, figure and page."""
    from experiment_results import figure, table, write_docs

    experiment = read_experiment(options.experiment)
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}; it must be at least 1")
    if options.only is not None and options.only not in experiment.runs:
        raise UserError(f"--only {options.only}: the runs are {', '.join(experiment.runs)}")
    if options.seed is not None and options.seed not in experiment.seeds:
        raise UserError(f"--seed {options.seed}: the seeds are {', '.join(map(str, experiment.seeds))}")
    out = options.out or Path("runs/experiments") / experiment.name
    runs = experiment.all_runs()
    if options.only is not None and options.seed is not None and (options.only, options.seed) not in runs:
        raise UserError(f"--only {options.only} --seed {options.seed}: the seeds of {options.only} are "
                        f"{', '.join(map(str, experiment.fewer_seeds[options.only]))}")
    check_writable(out / "table.md")
    found, failures, total = read_results(experiment, out), [], len(runs)
    missing = [(label, seed) for label, seed in runs if (label, seed) not in found
               and options.only in (None, label) and options.seed in (None, seed)]
    runner = Runner(experiment, out, options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(runner.run, label, seed): (label, seed) for label, seed in missing}
        try:
            for future in as_completed(futures):
                label, seed = futures[future]
                try:
                    found[label, seed] = future.result()
                    print(f"{label}, seed {seed}: done ({len(found)} of {total})", flush=True)
                except UserError as error:
                    failures.append(f"{label}, seed {seed}: {error}")
                    print(failures[-1], file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            runner.stop()
            print("run_experiment: stopped; the same command goes on", file=sys.stderr)
            return 130
    lines = [found[label, seed] for label in experiment.runs for seed in experiment.seeds if (label, seed) in found]
    if lines:
        text = table(list(experiment.runs), lines, experiment.speed)
        (out / "table.md").write_text(text, encoding="utf-8")
        figure(experiment.name, list(experiment.runs), lines, out / "figure.png")
        print(text)
        if options.write_docs:
            write_docs(options.write_docs, experiment.name, text)
    if failures:
        raise UserError(f"{len(failures)} of {len(missing)} runs failed; the same command tries them again")
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
