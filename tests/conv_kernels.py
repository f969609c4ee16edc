"""The Triton kernels of convolutions, each called with a geometry instead of its tables."""

from __future__ import annotations

import math

from cases import Convolution
from torch import Tensor

from kfac_fast.conv import ConvGeometry
from kfac_fast.kernels import conv_offset_gram, conv_patch_gram, conv_window_sum

# Operator that each kernel serves.
OPERATORS = {
    "conv_offset_gram": "conv_expand_gram",
    "conv_patch_gram": "conv_expand_gram",
    "conv_reduce_gram": "conv_reduce_gram",
    "conv_window_sum": "conv_window_sum",
}


def geometry_of(case: Convolution) -> ConvGeometry:
    """The geometry of a case."""
    return ConvGeometry.normalize("test", len(case.size), **case.options)


def offset_tables(geometry: ConvGeometry, x: Tensor) -> conv_offset_gram.Tables:
    """Tables of the offset plans."""
    plans = [axis.offsets() for axis in geometry.axes(x.shape[2:])]
    return conv_offset_gram.tables(plans, x.device)


def run(
    kernel: str,
    x: Tensor,
    geometry: ConvGeometry,
    bias: bool,
    alpha: float,
    beta: float,
    out: Tensor,
    precision: str = "highest",
) -> None:
    """Call a kernel of :data:`OPERATORS`."""
    output = geometry.output_size(x.shape[2:])
    accumulation = (geometry.groups, bias, alpha, beta, out)
    if kernel == "conv_patch_gram":
        window = (geometry.kernel_size, geometry.window_stride, geometry.dilation, output)
        framed = geometry.frame_input(x)
        conv_patch_gram.conv_patch_gram(framed, *window, *accumulation, precision)
        return
    if kernel == "conv_offset_gram":
        tables = offset_tables(geometry, x)
        conv_offset_gram.conv_offset_gram(x, tables, math.prod(output), *accumulation, precision)
        return
    sums = conv_window_sum.tables([axis.sums() for axis in geometry.axes(x.shape[2:])], x.device)
    if kernel == "conv_window_sum":
        conv_window_sum.conv_window_sum(x, sums, math.prod(output), *accumulation)
    else:
        conv_window_sum.conv_reduce_gram(x, sums, math.prod(output), *accumulation, precision)
