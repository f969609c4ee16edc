"""Modes under which nothing may make the host wait for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_fast import backends, inverses, reference

# The last two read values inside their own kernels.
WAITING = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "multinomial")


@contextmanager
def waits_refused() -> Iterator[None]:
    """On a CUDA device: PyTorch raises at every operation that it knows to make the host wait."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def never_waits() -> Iterator[None]:
    """On a CPU, as if it were a device: refuse every operator that would make the host wait."""
    with (
        patch.object(reference, "known_true", lambda flags: False),
        patch.object(inverses, "known_true", lambda flags: False),
        _NeverWaits(),
    ):
        yield


class _NeverWaits(TorchDispatchMode):
    """Refuses every operator that needs a tensor's value on the host, also inside our operators."""

    def __torch_dispatch__(  # noqa: D105
        self,
        function: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        namespace, name = function._schema.name.split("::")
        assert name not in WAITING, f"the host waits for the device in {function}"
        if namespace == "kfac_fast":
            run: Callable[..., Any] = backends.select(name, *args).run
            with self:
                run(*args)
            return None
        return function(*args, **(kwargs or {}))
