"""The borrowed step length against the step that ``torch.optim.Adam`` takes."""

from __future__ import annotations

import math

import pytest
import torch
from host import never_waits
from oracle import bits
from torch import nn

from kfac_fast.grafting import AdamNorm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("beta2", [0.999, 0.5])
def test_the_length_is_that_of_adams_step_without_momentum(beta2: float) -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, 4, dtype=torch.float64))
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.0, beta2), eps=1e-3)
    norm = AdamNorm(parameter.detach(), beta2, 1e-3)
    for scale in (1.0, 1e-3, 10.0, 0.0, 1.0):
        before = parameter.detach().clone()
        parameter.grad = scale * torch.randn_like(parameter)
        length = norm.update(parameter.grad)
        adam.step()
        expected = torch.linalg.vector_norm(parameter.detach() - before)
        torch.testing.assert_close(length, expected, rtol=1e-12, atol=0)


def test_the_length_of_no_gradient_is_zero() -> None:
    assert AdamNorm(torch.zeros(2, 3)).update(torch.zeros(2, 3)) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20])
def test_a_bad_gradient_changes_no_bit_of_the_second_moment(value: float) -> None:
    clean, disturbed = AdamNorm(torch.zeros(3)), AdamNorm(torch.zeros(3))
    with never_waits():
        disturbed.update(torch.tensor([1.0, value, 1.0]))
    for _ in range(3):
        gradient = torch.randn(3)
        assert clean.update(gradient) == disturbed.update(gradient)
        assert not disturbed.update(gradient * value).isfinite() or math.isfinite(value)
    for field in AdamNorm.STATE:
        pair = getattr(clean, field), getattr(disturbed, field)
        assert torch.equal(bits(pair[0]), bits(pair[1]))
