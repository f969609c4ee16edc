"""Embeddings, whose inputs are counted, never written out."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from kfac_fast import ops
from kfac_fast.layers.base import Approximation, Count, Layer


class EmbeddingLayer(Layer):
    """``nn.Embedding``: a linear layer whose inputs are one-hot.

    The input covariance is diagonal: how often each index occurs. Every position is a term of its
    own, under reduce, too: averages of one-hot inputs would have a full matrix over the vocabulary.
    Positions of the padding index, which have no gradient, are left out.
    """

    module: nn.Embedding

    def __init__(self, name: str, module: nn.Embedding, approx: Approximation) -> None:
        super().__init__(name, module, approx)
        self.keeps_input = module.padding_idx is not None

    def reason_against(self) -> str | None:
        """Also a gradient that is not that of the one-hot inputs."""
        for option in ("sparse", "scale_grad_by_freq"):
            if getattr(self.module, option):
                return f"it has {option}"
        return super().reason_against()

    def batched(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x

    def examples(self, output: Tensor) -> int:
        """The first dimension of the indices; 1 for a single index."""
        return output.shape[0] if output.dim() > 1 else 1

    def input_gram(
        self, x: Tensor, output: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Count]:
        """How often each index occurs, ``[in]``, and the number of positions."""
        dtype = torch.promote_types(output.dtype, torch.float32)
        ones = torch.ones(x.numel(), dtype=dtype, device=x.device)
        zeros = ones.new_zeros(self.module.num_embeddings) if out is None else out.zero_()
        counts = zeros.index_add_(0, x.flatten(), ones)
        if self.module.padding_idx is None:
            return counts, x.numel()
        counts[self.module.padding_idx] = 0
        return counts, counts.sum()

    def _used(self, x: Tensor | None) -> Tensor | None:
        """Which positions are no padding, flat; None for all."""
        padding = self.module.padding_idx
        return None if padding is None or x is None else x.flatten() != padding

    def input_key(self, output: Tensor) -> Hashable:
        """The vocabulary, and which index is left out."""
        return type(self), self.module.num_embeddings, self.module.padding_idx, output.dtype

    def gradient_gram(
        self, gradient: Tensor, scale: float, x: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Of every position that is used."""
        rows = gradient.reshape(-1, gradient.shape[-1])
        return ops.gram(rows, mask=self._used(x), alpha=scale, out=out)

    def squared_gradients(
        self, x: Tensor, gradient: Tensor, right: Tensor, left: Tensor, scale: float
    ) -> Tensor:
        """As for other layers, with every position for an example."""
        rows = gradient.reshape(-1, gradient.shape[-1]).to(left.dtype)
        squares = (rows @ left).square()
        used = self._used(x)
        squares = squares if used is None else squares * used[:, None]
        total = squares.new_zeros(self.module.num_embeddings, rows.shape[-1])
        return total.index_add_(0, x.flatten(), squares, alpha=scale).mT

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """``[in, out]`` as ``[out, in]``."""
        return weight.mT

    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        """Back to ``[in, out]``."""
        return matrix.mT

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The input's is a diagonal."""
        outputs, inputs = self.matrix_shape()
        return {"input": (inputs,), "gradient": (outputs, outputs)}
