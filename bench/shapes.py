"""The shapes the benchmarks run over: layers of real networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """A linear layer's input or output gradient, ``[*leading, features]``.

    ``decay`` above 0 makes the Gram a running average; ``segments`` above 0 means that the rows
    belong to that many graphs.
    """

    leading: tuple[int, ...]
    features: int
    bias: bool = False
    dtype: torch.dtype = torch.float32
    decay: float = 0.0
    reduction: str = "mean"
    segments: int = 0


class Conv(NamedTuple):
    """A convolution's input, ``[batch, channels, *size]``, and its geometry.

    ``kernel``, ``stride``, ``padding`` and ``dilation`` are the same in each of the 1 to 3
    dimensions of ``size``.
    """

    batch: int
    channels: int
    size: tuple[int, ...]
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1


class Layer(NamedTuple):
    """The weight of ``count`` equal layers as a matrix, the bias column counted in ``inputs``."""

    outputs: int
    inputs: int
    count: int


GRAM_8192 = {
    "8192x64": Rows((8192,), 64),
    "8192x256": Rows((8192,), 256),
    "8192x768": Rows((8192,), 768),
    "8192x2048": Rows((8192,), 2048),
    "8192x3072": Rows((8192,), 3072),
    "8192x768-bfloat16": Rows((8192,), 768, dtype=torch.bfloat16),
}

GRAM = GRAM_8192 | {
    "resnet50-layer1-gradient": Rows((32, 56, 56), 64),
    "resnet50-layer1-input": Rows((8, 56, 56), 256),
    "vit-b16-qkv-input": Rows((8, 197), 768, bias=True),
    "vit-b16-fc1-gradient": Rows((8, 197), 3072),
    "gpt2-qkv-running-average": Rows((4, 1024), 768, decay=0.95),
    "gpt2-qkv-gradient": Rows((2, 1024), 2304),
    "small-vit-ti-one-image": Rows((197,), 192),
    "small-lenet-fc2-input": Rows((128,), 120),
    "small-lenet-head-gradient": Rows((128,), 10),
}

SHARED_GRAM = {
    "64x197x768": Rows((64, 197), 768),
    "8x1024x768": Rows((8, 1024), 768),
    "vit-b16-qkv-input": Rows((32, 197), 768, bias=True),
    "vit-b16-fc1-gradient": Rows((16, 197), 3072, reduction="sum"),
    "resnet50-layer1-gradient": Rows((32, 56, 56), 64, reduction="sum"),
    "graph-network-nodes": Rows((16384,), 128, segments=512),
    "small-vit-head": Rows((4, 16), 64),
}

# [N, S, D]
FEATURE_NORM = {
    "vit-48-fashion-mnist": (256, 16, 48),
    "vit-b16": (16, 197, 768),
    "gpt2": (4, 1024, 768),
    "small-vit": (4, 16, 48),
}

# [N, C, H, W] and the groups, None of a batch normalisation.
CHANNEL_NORM: dict[str, tuple[int, int, int, int, int | None]] = {
    "resnet20-16-32px": (128, 16, 32, 32, None),
    "resnet20-32-16px": (128, 32, 16, 16, None),
    "resnet20-64-8px": (128, 64, 8, 8, None),
    "resnet50-256-56px": (8, 256, 56, 56, None),
    "resnet50-2048-7px": (32, 2048, 7, 7, None),
    "mlp-1024": (256, 1024, 1, 1, None),
    "group-norm-64-56px": (8, 64, 56, 56, 32),
    "small-resnet8-4-8px": (4, 4, 8, 8, None),
}

# The batch is 32, and 8 from 56 pixels on: unfolding multiplies it by the taps.
CONV_3X3 = {
    "resnet50-3x3-64-56px": Conv(8, 64, (56, 56), 3, padding=1),
    "resnet50-3x3-128-28px": Conv(32, 128, (28, 28), 3, padding=1),
    "resnet50-3x3-256-14px": Conv(32, 256, (14, 14), 3, padding=1),
    "resnet50-3x3-512-7px": Conv(32, 512, (7, 7), 3, padding=1),
    "cifar-resnet18-3x3-64-32px": Conv(32, 64, (32, 32), 3, padding=1),
    "cifar-resnet18-3x3-128-16px": Conv(32, 128, (16, 16), 3, padding=1),
    "cifar-resnet18-3x3-256-8px": Conv(32, 256, (8, 8), 3, padding=1),
}

# Smaller batches where the patches or their products are many: a run is to take minutes.
CONV_GEOMETRIES = {
    "alexnet-5x5-64-27px": Conv(16, 64, (27, 27), 5, padding=2),
    "deeplab-3x3-dilated-256-28px": Conv(8, 256, (28, 28), 3, padding=2, dilation=2),
    "resnext50-3x3-32-groups-56px": Conv(4, 128, (56, 56), 3, padding=1, groups=32),
    "convnext-t-7x7-depthwise-56px": Conv(4, 96, (56, 56), 7, padding=3, groups=96),
    "fastspeech2-9-256-128-phonemes": Conv(32, 256, (128,), 9, padding=4),
    "unet-3x3x3-32-24px": Conv(2, 32, (24, 24, 24), 3, padding=1),
}

CONV_STRIDED = {
    "resnet50-3x3-stride-2-128-56px": Conv(8, 128, (56, 56), 3, stride=2, padding=1),
    "resnet50-7x7-stem-224px": Conv(8, 3, (224, 224), 7, stride=2, padding=3),
    "vit-b16-16x16-patches-224px": Conv(8, 3, (224, 224), 16, stride=16),
}

CONV_SMALL = {"small-lenet-5x5-28px": Conv(4, 1, (28, 28), 5)}

CONV_EXPAND = CONV_3X3 | CONV_GEOMETRIES | CONV_STRIDED | CONV_SMALL

CONV_REDUCE = CONV_3X3 | {
    name: CONV_EXPAND[name]
    for name in (
        "convnext-t-7x7-depthwise-56px",
        "resnet50-3x3-stride-2-128-56px",
        "resnet50-7x7-stem-224px",
        "small-lenet-5x5-28px",
    )
}

# Shapes whose ratios have one geometric mean in the report.
FAMILIES: dict[str, Sequence[str]] = {
    "8192 rows": list(GRAM_8192),
    "3x3": list(CONV_3X3),
    "other geometries": list(CONV_GEOMETRIES),
    "strided": list(CONV_STRIDED),
}

_RESNET18 = [
    Layer(64, 147, 1),
    Layer(64, 576, 4),
    Layer(128, 576, 1),
    Layer(128, 64, 1),
    Layer(128, 1152, 3),
    Layer(256, 1152, 1),
    Layer(256, 128, 1),
    Layer(256, 2304, 3),
    Layer(512, 2304, 1),
    Layer(512, 256, 1),
    Layer(512, 4608, 3),
    Layer(1000, 513, 1),
]

NETWORKS: dict[str, Sequence[Layer]] = {
    "resnet18": _RESNET18,
    # Without the last two stages, whose sizes 2304 and 4608 take most of the time.
    "resnet18-to-layer2": _RESNET18[:5],
    "vit-ti": [
        Layer(192, 769, 1),
        Layer(576, 193, 12),
        Layer(192, 193, 12),
        Layer(768, 193, 12),
        Layer(192, 769, 12),
        Layer(1000, 193, 1),
    ],
    "small-layers-200": [
        Layer(16, 9, 50),
        Layer(16, 17, 50),
        Layer(32, 17, 50),
        Layer(32, 33, 30),
        Layer(64, 65, 20),
    ],
    "gpt-384": [
        Layer(1152, 385, 6),
        Layer(384, 385, 6),
        Layer(1536, 385, 6),
        Layer(384, 1537, 6),
    ],
}

# How many matrices of which size.
INVERSES = {
    "400x16": (400, 16),
    "256x32": (256, 32),
    "128x64": (128, 64),
    "64x128": (64, 128),
    "32x256": (32, 256),
    "8x512": (8, 512),
    "2x1024": (2, 1024),
    "1x2304": (1, 2304),
    "1x4608": (1, 4608),
}
# Of the inverses' and the networks', without what takes many seconds.
EIGENBASES = [
    *(name for name, (_, size) in INVERSES.items() if size <= 1024),
    "resnet18-to-layer2",
    "vit-ti",
    "small-layers-200",
]


def layers_of(network: str) -> list[Layer]:
    """Each layer of a network, as often as it is there."""
    return [layer for layer in NETWORKS[network] for _ in range(layer.count)]


def factor_sizes(network: str) -> list[int]:
    """Sizes of the factors of all layers."""
    return [size for layer in layers_of(network) for size in (layer.inputs, layer.outputs)]
