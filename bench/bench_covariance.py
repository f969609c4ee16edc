"""Running averages of all factors of a network, and their average eigenvalues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import baselines_covariance as baselines
import pytest
import torch
from measure import Call, Case, poisoned
from shapes import NETWORKS, factor_sizes
from torch import Tensor

import kfac_fast

DECAY = 0.95


@dataclass(frozen=True)
class Update(Case):
    """Averages that change with every call, and so do their weights: each dtype has its own.

    Attributes:
        states: ``weights`` and ``skipped`` by dtype.
    """

    states: dict[torch.dtype, dict[str, list[Tensor]]] = field(kw_only=True)

    def call(self, arguments: Sequence[Any], out: Tensor | list[Tensor]) -> Call:
        """The call of the public operator."""
        state = self.states[out[0].dtype]
        return partial(kfac_fast.update_averages, *arguments, **state, out=out)


def _state(count: int, dtype: torch.dtype, device: str) -> dict[str, list[Tensor]]:
    """Of averages that are under way."""
    return {
        "weights": [torch.full((), 0.5, dtype=dtype, device=device) for _ in range(count)],
        "skipped": [torch.zeros((), dtype=torch.int64, device=device) for _ in range(count)],
    }


@pytest.mark.parametrize("shape", NETWORKS)
def bench_update(shape: str, compare: Callable[[Case], None], device: str) -> None:
    sizes = factor_sizes(shape)
    sums, out = ([torch.randn(n, n, device=device) for n in sizes] for _ in range(2))
    arguments = sums, [128.0] * len(sums), DECAY
    states = {t: _state(len(sums), t, device) for t in (torch.float32, torch.float64)}
    options = _state(len(sums), torch.float32, device)
    ways = baselines.update_averages(*arguments, **_state(len(sums), torch.float32, device))
    flops = 4 * sum(n * n for n in sizes)
    moved = 3 * 4 * sum(n * n for n in sizes)  # the averages are read and written
    compare(
        Update(
            "update_averages",
            shape,
            arguments,
            options,
            out,
            ways,
            flops,
            states=states,
            moved=moved,
        )
    )


@pytest.mark.parametrize("shape", NETWORKS)
def bench_mean_eigenvalues(shape: str, compare: Callable[[Case], None], device: str) -> None:
    sizes = factor_sizes(shape)
    matrices = [torch.rand(n, n, device=device) for n in sizes]
    out = poisoned(len(sizes), device=device)
    ways = baselines.mean_eigenvalues(matrices)
    moved = 64 * sum(sizes) + out.nbytes  # a cache line for every entry of a diagonal
    compare(Case("mean_eigenvalues", shape, (matrices,), {}, out, ways, sum(sizes), moved=moved))
