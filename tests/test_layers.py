"""Each layer's rule: gradients as matrices, and sums of outer products of inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import CONVOLUTIONS, Convolution
from oracle import (
    assert_same,
    assert_within_budget,
    bits,
    convolution,
    outer_sum,
    patches,
    with_bias,
)
from plain_kfac import example_gradients
from torch import Tensor, nn

from kfac_fast import ops
from kfac_fast.layers import RULES, Layer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]
convolutions = pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
approximations = pytest.mark.parametrize("approx", ["expand", "reduce"])

MODULES: dict[str, Callable[..., nn.Module]] = {
    "linear": lambda bias: nn.Linear(3, 4, bias=bias),
    "conv1d": lambda bias: nn.Conv1d(3, 4, 2, bias=bias),
    "conv2d": lambda bias: nn.Conv2d(2, 3, (2, 3), bias=bias),
    "conv2d-groups": lambda bias: nn.Conv2d(4, 6, 3, groups=2, bias=bias),
    "conv2d-depthwise": lambda bias: nn.Conv2d(3, 3, 3, groups=3, bias=bias),
    "conv3d": lambda bias: nn.Conv3d(2, 3, (1, 2, 3), bias=bias),
    "transposed1d": lambda bias: nn.ConvTranspose1d(3, 4, 2, bias=bias),
    "transposed2d": lambda bias: nn.ConvTranspose2d(2, 3, (2, 3), bias=bias),
    "transposed2d-groups": lambda bias: nn.ConvTranspose2d(4, 6, (3, 2), groups=2, bias=bias),
    "transposed3d": lambda bias: nn.ConvTranspose3d(2, 3, (1, 2, 3), bias=bias),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def rule(module: nn.Module, approx: str = "expand") -> Layer:
    return RULES[type(module)]("layer", module, approx)


def layer_of(case: Convolution, approx: str = "expand") -> tuple[Layer, Tensor]:
    """A convolution with a bias, two output channels a group, and an input for it."""
    module = convolution(len(case.size), case.channels, 2 * case.groups, case.options, bias=True)
    x = torch.randn(3, case.channels, *case.size, dtype=torch.float64)
    return rule(module, approx), x


def parameter_matrices(layer: Layer) -> Tensor:
    """Weight and bias as ``[groups, out, in + 1]``."""
    weight = layer.weight_matrix(layer.weight.detach())
    bias = layer.parameters()[1].detach().reshape(*weight.shape[:-1], 1)
    matrix = torch.cat([weight, bias], -1)
    return matrix.reshape(layer.groups, *matrix.shape[-2:])


def write(layer: Layer, matrix: Tensor) -> None:
    for own, entries in layer.parts(layer.gradients(), matrix):
        assert own.shape == entries.shape
        own.copy_(entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", ["bias", "no-bias", "frozen-bias"])
@pytest.mark.parametrize("name", MODULES)
def test_gradients_survive_the_round_trip_bit_for_bit(
    name: str, bias: str, dtype: torch.dtype
) -> None:
    module = MODULES[name](bias != "no-bias").to(dtype)
    if bias == "frozen-bias":
        module.bias.requires_grad_(False)
    layer = rule(module)
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in layer.parameters()]
    result_dtype = torch.promote_types(dtype, torch.float32)
    matrix = layer.matrix(layer.gradients(), result_dtype).clone()
    for parameter in layer.parameters():
        parameter.grad.fill_(math.nan)
    write(layer, matrix)
    assert len(before) == 1 + (bias == "bias")
    for parameter, grad in zip(layer.parameters(), before, strict=True):
        assert torch.equal(bits(parameter.grad), bits(grad))
    assert matrix.dtype == result_dtype and matrix.is_contiguous()
    if bias == "frozen-bias":
        assert module.bias.grad is None


@pytest.mark.parametrize("name", ["conv2d", "conv2d-groups", "transposed2d-groups"])
def test_gradients_in_channels_last_memory_survive_the_round_trip(name: str) -> None:
    module = MODULES[name](True).to(memory_format=torch.channels_last)
    layer = rule(module)
    grad = torch.randn(module.weight.shape)
    expected = grad.clone()
    module.weight.grad = grad.to(memory_format=torch.channels_last)
    module.bias.grad = torch.randn(6 if "groups" in name else 3)
    matrix = layer.matrix(layer.gradients(), torch.float32).clone()
    module.weight.grad.fill_(math.nan)
    write(layer, matrix)
    assert torch.equal(module.weight.grad, expected)


def test_a_missing_gradient_counts_as_zero_and_stays_missing() -> None:
    module = nn.Linear(3, 4)
    layer = rule(module)
    module.weight.grad = torch.randn(4, 3)
    matrix = layer.matrix(layer.gradients(), torch.float32).clone()
    assert torch.equal(matrix, torch.cat([module.weight.grad, torch.zeros(4, 1)], 1))
    write(layer, 2 * matrix)
    assert torch.equal(module.weight.grad, 2 * matrix[:, :3]) and module.bias.grad is None


def test_a_linear_output_is_the_input_times_the_matrix() -> None:
    module = nn.Linear(3, 4, dtype=torch.float64)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    (matrix,) = parameter_matrices(rule(module))
    assert_same((with_bias(x, True) @ matrix.mT).flatten(), module(x).detach().flatten())


@convolutions
def test_a_convolutions_output_is_its_patches_times_the_matrix(case: Convolution) -> None:
    layer, x = layer_of(case)
    rows = with_bias(patches(x, **case.options), True)
    output = layer.module(x).detach().flatten(2).mT.unflatten(-1, (layer.groups, -1))
    product = torch.einsum("nsgi,goi->nsgo", rows, parameter_matrices(layer))
    assert_same(product.flatten(), output.flatten())


@convolutions
def test_a_convolutions_summed_output_is_its_window_sum_times_the_matrix(
    case: Convolution,
) -> None:
    layer, x = layer_of(case)
    sums = ops.conv_window_sum(x, bias=True, **case.options).reshape(len(x), layer.groups, -1)
    output = layer.module(x).detach().flatten(2).sum(-1).unflatten(1, (layer.groups, -1))
    product = torch.einsum("ngi,goi->ngo", sums, parameter_matrices(layer))
    assert_same(product.flatten(), output.flatten())


@approximations
@convolutions
def test_a_convolutions_sums_are_of_its_patches_and_output_pixels(
    case: Convolution, approx: str
) -> None:
    layer, x = layer_of(case, approx)
    output = layer.module(x).detach()
    rows = with_bias(patches(x, **case.options), True)
    gradient = torch.randn_like(output)
    pixels = gradient.flatten(2).mT.unflatten(-1, (layer.groups, -1))
    positions = rows.shape[1]
    expected = (rows.flatten(0, 1), pixels.flatten(0, 1))
    if approx == "reduce":
        expected = (rows.mean(1), pixels.sum(1))
    inputs, count = layer.input_gram(x, output)
    assert_same(inputs, outer_sum(expected[0]))
    assert count == len(x) * (positions if approx == "expand" else 1)
    assert_same(layer.gradient_gram(gradient, 0.5), 0.5 * outer_sum(expected[1]))
    assert layer.examples(output) == len(x)


@approximations
@pytest.mark.parametrize("shared", [(), (4,), (2, 3)], ids=["rows", "sequence", "grid"])
def test_a_linear_layers_sums_are_of_its_rows(shared: tuple[int, ...], approx: str) -> None:
    layer = rule(nn.Linear(3, 4, dtype=torch.float64), approx)
    x, gradient = (torch.randn(5, *shared, d, dtype=torch.float64) for d in (3, 4))
    rows, pixels = with_bias(x, True).reshape(5, -1, 1, 4), gradient.reshape(5, -1, 1, 4)
    expected = (rows.flatten(0, 1), pixels.flatten(0, 1))
    if approx == "reduce":
        expected = (rows.mean(1), pixels.sum(1))
    inputs, count = layer.input_gram(x, gradient)
    assert_same(inputs, outer_sum(expected[0]))
    assert count == len(expected[0])
    assert_same(layer.gradient_gram(gradient, 0.5), 0.5 * outer_sum(expected[1]))
    assert layer.examples(gradient) == 5


@approximations
@pytest.mark.parametrize("name", MODULES)
def test_an_unbatched_input_is_a_batch_of_one(name: str, approx: str) -> None:
    module = MODULES[name](True).double()
    layer = rule(module, approx)
    channels = module.in_features if name == "linear" else module.in_channels
    spatial = () if name == "linear" else (5, 4, 6)[: module.weight.dim() - 2]
    x = torch.randn(channels, *spatial, dtype=torch.float64)
    output = module(x).detach()
    inputs, count = layer.input_gram(x, output)
    batched_inputs, batched_count = layer.input_gram(x[None], output[None])
    assert torch.equal(inputs, batched_inputs) and count == batched_count
    gradient_sum = layer.gradient_gram(output, 1.0)
    assert torch.equal(gradient_sum, layer.gradient_gram(output[None], 1.0))
    assert layer.examples(output) == layer.examples(output[None]) == 1


@approximations
@pytest.mark.parametrize("size", [(9, 5), (10, 5), (10, 6)])
def test_a_transposed_convolution_may_be_given_its_output_size(
    size: tuple[int, int], approx: str
) -> None:
    options = {"kernel_size": 3, "stride": 2, "padding": 1}
    module = nn.ConvTranspose2d(2, 4, groups=2, dtype=torch.float64, **options)
    x = torch.randn(3, 2, 5, 3, dtype=torch.float64)
    output = module(x, output_size=size).detach()
    inputs, count = rule(module, approx).input_gram(x, output)
    extra = (size[0] - 9, size[1] - 5)
    rows = patches(x, groups=2, transposed=True, output_padding=extra, **options)
    rows = with_bias(rows, True)
    assert_same(inputs, outer_sum(rows.flatten(0, 1) if approx == "expand" else rows.mean(1)))
    assert count == 3 * (size[0] * size[1] if approx == "expand" else 1)


@approximations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_half_precision_layers_have_float32_sums(
    name: str, dtype: torch.dtype, approx: str
) -> None:
    module = MODULES[name](True)
    channels = module.in_features if name == "linear" else module.in_channels
    spatial = () if name == "linear" else (5, 4, 6)[: module.weight.dim() - 2]
    x = torch.randn(3, channels, *spatial).to(dtype)
    output = module(x.float()).detach().to(dtype)
    layer = rule(module, approx)
    exact = rule(module.double(), approx)
    results = [
        (to.input_gram(x.to(as_dtype), output)[0], to.gradient_gram(output.to(as_dtype), 2.0))
        for to, as_dtype in ((layer, dtype), (layer, torch.float32), (exact, torch.float64))
    ]
    for result, torch_result, ref64 in zip(*results, strict=True):
        assert result.dtype == torch.float32
        assert_within_budget(result, torch_result, ref64)


def assert_squares_are_of_the_examples_gradients(layer: Layer, x: Tensor) -> None:
    gradient = torch.randn_like(layer.module(x))
    expected = example_gradients(layer, x, gradient)
    *groups, outputs, inputs = layer.matrix_shape()
    right, left = (
        torch.linalg.qr(torch.randn(*groups, n, n, dtype=torch.float64))[0]
        for n in (inputs, outputs)
    )
    rotated = left.mT @ expected @ right
    result = layer.squared_gradients(x, gradient, right, left, 0.5)
    assert_same(result, 0.5 * rotated.square().sum(0))


@convolutions
def test_a_convolutions_squared_gradients_are_those_of_autograd(case: Convolution) -> None:
    layer, x = layer_of(case)
    assert_squares_are_of_the_examples_gradients(layer, x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [(), (2,), (3, 5)], ids=["rows", "pair", "grid"])
def test_a_linear_layers_squared_gradients_are_those_of_autograd(
    shared: tuple[int, ...], bias: bool
) -> None:
    """With few positions the rows are rotated, with many the gradients."""
    layer = rule(nn.Linear(3, 4, bias=bias, dtype=torch.float64))
    assert_squares_are_of_the_examples_gradients(
        layer, torch.randn(7, *shared, 3, dtype=torch.float64)
    )
