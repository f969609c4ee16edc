"""Attention's projections against linear modules that compute the same attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import preconditioner
from plain_kfac import assert_solved, covariances
from torch import Tensor, nn

from kfac_fast import KFAC

pytestmark = pytest.mark.usefixtures("one_thread")
EMBED, HEADS = 4, 2


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class WrittenOut(nn.Module):
    """The same attention from four linear modules, the batch first."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        has_bias = module.in_proj_bias is not None
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.detach().chunk(3)
        else:
            weights = [getattr(module, f"{letter}_proj_weight").detach() for letter in "qkv"]
        biases = module.in_proj_bias.detach().chunk(3) if has_bias else [None] * 3
        weights, biases = [*weights, module.out_proj.weight], [*biases, module.out_proj.bias]
        for name, weight, bias in zip("qkvo", weights, biases, strict=True):
            linear = nn.Linear(*reversed(weight.shape), bias=has_bias, dtype=torch.float64)
            linear.weight.data = weight.detach().clone()
            if bias is not None:
                linear.bias.data = bias.detach().clone()
            setattr(self, name, linear)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip((self.q, self.k, self.v), (query, key, value), strict=True)
        heads = [linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear, x in parts]
        mixed = F.scaled_dot_product_attention(*heads)
        return self.o(mixed.transpose(1, 2).flatten(2))


OPTIONS: dict[str, dict[str, Any]] = {
    "packed": {},
    "no-bias": {"bias": False},
    "other-sizes": {"kdim": 3, "vdim": 5},
    "key-of-twice-the-size": {"kdim": 2 * EMBED, "vdim": 3 * EMBED},
}
WIDTHS = {"other-sizes": (3, 5), "key-of-twice-the-size": (2 * EMBED, 3 * EMBED)}


def query_key_value(name: str, inputs: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of 3 examples with 5 queries and, unless in self-attention, 6 keys."""
    query = torch.randn(3, 5, EMBED, dtype=torch.float64)
    if inputs == "self":
        return query, query, query
    key_width, value_width = WIDTHS.get(name, (EMBED, EMBED))
    key = torch.randn(3, 6, key_width, dtype=torch.float64)
    value = torch.randn(3, 6, value_width, dtype=torch.float64)
    return query, key, key if inputs == "encoder" else value


CASES = [
    *((name, "self") for name in ("packed", "no-bias")),
    *((name, "encoder") for name in ("packed", "no-bias")),
    *((name, "different") for name in OPTIONS),
]


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(("name", "inputs"), CASES)
def test_a_step_is_that_of_four_linear_modules(
    name: str, inputs: str, need_weights: bool, batch_first: bool, approx: str
) -> None:
    options = {"batch_first": batch_first, "dtype": torch.float64, **OPTIONS[name]}
    module = nn.MultiheadAttention(EMBED, HEADS, **options)
    written = WrittenOut(module)
    x = query_key_value(name, inputs)
    weights = torch.randn(3, 5, EMBED, dtype=torch.float64)
    ours, theirs = (preconditioner(m, approx=approx) for m in (module, written))
    given = {id(t): t if batch_first else t.transpose(0, 1) for t in x}
    output, _ = module(*(given[id(t)] for t in x), need_weights=need_weights)
    output = output if batch_first else output.transpose(0, 1)
    for kfac, outputs in ((ours, output), (theirs, written(*x))):
        (outputs * weights).sum(dim=(1, 2)).mean().backward()
        kfac.step()
    found, expected = covariances(ours), covariances(theirs)
    for ours_name, name in zip(("q_proj", "k_proj", "v_proj", "out_proj"), "qkvo", strict=True):
        assert_solved(found[ours_name][0], expected[name][0])
        if name == "k" and approx == "reduce":
            # Softmax does not see a shift of all keys: their gradients add up to rounding.
            assert max(found[ours_name][1].max(), expected[name][1].max()) < 1e-28
        else:
            assert_solved(found[ours_name][1], expected[name][1])
    rows = [written.q.weight.grad, written.k.weight.grad, written.v.weight.grad]
    if module.in_proj_weight is not None:
        assert_solved(module.in_proj_weight.grad, torch.cat(rows))
    else:
        for letter, row in zip("qkv", rows, strict=True):
            assert_solved(getattr(module, f"{letter}_proj_weight").grad, row)
    assert_solved(module.out_proj.weight.grad, written.o.weight.grad)
    if module.in_proj_bias is not None:
        biases = [written.q.bias.grad, written.k.bias.grad, written.v.bias.grad]
        assert_solved(module.in_proj_bias.grad, torch.cat(biases), condition=1e6)


def test_queries_keys_and_values_of_one_tensor_share_their_covariance() -> None:
    module = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    kfac = KFAC(module)
    x = torch.randn(3, 5, EMBED)
    module(x, x, x)[0].sum().backward()
    kfac.step()
    first, *others = (block.factors[0].mean for block in kfac._blocks[:3])
    assert all(torch.equal(first, other) for other in others)


def test_outputs_are_bit_for_bit_those_without_hooks() -> None:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 8, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, EMBED)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    expected = layer(x, src_mask=mask)
    with KFAC(layer):
        assert torch.equal(layer(x, src_mask=mask), expected)
    assert torch.equal(layer(x, src_mask=mask), expected)


def test_a_forward_pass_that_raises_leaves_attention_as_it_was() -> None:
    module = nn.MultiheadAttention(EMBED, HEADS)
    kfac = KFAC(module)
    with pytest.raises(AssertionError, match="key shape"):
        module(torch.randn(5, 3, EMBED), torch.randn(5, 2, EMBED), torch.randn(5, 3, EMBED))
    assert torch._C._len_torch_function_stack() == 0
    x = torch.randn(5, 3, EMBED)
    module(x, x, x)[0].sum().backward()
    kfac.step()


def test_evaluation_is_not_looked_into() -> None:
    module = nn.MultiheadAttention(EMBED, HEADS, batch_first=True).eval()
    kfac = KFAC(module)
    with torch.no_grad():
        module(*[torch.randn(3, 5, EMBED)] * 3)
    assert not kfac._capture.calls and not any(block.pending for block in kfac._blocks)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_queries_and_keys_of_one_weight_are_tied(approx: str) -> None:
    module = nn.MultiheadAttention(EMBED, HEADS, bias=False, vdim=5, batch_first=True).double()
    module.k_proj_weight = module.q_proj_weight
    written = WrittenOut(module)
    written.k.weight = written.q.weight
    query, value = (torch.randn(3, 6, width, dtype=torch.float64) for width in (EMBED, 5))
    results = []
    for model in (module, written):
        kfac = preconditioner(model, approx=approx)
        output = model(query, query, value)
        (output[0] if isinstance(output, tuple) else output).pow(3).mean().backward()
        kfac.step()
        results.append(covariances(kfac))
    assert list(results[0]) == ["q_proj", "v_proj", "out_proj"]
    for one, two in zip(*(result.values() for result in results), strict=True):
        for factor, expected in zip(one, two, strict=True):
            assert_solved(factor, expected)
    assert_solved(module.q_proj_weight.grad, written.q.weight.grad)
