"""The table of implementations and the choice between them.

Each (operator, device type) has its implementations in order of preference. Each implementation can
refuse a call with a sentence; the first that does not refuse serves it. Nothing is caught: a kernel
that fails raises.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import torch

from kfac_fast import conv_kernels, reference, schema
from kfac_fast.conv import ConvGeometry

Function = TypeVar("Function", bound=Callable[..., Any])

EXTENSION_BUILT = importlib.util.find_spec("kfac_fast._C") is not None
if EXTENSION_BUILT:
    importlib.import_module("kfac_fast._C")  # registers the native kernels with the dispatcher


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator on one device type.

    Attributes:
        name: ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``.
        run: Takes the dispatcher arguments, writes the outputs.
        missing: A sentence why this installation does not have it, or None.
        refuses: Takes the dispatcher arguments; a sentence why it cannot serve them, or None. None
            if it serves all.
        way: Takes the dispatcher arguments; names the algorithm. None if there is only one.
        checks: ``run`` checks its arguments; where it refuses them it returns False and has written
            nothing.
    """

    name: str
    run: Callable[..., bool | None]
    missing: str | None = None
    refuses: Callable[..., str | None] | None = None
    way: Callable[..., str] | None = None
    checks: bool = False

    def reason_against(self, *args: Any) -> str | None:
        """A sentence why it does not serve these dispatcher arguments, or None."""
        if self.missing is not None or self.refuses is None:
            return self.missing
        return self.refuses(*args)


def _reference(op: str) -> Implementation:
    """The pure-PyTorch version, apart from whatever autograd and autocast would make of it."""
    function = getattr(reference, op)

    def run(*args: Any) -> None:
        with torch.no_grad(), torch.autocast(_device_type(args[0]), enabled=False):
            function(*args)

    return Implementation("reference", run)


def _missing(kernel: str, device: str) -> str | None:
    """A sentence why the compiled extension has no such kernel for ``device``, or None."""
    if not EXTENSION_BUILT:
        return "the C++ extension is not built: run `pip install --no-build-isolation .`"
    if torch._C._dispatch_has_kernel_for_dispatch_key(
        f"kfac_fast_native::{kernel}", device.upper()
    ):
        return None
    return f"the C++ extension was built without {device.upper()} kernels"


def _native(op: str, device: str) -> Implementation:
    """The compiled extension's kernel for ``device``."""
    overload = getattr(torch.ops.kfac_fast_native, op).default
    return Implementation("cpp" if device == "cpu" else "cuda", overload, _missing(op, device))


_requires_grad = attrgetter("requires_grad")


def _native_list(op: str, device: str) -> Implementation:
    """The compiled extension's kernel on lists, which checks faster than Python could."""
    native = _native(op, device)
    is_there = attrgetter(f"is_{device}")

    def run(*args: Any) -> bool | None:
        # Not known there: which tensors require gradients, and those that other kernels are for.
        if True in map(_requires_grad, _written(op, args)):
            return False
        if not all(all(map(is_there, value)) for value in args if type(value) is list):
            return False
        return native.run(*args)

    return replace(native, run=run, checks=True)


# Multiply-adds of one layer, beyond which PyTorch's matmuls save more than their launches cost. An
# estimate until a record from a GPU decides.
MOST_PRECONDITIONED = 2**29


def _left_to_matmuls(grads: list[torch.Tensor], *_: Any) -> str | None:
    """A sentence why PyTorch's matmuls are expected to precondition these faster, or None."""
    precision = torch.get_float32_matmul_precision()
    if precision != "highest" and grads and grads[0].dtype == torch.float32:
        return f"at matmul precision {precision!r} PyTorch's matmuls use tensor cores"
    for grad in grads:
        if grad.numel() ** 2 <= MOST_PRECONDITIONED // 2:  # m k (m + k) is at most m k (m k + 1)
            continue
        shape = grad.shape[-2:]
        if math.prod(shape) * sum(shape) > MOST_PRECONDITIONED:
            return f"PyTorch's matmuls are expected to be faster for a gradient of {tuple(shape)}"
    return None


class Convolution(NamedTuple):
    """A convolution operator's arguments, its geometry in one piece."""

    x: torch.Tensor
    geometry: ConvGeometry
    bias: bool
    alpha: float
    beta: float
    out: torch.Tensor

    @staticmethod
    def of(x: torch.Tensor, *arguments: Any) -> Convolution:
        """From the dispatcher's arguments."""
        *geometry, bias, alpha, beta, out = arguments
        return Convolution(x, ConvGeometry.from_arguments(*geometry), bias, alpha, beta, out)

    @property
    def kernel(self) -> str:
        """The kernel that forms a factor under expand."""
        shape, item = tuple(self.x.shape), self.x.element_size()
        return conv_kernels.expand_kernel(self.geometry, shape, item)


def _way(*args: Any) -> str:
    return conv_kernels.EXPAND_KERNELS[Convolution.of(*args).kernel]


def _native_conv(op: str, device: str) -> Implementation:
    """The compiled extension's kernel of a convolution, which takes a plan of its geometry."""
    expand = op == "conv_expand_gram"

    def run(x: torch.Tensor, *args: Any) -> None:
        geometry, target = schema.hashable(args[:-4]), args[-4:]
        kernel, numbers = _planned(op, tuple(x.shape), x.element_size(), x.device, *geometry)
        kernel(x, *numbers, *target)

    missing = _missing("conv_offset_gram" if expand else op, device)
    name = "cpp" if device == "cpu" else "cuda"
    return Implementation(name, run, missing, way=_way if expand else None)


@lru_cache(maxsize=256)
def _planned(
    op: str, shape: tuple[int, ...], item: int, device: torch.device, *geometry_arguments: Any
) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """The compiled kernel for an input of this shape, and its arguments for the geometry."""
    geometry = ConvGeometry.from_arguments(*geometry_arguments)
    expand = op == "conv_expand_gram"
    kernel = conv_kernels.expand_kernel(geometry, shape, item) if expand else op
    overload = getattr(torch.ops.kfac_fast_native, kernel).default
    plan = conv_kernels.plan(kernel, geometry, shape[2:]).to(device)
    if op != "conv_window_sum":
        return overload, (plan, geometry.groups)
    cells = [len(axis.sums().weights[0]) for axis in geometry.axes(shape[2:])]
    return overload, (plan, cells, geometry.kernel_size, geometry.groups)


def _kernels(name: str) -> Any:
    """A module of Triton kernels; at its first use, because Triton is slow to import."""
    return importlib.import_module(f"kfac_fast.kernels.{name}")


def _triton(op: str, device: str, run: Callable[..., None] | None = None) -> Implementation:
    """The Triton kernel; on CPU tensors it runs only under Triton's interpreter."""

    def run_itself(*args: Any) -> None:
        getattr(_kernels(op), op)(*args, precision=torch.get_float32_matmul_precision())

    def refuses(*args: Any) -> str | None:
        reason: str | None = _kernels("launch").refusal(args[0])
        return reason

    missing = None
    if importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed"
    elif importlib.util.find_spec("kfac_fast.kernels") is None:
        missing = "kfac_fast.kernels is not installed: run `pip install --no-build-isolation .`"
    elif device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        missing = "Triton needs a GPU, or TRITON_INTERPRET=1 to interpret its kernels"
    way = _way if op == "conv_expand_gram" else None
    return Implementation("triton", run or run_itself, missing, refuses, way)


@lru_cache(maxsize=256)
def _offset_tables(geometry: ConvGeometry, size: tuple[int, ...], device: torch.device) -> Any:
    plans = [axis.offsets() for axis in geometry.axes(size)]
    return _kernels("conv_offset_gram").tables(plans, device)


@lru_cache(maxsize=256)
def _sum_tables(geometry: ConvGeometry, size: tuple[int, ...], device: torch.device) -> Any:
    plans = [axis.sums() for axis in geometry.axes(size)]
    return _kernels("conv_window_sum").tables(plans, device)


def _triton_expand(*args: Any) -> None:
    call = Convolution.of(*args)
    geometry, size = call.geometry, tuple(call.x.shape[2:])
    output = geometry.output_size(size)
    target = geometry.groups, call.bias, call.alpha, call.beta, call.out
    precision = torch.get_float32_matmul_precision()
    if call.kernel == "conv_patch_gram":
        window = geometry.kernel_size, geometry.window_stride, geometry.dilation, output
        run = _kernels("conv_patch_gram").conv_patch_gram
        run(geometry.frame_input(call.x), *window, *target, precision)
    else:
        tables = _offset_tables(geometry, size, call.x.device)
        run = _kernels("conv_offset_gram").conv_offset_gram
        run(call.x, tables, math.prod(output), *target, precision)


def _triton_sum(*args: Any, form: str = "conv_window_sum", **options: Any) -> None:
    call = Convolution.of(*args)
    geometry, size = call.geometry, tuple(call.x.shape[2:])
    tables = _sum_tables(geometry, size, call.x.device)
    outputs = math.prod(geometry.output_size(size))
    target = geometry.groups, call.bias, call.alpha, call.beta, call.out
    getattr(_kernels("conv_window_sum"), form)(call.x, tables, outputs, *target, **options)


def _triton_reduce(*args: Any) -> None:
    precision = torch.get_float32_matmul_precision()
    _triton_sum(*args, form="conv_reduce_gram", precision=precision)


_TRITON_CONV = {
    "conv_expand_gram": _triton_expand,
    "conv_reduce_gram": _triton_reduce,
    "conv_window_sum": _triton_sum,
}


TABLE: dict[tuple[str, str], tuple[Implementation, ...]] = {
    (op, device): (_reference(op),)
    for op in schema.OPERATORS
    for device in ("cpu", "cuda", "mps", "xpu")
}
for _op in ("gram", "shared_gram"):
    TABLE[_op, "cpu"] = (_native(_op, "cpu"), _reference(_op), _triton(_op, "cpu"))
for _op, _run in _TRITON_CONV.items():
    TABLE[_op, "cpu"] = (_native_conv(_op, "cpu"), _reference(_op), _triton(_op, "cpu", _run))
    TABLE[_op, "cuda"] = (_triton(_op, "cuda", _run), _reference(_op))
for _op in schema.CHECKING:
    TABLE[_op, "cpu"] = (_native_list(_op, "cpu"), _reference(_op))
TABLE["gram", "cuda"] = (_triton("gram", "cuda"), _native("gram", "cuda"), _reference("gram"))
TABLE["shared_gram", "cuda"] = (_triton("shared_gram", "cuda"), _reference("shared_gram"))
TABLE["damped_inverse", "cuda"] = (
    _native_list("damped_inverse", "cuda"),
    _reference("damped_inverse"),
)
TABLE["precondition", "cuda"] = (
    replace(_native_list("precondition", "cuda"), refuses=_left_to_matmuls),
    _reference("precondition"),
)
TABLE["conv_window_sum", "cuda"] = (
    _native_conv("conv_window_sum", "cuda"),
    *TABLE["conv_window_sum", "cuda"],
)

_forced: ContextVar[str | None] = ContextVar("kfac_fast_implementation", default=None)
_explanation: ContextVar[list[str] | None] = ContextVar("kfac_fast_explanation", default=None)
_public: dict[str, Callable[..., Any]] = {}


def public(function: Function) -> Function:
    """Register a public operator function under its name, for :func:`explain`."""
    _public[function.__name__] = function
    return function


@contextmanager
def use(name: str) -> Iterator[None]:
    """Serve every operator by the implementation ``name`` inside the ``with`` block.

    Args:
        name: ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``. A call that this
            implementation refuses, or an operator that does not have it, raises instead of falling
            back.

    Yields:
        Nothing.

    Raises:
        ValueError: If no operator has an implementation of this name.
    """
    names = sorted({implementation.name for row in TABLE.values() for implementation in row})
    if name not in names:
        raise ValueError(f"use: name must be one of {names}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _candidates(op: str, device: str) -> tuple[Implementation, ...]:
    row = TABLE.get((op, device), ())
    forced = _forced.get()
    return row if forced is None else tuple(i for i in row if i.name == forced)


def select(op: str, *args: Any) -> Implementation:
    """The implementation that serves a call of ``op`` with these dispatcher arguments.

    Args:
        op: Name of the operator.
        *args: Its dispatcher arguments.

    Returns:
        The first of the table's row that does not refuse.

    Raises:
        RuntimeError: If every implementation of the table, or the one that :func:`use` names,
            refuses.
    """
    device = _device_type(args[0])
    reasons = []
    for implementation in _candidates(op, device):
        reason = implementation.reason_against(*args)
        if reason is None:
            return implementation
        reasons.append(f"{implementation.name}: {reason}")
    raise RuntimeError(
        f"{op}: no implementation serves it on {device}: {'; '.join(reasons) or 'none exists'}"
    )


def _device_type(first: torch.Tensor | list[torch.Tensor]) -> str:
    if isinstance(first, torch.Tensor):
        return "cpu" if first.is_cpu else first.device.type
    return first[0].device.type if first else "cpu"


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Say which implementation would serve a call, and why each one before it would not.

    Nothing is computed: ``explain("gram", x, bias=True)`` checks the arguments and reads the table.

    Args:
        op: Name of a function of :mod:`kfac_fast.ops`, or the function.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        One line for each implementation considered.

    Raises:
        ValueError: If ``op`` names no public operator.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in _public:
        raise ValueError(f"explain: op must be one of {sorted(_public)}, got {name!r}")
    lines: list[str] = []
    token = _explanation.set(lines)
    try:
        _public[name](*args, **kwargs)
    finally:
        _explanation.reset(token)
    return "\n".join(lines)


def _describe(op: str, *args: Any) -> Iterator[str]:
    device = _device_type(args[0])
    for implementation in _candidates(op, device):
        reason = implementation.reason_against(*args)
        if reason is None:
            way = f" by {implementation.way(*args)}" if implementation.way else ""
            yield f"{op} on {device}: {implementation.name} serves this call{way}"
            return
        yield f"{op} on {device}: {implementation.name} refuses: {reason}"
    if not _candidates(op, device):
        yield f"{op} on {device}: there is no {_forced.get()}"


def run(op: str, *args: Any) -> None:
    """Choose an implementation and run it.

    Args:
        op: Name of the operator.
        *args: Its dispatcher arguments, which have passed :func:`kfac_fast.schema.check`.

    Raises:
        RuntimeError: If a kernel that checks its arguments refuses them nevertheless.
    """
    explanation = _explanation.get()
    if explanation is not None:
        explanation.extend(_describe(op, *args))
        return
    if select(op, *args).run(*args) is False:
        raise RuntimeError(f"{op}: the kernel refuses arguments that have passed the check")
    _increment_versions(op, args)


def _increment_versions(op: str, args: tuple[Any, ...]) -> None:
    """Let autograd see that what it may have saved has changed."""
    torch.autograd.graph.increment_version(_written(op, args))  # none of inference tensors'


def _written(op: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors among the arguments that an operator writes."""
    written: list[torch.Tensor] = []
    for argument in args[schema.OPERATORS[op].written :]:
        if isinstance(argument, list):
            written += argument
        elif argument is not None:
            written.append(argument)
    return written


def _route(op: str, *args: Any) -> None:
    if op in schema.CHECKING and _explanation.get() is None:
        row = _candidates(op, _device_type(args[0]))
        first = next((each for each in row if each.reason_against(*args) is None), None)
        if first is not None and first.checks and first.run(*args):
            _increment_versions(op, args)
            return
    schema.check(op, *args)
    run(op, *args)


for _op in schema.OPERATORS:
    schema.LIBRARY.impl(_op, partial(_route, _op), "CompositeExplicitAutograd")


def call(op: str, *args: Any) -> None:
    """Check the arguments of an operator and run it, by the dispatcher where that is needed.

    The dispatcher turns every argument into its own kind of value and back, which takes longer than
    a small kernel.

    Args:
        op: Name of the operator.
        *args: Its dispatcher arguments.
    """
    if dispatched(args):
        getattr(torch.ops.kfac_fast, op).default(*args)
    else:
        _route(op, *args)


_TENSORS = {torch.Tensor, torch.nn.Parameter}
_PLAIN = _TENSORS | {int, float, bool, str, tuple, list, type(None)}


def dispatched(args: tuple[Any, ...]) -> bool:
    """Whether something listens at the dispatcher to a call with these arguments.

    That may be the compiler, a tracer, a mode, a transform, a profiler, or a kind of tensor of its
    own. A kernel that somebody registers for an operator in place of the router is not looked for.

    Args:
        args: An operator's arguments.

    Returns:
        False if the router may be called directly.
    """
    if torch.compiler.is_compiling():
        return True
    for value in args:
        kind = type(value)
        if kind is list and value:
            if not _TENSORS.issuperset(map(type, value)) or value[0].is_meta:
                return True
        elif kind in _TENSORS:
            # Views that are negated, or zero without memory, when the dispatcher sees them.
            if value.is_meta or value.is_neg() or value._is_zerotensor():
                return True
        elif kind not in _PLAIN:
            return True
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )
