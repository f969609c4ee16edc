"""Convolutions and transposed convolutions."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import ops
from kfac_fast.conv import ConvGeometry
from kfac_fast.layers.base import Approximation, RowLayer

Convolution = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)


class ConvLayer(RowLayer):
    """``nn.Conv1d``, ``2d`` and ``3d`` on ``[N, C, *spatial]``; a factor for each group."""

    module: Convolution

    def __init__(self, name: str, module: Convolution, approx: Approximation) -> None:
        super().__init__(name, module, approx)
        self.groups = module.groups

    def batched(self, x: Tensor) -> Tensor:
        """``[N, C, *spatial]``."""
        return x if x.dim() == len(self.module.kernel_size) + 2 else x[None]

    def _geometry(self) -> dict[str, Any]:
        """The module's, as arguments of an operator; without the output padding."""
        module = self.module
        return {
            "kernel_size": module.kernel_size,
            "stride": module.stride,
            "padding": module.padding,
            "padding_mode": module.padding_mode,
            "dilation": module.dilation,
            "groups": module.groups,
            "transposed": module.transposed,
        }

    def _plan(self, **more: Any) -> ConvGeometry:
        dimensions = len(self.module.kernel_size)
        return ConvGeometry.normalize(self.name, dimensions, **self._geometry(), **more)

    def _output_padding(self, x: Tensor, output: Tensor) -> tuple[int, ...]:
        return (0,) * len(self.module.kernel_size)

    def input_gram(
        self, x: Tensor, output: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Patches under expand, their means over the output positions under reduce."""
        x, output = self.batched(x), self.batched(output)
        positions = math.prod(output.shape[2:])
        expand = self.approx == "expand"
        form = ops.conv_expand_gram if expand else ops.conv_reduce_gram
        result = form(
            x,
            **self._geometry(),
            output_padding=self._output_padding(x, output),
            bias=self.has_bias,
            out=out,
        )
        return result, x.shape[0] * (positions if expand else 1)

    def input_key(self, output: Tensor) -> Hashable:
        """The geometry, of which the output's size tells the output padding."""
        plan = self._plan()
        return type(self), self.approx, self.has_bias, plan, output.shape[-plan.dimensions :]

    def output_rows(self, output: Tensor) -> Tensor:
        """Pixels."""
        return self.batched(output).movedim(1, -1)

    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The patches, and the output's pixels."""
        plan = self._plan(output_padding=self._output_padding(x, gradient))
        groups = () if self.groups == 1 else (self.groups,)
        positions = math.prod(gradient.shape[2:])
        patches = plan.windows(x).reshape(len(x), *groups, -1, positions).mT
        pixels = gradient.reshape(len(x), *groups, -1, positions).mT
        return F.pad(patches, (0, int(self.has_bias)), value=1.0), pixels

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """``[C_out, C_in / g, *k]`` as ``[(g,) C_out / g, C_in / g * prod(k)]``."""
        matrix = weight.flatten(1)
        return matrix if self.groups == 1 else matrix.reshape(self.groups, -1, matrix.shape[1])

    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        """Back to ``[C_out, C_in / g, *k]``."""
        return matrix.reshape(self.weight.shape)


class ConvTransposeLayer(ConvLayer):
    """``nn.ConvTranspose1d``, ``2d``, ``3d``: patches of the zero-stuffed input."""

    def _output_padding(self, x: Tensor, output: Tensor) -> tuple[int, ...]:
        """From the output's size, because ``forward`` may be given one."""
        sizes = zip(output.shape[2:], self._plan().output_size(x.shape[2:]), strict=True)
        return tuple(made - least for made, least in sizes)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """``[C_in, C_out / g, *k]``, flipped, as ``[(g,) C_out / g, C_in / g * prod(k)]``."""
        flipped = weight.flip(tuple(range(2, weight.dim())))
        inputs, outputs = weight.shape[:2]
        blocks = flipped.reshape(self.groups, inputs // self.groups, outputs, -1)
        blocks = blocks.transpose(1, 2).flatten(2)
        return blocks[0] if self.groups == 1 else blocks

    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        """Back to ``[C_in, C_out / g, *k]``."""
        channels, outputs, *kernel = self.weight.shape
        blocks = matrix.reshape(self.groups, outputs, channels // self.groups, *kernel)
        flipped = blocks.transpose(1, 2).reshape(self.weight.shape)
        return torch.flip(flipped, tuple(range(2, flipped.dim())))
