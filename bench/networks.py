"""The networks whose training steps are timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; a shortcut that strides and pads with zero channels has no weight."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, outputs - inputs
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        y = self.first_norm(self.first(x)).relu()
        y = self.second_norm(self.second(y))
        if self.added:
            x = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return (x + y).relu()


class ResNet(nn.Sequential):
    """The residual network of He et al. (2016), section 4.2, for images of 32 pixels.

    With widths ``(16, 32, 64)`` and 3 blocks of each it is ResNet-20.
    """

    def __init__(self, widths: tuple[int, ...], blocks: int) -> None:
        stem = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0])]
        layers: list[nn.Module] = [*stem, nn.ReLU()]
        inputs = widths[0]
        for outputs in widths:
            for _ in range(blocks):
                layers.append(ResidualBlock(inputs, outputs, 1 if inputs == outputs else 2))
                inputs = outputs
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class TransformerBlock(nn.Module):
    """Attention and an MLP with ``hidden`` units, each behind a normalisation."""

    def __init__(self, width: int, heads: int, hidden: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, S, width]`` to the same shape."""
        joint = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = joint.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class VisionTransformer(nn.Module):
    """A vision transformer for grey images of 28 pixels: 16 patches, whose mean is classified."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(49, width)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        blocks = (TransformerBlock(width, heads, 2 * width) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, 1, 28, 28]`` to logits ``[N, 10]``."""
        patches = F.unfold(x, 7, stride=7).mT
        x = self.embedding(patches) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20-cifar": (lambda: ResNet((16, 32, 64), 3), (128, 3, 32, 32)),
    "vit-48-fashion-mnist": (lambda: VisionTransformer(48, 4, 3), (256, 1, 28, 28)),
    "small-resnet8": (lambda: ResNet((4, 8), 1), (4, 3, 8, 8)),
}
"""A network and the shape of its batch."""
