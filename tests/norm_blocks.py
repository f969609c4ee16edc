"""The factors of normalisations by their definitions, in extended precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from oracle import assert_symmetric, assert_within_budget
from torch import Tensor

import kfac_fast
from kfac_fast import ops

Norm = Callable[..., Tensor]


def wide(x: Tensor) -> np.ndarray:
    return x.double().cpu().numpy().astype(np.longdouble)


def blocks(products: np.ndarray, sums: np.ndarray, bias: bool) -> Tensor:
    """The Gram of each unit's gradients, from ``[N, units]`` of scales and of shifts."""
    v = np.stack([products, sums][: 1 + bias], -1)
    return torch.from_numpy(np.einsum("nji,njk->jik", v, v).astype(np.float64))


def feature_blocks(
    x: Tensor,
    gradient: Tensor,
    eps: float = 1e-5,
    center: bool = True,
    bias: bool = True,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    num_segments: int | None = None,
) -> Tensor:
    """The definition, segments by a loop."""
    if not x.numel():
        return torch.zeros(x.shape[-1], 1 + bias, 1 + bias, dtype=torch.float64)
    rows, g = (wide(t).reshape(len(t), -1, t.shape[-1]) for t in (x, gradient))
    if mask is not None:
        counts = mask.numpy().reshape(*rows.shape[:2], 1)
        rows, g = np.where(counts, rows, 0), np.where(counts, g, 0)
    centred = rows - rows.mean(-1, keepdims=True) if center else rows
    z = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.longdouble(eps))
    sums = [(g * z).sum(1), g.sum(1)]
    if segments is not None:
        ids = segments.numpy()
        sums = [np.stack([s[ids == i].sum(0) for i in range(num_segments)]) for s in sums]
    return blocks(*sums, bias)


def channel_blocks(
    x: Tensor,
    gradient: Tensor,
    eps: float = 1e-5,
    bias: bool = True,
    num_groups: int | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> Tensor:
    """The definition."""
    if not x.numel():
        return torch.zeros(x.shape[1], 1 + bias, 1 + bias, dtype=torch.float64)
    rows, g = (wide(t).reshape(*t.shape[:2], -1) for t in (x, gradient))
    if mean is not None and variance is not None:
        centre, spread_ = (wide(t)[None, :, None] for t in (mean, variance))
        z = (rows - centre) / np.sqrt(spread_ + np.longdouble(eps))
    else:
        together = rows.transpose(1, 0, 2).reshape(1, x.shape[1], -1)
        if num_groups is not None:
            together = rows.reshape(len(x), num_groups, -1)
        centred = together - together.mean(-1, keepdims=True)
        z = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.longdouble(eps))
        if num_groups is None:
            z = z.reshape(x.shape[1], len(x), -1).transpose(1, 0, 2)
        z = z.reshape(rows.shape)
    return blocks((g * z).sum(-1), g.sum(-1), bias)


DEFINITIONS = {ops.feature_norm_gram: feature_blocks, ops.channel_norm_gram: channel_blocks}


def assert_blocks(out: Tensor, expected: Tensor, ref64: Tensor) -> None:
    """Within the budget as one block-diagonal matrix: a unit's own sums may cancel to nothing."""
    assert_within_budget(*(result.flatten(0, 1) for result in (out, expected, ref64)))
    assert_symmetric(out)


def check(op: Norm, x: Tensor, gradient: Tensor, **options: Any) -> None:
    with kfac_fast.use("cpp"):
        result = op(x, gradient, **options)
    with kfac_fast.use("reference"):
        expected = op(x, gradient, **options)
    assert_blocks(result, expected, DEFINITIONS[op](x, gradient, **options))
