"""What a folder of many small pictures costs before a run's first step, the first time and again, and what draws cost.

    python scripts/benchmark_data.py FOLDER --count 100000

writes pictures of 32 x 32 with their captions into FOLDER, if it is not there, and reads them as a run does whose
teacher takes no prompts and has no autoencoder. Each figure is of a process forked from one that has imported
everything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from flowdistill.config import DataOptions
from flowdistill.teachers.exact import GaussianVelocity, exact_teacher
from flowdistill.teachers.real_data import RealData
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.randomness import Draw

MIB = 2**20
SIZE = 32
ROWS, DRAWS = 64, 50


def write_pictures(folder: Path, count: int) -> None:
    """Noise, a PNG each, a thousand to a subfolder, and metadata.jsonl."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as table:
        for number in range(count):
            name = f"{number // 1000:04d}/{number:07d}.png"
            (folder / name).parent.mkdir(exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / name)
            table.write(json.dumps({"file_name": name, "text": f"picture {number}"}) + "\n")


def start(folder: str, mode: str) -> dict[str, float]:
    """Of a process: seconds until the pictures are there, its memory (MiB) once rows were drawn, and a draw's time."""
    process, teacher = psutil.Process(), exact_teacher(GaussianVelocity(torch.zeros(3, SIZE, SIZE), 1.0))
    before, wall, processor = process.memory_info().rss, time.perf_counter(), time.process_time()
    data = RealData(teacher, folder, options=DataOptions(cache_latents=mode))
    found = {"start_s": time.perf_counter() - wall, "start_cpu_s": time.process_time() - processor}
    processor = time.process_time()
    for step in range(DRAWS):
        data.draw(Draw(0, step, rows=ROWS))
    found["draw_ms"] = 1000 * (time.process_time() - processor) / DRAWS
    resident = process.memory_info().rss
    return found | {"resident_mib": resident / MIB, "grown_mib": (resident - before) / MIB}


def alone(folder: str, mode: str) -> Any:
    """What ``start`` returns in a process forked from this one."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(start, (folder, mode))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=local_path, help="folder of the pictures, written if it is not there")
    parser.add_argument("--count", type=int, default=100_000, help="how many to write")
    args = parser.parse_args()
    if not args.folder.exists():
        write_pictures(args.folder, args.count)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        try:
            for name, mode in (("first start", "none"), ("second start", "none"), ("in memory", "memory")):
                print(name, json.dumps({key: round(value, 2) for key, value in alone(str(args.folder), mode).items()}),
                      flush=True)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
