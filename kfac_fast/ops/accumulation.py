"""How operators that accumulate run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfac_fast import schema
from kfac_fast.backends import call


def detached(x: Tensor) -> Tensor:
    """The tensor apart from any graph."""
    return x.detach() if x.requires_grad else x


def accumulate(
    op: str, inputs: tuple[Any, ...], alpha: float, beta: float, out: Tensor | None
) -> Tensor:
    """Run an accumulating operator, into a new tensor if ``out`` is None."""
    schema.check_types(op, alpha=alpha, beta=beta, out=out)
    if out is None:
        out = _new_result(op, schema.result_shape(op, *inputs), inputs[0], beta)
    x, *options = inputs
    call(op, detached(x), *options, alpha, beta, out)
    return out


def _new_result(op: str, shape: schema.Shape, x: Tensor, beta: float) -> Tensor:
    if beta != 0:
        raise ValueError(f"{op}: beta must be 0 without out, got {beta}")
    return torch.empty(shape, dtype=schema.result_dtype(x.dtype), device=x.device)
