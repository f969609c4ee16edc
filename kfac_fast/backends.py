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
from functools import cache, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from kfac_fast import conv_kernels, reference, schema
from kfac_fast.conv import ConvGeometry
from kfac_fast.dispatch import LISTENERS, as_plain, dispatched, is_compiling, profiler
from kfac_fast.list_checks import of_each

if TYPE_CHECKING:
    from kfac_fast._C import ConvKernel

Function = TypeVar("Function", bound=Callable[..., Any])

EXTENSION_BUILT = importlib.util.find_spec("kfac_fast._C") is not None
native: Any = importlib.import_module("kfac_fast._C") if EXTENSION_BUILT else None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator on one device type.

    Attributes:
        name: ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``.
        run: Takes the dispatcher arguments, which have passed the check, and writes the outputs.
        missing: A sentence why this installation does not have it, or None.
        refuses: Takes the dispatcher arguments; a sentence why it cannot serve them, or None. None
            if it serves all.
        way: Takes the dispatcher arguments; names the algorithm. None if there is only one.
        quick: As ``run``, but checks its arguments itself: None if it refuses them and has written
            nothing; else the result of an operator that accumulates, which it makes where it is
            given None, and of one on lists True, or ``info`` if it makes that. None if only ``run``
            is there.
    """

    name: str
    run: Callable[..., None]
    missing: str | None = None
    refuses: Callable[..., str | None] | None = None
    way: Callable[..., str] | None = None
    quick: Callable[..., Any] | None = None

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


NOT_BUILT = "the C++ extension is not built: run `pip install --no-build-isolation .`"


def _checked(op: str, quick: Callable[..., Any]) -> Callable[..., None]:
    """A kernel that checks its arguments, for arguments that have passed the check."""

    def run(*args: Any) -> None:
        if quick(*map(as_plain, args)) is None:
            raise RuntimeError(f"{op}: the kernel refuses arguments that have passed the check")

    return run


def _cpp(op: str) -> Implementation:
    """The compiled extension's kernel for the CPU."""
    way = _way if op == "conv_expand_gram" else None
    if not EXTENSION_BUILT:
        return Implementation("cpp", _checked(op, lambda *args: None), NOT_BUILT)
    if op.startswith("conv_"):
        quick = native.conv_operator(op, _conv_kernel)
    else:
        quick = _eigh if op == "eigh" else getattr(native, op)
    return Implementation("cpp", _checked(op, quick), way=way, quick=quick)


def _eigh(
    matrices: list[torch.Tensor], values: list[torch.Tensor], vectors: list[torch.Tensor], info: Any
) -> bool | None:
    """The compiled kernel, and PyTorch's version of what torch's eigensolver fails on there."""
    # That it raised an error is known there, not which one: if the iteration did not converge, info
    # is to say so, and anything else is to be raised.
    done: bool | None = native.eigh(matrices, values, vectors, info)
    if done and bool((info == 2).any()):
        infos = info.split([matrix.shape[:-2].numel() for matrix in matrices])
        for matrix, own_values, own_vectors, own in zip(
            matrices, values, vectors, infos, strict=True
        ):
            if bool((own == 2).any()):
                reference.eigh([matrix], [own_values], [own_vectors], own)
    return done


def _conv_kernel(op: str, shape: tuple[int, ...], item: int, *arguments: Any) -> ConvKernel:
    """The compiled kernel for inputs of this shape, with its plan."""
    checked = schema.conv_arguments(op, len(shape), False, *arguments)
    schema.conv_shape(op, shape, *checked)
    geometry = ConvGeometry.from_arguments(*checked[:-1])
    expand = op == "conv_expand_gram"
    kernel = conv_kernels.expand_kernel(geometry, shape, item) if expand else op
    plan = conv_kernels.plan(kernel, geometry, shape[2:]).tolist()
    made: ConvKernel = native.ConvKernel(kernel, plan, shape[2:], geometry.groups)
    return made


def _cuda(op: str) -> Implementation:
    """The compiled extension's kernel for NVIDIA GPUs."""
    overload = getattr(torch.ops.kfac_fast_native, op).default
    missing = None
    if not EXTENSION_BUILT:
        missing = NOT_BUILT
    elif not torch._C._dispatch_has_kernel_for_dispatch_key(f"kfac_fast_native::{op}", "CUDA"):
        missing = "the C++ extension was built without CUDA kernels"
    return Implementation("cuda", overload, missing)


_requires_grad = attrgetter("requires_grad")
_is_cuda = attrgetter("is_cuda")


def _cuda_list(op: str) -> Implementation:
    """The compiled extension's kernel on lists, which checks faster than Python could."""
    cuda = _cuda(op)
    native_op: Callable[..., bool] = getattr(torch.ops.kfac_fast_native, op).default

    def quick(*args: Any) -> bool | None:
        # Not known there: which tensors require gradients, and those that other kernels are for.
        if True in map(_requires_grad, _written(op, args)):
            return None
        if not all(all(map(_is_cuda, value)) for value in args if type(value) is list):
            return None
        if not native_op(*args):
            return None
        _increment_versions(op, args)
        return True

    return replace(cuda, run=_checked(op, quick), quick=quick)


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


def _cuda_window_sum(x: torch.Tensor, *args: Any) -> None:
    geometry, target = schema.hashable(args[:-4]), args[-4:]
    numbers = _window_sum_plan(tuple(x.shape), x.device, *geometry)
    torch.ops.kfac_fast_native.conv_window_sum.default(x, *numbers, *target)


# Tables on a device are kept for good: graphs captured with them read them at each replay.


@cache
def _window_sum_plan(
    shape: tuple[int, ...], device: torch.device, *arguments: Any
) -> tuple[Any, ...]:
    """The CUDA kernel's arguments for the geometry."""
    geometry = ConvGeometry.from_arguments(*arguments)
    plan = conv_kernels.plan("conv_window_sum", geometry, shape[2:]).to(device)
    cells = [len(axis.sums().weights[0]) for axis in geometry.axes(shape[2:])]
    return plan, cells, geometry.kernel_size, geometry.groups


def _kernels(name: str) -> Any:
    """A module of Triton kernels; at its first use, because Triton is slow to import."""
    return importlib.import_module(f"kfac_fast.kernels.{name}")


def _triton(
    op: str,
    device: str,
    run: Callable[..., None] | None = None,
    more: Callable[..., str | None] | None = None,
) -> Implementation:
    """The Triton kernel; CPU tensors need Triton's interpreter. ``more`` may refuse, too."""

    def run_itself(*args: Any) -> None:
        getattr(_kernels(op), op)(*args, precision=torch.get_float32_matmul_precision())

    def refuses(*args: Any) -> str | None:
        is_list = isinstance(args[0], list)
        if is_list and not args[0]:
            return None
        first = args[0][0] if is_list else args[0]
        reason: str | None = _kernels("launch").refusal(first)
        if reason is None and is_list and first.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                reason = "a captured graph would read its table of tensors from memory of the host"
        return more(*args) if reason is None and more is not None else reason

    missing = None
    if importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed"
    elif importlib.util.find_spec("kfac_fast.kernels") is None:
        missing = "kfac_fast.kernels is not installed: run `pip install --no-build-isolation .`"
    elif device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        missing = "Triton needs a GPU, or TRITON_INTERPRET=1 to interpret its kernels"
    way = _way if op == "conv_expand_gram" else None
    return Implementation("triton", run or run_itself, missing, refuses, way)


@cache
def _offset_tables(geometry: ConvGeometry, size: tuple[int, ...], device: torch.device) -> Any:
    plans = [axis.offsets() for axis in geometry.axes(size)]
    return _kernels("conv_offset_gram").tables(plans, device)


@cache
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


def _triton_inverse(matrices: list[torch.Tensor], damping: list[torch.Tensor], *args: Any) -> None:
    each = of_each(damping, matrices)
    _kernels("damped_inverse").damped_inverse(matrices, each, *args)


def _triton_features(*args: Any) -> None:
    x, gradient, mask, _, _, *rest = args
    _kernels("norm_gram").feature_norm_gram(x, gradient, mask, *rest)


def _refuses_rows(*args: Any) -> str | None:
    if args[3] is not None or args[0].shape[-1] > _kernels("norm_gram").MOST_FEATURES:
        return "rows in segments, and the longest ones, are left to PyTorch"
    return None


def _triton_reduce(*args: Any) -> None:
    precision = torch.get_float32_matmul_precision()
    _triton_sum(*args, form="conv_reduce_gram", precision=precision)


_TRITON_NORM = {
    "feature_norm_gram": (_triton_features, _refuses_rows),
    "channel_norm_gram": (lambda *args: _kernels("norm_gram").channel_norm_gram(*args), None),
}
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
for _op in schema.OPERATORS:
    TABLE[_op, "cpu"] = (_cpp(_op), *TABLE[_op, "cpu"])
for _op in ("gram", "shared_gram"):
    TABLE[_op, "cpu"] += (_triton(_op, "cpu"),)
for _op, _run in _TRITON_CONV.items():
    TABLE[_op, "cpu"] += (_triton(_op, "cpu", _run),)
    TABLE[_op, "cuda"] = (_triton(_op, "cuda", _run), _reference(_op))
# On a GPU these, too, wait for a record that says that they are the fastest.
for _op, _ways in _TRITON_NORM.items():
    TABLE[_op, "cpu"] += (_triton(_op, "cpu", *_ways),)
    TABLE[_op, "cuda"] += (_triton(_op, "cuda", *_ways),)
TABLE["gram", "cuda"] = (_triton("gram", "cuda"), _cuda("gram"), _reference("gram"))
TABLE["shared_gram", "cuda"] = (_triton("shared_gram", "cuda"), _reference("shared_gram"))
TABLE["damped_inverse", "cuda"] = (_cuda_list("damped_inverse"), _reference("damped_inverse"))
_own_precondition = replace(_cuda_list("precondition"), refuses=_left_to_matmuls)
TABLE["precondition", "cuda"] = (_own_precondition, _reference("precondition"))
for _device in ("cpu", "cuda"):  # these Triton kernels wait for a record, too
    TABLE["damped_inverse", _device] += (_triton("damped_inverse", _device, _triton_inverse),)
    TABLE["precondition", _device] += (_triton("precondition", _device),)
TABLE["conv_window_sum", "cuda"] = (
    replace(_cuda("conv_window_sum"), run=_cuda_window_sum),
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

    No result is formed: ``explain("gram", x, bias=True)`` checks the arguments and reads the table.

    Args:
        op: Name of a function of :mod:`kfac_fast.ops`, or the function.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        A line for each implementation considered.

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
    """
    explanation = _explanation.get()
    if explanation is not None:
        explanation.extend(_describe(op, *args))
        return
    select(op, *args).run(*args)
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
    if _explanation.get() is None:
        row = _candidates(op, _device_type(args[0]))
        first = next((each for each in row if each.reason_against(*args) is None), None)
        if first is not None and first.quick and first.quick(*args) is not None:
            return
    schema.check(op, *args)
    schema.check_values(op, *args)
    run(op, *args)


for _op in schema.OPERATORS:
    schema.LIBRARY.impl(_op, partial(_route, _op), "CompositeExplicitAutograd")


# Of plain calls on the CPU.
QUICK_KERNELS = {op: k for op in schema.OPERATORS if (k := TABLE[op, "cpu"][0].quick) is not None}
_quick_call: Callable[[str, tuple[Any, ...]], Any] = (
    native.quick_calls(QUICK_KERNELS, LISTENERS, (_forced, _explanation))
    if EXTENSION_BUILT
    else lambda op, args: None
)


def quick(op: str, args: tuple[Any, ...]) -> Any:
    """Run an operator by the compiled kernel for the CPU, if the call is plain.

    The kernel checks the arguments, for each line of Python between it and the caller that has left
    the processor's caches costs as much as a small kernel's loop.

    Args:
        op: Name of the operator.
        args: Its dispatcher arguments; those of a geometry may be as in :mod:`kfac_fast.ops`.

    Returns:
        As :attr:`Implementation.quick`; None, too, if something listens at the dispatcher or
        another implementation is asked for.

    Raises:
        ValueError: If a geometry is refused.
        TypeError: If an option of one is of another type than its name asks for.
    """
    # Dynamo, which does not see what a compiled function does, must find this here.
    if is_compiling() or profiler._is_profiler_enabled:
        return None
    return _quick_call(op, args)


def call(op: str, *args: Any) -> None:
    """Check an operator's arguments and run it, by the dispatcher where that is needed.

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
