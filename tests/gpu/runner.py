"""The parts of the acceptance one after another: what is done is kept, and a report is written after each."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_write, disk_errors, local_path
from tests.gpu.bench import Bench, NotHere, Part, machine

LIMIT = 300.0
"""Seconds that a part may take on a GPU, where it runs in a process of its own."""
STATE, REPORT = "accept_gpu.json", "accept_gpu.md"


@dataclasses.dataclass
class Outcome:
    """What became of a part.

    Attributes:
        result: ``passed``, ``failed`` or ``not here``.
        seconds: that it took.
        sentence: why it failed, or is not here.
        figures: what it measured, by name.
    """

    result: str
    seconds: float
    sentence: str = ""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


def run_part(part: Part, device: torch.device) -> Outcome:
    """A part in this process, in a folder that is gone afterwards."""
    began, bench = time.perf_counter(), None
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(device, Path(folder))
            part.run(bench)
        result, sentence = "passed", ""
    except NotHere as reason:
        result, sentence = "not here", str(reason)
    except Exception as error:  # whatever it is, the other parts are still of interest
        result, sentence = "failed", _sentence(error)
        traceback.print_exception(error)  # the report has a sentence
    return Outcome(result, time.perf_counter() - began, sentence, {} if bench is None else bench.figures)


def _sentence(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, AssertionError) and first:
        return first
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
              if "site-packages" not in frame.filename]
    return f"{type(error).__name__}: {first} ({places[-1]})"


def _child(part: Part, device: str, pipe: Any) -> None:
    pipe.send(run_part(part, torch.device(device)))


def run_apart(part: Part, device: torch.device, limit: float = LIMIT) -> Outcome:
    """The same in a process of its own: with it ends what spoils a GPU's context, or hangs."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(part, str(device), there))
    began = time.perf_counter()
    process.start()
    there.close()
    try:
        outcome = here.recv() if here.poll(limit) else Outcome("failed", limit, f"it took more than {limit:g} seconds")
    except EOFError:
        process.join()
        outcome = Outcome("failed", time.perf_counter() - began, f"its process ended with code {process.exitcode}")
    process.terminate()
    process.join()
    return outcome


class Record:
    """The outcomes on one machine with one set of versions, in a folder.

    Raises:
        UserError: the folder's file is damaged, or cannot be written.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder, self.facts = folder, dict(facts)
        self.key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        self._all: dict[str, Any] = {}
        with disk_errors(f"the folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / STATE).is_file():
                try:
                    self._all = json.loads((folder / STATE).read_text(encoding="utf-8"))
                except ValueError as error:
                    raise UserError(f"{folder / STATE} is damaged; delete it to begin anew") from error
        entry = self._all.setdefault(self.key, {"machine": self.facts, "parts": {}})
        self.outcomes = {name: Outcome(**outcome) for name, outcome in entry["parts"].items()}

    def add(self, name: str, outcome: Outcome, parts: Mapping[str, Part]) -> None:
        """Keep an outcome, and write the report anew."""
        self.outcomes[name] = outcome
        self._all[self.key]["parts"][name] = dataclasses.asdict(outcome)
        with disk_errors(f"the folder {self.folder}"):
            for file, text in ((STATE, json.dumps(self._all, indent=1) + "\n"), (REPORT, self.markdown(parts))):
                with atomic_write(self.folder / file) as place:
                    place.write(text.encode())

    def markdown(self, parts: Mapping[str, Part]) -> str:
        """The report: the machine, a table of all parts, and what each measured."""
        lines = ["# Acceptance", "", *(f"- {name}: {value}" for name, value in self.facts.items()), ""]
        lines += ["| part | proves | result | seconds |", "| --- | --- | --- | --- |"]
        for name, part in parts.items():
            outcome = self.outcomes.get(name)
            if outcome is None:
                lines.append(f"| {name} | {part.proves} | not run | |")
            else:
                why = f": {_cell(outcome.sentence)}" if outcome.sentence else ""
                lines.append(f"| {name} | {part.proves} | {outcome.result}{why} | {outcome.seconds:.1f} |")
        for name in parts:
            if name in self.outcomes and self.outcomes[name].figures:
                lines += ["", f"## {name}", "", "| measured | |", "| --- | --- |"]
                lines += [f"| {key} | {_cell(value)} |" for key, value in self.outcomes[name].figures.items()]
        return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def chosen_parts(parts: Mapping[str, Part], names: str | None, device: torch.device) -> list[str]:
    """The names of the parts to run.

    Raises:
        UserError: there is no part of a name, or it makes no sense on the CPU.
    """
    if names is None:
        return [name for name, part in parts.items() if part.on_cpu or device.type != "cpu"]
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in parts:
            raise UserError(f"there is no part '{name}'; the parts are {', '.join(parts)}")
        if device.type == "cpu" and not parts[name].on_cpu:
            raise UserError(f"the part '{name}' needs a CUDA device; leave it out of --parts")
    return chosen


def usable(name: str) -> torch.device:
    """The device of the acceptance.

    Raises:
        UserError: it is no CUDA device, or not here.
    """
    kind, _, number = name.partition(":")
    if kind == "cuda" and (not number or number.isdecimal()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) < count:
            return torch.device("cuda", int(number or 0))
        raise UserError(f"--device is {name}, but this machine has {count} CUDA devices; --device cpu runs the parts "
                        "that make sense there, at tiny sizes")
    if name == "cpu":
        return torch.device("cpu")
    raise UserError(f"--device is '{name}'; it must be cuda, cuda:N or cpu")


def main(parts: Mapping[str, Part], arguments: Sequence[str] | None = None, description: str | None = None) -> int:
    """The command line; 0 when no part failed, 1 when one did, 2 for bad input."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--device", default="cuda", help="cuda (the default), cuda:N, or cpu for tiny sizes")
    parser.add_argument("--parts", metavar="A,B", help="names of parts; default: all")
    parser.add_argument("--list", action="store_true", help="say what the parts are, and end")
    parser.add_argument("--again", action="store_true", help="also run parts that have passed here before")
    parser.add_argument("--output", type=local_path, default=local_path("runs/accept_gpu"), metavar="FOLDER",
                        help=f"for {STATE} and {REPORT}; default: runs/accept_gpu")
    options = parser.parse_args(arguments)
    if options.list:
        for name, part in parts.items():
            print(f"{name:<24}{part.proves}{'' if part.on_cpu else ' (CUDA only)'}")
        return 0
    try:
        device = usable(options.device)
        chosen = chosen_parts(parts, options.parts, device)
        record = Record(options.output, machine(device))
        for name in chosen:
            before = record.outcomes.get(name)
            if before is not None and before.result == "passed" and not options.again:
                print(f"{name}: passed before", flush=True)
                continue
            run = run_part if device.type == "cpu" else run_apart
            outcome = run(parts[name], device)
            record.add(name, outcome, parts)
            why = f": {outcome.sentence}" if outcome.sentence else ""
            print(f"{name}: {outcome.result}{why} ({outcome.seconds:.1f} s)", flush=True)
    except UserError as error:
        print(f"accept_gpu: error: {error}", file=sys.stderr)
        return 2
    failed = [name for name in chosen if record.outcomes[name].result == "failed"]
    print(f"{len(chosen)} parts, {len(failed)} failed; {options.output / REPORT}")
    return 1 if failed else 0
