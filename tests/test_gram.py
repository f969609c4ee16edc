"""Every implementation of ``gram`` in the table that this machine has, against the error budget."""

from __future__ import annotations

import math
from collections.abc import Callable

import oracle
import pytest
import torch
from cases import FLOATING, GRAM_OPTIONS, GRAM_ROWS, LONG_OR_WIDE_ROWS
from oracle import assert_symmetric, assert_within_budget, lower_only, spread, whole_numbers
from torch import Tensor

from kfac_fast import backends, ops, reference, schema

PRESENT = [
    pytest.param(i, device, id=f"{device}-{i.name}", marks=[pytest.mark.gpu] * (device == "cuda"))
    for device in ("cpu", "cuda")
    for i in backends.TABLE["gram", device]
    if i.missing is None
]
implementations = pytest.mark.parametrize(("implementation", "device"), PRESENT)
dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=str)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def check(
    implementation: backends.Implementation,
    x: Tensor,
    mask: Tensor | None = None,
    groups: int = 1,
    bias: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """Run into a poisoned output and check the result against the budget."""
    plain = oracle.gram(x, mask, groups, bias).to(x.device)
    before = torch.randn(plain.shape, dtype=torch.float64, device=x.device)
    before = (before + before.mT).to(schema.result_dtype(x.dtype))
    start = torch.full_like(before, math.nan) if beta == 0 else lower_only(before)
    arguments = (x, mask, groups, bias, alpha, beta)
    out, torch_result = start.clone(), start.clone()
    schema.check("gram", *arguments, out)
    refusal = implementation.reason_against(*arguments, out)
    if refusal is not None:
        pytest.skip(refusal)
    implementation.run(*arguments, out)
    reference.gram(*arguments, torch_result)
    assert_within_budget(out, torch_result, beta * before.double() + alpha * plain)
    assert_symmetric(out)
    return out


@implementations
@dtypes
@pytest.mark.parametrize(
    "shape",
    [*GRAM_ROWS.values(), *LONG_OR_WIDE_ROWS.values()],
    ids=[*GRAM_ROWS, *LONG_OR_WIDE_ROWS],
)
def test_within_budget(
    implementation: backends.Implementation,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    for options in GRAM_OPTIONS.values():
        if shape[-1] % options.get("groups", 1):
            continue
        drawn = dict(options)
        rows = math.prod(shape[:-1])
        if "mask" in options:
            drawn["mask"] = torch.rand(shape[:-1], device=device) < options["mask"]
            rows = drawn["mask"].sum()
        out = check(implementation, torch.randn(shape).to(device, dtype), **drawn)
        if "bias" in options:
            assert (out[..., -1, -1] == rows).all()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed-with-gaps": spread,
    "column-major": lambda x: x.mT.contiguous().mT,
    "columns-of-a-wider-one": lambda x: torch.cat([x, x, x], -1)[..., 3:15],
    "every-second-row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "one-row-repeated": lambda x: x[..., :1, :].expand_as(x),
    "one-feature-repeated": lambda x: x[..., :1].expand_as(x),
    "transposed-positions": lambda x: x.transpose(0, 1),
    "channels-first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "flipped": lambda x: x.flip(0),
}


@implementations
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(
    implementation: backends.Implementation,
    device: str,
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor],
) -> None:
    x = layout(torch.randn(7, 11, 12).to(device, dtype))
    check(implementation, x)
    for groups in (1, 2):
        mask = spread((torch.rand(x.shape[:-1]) < 0.6).to(device))
        check(implementation, x, mask, groups=groups, bias=True)


@implementations
@dtypes
@pytest.mark.parametrize(("alpha", "beta"), [(0.05, 0.95), (1.0, 1.0), (2.0, 0.0), (0.0, 0.5)])
def test_accumulates(
    implementation: backends.Implementation,
    device: str,
    dtype: torch.dtype,
    alpha: float,
    beta: float,
) -> None:
    for shape in ((50, 34), (0, 5)):
        for groups in (1, shape[-1] // 17 or 1):
            x = torch.randn(shape).to(device, dtype)
            check(implementation, x, groups=groups, bias=True, alpha=alpha, beta=beta)


@implementations
@dtypes
def test_whole_numbers_are_exact(
    implementation: backends.Implementation, device: str, dtype: torch.dtype
) -> None:
    x = whole_numbers(150, 70, dtype=dtype).to(device)
    out = check(implementation, x, bias=True)
    assert torch.equal(out.cpu().double(), oracle.gram(x, bias=True))


@pytest.mark.filterwarnings("ignore:invalid value")  # of Triton's interpreter
@implementations
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_rows(implementation: backends.Implementation, device: str, value: float) -> None:
    """A masked bad row does not count; a counted one shows on the diagonal of its features only."""
    x, mask = torch.randn(40, 20, device=device), torch.ones(40, dtype=torch.bool, device=device)
    x[3, 5] = value
    out = torch.empty(21, 21, device=device)
    implementation.run(x, mask, 1, True, 1.0, 0.0, out)
    finite = out.diagonal().isfinite()
    assert not finite[5] and finite.sum() == 20
    mask[3] = False
    clean = torch.where(mask[:, None], x, 0.0)
    expected = oracle.gram(clean, mask, bias=True).to(device)
    implementation.run(x, mask, 1, True, 1.0, 0.0, out)
    torch_result = torch.empty_like(out)
    reference.gram(clean, mask, 1, True, 1.0, 0.0, torch_result)
    assert_within_budget(out, torch_result, expected)


@implementations
def test_repeatable(implementation: backends.Implementation, device: str) -> None:
    x = torch.randn(3000, 90, device=device)
    results = [torch.empty(90, 90, device=device) for _ in range(3)]
    for out in results:
        implementation.run(x, None, 1, False, 1.0, 0.0, out)
    assert all(torch.equal(out, results[0]) for out in results)


@pytest.mark.large
@implementations
def test_offsets_beyond_32_bits(implementation: backends.Implementation, device: str) -> None:
    step = 2**30 + 3
    memory = torch.empty(3 * step, dtype=torch.float16, device=device)  # touched in three places
    x = memory.as_strided((3, 4), (step, 1))
    x.copy_(whole_numbers(3, 4))
    out = torch.empty(4, 4, device=device)
    implementation.run(x, None, 1, False, 1.0, 0.0, out)
    assert torch.equal(out.cpu().double(), oracle.gram(x))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_public_function_takes_the_first_that_serves(device: str) -> None:
    x = torch.randn(6, 4, device=device)
    row = backends.TABLE["gram", device]
    out = torch.empty(4, 4, device=device)
    arguments = (x, None, 1, False, 1.0, 0.0, out)
    first = next(i for i in row if i.reason_against(*arguments) is None)
    first.run(*arguments)
    assert torch.equal(ops.gram(x), out)
