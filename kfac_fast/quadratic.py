"""Learning rate and momentum of each step, from the exact quadratic model of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfac_fast.curvature import constants
from kfac_fast.gauss_newton import root_product
from kfac_fast.losses import Loss, Targets, find_loss
from kfac_fast.preconditioner import KFAC
from kfac_fast.selection import eager_name
from kfac_fast.steps import gradient_divisor

Direction = Mapping[str, Tensor]
"""A change of the parameters, by their names."""


class QuadraticModel:
    r"""Chooses each step's learning rate and momentum by the exact quadratic model of the loss.

    .. math:: (\alpha, \mu) = \operatorname{argmin} M(-\alpha P + \mu \delta_0), \qquad
        M(\delta) - M(0) = \langle \nabla h, \delta \rangle + \tfrac12
        \langle \delta, (F + (\lambda + \eta) I) \, \delta \rangle

    with the preconditioned gradient :math:`P`, the step before :math:`\delta_0`, the damping
    :math:`\lambda` of the preconditioner, without that of single layers, and the generalised
    Gauss-Newton matrix :math:`F` of the batch itself in place of its Kronecker factors. It takes
    two forward passes in forward mode. The optimizer is to subtract ``.grad`` and nothing else: SGD
    with a learning rate of 1, without momentum or decay of its own::

        quadratic = kfac_fast.QuadraticModel(kfac, loss="cross_entropy")
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for inputs, targets in data:
            optimizer.zero_grad()
            loss_function(model(inputs), targets).backward()
            with quadratic.step(lambda: model(inputs), targets=targets):
                kfac.step()
            optimizer.step()

    All parameters of the model that have a ``.grad`` take part; the direction of one that is not
    preconditioned is its gradient. A ``.grad`` is to be that of the loss itself: a loss scale is
    divided out before the block, by ``scaler.unscale_`` or by hand. Where a sum is accumulated,
    whose micro-batches are divided by ``accumulation_steps``, :math:`F` and :math:`\lambda` are,
    too: the steps are those of the sum. The host never waits for the device. The passes are not
    captured and leave buffers as they are; a compiled model runs uncompiled in them, and dropout
    has other masks.

    Derivatives are taken in forward mode, which ``detach()`` ends and ``no_grad`` does not: parts
    of the model under the latter count as trained if their parameters have a ``.grad``, or the
    layers in front of them. PyTorch raises ``NotImplementedError`` where it has no derivative in
    forward mode: self-attention's fast path in evaluation mode, ``weight_norm``, ``spectral_norm``
    in training mode, LSTMs on some devices, a ``torch.autograd.Function`` without ``jvp``, and
    ``checkpoint(use_reentrant=True)``. The last loses derivatives without a word if nothing trained
    is in front of it: use ``use_reentrant=False``.

    Args:
        kfac: The preconditioner, not attached to an optimizer.
        loss: The training loss, as in :meth:`kfac_fast.KFAC.update_curvature`.
        l2_penalty: :math:`\eta`, where the training loss has half of it times the squared length of
            these parameters in it.
        momentum: Whether the step before is a second direction; if not, a step takes one pass.

    Attributes:
        learning_rate: Latest :math:`\alpha`, a scalar tensor; None before the first step.
        momentum: Latest :math:`\mu`, likewise.
        predicted_change: Latest :math:`M(\delta) - M(0)`, likewise. If it is not finite, the
            step is zero, and none before the next; gradients that are not finite stay so, to be
            seen.

    Raises:
        ValueError: If the loss is unknown, or the penalty is not a number from 0.

    Source: Martens & Grosse (2015), sections 6.4 and 7.
    """

    def __init__(
        self,
        kfac: KFAC,
        *,
        loss: str | nn.Module | Loss[Any],
        l2_penalty: float = 0.0,
        momentum: bool = True,
    ) -> None:
        if not 0 <= l2_penalty < math.inf:
            raise ValueError(
                f"QuadraticModel: l2_penalty must be a number from 0, got {l2_penalty}"
            )
        self.learning_rate: Tensor | None = None
        self.momentum: Tensor | None = None
        self.predicted_change: Tensor | None = None
        self._kfac = kfac
        self._loss: Loss[Any] = find_loss(loss, kfac.loss_reduction)
        self._l2_penalty = l2_penalty
        self._has_momentum = momentum
        self._previous: Direction = {}  # as in .grad, to be subtracted

    @contextmanager
    def step(self, outputs_of: Callable[[], Any], targets: Targets = None) -> Iterator[None]:
        """Put around ``kfac.step()``; from its end on ``.grad`` is what the optimizer subtracts.

        Args:
            outputs_of: Evaluates the model's outputs, as the loss takes them, on the batch that the
                gradients are of, all micro-batches; for a mean loss, on a part of it if that is to
                be cheaper. They are tensors, or what PyTorch's pytrees find tensors in, such as
                tuples and dicts.
            targets: Training labels of these outputs. The curvature depends on them only where the
                loss ignores or weighs some.

        Yields:
            Nothing.

        Raises:
            RuntimeError: If the preconditioner is attached to an optimizer or takes no step in the
                block, no parameter has a ``.grad`` before it, the parameters change in it, or the
                outputs do not depend on them.
            ValueError: If a ``.grad`` is sparse.
        """
        divisor = gradient_divisor(self._kfac.loss_reduction, self._kfac.accumulation_steps)
        shift = self._kfac._now("damping") / divisor + self._l2_penalty
        trained, steps = self._trained(), self._kfac.steps
        gradients = {name: gradient.clone() for name, gradient in _gradients(trained).items()}
        versions = [p._version for p in trained.values()]
        yield
        if self._kfac.steps != steps + 1:
            raise RuntimeError(
                "QuadraticModel.step: kfac.step() must be called once in the block, got "
                f"{self._kfac.steps - steps} calls"
            )
        if versions != [p._version for p in trained.values()]:
            raise RuntimeError(
                "QuadraticModel.step: parameters must not change in the block, got changed ones; "
                "call optimizer.step() after it"
            )

        def moved(direction: Direction) -> Tensor:
            length, unit = _length_and_unit(direction)
            product = root_product(
                self._kfac.model,
                outputs_of,
                unit,
                loss=self._loss,
                reduction=self._kfac.loss_reduction,
                targets=constants(targets),
            )
            return length * product / math.sqrt(divisor)

        self._minimise(_gradients(trained), gradients, moved, shift)

    def _trained(self) -> dict[str, nn.Parameter]:
        """The parameters that have a gradient, by their names; checks that a step can begin."""
        if self._kfac._optimizer_hook is not None:
            raise RuntimeError(
                "QuadraticModel.step: kfac must be stepped in the block, got one that is attached "
                "to an optimizer"
            )
        named = self._kfac.model.named_parameters()
        trained = {name: p for name, p in named if p.grad is not None}
        if not trained:
            raise RuntimeError(
                "QuadraticModel.step: backward() must be called before the block, got no .grad"
            )
        sparse = [name for name, own in _gradients(trained).items() if own.is_sparse]
        if sparse:
            raise ValueError(
                f"QuadraticModel.step: gradients must be dense, got sparse ones of {sparse}"
            )
        return trained

    @torch.no_grad()
    def _minimise(
        self,
        step: Direction,
        gradients: Direction,
        moved: Callable[[Direction], Tensor],
        shift: float,
    ) -> None:
        """Write the step over the preconditioned gradients.

        Args:
            step: The preconditioned gradients.
            gradients: Those of the loss.
            moved: A square root of the curvature times a direction.
            shift: What is added to the curvature's diagonal.
        """
        directions = [step]
        if self._previous:
            directions.append({name: self._past(name, own) for name, own in step.items()})
        moves = [moved(direction) for direction in directions]
        slopes = [_inner(direction, gradients) for direction in directions]
        pairs = [(0, 0), (0, 1), (1, 1)] if self._previous else [(0, 0)]
        curvatures = [
            (moves[i] * moves[j]).sum() + shift * _inner(directions[i], directions[j])
            for i, j in pairs
        ]
        rates = _minimum(slopes, curvatures)
        self.learning_rate, self.momentum = rates
        gains = [rate * slope for rate, slope in zip(rates, slopes, strict=False)]
        self.predicted_change = -torch.stack(gains).sum() / 2
        finite = self.predicted_change.isfinite()
        sound = torch.stack([gradient.isfinite().all() for gradient in gradients.values()]).all()
        for name, own in step.items():
            own.mul_(rates[0])
            if self._previous:
                own.add_(directions[1][name] * rates[1])
            own.masked_fill_(sound & ~finite, 0)  # a scaler skips only where gradients overflow
        if self._has_momentum:
            self._previous = {name: torch.where(finite, own, 0) for name, own in step.items()}

    def _past(self, name: str, like: Tensor) -> Tensor:
        """What was subtracted from a parameter in the step before."""
        return self._previous[name] if name in self._previous else torch.zeros_like(like)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """A snapshot of the step before, by which a resumed run continues bit for bit.

        Returns:
            A nested dictionary that ``torch.load(weights_only=True)`` accepts.
        """
        return {"previous": {eager_name(name): own.clone() for name, own in self._previous.items()}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from a saved state.

        Args:
            state: Result of :meth:`state_dict` of a run with the same model.

        Raises:
            ValueError: If it is none, or a tensor in it fits no parameter.
        """
        if set(state) != {"previous"}:
            raise ValueError(f"load_state_dict: state must hold previous, got {sorted(state)}")
        previous = state["previous"]
        named = {eager_name(name): (name, p) for name, p in self._kfac.model.named_parameters()}
        misfits = [
            name
            for name, own in previous.items()
            if name not in named or own.shape != named[name][1].shape
        ]
        if misfits:
            raise ValueError(
                f"load_state_dict: previous must fit the model's parameters, got others {misfits}"
            )
        fits = [(*named[name], own) for name, own in previous.items()]
        self._previous = {
            name: torch.empty_like(p, requires_grad=False).copy_(own) for name, p, own in fits
        }


def _gradients(trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.grad for name, p in trained.items() if p.grad is not None}


def _inner(one: Direction, other: Direction) -> Tensor:
    """Inner product of two directions, at least in float32."""
    products = [
        (own.to(torch.promote_types(own.dtype, torch.float32)) * other[name]).sum()
        for name, own in one.items()
    ]
    return torch.stack(products).sum()


def _length_and_unit(direction: Direction) -> tuple[Tensor, Direction]:
    """A direction's length and itself at length 1, for which the range of half precision does."""
    length = _inner(direction, direction).sqrt()
    divisor = torch.where(length > 0, length, 1)
    unit = {name: (own.to(length.dtype) / divisor).to(own.dtype) for name, own in direction.items()}
    return length, unit


def _minimum(slopes: Sequence[Tensor], curvatures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""Where a quadratic function of one or two coefficients has its minimum.

    .. math:: \begin{pmatrix} a & c \\ c & b \end{pmatrix}
        \begin{pmatrix} \alpha \\ \mu \end{pmatrix} = \begin{pmatrix} s \\ t \end{pmatrix}

    Args:
        slopes: :math:`s`, and :math:`t` if there are two.
        curvatures: :math:`a`, and :math:`c` and :math:`b` if there are two.

    Returns:
        Both coefficients. The second is zero where its direction is zero, or up to rounding the
        first one again; the first is zero where it has no curvature.
    """
    first = curvatures[0]
    if len(slopes) == 1:
        return _quotient(slopes[0], first), torch.zeros_like(first)
    cross, second = curvatures[1:]
    shared = _quotient(cross, first)
    rest = second - shared * cross
    rounding = 16 * torch.finfo(second.dtype).eps * second
    mu = torch.where(rest > rounding, (slopes[1] - shared * slopes[0]) / rest, 0)
    return _quotient(slopes[0] - mu * cross, first), mu


def _quotient(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y != 0, x / y, 0)
