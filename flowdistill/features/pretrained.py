"""Networks of transformers that look at pictures, from a folder or the hub: DINOv2 and CLIP, as papers measure."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowdistill.features.extractor import FeatureExtractor
from flowdistill.features.resizing import pil_bicubic, square_crop
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_pointer, local_path
from flowdistill.utils.hashing import module_sha256
from flowdistill.utils.text import read_json_object, without_marks

DEFAULT_SOURCES = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14-336"}
"""What FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675) and CMMD are measured with."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
DINOV2_SIZE = 224


@dataclass(frozen=True)
class ImageSettings:
    """Size and normalisation of a folder's ``preprocessor_config.json``."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalised(self, images: Tensor) -> Tensor:
        """Float images (B, 3, H, W) in [0, 255], as the network reads them."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return (images / 255.0 - mean) / std

    @property
    def words(self) -> str:
        return f"mean {_numbers(self.mean)}, std {_numbers(self.std)}"


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.4g}" for value in values)


def image_settings(source: str, size: int, normal: tuple[tuple[float, ...], tuple[float, ...]]) -> ImageSettings:
    """What the folder or hub id ``source`` says, with these for what it does not say."""
    from transformers.utils import cached_file

    folder = local_path(source)
    file = folder / "preprocessor_config.json"
    if not folder.is_dir():
        found = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)
        file = Path(found) if found else file
    values = read_json_object(file) if file.is_file() else {}
    crop = values.get("crop_size", size)
    side = crop.get("height", size) if isinstance(crop, dict) else crop
    mean, std = values.get("image_mean", normal[0]), values.get("image_std", normal[1])
    if not (isinstance(side, int) and side > 0 and len(mean) == len(std) == 3):
        raise UserError(f"{file} does not say one size, three means and three deviations of images")
    return ImageSettings(side, tuple(mean), tuple(std))


def check_source(source: str, setting: str) -> None:
    """Refuse what is neither a folder nor a hub id.

    Raises:
        UserError: so.
    """
    if not local_path(source).is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise UserError(f"{setting} names {source}, which is neither a folder here nor a hub id (owner/name)")


def load_pretrained(kind: type[Any], source: str | os.PathLike, setting: str) -> nn.Module:
    """A frozen float32 model of transformers from a folder or a hub id.

    Raises:
        UserError: there is none, or its weights are incomplete or of another model.
    """
    text = os.fspath(source)
    folder = local_path(text)
    check_source(text, setting)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{setting} names the folder {folder}, which has no config.json, so it is no model of "
                            "transformers")
        for file in folder.glob("*.safetensors"):
            check_pointer(file)
    try:
        place = without_marks(folder) if folder.is_dir() else text
        network, report = kind.from_pretrained(place, output_loading_info=True)
    except Exception as error:  # transformers raises many unrelated types
        raise UserError(f"{setting}: {text} could not be loaded as a {kind.__name__}: "
                        f"{' '.join(str(error).split())[:200]}") from error
    # A weight of another size is left random, and only a table in the log says so.
    missing = sorted([*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])])
    if missing:
        raise UserError(f"{setting}: the weights in {text} are incomplete or of another model; missing are "
                        f"{', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}")
    return network.float().eval().requires_grad_(False)


def dinov2_features(source: str, device: torch.device) -> FeatureExtractor:
    """The class token behind the last norm, of the whole picture squeezed to 224 x 224: as dgm-eval takes it.

    That is not what the folder's image processor does, which cuts off the picture's edges.
    """
    from transformers import Dinov2Model

    network = load_pretrained(Dinov2Model, source, "features 'dinov2'").to(device)
    settings = image_settings(source, DINOV2_SIZE, IMAGENET)
    resize = f"{settings.size}x{settings.size} without a crop, PIL's bicubic, {settings.words}"
    return FeatureExtractor(
        name=f"dinov2:{source}",
        hash=f"{resize.split(',')[0].replace(' ', '_')} {module_sha256(network)}",
        network=lambda images: network(pixel_values=images).pooler_output,
        prepare=lambda images: settings.normalised(pil_bicubic(images, settings.size)),
        resize=resize,
        channels=3,
        device=device,
        mode="dinov2",
        distance="FD-DINOv2",
    )


class ClipImages(nn.Module):
    """The image side of a ``CLIPModel``: normalised images (B, 3, S, S) -> embeddings (B, D) of length 1."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = network.vision_model, network.visual_projection

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.vision_model(pixel_values=images).pooler_output
        return nn.functional.normalize(self.visual_projection(pooled), dim=-1)


def clip_features(source: str, device: torch.device) -> FeatureExtractor:
    """Embeddings of CLIP's image side, of length 1, of the square in the middle: as the code of CMMD takes them."""
    from transformers import CLIPModel

    # Not CLIPVisionModelWithProjection: of a whole CLIPModel's folder it may make a projection of another size.
    whole: Any = load_pretrained(CLIPModel, source, "features 'clip'")
    network = ClipImages(whole).to(device)
    settings = image_settings(source, whole.config.vision_config.image_size, CLIP)
    resize = f"square in the middle, {settings.size}x{settings.size}, PIL's bicubic, {settings.words}"
    return FeatureExtractor(
        name=f"clip:{source}",
        hash=f"{settings.size}x{settings.size} {module_sha256(network)}",
        network=network,
        prepare=lambda images: settings.normalised(pil_bicubic(square_crop(images), settings.size)),
        resize=resize,
        channels=3,
        device=device,
        mode="clip",
        distance="FD-CLIP",
        embeds=True,
    )
