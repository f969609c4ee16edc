"""Losses with the labels that they are trained on, and their Hessians by autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CLASSES = 4
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)


def class_labels(f: Tensor) -> Tensor:
    """One class for each of the positions of ``[N, C, *positions]``, each at least once."""
    labels = torch.arange(f[:, 0].numel()) % f.shape[1]
    return labels[torch.randperm(len(labels))].reshape(f[:, 0].shape)


def soft_labels(f: Tensor) -> Tensor:
    """A distribution over the classes for each position."""
    return torch.randn_like(f).softmax(1)


class LossCase(NamedTuple):
    """A loss of a tensor ``[N, 4, *positions]`` of positive entries.

    Attributes:
        name: Name that stands for the module's defaults; None if it has other options.
        module: PyTorch's loss module, to be given a reduction.
        targets: Training labels for the entries.
        outputs: The entries as the loss takes them.
    """

    name: str | None
    module: Callable[..., nn.Module]
    targets: Callable[[Tensor], Tensor]
    outputs: Callable[[Tensor], Any] = lambda f: f

    def loss(self, f: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        """The training loss by PyTorch."""
        outputs = self.outputs(f)
        arguments = (
            (outputs[0], targets, outputs[1]) if isinstance(outputs, tuple) else (f, targets)
        )
        return self.module(reduction=reduction)(*arguments)

    def hessian(self, f: Tensor, targets: Tensor) -> Tensor:
        """Hessian of the summed loss in the flat entries.

        That of the normal distributions is averaged over the labels of the model. It is linear in a
        label's deviation and its square, so that two labels with the right mean of both do.
        """
        labels = [targets]
        outputs = self.outputs(f.detach())
        if isinstance(outputs, tuple):
            mean, variance = outputs
            deviation = variance.clamp(min=self.module().eps).sqrt()
            if variance.dim() < mean.dim():
                deviation = deviation[..., None]
            labels = [mean + deviation, mean - deviation]
        total = f.new_zeros(f.numel(), f.numel())
        for y in labels:
            hessian = torch.autograd.functional.hessian(partial(self.loss, targets=y), f.detach())
            total += hessian.reshape(total.shape) / len(labels)
        return total


def _normal(f: Tensor) -> tuple[Tensor, Tensor]:
    return f[:, :2], f[:, 2:]


def _one_variance(f: Tensor) -> tuple[Tensor, Tensor]:
    return f.flatten(1)[:, :-1], f.flatten(1)[:, -1:]


def _flat_variance(f: Tensor) -> tuple[Tensor, Tensor]:
    return f.flatten(1)[:, :-1], f.flatten(1)[:, -1]


def _normal_labels(f: Tensor) -> Tensor:
    return torch.randn_like(f[:, :2])


def _all_but_one(f: Tensor) -> Tensor:
    return torch.randn_like(f.flatten(1)[:, :-1])


_cross_entropy = nn.CrossEntropyLoss
_weighted = partial(nn.CrossEntropyLoss, weight=CLASS_WEIGHTS)
_bce = nn.BCEWithLogitsLoss
_bce_weight = torch.tensor([[2.0], [0.5], [0.0], [1.0]], dtype=torch.float64)

LOSS_CASES: dict[str, LossCase] = {
    "cross-entropy": LossCase("cross_entropy", _cross_entropy, class_labels),
    "soft-labels": LossCase("cross_entropy", _cross_entropy, soft_labels),
    "smoothed": LossCase(None, partial(_cross_entropy, label_smoothing=0.1), class_labels),
    "smoothed-soft-labels": LossCase(
        None, partial(_cross_entropy, label_smoothing=0.1), soft_labels
    ),
    "ignored": LossCase(None, partial(_cross_entropy, ignore_index=1), class_labels),
    "smoothed-ignored": LossCase(
        None, partial(_cross_entropy, ignore_index=1, label_smoothing=0.3), class_labels
    ),
    "class-weights": LossCase(None, _weighted, class_labels),
    "class-weights-smoothed-ignored": LossCase(
        None, partial(_weighted, ignore_index=2, label_smoothing=0.3), class_labels
    ),
    "class-weights-smoothed-soft-labels": LossCase(
        None, partial(_weighted, label_smoothing=0.3), soft_labels
    ),
    "mse": LossCase("mse", nn.MSELoss, torch.randn_like),
    "bce": LossCase("bce_with_logits", _bce, torch.rand_like),
    "bce-weights": LossCase(None, partial(_bce, weight=_bce_weight), torch.rand_like),
    "bce-positive-weights": LossCase(
        None, partial(_bce, weight=_bce_weight, pos_weight=3 * _bce_weight), torch.rand_like
    ),
    "normal": LossCase("gaussian_nll", nn.GaussianNLLLoss, _normal_labels, _normal),
    "normal-bounded": LossCase(None, partial(nn.GaussianNLLLoss, eps=1.0), _normal_labels, _normal),
    "normal-one-variance": LossCase(
        "gaussian_nll", nn.GaussianNLLLoss, _all_but_one, _one_variance
    ),
    "normal-flat-variance": LossCase(
        "gaussian_nll", nn.GaussianNLLLoss, _all_but_one, _flat_variance
    ),
}


def entries(*shape: int) -> Tensor:
    """Entries that every loss takes."""
    return torch.rand(shape, dtype=torch.float64) * 2 + 0.3
