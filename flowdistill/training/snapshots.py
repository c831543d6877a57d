"""Weights a method keeps on disk while it trains: one file a node, complete or absent, put back strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from flowdistill.training.state import assign, gather
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_write, disk_errors
from flowdistill.utils.processes import Processes


class WeightSnapshots:
    """Files ``node-000.safetensors``, ``node-001.safetensors``, ... in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, index: int) -> Path:
        return self.folder / f"node-{index:03d}.safetensors"

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
            raise UserError(f"{file} is missing or damaged ({' '.join(str(error).split())}), and the run cannot go on "
                            "without it; put it back, or start anew in another output_dir") from error
        for name, value in values.items():
            if name in targets and value.dtype != targets[name].dtype:
                raise UserError(f"{file} does not fit: {name} is {value.dtype} there and {targets[name].dtype} in the "
                                "network")
        assign(targets, values, str(file))
