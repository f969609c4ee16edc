"""Plain calls go straight to the CPU's kernels: which do, what is refused, what autograd hears."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from oracle import bits, poisoned
from torch import Tensor

import kfac_fast
from kfac_fast import backends, conv_kernels, ops, schema
from kfac_fast.backends import native
from kfac_fast.conv import ConvGeometry

pytestmark = pytest.mark.usefixtures("one_thread")

GEOMETRY = (3, 1, 1, "zeros", 1, 1, False, 0)


def no_other_way(*args: Any) -> Any:
    raise AssertionError("not the quick way")


def rows_and_image() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 4), torch.randn(2, 4, 5, 6)


PLAIN: dict[str, Callable[[], Any]] = {
    "gram": lambda: ops.gram(rows_and_image()[0], bias=True, out=poisoned(5, 5)),
    "whole weights": lambda: ops.gram(rows_and_image()[0], alpha=2, beta=1, out=torch.eye(4)),
    "without out": lambda: ops.gram(rows_and_image()[0], groups=2),
    "a parameter": lambda: ops.gram(torch.nn.Parameter(rows_and_image()[0])),
    "shared_gram": lambda: ops.shared_gram(rows_and_image()[1], out=poisoned(6, 6)),
    "feature_norm_gram": lambda: ops.feature_norm_gram(*2 * rows_and_image()[1:]),
    "channel_norm_gram": lambda: ops.channel_norm_gram(*2 * rows_and_image()[1:], bias=False),
    "conv_expand_gram": lambda: ops.conv_expand_gram(rows_and_image()[1], 3, padding=(1, 0, 0, 2)),
    "conv_reduce_gram": lambda: ops.conv_reduce_gram(rows_and_image()[1], [3, 1], groups=2),
    "conv_window_sum": lambda: ops.conv_window_sum(rows_and_image()[1], 3, padding="same"),
    "damped_inverse": lambda: ops.damped_inverse([2 * torch.eye(3)], 0.5).matrices[0],
    "precondition": lambda: ops.precondition([torch.ones(2, 3)], [torch.eye(3)], [torch.eye(2)])[1],
}


@pytest.mark.parametrize("call", PLAIN.values(), ids=PLAIN)
def test_plain_calls_are_quick(call: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    with kfac_fast.use("reference"):
        expected = call()
    monkeypatch.setattr(backends, "dispatched", no_other_way)
    torch.testing.assert_close(call(), expected)


def test_a_call_is_quick_unless_something_listens_or_is_asked_for() -> None:
    heard: list[bool] = []
    request: ContextVar[object] = ContextVar("request", default=None)
    unset: ContextVar[object] = ContextVar("unset")
    requests = [request, unset]
    calls = native.quick_calls({"pair": lambda *args: args}, [lambda: bool(heard)], requests)
    assert calls("pair", (1, "a")) == (1, "a")
    assert calls("another", (1, "a")) is None
    assert calls("pair", [1, "a"]) is None
    token = request.set("reference")
    assert calls("pair", ()) is None
    request.reset(token)
    assert calls("pair", ()) == ()
    heard.append(True)
    assert calls("pair", ()) is None


def test_what_a_kernel_or_a_listener_raises_is_seen() -> None:
    for kernel, listener in ((lambda: 1 // 0, int), (int, lambda: 1 // 0)):
        with pytest.raises(ZeroDivisionError):
            native.quick_calls({"op": kernel}, [listener], [])("op", ())
    with pytest.raises(TypeError, match="unhashable"):
        native.quick_calls({}, [], [])([], ())
    with pytest.raises(TypeError, match="ContextVar"):
        native.quick_calls({}, [], [None])("op", ())


def test_a_geometry_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[tuple[Any, ...]] = []

    def plan(*args: Any) -> Any:
        planned.append(args)
        return backends._conv_kernel(*args)

    calls = native.conv_operator("conv_window_sum", plan)
    x, out = torch.randn(2, 4, 5, 6), torch.empty(2, 36)
    for _ in range(3):
        assert calls(x, *GEOMETRY, False, 1.0, 0.0, out) is out
    assert planned == [("conv_window_sum", (2, 4, 5, 6), 4, *GEOMETRY)]
    assert calls(x.double(), *GEOMETRY, False, 1.0, 0.0, None).dtype == torch.float64
    assert calls(x, (3, 3), *GEOMETRY[1:], False, 1.0, 0.0, out) is out
    assert [args[1:4] for args in planned[1:]] == [((2, 4, 5, 6), 8, 3), ((2, 4, 5, 6), 4, (3, 3))]


def test_what_derives_from_int_is_one() -> None:
    class Size(IntEnum):
        THREE = 3

    x = torch.randn(2, 4, 5, 6)
    expected = ops.conv_window_sum(x, (3, 1))
    assert torch.equal(ops.conv_window_sum(x, (Size.THREE, True)), expected)
    with torch.profiler.profile():
        assert torch.equal(ops.conv_window_sum(x, (Size.THREE, True)), expected)


def test_many_geometries_are_not_all_kept() -> None:
    for size in range(3, 1100):
        x = torch.full((1, 1, size), 1.0)
        assert ops.conv_window_sum(x, 3, out=torch.empty(1, 3)).tolist() == [[size - 2.0] * 3]


def test_a_refused_geometry_says_why() -> None:
    x, out = torch.randn(2, 4, 5, 6), poisoned(2, 36)
    with pytest.raises(ValueError, match=r"^conv_window_sum: stride must be at least 1, got"):
        ops.conv_window_sum(x, 3, stride=0, out=out)
    with pytest.raises(TypeError, match=r"^conv_window_sum: transposed must be bool, got int"):
        ops.conv_window_sum(x, 3, transposed=0, out=out)
    assert out.isnan().all()


def dense(**options: Any) -> Tensor:
    return torch.ones(5, 4, **options)


STRANGE: dict[str, Callable[[], Tensor]] = {
    "negated": lambda: torch.ones(5, 4, dtype=torch.complex64).conj().imag,
    "zeros without memory": lambda: torch._efficientzerotensor((5, 4)),
    "sparse": lambda: dense().to_sparse(),
    "of a class of its own": lambda: dense().as_subclass(type("Own", (Tensor,), {})),
    "without data": lambda: dense(device="meta"),
    "integers": lambda: dense(dtype=torch.int32),
    "complex": lambda: dense(dtype=torch.complex64),
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
def test_other_tensors_do_not_go_the_quick_way(strange: Callable[[], Tensor]) -> None:
    x, out = strange(), poisoned(4, 4)
    assert native.gram(x, None, 1, False, 1.0, 0.0, out) is None
    assert native.damped_inverse([x], [torch.tensor(0.1)], [out], None, None) is None
    assert out.isnan().all()


TRANSFORMED: dict[str, Callable[..., Any]] = {
    "vmap": lambda call, x: torch.func.vmap(call)(x.expand(2, 5, 4)),
    "grad": lambda call, x: torch.func.grad(call)(x),
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x,)),
    "functionalize": lambda call, x: torch.func.functionalize(call)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMED.values(), ids=TRANSFORMED)
def test_what_a_transform_wraps_does_not_go_the_quick_way(transform: Callable[..., Any]) -> None:
    x, out = torch.ones(5, 4), poisoned(4, 4)
    results: list[Tensor | None] = []

    def call(wrapped: Tensor) -> Tensor:
        plain = torch.tensor(0.1)
        results.append(native.gram(wrapped, None, 1, False, 1.0, 0.0, None))
        results.append(native.gram(wrapped, None, 1, False, 1.0, 0.0, out))
        results.append(native.damped_inverse([wrapped[:4]], [plain], [out], None, None))
        results.append(native.gram(x, None, 1, False, 1.0, 0.0, wrapped[:4]))
        return wrapped.sum()

    transform(call, x)
    assert results == [None] * 4
    assert out.isnan().all() and torch.equal(x, torch.ones(5, 4))


# functionalize() itself refuses operators that write.
@pytest.mark.parametrize("transform", [TRANSFORMED[name] for name in ("vmap", "grad", "jvp")])
def test_what_a_transform_does_not_wrap_has_its_values(transform: Callable[..., Any]) -> None:
    rows, image = rows_and_image()
    calls: tuple[Callable[[], Tensor], ...] = (
        lambda: ops.gram(rows, bias=True),
        lambda: ops.gram(rows, out=poisoned(4, 4)),
        lambda: ops.shared_gram(image),
        lambda: ops.conv_expand_gram(image, (3, 2)),
        lambda: ops.conv_window_sum(image, (2, 5)),
        lambda: ops.mean_eigenvalues([rows[:4]]),
        lambda: ops.damped_inverse([2 * torch.eye(3)], 0.5).matrices[0],
    )
    results: list[Tensor] = []

    def call(wrapped: Tensor) -> Tensor:
        results.extend(call() for call in calls)
        return wrapped.sum()

    transform(call, torch.ones(5, 4))
    expected = [call() for call in calls]
    with kfac_fast.use("reference"):
        for found, again, call_again in zip(results, expected, calls, strict=True):
            torch.testing.assert_close(found, again)
            torch.testing.assert_close(again, call_again())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_result_that_nobody_gave_is_new(dtype: torch.dtype) -> None:
    x = torch.arange(20.0).view(5, 4).to(dtype).requires_grad_()
    for groups, bias, shape in ((1, False, (4, 4)), (2, True, (2, 3, 3)), (1, True, (5, 5))):
        made = native.gram(x, None, groups, bias, 1.0, 0.0, None)
        assert type(made) is Tensor and made.is_contiguous() and not made.requires_grad
        assert made.dtype == schema.result_dtype(dtype) and made.shape == shape
        assert torch.equal(made, ops.gram(x, groups=groups, bias=bias, out=torch.empty_like(made)))
    assert native.gram(x, None, 1, False, 1.0, 0.5, None) is None
    assert native.gram(x, None, 3, False, 1.0, 0.0, None) is None
    with pytest.raises(ValueError, match=r"^gram: beta must be 0 without out, got 0.5"):
        ops.gram(x, beta=0.5)
    with torch.inference_mode():
        assert ops.gram(x).is_inference()


NOT_EXACTLY: dict[str, Callable[[], Any]] = {
    "groups": lambda: ops.gram(torch.ones(5, 4), groups=np.int64(2)),
    "bias": lambda: ops.gram(torch.ones(5, 4), bias=np.bool_(True)),
    "reduction": lambda: ops.shared_gram(torch.ones(5, 2, 4), reduction=b"sum"),
    "num_groups": lambda: ops.channel_norm_gram(*2 * [torch.ones(5, 4)], num_groups=np.int64(2)),
}


@pytest.mark.parametrize("argument", NOT_EXACTLY)
def test_what_could_be_made_an_int_a_bool_or_a_str_is_refused(argument: str) -> None:
    for implementation in (None, "cpp", "reference"):
        with kfac_fast.use(implementation) if implementation else nullcontext():
            with pytest.raises(TypeError, match=rf"^\w+: {argument} must be "):
                NOT_EXACTLY[argument]()


def test_nothing_is_made_for_a_call_that_is_refused() -> None:
    """The result would have 36 TB."""
    with pytest.raises(TypeError, match=r"^gram: x must be float32"):
        ops.gram(torch.zeros(1, 3 * 10**6, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"^gram: mask must be bool"):
        ops.gram(torch.zeros(1, 3 * 10**6), mask=torch.ones(1))


def test_lazy_tensors_have_their_values() -> None:
    negated = torch.randn(5, 4, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    out = ops.gram(negated, out=poisoned(4, 4))
    torch.testing.assert_close(out, negated.resolve_neg().T @ negated.resolve_neg())
    square = torch.randn(4, 4, dtype=torch.complex64).conj().imag
    expected = torch.eye(4) @ square.resolve_neg() @ torch.eye(4)
    result = ops.precondition([square], [torch.eye(4)], [torch.eye(4)]).grads[0]
    torch.testing.assert_close(result, expected)
    assert not ops.gram(torch._efficientzerotensor((5, 4)), out=poisoned(4, 4)).any()


def gram_arguments(**changed: Any) -> tuple[Any, ...]:
    arguments = {
        "x": torch.ones(5, 4),
        "mask": None,
        "groups": 1,
        "bias": False,
        "alpha": 1.0,
        "beta": 0.0,
        "out": poisoned(4, 4),
    }
    return tuple((arguments | changed).values())


MEMORY = torch.full((64,), float("nan"))
REFUSED: dict[str, dict[str, Any]] = {
    "a scalar": {"x": torch.tensor(1.0)},
    "groups that do not divide": {"groups": 3},
    "no group": {"groups": 0},
    "a mask of another shape": {"mask": torch.ones(4, dtype=torch.bool)},
    "a mask of numbers": {"mask": torch.ones(5)},
    "an out of another shape": {"out": poisoned(5, 5)},
    "an out of another rank": {"out": poisoned(1, 4, 4)},
    "an out of another dtype": {"out": poisoned(4, 4).double()},
    "an out with gaps": {"out": poisoned(4, 8)[:, ::2]},
    "an out that requires gradients": {"out": poisoned(4, 4).requires_grad_()},
    "an out in the input": {"x": MEMORY[:20].view(5, 4), "out": MEMORY[10:26].view(4, 4)},
    "an out in the mask": {
        "mask": MEMORY.view(torch.bool)[16:21],
        "out": MEMORY[:16].view(4, 4),
    },
}


@pytest.mark.parametrize("changed", REFUSED.values(), ids=REFUSED)
def test_what_the_check_refuses_the_kernel_refuses(changed: dict[str, Any]) -> None:
    arguments = gram_arguments(**changed)
    with pytest.raises((ValueError, TypeError)):
        schema.check("gram", *arguments)
    before = bits(arguments[-1].detach()).clone()
    assert native.gram(*arguments) is None
    assert torch.equal(bits(arguments[-1].detach()), before)


SHARED_REFUSED: dict[str, tuple[Any, ...]] = {
    "rows": (torch.ones(4), None, None, -1, "mean"),
    "another reduction": (torch.ones(5, 2, 4), None, None, -1, "max"),
    "a count without segments": (torch.ones(5, 2, 4), None, None, 3, "mean"),
    "segments without a count": (torch.ones(5, 4), None, torch.zeros(5).long(), -1, "mean"),
    "short segments": (torch.ones(5, 4), None, torch.zeros(5).int(), 3, "mean"),
    "segments of another length": (torch.ones(5, 4), None, torch.zeros(4).long(), 3, "mean"),
    "segments of a batch": (torch.ones(5, 2, 4), None, torch.zeros(5).long(), 3, "mean"),
}


@pytest.mark.parametrize("inputs", SHARED_REFUSED.values(), ids=SHARED_REFUSED)
def test_what_shared_gram_refuses(inputs: tuple[Any, ...]) -> None:
    out = poisoned(4, 4)
    with pytest.raises((ValueError, TypeError)):
        schema.check("shared_gram", *inputs, 1, False, 1.0, 0.0, out)
    assert native.shared_gram(*inputs, 1, False, 1.0, 0.0, out) is None
    assert out.isnan().all()


@pytest.mark.parametrize("kernel", ["conv_offset_gram", "conv_patch_gram", "conv_reduce_gram"])
def test_a_kernel_takes_only_its_plans_images(kernel: str) -> None:
    plan = conv_kernels.plan(kernel, ConvGeometry.normalize("test", 2, 3), (5, 6)).tolist()
    run = native.ConvKernel(kernel, plan, (5, 6), 1)
    out = poisoned(36, 36)
    for shape in ((2, 4, 6, 5), (2, 4, 5, 7), (2, 4, 5), (2, 4, 1, 5, 6), (2, 3, 5, 6)):
        assert run(torch.ones(shape), False, 1.0, 0.0, out) is None
    assert out.isnan().all()
    assert run(torch.ones(2, 4, 5, 6), False, 1.0, 0.0, out) is out and out.isfinite().all()


class MadeOnAccess(Sequence):
    """Tensors that nobody but the caller holds."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:  # noqa: D105
        return len(self.tensors)

    def __getitem__(self, i: int) -> Tensor:  # noqa: D105
        return self.tensors[i].clone()


def test_lists_may_be_made_on_access() -> None:
    torch.manual_seed(0)
    squares = [x @ x.mT + 64 * torch.eye(64) for x in torch.randn(5, 64, 64)]
    lazy, grads = MadeOnAccess(squares), list(torch.randn(5, 64, 64))
    expected = ops.precondition(grads, squares, squares).grads
    inverses = ops.damped_inverse(squares, 1.0).matrices
    stacked = torch.stack(squares)
    for each in (lazy, stacked, dict(enumerate(squares)).values()):
        found = ops.precondition(grads, each, each).grads
        assert all(map(torch.equal, found, expected))
        found = ops.damped_inverse(each, 1.0).matrices
        assert all(map(torch.equal, found, inverses))


def test_autograd_sees_what_was_written() -> None:
    out, weight = torch.eye(3), torch.ones(3, requires_grad=True)
    for write in (
        lambda: ops.gram(torch.ones(5, 3), out=out),
        lambda: ops.damped_inverse([torch.eye(3)], 0.1, out=[out]),
    ):
        product = (out * weight).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_refused_calls_leave_the_version() -> None:
    out = torch.zeros(3, 3)
    before = out._version
    assert native.gram(torch.ones(5, 4), None, 1, False, 1.0, 0.0, out) is None
    assert out._version == before
    assert native.gram(torch.ones(5, 3), None, 1, False, 1.0, 0.0, out) is out
    assert out._version > before


def test_inference_tensors_may_be_written() -> None:
    with torch.inference_mode():
        x, out = torch.ones(5, 3), torch.empty(3, 3)
        assert torch.equal(ops.gram(x, out=out), torch.full((3, 3), 5.0))


def test_threads_of_python_may_call_at_the_same_time() -> None:
    x = torch.randn(2, 3, 40, 40)
    expected = ops.conv_expand_gram(x, 3)
    results: list[Tensor] = []

    def work() -> None:
        for size in range(20, 40):
            ops.conv_window_sum(x[..., :size], 3)
            results.append(ops.conv_expand_gram(x, 3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80 and all(torch.equal(result, expected) for result in results)
