"""What adapters replace in other libraries is there while a block is open, and only then."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pkgutil import resolve_name
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from kfac_fast.integrations.replacing import replaced

# What an adapter replaces, or the dictionary with the entries that it does.
PATCHED = {
    "asdl": [
        "asdl.core:get_op_class",
        "asdl.symmatrix:Kron",
        "asdl.fisher:FisherMaker._extract_fisher",
        "asdl.fisher:FisherMaker.replace_fisher_with_inv",
        "asdl.precondition.natural_gradient:NaturalGradientMaker.update_preconditioner",
    ],
    "curvlinops": [
        "curvlinops:KFACLinearOperator.__init__",
        "curvlinops:KFACInverseLinearOperator.__init__",
    ],
    "kronfluence": [
        "kronfluence.module.tracked_module:TrackedModule.SUPPORTED_MODULES",
        "kronfluence.computer.factor_computer:perform_eigendecomposition",
    ],
    "nngeometry": [
        "nngeometry.backend.torch_hooks.grads:FactoryMap",
        "nngeometry.object:PMatKFAC.inverse",
    ],
    "singd": ["singd.optim.optimizer:SINGD.__init__"],
}


def present(adapter: str) -> list[Any]:
    found = [resolve_name(name) for name in PATCHED[adapter]]
    return [dict(part) if isinstance(part, dict) else part for part in found]


class Owner:
    inherited = "inherited"


class Own(Owner):
    attribute = "original"


def test_blocks_that_overlap_restore_the_original_when_the_last_is_left() -> None:
    first, second = (replaced([(Own, "attribute", name)]) for name in ("first", "second"))
    first.__enter__()
    second.__enter__()
    assert Own.attribute == "second"
    first.__exit__(None, None, None)
    assert Own.attribute == "second"
    second.__exit__(None, None, None)
    assert Own.attribute == "original"


def test_blocks_that_are_nested_restore_one_after_the_other() -> None:
    with replaced([(Own, "attribute", "outer")]):
        with pytest.raises(ZeroDivisionError), replaced([(Own, "attribute", "inner")]):
            assert Own.attribute == "inner"
            raise ZeroDivisionError
        assert Own.attribute == "outer"
    assert Own.attribute == "original"


def test_what_an_owner_had_not_itself_is_gone_afterwards() -> None:
    instance = SimpleNamespace()
    with replaced([(Own, "inherited", 1), (instance, "attribute", 2)]):
        assert (Own.inherited, instance.attribute) == (1, 2)
    assert "inherited" not in vars(Own) and Own.inherited == "inherited"
    assert vars(instance) == {}


def test_entries_of_dictionaries_are_replaced() -> None:
    entries = {int: "original", str: "other"}
    with replaced([(entries, int, "replacement")]):
        assert entries == {int: "replacement", str: "other"}
    assert entries == {int: "original", str: "other"}


def test_threads_share_what_they_replace() -> None:
    opened = Barrier(4)

    def run(number: int) -> Any:
        for _ in range(50):
            with replaced([(Own, "attribute", number)]):
                opened.wait()
                seen = Own.attribute
                opened.wait()
        return seen

    with ThreadPoolExecutor(4) as pool:
        seen = set(pool.map(run, range(4)))
    assert seen <= set(range(4)) and Own.attribute == "original"


@pytest.mark.parametrize("adapter", PATCHED)
def test_an_adapters_blocks_may_overlap(adapter: str) -> None:
    pytest.importorskip(PATCHED[adapter][0].partition(":")[0], reason=f"needs {adapter}")
    enabled = importlib.import_module(f"kfac_fast.integrations.{adapter}").enabled
    before = present(adapter)
    with pytest.raises(ZeroDivisionError), ExitStack() as second:
        with enabled():
            second.enter_context(enabled())
            inside = present(adapter)
        assert present(adapter) == inside
        assert not any(new == old for new, old in zip(inside, before, strict=True))
        raise ZeroDivisionError
    assert present(adapter) == before
