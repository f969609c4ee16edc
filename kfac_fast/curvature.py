"""Fisher types: which loss the output gradients are taken of.

The empirical Fisher uses the gradients of the training loss itself, as they pass. The Monte-Carlo
Fisher draws labels from the model's own predictive distribution and takes the gradients of the loss
on these; its expectation is the Fisher, which for these losses is the generalised Gauss-Newton
matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Fisher = Literal["empirical", "mc"]


# torch.multinomial and torch.bernoulli make the host wait and refuse NaN, hence the plain draws. In
# half precision these would be too coarse.


def _probability_dtype(outputs: Tensor) -> torch.dtype:
    return torch.promote_types(outputs.dtype, torch.float32)


def _cross_entropy(outputs: Tensor, generator: torch.Generator | None) -> tuple[Tensor, int]:
    """Labels of the softmax over dimension 1 of ``[N, C, *positions]``, a term each."""
    logits = outputs.movedim(1, -1).flatten(0, -2)
    probabilities = logits.detach().softmax(-1, dtype=_probability_dtype(outputs))
    # The first of exponential clocks with these rates to ring.
    clocks = torch.empty_like(probabilities).exponential_(generator=generator)
    labels = (probabilities / clocks).argmax(-1)
    return F.cross_entropy(logits, labels, reduction="sum"), len(labels)


def _mse(outputs: Tensor, generator: torch.Generator | None) -> tuple[Tensor, int]:
    """Labels of variance 1/2 around the outputs: the squared error has no 1/2, its Hessian is 2."""
    noise = torch.empty_like(outputs, memory_format=torch.contiguous_format)
    labels = outputs.detach() + noise.normal_(std=0.5**0.5, generator=generator)
    return F.mse_loss(outputs, labels, reduction="sum"), outputs.numel()


def _bce_with_logits(outputs: Tensor, generator: torch.Generator | None) -> tuple[Tensor, int]:
    """Independent Bernoulli labels; one term for each entry."""
    probabilities = outputs.detach().to(_probability_dtype(outputs)).sigmoid()
    labels = torch.empty_like(probabilities).uniform_(generator=generator) < probabilities
    labels = labels.to(outputs.dtype)
    return F.binary_cross_entropy_with_logits(outputs, labels, reduction="sum"), outputs.numel()


SampledLoss = Callable[[Tensor, torch.Generator | None], tuple[Tensor, int]]
SAMPLED_LOSSES: dict[str, SampledLoss] = {
    "cross_entropy": _cross_entropy,
    "mse": _mse,
    "bce_with_logits": _bce_with_logits,
}


def check_sampled_loss(outputs: Tensor, loss: str) -> None:
    """Check the arguments of :func:`sampled_loss`.

    Args:
        outputs: The model's outputs.
        loss: Name of the loss.

    Raises:
        TypeError: If ``outputs`` is not a tensor.
        ValueError: If ``loss`` is unknown, or ``outputs`` has no classes.
    """
    if loss not in SAMPLED_LOSSES:
        raise ValueError(
            f"update_curvature: loss must be one of {sorted(SAMPLED_LOSSES)}, got {loss!r}"
        )
    if not isinstance(outputs, Tensor):
        raise TypeError(f"update_curvature: outputs must be a tensor, got {type(outputs).__name__}")
    if loss == "cross_entropy" and outputs.dim() < 2:
        raise ValueError(
            f"update_curvature: outputs must be [N, C, *positions], got {outputs.dim()}-d"
        )


def sampled_loss(
    outputs: Tensor, loss: str, generator: torch.Generator | None = None
) -> tuple[Tensor, int]:
    r"""Sum of the loss's terms on labels drawn from the model's predictive distribution.

    .. math:: \sum_m \ell(f_m, y_m), \qquad y_m \sim p(y \mid f_m)

    Args:
        outputs: What the loss takes: logits ``[N, C, *positions]``, logits or predictions of any
            shape.
        loss: ``"cross_entropy"``, ``"mse"`` or ``"bce_with_logits"``, as in
            :mod:`torch.nn.functional`.
        generator: Source of randomness; PyTorch's default if None.

    Returns:
        The sum, and the number of terms that the loss's ``"mean"`` would divide it by.

    Raises:
        TypeError: As :func:`check_sampled_loss`.
        ValueError: As :func:`check_sampled_loss`.

    Source: Martens & Grosse (2015), section 5.
    """
    check_sampled_loss(outputs, loss)
    return SAMPLED_LOSSES[loss](outputs, generator)
