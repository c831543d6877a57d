"""Feature extractors: images to the vectors whose Gaussians are compared."""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.config import FEATURES
from flowdistill.data.assets import asset_path
from flowdistill.features.digits_classifier import load_digits_classifier
from flowdistill.features.resizing import lanczos_square, middle_patch, tf1_bilinear
from flowdistill.features.shapes_networks import load_shapes_classifier
from flowdistill.utils.errors import WORD, UserError, listed, shown
from flowdistill.utils.files import cache_folder, check_pointer, local_path
from flowdistill.utils.hashing import file_sha256, module_sha256
from flowdistill.utils.objects import is_object, load_object
from flowdistill.utils.tf32 import tf32

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_SIZE = 299
WEIGHTS_VARIABLE = "FLOWDISTILL_WEIGHTS"

NO_RESIZE = "none"
AT_ONCE = 32
"""Images of one size that are prepared together: in double precision, 250 large ones would take gigabytes."""
SQUARES = {"inception-256": 256, "inception-512": 512}
"""Inception behind a square in the middle that is brought to so many pixels first, as text-to-image papers have it."""
WITH_PATCHES = ("inception-512",)
"""Those of them that look at a patch of each image besides."""
NOT_PUBLISHED = "(not the published weights)"
"""Behind the name of an Inception with other weights."""
LEGACY = "legacy_tensorflow"
"""clean-fid's word for images that TensorFlow's graph of Inception resizes itself."""


@contextlib.contextmanager
def precise(device: torch.device) -> Iterator[None]:
    """Without mixed precision of the surrounding training and products in TF32, which would change a figure with the
    machine."""
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with tf32(False), flags, torch.autocast(device.type, enabled=False):
        yield


@dataclass(frozen=True)
class Prepared:
    """Images as an extractor's network reads them, float32 (B, C, H, W), on any device."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class FeatureExtractor:
    """A frozen network that turns uint8 images into features.

    Args:
        name: as printed in reports.
        hash: sha256 of the weights; None when there is nothing to hash (then statistics are not cached).
        network: prepared images on ``device`` -> features (B, ...), flattened to (B, D).
        prepare: uint8 images (B, C, H, W) on ``device`` -> what the network reads.
        mode: what statistics by other programs must have been made with to be comparable: clean-fid's word for how
            Inception's images are resized and quantised; ``name`` for any other network.
        resize: ``prepare``'s resizing, in words; ``"none"`` means that all images must have one size.
        channels: image channels the network reads, None for any.
        classifier: prepared images -> logits (B, K), or None.
        prompt_labels: N prompts -> the class that each describes, int64 (N,), -1 for none of them; or None.
        distance: what the Fréchet distance of these features is called in a table.
        spatial: prepared images -> the features and those by place, (B, D) and (B, S), from one pass; or None.
        patches: whether what ``spatial`` gives besides are not features by place, but those of a patch of each image.
        logits: features (B, D) -> logits (B, K) of an Inception Score; or None.
        keeps: rows of a set of images that are kept at most; None for as many as memory is set aside for.
        embeds: whether the features are CLIP's embeddings of unit length, which CMMD is defined for.
    """

    name: str
    hash: str | None
    network: Callable[[Tensor], Tensor]
    prepare: Callable[[Tensor], Tensor]
    resize: str = NO_RESIZE
    channels: int | None = None
    classifier: Callable[[Tensor], Tensor] | None = None
    prompt_labels: Callable[[Sequence[str]], Tensor] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mode: str = ""
    distance: str = "FD"
    spatial: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    patches: bool = False
    logits: Callable[[Tensor], Tensor] | None = None
    keeps: int | None = None
    embeds: bool = False

    def __post_init__(self) -> None:
        self.mode = self.mode or self.name

    @torch.no_grad()
    def __call__(self, images: Tensor | Sequence[Tensor] | Prepared) -> Tensor:
        """Features, float32 (B, D), of uint8 images (B, C, H, W), or of B images (C, H, W) of different sizes.

        Raises:
            UserError: not uint8, channels the network does not read, or different sizes without resizing.
        """
        return self._run(self.network, images)

    @torch.no_grad()
    def classify(self, images: Tensor | Sequence[Tensor] | Prepared) -> Tensor | None:
        """Most likely class, int64 (B,), of each image; None when the extractor is no classifier."""
        return None if self.classifier is None else self._run(self.classifier, images).argmax(dim=1)

    @property
    def resizes_on_cpu(self) -> bool:
        """Whether images are resized by the processor, which whoever reads files does beside the network."""
        return self.resize != NO_RESIZE and self.device.type == "cpu"

    def prepare_one(self, image: Tensor) -> Tensor:
        """One uint8 image (C, H, W) as the network reads it, float32 (C, H, W), the same bits as in any batch."""
        return self.prepare(self._checked(image.unsqueeze(0)))[0]

    @torch.no_grad()
    def with_spatial(self, images: Tensor | Sequence[Tensor] | Prepared) -> tuple[Tensor, Tensor | None]:
        """The features and those by place, float32 (B, D) and (B, S), of one pass; None in place of what is not there.
        """
        if self.spatial is None:
            return self(images), None
        look, sizes = self.spatial, [0, 0]

        def both(ready: Tensor) -> Tensor:
            parts = [part.flatten(1) for part in look(ready)]
            sizes[:] = [part.shape[1] for part in parts]
            return torch.cat(parts, dim=1)

        features, spatial = self._run(both, images).split(sizes, dim=1)
        return features, spatial

    def check_channels(self, channels: int) -> None:
        """Refuse images of this number of channels where the network does not read them; grey passes for colour.

        Raises:
            UserError: so.
        """
        if self.channels not in (None, channels) and (self.channels, channels) != (3, 1):
            raise UserError(f"the features {self.name!r} read images of {self.channels} channel(s), not {channels}")

    def _run(self, network: Callable[[Tensor], Tensor], images: Tensor | Sequence[Tensor] | Prepared) -> Tensor:
        ready = self._ready(images)
        try:
            with precise(self.device):
                return network(ready).flatten(1).float()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a network of the user's says in torch's words what shapes it does not read
            shape, reason = tuple(ready.shape[1:]), str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"the features {self.name!r} cannot be taken of images of shape {shape}: "
                            f"{reason[-1]}") from error

    def _ready(self, images: Tensor | Sequence[Tensor] | Prepared) -> Tensor:
        if isinstance(images, Prepared):
            return images.images.to(self.device, non_blocking=True)
        if isinstance(images, Tensor):
            return self.prepare(self._checked(images))
        if len({tuple(image.shape) for image in images}) == 1:
            parts = [images[start : start + AT_ONCE] for start in range(0, len(images), AT_ONCE)]
            return torch.cat([self.prepare(self._checked(torch.stack(list(part)))) for part in parts])
        if self.resize == NO_RESIZE:
            raise UserError(f"the images differ in size or channels, and the features {self.name!r} do not resize")
        return torch.cat([self.prepare(self._checked(image.unsqueeze(0))) for image in images])

    def _checked(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UserError(
                f"features are taken of uint8 images (B, C, H, W), not of {images.dtype} {tuple(images.shape)}"
            )
        self.check_channels(images.shape[1])
        if self.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return images.to(self.device, non_blocking=True)


def load_features(
    features: str | os.PathLike | nn.Module | Callable[[Tensor], Tensor] | FeatureExtractor,
    device: torch.device | str | None = None,
    weights: str | os.PathLike | None = None,
) -> FeatureExtractor:
    """A feature extractor by name or from a network of yours.

    Args:
        features: ``"digits"`` and ``"fashion"`` (the shipped classifiers of digits and of clothes), ``"shapes"`` (that
            of shape, colour and background), ``"inception"`` (clean-fid's Inception-v3), ``"inception-legacy"`` (the
            same network behind TensorFlow's resizing, as ADM and EDM measure), ``"inception-256"`` and
            ``"inception-512"`` (clean-fid's behind a square of so many pixels, the second with patches), ``"dinov2"``,
            ``"clip"``, ``"dinov2:SOURCE"`` or ``"clip:SOURCE"`` (of transformers, from a folder or a hub id),
            ``"lite0"`` (EfficientNet-Lite0 of an optional package), the path of a folder with a classifier of grey
            pictures, as of digits, or of a TorchScript file,
            ``package.module:function`` that makes a network, a module, or a callable. A network of yours gets float32
            images (B, C, H, W) in [0, 1] and returns (B, D); a module with a method ``features(images)`` is a
            classifier: its ``forward`` returns the logits. With a method ``prompt_labels(prompts)`` it also says which
            class a prompt describes, and images are held against their prompts.
        device: default: the GPU of this process when there is one, else the CPU.
        weights: for the Inceptions: the file ``inception-2015-12-05.pt`` or the folder it is in. Default: what the
            environment variable FLOWDISTILL_WEIGHTS names, then flowdistill's cache. It is never downloaded.

    Raises:
        UserError: unknown name, missing or damaged file.
    """
    if isinstance(features, FeatureExtractor):
        return features
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if features in ("digits", "fashion"):
        network = load_digits_classifier(asset_path(f"{features}-classifier"))
        return replace(_from_module(str(features), network, place, channels=1), distance="FID")
    if features == "shapes":
        return replace(_from_module("shapes", load_shapes_classifier(), place, channels=3), distance="FID")
    if features == "inception":
        return _inception(inception_file(weights), place)
    if features == "inception-legacy":
        return _inception_legacy(inception_file(weights), place)
    if isinstance(features, str) and features in SQUARES:
        return _inception_square(features, inception_file(weights), place)
    named = _of_other_libraries(features, place) if isinstance(features, str) else None
    if named is not None:
        return named
    if isinstance(features, str) and is_object(features):
        return load_features(load_object(features, "evaluation.features")(), place)
    if isinstance(features, nn.Module):
        return _from_module(type(features).__name__, features, place)
    if callable(features):
        name = getattr(features, "__qualname__", type(features).__name__)
        return FeatureExtractor(name, None, features, _to_unit, device=place)
    return _from_path(local_path(features), place)


def _of_other_libraries(features: str, place: torch.device) -> FeatureExtractor | None:
    """What ``dinov2``, ``clip`` and ``lite0`` name; None for another text. Their modules import this one."""
    kind, _, source = features.partition(":")
    if features == "lite0":
        from flowdistill.features.lite0 import lite0_features

        return lite0_features(place)
    if kind in ("dinov2", "clip"):
        from flowdistill.features.pretrained import DEFAULT_SOURCES, clip_features, dinov2_features

        make = dinov2_features if kind == "dinov2" else clip_features
        return make(source or DEFAULT_SOURCES[kind], place)
    return None


def _from_path(path: Path, device: torch.device) -> FeatureExtractor:
    if path.is_dir():
        return _from_module(str(path), load_digits_classifier(path), device, channels=1)
    if not path.is_file():
        raise UserError(
            f"unknown features {shown(str(path), WORD)}: neither {listed(FEATURES)} nor the path of a TorchScript "
            "file"
        )
    if path.name == INCEPTION_FILE:
        return _inception(path, device)
    check_pointer(path)
    try:
        with _old_formats():
            module = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is not a TorchScript file, or it is damaged") from error
    return FeatureExtractor(path.name, file_sha256(path), module, _to_unit, device=device)


def _from_module(name: str, module: nn.Module, device: torch.device, channels: int | None = None) -> FeatureExtractor:
    module = module.to(device)
    own = getattr(module, "features", None)
    head = own if inspect.ismethod(own) else None
    return FeatureExtractor(
        name=name,
        hash=module_sha256(module),
        network=_in_eval_mode(module, head or module),
        prepare=_to_unit,
        channels=channels,
        classifier=_in_eval_mode(module, module) if head else None,
        prompt_labels=getattr(module, "prompt_labels", None) if head else None,
        device=device,
    )


def _in_eval_mode(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(images: Tensor) -> Tensor:
        training = module.training
        module.eval()
        try:
            return function(images)
        finally:
            module.train(training)

    return call


def _to_unit(images: Tensor) -> Tensor:
    return images.float() / 255.0


def inception_file(weights: str | os.PathLike | None) -> Path:
    """The local weight file, without looking at what is in it."""
    named = weights or os.environ.get(WEIGHTS_VARIABLE)
    place = local_path(named) if named else cache_folder("weights")
    path = place if place.suffix == ".pt" else place / INCEPTION_FILE
    if path.name != INCEPTION_FILE:
        raise UserError(f"the Inception weights must be a file named {INCEPTION_FILE}, not {path.name}")
    if not path.is_file():
        raise UserError(
            f"the features 'inception' need the weights {path}, which do not exist: download {INCEPTION_URL} "
            f"(91 MiB, sha256 {INCEPTION_SHA256}) and put it there, or set {WEIGHTS_VARIABLE} to the folder that has it"
        )
    return path


def _load_inception(path: Path, device: torch.device) -> tuple[Any, str]:
    """clean-fid's wrapper of the weight file, and the hash of the file."""
    from cleanfid.inception_torchscript import InceptionV3W

    check_pointer(path)
    digest = file_sha256(path)
    try:
        with _old_formats():
            model = InceptionV3W(str(path.parent), download=False, resize_inside=False)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the Inception weights {path} are truncated or damaged ({path.stat().st_size} bytes, sha256 {digest}): "
            f"download {INCEPTION_URL} again (95607719 bytes, sha256 {INCEPTION_SHA256}) and put it there"
        ) from error
    # NHWC convolutions are 1.4 times faster on a CPU.
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last), digest


def _inception_name(name: str, digest: str) -> str:
    return name if digest == INCEPTION_SHA256 else f"{name} {NOT_PUBLISHED}"


def _inception(path: Path, device: torch.device) -> FeatureExtractor:
    model, digest = _load_inception(path, device)
    return FeatureExtractor(
        name=_inception_name("inception", digest),
        hash=digest,
        network=lambda images: model(images.contiguous(memory_format=torch.channels_last)),
        prepare=clean_resize,
        resize="299x299, antialiased bicubic, not quantised after (clean-fid's 'clean')",
        channels=3,
        device=device,
        mode="clean",
        distance="FID",
    )


def _inception_square(name: str, path: Path, device: torch.device) -> FeatureExtractor:
    """Inception of the largest square in the middle, brought to ``SQUARES[name]`` pixels before clean-fid's resizing:
    what DMD2 (Yin et al. 2024, arXiv 2405.14867) and papers that compare with it measure on COCO.

    Of ``WITH_PATCHES`` also features of the 299 x 299 pixels in the middle of the image as it is, and of all of an
    image that has fewer in a direction (patch FID: Lin, Wang, Yang 2024, arXiv 2402.13929).
    """
    model, digest = _load_inception(path, device)
    side, patches = SQUARES[name], name in WITH_PATCHES

    def look(images: Tensor) -> Tensor:
        features: Tensor = model.layers((images.contiguous(memory_format=torch.channels_last) - 128) / 128)
        return features.flatten(1)

    def prepare(images: Tensor) -> Tensor:
        whole = clean_resize(lanczos_square(images, side))
        return torch.cat([whole, clean_resize(middle_patch(images, INCEPTION_SIZE))], dim=1) if patches else whole

    resize = (f"square in the middle, {side}x{side} by PIL's Lanczos, then 299x299, antialiased bicubic (clean-fid's "
              "'clean')")
    if patches:
        resize += "; of the patch 299x299 in the middle as it is"
    return FeatureExtractor(
        name=_inception_name(name, digest),
        hash=f"{name} {digest}",
        network=lambda images: look(images[:, :3]),
        prepare=prepare,
        resize=resize,
        channels=3,
        device=device,
        mode=name,
        distance="FID",
        spatial=(lambda images: (look(images[:, :3]), look(images[:, 3:]))) if patches else None,
        patches=patches,
    )


LEGACY_ROWS = 50_000
"""Rows kept of legacy Inception's features: papers take Inception Score and recall of all of 50,000 images."""
SPATIAL_LAYER, SPATIAL_CHANNELS = "mixed_6", 7


def _inception_legacy(path: Path, device: torch.device) -> FeatureExtractor:
    """TensorFlow's Inception as it is used by ADM (evaluations/evaluator.py), EDM and the GANs before them.

    The spatial features of sFID (Nash et al. 2021, arXiv 2103.03841) are the first 7 channels of the first branch of
    the block that TensorFlow calls mixed_6, in TensorFlow's order: row, column, channel.
    """
    model, digest = _load_inception(path, device)
    layers = dict(model.layers.named_children())
    if SPATIAL_LAYER not in layers or not hasattr(layers[SPATIAL_LAYER], "conv") or not hasattr(model.base, "output"):
        raise UserError(f"the Inception weights {path} have no {SPATIAL_LAYER}.conv and no output, which "
                        f"'inception-legacy' reads; download {INCEPTION_URL} (sha256 {INCEPTION_SHA256})")
    first = list(layers).index(SPATIAL_LAYER)
    before, after = list(layers.values())[:first], list(layers.values())[first:]
    weight = model.base.output.weight

    def spatial(images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.contiguous(memory_format=torch.channels_last)
        for layer in before:
            x = layer(x)
        places = layers[SPATIAL_LAYER].conv(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        for layer in after:
            x = layer(x)
        return x.flatten(1), places.flatten(1)

    return FeatureExtractor(
        name=_inception_name("inception-legacy", digest),
        hash=f"{LEGACY} {digest}",
        network=lambda images: spatial(images)[0],
        prepare=lambda images: (tf1_bilinear(images, INCEPTION_SIZE) - 128) / 128,
        resize="299x299, TensorFlow 1's bilinear without antialiasing (clean-fid's 'legacy_tensorflow')",
        channels=3,
        device=device,
        mode=LEGACY,
        distance="FID",
        spatial=spatial,
        # Without the bias of the output layer, as every implementation since that of Salimans et al. 2016.
        logits=lambda features: features.to(weight) @ weight.T,
        keeps=LEGACY_ROWS,
    )


@contextlib.contextmanager
def _old_formats() -> Iterator[None]:
    """A block without torch's advice to a file's maker: the published weights are TorchScript and will stay it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated.*")
        yield


def clean_resize(images: Tensor) -> Tensor:
    """Resize uint8 images (B, C, H, W) to float32 (B, C, 299, 299) in [0, 255] as clean-fid does with PIL.

    torch's antialiased bicubic is the same filter (a = -0.5, support scaled when shrinking) and runs on the GPU, where
    resizing image by image with PIL is what an FID of 50,000 images waits for (Parmar, Zhang, Zhu 2022, section 3).
    """
    # Filter weights in double, as PIL computes them, keep the results equal to float32 rounding.
    precise = torch.float32 if images.device.type == "mps" else torch.float64
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    resized = F.interpolate(images.to(precise), size=size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0.0, 255.0).float()


