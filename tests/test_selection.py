"""Which layers of a model are preconditioned, and why others are not."""

from __future__ import annotations

import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from kfac_fast import KFAC
from kfac_fast.layers import RULES
from kfac_fast.selection import find_blocks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class OwnLinear(nn.Linear):
    """A subclass may compute anything."""


def found(model: nn.Module, *skip: str) -> tuple[list[str], dict[str, str]]:
    blocks, left_alone = find_blocks(model, "expand", skip)
    return [block.layer.name for block in blocks], left_alone


def tied_with(names: str) -> str:
    return f"shares a parameter with {names}; untied, it would have a block"


def mixed_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Sequential(nn.Linear(4, 3), OwnLinear(3, 3)),
        nn.Bilinear(3, 3, 3),
        nn.Linear(3, 2, bias=False),
    )


def test_layers_with_a_rule_are_found_in_the_models_order() -> None:
    names, left_alone = found(mixed_model())
    assert names == ["0", "1", "3.0", "5"]
    assert left_alone == {"3.1": "no rule for OwnLinear", "4": "no rule for Bilinear"}


def test_a_rule_exists_for_every_linear_layer_convolution_and_normalization() -> None:
    names = {f"{kind}{d}d" for kind in ("Conv", "ConvTranspose", "BatchNorm") for d in (1, 2, 3)}
    names |= {"Linear", "Embedding", "LayerNorm", "RMSNorm", "GroupNorm"}
    assert {module.__name__ for module in RULES} == names


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("^0$", ["1", "3.0", "5"]),
        ("3", ["0", "1", "5"]),
        (r"\.", ["0", "1", "5"]),
        ("Conv", ["1", "3.0", "5"]),
        ("Norm", ["0", "3.0", "5"]),
    ],
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
    with pytest.raises(ValueError, match="model must have a layer .*no rule for Bilinear"):
        found(nn.Sequential(nn.Bilinear(3, 3, 3)))


def test_a_frozen_weight_leaves_a_block_of_the_bias() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    blocks, left_alone = find_blocks(model, "expand", ())
    assert blocks[0].layer.parameters() == [model[0].bias]
    assert blocks[1].layer.parameters() == [model[1].bias]
    assert blocks[2].layer.parameters() == [model[2].weight, model[2].bias]
    assert not left_alone
    model[0].bias.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    assert found(model) == (["2"], dict.fromkeys("01", "its weight is frozen"))


def test_shifts_of_norms_of_any_kind_are_tied_and_need_gradients() -> None:
    norms = nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4)
    model = nn.ModuleList([*norms, nn.Linear(4, 4)])
    for norm in norms:
        norm.weight.requires_grad_(False)
        norm.bias = norms[0].bias
    assert found(model) == (["0", "3"], {})
    left_alone = find_blocks(model, "expand", (), forward_only=True)[1]
    assert left_alone == dict.fromkeys("012", "its only factor needs gradients")
    model[3].bias = norms[0].bias
    model.append(nn.Linear(4, 4))
    names, left_alone = found(model)
    assert names == ["4"] and left_alone["3"] == tied_with("'0', '1', '2'")


def test_biases_are_tied_if_their_gradients_have_one_layout() -> None:
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(2, 4), nn.Conv2d(4, 4, 3, groups=2)])
    for layer in model:
        layer.weight.requires_grad_(False)
    model[1].bias = model[0].bias
    assert found(model) == (["0", "2"], {})
    model[2].bias = model[0].bias
    model.append(nn.Linear(2, 2))
    names, left_alone = found(model)
    assert names == ["3"] and left_alone["0"] == tied_with("'2'")


def test_a_frozen_bias_is_left_out_of_its_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    blocks, left_alone = find_blocks(model, "expand", ())
    assert blocks[0].layer.parameters() == [model[0].weight] and not left_alone
    assert blocks[1].layer.parameters() == [model[1].weight, model[1].bias]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_layers_that_share_one_of_two_parameters_are_left_alone(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    setattr(model[2], name, getattr(model[0], name))
    reasons = {"0": tied_with("'2'"), "2": tied_with("'0'")}
    assert found(model) == (["1"], reasons)


def test_layers_that_share_all_parameters_are_one_block() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(2, 2, 3, stride=s, padding=1) for s in (1, 2)), nn.Linear(4, 2, bias=False)
    )
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    blocks, left_alone = find_blocks(model, "expand", ())
    assert [[layer.name for layer in block.layers] for block in blocks] == [["0", "1"], ["2"]]
    assert left_alone == {}
    names, left_alone = found(model, "^1$")  # whose gradients are in the other's
    assert names == ["2"] and left_alone["0"] == tied_with("'1'")


@pytest.mark.parametrize("kind", [nn.Linear, partial(nn.Conv1d, kernel_size=1)])
def test_layers_of_one_weight_with_one_bias_or_none_are_one_block(kind: Any) -> None:
    model = nn.Sequential(kind(3, 3, bias=False), *(kind(3, 3) for _ in range(3)))
    for layer in model:
        layer.weight = model[0].weight
    model[1].bias.requires_grad_(False)
    model[3].bias = model[2].bias
    (block,) = find_blocks(model, "expand", ())[0]
    assert [layer.name for layer in block.layers] == ["2", "3", "0", "1"]
    assert block.layer.parameters() == [model[0].weight, model[2].bias]
    assert block.layer.matrix_shape() == (3, 4)
    model[1].bias.requires_grad_(True)
    model.append(nn.Linear(2, 2))
    names, left_alone = found(model)
    assert names == ["4"] and left_alone == {
        "0": tied_with("'1', '2', '3'"),
        "1": tied_with("'0', '2', '3'"),
        "2": tied_with("'0', '1'"),
        "3": tied_with("'0', '1'"),
    }


def test_norms_of_one_scale_are_one_block_if_both_or_none_have_a_shift() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3, bias=False), nn.RMSNorm(3))
    model[1].weight = model[2].weight
    assert found(model) == (["0", "1"], {})
    model[1].weight = model[2].weight = model[0].weight
    model.append(nn.Linear(3, 2))
    assert found(model)[0] == ["3"]


def test_a_layer_that_shares_its_weight_with_one_of_another_type_is_left_alone() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    reasons = {"0": tied_with("'2'"), "2": tied_with("'0'")}
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


@pytest.mark.parametrize(
    ("option", "reason"),
    [("sparse", "it has sparse"), ("scale_grad_by_freq", "it has scale_grad_by_freq")],
)
def test_an_embedding_with_another_gradient_is_left_alone(option: str, reason: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, **{option: True}), nn.Linear(3, 2))
    assert found(model) == (["1"], {"0": reason})


def test_attention_has_a_block_for_each_projection() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    names, left_alone = found(layer)
    projections = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    assert names == [*projections, "linear1", "linear2", "norm1", "norm2"] and not left_alone
    names, left_alone = found(layer, "self_attn$")
    assert names == ["linear1", "linear2", "norm1", "norm2"]
    assert left_alone == {"self_attn": "skipped by pattern 'self_attn$'"}
    assert found(nn.MultiheadAttention(4, 2))[0] == ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.mark.parametrize(
    ("parameter", "frozen"),
    [("in_proj_weight", ["q", "k", "v"]), ("out_proj.weight", ["out"])],
)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_a_frozen_weight_leaves_blocks_of_its_projections_biases(
    parameter: str, frozen: list[str], bias: bool
) -> None:
    module = nn.MultiheadAttention(4, 2, bias=bias)
    module.get_parameter(parameter).requires_grad_(False)
    blocks, left_alone = find_blocks(module, "expand", ())
    assert left_alone == {f"{name}_proj": "its weight is frozen" for name in frozen if not bias}
    assert [block.layer.matrix_shape() for block in blocks] == [
        (4, 1 if name in frozen else 4 + bias)
        for name in ("q", "k", "v", "out")
        if bias or name not in frozen
    ]


TRANSFORMER_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@pytest.mark.parametrize("kind", TRANSFORMER_LAYERS)
@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"approx": "reduce"}, True),
        ({"approx": "expand"}, True),  # of its normalisations
        ({"approx": "expand", "skip": ["Norm"]}, False),
        ({"approx": "reduce", "skip": ["Norm", "linear"]}, False),
        ({"skip": ["Norm"], "damping_mode": "exact", "eigenvalue_correction": True}, True),
    ],
    ids=str,
)
def test_transformer_layers_with_positions_in_front_are_warned_of(
    kind: type[nn.Module], options: dict[str, Any], warned: bool
) -> None:
    for batch_first in (False, True):
        layers = [kind(4, 2, 8, batch_first=batch_first) for _ in range(3)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            KFAC(nn.Sequential(nn.Linear(4, 4), *layers), **options)
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == (warned and not batch_first)
        assert all("transformer layers (3, the first is '1')" in message for message in messages)
        assert all(warning.filename == __file__ for warning in caught)


def test_attention_alone_may_have_positions_in_front() -> None:
    KFAC(nn.Sequential(nn.MultiheadAttention(4, 2), nn.LayerNorm(4)), approx="reduce")


@pytest.mark.parametrize("bias", [False, True])
def test_queries_and_keys_may_have_one_weight_but_not_two_biases(bias: bool) -> None:
    module = nn.MultiheadAttention(4, 2, vdim=5, bias=bias)
    module.k_proj_weight = module.q_proj_weight
    blocks, left_alone = find_blocks(module, "expand", ())
    names = [[layer.name for layer in block.layers] for block in blocks]
    if bias:
        assert names == [["v_proj"], ["out_proj"]]
        assert left_alone == {"q_proj": tied_with("'k_proj'"), "k_proj": tied_with("'q_proj'")}
    else:
        assert names == [["q_proj", "k_proj"], ["v_proj"], ["out_proj"]] and not left_alone


def test_an_added_key_and_value_are_said_to_be_left_alone() -> None:
    module = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    reason = "it joins keys or values, and is no weight of a layer"
    names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    assert found(module) == (names, {"bias_k": reason, "bias_v": reason})
    module.bias_v.requires_grad_(False)
    model = nn.Sequential(nn.Linear(4, 4), module)
    assert found(model) == (["0", *(f"1.{name}" for name in names)], {"1.bias_k": reason})
    assert found(model, "^1$") == (["0"], {"1": "skipped by pattern '^1$'"})
    assert f"1.bias_k: left alone, {reason}" in KFAC(model).summary()


def test_patterns_reach_the_projections_of_attention() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    names, left_alone = found(layer, "out_proj", "q_proj$")
    assert names == ["self_attn.k_proj", "self_attn.v_proj", "linear1", "linear2", "norm1", "norm2"]
    assert left_alone == {
        "self_attn.q_proj": "skipped by pattern 'q_proj$'",
        "self_attn.out_proj": "skipped by pattern 'out_proj'",
    }
    assert found(layer, "self_attn", "out_proj", "q_proj")[0] == names[2:]
    for pattern in ("a_proj", "NonDynamically"):  # the class of the module inside
        with pytest.raises(ValueError, match=f"got '{pattern}' that matches none"):
            found(layer, pattern)


def test_a_compiled_modules_layers_have_the_names_of_the_module() -> None:
    model = nn.Sequential(nn.Linear(3, 4), torch.compile(nn.Sequential(nn.Linear(4, 2))))
    assert found(torch.compile(model))[0] == ["0", "1.0"]
    assert found(nn.Sequential(torch.compile(nn.MultiheadAttention(4, 2))))[0][0] == "0.q_proj"
    assert found(torch.compile(nn.Linear(3, 3)))[0] == [""]


def test_a_complex_weight_leaves_its_layer_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, dtype=torch.complex64))
    assert found(model) == (["0"], {"1": "its weight is complex"})
