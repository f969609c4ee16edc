"""Inputs that wait for gradients: a write to one is refused where autograd would not notice it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import Checkpointed, preconditioner
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.graph import Kept

pytestmark = pytest.mark.usefixtures("one_thread")
EKFAC = {"damping_mode": "exact", "eigenvalue_correction": True}


class Residual(nn.Module):
    """A normalised branch that is added to its own input, in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.before, self.norm, self.out = nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 4)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        change = self.out(self.norm(h))
        h = h.add_(change) if self.inplace else h + change
        return h.sin()


def trained(inplace: bool, checkpointed: bool, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Raw gradients and averages after two steps in bfloat16, which autograd widens a copy of."""
    torch.manual_seed(0)
    model: nn.Module = Residual(inplace).to(torch.bfloat16)
    if checkpointed:
        model = Checkpointed(model, use_reentrant=False)
    kfac = preconditioner(model, **options)
    x = torch.randn(8, 4, dtype=torch.bfloat16)
    for _ in range(2):
        model.zero_grad()
        model(x).float().square().mean().backward()
        raw = [parameter.grad.clone() for parameter in model.parameters()]
        kfac.step()
    return raw, averages(kfac)


def averages(kfac: KFAC) -> list[Tensor]:
    found = [average for block in kfac._blocks for average in (*block.factors, block.correction)]
    return [average.mean for average in found if average is not None]


def test_a_written_input_is_refused() -> None:
    """Autograd has saved a float32 copy, and takes the write."""
    with pytest.raises(RuntimeError, match="'norm' is needed for its factors.*clone the input"):
        trained(True, False)


def test_a_linear_layers_written_input_is_refused_if_gradients_are_squared() -> None:
    model = nn.Linear(4, 4)
    kfac = preconditioner(model, **EKFAC)
    for writes in (False, True):
        x = torch.randn(8, 4)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(x).float()
        if writes:
            x.zero_()
            with pytest.raises(RuntimeError, match="'the model' is needed for its factors"):
                outputs.sum().backward()
        else:
            outputs.sum().backward()
            kfac.step()


def test_a_checkpointed_part_keeps_a_copy() -> None:
    expected = trained(False, True, **EKFAC)
    result = trained(True, True, **EKFAC)
    for ours, theirs in zip(result, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_writes_to_inference_tensors_are_not_counted() -> None:
    with torch.inference_mode():
        x = torch.ones(3)
        kept = Kept(x, "layer")
        x.zero_()
        assert torch.equal(kept.get(), x)
