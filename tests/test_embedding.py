"""Embeddings against a linear layer on one-hot inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import DAMPING, preconditioner
from oracle import assert_same
from plain_kfac import assert_solved, covariances
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.inverses import Inverse, refresh_inverses
from kfac_fast.layers import RULES

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY, FEATURES = 7, 3


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class OneHot(nn.Module):
    """The same map as an embedding's, with every input written out."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.linear = nn.Linear(VOCABULARY, FEATURES, bias=False, dtype=torch.float64)
        self.linear.weight.data = embedding.weight.detach().mT.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.one_hot(x, VOCABULARY).double())


def tail() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Tanh(), nn.Linear(FEATURES, 2, dtype=torch.float64))


@pytest.mark.parametrize("damping_mode", ["factored", "plain", "exact"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("shape", [(5,), (4, 6), (2, 3, 4)], ids=["rows", "sequence", "grid"])
def test_a_step_is_that_of_a_linear_layer_on_one_hot_inputs(
    shape: tuple[int, ...], approx: str, damping_mode: str
) -> None:
    embedding = nn.Embedding(VOCABULARY, FEATURES, dtype=torch.float64)
    x = torch.randint(VOCABULARY - 1, shape)  # the last index never occurs
    results = []
    for first in (embedding, OneHot(embedding)):
        model = nn.Sequential(first, tail())
        # Also under reduce, the embedding's positions are terms of their own.
        kfac = preconditioner(
            first, approx=approx if first is embedding else "expand", damping_mode=damping_mode
        )
        first(x), model(x).square().sum(-1).mean().backward()
        kfac.step()
        results.append((covariances(kfac), first))
    (counted, _), (written, one_hot) = results
    assert_same(torch.diag(counted[""][0].flatten()), written["linear"][0][0])
    assert_same(counted[""][1], written["linear"][1])
    assert_solved(embedding.weight.grad.mT, one_hot.linear.weight.grad)


@pytest.mark.parametrize("padding", [0, 2])
def test_padding_is_as_if_it_were_not_there(padding: int) -> None:
    embedding = nn.Embedding(VOCABULARY, FEATURES, padding_idx=padding, dtype=torch.float64)
    layer = RULES[nn.Embedding]("", embedding, "expand")
    x = torch.randint(VOCABULARY, (4, 6))
    gradient = torch.randn(4, 6, FEATURES, dtype=torch.float64)
    kept = x != padding
    assert 0 < kept.sum() < x.numel()
    counts, positions = layer.input_gram(x, embedding(x))
    unpadded = RULES[nn.Embedding]("", nn.Embedding(VOCABULARY, FEATURES).double(), "expand")
    expected_counts, expected = unpadded.input_gram(x[kept], embedding(x[kept]))
    assert_same(counts, expected_counts)
    assert positions == expected == kept.sum()
    assert_same(layer.gradient_gram(gradient, 0.5, x), unpadded.gradient_gram(gradient[kept], 0.5))
    basis = torch.linalg.qr(torch.randn(FEATURES, FEATURES).double())[0]
    ones = torch.ones(VOCABULARY).double()
    assert_same(
        layer.squared_gradients(x, gradient, ones, basis, 2.0),
        unpadded.squared_gradients(x[kept], gradient[kept], ones, basis, 2.0),
    )


def test_squared_gradients_are_those_of_the_positions() -> None:
    layer = RULES[nn.Embedding]("", nn.Embedding(VOCABULARY, FEATURES).double(), "expand")
    x, gradient = torch.randint(VOCABULARY, (9,)), torch.randn(9, FEATURES).double()
    basis = torch.linalg.qr(torch.randn(FEATURES, FEATURES).double())[0]
    one_hot = F.one_hot(x, VOCABULARY).double()
    gradients = torch.einsum("no,ni->noi", gradient @ basis, one_hot)
    result = layer.squared_gradients(x, gradient, torch.ones(VOCABULARY).double(), basis, 0.5)
    assert_same(result, 0.5 * gradients.square().sum(0))


def test_the_damped_frequency_divides_the_gradient() -> None:
    """Written out for a gradient covariance of one."""
    embedding = nn.Embedding(VOCABULARY, 1, dtype=torch.float64)
    x = torch.tensor([1, 1, 4])
    kfac = preconditioner(embedding, damping_mode="plain", loss_reduction="sum")
    (embedding(x).sum() / 3**0.5).backward()
    kfac.step()
    frequencies = torch.tensor([0, 2, 0, 0, 1, 0, 0]).double()
    expected = frequencies / 3**0.5 / (frequencies / 3 + DAMPING) / (1 + DAMPING)
    assert_solved(embedding.weight.grad[:, 0], expected)


def test_diagonal_and_stacked_factors_are_refreshed_together() -> None:
    model = nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 11))
    kfac = KFAC(model, damping=0.1)
    model(torch.arange(8).view(4, 2)).square().sum((1, 2)).mean().backward()
    kfac.step()
    for block in kfac._blocks:
        alone = tuple(Inverse(factor.mean) for factor in block.factors)
        refresh_inverses([(block.factors, alone)], 0.1)
        for inverse, expected in zip(block.inverses, alone, strict=True):
            torch.testing.assert_close(inverse.matrix, expected.matrix)
            assert not torch.equal(expected.matrix, Inverse(expected.matrix).matrix)
