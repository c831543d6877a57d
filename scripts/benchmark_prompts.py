"""What lists of prompts cost in each mode of ``teacher.prompt_cache``: start-up and memory by length, and time a step.

    python scripts/benchmark_prompts.py PIPELINE --counts 1000,1000000 --at-once 512

Start-up is that of a teacher whose list is encoded already (but live), memory the process's resident one after 200
draws of 8 rows. Each figure is of a process forked from one that has imported everything. Steps are those of DMD2 in
one process, one of each mode in turn, so that a machine that slows down slows all of them; what counts is processor
time, median of ``--steps``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from flowdistill.methods.score_distillation import Dmd2, Dmd2Config
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.randomness import Draw

MODES = ("memory", "disk", "live")
MIB = 2**20


def write_prompts(path: Path, count: int) -> None:
    """Different texts of a few words each, in letters alone."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            word, rest = "", number
            for _ in range(5):
                rest, letter = divmod(rest, 26)
                word += letters[letter]
            file.write(f"a {word} cat\n")


def start(pipeline: Path, settings: dict[str, Any], draws: int) -> dict[str, float]:
    """Of a process: seconds until the teacher is there, and its memory once rows were drawn; MiB."""
    process = psutil.Process()
    before, wall, processor = process.memory_info().rss, time.perf_counter(), time.process_time()
    teacher = load_teacher(pipeline, **settings)
    found = {"start_s": time.perf_counter() - wall, "start_cpu_s": time.process_time() - processor}
    wall = time.process_time()
    for step in range(draws):
        teacher.draw_condition(Draw(0, step, rows=8))
    found["draw_ms"] = 1000 * (time.process_time() - wall) / max(draws, 1)
    resident = process.memory_info().rss
    return found | {"resident_mib": resident / MIB, "grown_mib": (resident - before) / MIB}


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process forked from this one."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def step_times(pipeline: Path, settings: dict[str, Any], modes: Sequence[str], steps: int, rows: int) -> dict[str, Any]:
    """Processor time of a step by mode, in milliseconds: median, and the median of the difference to the first mode."""
    groups = {mode: {"prompts_at_once": 1} if mode == "live" else {} for mode in modes}
    methods = {mode: Dmd2(Dmd2Config(), load_teacher(pipeline, **(settings | groups[mode]), prompt_cache=mode))
               for mode in modes}
    optimizers = {mode: {name: torch.optim.AdamW(
        [p for p in role.network.parameters() if p.requires_grad], 1e-5, fused=True)
        for name, role in method.roles().items()} for mode, method in methods.items()}
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    for step in range(steps + 3):
        order = list(modes)[step % len(modes) :] + list(modes)[: step % len(modes)]
        for mode in order:
            method, began = methods[mode], time.process_time()
            networks = {name: role.network for name, role in method.roles().items()}
            for number, name in enumerate(method.schedule(step)):
                loss, _ = method.loss(name, networks, Draw(0, step, number, rows=rows))
                loss.backward()
                optimizers[mode][name].step()
                for network in networks.values():
                    network.zero_grad(set_to_none=True)
            times[mode].append(1000 * (time.process_time() - began))
    kept = {mode: values[3:] for mode, values in times.items()}
    base = kept[modes[0]]
    return {mode: {"median_ms": statistics.median(values), "more_percent": 100 * statistics.median(
        b - a for a, b in zip(base, values, strict=True)) / statistics.median(base)} for mode, values in kept.items()}


def counts(text: str) -> list[int]:
    """Whole numbers of at least 1, separated by commas."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def modes(text: str) -> list[str]:
    """Modes, separated by commas."""
    found = text.split(",")
    if not set(found) <= set(MODES):
        raise ValueError
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("pipeline", type=local_path)
    parser.add_argument("--counts", type=counts, default="1000,100000", metavar="N,N,...", help="lengths of the lists")
    parser.add_argument("--modes", type=modes, default=",".join(MODES), metavar="MODE,...",
                        help=f"of {', '.join(MODES)}")
    parser.add_argument("--at-once", type=int, default=16,
                        help="teacher.prompts_at_once of memory and disk; live has 16, and 1 where steps are timed")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--steps", type=int, default=0, help="of each mode; 0: none are timed")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--cache", type=local_path, help="a folder for what is encoded; default: one that is removed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(options.cache or folder)
        for count in options.counts:
            file = Path(folder) / f"{count}.txt"
            write_prompts(file, count)
            for mode in options.modes:
                settings = {"prompts": str(file), "prompt_cache": mode}
                if mode != "live":
                    settings |= {"prompts_at_once": options.at_once}
                    filled = alone(start, options.pipeline, settings, 0)
                    print(json.dumps({"mode": mode, "prompts": count, "fill_s": filled["start_s"],
                                      "fill_cpu_s": filled["start_cpu_s"]}), flush=True)
                found = alone(start, options.pipeline, settings, options.draws)
                print(json.dumps({"mode": mode, "prompts": count} | found), flush=True)
        if options.steps:
            settings = {"prompts": str(file), "prompts_at_once": options.at_once}
            timed = step_times(options.pipeline, settings, options.modes, options.steps, options.rows)
            for mode, found in timed.items():
                print(json.dumps({"mode": mode, "prompts": count} | found), flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"benchmark_prompts: error: {error}", file=sys.stderr)
        sys.exit(2)
