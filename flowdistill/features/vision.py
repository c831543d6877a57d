"""Frozen networks that look at pictures, for losses that compare what is in them; from local files, never downloaded.

    small, small:7                     a built-in network with random weights of that seed: colours, edges and textures
    timm:NAME=FILE                     a timm model with weights from FILE (pip install timm)
    transformers:FOLDER                a vision model of transformers (DINOv2, CLIP, ViT, ConvNeXt, ...)
    package.module:function            whatever ``function()`` returns: a module from pictures (B, 3, H, W) in [0, 1] to
                                       features (B, D), (B, T, D) or (B, D, H', W'); one with a method ``features`` is
                                       asked for those
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.utils.errors import UserError, shown
from flowdistill.utils.files import check_pointer, local_path
from flowdistill.utils.objects import is_object, load_object
from flowdistill.utils.randomness import generator_of
from flowdistill.utils.seeds import check_seed
from flowdistill.utils.text import read_json_object, without_marks

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class VisionFeatures(NamedTuple):
    """Features of the whole picture (B, D) and of its parts (B, T, D'); ``grid``: rows and columns of the parts where
    the network has a map of them."""

    pooled: Tensor
    tokens: Tensor
    grid: tuple[int, int] | None = None

    def places(self) -> tuple[Tensor, tuple[int, int]]:
        """The tokens that are places of the picture, row by row (B, H' W', D'), and their grid (H', W').

        Without a map they are the last tokens that fill a square: class and register tokens, which are no places, lead
        in transformers.
        """
        if self.grid is not None:
            return self.tokens, self.grid
        side = math.isqrt(self.tokens.shape[1])
        return self.tokens[:, self.tokens.shape[1] - side * side :], (side, side)


class Vision(nn.Module):
    """A frozen network behind its own resizing and normalisation; gradients reach the pictures.

    ``forward(images (B, 3, H, W) in [0, 1], values outside allowed) -> VisionFeatures``.

    Attributes:
        name: as it was asked for.
        width: D of its pooled features.
        num_places: H' W' of :meth:`VisionFeatures.places` (of 32 x 32 pixels, for a network that takes any size).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        network: nn.Module,
        read: Callable[[nn.Module, Tensor], VisionFeatures],
        size: int | None,
        normal: tuple[Sequence[float], Sequence[float]] = ((0.5,) * 3, (0.5,) * 3),
    ) -> None:
        super().__init__()
        self.name, self.size = name, size
        self.network = network.float().requires_grad_(False).eval()
        self._read = read
        for key, values in zip(("mean", "std"), normal, strict=True):
            self.register_buffer(key, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)
        with torch.no_grad():
            seen = self(torch.zeros(1, 3, size or 32, size or 32))
        self.width, self.num_places = seen.pooled.shape[1], seen.places()[0].shape[1]

    def forward(self, images: Tensor) -> VisionFeatures:
        images = images.float()
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self._read(self.network, (images - self.mean) / self.std)


class SmallVision(nn.Module):
    """Three strided convolutions with fixed random weights; every layer's mean is a feature of the picture."""

    def __init__(self, seed: int, widths: tuple[int, ...] = (32, 64, 64)) -> None:
        super().__init__()
        ins = (3, *widths)
        convolutions = [nn.Conv2d(ins[i], width, 3, 2, 1) for i, width in enumerate(widths)]
        self.layers = nn.ModuleList(convolutions)
        generator = generator_of(seed)
        with torch.no_grad():
            for layer in convolutions:
                layer.weight.normal_(std=(2 / layer.weight[0].numel()) ** 0.5, generator=generator)
                layer.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> VisionFeatures:
        means = []
        for layer in self.layers:
            x = F.silu(layer(x))
            means.append(x.mean((2, 3)))
        return VisionFeatures(torch.cat(means, 1), x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]))


def load_vision(name: str, setting: str) -> Vision:
    """The network that ``name`` asks for, see above.

    Args:
        setting: the option that names it, for errors.

    Raises:
        UserError: another name, a file or package that is not there (says where to get it), or one that does not fit.
    """
    kind, _, rest = name.partition(":")
    if kind == "small" and (not rest or rest.isdecimal()):
        seed = check_seed(int(rest[:30] or 0), f"the seed in '{setting}'")
        return Vision(name, SmallVision(seed), lambda network, x: network(x), None)
    if kind == "timm" and "=" in rest:
        model, file = rest.split("=", 1)
        return _timm(name, model, file, setting)
    if kind == "transformers" and rest:
        return _transformers(name, local_path(rest), setting)
    if is_object(name):
        return _of_object(name, setting)
    raise UserError(f"'{setting}' is {shown(name)}; it must be small, small:SEED, timm:NAME=FILE, transformers:FOLDER "
                    "or package.module:function")


def _seen(features: Tensor) -> VisionFeatures:
    """Features (B, D), (B, T, D) or (B, D, H, W), pooled by the mean."""
    if features.ndim == 2:
        return VisionFeatures(features, features[:, None])
    grid = (features.shape[2], features.shape[3]) if features.ndim == 4 else None
    if grid is not None:
        features = features.flatten(2).transpose(1, 2)
    return VisionFeatures(features.mean(1), features, grid)


def _timm(name: str, model: str, file: str, setting: str) -> Vision:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"'{setting}' names {name}, which needs the package timm: pip install timm") from error
    if not timm.is_model(model):
        raise UserError(f"'{setting}' names the timm model {shown(model)}, which timm {timm.__version__} does not have")
    if not local_path(file).is_file():
        hub = f"timm/{model}"
        raise UserError(f"'{setting}' names the weights {file}, which are not there; get them where there is a "
                        f"network with: hf download {hub} model.safetensors, and give that file")
    check_pointer(file)
    try:
        network = timm.create_model(model, pretrained=False, checkpoint_path=str(local_path(file)))
    except Exception as error:  # damaged or foreign weights raise many unrelated types
        raise UserError(f"'{setting}': the weights {file} do not fit the timm model {model}: "
                        f"{' '.join(str(error).split())[:200]}") from error
    data = timm.data.resolve_model_data_config(network)

    def read(network: Any, x: Tensor) -> VisionFeatures:
        features = network.forward_features(x)
        return _seen(features)._replace(pooled=network.forward_head(features, pre_logits=True))

    return Vision(name, network, read, data["input_size"][-1], (data["mean"], data["std"]))


def vision_files(name: str) -> dict[str, Path]:
    """The files that decide what the network ``name`` is, by their names in its place; none of one that is code."""
    kind, _, rest = name.partition(":")
    if kind == "timm":
        file = local_path(rest.partition("=")[2])
        return {file.name: file}
    if kind == "transformers":
        folder = local_path(rest)
        names = ("config.json", "preprocessor_config.json")
        return {file.name: file for file in sorted(folder.iterdir())
                if file.name in names or file.suffix in (".safetensors", ".bin")}
    return {}


def _transformers(name: str, folder: Path, setting: str) -> Vision:
    from transformers import AutoModel

    if not (folder / "config.json").is_file():
        raise UserError(f"'{setting}' names the vision model {folder}, which is not there (no config.json); get one "
                        f"where there is a network, for example with: hf download facebook/dinov2-small --local-dir "
                        f"{folder}")
    for file in folder.glob("*.safetensors"):
        check_pointer(file)
    try:
        place = without_marks(folder)
        network, report = AutoModel.from_pretrained(place, local_files_only=True, output_loading_info=True)
    except Exception as error:  # transformers raises many unrelated types
        raise UserError(f"'{setting}': {folder} could not be loaded as a transformers model: "
                        f"{' '.join(str(error).split())[:200]}") from error
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise UserError(f"'{setting}': the weights in {folder} are incomplete; missing are {', '.join(missing[:5])}"
                        f"{' and more' if len(missing) > 5 else ''}")
    # Of a checkpoint for another task transformers would make a random pooler; the mean of the tokens is better.
    pools = not report["missing_keys"]
    network = getattr(network, "vision_model", network)  # CLIP and SigLIP have a text side as well
    size = getattr(network.config, "image_size", None) or 224
    normal: tuple[Sequence[float], Sequence[float]] = IMAGENET
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        values = read_json_object(processor)
        normal = values.get("image_mean", IMAGENET[0]), values.get("image_std", IMAGENET[1])

    def read(network: Any, x: Tensor) -> VisionFeatures:
        output = network(pixel_values=x)
        seen, pooled = _seen(output.last_hidden_state), getattr(output, "pooler_output", None) if pools else None
        return seen if pooled is None else seen._replace(pooled=pooled.flatten(1))

    return Vision(name, network, read, size if isinstance(size, int) else size[0], normal)


def _of_object(name: str, setting: str) -> Vision:
    network = load_object(name, setting)()
    if not isinstance(network, nn.Module):
        raise UserError(f"'{setting}' names {name}, which made a {type(network).__name__}, not a torch module")
    call = "features" if hasattr(network, "features") else "forward"
    return Vision(name, network, lambda network, x: _seen(getattr(network, call)(x)), None, ((0.0,) * 3, (1.0,) * 3))
