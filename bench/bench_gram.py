"""Gram matrices of rows: what linear layers need under expand and under reduce."""

from __future__ import annotations

from collections.abc import Callable

import baselines
import pytest
import torch
from measure import Case, poisoned
from shapes import GRAM, SHARED_GRAM


@pytest.mark.parametrize("shape", GRAM)
def bench_gram(shape: str, compare: Callable[[Case], None], device: str) -> None:
    rows = GRAM[shape]
    x = torch.randn(*rows.leading, rows.features, device=device).to(rows.dtype)
    size = rows.features + rows.bias
    count = x.numel() // rows.features
    options = {"bias": rows.bias, "alpha": 1.0, "beta": 0.0}
    out = poisoned(size, size, device=device)
    if rows.decay:
        options |= {"alpha": (1 - rows.decay) / count, "beta": rows.decay}
        out = torch.eye(size, device=device)
    flops = count * size * (size + 1)
    compare(Case("gram", shape, (x,), options, out, baselines.gram(x, **options), flops))


@pytest.mark.parametrize("shape", SHARED_GRAM)
def bench_shared_gram(shape: str, compare: Callable[[Case], None], device: str) -> None:
    rows = SHARED_GRAM[shape]
    x = torch.randn(*rows.leading, rows.features, device=device)
    segments = torch.randint(rows.segments, rows.leading, device=device) if rows.segments else None
    options = {
        "reduction": rows.reduction,
        "bias": rows.bias,
        "segments": segments,
        "num_segments": rows.segments or -1,
    }
    size = rows.features + rows.bias
    out = poisoned(size, size, device=device)
    flops = x.numel() + (rows.segments or len(x)) * size * (size + 1)
    ways = baselines.shared_gram(x, **options)
    beside = {name: ways[name] for name in ("mean + mm",) if name in ways}
    if beside:  # one reading of the input
        beside["x.sum"] = lambda out: x.sum(tuple(range(1, x.dim() - 1)))
    compare(Case("shared_gram", shape, (x,), options, out, ways, flops, beside=beside))
