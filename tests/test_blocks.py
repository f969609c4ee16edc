"""Which layers of a model are preconditioned, why others are not, and what a block adds up."""

from __future__ import annotations

import math
import re

import pytest
import torch
from oracle import assert_same, positive_definite
from torch import Tensor, nn

from kfac_fast.blocks import Block, find_blocks
from kfac_fast.grafting import AdamNorm
from kfac_fast.layers import RULES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class OwnLinear(nn.Linear):
    """A subclass may compute anything."""


def found(model: nn.Module, *skip: str) -> tuple[list[str], dict[str, str]]:
    blocks, left_alone = find_blocks(model, "expand", skip)
    return [block.layer.name for block in blocks], left_alone


def mixed_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Sequential(nn.Linear(4, 3), OwnLinear(3, 3)),
        nn.Embedding(5, 3),
        nn.Linear(3, 2, bias=False),
    )


def test_layers_with_a_rule_are_found_in_the_models_order() -> None:
    names, left_alone = found(mixed_model())
    assert names == ["0", "3.0", "5"]
    assert left_alone == {
        "1": "no rule for BatchNorm2d",
        "3.1": "no rule for OwnLinear",
        "4": "no rule for Embedding",
    }


def test_a_rule_exists_for_every_linear_layer_and_convolution() -> None:
    names = {f"Conv{t}{d}d" for t in ("", "Transpose") for d in (1, 2, 3)}
    assert {module.__name__ for module in RULES} == {"Linear"} | names


@pytest.mark.parametrize(
    ("pattern", "left"),
    [("^0$", ["3.0", "5"]), ("3", ["0", "5"]), (r"\.", ["0", "5"]), ("Conv", ["3.0", "5"])],
)
def test_patterns_are_searched_in_qualified_and_class_names(pattern: str, left: list[str]) -> None:
    names, left_alone = found(mixed_model(), pattern)
    assert names == left
    assert f"skipped by pattern {pattern!r}" in left_alone.values()


@pytest.mark.parametrize("pattern", ["head", "ReLU", "^3$"])
def test_a_pattern_that_matches_no_module_with_parameters_is_refused(pattern: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"skip must match modules with parameters, got {pattern!r}")
    ):
        found(mixed_model(), "Conv", pattern)


def test_a_single_string_is_no_sequence_of_patterns() -> None:
    with pytest.raises(ValueError, match="skip must be a sequence of patterns, .* 'Linear'"):
        find_blocks(mixed_model(), "expand", "Linear")


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match=r"skip must hold regular expressions, got '\('"):
        found(mixed_model(), "(")


def test_a_model_without_layers_is_refused_with_the_reasons() -> None:
    with pytest.raises(ValueError, match="model must have a layer .*no rule for LayerNorm"):
        found(nn.Sequential(nn.LayerNorm(3)))


def test_a_frozen_weight_leaves_its_layer_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    assert found(model) == (["1"], {"0": "its weight is frozen"})


def test_a_frozen_bias_is_left_out_of_its_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    blocks, left_alone = find_blocks(model, "expand", ())
    assert blocks[0].layer.parameters() == [model[0].weight] and not left_alone
    assert blocks[1].layer.parameters() == [model[1].weight, model[1].bias]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_layers_that_share_a_parameter_are_left_alone(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    setattr(model[2], name, getattr(model[0], name))
    reasons = {"0": "shares a parameter with '2'", "2": "shares a parameter with '0'"}
    assert found(model) == (["1"], reasons)


def test_a_layer_that_shares_its_weight_with_an_embedding_is_left_alone() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    reasons = {"0": "no rule for Embedding", "2": "shares a parameter with '0'"}
    assert found(model) == (["1"], reasons)


def test_a_module_registered_twice_is_one_block() -> None:
    layer = nn.Linear(3, 3)
    assert found(nn.Sequential(layer, nn.ReLU(), layer)) == (["0"], {})


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_computed_weight_leaves_its_layer_alone() -> None:
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.weight_norm(nn.Linear(3, 3)), parametrized)
    names, left_alone = found(model)
    assert names == ["0"]
    assert left_alone["1"] == "its weight is computed from other parameters"
    assert left_alone["2"] == "no rule for ParametrizedLinear"


def test_attentions_own_output_layer_is_left_alone() -> None:
    names, left_alone = found(nn.TransformerEncoderLayer(4, 2, 8))
    assert names == ["linear1", "linear2"]
    assert left_alone["self_attn"] == "no rule for MultiheadAttention"
    assert left_alone["self_attn.out_proj"] == "no rule for NonDynamicallyQuantizableLinear"


def a_block() -> Block:
    blocks, _ = find_blocks(nn.Linear(2, 3, bias=False, dtype=torch.float64), "expand", ())
    return blocks[0]


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
        block.add((a, count), (g, terms))
    assert block.pending
    block.update(0.9, reduction)
    assert not block.pending
    assert_same(block.factors[0].mean(), sum(inputs) / 12)
    divisor = 5 if reduction == "mean" else 1
    assert_same(block.factors[1].mean(), sum(gradients) / divisor)
    assert_same(block.factors[0].weight, torch.tensor(0.1, dtype=torch.float64))


def test_an_update_without_calls_changes_nothing() -> None:
    block = a_block()
    block.update(0.9, "mean")
    assert block.factors == () and block.parts() == {}


def test_no_examples_are_a_bad_batch() -> None:
    block = a_block()
    block.add((torch.zeros(2, 2), 0), (torch.zeros(3, 3), 0))
    block.update(0.9, "mean")
    assert [int(factor.skipped) for factor in block.factors] == [1, 1]
    assert [float(factor.weight) for factor in block.factors] == [0, 0]


def test_a_restored_block_has_copies_of_the_saved_parts() -> None:
    block = a_block()
    block.add((positive_definite(2, 2), 3), (positive_definite(3, 3), 2))
    block.update(0.9, "mean")
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
    block = Block(RULES[nn.Linear]("", nn.Linear(2, 3, bias=False).bfloat16(), "expand"))
    block.add((positive_definite(2, 2), 3), (positive_definite(3, 3), 2))
    block.update(0.9, "mean")
    factors = block.restored(factor_state(block)).factors
    assert {factor.total.dtype for factor in factors} == {torch.float32}
    assert {factor.skipped.dtype for factor in factors} == {torch.int64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("gradient"), "must hold .*'gradient', .* got .*'input'"),
        (lambda s: s.update(other={}), "must hold .*'gradient', .* got .*'other'"),
        (lambda s: s["input"].pop("total"), r"input must hold .*total.* got"),
        (lambda s: s["gradient"].update(other=torch.ones(1)), "gradient must hold"),
        (
            lambda s: s["gradient"].update(total=torch.full((2, 2), math.nan)),
            r"gradient.total must have shape \(3, 3\), got \(2, 2\)",
        ),
    ],
    ids=["part-missing", "unknown-part", "field-missing", "unknown-field", "shape"],
)
def test_a_state_that_does_not_fit_is_refused(change: object, message: str) -> None:
    block = a_block()
    block.add((positive_definite(2, 2), 3), (positive_definite(3, 3), 2))
    block.update(0.9, "mean")
    state = factor_state(block)
    change(state)
    with pytest.raises(ValueError, match=f"load_state_dict: .*{message}"):
        block.restored(state)
