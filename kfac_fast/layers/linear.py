"""Linear layers."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch.nn.functional as F
from torch import Tensor

from kfac_fast import ops
from kfac_fast.layers.base import RowLayer, gradient_gram


class LinearLayer(RowLayer):
    """``nn.Linear`` on ``[N, *shared, in]``."""

    def batched(self, x: Tensor) -> Tensor:
        """``[N, *shared, features]``."""
        return x if x.dim() > 1 else x[None]

    def input_gram(self, x: Tensor, output: Tensor) -> tuple[Tensor, int]:
        """Rows under expand, their means over the shared positions under reduce."""
        x = self.batched(x)
        if self.approx == "expand" or x.dim() == 2:
            return ops.gram(x, bias=self.has_bias), math.prod(x.shape[:-1])
        return ops.shared_gram(x, reduction="mean", bias=self.has_bias), x.shape[0]

    def input_key(self, output: Tensor) -> Hashable:
        """Whether positions are averaged, and whether there is a bias."""
        return type(self), self.approx, self.has_bias

    def gradient_gram(self, gradient: Tensor, scale: float, x: Tensor | None = None) -> Tensor:
        """Rows under expand, their sums over the shared positions under reduce."""
        return gradient_gram(self.batched(gradient), self.approx, 1, scale)

    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The shared positions in one dimension."""
        x, gradient = (
            tensor.flatten(1, -2) if tensor.dim() > 2 else tensor[:, None]
            for tensor in (x, gradient)
        )
        return F.pad(x, (0, int(self.has_bias)), value=1.0), gradient

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight

    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        """The matrix itself."""
        return matrix
