"""Layers whose output is a view, which the model then writes to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import Checkpointed, preconditioner
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


class Bent(nn.Module):
    """A layer and what bends its output, with or without another use of the output before.

    Args:
        layer: Gives an output of 6 features, wherever they are.
        twice: Whether the output is used before, too.
        bend: What follows.
    """

    def __init__(self, layer: nn.Module, twice: bool, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 3)
        self.twice, self.bend = twice, bend
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        is_attention = isinstance(self.layer, nn.MultiheadAttention)
        y = self.layer(x, x, x)[0] if is_attention else self.layer(x)
        before = 3 * y if self.twice else 0
        rows = (self.bend(y) + before).reshape(-1, 6)
        return self.head(rows)


def scaled(y: Tensor) -> Tensor:
    return y * torch.tensor([2.0] + [1.0] * (y.shape[-1] - 1), dtype=y.dtype)


def write_scaled(y: Tensor) -> Tensor:
    y[..., 0] *= 2
    return y


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "positions": (lambda: nn.Linear(4, 6), (5, 3, 4)),
    "unbatched": (lambda: nn.Linear(4, 6), (4,)),
    "unbatched-conv": (lambda: nn.Conv2d(2, 3, 2), (2, 5, 5)),
    "unbatched-channels-last": (
        lambda: nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last),
        (2, 5, 5),
    ),
    "attention": (lambda: nn.MultiheadAttention(6, 2), (5, 3, 6)),
    "batch-first": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), (5, 3, 6)),
    "unbatched-attention": (lambda: nn.MultiheadAttention(6, 2), (3, 6)),
}
BENDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (torch.relu, torch.relu_),
    "entries": (scaled, write_scaled),
}
CORRECTED = {"damping_mode": "exact", "eigenvalue_correction": True, "inverse_update_steps": 9}


@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        *({"fisher": fisher} for fisher in ("empirical", "mc", "exact", "curvature-propagation")),
        *(CORRECTED, {**CORRECTED, "fisher": "exact"}),
    ],
    ids=["empirical", "mc", "exact", "curvature-propagation", "corrected", "corrected-exact"],
)
def test_a_write_to_a_layers_output_changes_no_bit(
    options: dict[str, object], name: str, twice: bool, bend: str
) -> None:
    make, shape = LAYERS[name]
    results = []
    for follow in BENDS[bend]:
        torch.manual_seed(0)
        model = Bent(make(), twice, follow)
        kfac = preconditioner(model, **options)
        for _ in range(2):
            model.zero_grad()
            outputs = model(torch.randn(shape, dtype=torch.float64))
            kfac.update_curvature(outputs, loss="mse")
            outputs.square().mean().backward()
            kfac.step()
        assert all(block.factors for block in kfac._blocks)
        tensors = [factor.mean for block in kfac._blocks for factor in block.factors]
        tensors += [b.correction.mean for b in kfac._blocks if b.correction is not None]
        results.append(tensors + [parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_written_output_is_captured_in_a_checkpointed_part(use_reentrant: bool) -> None:
    results = []
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    for follow in BENDS["relu"]:
        torch.manual_seed(0)
        model = Bent(nn.Linear(4, 6), True, follow)
        kfac = preconditioner(model)
        Checkpointed(model, use_reentrant)(x).square().mean().backward()
        kfac.step()
        results.append([factor.mean for block in kfac._blocks for factor in block.factors])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert len(results[0]) == 4
