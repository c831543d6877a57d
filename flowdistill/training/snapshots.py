"""Weights kept on disk while a run trains: one file each, complete or absent, put back strictly."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from flowdistill.training.state import assign, gather
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_write, disk_errors
from flowdistill.utils.processes import Processes


class WeightSnapshots:
    """Files ``node-000.safetensors``, ``node-001.safetensors``, ... in a folder.

    Args:
        name: of a file, before its suffix; ``format`` puts the index in.
    """

    def __init__(self, folder: Path, name: str = "node-{:03d}") -> None:
        self.folder, self.name = folder, name

    def file(self, index: int) -> Path:
        return self.folder / f"{self.name.format(index)}.safetensors"

    def write(self, index: int, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        """Write ``tensors`` (sharded or not) in the types of ``like``; all processes must call this together."""
        processes = Processes.current()
        whole = gather(tensors, keep=processes.is_main)
        content = {name: value.to(like[name].dtype) for name, value in whole.items()}

        def write() -> None:
            with disk_errors(str(self.file(index))), atomic_write(self.file(index)) as output:
                output.write(save(content, metadata={"format": "pt"}))

        processes.on_main(write)

    def read_into(self, index: int, targets: Mapping[str, Tensor]) -> None:
        """Copy a node into ``targets``.

        Raises:
            UserError: the file is missing or damaged, or its names, shapes or types are not those of ``targets``.
        """
        file = self.file(index)
        try:
            values = load_file(file)
        except (OSError, SafetensorError) as error:
            raise self._damaged(index, error) from error
        for name, value in values.items():
            if name in targets and value.dtype != targets[name].dtype:
                raise UserError(f"{file} does not fit: {name} is {value.dtype} there and {targets[name].dtype} in the "
                                "network")
        assign(targets, values, str(file))

    def check(self, index: int) -> None:
        """UserError unless the file of ``index`` is there, whole; its tensors are not read."""
        try:
            with safe_open(self.file(index), framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise self._damaged(index, error) from error

    def keep(self, indices: Collection[int]) -> None:
        """Delete all but these; the main process alone calls it."""
        names = {self.file(index).name for index in indices}
        for file in self.folder.glob("*.safetensors"):
            if file.name not in names:
                file.unlink(missing_ok=True)
        for file in self.folder.glob(".*.tmp"):  # a process was killed while it wrote
            file.unlink(missing_ok=True)

    def _damaged(self, index: int, error: Exception) -> UserError:
        reason = " ".join(str(error).split())
        return UserError(f"{self.file(index)} is missing or damaged ({reason}), and the run cannot go on without it; "
                         "put it back, or start anew in another output_dir")
