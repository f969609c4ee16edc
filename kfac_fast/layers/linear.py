"""Linear layers."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fast import ops
from kfac_fast.layers.base import Count, RowLayer


class LinearLayer(RowLayer):
    """``nn.Linear`` on ``[N, *shared, in]``."""

    takes_sharing = True

    def batched(self, x: Tensor) -> Tensor:
        """``[N, *shared, features]``."""
        return x if x.dim() > 1 else x[None]

    def input_gram(
        self, x: Tensor, output: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Count]:
        """Rows under expand, their means over the shared positions under reduce."""
        x, (mask, segments, examples) = self.batched(x), self.sharing
        if self.approx == "expand" or (x.dim() == 2 and segments is None):
            total = ops.gram(x, bias=self.has_bias, mask=mask, out=out)
            return total, math.prod(x.shape[:-1]) if mask is None else mask.sum()
        total = ops.shared_gram(
            x,
            reduction="mean",
            bias=self.has_bias,
            mask=mask,
            segments=segments,
            num_segments=examples,
            out=out,
        )
        if segments is not None and examples is not None:
            return total, examples
        return total, len(x) if mask is None else mask.flatten(1).any(1).sum()

    def input_key(self, output: Tensor) -> Hashable:
        """Whether positions are averaged, whether there is a bias, and which rows count."""
        return LinearLayer, self.approx, self.has_bias, self.given.key()

    def output_rows(self, output: Tensor) -> Tensor:
        """The tensor itself, with the batch in front."""
        return self.batched(output)

    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The shared positions in one dimension."""
        x, gradient = (
            tensor.flatten(1, -2) if tensor.dim() > 2 else tensor[:, None]
            for tensor in (x, gradient)
        )
        return F.pad(x, (0, int(self.has_bias)), value=1.0), gradient

    def squared_gradients(
        self, x: Tensor, gradient: Tensor, right: Tensor, left: Tensor, scale: float
    ) -> Tensor:
        """As for other layers; rows that do not count have no gradient."""
        if self.sharing.mask is not None:
            gradient = torch.where(self.sharing.mask[..., None], gradient, 0)
        return super().squared_gradients(x, gradient, right, left, scale)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight

    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        """The matrix itself."""
        return matrix
