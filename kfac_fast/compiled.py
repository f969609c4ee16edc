"""Capture inside of compiled models: operators that the compiler keeps and does not look into.

A compiler's trace has no memory, no step number and no graph of gradients, so hooks can do nothing
in it but leave operators behind. ``begin`` marks a forward pass, and ``record`` hands a gradient on
at run time. Their results are a pass number and a zero that the graph needs, or it would drop them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Recorder(Protocol):
    """What stands behind the operators.

    Attributes:
        traced: Whether a compiled graph has an operator of it.
    """

    traced: bool

    def begin(self, examples: int) -> int:
        """Take note of a forward pass, whose first input has so many examples; its number."""

    def record(self, index: int, x: Tensor, gradient: Tensor, forward_pass: int) -> None:
        """Take down a layer's input and the gradient of its output."""


_RECORDERS: WeakValueDictionary[int, Recorder] = WeakValueDictionary()
_HANDLES = count()

_library = torch.library.Library("kfac_fast_capture", "DEF")


def register(recorder: Recorder) -> int:
    """A handle by which operators find a recorder for as long as it lives."""
    handle = next(_HANDLES)
    _RECORDERS[handle] = recorder
    return handle


def _define(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    # A replayed graph of a GPU's work would leave out what they do in Python.
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
    name = schema.partition("(")[0]
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kfac_fast_capture::{name}", fake, lib=_library)


def _begin(x: Tensor, examples: int, handle: int) -> Tensor:
    recorder = _RECORDERS.get(handle)
    number = 0 if recorder is None else recorder.begin(examples)
    return torch.tensor(number, device="cpu")


def _record(gradient: Tensor, x: Tensor, forward_pass: Tensor, handle: int, index: int) -> Tensor:
    recorder = _RECORDERS.get(handle)
    if recorder is not None:
        recorder.record(index, x, gradient, int(forward_pass))
    return gradient.new_zeros(())


def _trace(gradient: Tensor, x: Tensor, forward_pass: Tensor, handle: int, index: int) -> Tensor:
    # Noted here, for the compiler refuses side effects of a hook in a part that is checkpointed.
    recorder = _RECORDERS.get(handle)
    if recorder is not None:
        recorder.traced = True
    return gradient.new_empty(())


_define(
    "begin(Tensor x, SymInt examples, int handle) -> Tensor",
    _begin,
    lambda x, examples, handle: torch.empty((), dtype=torch.int64),
)
_define(
    "record(Tensor gradient, Tensor x, Tensor forward_pass, int handle, int index) -> Tensor",
    _record,
    _trace,
)


class _Tap(torch.autograd.Function):
    """The identity, which records the gradient that comes back."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, forward_pass: Tensor, handle: int, index: int
    ) -> Tensor:
        ctx.save_for_backward(x, forward_pass)
        ctx.handle, ctx.index = handle, index
        return output.clone()  # a view could not be written to in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        zero = torch.ops.kfac_fast_capture.record(
            gradient, *ctx.saved_tensors, ctx.handle, ctx.index
        )
        return gradient + zero, None, None, None, None


def begin(x: Tensor, examples: int, handle: int) -> Tensor:
    """Mark a forward pass.

    Args:
        x: Any of the model's inputs.
        examples: Number of examples in the first of them.
        handle: Of the recorder.

    Returns:
        The pass' number, a tensor on the host.
    """
    number: Tensor = torch.ops.kfac_fast_capture.begin(x, examples, handle)
    return number


def tap(
    output: Tensor, x: Tensor, forward_pass: Tensor, handle: int, index: int, *, at_once: bool
) -> Tensor:
    """Have a call of a layer recorded, on its way back unless at once.

    Args:
        output: The layer's output.
        x: Its input.
        forward_pass: Result of :func:`begin`.
        handle: Of the recorder.
        index: Which layer it is.
        at_once: Record it in the forward pass, with the output in place of its gradient.

    Returns:
        The output, to be used in its place.
    """
    call = x.detach(), forward_pass, handle, index
    if at_once:
        return output + torch.ops.kfac_fast_capture.record(output.detach(), *call)  # type: ignore[no-any-return]
    tapped: Tensor = _Tap.apply(output, *call)  # type: ignore[no-untyped-call]
    return tapped
