"""Scales and shifts of normalisations: a block of their own for each unit."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable

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
    def normalized(self, x: Tensor) -> Tensor:
        """What the module scales and shifts, in the shape of its input."""

    @abstractmethod
    def by_unit(self, x: Tensor) -> Tensor:
        """An input, output or gradient of the module as ``[N, S, units]``."""

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
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        g, z = (self.by_unit(tensor).to(dtype) for tensor in (gradient, self.normalized(x)))
        if self.sharing.mask is not None:
            g = torch.where(self.sharing.mask.reshape(*g.shape[:2], 1), g, 0)
        sums = [torch.linalg.vecdot(g, z, dim=1), *([g.sum(1)] if self.has_bias else [])]
        v = torch.stack(sums, -1)
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

    def by_unit(self, x: Tensor) -> Tensor:
        """The features in one dimension, the shared positions in another."""
        x = self.batched(x)
        return x.reshape(len(x), -1, self.groups)

    def normalized(self, x: Tensor) -> Tensor:
        """By mean and variance, or by the root mean square."""
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

    def by_unit(self, x: Tensor) -> Tensor:
        """``[N, C, *spatial]`` with the spatial positions in one dimension before the channels."""
        return x.reshape(len(x), self.groups, math.prod(x.shape[2:])).mT

    def normalized(self, x: Tensor) -> Tensor:
        """By the statistics that the forward pass uses."""
        module = self.module
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, eps=module.eps)
        batch_statistics = module.training or module.running_mean is None
        mean, variance = (
            (None, None) if batch_statistics else (module.running_mean, module.running_var)
        )
        return F.batch_norm(x, mean, variance, training=batch_statistics, eps=module.eps)
