"""Adapters refuse versions of other libraries that they are not tested with."""

from __future__ import annotations

import pytest

from kfac_fast.integrations.versions import require


def test_the_tested_version_is_taken() -> None:
    require("pytest", pytest.__version__)


def test_another_version_is_refused() -> None:
    with pytest.raises(ImportError, match=f"needs pytest 0.1, got {pytest.__version__}"):
        require("pytest", "0.1")


def test_a_missing_library_is_named() -> None:
    with pytest.raises(ImportError, match="needs no-such-library 1.0, got none"):
        require("no-such-library", "1.0")
