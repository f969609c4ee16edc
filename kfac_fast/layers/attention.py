"""The projections of multi-head attention, which are no modules that hooks would see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kfac_fast.layers.base import Approximation, Sharing
from kfac_fast.layers.linear import LinearLayer

OUT = "out_proj.weight"
See = Callable[["ProjectionLayer", Tensor, Tensor], Tensor]


class ProjectionLayer(LinearLayer):
    """One of the four linear layers inside of ``nn.MultiheadAttention``.

    Args:
        name: Qualified name of the projection.
        module: The attention module.
        approx: ``"expand"`` or ``"reduce"``.
        weight_name: Name of the parameter that holds the weight, maybe with others in front or
            behind.
        bias_name: Name of the parameter that holds the bias.
        part: Which third of a packed parameter is this layer's.
    """

    module: nn.MultiheadAttention

    def __init__(
        self,
        name: str,
        module: nn.MultiheadAttention,
        approx: Approximation,
        weight_name: str,
        bias_name: str,
        part: int,
    ) -> None:
        self.weight_name, self.bias_name, self.part = weight_name, bias_name, part
        self.width: int = module.embed_dim
        # Of this layer among the rows of all projections, in the order in which they are used.
        self.first_row = (3 if weight_name == OUT else part) * self.width
        super().__init__(name, module, approx)

    def shared(self, sharing: Sharing) -> ProjectionLayer:
        """For calls with the batch in front, wherever the module has it, and of 1 without one."""
        layer, mask = super().shared(sharing), sharing.mask
        if mask is not None and mask.dim() == 1:
            layer.sharing = sharing._replace(mask=mask[None])
        elif mask is not None and not self.module.batch_first:
            layer.sharing = sharing._replace(mask=mask.mT)
        return layer

    def own(self, tensor: Tensor) -> Tensor:
        """This layer's rows of a packed parameter, all of another."""
        if len(tensor) == self.width:
            return tensor
        return tensor[self.part * self.width : (self.part + 1) * self.width]

    def output_part(self, output: Tensor) -> Tensor:
        """This layer's part of the output of a product with two or three weights, or one."""
        missing = 3 * self.width - output.shape[-1]  # at the front: the queries', or those before
        start = 0 if output.shape[-1] == self.width else self.part * self.width - missing
        return output.narrow(-1, start, self.width)

    def output_rows(self, output: Tensor) -> Tensor:
        """This layer's part."""
        return super().output_rows(self.output_part(output))

    def squared_gradients(
        self, x: Tensor, gradient: Tensor, right: Tensor, left: Tensor, scale: float
    ) -> Tensor:
        """Of this layer's part."""
        return super().squared_gradients(x, self.output_part(gradient), right, left, scale)


def projections(
    name: str, module: nn.MultiheadAttention, approx: Approximation
) -> list[ProjectionLayer]:
    """The projections of queries, keys and values, and that of the heads' outputs.

    Args:
        name: Qualified name of the attention module.
        module: The attention module.
        approx: ``"expand"`` or ``"reduce"``.

    Returns:
        Four layers, named as if they were modules.
    """
    packed = module.in_proj_weight is not None
    prefix = f"{name}." if name else ""
    layers = []
    for part, letter in enumerate("qkv"):
        weight = "in_proj_weight" if packed else f"{letter}_proj_weight"
        own = f"{prefix}{letter}_proj"
        layers.append(ProjectionLayer(own, module, approx, weight, "in_proj_bias", part))
    out = (OUT, "out_proj.bias", 0)
    return [*layers, ProjectionLayer(f"{prefix}out_proj", module, approx, *out)]


class ProjectionCalls(TorchFunctionMode):
    """While it is open, an attention module's forward pass shows its projections.

    PyTorch computes attention in one function, whose linear products cannot be hooked. It is run as
    a copy that calls a ``linear`` of ours; nothing is changed in PyTorch itself.

    Args:
        layers: The module's projections.
        see: Called with each projection, its input and its output, the batch in front; gives back
            the output.
    """

    def __init__(self, layers: Sequence[ProjectionLayer], see: See) -> None:
        super().__init__()
        self._layers = layers
        self._see = see
        self._is_open = False
        self._examples, self._rows = 1, 0
        # Without the module's own name, by which a compiler would look the others up.
        names = {name: value for name, value in vars(F).items() if name != "__name__"}
        names |= {"linear": self._linear, "has_torch_function": lambda tensors: False}
        for inner in ("_in_projection_packed", "_in_projection"):
            names[inner] = _with_names(getattr(F, inner), names)
        self._forward = _with_names(F.multi_head_attention_forward, names)

    def open(self) -> None:
        """Before the forward pass."""
        self._is_open = True
        self.__enter__()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """After it, if it was opened."""
        if self._is_open:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._is_open = False
            self._examples, self._rows = 1, 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run attention as the copy, and everything else as it is."""
        if function is F.multi_head_attention_forward:
            function = self._forward
        return function(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(x, weight, bias)
        # Positions come first, and the heads' outputs have positions and examples in one dimension.
        self._examples = x.shape[1] if x.dim() == 3 else self._examples
        inputs, batched = (
            t.reshape(-1, self._examples, t.shape[-1]).transpose(0, 1) for t in (x, output)
        )
        # Weights come in the order of the projections, some of them in one.
        first, self._rows = self._rows, self._rows + weight.shape[0]
        for layer in self._layers:
            if first <= layer.first_row < self._rows:
                batched = self._see(layer, inputs, batched)
        # Through the view that is seen, so that its gradient is asked for.
        return batched.transpose(0, 1).reshape(output.shape)


def _with_names(function: Callable[..., Any], names: dict[str, Any]) -> Callable[..., Any]:
    """A copy of a Python function that looks up its global names elsewhere."""
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
