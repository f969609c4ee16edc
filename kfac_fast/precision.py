"""Computing in the tensors' own precision, whatever autocast asks for around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


def in_own_precision(method: Method) -> Method:
    """A method that runs without autocast.

    Args:
        method: Method of an object whose tensors are on its ``device``.

    Returns:
        The same for calls from inside of ``torch.autocast``.
    """

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast(Method, run)
