"""How each layer type's factors are formed, and how its gradients are laid out as matrices.

A layer maps ``a[n, s] -> W a[n, s] + b`` for examples ``n`` and shared positions ``s``. Its rule
knows, for the expand and the reduce setting, which operator forms the sum of outer products of the
inputs and of the output gradients, and over how many terms the inputs' sum runs. Dividing by these
counts is the business of :mod:`kfac_fast.blocks`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import ops
from kfac_fast.conv import ConvGeometry

Approximation = Literal["expand", "reduce"]
Module = TypeVar("Module", bound=nn.Module)


class Layer(ABC):
    """A module whose weight and bias are preconditioned together.

    Their gradients form ``[groups, out, in (+ 1)]`` matrices; a single group has plain
    ``[out, in (+ 1)]`` matrices.

    Attributes:
        name: Qualified name of the module in the model.
        module: The module; its weight is trainable.
        approx: ``"expand"`` or ``"reduce"``.
        has_bias: Whether a trainable bias is the last input.
    """

    groups = 1

    def __init__(self, name: str, module: nn.Module, approx: Approximation) -> None:
        self.name = name
        self.module = module
        self.approx = approx
        bias = module.bias
        self.has_bias = isinstance(bias, nn.Parameter) and bias.requires_grad

    @abstractmethod
    def batched(self, x: Tensor) -> Tensor:
        """An input or output of the module with the batch in front, of 1 where there was none."""

    def examples(self, output: Tensor) -> int:
        """Number of examples in the batch that made this output; 1 for an unbatched one."""
        return self.batched(output).shape[0]

    @abstractmethod
    def input_gram(self, x: Tensor, output: Tensor) -> tuple[Tensor, int]:
        """Sum of the outer products of the layer's inputs, and their number.

        Args:
            x: The module's input.
            output: The module's output; only its shape is used.

        Returns:
            Symmetric matrices, ``[(groups,) in (+ 1), in (+ 1)]``, and their count: examples times
            positions under expand, examples under reduce.
        """

    @abstractmethod
    def input_key(self, output: Tensor) -> Hashable:
        """All that :meth:`input_gram` depends on besides the input.

        Args:
            output: The module's output; only its shape is used.

        Returns:
            A key; layers of equal keys have equal sums and counts for one input.
        """

    @abstractmethod
    def gradient_gram(self, gradient: Tensor, scale: float) -> Tensor:
        """``scale`` times the sum of the outer products of the layer's output gradients.

        Args:
            gradient: Gradient of the loss with respect to the module's output.
            scale: Factor of the result.

        Returns:
            Symmetric matrices, ``[(groups,) out, out]``.
        """

    @abstractmethod
    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients in the weight-sharing format, copied for the purpose.

        Args:
            x: The module's input.
            gradient: Gradient of the loss with respect to the module's output.

        Returns:
            Inputs ``[N, (groups,) S, in (+ 1)]`` and gradients ``[N, (groups,) S, out]``.
        """

    def squared_gradients(
        self, x: Tensor, gradient: Tensor, right: Tensor, left: Tensor, scale: float
    ) -> Tensor:
        r"""``scale`` times the examples' squared weight gradients in a rotated basis, summed.

        .. math:: \sum_n (L^\top \nabla_n R)^2, \qquad \nabla_n = \sum_s g_{n,s} \tilde a_{n,s}^\top

        The gradients are formed for a few examples at a time, never in more memory than the input
        and the output gradient of the layer take, or than one example needs. Whichever is cheaper
        is rotated: the rows or the gradients.

        Args:
            x: The module's input.
            gradient: Gradient of the loss with respect to the module's output.
            right: Orthonormal basis :math:`R` of the inputs, ``[(groups,) in (+ 1), in (+ 1)]``.
            left: Orthonormal basis :math:`L` of the outputs, ``[(groups,) out, out]``.
            scale: Factor of the result.

        Returns:
            Sums, ``[(groups,) out, in (+ 1)]``.
        """
        *groups, outputs, inputs = self.matrix_shape()
        total = right.new_zeros(*groups, outputs, inputs)
        x, gradient = self.batched(x), self.batched(gradient)
        positions = gradient[0].numel() // (outputs * math.prod(groups))
        rotates_rows = positions * (inputs**2 + outputs**2) <= inputs * outputs * (inputs + outputs)
        needed = math.prod(groups) * (positions * (inputs + outputs) + inputs * outputs)
        together = max(1, (x.numel() + gradient.numel()) // needed)
        for examples in zip(x.split(together), gradient.split(together), strict=True):
            a, g = (rows.to(right.dtype) for rows in self.rows(*examples))
            if rotates_rows:
                a, g = a @ right, g @ left
            if positions == 1:
                total += torch.einsum("n...so,n...si->...oi", g.square(), a.square())
                continue
            products = g.mT @ a
            if not rotates_rows:
                products = left.mT @ products @ right
            total += products.square().sum(0)
        return total.mul_(scale)

    @abstractmethod
    def weight_matrix(self, weight: Tensor) -> Tensor:
        """The weight (or its gradient) as ``[(groups,) out, in]``."""

    @abstractmethod
    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`weight_matrix`, in the weight's shape."""

    @property
    def weight(self) -> nn.Parameter:
        """The weight that is preconditioned."""
        weight = self.module.weight
        if not isinstance(weight, nn.Parameter):
            raise TypeError(f"{self.name}: weight must be a parameter, got {type(weight).__name__}")
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias that is preconditioned with the weight, if there is one."""
        bias = self.module.bias
        return bias if self.has_bias and isinstance(bias, nn.Parameter) else None

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that this layer preconditions."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of :meth:`gradient_matrix`."""
        *rest, inputs = self.weight_matrix(self.weight.detach()).shape
        return (*rest, inputs + self.has_bias)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each factor, in the order in which they are formed and applied."""
        *groups, outputs, inputs = self.matrix_shape()
        return {"input": (*groups, inputs, inputs), "gradient": (*groups, outputs, outputs)}

    def gradient_matrix(self, dtype: torch.dtype) -> Tensor:
        """The ``.grad`` of the parameters as ``[(groups,) out, in (+ 1)]``, zero if None."""
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters()]
        matrix = self.weight_matrix(grads[0]).to(dtype)
        if not self.has_bias:
            return matrix.contiguous()
        column = grads[1].reshape(*matrix.shape[:-1], 1).to(dtype)
        return torch.cat([matrix, column], -1)

    def write_gradient(self, matrix: Tensor) -> None:
        """Write a matrix of :meth:`gradient_matrix` back to each ``.grad`` that is there."""
        if self.weight.grad is not None:
            inputs = matrix[..., :-1] if self.has_bias else matrix
            self.weight.grad.copy_(self.weight_from_matrix(inputs))
        if self.bias is not None and self.bias.grad is not None:
            self.bias.grad.copy_(matrix[..., -1].reshape(self.bias.shape))


def _gradient_gram(rows: Tensor, approx: Approximation, groups: int, scale: float) -> Tensor:
    """Gram of output gradients ``[N, *shared, out]``, or of their sums over positions."""
    if approx == "expand" or rows.dim() == 2:
        return ops.gram(rows, groups=groups, alpha=scale)
    return ops.shared_gram(rows, reduction="sum", groups=groups, alpha=scale)


class LinearLayer(Layer):
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

    def gradient_gram(self, gradient: Tensor, scale: float) -> Tensor:
        """Rows under expand, their sums over the shared positions under reduce."""
        return _gradient_gram(self.batched(gradient), self.approx, 1, scale)

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


Convolution = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)


class ConvLayer(Layer):
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

    def _output_padding(self, x: Tensor, output: Tensor) -> tuple[int, ...]:
        return (0,) * len(self.module.kernel_size)

    def input_gram(self, x: Tensor, output: Tensor) -> tuple[Tensor, int]:
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
        )
        return result, x.shape[0] * (positions if expand else 1)

    def input_key(self, output: Tensor) -> Hashable:
        """The geometry, of which the output's size tells the output padding."""
        dimensions = len(self.module.kernel_size)
        geometry = ConvGeometry.normalize(self.name, dimensions, **self._geometry())
        return type(self), self.approx, self.has_bias, geometry, output.shape[-dimensions:]

    def gradient_gram(self, gradient: Tensor, scale: float) -> Tensor:
        """Output pixels under expand, their sums over the image under reduce."""
        pixels = self.batched(gradient).movedim(1, -1)
        return _gradient_gram(pixels, self.approx, self.groups, scale)

    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The patches, and the output's pixels."""
        options = {**self._geometry(), "output_padding": self._output_padding(x, gradient)}
        geometry = ConvGeometry.normalize(self.name, x.dim() - 2, **options)
        groups = () if self.groups == 1 else (self.groups,)
        positions = math.prod(gradient.shape[2:])
        patches = geometry.windows(x).reshape(len(x), *groups, -1, positions).mT
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
        dimensions = len(self.module.kernel_size)
        geometry = ConvGeometry.normalize(self.name, dimensions, **self._geometry())
        sizes = zip(output.shape[2:], geometry.output_size(x.shape[2:]), strict=True)
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


RULES: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvLayer,
    nn.Conv2d: ConvLayer,
    nn.Conv3d: ConvLayer,
    nn.ConvTranspose1d: ConvTransposeLayer,
    nn.ConvTranspose2d: ConvTransposeLayer,
    nn.ConvTranspose3d: ConvTransposeLayer,
}
