"""``teacher.vae``: an autoencoder in the place of a pipeline's own, found, checked against it, and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import nn

from flowdistill.conditioning.components import (
    LOADING_ERRORS,
    component_class,
    load_model,
    missing_shards,
    variants_of,
    weight_files,
)
from flowdistill.conditioning.text_encoders import INDEX
from flowdistill.config import TeacherConfig
from flowdistill.teachers.codec import VaeCodec
from flowdistill.utils.errors import UserError, listed, shown
from flowdistill.utils.files import portable_path
from flowdistill.utils.logging import log_once, quiet_libraries
from flowdistill.utils.shipped import find_path
from flowdistill.utils.text import JsonObject, read_json_object, without_marks

FILE, INSIDE = "config.json", "vae"
PLACES = ("", INSIDE)
"""Subfolders in which an autoencoder may be: its own folder, and that of a pipeline."""
FORMS = "a folder or a hub id (owner/name) of an autoencoder as diffusers saves it, or of a pipeline with one"
BEYOND = ("shift_factor", "latents_mean", "latents_std")
"""What an autoencoder's config may say of its latents beside scaling_factor, and only some pipelines' calls read."""


class BaseVae(NamedTuple):
    """The record of an autoencoder that took the place of a pipeline's own: where it was, in which subfolder (or ""),
    and the name of its class."""

    source: str
    subfolder: str
    kind: str

    def code(self, source: str | None = None) -> str:
        """Python that loads it with diffusers, from ``source`` or from where it was."""
        inside = f', subfolder="{self.subfolder}"' if self.subfolder else ""
        return f'{self.kind}.from_pretrained("{portable_path(self.source) if source is None else source}"{inside})'


class Found(NamedTuple):
    """An autoencoder that has been found, and not loaded: its folder, its class, and its record."""

    folder: Path
    kind: type[nn.Module]
    record: BaseVae

    def load(self, dtype: torch.dtype, variant: str | None = None) -> Any:
        """It, with every weight from its files; in the variant of them that is wanted, where it has that one."""
        return load_model(self.folder, self.kind, dtype, variant)


def find_autoencoder(source: str, variant: str | None = None, download: bool = True) -> Found | None:
    """The autoencoder that ``teacher.vae`` names.

    Args:
        variant: of the weight files that are fetched from the hub, where it has them.
        download: False looks in the hub's cache only, and returns None for what is not there.

    Raises:
        UserError: nothing there, or something else.
    """
    place = find_path(source)
    if place.is_file():
        raise UserError(f"teacher.vae {source} is a file; give {FORMS}: diffusers makes a folder of a single file with "
                        f'AutoencoderKL.from_single_file("{source}").save_pretrained("a new folder")')
    if not place.exists():
        if source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise UserError(f"teacher.vae {source} does not exist; give {FORMS}")
        found = _in_cache(source, variant) if download else _in_cache(source)
        found = found or (_fetched(source, variant) if download else None)
        if found is None:
            return None
        place = found
    there = [inside for inside in PLACES if (place / inside / FILE).is_file()]
    if not there:
        raise UserError(f"teacher.vae {source} holds no autoencoder: neither it nor a folder {INSIDE} in it has a "
                        f"{FILE}; give {FORMS}")
    names = [read_json_object(place / inside / FILE).get("_class_name") for inside in there]
    for inside, name in zip(there, names, strict=True):
        kind = component_class(("diffusers", name))
        if kind is not None and hasattr(kind, "encode") and hasattr(kind, "decode"):
            return Found(without_marks(place / inside), kind, BaseVae(source, inside, str(name)))
    what = "no model of diffusers" if names[0] is None else f"a {shown(names[0], quoted=False)}"
    raise UserError(f"teacher.vae {source} holds no autoencoder, but {what}; give {FORMS}")


ANY = "*"
"""In the place of a variant: whichever there is."""


def _in_cache(repository: str, variant: str | None = ANY) -> Path | None:
    """The folder of a repository in the hub's cache, where an autoencoder's config and all its weights in this variant
    are in it, or, without a variant, those in any."""
    from huggingface_hub import try_to_load_from_cache

    for inside in PLACES:
        file = str(PurePosixPath(inside, FILE))
        try:
            cached = try_to_load_from_cache(repository, file)
        except ValueError:  # what cannot be a hub id
            return None
        if isinstance(cached, str):
            there = weight_files(Path(cached).parent)
            chosen = there.values() if variant == ANY else [there.get(variant, [])]
            if any(files and missing_shards(files) is None for files in chosen):
                return Path(cached.removesuffix(file))
    return None


def _fetched(repository: str, variant: str | None) -> Path:
    """The folder into which the hub's files of an autoencoder go; where it does not answer, that in its cache with the
    weights in another variant, as it has them perhaps in no other.

    Raises:
        UserError: neither, or several variants to choose from.
    """
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        needed = _needed(list_repo_files(repository), repository, variant)
        return Path(snapshot_download(repository, allow_patterns=needed))
    except UserError:
        raise
    except Exception as error:  # the hub client raises many unrelated types, and every one means the same to a user
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        cached = _in_cache(repository)
        if cached is None:
            raise UserError(f"teacher.vae {repository} is no folder here and could not be fetched from the hub: "
                            f"{reason}") from error
        there = {name for inside in PLACES if (cached / inside / FILE).is_file()
                 for name, files in weight_files(cached / inside).items() if missing_shards(files) is None}
        variants = sorted(name for name in there if name is not None)
        wanted = "those without a variant" if variant is None else f"those of the variant {variant}"
        what = _in_words(variants, None in there)
        has = f"teacher.vae {repository} is in the hub's cache with its weights {what} only"
        if None not in there and len(variants) > 1:
            raise UserError(f"{has}, and {wanted} could not be fetched from the hub ({reason}); set teacher.variant to "
                            "one of them") from error
        _say_once(f"{has}, which are taken in the place of {wanted}, for the hub does not answer")
        return cached


def _in_words(variants: Sequence[str], bare: bool) -> str:
    """What variants of weights there are, ``bare``: those without one too."""
    named = f"in the variant{'s' if len(variants) > 1 else ''} {listed(variants)}" if variants else ""
    return " and ".join(filter(None, (named, "without a variant" if bare else "")))


def _needed(files: Iterable[str], repository: str, variant: str | None) -> list[str]:
    """Those of a repository's files that an autoencoder in it is read from: its config, and its weights in one variant,
    chosen as in a folder."""
    paths = [PurePosixPath(file) for file in files]
    for inside in PLACES:
        own = [path for path in paths if path.parent == PurePosixPath(inside)]
        by_variant = {name: [path for path in own if variants_of([path.name]) == {name}]
                      for name in variants_of(path.name for path in own)}
        if FILE not in (path.name for path in own) or not by_variant:
            continue
        chosen = next((name for name in (variant, None) if name in by_variant), None)
        if chosen not in by_variant:
            if len(by_variant) > 1:
                raise UserError(f"teacher.vae {repository} has its weights in the variants "
                                f"{listed(sorted(map(str, by_variant)))} only; set teacher.variant to one of them")
            chosen = next(iter(by_variant))
        weights = [path for path in by_variant[chosen] if path.suffix == ".safetensors"] or by_variant[chosen]
        indices = [path for path in own if path.name.endswith(".index.json")]  # of weights in several files
        return [str(path) for path in (PurePosixPath(inside, FILE), *weights, *indices)]
    raise UserError(f"teacher.vae {repository} holds no autoencoder: neither it nor a folder {INSIDE} in it has a "
                    f"{FILE} and weights; give {FORMS}")


def checked_autoencoder(config: TeacherConfig, folder: Path) -> Found:
    """The autoencoder that ``teacher.vae`` names, found to fit the pipeline in ``folder``, by their configs alone.

    Raises:
        UserError: see :func:`find_autoencoder` and :func:`check_fits`.
    """
    assert config.vae is not None
    check_has_autoencoder(config, read_json_object(folder / INDEX))
    found = find_autoencoder(config.vae, config.variant)
    assert found is not None  # what is not here was fetched
    check_fits(bare_codec(found.folder, found.kind), bare_codec(folder / INSIDE, own_class(folder)), config)
    return found


def check_has_autoencoder(config: TeacherConfig, parts: JsonObject) -> None:
    """Refuse ``teacher.vae`` for a pipeline without an autoencoder; ``parts``: of it, by name."""
    entry = parts.get(INSIDE)
    absent = entry is None or isinstance(entry, (list, tuple)) and entry[0] is None
    if absent and "vqvae" not in parts:  # which is refused for itself
        raise UserError(f"teacher.vae is set, but the teacher {config.source} has no autoencoder, for its samples are "
                        "pixels; set it to null")


def own_class(folder: Path) -> type[nn.Module]:
    """The class of the autoencoder that a pipeline folder has of its own."""
    kind = component_class(read_json_object(folder / INDEX).get(INSIDE))
    if kind is None or not (folder / INSIDE / FILE).is_file():
        raise UserError(f"teacher.vae is set, but {folder} has no {INSIDE}/{FILE}, so whether the latents of the "
                        "two autoencoders are alike is unknown")
    return kind


def bare_codec(folder: Path, kind: Any) -> VaeCodec:
    """A codec without weights, of the config in ``folder``.

    Raises:
        UserError: a config that is not one of this class, or an autoencoder that is not supported.
    """
    try:
        with quiet_libraries(), torch.device("meta"):
            return VaeCodec(kind.from_config(kind.load_config(folder)))
    except UserError:
        raise
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the {kind.__name__} in {folder} could not be made from its {FILE}: {reason}") from error


def check_fits(new: VaeCodec, own: VaeCodec, config: TeacherConfig) -> None:
    """Refuse an autoencoder whose latents or pictures are not of the shape of the pipeline's own, or that scales them
    by rules which only other pipelines have; say where it scales them by other numbers.

    Another scale alone is no mistake in itself: it is right where the latents come out of the encoder in other units.
    """
    name = f"teacher.vae {config.vae}"
    facts = (
        ("makes latents of {} channels", new.channels, own.channels),
        ("makes latents {} times smaller than pictures along a side", new.factor, own.factor),
        ("makes pictures of {} channels", new.image_channels(0), own.image_channels(0)),
        ("takes {}", *("pictures as frames of a video" if codec.frames else "pictures alone" for codec in (new, own))),
    )
    for words, here, there in facts:
        if here != there:
            raise UserError(f"{name} {words.format(here)}, and the autoencoder of the teacher {config.source} "
                            f"{words.format(there)}; give one with the same latents, or set it to null")
    for key in BEYOND:
        value, before = (codec.vae.config.get(key) for codec in (new, own))
        has = bool(value)  # a shift by 0 needs nothing of a pipeline
        if (has if before is None else value is None):
            here, there = ("has a", "has none") if has else ("has no", "has one")
            raise UserError(f"{name} {here} {key}, and the autoencoder of the teacher {config.source} {there}, so its "
                            "pipeline does not scale latents as this one needs it; give one with the same, or set it "
                            "to null")
    for key in ("scaling_factor", *BEYOND):
        here, there = (codec.scale if key == "scaling_factor" else codec.vae.config.get(key) for codec in (new, own))
        if here != there and (here or there):
            _say_once(f"{name} has the {key} {shown(here)}, and the autoencoder of the teacher {config.source} "
                      f"{shown(there)}: the teacher's network was trained on latents that are scaled otherwise, so "
                      "this is right only where the new one's come out of its encoder in other units")


@cache
def _say_once(sentence: str) -> None:
    log_once(sentence)
