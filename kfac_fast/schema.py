"""The table of operators: each one's dispatcher signature and the check of its arguments.

The check is all that is known about an operator without computing it. It is the fake (what
``torch.compile`` and ``opcheck`` see), what the router runs before any kernel, and, through
:func:`result_shape`, what tells :mod:`kfac_fast.ops` how much to allocate. Operators only mutate
``out`` and return nothing, so no fake ever invents a result.

``kfac_fast::<op>`` is the router of an operator. The compiled extension registers its CUDA kernels
in ``kfac_fast_native``: under the operator's own signature, or, for convolutions, one that takes a
plan of :mod:`kfac_fast.conv` instead of the geometry. Its CPU kernels are functions of
``kfac_fast._C``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kfac_fast.checks import check_device, check_out, refused, refused_dtype
from kfac_fast.conv import PADDING_MODES, ConvGeometry
from kfac_fast.list_checks import (
    check_averages,
    check_damped,
    check_eigh,
    check_mean_eigenvalues,
    check_precondition,
    check_symmetric,
)

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Shape = tuple[int, ...]


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a Gram matrix of ``dtype`` rows: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_KINDS: dict[str, tuple[type, ...]] = {
    "x": (Tensor,),
    "mask": (Tensor, type(None)),
    "segments": (Tensor, type(None)),
    "num_segments": (int, torch.SymInt, type(None)),
    "reduction": (str,),
    "groups": (int, torch.SymInt),
    "bias": (bool,),
    "transposed": (bool,),
    "gradient": (Tensor,),
    "mean": (Tensor, type(None)),
    "variance": (Tensor, type(None)),
    "num_groups": (int, torch.SymInt, type(None)),
    "eps": (float, int),
    "center": (bool,),
    "terms": (float, int, torch.SymInt, torch.SymFloat),
    "decay": (float, int, torch.SymFloat),
    "covariances": (bool,),
    "alpha": (float, int, torch.SymFloat),
    "beta": (float, int, torch.SymFloat),
    "out": (Tensor, type(None)),
}


def check_types(op: str, **arguments: object) -> None:
    """Check the types of a public function's arguments, which the dispatcher names less plainly.

    Args:
        op: Name of the operator.
        **arguments: Arguments by name.

    Raises:
        TypeError: If one is of another type than its name asks for.
    """
    for argument, value in arguments.items():
        if not isinstance(value, _KINDS[argument]):
            kinds = " or ".join(kind.__name__ for kind in _KINDS[argument])
            raise TypeError(f"{op}: {argument} must be {kinds}, got {type(value).__name__}")


# Accumulating operators: out <- beta * out + alpha * (...). Each has a function from the operator's
# name and its arguments before alpha, which it checks, to the shape of out.


def _stacked(groups: int, width: int) -> Shape:
    return (width, width) if groups == 1 else (groups, width, width)


def _check_floating(op: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        raise refused_dtype(op, "x", "float32, float64, bfloat16 or float16", x.dtype)


def _check_mask(op: str, x: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise refused_dtype(op, "mask", "bool", mask.dtype)
    if mask.shape != x.shape[:-1]:
        raise refused(op, "mask", f"of x's leading shape {tuple(x.shape[:-1])}", tuple(mask.shape))
    check_device(op, "mask", mask, x)


def _gram_shape(op: str, x: Tensor, mask: Tensor | None, groups: int, bias: bool) -> Shape:
    if x.dim() < 1:
        raise refused(op, "x", "[*, D]", "a scalar")
    _check_floating(op, x)
    _check_mask(op, x, mask)
    features = x.shape[-1]
    if groups < 1 or features % groups:
        raise refused(op, "groups", f"positive and divide x's {features} features", groups)
    return _stacked(groups, features // groups + bias)


def _check_segments(op: str, x: Tensor, segments: Tensor | None, num_segments: int) -> None:
    if segments is None:
        if num_segments != -1:
            raise refused(op, "num_segments", "left out without segments", num_segments)
        return
    if x.dim() != 2:
        raise refused(op, "x", "[R, D] with segments", f"{x.dim()}-d")
    if segments.shape != x.shape[:1]:
        raise refused(op, "segments", f"of shape ({x.shape[0]},)", tuple(segments.shape))
    if segments.dtype != torch.int64:
        raise refused_dtype(op, "segments", "int64", segments.dtype)
    if num_segments < 0:
        raise refused(op, "num_segments", "given with segments and not negative", num_segments)
    check_device(op, "segments", segments, x)


def _check_segment_values(
    op: str, x: Tensor, mask: Tensor | None, segments: Tensor | None, num_segments: int, *_: object
) -> None:
    if segments is None or not segments.is_cpu:
        return  # the host would wait for the device
    beyond = segments[(segments < 0) | (segments >= num_segments)]
    if len(beyond):
        raise refused(op, "segments", f"in [0, {num_segments})", beyond[0].item())


def _check_norm_segments(op: str, x: Tensor, gradient: Tensor, *arguments: Any) -> None:
    _check_segment_values(op, x, *arguments)


def _shared_gram_shape(
    op: str,
    x: Tensor,
    mask: Tensor | None,
    segments: Tensor | None,
    num_segments: int,
    reduction: str,
    groups: int,
    bias: bool,
) -> Shape:
    if x.dim() < 2:
        raise refused(op, "x", "[N, *shared, D], or [R, D] with segments", f"{x.dim()}-d")
    if reduction not in ("mean", "sum"):
        raise refused(op, "reduction", "'mean' or 'sum'", repr(reduction))
    _check_segments(op, x, segments, num_segments)
    return _gram_shape(op, x, mask, groups, bias)


def _check_conv(op: str, shape: Shape, geometry: ConvGeometry) -> None:
    if len(shape) != geometry.dimensions + 2:
        expected = f"[N, C, *spatial] with {geometry.dimensions} spatial dimensions"
        raise refused(op, "x", expected, f"{len(shape)}-d")
    if geometry.groups < 1 or shape[1] % geometry.groups:
        raise refused(op, "groups", f"positive and divide x's {shape[1]} channels", geometry.groups)
    for argument, least in (
        ("kernel_size", 1),
        ("stride", 1),
        ("dilation", 1),
        ("padding", 0),
        ("output_padding", 0),
    ):
        values = getattr(geometry, argument)
        if min(values) < least:
            raise refused(op, argument, f"at least {least}", values)
    if geometry.padding_mode not in PADDING_MODES:
        raise refused(op, "padding_mode", f"one of {PADDING_MODES}", repr(geometry.padding_mode))
    _check_transposed(op, geometry)
    _check_padding(op, shape[2:], geometry)
    if min(geometry.output_size(shape[2:])) < 1:
        span = f"kernel_size {geometry.kernel_size} with dilation {geometry.dilation}"
        framed = geometry.framed_size(shape[2:])
        raise refused(op, "the padded input", f"as large as {span}", framed)


def _check_transposed(op: str, geometry: ConvGeometry) -> None:
    """Check the options that only one of convolution and transposed convolution has."""
    extra = geometry.output_padding
    if not geometry.transposed:
        if any(extra):
            raise refused(op, "output_padding", "0 unless transposed", extra)
        return
    if geometry.padding_mode != "zeros":
        raise refused(op, "padding_mode", "'zeros' if transposed", repr(geometry.padding_mode))
    limits = [max(pair) for pair in zip(geometry.stride, geometry.dilation, strict=True)]
    if any(more and more >= limit for more, limit in zip(extra, limits, strict=True)):
        raise refused(op, "output_padding", f"below stride or dilation, {tuple(limits)}", extra)


def _check_padding(op: str, size: Shape, geometry: ConvGeometry) -> None:
    """Check that the padding modes that copy pixels have enough of them."""
    sides = [(n, pad) for n, pad in zip(_twice(size), geometry.padding, strict=True) if pad]
    if geometry.padding_mode == "reflect" and any(pad >= n for n, pad in sides):
        raise refused(op, "padding", f"below the input's {size}", geometry.padding)
    if geometry.padding_mode == "circular" and any(pad > n for n, pad in sides):
        raise refused(op, "padding", f"at most the input's {size}", geometry.padding)
    if geometry.padding_mode == "replicate" and any(n < 1 for n, _ in sides):
        raise refused(op, "x", "not empty in space to be replicated", size)


def _twice(values: Sequence[int]) -> list[int]:
    return [value for value in values for _ in range(2)]


def hashable(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Dispatcher arguments to look a kept result up by: the dispatcher's lists as tuples."""
    return tuple(tuple(value) if type(value) is list else value for value in arguments)


def conv_shape(op: str, shape: Shape, *arguments: Any) -> Shape:
    """Shape of a factor of a convolution.

    Args:
        op: Name of the operator.
        shape: Shape of ``x``.
        *arguments: As :func:`conv_arguments` returns them, which are checked on the way.

    Returns:
        The shape.

    Raises:
        ValueError: If the geometry and ``shape`` do not go together.
    """
    *geometry_arguments, bias = arguments
    geometry = ConvGeometry.from_arguments(*geometry_arguments)
    _check_conv(op, shape, geometry)
    return _stacked(geometry.groups, geometry.features(shape[1]) + bias)


# What passed once passes again. Symbolic sizes, which fakes have, and the compiler's are not kept.
_kept_conv_shape = lru_cache(maxsize=1024)(conv_shape)


def _conv_gram_shape(op: str, x: Tensor, *arguments: Any) -> Shape:
    _check_floating(op, x)
    kept = type(x) is Tensor and not torch.compiler.is_compiling()
    shape = _kept_conv_shape if kept else conv_shape
    return shape(op, tuple(x.shape), *hashable(arguments))


def _window_sum_shape(op: str, x: Tensor, *arguments: Any) -> Shape:
    *groups, width, _ = _conv_gram_shape(op, x, *arguments)
    return (x.shape[0], *groups, width)


def _check_norm(op: str, x: Tensor, gradient: Tensor, eps: float) -> None:
    _check_floating(op, x)
    if gradient.shape != x.shape:
        raise refused(op, "gradient", f"of x's shape {tuple(x.shape)}", tuple(gradient.shape))
    if gradient.dtype != x.dtype:
        raise refused_dtype(op, "gradient", f"{x.dtype} like x", gradient.dtype)
    check_device(op, "gradient", gradient, x)
    if not 0 <= eps < math.inf:
        raise refused(op, "eps", "finite and not negative", eps)


def _feature_norm_shape(
    op: str,
    x: Tensor,
    gradient: Tensor,
    mask: Tensor | None,
    segments: Tensor | None,
    num_segments: int,
    eps: float,
    center: bool,
    bias: bool,
) -> Shape:
    if x.dim() < 2:
        raise refused(op, "x", "[N, *shared, D], or [R, D] with segments", f"{x.dim()}-d")
    _check_segments(op, x, segments, num_segments)
    _check_norm(op, x, gradient, eps)
    _check_mask(op, x, mask)
    return (x.shape[-1], 1 + bias, 1 + bias)


def _channel_norm_shape(
    op: str,
    x: Tensor,
    gradient: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    num_groups: int,
    eps: float,
    bias: bool,
) -> Shape:
    if x.dim() < 2:
        raise refused(op, "x", "[N, C, *spatial]", f"{x.dim()}-d")
    _check_norm(op, x, gradient, eps)
    channels = x.shape[1]
    if num_groups != -1 and (num_groups < 1 or channels % num_groups):
        raise refused(op, "num_groups", f"positive and divide x's {channels} channels", num_groups)
    if (mean is None) != (variance is None):
        raise refused(op, "variance", "given with mean, and not without", "only one of them")
    if mean is not None and num_groups != -1:
        raise refused(op, "mean", "None with num_groups", "both")
    for argument, value in (("mean", mean), ("variance", variance)):
        if value is None:
            continue
        if tuple(value.shape) != (channels,):
            raise refused(op, argument, f"of shape ({channels},)", tuple(value.shape))
        if value.dtype != result_dtype(x.dtype):
            raise refused_dtype(op, argument, result_dtype(x.dtype), value.dtype)
        check_device(op, argument, value, x)
    return (channels, 1 + bias, 1 + bias)


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    Attributes:
        arguments: The dispatcher signature between its parentheses.
        check: Called with the operator's name and dispatcher arguments; raises where they are
            refused.
        written: Position of the first argument that is written; all after it are, too.
        shape: For accumulating operators, the shape of ``out`` from the arguments before ``alpha``.
        check_values: Called after ``check``, the same way, where tensors have values. None if any
            will do.
    """

    arguments: str
    check: Callable[..., None]
    written: int
    shape: Callable[..., Shape] | None = None
    check_values: Callable[..., None] | None = None


def _accumulating(
    arguments: str, shape: Callable[..., Shape], check_values: Callable[..., None] | None = None
) -> Operator:
    def check(op: str, *args: Any) -> None:
        *inputs, _, _, out = args
        dtype = result_dtype(inputs[0].dtype)
        check_out(op, "out", out, shape(op, *inputs), dtype, inputs)

    signature = f"{arguments}, float alpha, float beta, Tensor(a!) out"
    return Operator(signature, check, -1, shape, check_values)


_CONV = (
    "Tensor x, int[] kernel_size, int[] stride, int[] padding, str padding_mode, int[] dilation, "
    "int groups, bool transposed, int[] output_padding, bool bias"
)
_DAMPED = (
    "Tensor[] matrices, Tensor[] damping, Tensor(a!)[] out, Tensor(b!) info, Tensor(c!)? logdet"
)
_SIDES = (
    "Tensor[] grads, Tensor[] input_sides, Tensor[] gradient_sides, "
    "Tensor(a!)[] out, Tensor(b!) inner"
)
_AVERAGES = (
    "Tensor[] sums, float[] terms, float decay, bool covariances, "
    "Tensor(a!)[] out, Tensor(b!)[] weights, Tensor(c!)[] skipped"
)

OPERATORS: dict[str, Operator] = {
    "gram": _accumulating("Tensor x, Tensor? mask, int groups, bool bias", _gram_shape),
    "shared_gram": _accumulating(
        "Tensor x, Tensor? mask, Tensor? segments, int num_segments, str reduction, int groups, "
        "bool bias",
        _shared_gram_shape,
        _check_segment_values,
    ),
    "conv_expand_gram": _accumulating(_CONV, _conv_gram_shape),
    "conv_reduce_gram": _accumulating(_CONV, _conv_gram_shape),
    "conv_window_sum": _accumulating(_CONV, _window_sum_shape),
    "feature_norm_gram": _accumulating(
        "Tensor x, Tensor gradient, Tensor? mask, Tensor? segments, int num_segments, float eps, "
        "bool center, bool bias",
        _feature_norm_shape,
        _check_norm_segments,
    ),
    "channel_norm_gram": _accumulating(
        "Tensor x, Tensor gradient, Tensor? mean, Tensor? variance, int num_groups, float eps, "
        "bool bias",
        _channel_norm_shape,
    ),
    "mean_eigenvalues": Operator("Tensor[] matrices, Tensor(a!) out", check_mean_eigenvalues, 1),
    "update_averages": Operator(_AVERAGES, check_averages, 4),
    "eigh": Operator(
        "Tensor[] matrices, Tensor(a!)[] values, Tensor(b!)[] vectors, Tensor(c!) info",
        check_eigh,
        1,
    ),
    "damped_inverse": Operator(_DAMPED, check_damped, 2, check_values=check_symmetric),
    "damped_cholesky": Operator(_DAMPED, check_damped, 2, check_values=check_symmetric),
    "precondition": Operator(_SIDES, check_precondition, 3),
    "cholesky_precondition": Operator(_SIDES, check_precondition, 3),
}


def check(op: str, *args: Any) -> None:
    """Check an operator's dispatcher arguments.

    Raises:
        ValueError: If a shape, a device, an option or the memory of ``out`` is refused.
        TypeError: If a dtype is refused.
    """
    OPERATORS[op].check(op, *args)


def check_values(op: str, *args: Any) -> None:
    """Check what fakes do not have: values in an operator's arguments that have passed the check.

    Raises:
        ValueError: If on the CPU a matrix is not symmetric up to rounding, or a segment not there.
    """
    row = OPERATORS[op]
    if row.check_values is not None:
        row.check_values(op, *args)


def result_shape(op: str, *inputs: Any) -> Shape:
    """Shape of an accumulating operator's result.

    Args:
        op: Name of the operator.
        *inputs: Its arguments before ``alpha``, which are checked on the way.

    Returns:
        The shape of ``out``.

    Raises:
        ValueError: If the operator does not accumulate, or an argument is refused.
    """
    shape = OPERATORS[op].shape
    if shape is None:
        raise ValueError(f"result_shape: op must be an accumulating operator, got {op!r}")
    return shape(op, *inputs)


def conv_arguments(op: str, rank: int, bias: bool, *geometry: Any) -> tuple[Any, ...]:
    """Dispatcher arguments of a convolution operator after ``x`` and before ``alpha``.

    Args:
        op: Name of the operator.
        rank: Dimensions of ``x``.
        bias: Whether a 1 is appended to every patch.
        *geometry: The arguments of :meth:`ConvGeometry.normalize` from ``kernel_size`` on.

    Returns:
        The arguments.

    Raises:
        ValueError: If ``rank`` or a value is refused.
        TypeError: If a value is of another type than its name asks for.
    """
    *_, groups, transposed, _ = geometry
    check_types(op, groups=groups, transposed=transposed, bias=bias)
    if rank < 3 or rank > 5:
        raise ValueError(
            f"{op}: x must be [N, C, *spatial] with 1 to 3 spatial dimensions, got {rank}-d"
        )
    return (*ConvGeometry.normalize(op, rank - 2, *geometry).arguments(), bias)


# The compiled extension's CUDA kernels.
NATIVE: dict[str, str] = {
    "gram": f"({OPERATORS['gram'].arguments}) -> ()",
    # The number of cells and of taps of each axis, which the host needs, beside the plan.
    "conv_window_sum": "(Tensor x, Tensor plan, int[] cells, int[] taps, int groups, bool bias, "
    "float alpha, float beta, Tensor(a!) out) -> ()",
    # Long lists are checked by the kernels, which refuse by False.
    "damped_inverse": f"({_DAMPED}) -> bool",
    "precondition": f"({_SIDES}) -> bool",
}


def _define(
    namespace: str, signatures: dict[str, str], fakes: dict[str, Callable[..., Any]]
) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for op, signature in signatures.items():
        library.define(op + signature, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{op}", fakes[op], lib=library)
    return library


def _fake(op: str) -> Callable[..., None]:
    return lambda *args: check(op, *args)


LIBRARY = _define(
    "kfac_fast",
    {op: f"({row.arguments}) -> ()" for op, row in OPERATORS.items()},
    {op: _fake(op) for op in OPERATORS},
)


def _native_fake(signature: str) -> Callable[..., bool | None]:
    result = True if signature.endswith("bool") else None  # the router has checked the arguments
    return lambda *args: result


NATIVE_LIBRARY = _define(
    "kfac_fast_native",
    NATIVE,
    {op: _native_fake(signature) for op, signature in NATIVE.items()},
)
