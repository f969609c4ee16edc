"""Which versions of other libraries the adapters are written for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def require(package: str, tested: str, *, may_be_missing: bool = False) -> None:
    """Refuse another version of a library than the one that an adapter is tested with.

    Args:
        package: Name that the library is installed under.
        tested: The version.
        may_be_missing: Whether the adapter imports nothing of it.

    Raises:
        ImportError: If the library is missing or has another version.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        if may_be_missing:
            return
        raise ImportError(f"kfac_fast.integrations needs {package} {tested}, got none") from None
    if found != tested:
        raise ImportError(f"kfac_fast.integrations needs {package} {tested}, got {found}")
