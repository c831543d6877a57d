"""What a folder of many small pictures costs before a run's first step, the first time and again, and what draws cost.

    python scripts/benchmark_data.py FOLDER --count 100000

writes pictures of 32 x 32 with their captions into FOLDER, if it is not there, and reads them as a run does whose
teacher takes no prompts and has no autoencoder. Each figure is of a process forked from one that has imported
everything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
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

from flowdistill.conditioning.prompt_bank import DiskBank, Encode, Groups, Tensors
from flowdistill.conditioning.prompt_lists import Texts
from flowdistill.config import DataOptions
from flowdistill.teachers.exact import GaussianVelocity, exact_teacher
from flowdistill.teachers.latent_bank import LatentBank
from flowdistill.teachers.real_data import RealData
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.processes import Processes
from flowdistill.utils.randomness import Draw

MIB = 2**20
SIZE = 32
ROWS, DRAWS = 64, 50
LATENT = (4, 64, 64)


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


class Noise(DiskBank):
    """Latents of Stable Diffusion's size that no autoencoder has made."""

    words = LatentBank.words

    def _group(self, encode: Encode, rows: range) -> Tensors:
        made = torch.randn(len(rows), *LATENT, generator=torch.Generator().manual_seed(rows.start))
        return {"latents": made}


def latents(count: int, folder: Path) -> dict[str, float]:
    """The same of so many latents on disk, written first."""
    def bank() -> DiskBank:
        return Noise(folder, Texts(map(str, range(count))), Groups(32, 4 * math.prod(LATENT), False))

    processor = time.process_time()
    bank().fill(contextlib.nullcontext(lambda texts: {}), Processes())
    found = {"write_cpu_s": time.process_time() - processor}
    process = psutil.Process()
    before, processor = process.memory_info().rss, time.process_time()
    opened = bank().prepare()
    found["start_cpu_s"] = time.process_time() - processor
    processor, generator = time.process_time(), torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        opened.rows(torch.randint(count, (ROWS,), generator=generator))
    found["draw_ms"] = 1000 * (time.process_time() - processor) / DRAWS
    return found | {"grown_mib": (process.memory_info().rss - before) / MIB,
                    "disk_mb": sum(file.stat().st_size for file in opened.files) / 1e6}


def alone(folder: str, mode: str) -> Any:
    """What ``start`` returns in a process forked from this one."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(start, (folder, mode))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=local_path, help="folder of the pictures, written if it is not there")
    parser.add_argument("--latents", type=int, default=0, help="write so many latents instead, 65.5 kB each, and read "
                                                              "them from disk")
    parser.add_argument("--count", type=int, default=100_000, help="how many to write")
    args = parser.parse_args()
    if args.latents:
        print(json.dumps({key: round(value, 3) for key, value in latents(args.latents, args.folder).items()}))
        return 0
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
