#!/usr/bin/env python
"""Measure the digits teachers as the shipped configurations do, for assets/teacher_rows.json.

    OMP_NUM_THREADS=1 python scripts/measure_shipped_teachers.py --out assets/teacher_rows.json

An evaluation finds the rows by the hash of what decides them, so that nobody samples 50 calls for each of 10,000 digits
to learn what was learned before. Make the file again when a test says that a row is not found: another teacher, other
features, a metric that is new or means something else. ``--only NAME`` measures one teacher and keeps the others' rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

TEACHERS: dict[str, dict[str, Any]] = {
    "digits-flow": {"source": "assets/digits-flow"},
    "digits-ddpm": {"source": "assets/digits-ddpm"},
    # Students that start in noise start here, for the reason in configs/digits/freeflow_ddpm.yaml.
    "digits-ddpm, t_max 0.97": {"source": "assets/digits-ddpm", "t_max": 0.97},
    # From timestep 799 on, for the reason in configs/digits/consistency_ddpm.yaml.
    "digits-ddpm, t_max 0.96": {"source": "assets/digits-ddpm", "t_max": 0.9623046675},
}
STEPS = [1, 2, 4, 10, 50]
TOLERANCE = {"fid": 0.002, "kid": 0.001, "precision": 0.005, "recall": 0.005, "accuracy": 0.001}
"""What other versions and machines may differ by: of FID as a share, of the others as it is."""


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns the exit code: 0, or 2 for input that cannot be used."""
    from flowdistill.utils.errors import UserError
    from flowdistill.utils.files import atomic_write
    from flowdistill.utils.text import check_json_place, read_json_object

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--only", choices=sorted(TEACHERS), help="one teacher; the rows of others stay as they are")
    parser.add_argument("--num-images", type=int, default=10_000, metavar="N", help="of each row (default: 10000)")
    options = parser.parse_args(arguments)
    try:
        check_json_place(options.out, ("made_by", "rows"), "a file of this script")
        rows = [] if options.only is None else read_json_object(options.out)["rows"]
        for name in TEACHERS if options.only is None else [options.only]:
            rows = [row for row in rows if row["teacher"] != name] + measured(name, options.num_images)
    except (UserError, KeyError) as error:
        print(f"measure_shipped_teachers: error: {error}", file=sys.stderr)
        return 2
    rows.sort(key=lambda row: (row["teacher"], row["row"]["calls"]))
    content = {"made_by": f"scripts/{Path(__file__).name}", "differs_elsewhere_by": TOLERANCE, "rows": rows}
    with atomic_write(options.out) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    return 0


def measured(name: str, num_images: int) -> list[dict[str, Any]]:
    """The rows of a teacher, as they are kept in a cache, without their speed."""
    from flowdistill import evaluate, load_teacher
    from flowdistill.utils.text import read_json_object

    with tempfile.TemporaryDirectory() as folder:
        evaluate(load_teacher(**TEACHERS[name]), num_images, "digits", "digits", STEPS, cache_dir=folder, fresh=True)
        entries = [read_json_object(file) for file in Path(folder).glob("*.json")]
    for entry in entries:
        del entry["row"]["images_per_second"], entry["made"]["batch_size"], entry["made"]["processes"]
    return [{"teacher": name, **entry} for entry in entries]


if __name__ == "__main__":
    sys.exit(main())
