"""The models of a pipeline folder: which of their weight files are read, in which variant, and loaded whole."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import diffusers
import torch
from torch import nn

from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_weight_file
from flowdistill.utils.hashing import files_below
from flowdistill.utils.logging import quiet_libraries
from flowdistill.utils.text import JsonObject

LOADING_ERRORS = (OSError, ValueError, AttributeError, RuntimeError, ImportError, TypeError, KeyError, IndexError)
"""What diffusers and transformers raise for a folder that they cannot load."""

# diffusers names its weights diffusion_pytorch_model, transformers model or (pickled) pytorch_model. The variant stands
# before the number of a shard, in files of older versions behind it.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?(?:\.(?P<old>[^.]+))?"
    r"\.(?:safetensors|bin)"
)
_SHARD = re.compile(r"-\d+-of-(\d+)\.")
_ADAPTERS = re.compile(r"lora|\.base_layer\.|\.hada_|\.lokr_")
M = TypeVar("M", bound=nn.Module)
_SHOWN = 5  # names of an error message


def component_class(entry: object) -> type[nn.Module] | None:
    """The class of an entry of model_index.json, ``[library, class]``; None for what is no model, or a foreign one."""
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        return None
    library, name = entry
    # Some pipelines have models in their own module of diffusers.
    module = (importlib.import_module(library) if library in ("diffusers", "transformers")
              else getattr(diffusers.pipelines, library, None))
    kind = getattr(module, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, nn.Module) else None


def is_weight_file(file: Path) -> bool:
    """Whether the name is one under which diffusers or transformers look for a model's weights."""
    return _WEIGHTS.fullmatch(file.name) is not None


def variants_of(names: Iterable[str]) -> set[str | None]:
    """The variants of the weight files among the names of a model's files; None for files without one."""
    matches = (_WEIGHTS.fullmatch(name) for name in names)
    return {match["variant"] or match["old"] for match in matches if match is not None}


def weight_files(folder: Path) -> dict[str | None, list[Path]]:
    """The weight files in a model's folder by their variant, None for those without one.

    Of safetensors and pickled files of one variant the former only, as the libraries read them.
    """
    found: dict[str | None, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        for variant in variants_of([file.name]):
            found.setdefault(variant, []).append(file)
    return {variant: [file for file in files if file.suffix == ".safetensors"] or files
            for variant, files in found.items()}


def adapter_file(folder: Path) -> str | None:
    """The name of a file in a folder that is an adapter's (LoRA); None where there is none."""
    names = (file.name for file in sorted(folder.iterdir()))
    return next((name for name in names if name.startswith(("adapter_", "pytorch_lora_weights"))), None)


def chosen_variant(folder: Path, wanted: str | None) -> str | None:
    """The variant that a model's folder is read in: the wanted one where it is, else none, else the only one.

    Raises:
        UserError: there are no weights, or several variants and none that is wanted.
    """
    found = weight_files(folder)
    if not found:
        adapter = adapter_file(folder)
        hint = "" if adapter is None else (f", only an adapter ({adapter}); load it on its base model, fuse it there, "
                                           "and save that pipeline")
        raise UserError(f"{folder} has no weights (no .safetensors or .bin file of a model){hint}")
    if wanted in found or None in found:
        return wanted if wanted in found else None
    if len(found) > 1:
        raise UserError(f"{folder} has its weights in the variants {', '.join(sorted(map(str, found)))} only; set "
                        "teacher.variant to one of them")
    return next(iter(found))


def read_files(folder: Path, entry: object, variant: str | None) -> list[Path]:
    """The files in a component's folder that decide what it does: of a model its config and the weights that are read,
    of a tokenizer or a scheduler all but texts about it.

    Args:
        entry: of model_index.json, see :func:`component_class`.
    """
    if component_class(entry) is None:
        return [file for file in files_below(folder) if file.suffix.lower() != ".md"]
    config = folder / "config.json"
    return [*([config] if config.is_file() else []), *weight_files(folder)[chosen_variant(folder, variant)]]


def missing_shards(files: Iterable[Path]) -> tuple[int, int] | None:
    """How many of the files that weights were saved in are here, and of how many; None where all are."""
    numbered = [match for file in files if (match := _SHARD.search(file.name)) is not None]
    whole = int(numbered[0][1]) if numbered else 0
    return (len(numbered), whole) if len(numbered) < whole else None


def check_variant(folder: Path, names: Iterable[str], wanted: str | None) -> None:
    """Refuse a variant that none of the models ``names`` of a pipeline folder has.

    Raises:
        UserError: so, with the variants that are there.
    """
    if wanted is None:
        return
    found = {variant for name in names if (folder / name).is_dir() for variant in weight_files(folder / name)}
    if wanted not in found:
        others = ", ".join(sorted(variant for variant in found if variant is not None))
        some = " and some without a variant" if None in found else ""
        has = f"those of {others}{some}" if others else "some without a variant"
        raise UserError(f"teacher.variant is '{wanted}', but {folder} has no weights of it, only {has}")


def load_model(folder: Path, kind: type[M], dtype: torch.dtype | None = None, variant: str | None = None) -> M:
    """The model in ``folder``, with every weight from its files.

    Args:
        kind: its class, of diffusers or transformers.
        variant: the one that is wanted; see :func:`chosen_variant`.

    Raises:
        UserError: a file is damaged or a git-lfs pointer, files or weights are missing, or these are those of layers
            that an adapter has wrapped.
    """
    variant = chosen_variant(folder, variant)
    files = weight_files(folder)[variant]
    if (found := missing_shards(files)) is not None:
        raise UserError(f"{folder} has {found[0]} of the {found[1]} files of its weights only; fetch or copy it again")
    for file in files:
        check_weight_file(file)
    try:
        with quiet_libraries():
            load: Callable[..., tuple[M, JsonObject]] = kind.from_pretrained  # type: ignore[attr-defined]
            model, report = load(folder, torch_dtype=dtype, variant=variant, output_loading_info=True)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the {kind.__name__} in {folder} could not be loaded: {reason}") from error
    # Both libraries would fill the gaps with random numbers or leave them empty.
    adapters = sorted(name for name in report["unexpected_keys"] if _ADAPTERS.search(name))
    if adapters:
        raise UserError(f"the {kind.__name__} in {folder} was saved with layers of an adapter (LoRA) in it, such as "
                        f"{adapters[0]}; fuse first: load the pipeline with its adapter, call fuse_lora() and "
                        "unload_lora_weights(), and save that")
    trained = dict(model.named_parameters())
    missing = sorted(name for name in report["missing_keys"] if name in trained)
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise UserError(f"the weights of the {kind.__name__} in {folder} are incomplete; missing are "
                        f"{', '.join(missing[:_SHOWN])}{more}")
    return model
