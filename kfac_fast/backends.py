"""The table of implementations and the choice between them.

Each (operator, device type) has its implementations in order of preference. Each implementation can
refuse a call with a sentence; the first that does not refuse serves it. Nothing is caught: a kernel
that fails raises.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeVar

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
    """

    name: str
    run: Callable[..., None]
    missing: str | None = None
    refuses: Callable[..., str | None] | None = None
    way: Callable[..., str] | None = None

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


def _native_conv(op: str, device: str) -> Implementation:
    """The compiled extension's kernel of a convolution, which takes a plan of its geometry."""

    def run(x: torch.Tensor, *arguments: Any) -> None:
        *geometry, bias, alpha, beta, out = arguments
        overload, plan, groups = _prepared(
            op, ConvGeometry.from_arguments(*geometry), tuple(x.shape)
        )
        overload(x, plan, groups, bias, alpha, beta, out)

    expand = op == "conv_expand_gram"
    missing = _missing("conv_offset_gram" if expand else op, device)
    name = "cpp" if device == "cpu" else "cuda"
    return Implementation(name, run, missing, way=_expand_way if expand else None)


@lru_cache(maxsize=1024)
def _prepared(
    op: str, geometry: ConvGeometry, shape: tuple[int, ...]
) -> tuple[Callable[..., None], torch.Tensor, int]:
    """The compiled kernel for an input of this shape, its plan and the groups."""
    kernel = conv_kernels.expand_kernel(geometry, shape) if op == "conv_expand_gram" else op
    overload = getattr(torch.ops.kfac_fast_native, kernel).default
    return overload, conv_kernels.plan(kernel, geometry, shape[2:]), geometry.groups


def _expand_way(x: torch.Tensor, *arguments: Any) -> str:
    *geometry, _, _, _, _ = arguments
    kernel = conv_kernels.expand_kernel(ConvGeometry.from_arguments(*geometry), tuple(x.shape))
    return conv_kernels.EXPAND_KERNELS[kernel]


def _triton(op: str, device: str) -> Implementation:
    """The Triton kernel; on CPU tensors it runs only under Triton's interpreter."""

    def kernels() -> ModuleType:  # at the first use, because Triton is slow to import
        return importlib.import_module(f"kfac_fast.kernels.{op}")

    def run(*args: Any) -> None:
        getattr(kernels(), op)(*args, precision=torch.get_float32_matmul_precision())

    def refuses(*args: Any) -> str | None:
        reason: str | None = kernels().refuses(*args)
        return reason

    missing = None
    if importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed"
    elif importlib.util.find_spec("kfac_fast.kernels") is None:
        missing = "kfac_fast.kernels is not installed: run `pip install --no-build-isolation .`"
    elif device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        missing = "Triton needs a GPU, or TRITON_INTERPRET=1 to interpret its kernels"
    return Implementation("triton", run, missing, refuses)


TABLE: dict[tuple[str, str], tuple[Implementation, ...]] = {
    (op, device): (_reference(op),)
    for op in schema.OPERATORS
    for device in ("cpu", "cuda", "mps", "xpu")
}
TABLE["gram", "cpu"] = (_native("gram", "cpu"), _reference("gram"), _triton("gram", "cpu"))
TABLE["shared_gram", "cpu"] = (_native("shared_gram", "cpu"), _reference("shared_gram"))
for _op in ("conv_expand_gram", "conv_reduce_gram", "conv_window_sum"):
    TABLE[_op, "cpu"] = (_native_conv(_op, "cpu"), _reference(_op))
TABLE["gram", "cuda"] = (_triton("gram", "cuda"), _native("gram", "cuda"), _reference("gram"))

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
        return first.device.type
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


def _router(op: str) -> Callable[..., None]:
    """The dispatcher's entry of an operator: check, choose, run."""

    def route(*args: Any) -> None:
        schema.check(op, *args)
        explanation = _explanation.get()
        if explanation is None:
            select(op, *args).run(*args)
        else:
            explanation.extend(_describe(op, *args))

    return route


for _op in schema.OPERATORS:
    schema.LIBRARY.impl(_op, _router(_op), "CompositeExplicitAutograd")
