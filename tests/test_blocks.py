"""What a block adds up, averages and restores."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import assert_same, positive_definite
from torch import Tensor, nn

from kfac_fast.blocks import Block, update_blocks
from kfac_fast.grafting import AdamNorm
from kfac_fast.layers import RULES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def block_of(module: nn.Module, form: str = "inverse") -> Block:
    return Block([RULES[type(module)]("", module, "expand")], form)


def a_block() -> Block:
    return block_of(nn.Linear(2, 3, bias=False, dtype=torch.float64))


def factor_state(block: Block) -> dict[str, dict[str, Tensor]]:
    return {
        name: {field: getattr(part, field) for field in part.STATE}
        for name, part in block.parts().items()
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_calls_add_up_before_they_are_divided_once(reduction: str) -> None:
    inputs = [positive_definite(2, 2) for _ in range(3)]
    gradients = [positive_definite(3, 3) for _ in range(3)]
    block = a_block()
    for a, g, count, terms in zip(inputs, gradients, (4, 1, 7), (2, 0, 3), strict=True):
        block.add((a, count), (g.clone(), terms))
    assert block.pending
    update_blocks([block], [0.9], reduction)
    assert not block.pending
    assert_same(block.factors[0].mean, sum(inputs) / 12)
    divisor = 5 if reduction == "mean" else 1
    assert_same(block.factors[1].mean, sum(gradients) / divisor)
    assert_same(block.factors[0].weight, torch.tensor(0.1, dtype=torch.float64))


def test_an_update_without_calls_changes_nothing() -> None:
    block = a_block()
    update_blocks([block], [0.9], "mean")
    assert block.factors == () and block.parts() == {}


def test_no_examples_are_a_bad_batch() -> None:
    block = a_block()
    block.add((torch.zeros(2, 2), 0), (torch.zeros(3, 3), 0))
    update_blocks([block], [0.9], "mean")
    assert [int(factor.skipped) for factor in block.factors] == [1, 1]
    assert [float(factor.weight) for factor in block.factors] == [0, 0]


def test_a_restored_block_has_copies_of_the_saved_parts() -> None:
    block = a_block()
    block.add((positive_definite(2, 2), 3), (positive_definite(3, 3), 2))
    update_blocks([block], [0.9], "mean")
    block.norm = AdamNorm(torch.zeros(3, 2, dtype=torch.float64))
    block.norm.update(torch.randn(3, 2, dtype=torch.float64))
    saved = factor_state(block)
    restored = factor_state(block.restored(saved))
    sides = ("input", "gradient", "input_inverse", "gradient_inverse")
    assert restored.keys() == saved.keys() == {*sides, "norm"}
    for part, fields in saved.items():
        for field, value in fields.items():
            copy = restored[part][field]
            assert torch.equal(copy, value) and copy.dtype == value.dtype
            assert copy.data_ptr() != value.data_ptr()


def test_a_state_is_restored_in_the_layers_own_dtype() -> None:
    block = block_of(nn.Linear(2, 3, bias=False).bfloat16())
    block.add((positive_definite(2, 2), 3), (positive_definite(3, 3), 2))
    update_blocks([block], [0.9], "mean")
    factors = block.restored(factor_state(block)).factors
    assert {factor.mean.dtype for factor in factors} == {torch.float32}
    assert {factor.skipped.dtype for factor in factors} == {torch.int64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("gradient"), "must hold .*'gradient', .* got .*'input'"),
        (lambda s: s.update(other={}), "must hold .*'gradient', .* got .*'other'"),
        (lambda s: s["input"].pop("mean"), r"input must hold .*mean.* got"),
        (lambda s: s["gradient"].update(other=torch.ones(1)), "gradient must hold"),
        (
            lambda s: s["gradient"].update(mean=torch.full((2, 2), math.nan)),
            r"gradient.mean must have shape \(3, 3\), got \(2, 2\)",
        ),
    ],
    ids=["part-missing", "unknown-part", "field-missing", "unknown-field", "shape"],
)
def test_a_state_that_does_not_fit_is_refused(change: object, message: str) -> None:
    block = a_block()
    block.add((positive_definite(2, 2), 3), (positive_definite(3, 3), 2))
    update_blocks([block], [0.9], "mean")
    state = factor_state(block)
    change(state)
    with pytest.raises(ValueError, match=f"load_state_dict: .*{message}"):
        block.restored(state)
