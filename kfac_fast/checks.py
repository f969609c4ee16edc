"""Checks that operators share: of devices, and of the memory of what they write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def refused(op: str, argument: str, expected: object, got: object) -> ValueError:
    """What to raise where an argument's value is refused."""
    return ValueError(f"{op}: {argument} must be {expected}, got {got}")


def refused_dtype(op: str, argument: str, expected: object, got: object) -> TypeError:
    """What to raise where an argument's dtype or layout is refused."""
    return TypeError(f"{op}: {argument} must be {expected}, got {got}")


def check_device(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    """Check that a tensor is on the device of another one."""
    if tensor.device != like.device:
        raise refused(op, argument, f"on {like.device} like the other tensors", tensor.device)


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


def check_out(
    op: str,
    argument: str,
    out: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    inputs: Sequence[Any],
) -> None:
    """Check an output: shape, dtype, layout, and that it overlaps none of the tensors it is of."""
    if out.shape != shape:
        raise refused(op, argument, f"of shape {shape}", tuple(out.shape))
    if out.dtype != dtype:
        raise refused_dtype(op, argument, dtype, out.dtype)
    if out.is_neg():
        raise refused(op, argument, "resolved", "a negated view")
    if not out.is_contiguous():
        raise refused(op, argument, "contiguous", f"strides {out.stride()}")
    if out.requires_grad:
        raise refused(
            op, argument, "detached, for no operator is differentiable", "a leaf or graph"
        )
    for tensor in inputs:
        if isinstance(tensor, Tensor):
            check_device(op, argument, out, tensor)
            if tensor.layout != torch.strided:
                raise refused_dtype(op, "inputs", "strided", tensor.layout)
            if _overlap(out, tensor):
                raise refused(op, argument, "apart from the inputs' memory", "an overlap")


def check_apart(op: str, out: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
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
            raise refused(op, "out", "apart from all other memory", "an overlap")
        used = max(used, stop)
        written = max(written, stop) if is_out else written
