"""Input covariances of convolutions as several other libraries take them.

Their patches are padded with zeros under every ``padding_mode``, which ``correct`` mends, and
averaged over the groups of channels, though each group has a block of its own in the Fisher.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from kfac_fast import ops
from kfac_fast.conv import ConvGeometry


def are_patches_exact(module: nn.Module, *, correct: bool = False) -> bool:
    """Whether the patches that are taken of a layer's input are those of the Fisher.

    Args:
        module: The layer.
        correct: Whether its padding mode is honoured.

    Returns:
        False for a grouped convolution, or one whose padding mode is not honoured.
    """
    groups, mode = getattr(module, "groups", 1), getattr(module, "padding_mode", "zeros")
    return bool(groups == 1 and (correct or mode == "zeros"))


def geometry_of(module: nn.Module, *, correct: bool = False) -> dict[str, Any]:
    """Stride, padding and dilation of a convolution, as arguments of an operator.

    Args:
        module: The convolution.
        correct: Whether its padding mode is one of them, unless it is grouped.

    Returns:
        Arguments by name.
    """
    names = ["stride", "padding", "dilation"]
    if correct and are_patches_exact(module, correct=True):
        names.append("padding_mode")
    return {name: getattr(module, name) for name in names}


def patches_gram(
    module: nn.Conv2d, x: Tensor, *, expand: bool, correct: bool = False, **options: Any
) -> Tensor:
    """Gram of the patches, or of their means over the output positions.

    Args:
        module: The convolution.
        x: Its input, ``[N, C, *spatial]``.
        expand: Whether every patch is a row.
        correct: Whether its padding mode is honoured, unless it is grouped.
        options: Of :func:`kfac_fast.conv_expand_gram` besides the geometry.

    Returns:
        Symmetric ``[D, D]`` with ``D = C / groups * prod(kernel_size) (+ 1)``.
    """
    if module.groups > 1:
        x = x.unflatten(1, (module.groups, -1)).mean(1)
    form = ops.conv_expand_gram if expand else ops.conv_reduce_gram
    return form(x, module.kernel_size, **geometry_of(module, correct=correct), **options)


def output_positions(module: nn.Conv2d, x: Tensor) -> int:
    """Number of the convolution's output positions for an input ``[N, C, *spatial]``."""
    dimensions = len(module.kernel_size)
    options = geometry_of(module)
    geometry = ConvGeometry.normalize("convolution", dimensions, module.kernel_size, **options)
    return math.prod(geometry.output_size(x.shape[2:]))
