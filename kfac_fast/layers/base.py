"""What every layer's rule knows: its factors' sums, and its gradients as matrices.

A layer maps ``a[n, s] -> W a[n, s] + b`` for examples ``n`` and shared positions ``s``. Its rule
knows, for the expand and the reduce setting, which operator forms the sum of outer products of the
inputs and of the output gradients, and over how many terms the inputs' sum runs. Dividing by these
counts is the business of :mod:`kfac_fast.blocks`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from operator import attrgetter
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from kfac_fast import ops

Approximation = Literal["expand", "reduce"]
Count = int | Tensor
"""Of terms; a tensor where data decide it."""


AnyLayer = TypeVar("AnyLayer", bound="Layer")


class Sharing(NamedTuple):
    """Which rows of a layer's calls count, and which belong to one example.

    Attributes:
        mask: Bool of the input's shape without its features; rows that are False do not count.
        segments: int64, the example (graph) that each row (node or edge) belongs to.
        num_segments: Number of examples; with ``segments``.
    """

    mask: Tensor | None = None
    segments: Tensor | None = None
    num_segments: int | None = None

    def tensors(self) -> list[Tensor]:
        """Those that are given."""
        return [tensor for tensor in (self.mask, self.segments) if tensor is not None]

    def key(self) -> Hashable:
        """What stands for the present contents, for as long as somebody holds the tensors."""
        known = [None if t is None else (id(t), t._version) for t in (self.mask, self.segments)]
        return *known, self.num_segments


class Layer(ABC):
    """A weight and a bias of a module that are preconditioned together.

    Their gradients form ``[groups, out, in (+ 1)]`` matrices; a single group has plain
    ``[out, in (+ 1)]`` matrices.

    Args:
        name: Qualified name of the module in the model.
        module: The module.
        approx: ``"expand"`` or ``"reduce"``.

    Attributes:
        name: As given.
        module: As given.
        approx: As given.
        has_bias: Whether a trainable bias is the last input.
        reads_input: Whether the module's input is looked at.
        keeps_input: Whether :meth:`gradient_gram` needs it.
        takes_sharing: Whether its calls may be told how rows are shared.
        sharing: How the rows of its calls are shared.
        given: The same as it was stated, by which its masks are known.
        role: What the first parameter is, in reasons.
    """

    groups = 1
    reads_input = True
    keeps_input = False
    takes_sharing = False
    sharing = given = Sharing()
    role = "weight"
    weight_name = "weight"
    bias_name = "bias"

    def __init__(self, name: str, module: nn.Module, approx: Approximation) -> None:
        self.name = name
        self.module = module
        self.approx = approx
        parameters = dict(module.named_parameters(remove_duplicate=False))
        bias = parameters.get(self.bias_name)
        self.has_bias = bias is not None and bias.requires_grad
        roles = {self.weight_name: self.role, self.bias_name: "bias"}
        self._frozen = {
            own: role
            for own, role in roles.items()
            if own in parameters and not parameters[own].requires_grad
        }
        # Small things, but for the caches: they are asked for in every hook.
        self._weight_of = attrgetter(self.weight_name)
        self._tensors_of = [
            self._weight_of,
            *([attrgetter(self.bias_name)] if self.has_bias else []),
        ]

    @abstractmethod
    def batched(self, x: Tensor) -> Tensor:
        """An input or output of the module with the batch in front, of 1 where there was none."""

    def examples(self, output: Tensor) -> int:
        """Number of examples in the batch that made this output; 1 for an unbatched one."""
        return self.sharing.num_segments or self.batched(output).shape[0]

    @abstractmethod
    def input_gram(
        self, x: Tensor, output: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Count] | None:
        """Sum of the outer products of the layer's inputs, and their number.

        Args:
            x: The module's input.
            output: The module's output; only its shape is used.
            out: Memory for the sum.

        Returns:
            Symmetric matrices, ``[(groups,) in (+ 1), in (+ 1)]``, and their count: examples times
            positions under expand, examples under reduce. None if the layer's only factor is that
            of :meth:`gradient_gram`.
        """

    @abstractmethod
    def input_key(self, output: Tensor) -> Hashable:
        """All that :meth:`input_gram` depends on besides the input.

        Args:
            output: The module's output; only its shape is used.

        Returns:
            A key; layers of equal keys have equal sums and counts for one input. None if there is
            no such factor.
        """

    @abstractmethod
    def gradient_gram(
        self, gradient: Tensor, scale: float, x: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """``scale`` times the sum of the outer products of the layer's output gradients.

        Args:
            gradient: Gradient of the loss with respect to the module's output.
            scale: Factor of the result.
            x: The module's input, for a layer that keeps it.
            out: Memory for the sum.

        Returns:
            Symmetric matrices, ``[(groups,) out, out]``.
        """

    @abstractmethod
    def squared_gradients(
        self, x: Tensor, gradient: Tensor, right: Tensor, left: Tensor, scale: float
    ) -> Tensor:
        r"""``scale`` times the examples' squared weight gradients in a rotated basis, summed.

        .. math:: \sum_n (L^\top \nabla_n R)^2, \qquad \nabla_n = \sum_s g_{n,s} \tilde a_{n,s}^\top

        Args:
            x: The module's input.
            gradient: Gradient of the loss with respect to the module's output.
            right: Orthonormal basis :math:`R` of the inputs, ``[(groups,) in (+ 1), in (+ 1)]``, or
                the diagonal of the identity; without the last row, if only others have a bias.
            left: Orthonormal basis :math:`L` of the outputs, ``[(groups,) out, out]``.
            scale: Factor of the result.

        Returns:
            Sums, ``[(groups,) out, in (+ 1)]``.
        """

    @abstractmethod
    def weight_matrix(self, weight: Tensor) -> Tensor:
        """The weight (or its gradient) as ``[(groups,) out, in]``."""

    @abstractmethod
    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`weight_matrix`, in the weight's shape."""

    def shared(self: AnyLayer, sharing: Sharing) -> AnyLayer:
        """The same layer for calls whose rows are shared in some way."""
        layer = copy.copy(self)
        layer.sharing = layer.given = sharing
        return layer

    def reason_against(self) -> str | None:
        """Why the module cannot be preconditioned, or None if it can."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        weight, bias = (parameters.get(name) for name in (self.weight_name, self.bias_name))
        if weight is None:
            return f"its {self.role} is computed from other parameters"
        if weight.is_complex():
            return f"its {self.role} is complex"
        if weight.requires_grad:
            return None
        is_alone = bias is not None and bias.requires_grad
        return f"its {self.role} is frozen{', and its bias alone is no block' if is_alone else ''}"

    def trained_since(self) -> list[str]:
        """What was frozen when the rule was made, and is trained now."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        return [
            role
            for name, role in self._frozen.items()
            if name in parameters and parameters[name].requires_grad
        ]

    def parameters(self) -> list[nn.Parameter]:
        """The module's parameters that hold the layer's weight and, if there is one, its bias."""
        return [tensor_of(self.module) for tensor_of in self._tensors_of]

    def places(self) -> list[tuple[int, int]]:
        """Which part of which parameter each of :meth:`parameters` is."""
        return [(id(p), int(self.own(p.detach()).storage_offset())) for p in self.parameters()]

    def trained(self) -> Tensor | None:
        """The module's parameter that holds the weight, or what is computed from it.

        Returns:
            None if it is frozen by now, or if a tensor that is no parameter stands in its place.
        """
        weight = self.in_place()
        is_own = isinstance(weight, nn.Parameter) or not weight.is_leaf
        return weight if weight.requires_grad and is_own else None

    def in_place(self) -> Tensor:
        """The tensor in the weight's place, be it the module's own or for one call."""
        weight: Tensor = self._weight_of(self.module)
        return weight

    def own(self, tensor: Tensor) -> Tensor:
        """The layer's own part, a view, of one of its parameters or of its gradient."""
        return tensor

    @property
    def weight(self) -> Tensor:
        """The weight that is preconditioned."""
        return self.own(self.parameters()[0].detach())

    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of :meth:`matrix`."""
        *rest, inputs = self.weight_matrix(self.weight).shape
        return (*rest, inputs + self.has_bias)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each factor, in the order in which they are formed and applied."""
        *groups, outputs, inputs = self.matrix_shape()
        return {"input": (*groups, inputs, inputs), "gradient": (*groups, outputs, outputs)}

    def gradients(self) -> list[Tensor | None]:
        """The ``.grad`` of each of :meth:`parameters`."""
        return [parameter.grad for parameter in self.parameters()]

    def matrix(self, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """Weight and bias, or their gradients, in one matrix.

        Args:
            tensors: Of the shapes of :meth:`parameters`; None for a bias stands for zeros.
            dtype: Of the result.

        Returns:
            ``[(groups,) out, in (+ 1)]``.

        Raises:
            TypeError: If the weight's tensor is None.
        """
        weight, *biases = tensors
        if weight is None:
            raise TypeError(f"{self.name}: the weight's tensor must be there, got None")
        matrix = self.weight_matrix(self.own(weight))
        if not self.has_bias:
            return matrix.to(dtype).contiguous()
        shape = (*matrix.shape[:-1], 1)
        bias = biases[0]
        column = matrix.new_zeros(shape) if bias is None else self.own(bias).reshape(shape)
        return torch.cat([matrix, column], -1).to(dtype)

    def parts(
        self, tensors: Sequence[Tensor | None], matrix: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The layer's own part of each tensor, and the entries of a matrix that belong there.

        Args:
            tensors: As of :meth:`matrix`; None is left out.
            matrix: ``[(groups,) out, in (+ 1)]``.

        Yields:
            Pairs of equal shapes.
        """
        inputs = matrix.shape[-1] - self.has_bias
        entries = [self.weight_from_matrix(matrix.narrow(-1, 0, inputs))]
        if self.has_bias:
            entries.append(matrix.select(-1, inputs))
        for tensor, part in zip(tensors, entries, strict=True):
            if tensor is not None:
                own = self.own(tensor)
                yield own, part if part.shape == own.shape else part.reshape(own.shape)


class RowLayer(Layer):
    """A layer whose inputs and output gradients can be written out as rows."""

    @abstractmethod
    def output_rows(self, output: Tensor) -> Tensor:
        """The module's output, or its gradient, as ``[N, *shared, groups * out]``, a view."""

    def gradient_gram(
        self, gradient: Tensor, scale: float, x: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Rows under expand, their sums over the shared positions under reduce."""
        rows, groups = self.output_rows(gradient), self.groups
        return gradient_gram(rows, self.approx, scale, groups=groups, sharing=self.sharing, out=out)

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
        """See :meth:`Layer.squared_gradients`, whose arguments these are.

        The gradients are formed for a few examples at a time, never in more memory than the input
        and the output gradient of the layer take, or than one example needs. Whichever is cheaper
        is rotated: the rows or the gradients.

        Returns:
            Sums, ``[(groups,) out, in (+ 1)]``.
        """
        *groups, outputs, inputs = self.matrix_shape()
        total = right.new_zeros(*groups, outputs, right.shape[-1])
        x, gradient = self.batched(x), self.batched(gradient)
        positions = math.prod(gradient.shape[1:]) // (outputs * math.prod(groups))
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


def gradient_gram(
    rows: Tensor,
    approx: Approximation,
    scale: float,
    *,
    groups: int = 1,
    sharing: Sharing = Layer.sharing,
    out: Tensor | None = None,
) -> Tensor:
    """Gram of output gradients ``[N, *shared, out]``, or of their sums over positions."""
    if approx == "expand" or (rows.dim() == 2 and sharing.segments is None):
        return ops.gram(rows, groups=groups, mask=sharing.mask, alpha=scale, out=out)
    mask, segments, examples = sharing
    return ops.shared_gram(
        rows,
        reduction="sum",
        groups=groups,
        mask=mask,
        segments=segments,
        num_segments=examples,
        alpha=scale,
        out=out,
    )
