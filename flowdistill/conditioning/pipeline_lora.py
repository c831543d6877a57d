"""A LoRA file of a pipeline: found, read as the pipeline's ``load_lora_weights`` reads it, checked, and fused."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors import safe_open
from torch import Tensor, nn

from flowdistill.conditioning.components import LOADING_ERRORS
from flowdistill.config import TeacherConfig
from flowdistill.utils.errors import UserError, listed
from flowdistill.utils.files import check_weight_file
from flowdistill.utils.hashing import add_tensors
from flowdistill.utils.logging import quiet_libraries
from flowdistill.utils.shipped import find_path

ENDING = ".safetensors"
FILE = f"pytorch_lora_weights{ENDING}"
FORMS = f"a {ENDING} file, a folder with {FILE}, or a hub id (owner/name, or owner/name/file{ENDING})"
NETWORKS = ("unet", "transformer")
PARTS = ("A.weight", "B.weight", "B.bias")
"""What a layer has of a LoRA, in peft's words; the third is rare."""
ADAPTER = "base"

Tensors = dict[str, Tensor]


class BaseLora(NamedTuple):
    """The record of a LoRA that became part of a model's weights: where it was, and how much of it."""

    source: str
    scale: float

    def __str__(self) -> str:
        return f"{self.source} at scale {self.scale:g}"


def base_lora(config: TeacherConfig) -> BaseLora | None:
    """The LoRA that a teacher's settings name."""
    return None if config.lora is None else BaseLora(config.lora, config.lora_scale)


def with_parts(source: str, lora: BaseLora | None, vae: str | None) -> str:
    """A model in words: where it was loaded from, the LoRA in its weights, and the autoencoder in the place of its own.
    """
    parts = ([] if lora is None else [f"the LoRA {lora}"]) + ([] if vae is None else [f"the autoencoder {vae}"])
    return f"{source} with {' and '.join(parts)}" if parts else source


def teacher_in_words(config: TeacherConfig) -> str:
    """The same of a teacher's settings."""
    return with_parts(config.source, base_lora(config), config.vae)


def check_takes_lora(kind: str, source: str) -> None:
    """Refuse ``teacher.lora`` for a pipeline whose class, by name, has no loader of LoRA files.

    Raises:
        UserError: so.
    """
    if not hasattr(getattr(diffusers, kind, None), "load_lora_weights"):
        raise UserError(f"teacher.lora is set, but the teacher {source} is a {kind}, for which diffusers loads no LoRA "
                        "files; set it to null")


def find_lora(source: str, download: bool = True) -> Path | None:
    """The file that ``teacher.lora`` names.

    Args:
        source: a file, a folder, or a hub id with or without the name of a file in it.
        download: False looks in the hub's cache only, and returns None for what is not there.

    Raises:
        UserError: nothing there, a file of another format, a damaged one, or several to choose from.
    """
    place = find_path(source)
    if place.is_dir():
        place = place / _only((file.name for file in place.iterdir() if file.is_file()), source)
    elif not place.exists():
        name = "/".join(source.split("/")[:2])
        file = source.removeprefix(name)[1:]
        if name.count("/") != 1 or source.startswith((".", "/", "~")) or file and not file.endswith(ENDING):
            raise UserError(f"teacher.lora {source} does not exist; give {FORMS}")
        found = _in_cache(name, file) or (_fetched(name, file) if download else None)
        if found is None:
            return None
        place = found
    if place.suffix.lower() != ENDING:
        raise UserError(f"teacher.lora {place} is no {ENDING} file; give {FORMS}")
    check_weight_file(place)
    return place


def _only(names: Iterable[str], source: str) -> str:
    """The LoRA file among those of a folder or a repository."""
    found = sorted(name for name in names if name.endswith(ENDING) and "/" not in name)
    if FILE in found or len(found) == 1:
        return FILE if FILE in found else found[0]
    has = f"holds several files, {listed(found)}; name one of them" if found else (
        f"holds no {ENDING} file; give {FORMS}")
    raise UserError(f"teacher.lora {source} {has}")


def _in_cache(repository: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(repository, file or FILE)
    except ValueError:  # what cannot be a hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


def _fetched(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        return Path(hf_hub_download(repository, file or _only(list_repo_files(repository), repository)))
    except UserError:
        raise
    except Exception as error:  # the hub client raises many unrelated types, and every one means the same to a user
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"teacher.lora {repository} is no file or folder here and could not be fetched from the hub: "
                        f"{reason}") from error


@dataclass(frozen=True)
class PipelineLora:
    """The content of a LoRA file under diffusers' names.

    Attributes:
        file: where it was, for messages.
        scale: how much of it is fused.
        kind: class of the pipeline.
        tensors: by names that begin with the component's: ``unet.``, ``transformer.``, ``text_encoder.``, ...
        alphas, metadata: what the class has read beside them, for diffusers.
    """

    file: str
    scale: float
    kind: Any
    tensors: Tensors
    alphas: dict[str, Any] | None
    metadata: dict[str, Any] | None

    @property
    def components(self) -> list[str]:
        """Names of the pipeline's components that it changes."""
        return sorted({key.partition(".")[0] for key in self.tensors})

    def of_texts(self) -> PipelineLora | None:
        """Its part for the text encoders; None where it has none."""
        texts = {key: value for key, value in self.tensors.items() if not key.startswith(NETWORKS)}
        return replace(self, tensors=texts) if texts else None

    def fuse(self, name: str, network: Any) -> None:
        """Make its part for the network ``name`` part of the network's weights: W + scale (alpha / rank) B A, in place
        and in their type.

        Raises:
            UserError: what diffusers refuses.
        """
        if name not in self.components:
            return
        with _errors(self.file):
            network.load_lora_adapter(self.tensors, prefix=name, network_alphas=self.alphas, metadata=self.metadata,
                                      adapter_name=ADAPTER)
            network.fuse_lora(lora_scale=self.scale)
            network.unload_lora()

    def fuse_texts(self, pipeline: Any) -> None:
        """The same for the text encoders of a pipeline.

        Raises:
            UserError: it does not fit them.
        """
        names = [name for name in self.components if name not in NETWORKS]
        with _errors(self.file):
            for name in names:
                encoder = getattr(pipeline, name)
                _check(_part(self.tensors, name), encoder, self.file, _of_text_encoder)
                self.kind.load_lora_into_text_encoder(
                    self.tensors, network_alphas=self.alphas, text_encoder=encoder, prefix=name, metadata=self.metadata,
                    adapter_name=ADAPTER,
                )
            pipeline.fuse_lora(components=names, lora_scale=self.scale)
            pipeline.unload_lora_weights()

    def add_to(self, digest: hashlib._Hash) -> None:
        """Hash what it changes on top of what ``digest`` has seen."""
        alphas = {name: float(value) for name, value in sorted((self.alphas or {}).items())}
        digest.update(json.dumps([self.scale, alphas, self.metadata], sort_keys=True, default=str).encode())
        add_tensors(digest, self.tensors)


def read_lora(file: Path, scale: float, kind: Any, name: str, network: nn.Module) -> PipelineLora:
    """Read a LoRA file by the means of a pipeline's class, and see that its network has every layer of it.

    Args:
        kind: the class, which takes LoRA files.
        name: the network's in the pipeline, ``unet`` or ``transformer``.
        network: may be on the meta device. Whether the file fits the text encoders shows when these are loaded.

    Raises:
        UserError: a LoRA of another model, or a file of something else.
    """
    with safe_open(file, framework="pt") as content:
        if any("dora_scale" in key for key in content.keys()):  # noqa: SIM118  # it is no mapping
            raise UserError(f"teacher.lora {file} is a DoRA, whose magnitudes diffusers leaves out; give a LoRA, or a "
                            "pipeline with it in its weights")
    # As load_lora_weights of the pipeline calls it.
    given: dict[str, Any] = {"unet_config": getattr(network, "config", None)}
    given = given if issubclass(kind, StableDiffusionXLLoraLoaderMixin) else {}
    with _errors(str(file)):
        tensors, *rest = kind.lora_state_dict(str(file), return_alphas=True, return_lora_metadata=True, **given)
    lora = PipelineLora(str(file), scale, kind, tensors, rest[0] if len(rest) > 1 else None, rest[-1])
    takes = kind._lora_loadable_modules
    strange = next((key for key in tensors if key.partition(".")[0] not in takes), None)
    if strange is not None or not tensors:
        found = f"its '{strange}' is none of these" if tensors else "it is empty"
        raise UserError(f"teacher.lora {file} is no LoRA of a {kind.__name__}, which may have one of its "
                        f"{listed(takes)}: {found}")
    _check(_part(tensors, name), network, str(file), convert_unet_state_dict_to_peft)
    return lora


@contextlib.contextmanager
def _errors(file: str) -> Iterator[None]:
    """Quiet libraries, whose errors become one sentence."""
    try:
        with quiet_libraries():
            yield
    except UserError:  # a ValueError too
        raise
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"teacher.lora {file} could not be read as a LoRA of the teacher: {reason}") from error


def _part(tensors: Tensors, component: str) -> Tensors:
    head = f"{component}."
    return {key.removeprefix(head): value for key, value in tensors.items() if key.startswith(head)}


def _of_text_encoder(tensors: Tensors) -> Tensors:
    return convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))


def _check(tensors: Tensors, module: nn.Module, file: str, in_pefts_words: Callable[[Tensors], Tensors]) -> None:
    """Refuse tensors that are no LoRA of ``module``: diffusers would leave out what it has no layer for.

    Raises:
        UserError: so.
    """
    if not tensors:
        return

    def plain(name: str) -> str:  # some versions of transformers have one level more
        return name.removeprefix("text_model.")

    layers: dict[str, Tensors] = {}
    for key, value in in_pefts_words(tensors).items():
        layer, mark, part = key.rpartition(".lora_")
        if not mark or part not in PARTS:
            raise UserError(f"teacher.lora {file} is no LoRA: '{key}' is none of a layer's two matrices")
        layers.setdefault(plain(layer), {})[part] = value
    own = {plain(name): child for name, child in module.named_modules()}
    kind = type(module).__name__
    missing = [name for name in layers if name not in own]
    if missing:
        raise UserError(f"teacher.lora {file} is a LoRA of another model: {len(missing)} of its {len(layers)} layers, "
                        f"such as {missing[0]}, are none of the {kind}'s")
    for name, parts in layers.items():
        if not parts.keys() >= set(PARTS[:2]):
            raise UserError(f"teacher.lora {file} is incomplete: {name} has one of its two matrices only")
        weight, down, up = getattr(own[name], "weight", None), parts["A.weight"], parts["B.weight"]
        if weight is None or (up.shape[0], *down.shape[1:]) != tuple(weight.shape):
            has = "no weight" if weight is None else f"{' x '.join(map(str, weight.shape))}"
            raise UserError(f"teacher.lora {file} is a LoRA of another model: its {name} is for a layer of "
                            f"{' x '.join(map(str, (up.shape[0], *down.shape[1:])))}, and the {kind}'s has {has}")
