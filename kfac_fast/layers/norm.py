"""Scales and shifts of normalisations: a block of their own for each unit."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import ops
from kfac_fast.layers.base import Approximation, Layer

FeatureNorm = nn.LayerNorm | nn.RMSNorm
ChannelNorm = nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
Normalization = FeatureNorm | ChannelNorm


class NormLayer(Layer):
    r"""The scale and shift of normalised units, ``y[n, s, j] = w[j] z[n, s, j] + b[j]``.

    They are so few that each unit has its block without approximation,

    .. math:: F_j = c \sum_n v_n v_n^\top, \qquad v_n = \sum_s g_{n,s,j} (z_{n,s,j}, 1)

    under expand and under reduce. In the layout of the other layers, the units are groups of
    matrices ``[1, 1 (+ 1)]``, and there is a single factor.
    """

    keeps_input = True
    module: Normalization

    def __init__(self, name: str, module: nn.Module, approx: Approximation) -> None:
        super().__init__(name, module, approx)
        self.groups = self.module.weight.numel()

    @abstractmethod
    def example_sums(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over positions of ``g z`` and of ``g``, each ``[N, units]``."""

    def batched(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x

    def input_gram(self, x: Tensor, output: Tensor) -> None:
        """None, there is a single factor."""

    def input_key(self, output: Tensor) -> Hashable:
        """Alike in all."""
        return type(self)

    def gradient_gram(self, gradient: Tensor, scale: float, x: Tensor | None = None) -> Tensor:
        """Blocks of all units, ``[units, 1 (+ 1), 1 (+ 1)]``."""
        if x is None:
            raise TypeError(f"{self.name}: x must be the module's input, got None")
        v = self._example_gradients(x, gradient)
        blocks = ops.gram(v.flatten(1), groups=self.groups, alpha=scale)
        return blocks.reshape(self.groups, v.shape[-1], v.shape[-1])

    def squared_gradients(
        self, x: Tensor, gradient: Tensor, right: Tensor, left: Tensor, scale: float
    ) -> Tensor:
        """As for other layers; the gradients of all examples are no larger than the input."""
        v = self._example_gradients(x, gradient).to(right.dtype)
        return scale * (v[:, :, None] @ right).square().sum(0)

    def _example_gradients(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The vectors :math:`v_n` of each unit, ``[N, units, 1 (+ 1)]``."""
        v = torch.stack(self.example_sums(x, gradient)[: 1 + self.has_bias], -1)
        _, segments, examples = self.sharing
        if segments is None or examples is None:
            return v
        return v.new_zeros(examples, *v.shape[1:]).index_add_(0, segments, v)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """``[units, 1, 1]``."""
        return weight.reshape(-1, 1, 1)

    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        """In the weight's shape."""
        return matrix.reshape(self.weight.shape)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """A factor for weight and bias together."""
        units, _, inputs = self.matrix_shape()
        return {"joint": (units, inputs, inputs)}


class FeatureNormLayer(NormLayer):
    """``nn.LayerNorm`` and ``nn.RMSNorm`` on ``[N, *shared, *features]``: units are features."""

    takes_sharing = True

    module: FeatureNorm

    def batched(self, x: Tensor) -> Tensor:
        """``[N, *shared, *features]``."""
        return x if x.dim() > len(self.module.normalized_shape) else x[None]

    def example_sums(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of inputs normalised again, by mean and variance or by the root mean square."""
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        g, z = (
            batched.reshape(len(batched), -1, self.groups).to(dtype)
            for batched in map(self.batched, (gradient, self._normalized(x)))
        )
        if self.sharing.mask is not None:
            g = torch.where(self.sharing.mask.reshape(*g.shape[:2], 1), g, 0)
        return z.mul_(g).sum(1), g.sum(1)  # z is of no further use

    def _normalized(self, x: Tensor) -> Tensor:
        module = self.module
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, eps=module.eps)
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)


class ChannelNormLayer(NormLayer):
    """``nn.GroupNorm`` and ``nn.BatchNorm1d``, ``2d``, ``3d``, whose units are channels.

    A batch normalisation is one after the statistics are known: that an example moves those of the
    others is left out.
    """

    module: ChannelNorm

    def example_sums(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of inputs that are read again."""
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        shape = len(x), self.groups, math.prod(x.shape[2:])
        g, x = (tensor.reshape(shape).to(dtype) for tensor in (gradient, x))
        mean, variance = (statistic.expand(shape[:2]) for statistic in self._statistics(x))
        return _row_sums(g, x, mean, (variance + self.module.eps).rsqrt())

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance by which the forward pass normalises ``[N, C, S]``."""
        module, groups = self.module, None
        if isinstance(module, nn.GroupNorm):
            groups = module.num_groups
        elif not module.training and module.running_mean is not None:
            return module.running_mean, cast(Tensor, module.running_var)
        # Of every channel of every example, then of those that are normalised together.
        means = x.mean(2)
        variances = (x - means[:, :, None]).square_().sum(2) / x.shape[2]
        if groups is None:
            return _pooled(means, variances)
        means, variances = (t.reshape(len(x) * groups, -1).mT for t in (means, variances))
        mean, variance = _pooled(means, variances)
        mean, variance = (t.expand_as(means).mT.reshape(x.shape[:2]) for t in (mean, variance))
        return mean, variance


def _pooled(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a union of equally large samples, along the first dimension."""
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


def _row_sums(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, C]``: sums over ``s`` of ``g (x - mean) scale`` and of ``g``, in one reading."""
    rows = x.shape[:2]
    g, x = (tensor.reshape(1, -1, x.shape[2]) for tensor in (g, x))
    mean, scale = (tensor.reshape(-1).contiguous() for tensor in (mean, scale))  # not strided
    # They are the gradients of weight and bias, if each channel of each example has its own.
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        g, x, None, None, None, mean, scale, True, 0.0, [False, True, True]
    )
    return products.reshape(rows), sums.reshape(rows)
