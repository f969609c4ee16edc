"""What the operators refuse: each message in full, and every output left as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_same, assert_within_budget, bits, positive_definite
from torch import Tensor

from kfac_fast import ops

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


X = torch.ones(5, 4)
IMAGE = torch.ones(2, 4, 5, 6)
SQUARE = torch.eye(3)
SEGMENTS = torch.zeros(5, dtype=torch.int64)
META = torch.device("meta")
FLOATS = "float32, float64, bfloat16 or float16"
MASK_META = torch.ones(5, dtype=torch.bool, device=META)

# Function, arguments, keywords, exception, message after the operator's name.
Refusal = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], type[Exception], str]


def gram(x: Tensor, message: str, error: type[Exception] = ValueError, **options: Any) -> Refusal:
    return (ops.gram, (x,), options, error, message)


def shared(x: Tensor, message: str, error: type[Exception] = ValueError, **options: Any) -> Refusal:
    return (ops.shared_gram, (x,), options, error, message)


def conv(x: Tensor, message: str, error: type[Exception] = ValueError, **options: Any) -> Refusal:
    return (ops.conv_expand_gram, (x,), {"kernel_size": 3, **options}, error, message)


GRAM_REFUSALS = [
    gram(torch.ones(()), "x must be [*, D], got a scalar"),
    gram(X.int(), f"x must be {FLOATS}, got torch.int32", TypeError),
    gram(X > 0, f"x must be {FLOATS}, got torch.bool", TypeError),
    gram(X + 0j, f"x must be {FLOATS}, got torch.complex64", TypeError),
    gram(X, "groups must be positive and divide x's 4 features, got 3", groups=3),
    gram(X, "groups must be positive and divide x's 4 features, got 0", groups=0),
    gram(X, "groups must be positive and divide x's 4 features, got -2", groups=-2),
    gram(X, "mask must be bool, got torch.float32", TypeError, mask=X[:, 0]),
    gram(X, "mask must be of x's leading shape (5,), got (4,)", mask=X[0] > 0),
    gram(X, "mask must be of x's leading shape (5,), got (5, 4)", mask=X > 0),
    gram(X, "mask must be on cpu like the other tensors, got meta", mask=MASK_META),
    gram(X, "out must be of shape (5, 5), got (4, 4)", bias=True),
    gram(X, "out must be of shape (2, 2, 2), got (4, 4)", groups=2),
    gram(X.double(), "out must be torch.float64, got torch.float32", TypeError),
    gram(X, "out must be torch.float32, got torch.int32", TypeError, out=torch.ones(4, 4).int()),
    gram(X, "out must be contiguous, got strides (1, 4)", out=torch.ones(4, 4).T),
    gram(
        X,
        "out must be detached, for no operator is differentiable, got a leaf or graph",
        out=torch.ones(4, 4, requires_grad=True),
    ),
    gram(
        X, "out must be on cpu like the other tensors, got meta", out=torch.ones(4, 4, device=META)
    ),
]

SHARED_REFUSALS = [
    shared(X[0], "x must be [N, *shared, D], or [R, D] with segments, got 1-d"),
    shared(X, "reduction must be 'mean' or 'sum', got 'max'", reduction="max"),
    shared(X[None], "x must be [R, D] with segments, got 3-d", segments=SEGMENTS, num_segments=1),
    shared(X, "segments must be of shape (5,), got (4,)", segments=SEGMENTS[:4], num_segments=1),
    shared(
        X,
        "segments must be int64, got torch.int32",
        TypeError,
        segments=SEGMENTS.int(),
        num_segments=1,
    ),
    shared(
        X, "num_segments must be given with segments and not negative, got -1", segments=SEGMENTS
    ),
    shared(
        X,
        "segments must be on cpu like the other tensors, got meta",
        segments=SEGMENTS.to(META),
        num_segments=1,
    ),
    shared(X.int(), f"x must be {FLOATS}, got torch.int32", TypeError),
    shared(X, "groups must be positive and divide x's 4 features, got 5", groups=5),
    shared(X, "mask must be of x's leading shape (5,), got (5, 4)", mask=X > 0),
]

CONV_REFUSALS = [
    conv(X, "x must be [N, C, *spatial] with 1 to 3 spatial dimensions, got 2-d"),
    conv(torch.ones([1] * 6), "x must be [N, C, *spatial] with 1 to 3 spatial dimensions, got 6-d"),
    conv(IMAGE.int(), f"x must be {FLOATS}, got torch.int32", TypeError),
    conv(IMAGE, "kernel_size must be an int or 2 ints, got (3,)", kernel_size=(3,)),
    conv(IMAGE, "kernel_size must be at least 1, got (3, 0)", kernel_size=(3, 0)),
    conv(IMAGE, "stride must be at least 1, got (0, 0)", stride=0),
    conv(IMAGE, "dilation must be at least 1, got (1, -1)", dilation=(1, -1)),
    conv(IMAGE, "padding must be at least 0, got (0, 0, -1, -1)", padding=(0, -1)),
    conv(IMAGE, "padding='same' needs stride 1, got (2, 2)", padding="same", stride=2),
    conv(IMAGE, "groups must be positive and divide x's 4 channels, got 3", groups=3),
    conv(IMAGE, "groups must be positive and divide x's 4 channels, got 0", groups=0),
    conv(
        IMAGE,
        "padding_mode must be one of ('zeros', 'reflect', 'replicate', 'circular'), got 'wrap'",
        padding_mode="wrap",
    ),
    conv(
        IMAGE,
        "padding must be below the input's (5, 6), got (5, 5, 0, 0)",
        padding=(5, 0),
        padding_mode="reflect",
    ),
    conv(
        IMAGE,
        "padding must be at most the input's (5, 6), got (0, 0, 7, 7)",
        padding=(0, 7),
        padding_mode="circular",
    ),
    conv(
        IMAGE,
        "the padded input must be as large as kernel_size (6, 3) with dilation (1, 1), got (5, 6)",
        kernel_size=(6, 3),
    ),
    conv(
        IMAGE,
        "the padded input must be as large as kernel_size (3, 3) with dilation (4, 1), got (7, 8)",
        dilation=(4, 1),
        padding=1,
    ),
    conv(IMAGE, "output_padding must be 0 unless transposed, got (1, 1)", output_padding=1),
    conv(
        IMAGE,
        "output_padding must be below stride or dilation, (2, 1), got (1, 1)",
        output_padding=1,
        stride=(2, 1),
        transposed=True,
    ),
    conv(
        IMAGE,
        "padding_mode must be 'zeros' if transposed, got 'circular'",
        padding_mode="circular",
        transposed=True,
    ),
    conv(IMAGE, "out must be of shape (2, 18, 18), got (4, 4)", groups=2),
]

DAMPED_REFUSALS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    (([SQUARE, X], 1.0), ValueError, "matrices[1] must be [*, n, n], got (5, 4)"),
    (([SQUARE[0]], 1.0), ValueError, "matrices[0] must be [*, n, n], got (3,)"),
    (
        ([SQUARE, SQUARE.double()], 1.0),
        TypeError,
        "matrices[1] must be float32 or float64 like the others, got torch.float64",
    ),
    (
        ([SQUARE.bfloat16()], 1.0),
        TypeError,
        "matrices[0] must be float32 or float64 like the others, got torch.bfloat16",
    ),
    (
        ([SQUARE, SQUARE.to(META)], 1.0),
        ValueError,
        "matrices[1] must be on cpu like the other tensors, got meta",
    ),
    (([SQUARE], -0.5), ValueError, "damping must be positive and finite, got -0.5"),
    (([SQUARE], float("inf")), ValueError, "damping must be positive and finite, got inf"),
    (([SQUARE], 0), ValueError, "damping must be positive and finite, got 0"),
    (([SQUARE], [float("nan")]), ValueError, "damping must be positive and finite, got nan"),
    (([], 1.0), ValueError, "matrices must be at least one matrix, got an empty list"),
    (([], []), ValueError, "matrices must be at least one matrix, got an empty list"),
    (
        ([SQUARE, SQUARE.new_empty(2, 0, 0)], 1.0),
        ValueError,
        "matrices[1] must be of at least one row, got (2, 0, 0)",
    ),
    (
        ([SQUARE, torch.ones(3, 2, 2).tril()], 0.5),
        ValueError,
        "matrices[1] must be symmetric up to rounding, "
        "got an entry 1 away from its mirror image at [0, 0, 1]",
    ),
    (([SQUARE], [1.0, 2.0]), ValueError, "damping must be one value, 1 or a tensor of 1, got 2"),
    (
        ([SQUARE.expand(2, 3, 3)], [torch.ones(3)]),
        ValueError,
        "damping[0] must be a scalar or of shape (2,), got (3,)",
    ),
]

SIDE = "the input side"
PRECONDITION_REFUSALS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    (([X], [], [SQUARE]), ValueError, f"{SIDE} must be 1 tensors, got 0"),
    (([X], [SQUARE], []), ValueError, "the gradient side must be 1 tensors, got 0"),
    (([X], [SQUARE], [SQUARE]), ValueError, f"{SIDE}[0] must be of shape (4, 4), got (3, 3)"),
    (
        ([X], [torch.eye(4)], [SQUARE]),
        ValueError,
        "the gradient side[0] must be of shape (5, 5), got (3, 3)",
    ),
    (([X[0]], [torch.eye(4)], [SQUARE]), ValueError, "grads[0] must be [*, out, in], got 1-d"),
    (([X], [X], [SQUARE]), ValueError, f"{SIDE}[0] must be [*, n, n], got (5, 4)"),
    (
        ([SQUARE.int()], [SQUARE], [SQUARE]),
        TypeError,
        "grads[0] must be float32 or float64 like the others, got torch.int32",
    ),
    (
        ([SQUARE, SQUARE.double()], [SQUARE, SQUARE], [SQUARE, SQUARE]),
        TypeError,
        "grads[1] must be float32 or float64 like the others, got torch.float64",
    ),
    (
        ([SQUARE], [SQUARE.double()], [SQUARE]),
        TypeError,
        f"{SIDE}[0] must be float32 or float64 like the others, got torch.float64",
    ),
    (
        ([SQUARE, SQUARE.to(META)], [SQUARE, SQUARE], [SQUARE, SQUARE]),
        ValueError,
        "grads[1] must be on cpu like the other tensors, got meta",
    ),
]

ON_META = "out must be on meta like the other tensors, got cpu"
REFUSALS: list[Refusal] = [
    *GRAM_REFUSALS,
    *SHARED_REFUSALS,
    *CONV_REFUSALS,
    *(
        (op, call[1], call[2], call[3], call[4])
        for op in (ops.conv_reduce_gram, ops.conv_window_sum)
        for call in CONV_REFUSALS[:-1]
    ),
    *(
        (op, (IMAGE.to(META), 1), {"out": torch.randn(size)}, ValueError, ON_META)
        for op, size in (
            (ops.conv_expand_gram, (4, 4)),
            (ops.conv_reduce_gram, (4, 4)),
            (ops.conv_window_sum, (2, 4)),
        )
    ),
    *(
        (op, *row[:1], {}, *row[1:])
        for op in (ops.damped_inverse, ops.damped_cholesky)
        for row in DAMPED_REFUSALS
    ),
    *(
        (op, *row[:1], {}, *row[1:])
        for op in (ops.precondition, ops.cholesky_precondition)
        for row in PRECONDITION_REFUSALS
    ),
]


def default_out(op: Callable[..., Any], first: Any) -> Any:
    """Outputs that would do, were it not for the other arguments."""
    if isinstance(first, list):
        return [torch.randn(t.shape, dtype=torch.float32) for t in first]
    return torch.randn(4, 4)


def tensors_of(out: Tensor | list[Tensor]) -> list[Tensor]:
    return [t.detach() for t in (out if isinstance(out, list) else [out]) if not t.is_meta]


def check_refusal(call: Refusal) -> None:
    """The call raises as it says, and every output keeps its bits."""
    op, arguments, options, error, message = call
    out = options.get("out", default_out(op, arguments[0]))
    before = [tensor.clone() for tensor in tensors_of(out)]
    with pytest.raises(error) as raised:
        op(*arguments, **{**options, "out": out})
    assert str(raised.value) == f"{op.__name__}: {message}"
    for tensor, kept in zip(tensors_of(out), before, strict=True):
        assert torch.equal(bits(tensor), bits(kept))


@pytest.mark.parametrize("call", REFUSALS, ids=lambda call: f"{call[0].__name__}: {call[4]}")
def test_refused(call: Refusal) -> None:
    check_refusal(call)


def test_beta_needs_out() -> None:
    for op, arguments in ((ops.gram, (X,)), (ops.conv_window_sum, (IMAGE, 3))):
        with pytest.raises(
            ValueError, match=f"^{op.__name__}: beta must be 0 without out, got 0.5$"
        ):
            op(*arguments, beta=0.5)


def test_each_matrix_takes_one_output() -> None:
    for op in (ops.damped_inverse, ops.damped_cholesky):
        with pytest.raises(ValueError, match="out must be 1 tensors, got 0"):
            op([SQUARE], 1.0, out=[])


# Memory


def test_out_may_not_overlap_an_input() -> None:
    memory = torch.randn(200)
    x, mask = memory[:20].view(5, 4), memory[20:25].view(torch.uint8)[:5].view(torch.bool)
    apart = "out must be apart from the inputs' memory, got an overlap"
    for out in (memory[:16], memory[19:35], memory[4:20]):
        check_refusal(gram(x, apart, out=out.view(4, 4)))
    check_refusal(gram(x, apart, mask=mask, out=memory[21:37].view(4, 4)))
    check_refusal(gram(memory[:48].view(3, 16)[:, :4], apart, out=memory[20:36].view(4, 4)))
    segments = memory[20:32].view(torch.int64)[:5]
    call = shared(x, apart, segments=segments, num_segments=2, out=memory[29:45].view(4, 4))
    check_refusal(call)
    image = memory[:36].view(1, 1, 6, 6)
    check_refusal(conv(image, apart, kernel_size=2, out=memory[30:46].view(4, 4)))
    reduced = (image, 2), {"out": memory[30:46].view(4, 4)}
    check_refusal((ops.conv_reduce_gram, *reduced, ValueError, apart))
    summed = (image, 2), {"out": memory[33:37].view(1, 4)}
    check_refusal((ops.conv_window_sum, *summed, ValueError, apart))


def test_out_may_not_overlap_an_input_of_another_storage() -> None:
    array = np.zeros(40, dtype=np.float32)
    x, out = torch.from_numpy(array)[:20].view(5, 4), torch.from_numpy(array)[10:26].view(4, 4)
    check_refusal(gram(x, "out must be apart from the inputs' memory, got an overlap", out=out))
    square = torch.from_numpy(array)[:16].view(4, 4)
    apart = "out must be apart from all other memory, got an overlap"
    for op in (ops.damped_inverse, ops.damped_cholesky):
        check_refusal((op, ([square], 1.0), {"out": [out]}, ValueError, apart))


def test_outputs_may_not_overlap_anything() -> None:
    memory = torch.randn(100)
    first, second, third = (memory[i : i + 9].view(3, 3) for i in (0, 9, 18))
    damping, overlapping = memory[30], memory[27:36].view(3, 3)
    crossing = memory[5:14].view(3, 3)
    apart = "out must be apart from all other memory, got an overlap"
    lists: list[tuple[tuple[Any, ...], list[Tensor]]] = [
        (([first, second], 1.0), [third, first]),
        (([first, second], 1.0), [third, crossing]),
        (([first, SQUARE], 1.0), [third, third]),
        (([first, second], damping), [third, overlapping]),
    ]
    for op in (ops.damped_inverse, ops.damped_cholesky):
        for arguments, out in lists:
            check_refusal((op, arguments, {"out": out}, ValueError, apart))
    for op in (ops.precondition, ops.cholesky_precondition):
        for grad, right, left, out in (
            (first, SQUARE, SQUARE, first),
            (SQUARE, first, SQUARE, crossing),
            (SQUARE, SQUARE, first, crossing),
        ):
            arguments = ([grad], [right], [left])
            check_refusal((op, arguments, {"out": [out]}, ValueError, apart))
        arguments = ([first, second], [SQUARE] * 2, [SQUARE] * 2)
        check_refusal((op, arguments, {"out": [third, third]}, ValueError, apart))


def test_neighbours_in_one_buffer_are_accepted() -> None:
    memory = torch.randn(200)
    x, out = memory[16:36].view(5, 4), memory[:16].view(4, 4)
    expected = ops.gram(x.clone())
    assert torch.equal(ops.gram(x, out=out), expected)
    after = memory[36:52].view(4, 4)
    assert torch.equal(ops.gram(x, out=after), expected)
    assert torch.equal(x, memory[16:36].view(5, 4))
    square = [positive_definite(3, 3).float() for _ in range(2)]
    before, *places = (memory[i : i + 9].view(3, 3) for i in (60, 69, 78, 87))
    before.copy_(square[0])
    result = ops.damped_inverse([before, square[1]], memory[96].fill_(0.5), out=places[:2])
    wanted = ops.damped_inverse(square, 0.5)
    for got, want in zip(result.matrices, wanted.matrices, strict=True):
        assert_within_budget(got, want, want.double())


def test_inputs_may_share_their_memory() -> None:
    square = positive_definite(3, 3)
    result = ops.damped_inverse([square, square], 0.5)
    for inverse in result.matrices:
        assert_same(inverse, torch.linalg.inv(square + 0.5 * torch.eye(3)))
    assert ops.precondition([square], [square], [square]).grads[0].shape == (3, 3)


@pytest.mark.parametrize("wrong", [None, 3, "a"], ids=str)
def test_an_entry_that_is_no_tensor_is_named(wrong: object) -> None:
    two = [torch.empty(3, 3) for _ in range(2)]
    calls: list[tuple[Any, tuple[Any, ...], Any, str]] = [
        (ops.mean_eigenvalues, ([wrong],), torch.empty(1), "matrices[0]"),
    ]
    for op in (ops.damped_inverse, ops.damped_cholesky):
        calls.append((op, ([SQUARE, wrong], 1.0), two, "matrices[1]"))
        calls.append((op, ([SQUARE], 1.0), [wrong], "out[0]"))
    for op in (ops.precondition, ops.cholesky_precondition):
        calls.append((op, ([SQUARE], [wrong], [SQUARE]), None, f"{SIDE}[0]"))
    for op, arguments, out, entry in calls:
        message = f"{op.__name__}: {entry} must be a tensor, got {type(wrong).__name__}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            op(*arguments, out=out)
