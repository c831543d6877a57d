"""Text encoders and tokenizers of a pipeline: loaded only while they encode, told apart by content, stored."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from diffusers import DiffusionPipeline
from torch import nn

from flowdistill.conditioning.components import (
    LOADING_ERRORS,
    chosen_variant,
    component_class,
    is_weight_file,
    load_model,
    weight_files,
)
from flowdistill.conditioning.pipeline_lora import PipelineLora
from flowdistill.conditioning.text_pipeline import Pipeline
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_pointer
from flowdistill.utils.hashing import add_files, add_folder, add_module, files_below
from flowdistill.utils.logging import quiet_libraries
from flowdistill.utils.quantized import quantize
from flowdistill.utils.text import JsonObject, read_json_object

INDEX = "model_index.json"
CLIP_TOKENS = 77
"""Of CLIP's own text encoders."""


def is_text(component: str) -> bool:
    """Whether a pipeline's component is a text encoder or a tokenizer, by its name."""
    return component.startswith(("text_encoder", "tokenizer"))


class TextEncoders:
    """The text side of a pipeline, on disk or in memory.

    Args:
        source: a pipeline folder (which may hold nothing else), or a live pipeline, whose own modules are used and stay
            where they are.
        dtype: of the encoders' weights; a live pipeline's stay as they are.
        variant: of the weight files in a folder; see :func:`flowdistill.conditioning.components.chosen_variant`.
        lora: becomes part of the weights that are loaded from a folder.
        scheme: of :mod:`flowdistill.utils.quantized`, for encoders that are loaded from a folder; None: whole weights.
    """

    def __init__(
        self, source: str | os.PathLike[str] | DiffusionPipeline, dtype: torch.dtype, variant: str | None = None,
        lora: PipelineLora | None = None, scheme: str | None = None,
    ) -> None:
        self.folder = None if isinstance(source, DiffusionPipeline) else Path(source)
        self.live = cast(Pipeline, source) if isinstance(source, DiffusionPipeline) else None
        self.dtype = dtype
        self.variant = variant
        self.lora = lora
        self.scheme = scheme
        if self.live is not None:
            index = dict(self.live.config) | {"_class_name": type(self.live).__name__}
        else:
            assert self.folder is not None
            index = read_json_object(self.folder / INDEX)
        self._index = {name: value for name, value in index.items() if name != "_name_or_path"}
        self.pipeline_class = str(index["_class_name"])
        self.components = sorted(name for name, value in index.items() if is_text(name) and _is_there(value))

    @property
    def encoder_classes(self) -> list[str]:
        return [str(self._index[name][1]) for name in self.components if name.startswith("text_encoder")]

    @property
    def clip_tokens(self) -> int:
        """Tokens of a prompt in the first text encoder, where it is one of CLIP."""
        if self.live is not None:
            config: JsonObject = self.live.text_encoder.config.to_dict()
        else:
            assert self.folder is not None
            file = self.folder / "text_encoder" / "config.json"
            config = read_json_object(file) if file.is_file() else {}
        return int(config.get("max_position_embeddings", CLIP_TOKENS))

    @contextmanager
    def opened(self, device: torch.device) -> Iterator[Pipeline]:
        """The pipeline with its text components only, on ``device``; what was loaded is dropped afterwards."""
        if self.live is not None:
            yield self.live
            return
        others = {name: None for name, value in self._index.items() if isinstance(value, list) and not is_text(name)}
        loaded: dict[str, nn.Module] = {}
        for name in self.components:
            kind = component_class(self._index[name])
            if kind is not None and self.folder is not None and (self.folder / name).is_dir():
                loaded[name] = load_model(self.folder / name, kind, self.dtype, self.variant)
            else:
                for file in self._files(name):
                    check_pointer(file)
        try:
            with quiet_libraries():
                pipeline = DiffusionPipeline.from_pretrained(self.folder, torch_dtype=self.dtype, **loaded, **others)
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the text encoders in {self.folder} could not be loaded: {reason}") from error
        if self.lora is not None:
            self.lora.fuse_texts(pipeline)
        for name in self.components:
            component = getattr(pipeline, name)
            if isinstance(component, nn.Module):
                if self.scheme is not None:
                    quantize(component.requires_grad_(False), self.scheme, "teacher.text_encoder_quantize")
                component.to(device)
        yield pipeline
        del pipeline
        if device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the encoders' weights and their LoRA, the tokenizers' files and the pipeline's settings."""
        digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        if self.folder is not None:
            for name in self.components:
                add_files(digest, self._files(name), self.folder / name, name)
        else:
            for name in self.components:
                component = getattr(self.live, name)
                if isinstance(component, nn.Module):
                    add_module(digest, component, f"{name}.")
                else:
                    with tempfile.TemporaryDirectory() as folder:
                        component.save_pretrained(folder)
                        add_folder(digest, Path(folder), name)
        if self.lora is not None:
            self.lora.add_to(digest)
        if self.scheme is not None:
            digest.update(self.scheme.encode())
        return digest.hexdigest()

    def save(self, target: Path) -> None:
        """Write a pipeline folder with the text components and no others, which this class opens again."""
        target.mkdir(parents=True)
        changed = [] if self.lora is None else self.lora.components
        if changed:
            with self.opened(torch.device("cpu")) as pipeline:
                for name in changed:
                    getattr(pipeline, name).save_pretrained(target / name)
        for name in self.components:
            if name in changed:
                continue
            if self.folder is not None:
                for file in self._files(name):
                    copy = target / name / file.relative_to(self.folder / name)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)
            else:
                getattr(self.live, name).save_pretrained(target / name)
        (target / INDEX).write_text(json.dumps(self._settings(), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _files(self, name: str) -> list[Path]:
        """The files of a component in the folder: of weights only those that are read."""
        assert self.folder is not None
        place = self.folder / name
        if component_class(self._index[name]) is None or not place.is_dir():
            return files_below(place)
        read = weight_files(place)[chosen_variant(place, self.variant)]
        return [file for file in files_below(place) if not is_weight_file(file) or file in read]

    def _settings(self) -> JsonObject:
        """The pipeline's index without the components that have nothing to do with text."""
        return {name: [None, None] if isinstance(value, (list, tuple)) and not is_text(name) else value
                for name, value in self._index.items()}


def _is_there(value: object) -> bool:
    return isinstance(value, (list, tuple)) and value[0] is not None
