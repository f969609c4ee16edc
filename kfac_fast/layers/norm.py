"""Scales and shifts of normalisations: a block of their own for each unit."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import ops
from kfac_fast.layers.base import Approximation, Layer, Sharing, gradient_gram
from kfac_fast.schema import result_dtype

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
    takes_sharing = True
    module: Normalization

    def __init__(self, name: str, module: nn.Module, approx: Approximation) -> None:
        super().__init__(name, module, approx)
        self.groups = next(module.parameters()).numel()  # there may be no scale

    @abstractmethod
    def output_rows(self, output: Tensor) -> Tensor:
        """The module's output, or its gradient, as ``[N, *shared, units]``."""

    @abstractmethod
    def _gram(self, x: Tensor, gradient: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """The sum of :meth:`gradient_gram`, of tensors of one dtype."""

    def _flat(self, *rows: Tensor) -> tuple[list[Tensor], Sharing]:
        """Rows ``[N, *shared, *]``, with segments ``[R, *]``, and how they are shared."""
        mask, segments, examples = self.sharing
        if segments is None or rows[0].dim() == 2:
            return list(rows), self.sharing
        segments = segments.repeat_interleave(rows[0].shape[1:-1].numel())
        mask = None if mask is None else mask.flatten()
        return [tensor.flatten(0, -2) for tensor in rows], Sharing(mask, segments, examples)

    def _gram_of_rows(self, rows: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """Of what each position adds to the gradients, ``[N, *shared, units * inputs]``."""
        inputs = rows.shape[-1] // self.groups
        (rows,), sharing = self._flat(rows)
        out = None if self.groups == 1 else out  # which a single group has without its dimension
        gram = gradient_gram(rows, "reduce", scale, groups=self.groups, sharing=sharing, out=out)
        return gram.view(self.groups, inputs, inputs)

    def batched(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x

    def input_gram(self, x: Tensor, output: Tensor, out: Tensor | None = None) -> None:
        """None, there is a single factor."""

    def input_key(self, output: Tensor) -> None:
        """None, there is a single factor."""

    def gradient_gram(
        self, gradient: Tensor, scale: float, x: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Blocks of all units, ``[units, 1 (+ 1), 1 (+ 1)]``."""
        if x is None:
            raise TypeError(f"{self.name}: x must be the module's input, got None")
        if x.dtype != gradient.dtype:
            dtype = torch.promote_types(x.dtype, gradient.dtype)
            x, gradient = x.to(dtype), gradient.to(dtype)
        return self._gram(x, gradient, scale, out)

    def squared_gradients(
        self, x: Tensor, gradient: Tensor, right: Tensor, left: Tensor, scale: float
    ) -> Tensor:
        """As for other layers; they are on the diagonal of the rotated blocks."""
        # Small ones beside large ones come out of a difference; mps has nothing more precise.
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        blocks = self._gram(x.to(dtype), gradient.to(dtype), scale)
        basis = right.to(dtype)
        squares = (basis.mT @ blocks @ basis).diagonal(dim1=-2, dim2=-1)
        return squares.clamp(min=0).to(right.dtype)[:, None]

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """``[units, 1, 1]``."""
        return weight.reshape(-1, 1, 1)

    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        """In the weight's shape."""
        return matrix.reshape(self._weight_of(self.module).shape)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """A factor for weight and bias together."""
        units, _, inputs = self.matrix_shape()
        return {"joint": (units, inputs, inputs)}


class FeatureNormLayer(NormLayer):
    """``nn.LayerNorm`` and ``nn.RMSNorm`` on ``[N, *shared, *features]``: units are features."""

    module: FeatureNorm

    def batched(self, x: Tensor) -> Tensor:
        """``[N, *shared, *features]``."""
        return x if x.dim() > len(self.module.normalized_shape) else x[None]

    def output_rows(self, output: Tensor) -> Tensor:
        """The features in one dimension."""
        rows, dims = self.batched(output), len(self.module.normalized_shape)
        return rows.flatten(-dims) if dims > 1 else rows

    def _gram(self, x: Tensor, gradient: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """Of inputs that are normalised again."""
        rows, (mask, segments, examples) = self._flat(
            self.output_rows(x), self.output_rows(gradient)
        )
        center, eps = isinstance(self.module, nn.LayerNorm), self.module.eps
        if eps is None:
            eps = torch.finfo(result_dtype(self.module.weight.dtype)).eps
        return ops.feature_norm_gram(
            *rows,
            eps=eps,
            center=center,
            bias=self.has_bias,
            mask=mask,
            segments=segments,
            num_segments=examples,
            alpha=scale,
            out=out,
        )


class ChannelNormLayer(NormLayer):
    """``nn.GroupNorm`` and ``nn.BatchNorm1d``, ``2d``, ``3d``, whose units are channels.

    A batch normalisation is one after the statistics are known: that an example moves those of the
    others is left out.
    """

    module: ChannelNorm

    def output_rows(self, output: Tensor) -> Tensor:
        """Channels last."""
        return output.movedim(1, -1)

    def _gram(self, x: Tensor, gradient: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """Of inputs that are read again."""
        if self.sharing is not Layer.sharing:
            return self._shared_gram(x, gradient, scale)
        module = self.module
        options: dict[str, Any] = {}
        if isinstance(module, nn.GroupNorm):
            options["num_groups"] = module.num_groups
        elif not module.training and module.running_mean is not None:
            statistics = module.running_mean, cast(Tensor, module.running_var)
            dtype = result_dtype(x.dtype)
            options["mean"], options["variance"] = (value.to(dtype) for value in statistics)
        return ops.channel_norm_gram(
            x, gradient, eps=module.eps, bias=self.has_bias, alpha=scale, out=out, **options
        )

    def _shared_gram(self, x: Tensor, gradient: Tensor, scale: float) -> Tensor:
        """Of normalised inputs that are written out, whose channels come last."""
        z = self._normalized(x.to(result_dtype(x.dtype)))
        v = torch.stack([gradient * z, gradient.to(z)][: 1 + self.has_bias], -1)
        return self._gram_of_rows(v.movedim(1, -2).flatten(-2), scale)

    def _normalized(self, x: Tensor) -> Tensor:
        """The inputs before scale and shift."""
        module = self.module
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, eps=module.eps)
        if module.training or module.running_mean is None:
            return F.batch_norm(x, None, None, training=True, eps=module.eps)
        mean, variance = module.running_mean.to(x), cast(Tensor, module.running_var).to(x)
        return F.batch_norm(x, mean, variance, eps=module.eps)
