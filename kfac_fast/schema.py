"""The table of operators: each one's dispatcher signature and the check of its arguments.

The check is all that is known about an operator without computing it. It is the fake (what ``torch.compile`` and ``opcheck`` see),
what the router runs before any kernel, and, through :func:`result_shape`, what tells :mod:`kfac_fast.ops` how much to allocate.
Operators only mutate ``out`` and return nothing, so no fake ever invents a result.

Every operator is defined twice from its row: ``kfac_fast::<op>`` is the router, ``kfac_fast_native::<op>`` is where the compiled
extension registers its kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_fast.conv import PADDING_MODES, ConvGeometry

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a Gram matrix of ``dtype`` rows: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_floating(op: str, argument: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: {argument} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def _check_mask(op: str, mask: Tensor | None, x: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool, got {mask.dtype}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"{op}: mask must have x's leading shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
    _check_device(op, "mask", mask, x)


def _check_device(op: str, argument: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{op}: {argument} must be on {x.device} like the other tensors, got {tensor.device}")


def _check_groups(op: str, groups: int, channels: int, argument: str) -> None:
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"{op}: groups must be positive and divide {argument} = {channels}, got {groups}")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last byte of its storage that the tensor uses."""
    start = tensor.storage_offset()
    last = start + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start * tensor.element_size(), (last + 1) * tensor.element_size()


def _check_out(op: str, argument: str, out: Tensor, shape: Sequence[int], dtype: torch.dtype, inputs: Sequence[Any]) -> None:
    """Check what ``out`` must be: exact shape and dtype, contiguous, on the inputs' device, sharing no memory with them."""
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"{op}: {argument} must have shape {tuple(shape)}, got {tuple(out.shape)}")
    if out.dtype != dtype:
        raise TypeError(f"{op}: {argument} must be {dtype}, got {out.dtype}")
    if not out.is_contiguous():
        raise ValueError(f"{op}: {argument} must be contiguous, got strides {out.stride()}")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {argument} must not require a gradient: the operators are not differentiable")
    for tensor in inputs:
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device != out.device:
            raise ValueError(f"{op}: {argument} must be on {tensor.device} like the other tensors, got {out.device}")
        if torch._C._is_alias_of(out, tensor) and out.numel() and tensor.numel():
            (start, stop), (first, last) = _span(out), _span(tensor)
            if start < last and first < stop:
                raise ValueError(f"{op}: {argument} must not overlap the memory of an input, got a view of one")


# Accumulating operators: out <- beta * out + alpha * (...). Each has a function (op, *arguments before alpha) -> shape of out.


def _square(groups: int, width: int) -> tuple[int, ...]:
    return (width, width) if groups == 1 else (groups, width, width)


def _gram_shape(op: str, x: Tensor, mask: Tensor | None, groups: int, bias: bool) -> tuple[int, ...]:
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be [*, D], got a scalar")
    _check_floating(op, "x", x)
    _check_mask(op, mask, x)
    features = x.shape[-1]
    if groups != 1:
        _check_groups(op, groups, features, "x.shape[-1]")
    return _square(groups, features // groups + bias)


def _shared_gram_shape(
    op: str,
    x: Tensor,
    mask: Tensor | None,
    segments: Tensor | None,
    num_segments: int,
    reduction: str,
    groups: int,
    bias: bool,
) -> tuple[int, ...]:
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be [N, *shared, D], or [R, D] with segments, got {x.dim()}-d")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'mean' or 'sum', got {reduction!r}")
    if segments is not None:
        if x.dim() != 2 or segments.shape != x.shape[:1]:
            got = f"{tuple(x.shape)} and {tuple(segments.shape)}"
            raise ValueError(f"{op}: with segments, x must be [R, D] and segments [R], got {got}")
        if segments.dtype != torch.int64:
            raise TypeError(f"{op}: segments must be int64, got {segments.dtype}")
        if num_segments < 0:
            raise ValueError(f"{op}: num_segments must be given with segments and not negative, got {num_segments}")
        _check_device(op, "segments", segments, x)
    return _gram_shape(op, x, mask, groups, bias)


def _check_conv(op: str, x: Tensor, geometry: ConvGeometry) -> None:
    dimensions = geometry.dimensions
    if x.dim() != dimensions + 2:
        spatial = ", ".join("DHW"[3 - dimensions :])
        raise ValueError(f"{op}: x must be [N, C, {spatial}] for {dimensions} kernel sizes, got {x.dim()}-d")
    _check_floating(op, "x", x)
    _check_groups(op, geometry.groups, x.shape[1], "the channels of x")
    for argument in ("kernel_size", "stride", "dilation"):
        value = getattr(geometry, argument)
        if min(value) < 1:
            raise ValueError(f"{op}: {argument} must be positive, got {value}")
    if min(geometry.padding) < 0 or min(geometry.output_padding) < 0:
        raise ValueError(
            f"{op}: padding and output_padding must not be negative, got {geometry.padding} and {geometry.output_padding}"
        )
    if geometry.padding_mode not in PADDING_MODES:
        raise ValueError(f"{op}: padding_mode must be one of {PADDING_MODES}, got {geometry.padding_mode!r}")
    _check_padding(op, x, geometry)
    if min(geometry.output_size(x.shape[2:])) < 1:
        raise ValueError(
            f"{op}: kernel_size {geometry.kernel_size} with dilation {geometry.dilation} must fit the padded input, "
            f"got {geometry.framed_size(x.shape[2:])}"
        )


def _check_padding(op: str, x: Tensor, geometry: ConvGeometry) -> None:
    """Check what the padding mode and the transposed form demand of the padding."""
    size = [n for n in x.shape[2:] for _ in range(2)]
    if geometry.transposed and geometry.padding_mode != "zeros":
        raise ValueError(f"{op}: padding_mode must be 'zeros' for a transposed convolution, got {geometry.padding_mode!r}")
    if not geometry.transposed and any(geometry.output_padding):
        raise ValueError(f"{op}: output_padding needs transposed=True, got {geometry.output_padding}")
    limits = zip(geometry.output_padding, geometry.stride, geometry.dilation, strict=True)
    if any(extra and extra >= max(step, spread) for extra, step, spread in limits):
        raise ValueError(
            f"{op}: output_padding must be smaller than stride or dilation, got {geometry.output_padding} "
            f"with stride {geometry.stride} and dilation {geometry.dilation}"
        )
    if geometry.padding_mode == "reflect" and any(p >= n for p, n in zip(geometry.padding, size, strict=True) if p):
        raise ValueError(f"{op}: padding must be smaller than the input for 'reflect', got {geometry.padding} for {size}")
    if geometry.padding_mode == "circular" and any(p > n for p, n in zip(geometry.padding, size, strict=True)):
        raise ValueError(f"{op}: padding must not exceed the input for 'circular', got {geometry.padding} for {size}")


def _conv_gram_shape(op: str, x: Tensor, *arguments: Any) -> tuple[int, ...]:
    *geometry_arguments, bias = arguments
    geometry = ConvGeometry.from_arguments(*geometry_arguments)
    _check_conv(op, x, geometry)
    return _square(geometry.groups, geometry.features(x.shape[1]) + bias)


def _window_sum_shape(op: str, x: Tensor, *arguments: Any) -> tuple[int, ...]:
    *groups, width, _ = _conv_gram_shape(op, x, *arguments)
    return (x.shape[0], *groups, width)


# Operators on lists of matrices of mixed shapes.


def _check_squares(op: str, argument: str, matrices: Sequence[Tensor], like: Tensor) -> None:
    for i, matrix in enumerate(matrices):
        if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise ValueError(f"{op}: {argument}[{i}] must be [*, n, n], got {tuple(matrix.shape)}")
        if matrix.dtype != like.dtype or matrix.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {argument} must all be float32 or all float64, got {matrix.dtype} at {i}")
        _check_device(op, f"{argument}[{i}]", matrix, like)


def _check_length(op: str, argument: str, values: Sequence[Tensor], expected: int) -> None:
    if len(values) != expected:
        raise ValueError(f"{op}: {argument} must hold {expected} tensors, got {len(values)}")


def number_of_matrices(matrices: Sequence[Tensor]) -> int:
    """How many square matrices a list of stacked batches ``[*, n, n]`` holds."""
    return sum(math.prod(matrix.shape[:-2]) for matrix in matrices)


def _check_damped(
    op: str,
    matrices: Sequence[Tensor],
    damping: Sequence[Tensor],
    out: Sequence[Tensor],
    info: Tensor,
    logdet: Tensor | None,
) -> None:
    if not matrices:
        return
    like = matrices[0]
    _check_squares(op, "matrices", matrices, like)
    _check_length(op, "damping", damping, len(matrices))
    _check_length(op, "out", out, len(matrices))
    for i, (matrix, shift) in enumerate(zip(matrices, damping, strict=True)):
        batch = tuple(matrix.shape[:-2])
        if shift.dim() != 0 and tuple(shift.shape) != batch:
            raise ValueError(f"{op}: damping[{i}] must be a scalar or of shape {batch}, got {tuple(shift.shape)}")
        if shift.dtype != matrix.dtype:
            raise TypeError(f"{op}: damping[{i}] must be {matrix.dtype}, got {shift.dtype}")
        _check_device(op, f"damping[{i}]", shift, like)
        _check_out(op, f"out[{i}]", out[i], matrix.shape, matrix.dtype, matrices)
    total = (number_of_matrices(matrices),)
    _check_out(op, "info", info, total, torch.int32, [like])
    if logdet is not None:
        _check_out(op, "logdet", logdet, total, like.dtype, [like])


def _check_precondition(
    op: str,
    grads: Sequence[Tensor],
    input_sides: Sequence[Tensor],
    gradient_sides: Sequence[Tensor],
    out: Sequence[Tensor],
    inner: Tensor,
) -> None:
    if not grads:
        return
    like = grads[0]
    names = ("input", "gradient", "out")
    for argument, values in zip(names, (input_sides, gradient_sides, out), strict=True):
        _check_length(op, argument, values, len(grads))
    _check_squares(op, "input side", input_sides, like)
    _check_squares(op, "gradient side", gradient_sides, like)
    for i, (grad, right, left) in enumerate(zip(grads, input_sides, gradient_sides, strict=True)):
        if grad.dim() < 2 or grad.dtype != like.dtype:
            raise ValueError(f"{op}: grads[{i}] must be [*, out, in] and {like.dtype}, got {grad.dim()}-d {grad.dtype}")
        batch, (rows, columns) = grad.shape[:-2], grad.shape[-2:]
        if right.shape != (*batch, columns, columns) or left.shape != (*batch, rows, rows):
            raise ValueError(
                f"{op}: for grads[{i}] {tuple(grad.shape)} the input side must be {(*batch, columns, columns)} and the "
                f"gradient side {(*batch, rows, rows)}, got {tuple(right.shape)} and {tuple(left.shape)}"
            )
        _check_out(op, f"out[{i}]", out[i], grad.shape, grad.dtype, [*grads, *input_sides, *gradient_sides])
    _check_out(op, "inner", inner, (), like.dtype, [like])


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    Attributes:
        arguments: The dispatcher signature between its parentheses.
        check: Called with the operator's name and dispatcher arguments; raises where they are refused.
        shape: For accumulating operators, the shape of ``out`` from the arguments before ``alpha``.
    """

    arguments: str
    check: Callable[..., None]
    shape: Callable[..., tuple[int, ...]] | None = None


def _accumulating(arguments: str, shape: Callable[..., tuple[int, ...]]) -> Operator:
    def check(op: str, *args: Any) -> None:
        *inputs, _, _, out = args
        _check_out(op, "out", out, shape(op, *inputs), result_dtype(inputs[0].dtype), inputs)

    return Operator(f"{arguments}, float alpha, float beta, Tensor(a!) out", check, shape)


_CONV = (
    "Tensor x, int[] kernel_size, int[] stride, int[] padding, str padding_mode, int[] dilation, int groups, "
    "bool transposed, int[] output_padding, bool bias"
)
_DAMPED = "Tensor[] matrices, Tensor[] damping, Tensor(a!)[] out, Tensor(b!) info, Tensor(c!)? logdet"
_SIDES = "Tensor[] grads, Tensor[] input_sides, Tensor[] gradient_sides, Tensor(a!)[] out, Tensor(b!) inner"

OPERATORS: dict[str, Operator] = {
    "gram": _accumulating("Tensor x, Tensor? mask, int groups, bool bias", _gram_shape),
    "shared_gram": _accumulating(
        "Tensor x, Tensor? mask, Tensor? segments, int num_segments, str reduction, int groups, bool bias",
        _shared_gram_shape,
    ),
    "conv_expand_gram": _accumulating(_CONV, _conv_gram_shape),
    "conv_reduce_gram": _accumulating(_CONV, _conv_gram_shape),
    "conv_window_sum": _accumulating(_CONV, _window_sum_shape),
    "damped_inverse": Operator(_DAMPED, _check_damped),
    "damped_cholesky": Operator(_DAMPED, _check_damped),
    "precondition": Operator(_SIDES, _check_precondition),
    "cholesky_precondition": Operator(_SIDES, _check_precondition),
}


def check(op: str, *args: Any) -> None:
    """Check an operator's dispatcher arguments.

    Raises:
        ValueError: If a shape, a device, an option or the memory of ``out`` is refused.
        TypeError: If a dtype is refused.
    """
    OPERATORS[op].check(op, *args)


def result_shape(op: str, *inputs: Any) -> tuple[int, ...]:
    """Shape of an accumulating operator's result, from its arguments before ``alpha``; these are checked on the way."""
    shape = OPERATORS[op].shape
    if shape is None:
        raise ValueError(f"result_shape: op must be an accumulating operator, got {op!r}")
    return shape(op, *inputs)


def _define() -> tuple[torch.library.Library, torch.library.Library]:
    """Define every row as ``kfac_fast::<op>`` and ``kfac_fast_native::<op>``; their fake is the check."""
    libraries = torch.library.Library("kfac_fast", "DEF"), torch.library.Library("kfac_fast_native", "DEF")
    for op, row in OPERATORS.items():
        for library in libraries:
            library.define(f"{op}({row.arguments}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{library.ns}::{op}", _fake(op), lib=library)
    return libraries


def _fake(op: str) -> Callable[..., None]:
    return lambda *args: check(op, *args)


LIBRARY, NATIVE_LIBRARY = _define()
