"""Convolution geometry: which input pixels the kernel reads at each output position.

Every convolution here is reduced to one picture. The input is first *framed*: padded in its padding
mode, or, for a transposed convolution, stuffed with zeros between its pixels and then padded. A
window of ``kernel_size`` taps, ``dilation`` apart, moves over the framed input in steps of
``window_stride``; the values under it are the *patch* ``a[n, s]`` of output position ``s``, ordered
``(channel, kernel index...)`` as in :func:`torch.nn.functional.unfold`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _per_dimension(
    op: str, argument: str, value: int | Sequence[int], dimensions: int
) -> list[int]:
    """One integer per spatial dimension, from an integer or a sequence."""
    values = list(value) if isinstance(value, Sequence) else [value] * dimensions
    if len(values) != dimensions or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{op}: {argument} must be an int or {dimensions} ints, got {value!r}")
    return values


def _padding_pairs(
    op: str,
    padding: str | int | Sequence[int],
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
) -> list[int]:
    """Padding as (before, after) for each dimension; ``'same'`` puts the odd pixel after."""
    if padding == "valid":
        return [0] * (2 * len(kernel_size))
    if padding == "same":
        if any(s != 1 for s in stride):
            raise ValueError(f"{op}: padding='same' needs stride 1, got {tuple(stride)}")
        totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        return [side for total in totals for side in (total // 2, total - total // 2)]
    if isinstance(padding, str):
        raise ValueError(f"{op}: padding must be 'same', 'valid', an int or ints, got {padding!r}")
    return [p for p in _per_dimension(op, "padding", padding, len(kernel_size)) for _ in range(2)]


@dataclass(frozen=True)
class ConvGeometry:
    """The geometry of a convolution over ``len(kernel_size)`` spatial dimensions.

    ``padding`` holds (before, after) for each dimension, flattened, so that uneven padding has one
    form everywhere.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    padding_mode: str
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]

    @classmethod
    def normalize(
        cls,
        op: str,
        dimensions: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        padding_mode: str = "zeros",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
    ) -> ConvGeometry:
        """The geometry from arguments as in :mod:`torch.nn.functional`; errors name ``op``.

        Args:
            op: Name of the operator, for errors.
            dimensions: Number of spatial dimensions.
            kernel_size: Taps.
            stride: Step.
            padding: Pixels on both sides, ``"valid"`` or ``"same"``.
            padding_mode: One of :data:`PADDING_MODES`.
            dilation: Distance between the taps.
            groups: Groups of channels.
            transposed: Whether the convolution is transposed.
            output_padding: Extra output positions of a transposed convolution.

        Returns:
            The geometry, one number for each dimension, two for the padding.

        Raises:
            ValueError: If an argument has the wrong number of values, or ``padding`` is an unknown
                or impossible string.
        """
        kernel = _per_dimension(op, "kernel_size", kernel_size, dimensions)
        steps = _per_dimension(op, "stride", stride, dimensions)
        spread = _per_dimension(op, "dilation", dilation, dimensions)
        if transposed and isinstance(padding, str):
            raise ValueError(f"{op}: padding must be an int or ints if transposed, got {padding!r}")
        return cls(
            tuple(kernel),
            tuple(steps),
            tuple(_padding_pairs(op, padding, kernel, steps, spread)),
            padding_mode,
            tuple(spread),
            groups,
            transposed,
            tuple(_per_dimension(op, "output_padding", output_padding, dimensions)),
        )

    @classmethod
    def from_arguments(
        cls,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        padding_mode: str,
        dilation: Sequence[int],
        groups: int,
        transposed: bool,
        output_padding: Sequence[int],
    ) -> ConvGeometry:
        """The geometry from an operator's arguments, the inverse of :meth:`arguments`."""
        sizes = (tuple(kernel_size), tuple(stride), tuple(padding))
        return cls(*sizes, padding_mode, tuple(dilation), groups, transposed, tuple(output_padding))

    def arguments(self) -> tuple[object, ...]:
        """The geometry as plain lists and scalars, in the order of the operators' schemas."""
        sizes = (list(self.kernel_size), list(self.stride), list(self.padding))
        return (
            *sizes,
            self.padding_mode,
            list(self.dilation),
            self.groups,
            self.transposed,
            list(self.output_padding),
        )

    @property
    def dimensions(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel_size)

    @property
    def window_stride(self) -> tuple[int, ...]:
        """Step of the window over the framed input; 1 if transposed."""
        return (1,) * self.dimensions if self.transposed else self.stride

    def frame(self) -> tuple[tuple[int, int], ...]:
        """Pixels added (negative: cropped) before and after each dimension, after zero-stuffing."""
        before, after = self.padding[::2], self.padding[1::2]
        if not self.transposed:
            return tuple(zip(before, after, strict=True))
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return tuple(
            (r - b, r - a + extra)
            for r, b, a, extra in zip(reach, before, after, self.output_padding, strict=True)
        )

    def framed_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the framed input."""
        stuffed = [
            (n - 1) * s + 1 if self.transposed else n
            for n, s in zip(size, self.stride, strict=True)
        ]
        return tuple(
            n + before + after for n, (before, after) in zip(stuffed, self.frame(), strict=True)
        )

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output; below 1 if the kernel does not fit."""
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return tuple(
            (n - span) // step + 1
            for n, span, step in zip(self.framed_size(size), spans, self.window_stride, strict=True)
        )

    def features(self, channels: int) -> int:
        """Length of one group's patch, the bias entry not counted."""
        return channels // self.groups * math.prod(self.kernel_size)

    def frame_input(self, x: Tensor) -> Tensor:
        """The framed input.

        Args:
            x: Input of shape ``[N, C, *spatial]``.

        Returns:
            Tensor of shape ``[N, C, *framed_size(spatial)]``; ``x`` itself where nothing is added.
        """
        if self.transposed:
            sizes = zip(x.shape[2:], self.stride, strict=True)
            stuffed = x.new_zeros(*x.shape[:2], *((n - 1) * step + 1 for n, step in sizes))
            spread = (slice(None), slice(None), *(slice(None, None, step) for step in self.stride))
            stuffed[spread] = x
            x = stuffed
        pads = [side for before_after in reversed(self.frame()) for side in before_after]
        if not any(pads):
            return x
        return F.pad(
            x, pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode
        )
