"""The operators in the dispatcher: fakes, native twins, shapes without data, the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CONVOLUTIONS
from oracle import positive_definite
from torch import Tensor

from kfac_fast import ops, schema

pytestmark = pytest.mark.usefixtures("one_thread")
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own

CONV_ARGUMENTS = ([2, 3], [1, 2], [1, 1, 0, 1], "zeros", [2, 1], 2, False, [0, 0])


def matrices() -> list[Tensor]:
    torch.manual_seed(0)
    sizes = ((3, 3), (2, 2, 2), (3, 3))
    return [positive_definite(*shape).float() for shape in sizes]


def dispatcher_arguments(op: str) -> tuple[Any, ...]:
    """Valid arguments of ``torch.ops.kfac_fast.<op>``, outputs included."""
    torch.manual_seed(0)
    x, image = torch.randn(5, 4), torch.randn(2, 4, 5, 6)
    mask = torch.tensor([True, True, False, True, True])
    segments = torch.tensor([0, 2, 2, 0, 1])
    square = [m.clone() for m in matrices()]
    outs = [torch.zeros_like(m) for m in square]
    info, values = torch.zeros(4, dtype=torch.int32), torch.zeros(4)
    damping = [torch.tensor(0.1), torch.tensor([0.1, 0.2]), torch.tensor(0.3)]
    grads = [torch.randn_like(m) for m in square]
    sides = (square, [m.clone() for m in square])
    rows = {
        "gram": (x, mask, 2, True, 0.5, 0.9, torch.zeros(2, 3, 3)),
        "shared_gram": (x, mask, segments, 3, "mean", 1, True, 1.0, 0.9, torch.zeros(5, 5)),
        "conv_expand_gram": (image, *CONV_ARGUMENTS, True, 1.0, 0.9, torch.zeros(2, 13, 13)),
        "conv_reduce_gram": (image, *CONV_ARGUMENTS, True, 1.0, 0.9, torch.zeros(2, 13, 13)),
        "conv_window_sum": (image, *CONV_ARGUMENTS, True, 1.0, 0.9, torch.zeros(2, 2, 13)),
        "feature_norm_gram": (
            *(x, x.clone(), mask, segments, 3, 1e-5, True, True),
            *(0.5, 0.9, torch.zeros(4, 2, 2)),
        ),
        "channel_norm_gram": (
            *(image, image.clone(), x[0], x[1].abs(), -1, 1e-5, False),
            *(1.0, 0.9, torch.zeros(4, 1, 1)),
        ),
        "mean_eigenvalues": (square, values),
        "update_averages": (
            *([2 * m for m in square], [2, 1.0, 5], 0.9, True, outs),
            *([torch.zeros(()) for _ in outs], [torch.zeros((), dtype=torch.int64) for _ in outs]),
        ),
        "eigh": (square, [m[..., 0].contiguous() for m in square], outs, info),
        "damped_inverse": (square, damping, outs, info, values),
        "damped_cholesky": (square, damping, outs, info, None),
        "precondition": (grads, *sides, outs, torch.zeros(())),
        "cholesky_precondition": (grads, *sides, outs, torch.zeros(())),
    }
    return rows[op]


@pytest.mark.parametrize("op", schema.OPERATORS)
def test_opcheck(op: str) -> None:
    overload = getattr(torch.ops.kfac_fast, op).default
    torch.library.opcheck(overload, dispatcher_arguments(op))


def on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return [on_meta(v) for v in value] if isinstance(value, list) else value


def signature(namespace: str, op: str) -> str:
    schema = str(getattr(getattr(torch.ops, namespace), op).default._schema)
    return schema.partition("(")[2].rpartition(" -> ")[0]


# Those of convolutions take a plan in place of the geometry.
SHARED_SIGNATURES = [op for op in schema.NATIVE if not op.startswith("conv_")]


@pytest.mark.parametrize("op", SHARED_SIGNATURES)
def test_native_schema_is_the_same(op: str) -> None:
    assert signature("kfac_fast_native", op) == signature("kfac_fast", op)
    arguments = on_meta(list(dispatcher_arguments(op)))
    accepted = None if op == "gram" else True
    assert getattr(torch.ops.kfac_fast_native, op).default(*arguments) is accepted


def averages_like(x: Tensor) -> dict[str, list[Tensor]]:
    """New averages that :func:`ops.update_averages` changes."""
    zeros = torch.zeros_like(x), x.new_zeros(()), torch.zeros((), dtype=torch.int64)
    return {name: [z] for name, z in zip(("out", "weights", "skipped"), zeros, strict=True)}


PUBLIC_CALLS: dict[str, Callable[..., Any]] = {
    "gram": lambda x: ops.gram(x, bias=True, mask=x[..., 0] > 0, groups=2),
    "shared_gram": lambda x: ops.shared_gram(x[:, None], bias=True, reduction="sum"),
    "conv_expand_gram": lambda x: ops.conv_expand_gram(x[:, :, None], 1, bias=True, groups=2),
    "conv_reduce_gram": lambda x: ops.conv_reduce_gram(
        x[:, None], 3, padding="same", padding_mode="circular"
    ),
    "conv_window_sum": lambda x: ops.conv_window_sum(
        x[:, :, None], [2], stride=2, transposed=True, output_padding=(1,)
    ),
    "feature_norm_gram": lambda x: ops.feature_norm_gram(x, x + 1, mask=x[:, 0] > 0),
    "channel_norm_gram": lambda x: ops.channel_norm_gram(x, x + 1, num_groups=2, bias=False),
    "mean_eigenvalues": lambda x: ops.mean_eigenvalues([x.T @ x, x[0]]),
    "update_averages": lambda x: ops.update_averages(
        [x], [2.0], 0.5, **averages_like(x), covariances=False
    ),
    "eigh": lambda x: ops.eigh([x.T @ x, torch.stack([x.T @ x, torch.eye(4)])]),
    "damped_inverse": lambda x: ops.damped_inverse(
        [x.T @ x, (x.T @ x)[:2, :2].contiguous()], [0.5, x[0, 0].abs()], logdet=True
    ),
    "damped_cholesky": lambda x: ops.damped_cholesky([x.T @ x], 0.5),
    "precondition": lambda x: ops.precondition([x], [torch.eye(4)], [torch.eye(5)]),
    "cholesky_precondition": lambda x: ops.cholesky_precondition(
        [x], [torch.eye(4)], [2 * torch.eye(5)]
    ),
}


@compiles
@pytest.mark.parametrize("op", schema.OPERATORS)
def test_compiles_without_a_graph_break(op: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    call = PUBLIC_CALLS[op]
    torch.compiler.reset()
    # Code is generated for lists here, for tensors below; a graph break would show in any backend.
    backend = "inductor" if op == "damped_inverse" else "aot_eager"
    compiled = torch.compile(call, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(compiled, call(x), rtol=0, atol=0)


@compiles
def test_compiled_accumulation_writes_out() -> None:
    x, out = torch.randn(5, 4), torch.eye(4)
    expected = ops.gram(x, alpha=0.1, beta=0.9, out=out.clone())
    torch.compiler.reset()

    @torch.compile(fullgraph=True)
    def update(x: Tensor, out: Tensor) -> None:
        ops.gram(x, alpha=0.1, beta=0.9, out=out)

    update(x, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["2d-groups", "1d-transposed-stride", "3d"])
def test_shapes_are_known_without_data(name: str) -> None:
    case = CONVOLUTIONS[name]
    x = torch.randn(2, case.channels, *case.size)
    for op in (ops.conv_expand_gram, ops.conv_reduce_gram, ops.conv_window_sum):
        result = op(x.to("meta"), bias=True, **case.options)
        assert result.is_meta and result.shape == op(x, bias=True, **case.options).shape


def test_result_shape_is_for_accumulating_operators() -> None:
    with pytest.raises(ValueError, match="op must be an accumulating operator, got 'precondition'"):
        schema.result_shape("precondition")
    assert schema.result_shape("gram", torch.ones(5, 4), None, 2, True) == (2, 3, 3)
