"""Small float64 networks, batches and steps for the preconditioner's tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_fast import KFAC

DAMPING = 0.05
LAYER_NAMES = ("grouped", "strided", "shared", "head")


class Net(nn.Module):
    """Convolutions with and without groups, a linear layer shared over positions, and a head.

    Args:
        inplace: Activations overwrite their inputs.
        tokens: The head predicts at each of the 6 positions instead of once.
    """

    def __init__(self, inplace: bool = False, tokens: bool = False) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.strided = nn.Conv2d(4, 3, (2, 3), stride=2, bias=False)
        self.shared = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)
        self.bend = nn.LeakyReLU(0.2, inplace)
        self.tokens = tokens
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, 3]``, or ``[N, 3, 6]`` for tokens, of images ``[N, 2, 6, 6]``."""
        x = self.strided(self.bend(self.grouped(x))).tanh()
        x = self.bend(self.shared(x.flatten(2).mT))
        return self.head(x).mT if self.tokens else self.head(x.mean(1))


class Checkpointed(nn.Module):
    """Recomputes its activations in the backward pass."""

    def __init__(self, net: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.net = net
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=self.use_reentrant)


class PartlyCheckpointed(nn.Module):
    """A layer that is called twice in a pass, the first time in a part that may be recomputed.

    Args:
        use_reentrant: As for the checkpoint; None for none.
    """

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.layer(self.bent(x))
        return self.layer(checkpoint(self.bent, x, use_reentrant=self.use_reentrant))

    def bent(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


def images(examples: int = 5) -> Tensor:
    return torch.randn(examples, 2, 6, 6, dtype=torch.float64)


def classes(outputs: Tensor) -> Tensor:
    """Random classes for outputs ``[N, C, *positions]``."""
    return torch.randint(outputs.shape[1], (len(outputs), *outputs.shape[2:]))


def preconditioner(model: nn.Module, **options: Any) -> KFAC:
    """K-FAC that updates everything at each step."""
    steps = {"factor_update_steps": 1, "inverse_update_steps": 1}
    return KFAC(model, **{"damping": DAMPING, **steps, **options})


def train_step(model: nn.Module, kfac: KFAC, x: Tensor, y: Tensor) -> None:
    """A step on cross entropy that leaves the weights alone."""
    model.zero_grad()
    outputs = model(x)
    if kfac.fisher not in ("empirical", "forward-only"):
        kfac.update_curvature(outputs, loss="cross_entropy")
    F.cross_entropy(outputs, y).backward()
    kfac.step()
