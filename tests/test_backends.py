"""The choice between implementations: order, force, refusal, explanation, and none installed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from oracle import bits, poisoned
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_fast
from kfac_fast import backends, ops, schema
from kfac_fast.backends import Implementation

X = torch.ones(5, 4)
ARGUMENTS = (X, None, 1, False, 1.0, 0.0, torch.empty(4, 4))


def writes(value: float) -> Callable[..., None]:
    """A kernel that shows by which implementation it was run."""
    return lambda *args: args[-1].fill_(value)


ROW = (
    Implementation("cpp", writes(1.0), missing="the first is not installed"),
    Implementation("cuda", writes(2.0), refuses=lambda *args: "the second does not like it"),
    Implementation("triton", writes(3.0), refuses=lambda x, *args: None if len(x) > 1 else "short"),
    Implementation("reference", writes(4.0)),
)


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.TABLE, ("gram", "cpu"), ROW)
    monkeypatch.delitem(backends.QUICK_KERNELS, "gram", raising=False)


def served_by(x: torch.Tensor = X) -> float:
    return float(ops.gram(x)[0, 0])


@pytest.mark.usefixtures("row")
def test_the_first_that_does_not_refuse_serves() -> None:
    assert served_by() == 3.0
    assert served_by(X[:1]) == 4.0
    assert backends.select("gram", *ARGUMENTS).name == "triton"


@pytest.mark.usefixtures("row")
def test_use_forces() -> None:
    with kfac_fast.use("reference"):
        assert served_by() == 4.0
        with kfac_fast.use("triton"):
            assert served_by() == 3.0
        assert served_by() == 4.0
    assert served_by() == 3.0


@pytest.mark.usefixtures("row")
@pytest.mark.parametrize(
    ("name", "reason"),
    [("cpp", "cpp: the first is not installed"), ("cuda", "cuda: the second does not like it")],
)
def test_use_raises_instead_of_falling_back(name: str, reason: str) -> None:
    message = f"^gram: no implementation serves it on cpu: {reason}$"
    out = poisoned(4, 4)
    before = bits(out).clone()
    with kfac_fast.use(name), pytest.raises(RuntimeError, match=message):
        ops.gram(X, out=out)
    assert torch.equal(bits(out), before)
    assert served_by() == 3.0


@pytest.mark.usefixtures("row")
def test_use_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), kfac_fast.use("reference"):
        raise KeyError
    assert served_by() == 3.0


def test_use_of_what_an_operator_does_not_have() -> None:
    forced = "cuda"
    message = "^shared_gram: no implementation serves it on cpu: none exists$"
    with kfac_fast.use(forced), pytest.raises(RuntimeError, match=message):
        ops.shared_gram(X)


def test_unknown_names() -> None:
    message = r"^use: name must be one of \['cpp', 'cuda', .*'reference', 'triton'\], got 'blas'$"
    with pytest.raises(ValueError, match=message), kfac_fast.use("blas"):
        pass
    with pytest.raises(ValueError, match="^explain: op must be one of .*, got 'grm'$"):
        kfac_fast.explain("grm", X)


def test_every_row_has_the_reference_and_no_name_twice() -> None:
    assert {op for op, _ in backends.TABLE} == set(schema.OPERATORS)
    for row in backends.TABLE.values():
        names = [implementation.name for implementation in row]
        assert "reference" in names and len(set(names)) == len(names)


def test_explain_of_the_reference() -> None:
    with kfac_fast.use("reference"):
        assert kfac_fast.explain("gram", X) == "gram on cpu: reference serves this call"
        assert torch.equal(ops.gram(X), torch.full((4, 4), 5.0))


@pytest.mark.usefixtures("row")
def test_a_kernels_exception_is_not_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise ArithmeticError("out of tiles")

    broken = Implementation("triton", fails)
    monkeypatch.setitem(backends.TABLE, ("gram", "cpu"), (broken, ROW[-1]))
    with pytest.raises(ArithmeticError, match="out of tiles"):
        ops.gram(X)


@pytest.mark.usefixtures("row")
def test_explain_names_each_one_considered() -> None:
    expected = textwrap.dedent("""\
        gram on cpu: cpp refuses: the first is not installed
        gram on cpu: cuda refuses: the second does not like it
        gram on cpu: triton serves this call""")
    assert kfac_fast.explain("gram", X) == expected
    assert kfac_fast.explain(kfac_fast.gram, X, bias=True) == expected
    with kfac_fast.use("cuda"):
        forced = kfac_fast.explain("gram", X)
    assert forced == "gram on cpu: cuda refuses: the second does not like it"


@pytest.mark.usefixtures("row")
def test_explain_checks_but_computes_nothing() -> None:
    out = poisoned(4, 4)
    before = bits(out).clone()
    kfac_fast.explain("gram", X, out=out)
    assert torch.equal(bits(out), before)
    with pytest.raises(ValueError, match="^gram: groups must be positive"):
        kfac_fast.explain("gram", X, groups=3)
    assert served_by() == 3.0


def test_explain_names_the_way_of_a_convolution() -> None:
    ways = {(8, 64, 28, 28): "offset correlation", (8, 3, 28, 28): "patches read from the input"}
    for size, way in ways.items():
        options = {"stride": 2, "padding": 3} if size[1] == 3 else {"padding": 3}
        text = kfac_fast.explain("conv_expand_gram", torch.zeros(size), 7, **options)
        expected = f"conv_expand_gram on cpu: cpp serves this call by {way}"
        assert text == expected if backends.EXTENSION_BUILT else way in text


def test_explain_takes_lists_of_matrices() -> None:
    text = kfac_fast.explain("damped_inverse", [torch.eye(2)], 1.0)
    assert text.splitlines()[-1].startswith("damped_inverse on cpu: ")
    assert kfac_fast.explain("precondition", [], [], []).endswith("serves this call")


BARE = """
    import sys

    class Without:
        '''A finder that does not find what is not to be installed.'''

        def __init__(self, finder):
            self.finder = finder

        def find_spec(self, name, path=None, target=None):
            if name in ("kfac_fast._C", "triton", "kfac_fast.kernels"):
                return None
            return self.finder.find_spec(name, path, target)

        def __getattr__(self, name):
            return getattr(self.finder, name)

    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

    import torch
    import kfac_fast
    from kfac_fast import backends

    x = torch.ones(5, 4)
    print(kfac_fast.explain("gram", x))
    assert torch.equal(kfac_fast.gram(x), torch.full((4, 4), 5.0))
    assert torch.equal(kfac_fast.conv_expand_gram(x[None, None], 1), torch.full((1, 1), 20.0))
    assert not backends.EXTENSION_BUILT
    assert not [name for name in sys.modules if name.startswith(("triton", "kfac_fast.kernels"))]
    with kfac_fast.use("triton"):
        try:
            kfac_fast.gram(x)
        except RuntimeError as error:
            print(error)
"""


def test_works_without_triton_and_without_the_extension() -> None:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(BARE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refused, served, forced = done.stdout.splitlines()
    assert refused.startswith("gram on cpu: cpp refuses: the C++ extension is not built")
    assert served == "gram on cpu: reference serves this call"
    assert forced.endswith("triton: Triton is not installed")


def test_importing_loads_no_triton() -> None:
    code = "import sys, kfac_fast; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Listener(TorchDispatchMode):
    """Writes down the names of the operators that the dispatcher calls."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(  # noqa: D105
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.heard.append(func.name())
        return func(*args, **(kwargs or {}))


def every_kind_of_call() -> None:
    images, matrix = torch.randn(2, 3, 5, 5), torch.eye(3)
    kfac_fast.gram(images)
    kfac_fast.conv_window_sum(images, 3)
    kfac_fast.damped_inverse([matrix], 0.1)


CALLED = {"kfac_fast::gram", "kfac_fast::conv_window_sum", "kfac_fast::damped_inverse"}


def test_a_dispatch_mode_sees_the_operators() -> None:
    with Listener() as listener:
        every_kind_of_call()
    assert set(listener.heard) >= CALLED


def test_a_profiler_sees_the_operators() -> None:
    with torch.profiler.profile() as profile:
        every_kind_of_call()
    assert {event.name for event in profile.events()} >= CALLED


def test_a_tensor_of_its_own_kind_is_asked() -> None:
    class Own(torch.Tensor):
        heard: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            cls.heard.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(2, 3, 5, 5)
    result = kfac_fast.conv_window_sum(x.as_subclass(Own), 3)
    assert any("conv_window_sum" in name for name in Own.heard)
    assert torch.equal(result.as_subclass(torch.Tensor), kfac_fast.conv_window_sum(x, 3))


def test_plain_calls_go_past_the_dispatcher() -> None:
    x, out = torch.randn(4, 3), torch.empty(3, 3)
    assert not backends.dispatched((x, None, 1, False, 1.0, 0.0, out))
    assert not backends.dispatched(([x], [x], [torch.nn.Parameter(x)], out, None))
    assert backends.dispatched((x.to("meta"), None, 1, False, 1.0, 0.0, out))
    assert backends.dispatched(([x, 1], out))
    assert backends.dispatched(([x.to("meta")], out))


def test_lazy_tensors_are_dispatched() -> None:
    negated = torch.randn(4, 3, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    assert backends.dispatched((negated,))
    assert backends.dispatched((torch._efficientzerotensor((2, 3)),))
    meta = torch.nn.Parameter(torch.empty(2, 3, 5, 5, device="meta"))
    assert kfac_fast.conv_window_sum(meta, 3).shape == (2, 27)


def test_a_trace_keeps_the_operator() -> None:
    def sums(x: torch.Tensor) -> torch.Tensor:
        return kfac_fast.conv_window_sum(x, 3, out=torch.empty(2, 27))

    traced = torch.jit.trace(sums, (torch.randn(2, 3, 64, 64),), check_trace=False)
    smaller = torch.ones(2, 3, 4, 4)
    assert torch.equal(traced(smaller), sums(smaller))


@pytest.mark.parametrize(
    "call",
    [
        lambda eye: kfac_fast.damped_inverse([eye], 0.1, out=[None]),
        lambda eye: kfac_fast.precondition([eye], [1], [eye]),
        lambda eye: kfac_fast.conv_window_sum(eye.expand(1, 1, 3, 3), 3, out=[1]),
        lambda eye: kfac_fast.conv_window_sum(eye.expand(1, 1, 3, 3), 3, bias=[True]),
    ],
)
def test_what_is_no_tensor_is_a_type_error(call: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises((TypeError, RuntimeError), match=r"must be|Expected a value|expected"):
        call(torch.eye(3))


def test_numbers_may_be_bools() -> None:
    x = torch.ones(2, 3)
    with kfac_fast.use("reference"):
        assert torch.equal(
            kfac_fast.gram(x, beta=True, out=torch.ones(3, 3)), torch.full((3, 3), 3.0)
        )
