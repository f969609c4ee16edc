"""Dampings as other libraries take them."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_of(damping: float | Tensor) -> float | Tensor:
    """What :func:`kfac_fast.ops.damped_inverse` takes for a damping that may be 0.

    Returns:
        The damping; a number 0, which is refused as a likely mistake, as a tensor.
    """
    return torch.zeros(()) if isinstance(damping, int | float) and damping == 0 else damping
