"""Biases whose weights are frozen, and shifts whose scales are."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from kfac_fast.layers.base import Count, RowLayer, Sharing
from kfac_fast.layers.linear import LinearLayer
from kfac_fast.layers.norm import NormLayer


class BiasLayer(LinearLayer):
    """The bias alone of a linear layer or a convolution, whatever its frozen weight makes.

    It is the weight of a linear layer whose only input is 1 at every position of the output; the
    module's own input is not looked at, and autograd does not keep that of a frozen weight either.

    Args:
        of: The rule of the layer with both.
    """

    reads_input = False
    role = "bias"
    bias_name = ""  # it has none

    def __init__(self, of: RowLayer) -> None:
        self.of = of
        self.weight_name = of.bias_name
        super().__init__(of.name, of.module, of.approx)
        self.groups = of.groups
        self.takes_sharing = of.takes_sharing

    def shared(self, sharing: Sharing) -> BiasLayer:
        """As the layer with both."""
        layer = super().shared(sharing)
        layer.of = self.of.shared(sharing)
        layer.sharing = layer.of.sharing
        return layer

    def trained_since(self) -> list[str]:
        """As of the layer with both."""
        return self.of.trained_since()

    def own(self, tensor: Tensor) -> Tensor:
        """As of the layer with both."""
        return self.of.own(tensor)

    def batched(self, x: Tensor) -> Tensor:
        """As of the layer with both."""
        return self.of.batched(x)

    def output_rows(self, output: Tensor) -> Tensor:
        """As of the layer with both."""
        return self.of.output_rows(output)

    def input_gram(
        self, x: Tensor, output: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Count]:
        """The corner that a bias has in the sum of the inputs, ``[(groups,) 1, 1]``."""
        corner, count = super().input_gram(_ones(self.output_rows(output)), output)
        return corner.expand(self.factor_shapes()["input"]).contiguous(), count

    def input_key(self, output: Tensor) -> Hashable:
        """Which positions there are, and which count."""
        positions = self.output_rows(output).shape[:-1]
        known = BiasLayer, self.approx, self.groups, positions, output.dtype
        return *known, self.given.key()

    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of groups of outputs, too."""
        x, gradient = super().rows(x, gradient)
        if self.groups == 1:
            return x, gradient
        return x[:, None], gradient.unflatten(-1, (self.groups, -1)).transpose(1, 2)

    def squared_gradients(
        self, x: Tensor, gradient: Tensor, right: Tensor, left: Tensor, scale: float
    ) -> Tensor:
        """As for other layers; the input is 1."""
        rows = self.output_rows(gradient)
        return super().squared_gradients(_ones(rows), rows, right, left, scale)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """``[C_out]`` as ``[(g,) C_out / g, 1]``."""
        return weight[:, None] if self.groups == 1 else weight.reshape(self.groups, -1, 1)

    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        """Back to ``[C_out]``."""
        return matrix.flatten()


class ShiftLayer(NormLayer):
    """The shift alone of normalised units, whatever they are scaled by: ``v_n = sum_s g[n, s, j]``.

    Args:
        of: The rule of the normalisation with both.
    """

    reads_input = keeps_input = False
    role = "bias"
    bias_name = ""  # it has none

    def __init__(self, of: NormLayer) -> None:
        self.of = of
        self.weight_name = of.bias_name
        super().__init__(of.name, of.module, of.approx)

    def trained_since(self) -> list[str]:
        """As of the normalisation with both."""
        return self.of.trained_since()

    def batched(self, x: Tensor) -> Tensor:
        """As of the normalisation with both."""
        return self.of.batched(x)

    def output_rows(self, output: Tensor) -> Tensor:
        """As of the normalisation with both."""
        return self.of.output_rows(output)

    def gradient_gram(
        self, gradient: Tensor, scale: float, x: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Blocks of all units, ``[units, 1, 1]``; no input enters."""
        return self._gram(gradient, gradient, scale, out)

    def squared_gradients(
        self, x: Tensor, gradient: Tensor, right: Tensor, left: Tensor, scale: float
    ) -> Tensor:
        """As for normalisations; no input enters."""
        return super().squared_gradients(gradient, gradient, right, left, scale)

    def _gram(self, x: Tensor, gradient: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """Of sums of gradients."""
        return self._gram_of_rows(self.output_rows(gradient), scale, out)


def _ones(rows: Tensor) -> Tensor:
    """The input at each position."""
    return rows.new_ones(*rows.shape[:-1], 1)
