#!/usr/bin/env python
"""Images a second from a folder to Inception's features: here, and by clean-fid, torch-fidelity and torchmetrics.

    OMP_NUM_THREADS=1 taskset -c 1 python scripts/benchmark_folder_fid.py --images 5000 --block 250

needs ``pip install clean-fid torch-fidelity torchmetrics``. All have the same Inception of full size with the same
random weights, on the CPU, in batches of 32. The programs take turns with short blocks of the same pictures, so that
whatever else the machine does meets all of them alike; the table has the medians over the blocks and the quartiles,
without the first block, in which TorchScript compiles.
``of the network`` is the share of the network's rate on pictures that lie ready in memory, once by the clock and once
by the processor's time, of all threads and workers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

BATCH = 32
NETWORK = "the network alone"
OURS = "flowdistill"


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=5_000, metavar="N", help="in all (default: 5000)")
    parser.add_argument("--block", type=int, default=250, metavar="N", help="pictures in a block (default: 250)")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="of the pictures (default: 256)")
    parser.add_argument("--workers", type=int, default=0, metavar="N",
                        help="processes in which the others read pictures; 0: none, in turn with the network (default)")
    parser.add_argument("--only", metavar="NAME,NAME", help="programs to measure (default: all)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args(arguments)
    import torch

    from flowdistill.utils.errors import UserError
    from flowdistill.utils.text import check_json_place

    if options.json is not None:
        try:
            check_json_place(options.json, ("options", "seconds", "table"), "a file of this benchmark")
        except UserError as error:
            parser.error(str(error))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        programs = made(Path(folder), options.workers)
        if options.only is not None:
            programs = {name: programs[name] for name in options.only.split(",")}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for number, place in enumerate(blocks(Path(folder), options.images, options.block, options.size)):
            for name in rotated(list(programs), number):
                times[name].append(measured(programs[name], place))
                print(f"block {number + 1}, {name}: {options.block / times[name][-1][0]:.2f} images/s", file=sys.stderr,
                      flush=True)
            table = summary(times, options.block)
            if options.json is not None:  # after each block, so that a long run may be stopped
                found = {"options": vars(options), "seconds": times, "table": table}
                Path(options.json).write_text(json.dumps(found, indent=1))
    print(text(table))
    return 0


def rotated(names: list[str], by: int) -> list[str]:
    """The names from another one on in each block, so that none always follows the same one."""
    by %= len(names)
    return names[by:] + names[:by]


def measured(run: Callable[[Path], None], place: Path) -> tuple[float, float]:
    """Seconds by the clock and of the processor that a block takes."""
    start, before = time.perf_counter(), processor()
    with contextlib.redirect_stdout(io.StringIO()):
        run(place)
    return time.perf_counter() - start, processor() - before


def processor() -> float:
    """Seconds of the processor's time, with those of child processes that have ended."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def summary(times: dict[str, list[tuple[float, float]]], block: int) -> list[dict[str, Any]]:
    """A row for each program."""
    rows, first = [], 1 if len(next(iter(times.values()))) > 1 else 0
    times = {name: found[first:] for name, found in times.items()}
    for name, found in times.items():
        row: dict[str, Any] = {"program": name, "images": block * len(found),
                               "images_per_second": quartiles([block / clock for clock, _ in found])}
        for key, which in (("of_network_by_clock", 0), ("of_network_by_processor", 1)):
            if NETWORK in times:
                row[key] = quartiles([alone[which] / own[which] for alone, own in zip(times[NETWORK], found,
                                                                                      strict=True)])
        rows.append(row)
    return rows


def quartiles(values: list[float]) -> list[float]:
    """Median, first and third quartile."""
    if len(values) < 2:
        return values * 3
    first, second, third = statistics.quantiles(values, n=4, method="inclusive")
    return [second, first, third]


def text(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = ["| program | images | images/s | of the network, by the clock | by the processor |",
             "|---|---|---|---|---|"]
    for row in rows:
        cells = ["{:.3g} ({:.3g} to {:.3g})".format(*row[key]) if key in row else "-" for key in
                 ("images_per_second", "of_network_by_clock", "of_network_by_processor")]
        lines.append(f"| {row['program']} | {row['images']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def blocks(folder: Path, images: int, block: int, size: int) -> Iterator[Path]:
    """Folders of PNG pictures, each made when it is asked for: cuttings of scikit-learn's two photographs."""
    import torch
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs, generator = load_sample_images().images, torch.Generator().manual_seed(0)
    for number in range(images // block):
        place = folder / f"block-{number}"
        place.mkdir()
        for index in range(block):
            photograph = photographs[index % 2]
            height, width = photograph.shape[:2]
            top, left, side = (int(torch.randint(0, high, (), generator=generator)) for high in
                               (height // 3, width // 3, height // 3))
            cut = photograph[top : top + height // 3 + side, left : left + height // 3 + side]
            Image.fromarray(cut).resize((size, size), Image.Resampling.LANCZOS).save(place / f"{index:05d}.png")
        yield place


def made(folder: Path, workers: int) -> dict[str, Callable[[Path], None]]:
    """The programs, each a function that takes the features of a folder of pictures."""
    import torch
    from cleanfid import fid
    from cleanfid.features import build_feature_extractor
    from torch_fidelity import calculate_metrics
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import FrechetInceptionDistance

    from flowdistill.data.image_sets import FolderImages
    from flowdistill.evaluation.collect import collect, stored_batches
    from flowdistill.features.extractor import INCEPTION_FILE, Prepared, load_features
    from flowdistill.utils.processes import Processes

    with mock.patch("torch.load", return_value={}), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="none")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, generator=generator)
    weights = str(folder / "inception.pth")
    torch.save(network.state_dict(), weights)
    torch.jit.script(_as_torchscript_file(network).eval()).save(str(folder / INCEPTION_FILE))
    ours = load_features("inception", "cpu", folder)
    with mock.patch("cleanfid.features.InceptionV3W", _local(folder)):
        theirs = build_feature_extractor("clean", torch.device("cpu"), use_dataparallel=False)
    metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=weights)
    ready = Prepared(255 * torch.rand(BATCH, 3, 299, 299, generator=generator))

    def alone(place: Path) -> None:
        for rest in range(len(list(place.iterdir())), 0, -BATCH):
            ours(Prepared(ready.images[:rest]))

    def flowdistill(place: Path) -> None:
        images = FolderImages(place)
        collect(stored_batches(images, Processes(), BATCH, ours), ours, len(images))

    def clean_fid(place: Path) -> None:
        fid.get_folder_features(str(place), theirs, num_workers=workers, batch_size=BATCH, device=torch.device("cpu"),
                                mode="clean", verbose=False)

    def torch_fidelity(place: Path) -> None:
        calculate_metrics(input1=str(place), isc=True, isc_splits=1, cuda=False, batch_size=BATCH, verbose=False,
                          feature_extractor_weights_path=weights, save_cpu_ram=workers == 0, cache=False)

    def torchmetrics(place: Path) -> None:
        from torchvision.io import decode_image

        paths = sorted(place.iterdir())
        for start in range(0, len(paths), BATCH):
            metric.update(torch.stack([decode_image(str(path)) for path in paths[start : start + BATCH]]), real=True)
        metric.reset()

    return {NETWORK: alone, OURS: flowdistill, "clean-fid": clean_fid, "torch-fidelity": torch_fidelity,
            "torchmetrics": torchmetrics}


def _local(folder: Path) -> Callable[..., Any]:
    """clean-fid's wrapper, of the file in ``folder`` instead of a download."""
    from cleanfid.inception_torchscript import InceptionV3W

    return lambda path, download=True, resize_inside=False: InceptionV3W(str(folder), False, resize_inside)


def _as_torchscript_file(network: Any) -> Any:
    """torch-fidelity's network in the form of inception-2015-12-05.pt, as far as that is used."""
    import torch

    kinds = (torch.nn.Dropout, torch.nn.Linear)
    layers = [module for module in network.children() if not isinstance(module, kinds)]  # in the order of the passes

    class Form(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(*layers)
            self.output = network.fc

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.output(self.layers(images).flatten(1))

    return Form()


if __name__ == "__main__":
    sys.exit(main())
