"""The end of a process that a launcher started beside others."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def exit_process(code: int) -> NoReturn:
    """End the process with this exit code, as ``sys.exit`` does, but safely where gloo connects several processes.

    gloo's threads race with the interpreter's end: whether the group is closed first or left open, some processes abort
    (SIGABRT, "terminate called without an active exception") after all their work is done, and the launcher reports a
    failure. So such a process flushes what it has written and ends without the interpreter's clean-up. Call it last,
    when files and trackers are closed. nccl has no such race and wants its group closed.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    if distributed.get_backend() != "gloo":
        distributed.destroy_process_group()
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
