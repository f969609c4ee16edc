"""Losses, as far as their curvature needs them: terms, draws of labels, roots of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast.layers import Count

Outputs = TypeVar("Outputs", contravariant=True)
Targets = Tensor | tuple["Targets", ...] | None
"""Training labels as a loss takes them."""


@runtime_checkable
class Loss(Protocol[Outputs]):
    r"""What a Fisher type needs to know of a loss :math:`\sum_m \ell_m`, or of its mean.

    The outputs are what the loss takes, a tensor or whatever else, with the examples first; the
    targets are the training labels, or None. No method may need a tensor's value on the host.
    """

    def terms(self, outputs: Outputs, targets: Any) -> Count:
        """Number that the loss's mean divides the sum by.

        Args:
            outputs: The model's outputs.
            targets: Training labels.

        Returns:
            An int, or a scalar tensor where it depends on the labels.
        """
        ...

    def sample(self, outputs: Outputs, targets: Any, generator: torch.Generator | None) -> Tensor:
        r"""The sum of the terms on labels drawn from the model's predictive distribution.

        .. math:: \sum_m \sqrt{w_m}\, \ell(f_m, y_m), \qquad y_m \sim p(y \mid f_m)

        where the training loss weighs its terms by :math:`w_m`.

        Args:
            outputs: The model's outputs.
            targets: Training labels.
            generator: Source of randomness; PyTorch's default if None.

        Returns:
            Scalar; its gradient with respect to an example's outputs has mean zero, and the
            Hessian of the example's terms as its covariance.
        """
        ...

    def root(self, outputs: Outputs, targets: Any) -> Tensor:
        r"""The outputs times a square root of the loss's Hessian.

        .. math:: R_n^\top f_n, \qquad R_n R_n^\top = \nabla_{f_n}^2 \textstyle\sum_m \ell_m

        Args:
            outputs: The model's outputs.
            targets: Training labels.

        Returns:
            ``[N, K]``; the gradient of each entry with respect to its example's outputs is a column
            of the root, taken for a constant.
        """
        ...


def _precise(x: Tensor) -> Tensor:
    """At least float32: in half precision, probabilities and draws would be too coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _entries(x: Tensor) -> Tensor:
    """``[N, *]`` as ``[N, K]``."""
    return x[:, None].flatten(1)


def _check_outputs(outputs: object, layout: str, dimensions: int) -> None:
    if not isinstance(outputs, Tensor):
        raise TypeError(f"update_curvature: outputs must be a tensor, got {type(outputs).__name__}")
    if outputs.dim() < dimensions:
        raise ValueError(f"update_curvature: outputs must be {layout}, got {outputs.dim()}-d")


def _check_targets(targets: Tensor, shape: torch.Size) -> None:
    if targets.shape != shape:
        raise ValueError(
            f"update_curvature: targets must be {tuple(shape)}, got {tuple(targets.shape)}"
        )


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    r"""Softmax cross entropy of logits ``[N, C, *positions]``, a term for each position.

    With probabilities :math:`p`, the Hessian of a term is :math:`w (\operatorname{diag} p - p
    p^\top)` for any label: one class or a distribution over all, smoothed or not. Its weight
    :math:`w` is 0 for ignored labels; with weights of the classes it is :math:`\sum_k w_k q_k` for
    the distribution :math:`q` that the term compares with. Labels are drawn without smoothing, from
    the distribution that the model predicts.

    Args:
        weight: Weights of the classes, ``[C]``.
        ignore_index: Label of terms that do not count.
        label_smoothing: Weight of the uniform distribution in the labels; it matters only with
            weights of the classes.
    """

    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def terms(self, outputs: Tensor, targets: Tensor | None) -> Count:
        """Positions; for class labels, those that are not ignored, or the weights of the labels."""
        self._check(outputs, targets)
        if targets is None or targets.is_floating_point():
            return outputs[:, :1].numel()
        return self._label_weights(outputs, targets).sum()

    def sample(
        self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Cross entropy with classes drawn from the softmax."""
        self._check(outputs, targets)
        logits = _precise(outputs)
        # torch.multinomial makes the host wait and refuses NaN.
        probabilities = logits.detach().movedim(1, -1).softmax(-1)
        # The first of exponential clocks with these rates to ring.
        clocks = torch.empty_like(probabilities, memory_format=torch.contiguous_format)
        labels = (probabilities / clocks.exponential_(generator=generator)).argmax(-1)
        if targets is None:
            return F.cross_entropy(logits, labels, reduction="sum")
        weights = self._term_weights(outputs, targets)
        return (weights.sqrt() * F.cross_entropy(logits, labels, reduction="none")).sum()

    def root(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        r"""Columns :math:`\sqrt{w p_k} (e_k - p)` for each class :math:`k` and position."""
        self._check(outputs, targets)
        logits = _precise(outputs)
        probabilities = logits.detach().softmax(1)
        scale = probabilities.sqrt()
        if targets is not None:
            scale = scale * self._term_weights(outputs, targets).sqrt()[:, None]
        return _entries(scale * (logits - (probabilities * logits).sum(1, keepdim=True)))

    def _check(self, outputs: Tensor, targets: Tensor | None) -> None:
        _check_outputs(outputs, "[N, C, *positions]", 2)
        if targets is None:
            if self.weight is not None or self.ignore_index != CrossEntropy.ignore_index:
                raise ValueError(
                    "update_curvature: targets must be given for weight and ignore_index, got None"
                )
            return
        _check_targets(
            targets, outputs.shape if targets.is_floating_point() else outputs[:, 0].shape
        )

    def _class_weights(self, outputs: Tensor) -> Tensor:
        like = _precise(outputs)
        return like.new_ones(like.shape[1]) if self.weight is None else self.weight.to(like)

    def _label_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The weight of each term's label before smoothing, 0 if ignored: ``[N, *positions]``."""
        weights = self._class_weights(outputs)
        if targets.is_floating_point():
            return (targets.to(weights).movedim(1, -1) * weights).sum(-1)
        counted = targets != self.ignore_index
        return counted * weights[targets.where(counted, 0).long()]  # bytes would be a mask

    def _term_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The weight of each term's Hessian, ``[N, *positions]``."""
        weights = self._label_weights(outputs, targets)
        uniform = self._class_weights(outputs).mean().expand_as(weights)
        if not targets.is_floating_point():
            uniform = uniform * (targets != self.ignore_index)
        return torch.lerp(weights, uniform, self.label_smoothing)


@dataclass(frozen=True, eq=False)
class MSE:
    """Squared error, without 1/2: the Hessian is 2, a term for each entry of the outputs."""

    def terms(self, outputs: Tensor, targets: Tensor | None) -> Count:
        """Entries of the outputs."""
        _check_outputs(outputs, "[N, *]", 1)
        return outputs.numel()

    def sample(
        self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Squared error with labels of variance 1/2 around the outputs."""
        _check_outputs(outputs, "[N, *]", 1)
        predictions = _precise(outputs)
        noise = torch.empty_like(predictions, memory_format=torch.contiguous_format)
        labels = predictions.detach() + noise.normal_(std=0.5**0.5, generator=generator)
        return F.mse_loss(predictions, labels, reduction="sum")

    def root(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        r"""Unit vectors, times :math:`\sqrt 2`."""
        _check_outputs(outputs, "[N, *]", 1)
        return 2**0.5 * _entries(_precise(outputs))


@dataclass(frozen=True, eq=False)
class BCEWithLogits:
    r"""Binary cross entropy of logits, a term for each entry of the outputs.

    The Hessian of a term is :math:`w\, p (1 - p)`, and with a weight :math:`c` of positive labels
    :math:`w\, (1 + (c - 1)\, y)\, p (1 - p)`.

    Args:
        weight: Weights of the terms, that broadcast to the outputs.
        pos_weight: Weights of positive labels, that broadcast to the outputs.
    """

    weight: Tensor | None = None
    pos_weight: Tensor | None = None

    def terms(self, outputs: Tensor, targets: Tensor | None) -> Count:
        """Entries of the outputs, whatever their weights."""
        self._check(outputs, targets)
        return outputs.numel()

    def sample(
        self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Binary cross entropy with independent Bernoulli labels."""
        self._check(outputs, targets)
        logits = _precise(outputs)
        probabilities = logits.detach().sigmoid()
        # torch.bernoulli refuses NaN.
        drawn = torch.empty_like(probabilities, memory_format=torch.contiguous_format)
        labels = drawn.uniform_(generator=generator) < probabilities
        weights = self._term_weights(targets)
        return F.binary_cross_entropy_with_logits(
            logits,
            labels.to(logits.dtype),
            None if weights is None else weights.sqrt(),
            reduction="sum",
        )

    def root(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        r"""Unit vectors, times :math:`\sqrt{w\, p (1 - p)}`."""
        self._check(outputs, targets)
        logits = _precise(outputs)
        constant = logits.detach()
        curvature = constant.sigmoid() * (-constant).sigmoid()  # 1 - p would lose small ones
        weights = self._term_weights(targets)
        if weights is not None:
            curvature = weights * curvature
        return _entries(curvature.sqrt() * logits)

    def _check(self, outputs: Tensor, targets: Tensor | None) -> None:
        _check_outputs(outputs, "[N, *]", 1)
        if self.pos_weight is None:
            return
        if targets is None:
            raise ValueError("update_curvature: targets must be given for pos_weight, got None")
        _check_targets(targets, outputs.shape)

    def _term_weights(self, targets: Tensor | None) -> Tensor | None:
        """What multiplies the terms' Hessians; None if nothing does."""
        if self.pos_weight is None or targets is None:
            return self.weight
        positive = 1 + (self.pos_weight - 1) * targets
        return positive if self.weight is None else self.weight * positive


@dataclass(frozen=True, eq=False)
class GaussianNLL:
    r"""Negative log likelihood of normal distributions, a term for each entry of the mean.

    The outputs are ``(mean, variance)`` as ``nn.GaussianNLLLoss`` takes them: the variance may be a
    number, lack the last dimension, or have 1 for one of the mean's. In mean and variance
    :math:`v`, the Fisher of a term is :math:`\operatorname{diag}(1 / v, 1 / (2 v^2))`. It is the
    mean of the Hessian under the model, and takes its place: the Hessian itself may be negative. A
    variance that is not trained counts as known.

    Args:
        eps: Lower bound of the variance.
    """

    eps: float = 1e-6

    def terms(self, outputs: tuple[Tensor, Tensor | float], targets: Tensor | None) -> Count:
        """Entries of the mean."""
        return self._mean_and_variance(outputs)[0].numel()

    def sample(
        self,
        outputs: tuple[Tensor, Tensor | float],
        targets: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Negative log likelihood of draws from the normal distributions."""
        mean, variance = self._mean_and_variance(outputs)
        noise = torch.empty_like(mean, memory_format=torch.contiguous_format)
        deviation = variance.detach().sqrt() * noise.normal_(generator=generator)
        square = (mean - mean.detach() - deviation).square()
        return 0.5 * (variance.log() + square / variance).sum()

    def root(self, outputs: tuple[Tensor, Tensor | float], targets: Tensor | None) -> Tensor:
        r"""Unit vectors, times :math:`v^{-1/2}` for means, :math:`2^{-1/2} / v` for variances."""
        mean, variance = self._mean_and_variance(outputs)
        v = variance.detach()
        columns = [_entries(mean / v.sqrt()), _entries(variance / (2**0.5 * v))]
        return torch.cat(columns if variance.requires_grad else columns[:1], 1)

    def _mean_and_variance(self, outputs: tuple[Tensor, Tensor | float]) -> tuple[Tensor, Tensor]:
        """Both in the mean's shape; gradients pass the lower bound, as in PyTorch's loss."""
        if not isinstance(outputs, tuple) or len(outputs) != 2:
            raise TypeError(
                "update_curvature: outputs must be a tuple (mean, variance), "
                f"got {type(outputs).__name__}"
            )
        mean, variance = outputs
        _check_outputs(mean, "([N, *], variance)", 1)
        if isinstance(variance, float):
            variance = torch.full_like(mean, variance, requires_grad=False)
        _check_outputs(variance, "(mean, [N, *])", 0)
        given = tuple(variance.shape)
        if variance.shape == mean.shape[:-1]:
            variance = variance[..., None]
        sizes = zip(variance.shape, mean.shape, strict=False)
        others = [own for own, size in sizes if own != size]
        if variance.dim() != mean.dim() or others not in ([], [1]):
            raise ValueError(
                f"update_curvature: variance must have the mean's shape {tuple(mean.shape)}, but "
                f"for one dimension of 1 or a missing last one, got {given}"
            )
        if len(variance) != len(mean) and variance.requires_grad:
            raise ValueError(
                "update_curvature: variance must be each example's own if it is trained, got "
                f"{len(variance)} for {len(mean)} examples"
            )
        variance = _precise(variance).expand_as(mean)
        bounded = variance + (variance.clamp(min=self.eps) - variance).detach()
        return _precise(mean), bounded


@dataclass(frozen=True, eq=False)
class WeightedSum:
    r"""Several losses of one forward pass, such as those of a model with two heads.

    .. math:: L = \sum_i w_i L_i(f_i, y_i)

    The outputs and the targets are tuples with an entry for each loss. All are of the same
    examples, and one tensor may be there several times. With means over :math:`M_i` terms, it is a
    mean over :math:`M = \max_i M_i` of terms whose Hessians add up to :math:`\sum_i w_i M / M_i \,
    \nabla^2 \sum_m \ell_{i,m}`. A mean without terms, where all labels are ignored, weighs nothing.
    Micro-batches weigh as much as they have terms :math:`M`. Under ``fisher="empirical"``, where
    terms are only counted, the training loss is taken for a mean of :math:`M`.

    Args:
        losses: Names, loss modules or losses, as :meth:`kfac_fast.KFAC.update_curvature` takes one.
        weights: :math:`w_i`, from 0; all 1 if None.
        reduction: ``"mean"`` or ``"sum"``, of each loss; KFAC puts its own ``loss_reduction`` here.

    Raises:
        ValueError: If there is no loss, or not a finite weight from 0 for each.
    """

    losses: Sequence[str | nn.Module | Loss[Any]]
    weights: Sequence[float] | None = None
    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Check the weights."""
        if not self.losses:
            raise ValueError("WeightedSum: losses must be one or more, got none")
        good = [isinstance(w, Real) and 0 <= w < math.inf for w in self._weights()]
        if not all(good) or len(good) != len(self.losses):
            raise ValueError(
                f"WeightedSum: weights must be finite numbers from 0 for {len(self.losses)} "
                f"losses, got {self.weights!r}"
            )

    def terms(self, outputs: tuple[Any, ...], targets: Targets) -> Count:
        """The most terms that one of the losses has."""
        return _most(self._counts(outputs, targets))

    def sample(
        self, outputs: tuple[Any, ...], targets: Targets, generator: torch.Generator | None
    ) -> Tensor:
        """The losses with labels drawn for one loss after the other."""
        parts = self._parts(outputs, targets)
        draws = [loss.sample(f, y, generator) for loss, f, y in parts]
        scales = self._scales(outputs, targets)
        return torch.stack([s * draw for s, draw in zip(scales, draws, strict=True)]).sum()

    def root(self, outputs: tuple[Any, ...], targets: Targets) -> Tensor:
        r"""Columns of all losses, times :math:`\sqrt{w_i M / M_i}`; of sums, :math:`\sqrt{w_i}`."""
        roots = [loss.root(f, y) for loss, f, y in self._parts(outputs, targets)]
        examples = [len(root) for root in roots]
        if len(set(examples)) > 1:
            raise ValueError(
                f"update_curvature: outputs must all be of the same examples, got {examples}"
            )
        scales = self._scales(outputs, targets)
        return torch.cat([s * root for s, root in zip(scales, roots, strict=True)], 1)

    def _parts(
        self, outputs: tuple[Any, ...], targets: Targets
    ) -> Iterator[tuple[Loss[Any], Any, Any]]:
        """Each loss with its outputs and targets."""
        count = len(self.losses)
        labels = (None,) * count if targets is None else targets
        for name, given in (("outputs", outputs), ("targets", labels)):
            if not isinstance(given, tuple) or len(given) != count:
                got = len(given) if isinstance(given, tuple) else type(given).__name__
                raise TypeError(f"update_curvature: {name} must be a tuple of {count}, got {got}")
        losses = [find_loss(loss, self.reduction) for loss in self.losses]
        return zip(losses, outputs, labels, strict=True)

    def _counts(self, outputs: tuple[Any, ...], targets: Targets) -> list[Count]:
        return [loss.terms(f, y) for loss, f, y in self._parts(outputs, targets)]

    def _weights(self) -> Sequence[float]:
        return [1.0] * len(self.losses) if self.weights is None else self.weights

    def _scales(self, outputs: tuple[Any, ...], targets: Targets) -> list[float | Tensor]:
        """What the gradients of each loss are times in those of the sum."""
        weights = [float(weight) for weight in self._weights()]
        if self.reduction == "sum":
            return [weight**0.5 for weight in weights]
        counts = self._counts(outputs, targets)
        shares = [_share(_most(counts), count) for count in counts]
        return [(weight * share) ** 0.5 for weight, share in zip(weights, shares, strict=True)]


def _most(counts: Sequence[Count]) -> Count:
    most: Count = max((count for count in counts if not isinstance(count, Tensor)), default=0)
    for count in counts:
        if isinstance(count, Tensor):
            most = torch.maximum(count, most) if isinstance(most, Tensor) else count.clamp(min=most)
    return most


def _share(most: Count, count: Count) -> float | Tensor:
    """Their ratio; 0 without terms."""
    if isinstance(count, Tensor):
        return torch.where(count > 0, most / count, 0.0)
    return most / count if count else 0.0


LOSSES: dict[str, type[Any]] = {
    "cross_entropy": CrossEntropy,
    "mse": MSE,
    "bce_with_logits": BCEWithLogits,
    "gaussian_nll": GaussianNLL,
}
MODULES: dict[type[nn.Module], type[Any]] = {
    nn.CrossEntropyLoss: CrossEntropy,
    nn.MSELoss: MSE,
    nn.BCEWithLogitsLoss: BCEWithLogits,
    nn.GaussianNLLLoss: GaussianNLL,
}


def find_loss(loss: str | nn.Module | Loss[Outputs], reduction: str) -> Loss[Outputs]:
    """The loss that a name, one of PyTorch's loss modules or the loss itself stands for.

    Args:
        loss: A key of :data:`LOSSES`, an instance of one of :data:`MODULES`, or a :class:`Loss`.
        reduction: The training loss's; a module must have the same.

    Returns:
        The loss. A name stands for the defaults of PyTorch's loss; a :class:`WeightedSum` has its
        parts found.

    Raises:
        ValueError: If the name or the kind of module is unknown, or the reduction is another.
    """
    if isinstance(loss, str) and loss in LOSSES:
        named: Loss[Outputs] = LOSSES[loss]()
        return named
    if isinstance(loss, WeightedSum):
        parts = [find_loss(part, reduction) for part in loss.losses]
        resolved: Loss[Any] = replace(loss, losses=parts, reduction=reduction)
        return resolved
    if isinstance(loss, Loss) and not isinstance(loss, type):
        return loss
    if not isinstance(loss, nn.Module) or type(loss) not in MODULES:
        modules = sorted(module.__name__ for module in MODULES)
        raise ValueError(
            f"update_curvature: loss must be one of {sorted(LOSSES)}, one of the modules {modules} "
            f"or have the methods of kfac_fast.losses.Loss, got {loss!r}"
        )
    if loss.reduction != reduction:
        raise ValueError(
            f"update_curvature: loss must have the loss_reduction {reduction!r} of KFAC, "
            f"got {loss.reduction!r}"
        )
    kind = MODULES[type(loss)]
    same: Loss[Outputs] = kind(**{field.name: getattr(loss, field.name) for field in fields(kind)})
    return same
