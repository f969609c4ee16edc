"""Parts of other libraries that are replaced while a block is open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

_ABSENT = object()
_LOCK = Lock()
# By owner and name: what was there before, and what every open block has put there.
_OPEN: dict[tuple[int, Any], tuple[Any, dict[object, Any]]] = {}


@contextmanager
def replaced(replacements: Sequence[tuple[Any, Any, Any]]) -> Iterator[None]:
    """Have attributes, or entries of dictionaries, replaced inside of a ``with`` block.

    Blocks may overlap, also those of several threads: what the last one opened has put there stays
    until it is left, and the original comes back when none is open any more.

    Args:
        replacements: Owners, names of attributes or keys of entries, and what to put there.

    Yields:
        Nothing.
    """
    block = object()
    with _LOCK:
        for owner, name, replacement in replacements:
            held = owner if isinstance(owner, dict) else vars(owner)
            entry = _OPEN.setdefault((id(owner), name), (held.get(name, _ABSENT), {}))
            entry[1][block] = replacement
            _put(owner, name, replacement)
    try:
        yield
    finally:
        with _LOCK:
            for owner, name, _ in replacements:
                original, by_block = _OPEN[id(owner), name]
                del by_block[block]
                _put(owner, name, next(reversed(by_block.values()), original))
                if not by_block:
                    del _OPEN[id(owner), name]


def _put(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    elif value is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
