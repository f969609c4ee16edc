"""Which calls of an operator the dispatcher must see, and which may go straight to a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_TENSORS = {torch.Tensor, torch.nn.Parameter}
_PLAIN = _TENSORS | {int, float, bool, str, tuple, list, type(None)}


# They say whether Dynamo listens, and torch.profiler or torch.autograd.profiler; whatever else
# compiles has a mode. That the legacy profiler does not see plain calls saves one more question.
is_compiling = torch.compiler.is_dynamo_compiling
profiler = torch.autograd.profiler

# What listens to calls of the thread: modes and tracers. The transforms of torch.func listen, too,
# but kernels refuse what they wrap, which has no memory: their inputs and what is made inside.
LISTENERS: tuple[Callable[[], int], ...] = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._is_tracing,
)


def is_listened() -> bool:
    """Whether the compiler, a tracer, a mode, a transform or a profiler listens to calls."""
    return (
        is_compiling()
        or profiler._is_profiler_enabled
        or any(listens() for listens in LISTENERS)
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_traced() -> bool:
    """Whether a tensor of this moment may end up in the graph of a compiler, a tracer or a mode."""
    return is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing()


def _is_lazy(tensor: torch.Tensor) -> bool:
    """Whether it is negated, or zero without memory, until the dispatcher sees it."""
    return tensor.is_neg() or tensor._is_zerotensor()


def dispatched(args: tuple[Any, ...]) -> bool:
    """Whether something listens at the dispatcher to a call with these arguments.

    That may be the compiler, a tracer, a mode, a transform, a profiler, or a kind of tensor of its
    own. A kernel that somebody registers for an operator in place of the router is not looked for.

    Args:
        args: An operator's arguments.

    Returns:
        False if the router may be called directly.
    """
    if is_listened():
        return True
    for value in args:
        kind = type(value)
        if kind is list and value:
            if not _TENSORS.issuperset(map(type, value)) or value[0].is_meta:
                return True
            if any(map(_is_lazy, value)):
                return True
        elif kind in _TENSORS:
            if value.is_meta or _is_lazy(value):
                return True
        elif kind not in _PLAIN:
            return True
    return False


def as_plain(value: Any) -> Any:
    """An argument with its tensors as what they are under a class of their own."""
    if isinstance(value, list):
        return [as_plain(entry) for entry in value]
    if isinstance(value, torch.Tensor) and type(value) not in _TENSORS:
        return value.as_subclass(torch.Tensor)
    return value
