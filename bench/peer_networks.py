"""The networks on which other libraries are timed, and their data.

Only linear layers and convolutions have parameters that are not frozen, because no other layers are
served by all of the libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import networks
import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Layers, and a way around them that has a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        same = inputs == outputs and stride == 1
        short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.around = nn.Identity() if same else short

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        return self.layers(x) + self.around(x)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


def resnet18() -> nn.Module:
    """The ResNet-18 of He et al. (2016), with the first layer for images of 32 pixels."""
    layers: list[nn.Module] = [_conv(3, 64), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for outputs in (64, 128, 256, 512):
        for stride in (1 if outputs == 64 else 2, 1):
            inner = [_conv(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU()]
            inner += [_conv(outputs, outputs), nn.BatchNorm2d(outputs)]
            layers += [Residual(inputs, outputs, stride, inner), nn.ReLU()]
            inputs = outputs
    return nn.Sequential(*layers, *_head(inputs))


def wide_resnet(depth: int, times: int) -> nn.Module:
    """The wide residual network of Zagoruyko & Komodakis (2016), for images of 32 pixels."""
    layers: list[nn.Module] = [_conv(3, 16)]
    inputs = 16
    for width in (16, 32, 64):
        for number in range((depth - 4) // 6):
            outputs, stride = times * width, 2 if number == 0 and width > 16 else 1
            inner = [nn.BatchNorm2d(inputs), nn.ReLU(), _conv(inputs, outputs, stride)]
            inner += [nn.BatchNorm2d(outputs), nn.ReLU(), _conv(outputs, outputs)]
            layers.append(Residual(inputs, outputs, stride, inner))
            inputs = outputs
    return nn.Sequential(*layers, nn.BatchNorm2d(inputs), nn.ReLU(), *_head(inputs))


class VisionTransformer(nn.Module):
    """A vision transformer for colour images of 32 pixels: 64 patches, whose mean is classified."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        blocks = (networks.TransformerBlock(width, heads, 4 * width) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, 3, 32, 32]`` to logits ``[N, 10]``."""
        x = self.embedding(x).flatten(2).mT + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class GPT(nn.Module):
    """A causal transformer that predicts the next of 96 characters at each of 64 positions."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, width)
        self.positions = nn.Parameter(0.5 * torch.randn(64, width))
        blocks = (
            networks.TransformerBlock(width, heads, 4 * width, causal=True) for _ in range(depth)
        )
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 96)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[N, 64]`` to logits ``[N, 96, 64]``."""
        hidden = self.blocks(self.embedding(tokens) + self.positions)
        return self.head(self.norm(hidden)).mT


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Problem:
    """A network in evaluation mode, a batch and its labels.

    Attributes:
        model: The network.
        x: Images ``[N, 3, H, W]``, rows ``[N, features]`` or tokens ``[N, 64]``.
        y: Classes ``[N]`` or ``[N, 64]``.
    """

    model: nn.Module
    x: Tensor
    y: Tensor

    @cached_property
    def weights(self) -> list[nn.Parameter]:
        """The parameters that are not frozen."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The modules that these belong to."""
        kinds = nn.Linear, nn.Conv2d
        return [module for module in self.model.modules() if isinstance(module, kinds)]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18-cifar": (resnet18, (32, 3, 32, 32)),
    "wrn-16-2-cifar": (lambda: wide_resnet(16, 2), (32, 3, 32, 32)),
    "vit-ti-cifar": (lambda: VisionTransformer(192, 3, 12), (16, 3, 32, 32)),
    "vit-48-fashion-mnist": (lambda: networks.VisionTransformer(48, 4, 3), (64, 1, 28, 28)),
    "gpt-128": (lambda: GPT(128, 4, 4), (16, 64)),
    "mlp-1024": (lambda: mlp(784, 1024, 1024, 10), (256, 784)),
    "small-mlp": (lambda: mlp(12, 10, 10), (8, 12)),
}
"""A network and the shape of its batch."""


def problem(network: str, device: str) -> Problem:
    """A network and its data, equal in every call."""
    torch.manual_seed(0)
    make, shape = NETWORKS[network]
    model = make().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.requires_grad_(True)
    if isinstance(model, GPT):
        x, y = torch.randint(96, shape), torch.randint(96, shape)
    else:
        x, y = torch.randn(shape), torch.randint(10, shape[:1])
    return Problem(model.to(device), x.to(device), y.to(device))
