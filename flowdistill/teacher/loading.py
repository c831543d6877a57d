"""From a pipeline folder, a hub id or a live pipeline to a :class:`Teacher`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import nn

from flowdistill.errors import UserError
from flowdistill.path import NativePath, path_from_scheduler
from flowdistill.teacher.adapters import Adapter, adapter_for
from flowdistill.teacher.codec import PixelCodec, VaeCodec
from flowdistill.teacher.teacher import Teacher
from flowdistill.teacher.velocity import VelocityNetwork

SIDECAR = "flowdistill.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_teacher(
    source: str | os.PathLike[str] | DiffusionPipeline,
    null_label: int | None = None,
    t_max: float | None = None,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> Teacher:
    """Any supported diffusers pipeline as a frozen teacher on the linear path.

    Args:
        source: a pipeline folder, a hub id, or a live pipeline.
        null_label: the class label that means "no class". Known by itself for DiT; for a ``UNet2DModel`` it is read
            from ``flowdistill.json`` in the pipeline folder when that file is there.
        t_max: start later than the network's own last time (linear time).
        dtype: weights of the frozen network; coefficients are computed in float64 whatever it is.
        device: where to put it; the CPU by default.

    Raises:
        UserError: no pipeline there, a damaged weight file, or an unsupported backbone, scheduler or prediction type.
    """
    dtype = _dtype(dtype)
    if isinstance(source, DiffusionPipeline):
        pipeline, name, scheduler = source, source.config.get("_name_or_path") or type(source).__name__, None
        recorded: dict[str, Any] = {}
    else:
        name = os.fspath(source)
        pipeline, scheduler, recorded = _load_pipeline(name, dtype)
    scheduler = scheduler or pipeline.scheduler
    backbone, codec = _backbone(pipeline), _codec(pipeline)
    adapter = adapter_for(backbone)
    path = path_from_scheduler(scheduler)
    if t_max is not None:
        path = path.with_t_max(t_max)
    _check_agreement(backbone, adapter, scheduler, path, codec)
    if null_label is None:
        null_label = recorded.get("null_label")
    network = VelocityNetwork(backbone if backbone.dtype == dtype else backbone.to(dtype), path, adapter)
    classes = adapter.labels(backbone, null_label)
    teacher = Teacher(network, path, adapter.shape(backbone), codec, classes, name, scheduler)
    return teacher if device is None else teacher.to(device)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"teacher.dtype is '{dtype}'; allowed are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _load_pipeline(source: str, dtype: torch.dtype) -> tuple[DiffusionPipeline, Any, dict[str, Any]]:
    folder = Path(source)
    scheduler, recorded = None, {}
    if folder.exists():
        index = folder / "model_index.json"
        if not index.is_file():
            raise UserError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json")
        _read_json(index)
        check_weights(folder)
        # Read the scheduler as written: some pipelines (DDIMPipeline) rebuild theirs as another class when loaded.
        scheduler = load_scheduler(folder / "scheduler")
        if (folder / SIDECAR).is_file():
            recorded = _read_json(folder / SIDECAR)
    elif source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise UserError(f"teacher source {source} does not exist; give a pipeline folder or a hub id (owner/name)")
    try:
        with _quietly():
            pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype)
    except (OSError, ValueError, AttributeError, RuntimeError, ImportError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"teacher source {source} could not be loaded as a diffusers pipeline: {reason}") from error
    return pipeline, scheduler, recorded


@contextmanager
def _quietly() -> Iterator[None]:
    """Without diffusers' bar over a few files, and without its warning of torch_dtype, the name every version knows."""
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()


def load_scheduler(folder: Path) -> Any:
    """The scheduler saved in ``folder``, of exactly the class its config names."""
    file = folder / "scheduler_config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no scheduler_config.json, so the teacher's schedule is unknown")
    name = _read_json(file).get("_class_name", "")
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise UserError(f"{file} names the scheduler '{name}', which diffusers does not have")
    return cls.from_pretrained(folder)


def check_weights(folder: Path) -> None:
    """Raise a :class:`UserError` naming the first damaged ``.safetensors`` file below ``folder``."""
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"the weight file {file} is damaged or truncated ({error}); copy it again") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error


def _backbone(pipeline: DiffusionPipeline) -> nn.Module:
    for name in ("transformer", "unet"):
        module = pipeline.components.get(name)
        if module is not None:
            return module
    have = ", ".join(sorted(pipeline.components)) or "nothing"
    raise UserError(f"the pipeline {type(pipeline).__name__} has neither a unet nor a transformer (it has {have})")


def _codec(pipeline: DiffusionPipeline) -> PixelCodec | VaeCodec:
    if pipeline.components.get("vqvae") is not None:
        raise UserError(f"{type(pipeline).__name__} has a vqvae; supported are pixel models and KL autoencoders (vae)")
    vae = pipeline.components.get("vae")
    return PixelCodec() if vae is None else VaeCodec(vae)


def _check_agreement(
    backbone: nn.Module, adapter: Adapter, scheduler: Any, path: NativePath, codec: PixelCodec | VaeCodec
) -> None:
    """Contradictions that the configs alone show; the rest is :meth:`Teacher.disagreement`'s business."""
    channels = adapter.shape(backbone)[0]
    learned = str(scheduler.config.get("variance_type") or "").startswith("learned")
    if learned and not adapter.learned_variance_channels(backbone):
        raise UserError(f"the scheduler has variance_type '{scheduler.config.variance_type}', but the network "
                        f"returns no variance channels ({channels} in, {channels} out); scheduler and network disagree")
    if isinstance(codec, VaeCodec) and codec.vae.config.latent_channels != channels:
        raise UserError(f"the network takes {channels} latent channels, but the pipeline's autoencoder has "
                        f"{codec.vae.config.latent_channels}; they do not belong together")
    steps, trained = scheduler.config.get("num_train_timesteps"), backbone.config.get("num_train_timesteps")
    if path.kind == "vp" and steps and trained and steps != trained:
        raise UserError(f"the scheduler has {steps} training timesteps, but the network was made for {trained}; "
                        "scheduler and network disagree")
