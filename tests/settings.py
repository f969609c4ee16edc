"""Networks in which theory says which approximation is exact, and a layer's block as a matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_fast.blocks import Block
from kfac_fast.layers import Approximation

EXACT = 1e-12
NOT_EXACT = 1e-2
OUTPUTS = 2
FEATURES_LAST = (nn.Linear, nn.Embedding)
APPROXIMATIONS: tuple[Approximation, ...] = ("expand", "reduce")
Sharing = dict[str, dict[str, Any]]
"""Arguments of :meth:`kfac_fast.KFAC.share_rows` by pattern."""


class PerPosition(nn.Module):
    """The same linear map at every position of ``[N, C, *positions]``."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, OUTPUTS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


class Pool(nn.Module):
    """Sum or mean over the positions of ``[N, C, *positions]``."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        positions = x.reshape(*x.shape[:2], -1)
        return positions.mean(-1) if self.mean else positions.sum(-1)


class FeaturesFirst(nn.Module):
    """``[N, *shared, D]`` to ``[N, D, *shared]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


class Setting(NamedTuple):
    """A network whose first module is the layer under test."""

    model: nn.Sequential
    x: Tensor

    @property
    def layer(self) -> nn.Module:
        return self.model[0]


def expand_setting(layer: nn.Module, x: Tensor, features: int) -> Setting:
    """Per-position maps follow the layer, and the loss sums over the positions."""
    first = [FeaturesFirst()] if isinstance(layer, FEATURES_LAST) else []
    return Setting(nn.Sequential(layer, *first, PerPosition(features), PerPosition(OUTPUTS)), x)


def reduce_setting(layer: nn.Module, x: Tensor, features: int, mean: bool = True) -> Setting:
    """A per-position map, a pooling over the positions and a linear map follow the layer."""
    first = [FeaturesFirst()] if isinstance(layer, FEATURES_LAST) else []
    last = nn.Linear(OUTPUTS, OUTPUTS, dtype=torch.float64)
    return Setting(nn.Sequential(layer, *first, PerPosition(features), Pool(mean), last), x)


class Attends(nn.Module):
    """Attention of ``[N, S, 4]`` to itself or to a memory, then a linear map to ``[N, 4, S]``.

    Args:
        memory: ``[N, K, D]``; None for attention to itself.
        pooled: The positions are averaged first, for outputs ``[N, 4, 1]``.
        options: Of the attention module.
    """

    def __init__(self, memory: Tensor | None = None, pooled: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.head = nn.Linear(4, 4)
        self.register_buffer("memory", memory)
        self.pooled = pooled
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        memory = x if self.memory is None else self.memory
        x, _ = self.attention(x, memory, memory)
        return self.head(x.mean(1, keepdim=True) if self.pooled else x).mT


class Twice(nn.Module):
    """A weight that is used for both halves of ``[N, 2, S, 3]``, by one module or two tied ones.

    Args:
        tied: Two modules.
        joined: ``"apart"``: the halves have outputs of their own. ``"added"``: they are added up.
            ``"nested"``: the weight is used again on its own outputs.
        pooled: The positions are averaged.
    """

    def __init__(self, tied: bool, joined: str, pooled: bool, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias, dtype=torch.float64)
        if tied:
            self.other = nn.Linear(3, 3, bias, dtype=torch.float64)
            self.other.weight, self.other.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(3, 2, dtype=torch.float64)
        self.tied, self.joined, self.pooled = tied, joined, pooled

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.unbind(1)
        second = self.other if self.tied else self.first
        halves = [self.first(one), second(two)]
        if self.joined == "added":
            halves = [halves[0] + halves[1]]
        elif self.joined == "nested":
            halves = [second(halves[0])]
        halves = [half.mean(1) for half in halves] if self.pooled else halves
        return torch.stack([self.head(half) for half in halves], 1)


class Padded(nn.Module):
    """Maps of each row of ``[N, S, 3]``, of which some count, to ``[N, 4, S]``.

    Args:
        mask: Bool ``[N, S]``.
        pooled: None, or what makes an example of its rows that count: ``"mean"`` or ``"sum"``.
    """

    def __init__(self, mask: Tensor, pooled: str | None) -> None:
        super().__init__()
        self.norm, self.rows, self.head = nn.LayerNorm(3), nn.Linear(3, 4), nn.Linear(4, 4)
        self.register_buffer("mask", mask[..., None])
        self.pooled = pooled
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.rows(self.norm(x))
        if self.pooled is None:
            return (self.head(x) * self.mask).mT
        x = (x * self.mask).sum(1, keepdim=True)
        return self.head(x / self.mask.sum(1, keepdim=True) if self.pooled == "mean" else x).mT


class Graphs(nn.Module):
    """Messages along edges, summed in nodes, averaged over graphs: ``[R, 3]`` to ``[G, 2]``.

    Args:
        rings: Numbers of nodes of graphs that are rings.
        cut: One edge is missing in the first of them.
        norm: Of nodes; a layer normalisation if None.
    """

    def __init__(
        self, rings: tuple[int, ...], cut: bool = False, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3) if norm is None else norm
        self.edge, self.node, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        sizes = torch.tensor(rings)
        graph = torch.arange(len(rings)).repeat_interleave(sizes)
        here, first = torch.arange(len(graph)), (sizes.cumsum(0) - sizes)[graph]
        there = first + (here - first + 1) % sizes[graph]
        source, target = torch.cat([here, there]), torch.cat([there, here])
        self.register_buffer("source", source[int(cut) :])
        self.register_buffer("target", target[int(cut) :])
        self.register_buffer("graph", graph)
        self.register_buffer("sizes", sizes[:, None])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        messages = self.edge(self.norm(x)[self.source])
        nodes = self.node(x.new_zeros(len(x), 4).index_add(0, self.target, messages))
        sums = x.new_zeros(len(self.sizes), 4).index_add(0, self.graph, nodes)
        return self.head(sums / self.sizes)

    def sharing(self) -> Sharing:
        def of_graphs(segments: Tensor) -> dict[str, Any]:
            return {"segments": segments, "num_segments": len(self.sizes)}

        nodes, edges = of_graphs(self.graph), of_graphs(self.graph[self.target])
        return {"norm|node": nodes, "edge": edges}


def kronecker_block(block: Block) -> Tensor:
    """``G (x) A`` of each group, ``[groups, out * in, out * in]``, row-major like its matrix."""
    factors = [factor.mean for factor in block.factors]
    if len(factors) == 1:
        return factors[0]
    a, g = factors
    a = torch.diag(a) if a.dim() == 1 else a
    stacked = zip(g.reshape(-1, *g.shape[-2:]), a.reshape(-1, *a.shape[-2:]), strict=True)
    return torch.stack([torch.kron(gradient, inputs) for gradient, inputs in stacked])
