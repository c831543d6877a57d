#!/usr/bin/env python
"""What only a GPU proves, in parts of a few minutes at most, without a download; from a clone.

    python scripts/accept_gpu.py                                   all parts on the first CUDA device
    python scripts/accept_gpu.py --parts families-fp16,no-waits    these
    python scripts/accept_gpu.py --list                            what there is
    python scripts/accept_gpu.py --device cpu                      what makes sense without a GPU, at tiny sizes

accept_gpu.json in --output keeps every outcome by device and versions, so the same command goes on where it was stopped
and runs again what failed; accept_gpu.md is the report. Every figure in it is measured. Exit code 0: nothing failed; 1:
something did; 2: there is no such device or part.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__" or "__mp_main__" in __name__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products that are the same each time

from collections.abc import Sequence  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    from tests.gpu import runner
    from tests.gpu.parts import PARTS

    return runner.main(PARTS, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
