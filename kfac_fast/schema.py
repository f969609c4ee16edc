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

from kfac_fast.conv import PADDING_MODES, ConvGeometry

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Shape = tuple[int, ...]


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a Gram matrix of ``dtype`` rows: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _refused(op: str, argument: str, expected: object, got: object) -> ValueError:
    return ValueError(f"{op}: {argument} must be {expected}, got {got}")


def _refused_dtype(op: str, argument: str, expected: object, got: object) -> TypeError:
    return TypeError(f"{op}: {argument} must be {expected}, got {got}")


def _check_device(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise _refused(op, argument, f"on {like.device} like the other tensors", tensor.device)


def _used_bytes(tensor: Tensor) -> tuple[int, int]:
    """First byte that the tensor uses and the one after the last, counted as in :func:`_place`."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    size = tensor.element_size()
    first = tensor.data_ptr() if _has_memory(tensor) else int(tensor.storage_offset()) * size
    last = first + size * sum((size - 1) * stride for size, stride in steps)
    return first, last + size


def _has_memory(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the spans of a contiguous tensor and of another one share memory."""
    if not a.numel() or not b.numel():
        return False
    if _has_memory(a) and _has_memory(b):
        # Two storages may stand for the same memory, as two tensors from one NumPy array do.
        place, storage = a.data_ptr(), b.untyped_storage()
        start = storage.data_ptr()
        if place + a.nbytes <= start or start + storage.nbytes() <= place:
            return False
    elif not torch._C._is_alias_of(a, b):  # type: ignore[attr-defined]
        return False
    (start, stop), (first, last) = _used_bytes(a), _used_bytes(b)
    return start < last and first < stop


def _place(tensor: Tensor) -> int:
    """What the bytes of :func:`_used_bytes` count in: the one memory, or a storage."""
    return 0 if _has_memory(tensor) else tensor.untyped_storage()._cdata


def _check_out(
    op: str, argument: str, out: Tensor, shape: Shape, dtype: torch.dtype, inputs: Sequence[Any]
) -> None:
    if out.shape != shape:
        raise _refused(op, argument, f"of shape {shape}", tuple(out.shape))
    if out.dtype != dtype:
        raise _refused_dtype(op, argument, dtype, out.dtype)
    if not out.is_contiguous():
        raise _refused(op, argument, "contiguous", f"strides {out.stride()}")
    if out.requires_grad:
        raise _refused(
            op, argument, "detached, for no operator is differentiable", "a leaf or graph"
        )
    for tensor in inputs:
        if isinstance(tensor, Tensor):
            _check_device(op, argument, out, tensor)
            if _overlap(out, tensor):
                raise _refused(op, argument, "apart from the inputs' memory", "an overlap")


def _check_apart(op: str, out: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Check that no output overlaps an input or another output, in one pass over sorted spans."""
    spans = sorted(
        (_place(tensor), *_used_bytes(tensor), i < len(out))
        for i, tensor in enumerate([*out, *inputs])
        if tensor.numel()
    )
    storage = used = written = 0
    for place, start, stop, is_out in spans:
        if place != storage:
            storage, used, written = place, 0, 0
        if start < (used if is_out else written):
            raise _refused(op, "out", "apart from all other memory", "an overlap")
        used = max(used, stop)
        written = max(written, stop) if is_out else written


_KINDS: dict[str, tuple[type, ...]] = {
    "x": (Tensor,),
    "mask": (Tensor, type(None)),
    "segments": (Tensor, type(None)),
    "num_segments": (int, torch.SymInt, type(None)),
    "reduction": (str,),
    "groups": (int, torch.SymInt),
    "bias": (bool,),
    "transposed": (bool,),
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


def _gram_shape(op: str, x: Tensor, mask: Tensor | None, groups: int, bias: bool) -> Shape:
    if x.dim() < 1:
        raise _refused(op, "x", "[*, D]", "a scalar")
    if x.dtype not in FLOATING:
        raise _refused_dtype(op, "x", "float32, float64, bfloat16 or float16", x.dtype)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise _refused_dtype(op, "mask", "bool", mask.dtype)
        if mask.shape != x.shape[:-1]:
            raise _refused(
                op, "mask", f"of x's leading shape {tuple(x.shape[:-1])}", tuple(mask.shape)
            )
        _check_device(op, "mask", mask, x)
    features = x.shape[-1]
    if groups < 1 or features % groups:
        raise _refused(op, "groups", f"positive and divide x's {features} features", groups)
    return _stacked(groups, features // groups + bias)


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
        raise _refused(op, "x", "[N, *shared, D], or [R, D] with segments", f"{x.dim()}-d")
    if reduction not in ("mean", "sum"):
        raise _refused(op, "reduction", "'mean' or 'sum'", repr(reduction))
    if segments is not None:
        if x.dim() != 2:
            raise _refused(op, "x", "[R, D] with segments", f"{x.dim()}-d")
        if segments.shape != x.shape[:1]:
            raise _refused(op, "segments", f"of shape ({x.shape[0]},)", tuple(segments.shape))
        if segments.dtype != torch.int64:
            raise _refused_dtype(op, "segments", "int64", segments.dtype)
        if num_segments < 0:
            raise _refused(op, "num_segments", "given with segments and not negative", num_segments)
        _check_device(op, "segments", segments, x)
    elif num_segments != -1:
        raise _refused(op, "num_segments", "left out without segments", num_segments)
    return _gram_shape(op, x, mask, groups, bias)


def _check_conv(op: str, shape: Shape, geometry: ConvGeometry) -> None:
    if len(shape) != geometry.dimensions + 2:
        expected = f"[N, C, *spatial] with {geometry.dimensions} spatial dimensions"
        raise _refused(op, "x", expected, f"{len(shape)}-d")
    if geometry.groups < 1 or shape[1] % geometry.groups:
        raise _refused(
            op, "groups", f"positive and divide x's {shape[1]} channels", geometry.groups
        )
    for argument, least in (
        ("kernel_size", 1),
        ("stride", 1),
        ("dilation", 1),
        ("padding", 0),
        ("output_padding", 0),
    ):
        values = getattr(geometry, argument)
        if min(values) < least:
            raise _refused(op, argument, f"at least {least}", values)
    if geometry.padding_mode not in PADDING_MODES:
        raise _refused(op, "padding_mode", f"one of {PADDING_MODES}", repr(geometry.padding_mode))
    _check_transposed(op, geometry)
    _check_padding(op, shape[2:], geometry)
    if min(geometry.output_size(shape[2:])) < 1:
        span = f"kernel_size {geometry.kernel_size} with dilation {geometry.dilation}"
        framed = geometry.framed_size(shape[2:])
        raise _refused(op, "the padded input", f"as large as {span}", framed)


def _check_transposed(op: str, geometry: ConvGeometry) -> None:
    """Check the options that only one of convolution and transposed convolution has."""
    extra = geometry.output_padding
    if not geometry.transposed:
        if any(extra):
            raise _refused(op, "output_padding", "0 unless transposed", extra)
        return
    if geometry.padding_mode != "zeros":
        raise _refused(op, "padding_mode", "'zeros' if transposed", repr(geometry.padding_mode))
    limits = [max(pair) for pair in zip(geometry.stride, geometry.dilation, strict=True)]
    if any(more and more >= limit for more, limit in zip(extra, limits, strict=True)):
        raise _refused(op, "output_padding", f"below stride or dilation, {tuple(limits)}", extra)


def _check_padding(op: str, size: Shape, geometry: ConvGeometry) -> None:
    """Check that the padding modes that copy pixels have enough of them."""
    sides = [(n, pad) for n, pad in zip(_twice(size), geometry.padding, strict=True) if pad]
    if geometry.padding_mode == "reflect" and any(pad >= n for n, pad in sides):
        raise _refused(op, "padding", f"below the input's {size}", geometry.padding)
    if geometry.padding_mode == "circular" and any(pad > n for n, pad in sides):
        raise _refused(op, "padding", f"at most the input's {size}", geometry.padding)
    if geometry.padding_mode == "replicate" and any(n < 1 for n, _ in sides):
        raise _refused(op, "x", "not empty in space to be replicated", size)


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
    if x.dtype not in FLOATING:
        raise _refused_dtype(op, "x", "float32, float64, bfloat16 or float16", x.dtype)
    kept = type(x) is Tensor and not torch.compiler.is_compiling()
    shape = _kept_conv_shape if kept else conv_shape
    return shape(op, tuple(x.shape), *hashable(arguments))


def _window_sum_shape(op: str, x: Tensor, *arguments: Any) -> Shape:
    *groups, width, _ = _conv_gram_shape(op, x, *arguments)
    return (x.shape[0], *groups, width)


# Operators on lists of matrices of mixed shapes.


def _check_entry(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != like.dtype:
        raise _refused_dtype(op, argument, "float32 or float64 like the others", tensor.dtype)
    _check_device(op, argument, tensor, like)


def _check_squares(op: str, argument: str, matrices: Sequence[Tensor], like: Tensor) -> None:
    for i, matrix in enumerate(matrices):
        if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise _refused(op, f"{argument}[{i}]", "[*, n, n]", tuple(matrix.shape))
        _check_entry(op, f"{argument}[{i}]", matrix, like)


def _check_length(op: str, argument: str, values: Sequence[Tensor], expected: int) -> None:
    if len(values) != expected:
        raise _refused(op, argument, f"{expected} tensors", len(values))


def number_of_matrices(matrices: Sequence[Tensor]) -> int:
    """How many square matrices a list of stacked batches ``[*, n, n]`` holds."""
    if sum(map(Tensor.dim, matrices)) == 2 * len(matrices):
        return len(matrices)
    return sum(math.prod(matrix.shape[:-2]) for matrix in matrices)


def of_each(damping: Sequence[Tensor], matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """One damping for each entry of ``matrices``; a single one is that of all."""
    return [damping[0]] * len(matrices) if len(damping) == 1 else damping


def _check_damped(
    op: str,
    matrices: Sequence[Tensor],
    damping: Sequence[Tensor],
    out: Sequence[Tensor],
    info: Tensor,
    logdet: Tensor | None,
) -> None:
    if len(damping) != 1:
        _check_length(op, "damping", damping, len(matrices))
    _check_length(op, "out", out, len(matrices))
    if not matrices:
        return
    like = matrices[0]
    _check_squares(op, "matrices", matrices, like)
    for i, (matrix, shift) in enumerate(zip(matrices, of_each(damping, matrices), strict=True)):
        batch = tuple(matrix.shape[:-2])
        if shift.dim() != 0 and tuple(shift.shape) != batch:
            raise _refused(op, f"damping[{i}]", f"a scalar or of shape {batch}", tuple(shift.shape))
        if shift.dtype != matrix.dtype:
            raise _refused_dtype(op, f"damping[{i}]", matrix.dtype, shift.dtype)
        _check_device(op, f"damping[{i}]", shift, like)
        _check_out(op, f"out[{i}]", out[i], matrix.shape, matrix.dtype, [])
        _check_device(op, f"out[{i}]", out[i], like)
    vectors = [info] if logdet is None else [info, logdet]
    _check_apart(op, [*out, *vectors], [*matrices, *damping])
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
    sides = {"the input side": input_sides, "the gradient side": gradient_sides}
    for argument, values in {**sides, "out": out}.items():
        _check_length(op, argument, values, len(grads))
    if not grads:
        return
    like = grads[0]
    for i, grad in enumerate(grads):
        if grad.dim() < 2:
            raise _refused(op, f"grads[{i}]", "[*, out, in]", f"{grad.dim()}-d")
        _check_entry(op, f"grads[{i}]", grad, like)
    for argument, values in sides.items():
        _check_squares(op, argument, values, like)
    for i, (grad, right, left) in enumerate(zip(grads, input_sides, gradient_sides, strict=True)):
        *batch, rows, columns = grad.shape
        for argument, side, size in (("input", right, columns), ("gradient", left, rows)):
            if tuple(side.shape) != (*batch, size, size):
                expected = f"of shape {(*batch, size, size)}"
                raise _refused(op, f"the {argument} side[{i}]", expected, tuple(side.shape))
        _check_out(op, f"out[{i}]", out[i], grad.shape, grad.dtype, [])
        _check_device(op, f"out[{i}]", out[i], like)
    _check_apart(op, [*out, inner], [*grads, *input_sides, *gradient_sides])
    _check_out(op, "inner", inner, (), like.dtype, [like])


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    Attributes:
        arguments: The dispatcher signature between its parentheses.
        check: Called with the operator's name and dispatcher arguments; raises where they are
            refused.
        written: Position of the first argument that is written; all after it are, too.
        shape: For accumulating operators, the shape of ``out`` from the arguments before ``alpha``.
    """

    arguments: str
    check: Callable[..., None]
    written: int
    shape: Callable[..., Shape] | None = None


def _accumulating(arguments: str, shape: Callable[..., Shape]) -> Operator:
    def check(op: str, *args: Any) -> None:
        *inputs, _, _, out = args
        dtype = result_dtype(inputs[0].dtype)
        _check_out(op, "out", out, shape(op, *inputs), dtype, inputs)

    return Operator(f"{arguments}, float alpha, float beta, Tensor(a!) out", check, -1, shape)


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

OPERATORS: dict[str, Operator] = {
    "gram": _accumulating("Tensor x, Tensor? mask, int groups, bool bias", _gram_shape),
    "shared_gram": _accumulating(
        "Tensor x, Tensor? mask, Tensor? segments, int num_segments, str reduction, int groups, "
        "bool bias",
        _shared_gram_shape,
    ),
    "conv_expand_gram": _accumulating(_CONV, _conv_gram_shape),
    "conv_reduce_gram": _accumulating(_CONV, _conv_gram_shape),
    "conv_window_sum": _accumulating(_CONV, _window_sum_shape),
    "damped_inverse": Operator(_DAMPED, _check_damped, 2),
    "damped_cholesky": Operator(_DAMPED, _check_damped, 2),
    "precondition": Operator(_SIDES, _check_precondition, 3),
    "cholesky_precondition": Operator(_SIDES, _check_precondition, 3),
}


def check(op: str, *args: Any) -> None:
    """Check an operator's dispatcher arguments.

    Raises:
        ValueError: If a shape, a device, an option or the memory of ``out`` is refused.
        TypeError: If a dtype is refused.
    """
    OPERATORS[op].check(op, *args)


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
