"""Several losses of one forward pass: the sum of their curvatures, in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._functorch.config
from nets import preconditioner
from plain_kfac import assert_solved, covariances
from torch import Tensor, nn

from kfac_fast.losses import LOSSES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # What PyTorch's own compiler does, and hides outside of tests.
    pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("default:The .grad attribute"),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Heads(nn.Module):
    """A trunk with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x).tanh()
        return self.one(hidden), self.two(hidden)


class Both:
    """Mean cross entropy of the first outputs, mean squared error of two entries of the second."""

    def terms(self, outputs: tuple[Tensor, Tensor], targets: Tensor | None) -> int:
        return len(outputs[0])

    def sample(
        self,
        outputs: tuple[Tensor, Tensor],
        targets: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        first = LOSSES["cross_entropy"]().sample(outputs[0], None, generator)
        return first + 0.5**0.5 * LOSSES["mse"]().sample(outputs[1], None, generator)

    def root(self, outputs: tuple[Tensor, Tensor], targets: Tensor | None) -> Tensor:
        first = LOSSES["cross_entropy"]().root(outputs[0], None)
        return torch.cat([first, 0.5**0.5 * LOSSES["mse"]().root(outputs[1], None)], 1)


def test_the_curvature_of_two_heads_is_the_sum_of_the_losses() -> None:
    model, x = Heads(), torch.randn(5, 3).double()
    results = []
    losses: list[tuple[Any, Any]] = [
        (Both(), lambda outputs: outputs),
        ("cross_entropy", lambda outputs: outputs[0]),
        ("mse", lambda outputs: outputs[1]),
    ]
    for loss, of in losses:
        with preconditioner(model, fisher="exact") as kfac:
            kfac.update_curvature(of(model(x)), loss=loss)
            kfac.step()
            results.append(covariances(kfac))
    both, first, second = results
    assert_solved(both["trunk"][0], first["trunk"][0])
    assert_solved(both["trunk"][1], first["trunk"][1] + second["trunk"][1])
    assert_solved(both["one"][1], first["one"][1])
    assert_solved(both["two"][1], second["two"][1])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_second_loss_of_layers_that_the_first_has_counted_is_refused(
    fisher: str, compiled: bool
) -> None:
    """Also where another pass lies between, and not in the next step."""
    model, x = Heads(), torch.randn(5, 3).double()
    kfac = preconditioner(model, fisher=fisher)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    with torch._functorch.config.patch(donated_buffer=False):
        for second in (0, 1):
            one, two = run(x)
            kfac.update_curvature(one, loss="cross_entropy")
            kfac.update_curvature(run(x)[0], loss="cross_entropy")
            message = "outputs that share layers must come in one call, got .* reaches '"
            with pytest.raises(RuntimeError, match=f"^update_curvature: {message}"):
                kfac.update_curvature((one, two)[second], loss="mse")
            kfac.step()
    torch.compiler.reset()


def test_losses_that_share_no_trained_layer_may_come_one_by_one() -> None:
    model, x = Heads(), torch.randn(5, 3).double()
    model.trunk.requires_grad_(False)
    results = []
    for apart in (False, True):
        with preconditioner(model, fisher="exact") as kfac:
            outputs = model(x)
            if apart:
                kfac.update_curvature(outputs[0], loss="cross_entropy")
                kfac.update_curvature(outputs[1], loss="mse")
            else:
                kfac.update_curvature(outputs, loss=Both())
            kfac.step()
            results.append(covariances(kfac))
    assert results[0].keys() == {"one", "two"}
    for name, pair in results[0].items():
        for ours, theirs in zip(pair, results[1][name], strict=True):
            assert_solved(ours, theirs)
