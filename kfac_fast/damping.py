"""Damping that adapts to how well the quadratic model predicts the loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kfac_fast.preconditioner import KFAC
from kfac_fast.quadratic import QuadraticModel


class Stateful(Protocol):
    """What a step changes beside parameters: an optimizer, its schedule, a quadratic model."""

    def state_dict(self) -> Any:
        """All that it changes."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Go back to a state."""


class _Snapshot:
    """Parameters and states as they were before a step."""

    def __init__(self, parameters: Iterable[nn.Parameter], parts: Iterable[Stateful]) -> None:
        self._parameters = {p: p.detach().clone() for p in parameters}
        self._states = [(part, copy.deepcopy(part.state_dict())) for part in parts]

    @torch.no_grad()
    def restore(self) -> None:
        """Have all be as before."""
        for parameter, old in self._parameters.items():
            parameter.copy_(old)
        for part, state in self._states:
            part.load_state_dict(copy.deepcopy(state))  # an optimizer would go on in its tensors


@contextmanager
def _undone(kfac: KFAC, undo: Iterable[Stateful]) -> Iterator[None]:
    """Begin without gradients; whatever a step in the block does, all is as before at its end."""
    before = _Snapshot(_trained(kfac.model), [kfac, *undo])
    gradients = {p: p.grad for p in kfac.model.parameters()}
    devices = [kfac.device] if kfac.device.type == "cuda" else []
    try:
        for parameter in gradients:
            parameter.grad = None
        with _buffers_kept(kfac.model), torch.random.fork_rng(devices):
            yield
    finally:
        before.restore()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _evaluated(model: nn.Module, loss_of: Callable[[], Tensor]) -> Tensor:
    """A loss without gradients, which leaves the model's buffers as they are."""
    with torch.no_grad(), _buffers_kept(model):
        return loss_of()


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Leave running statistics of normalisations as they are."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, old in kept:
            module._buffers[name] = buffer
            if not torch.equal(buffer, old):  # for some cannot be written to
                buffer.copy_(old)


@contextmanager
def _kronecker_model(kfac: KFAC) -> Iterator[Callable[[], Tensor]]:
    """What the preconditioner predicts of the step that is taken in the block."""
    before = {p: p.detach().clone() for p in kfac.parameters()}
    if all(p.grad is None for p in before):
        raise RuntimeError(
            "adapt: backward() must be called before the block unless quadratic is given, got no "
            ".grad of a preconditioned parameter"
        )
    gradients = {p: torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in before}

    def take() -> None:
        # Again at the step itself: a scaler may have divided its scale out just before.
        for parameter, gradient in gradients.items():
            if parameter.grad is not None:
                gradient.copy_(parameter.grad)

    kfac._listeners.append(take)
    try:
        yield lambda: kfac.predicted_change(
            gradients, {p: p.detach() - old for p, old in before.items()}
        )
    finally:
        kfac._listeners.remove(take)


@contextmanager
def _exact_model(quadratic: QuadraticModel) -> Iterator[Callable[[], Tensor]]:
    """What the exact model predicts of the step that is taken in the block."""
    earlier = quadratic.predicted_change

    def predicted() -> Tensor:
        latest = quadratic.predicted_change
        if latest is None or latest is earlier:
            raise RuntimeError("adapt: quadratic must take its step in the block, got none of it")
        return latest

    yield predicted


class LevenbergMarquardt:
    r"""Damping that falls while steps do what the quadratic model says, and rises when they do not.

    .. math:: \rho = \frac{h(\theta + \delta) - h(\theta)}{M(\delta) - M(0)}, \qquad
        \lambda \leftarrow \begin{cases} \omega^T \lambda & \rho > 3/4 \\
        \omega^{-T} \lambda & \rho < 1/4 \end{cases}

    every :math:`T` steps, with the loss :math:`h` of one batch before and after the step, and the
    model :math:`M` of :meth:`kfac_fast.KFAC.predicted_change`. It is a schedule of the option
    ``damping``::

        damping = kfac_fast.LevenbergMarquardt(1e-2)
        kfac = kfac_fast.KFAC(model, damping=damping)
        for inputs, targets in data:
            loss_of = lambda: loss_function(model(inputs), targets)
            optimizer.zero_grad()
            loss_of().backward()
            with damping.adapt(kfac, loss_of):
                kfac.step()
                optimizer.step()

    A loss that is random, by dropout for example, disturbs the ratio. Parameters that are not
    preconditioned should hardly move, unless the model is a :class:`kfac_fast.QuadraticModel`: that
    of the preconditioner does not know them.

    Args:
        damping: First damping :math:`\lambda`.
        interval: Steps :math:`T` between adaptations. Only these evaluate the loss, twice, and make
            the host wait for the device.
        decay: :math:`\omega`, in (0, 1).
        bounds: Least and largest damping.

    Attributes:
        damping: Present damping.
        ratio: Latest :math:`\rho`; None before the first adaptation.
        rejected: Whether the latest step in :meth:`adapt` was undone.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Martens & Grosse (2015), section 6.5.
    """

    def __init__(
        self,
        damping: float = 1e-2,
        *,
        interval: int = 5,
        decay: float = 0.95,
        bounds: tuple[float, float] = (1e-8, 1e4),
    ) -> None:
        if not 0 < bounds[0] <= damping <= bounds[1]:
            raise ValueError(
                f"LevenbergMarquardt: damping must be in bounds {bounds}, got {damping}"
            )
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"LevenbergMarquardt: interval must be an int from 1, got {interval}")
        if not 0 < decay < 1:
            raise ValueError(f"LevenbergMarquardt: decay must be in (0, 1), got {decay}")
        self.damping = damping
        self.interval = interval
        self.decay = decay
        self.bounds = bounds
        self.ratio: float | None = None
        self.rejected = False

    def __call__(self, step: int) -> float:
        """The present damping, whatever the step."""
        return self.damping

    @contextmanager
    def adapt(
        self,
        kfac: KFAC,
        loss_of: Callable[[], Tensor],
        *,
        quadratic: QuadraticModel | None = None,
        undo: Sequence[Stateful] = (),
    ) -> Iterator[None]:
        """Put around ``kfac.step()`` and ``optimizer.step()``; adapts the damping when it is due.

        Args:
            kfac: The preconditioner.
            loss_of: Evaluates the training loss on the batch that the gradients are of.
            quadratic: The model :math:`M`, whose ``step`` is in the block, where it is to be the
                exact one.
            undo: Optimizers. If the loss has risen or its change is not finite when a step is
                looked at, it is rejected: they, the quadratic model and all of the model's trained
                parameters are as before it. The preconditioner keeps the batch's factors and counts
                the step.

        The damping acts from the preconditioner's next refresh on, in the rates of a quadratic
        model at once. It stays as it is where there was no step, as when a scaler skips it: where
        the loss is the very same, and no model predicts a lower one. Gradients are taken as
        ``kfac.step()`` finds them: a loss scale may be divided out in the block, up to there.

        Yields:
            Nothing.

        Raises:
            RuntimeError: If the quadratic model is given, but has no step in the block; or if it is
                not, and there are no gradients before the block.
        """
        self.rejected = False
        if kfac.steps % self.interval:
            yield
            return
        parts = undo if quadratic is None else [*undo, quadratic]
        model = _kronecker_model(kfac) if quadratic is None else _exact_model(quadratic)
        with model as predicted_of:
            before = _Snapshot(_trained(kfac.model), parts) if undo else None
            loss = _evaluated(kfac.model, loss_of)
            yield
        actual = float(_evaluated(kfac.model, loss_of) - loss)
        predicted = float(predicted_of())
        if actual == 0 and not predicted < 0:
            return
        # A step that the model itself expects to raise the loss is too long, whatever came of it.
        good = predicted < 0 and math.isfinite(actual)
        self.update(actual / predicted if good else math.nan)
        self.rejected = before is not None and not -math.inf < actual <= 0
        if before is not None and self.rejected:
            before.restore()

    def calibrate(
        self,
        kfac: KFAC,
        take_step: Callable[[], None],
        loss_of: Callable[[], Tensor],
        candidates: Sequence[float],
        *,
        undo: Sequence[Stateful],
    ) -> None:
        """Take the damping whose step leaves the loss of a batch the lowest.

        Every candidate's step is undone, with its gradients and what it draws from PyTorch's random
        numbers, so that training starts as if there had been none; if one raises, too. Call it
        before the first ``backward()`` of training::

            def take_step():
                optimizer.zero_grad()
                loss_of().backward()
                kfac.step()
                optimizer.step()

            damping.calibrate(kfac, take_step, loss_of, [1e-3, 1e-2, 1e-1], undo=[optimizer])

        Not undone are what the preconditioner's ``callback`` does, and draws from generators of
        your own. Rows of ``share_rows`` are forgotten with each step: set them in ``take_step``.

        Args:
            kfac: The preconditioner, with this as its damping.
            take_step: Takes a step of training, without :meth:`adapt`.
            loss_of: Evaluates the training loss on the batch of this step.
            candidates: Dampings in bounds.
            undo: All optimizers, and the quadratic model if there is one.

        Raises:
            RuntimeError: If the preconditioner has taken a step.
            ValueError: If this is not its damping, a candidate is out of bounds, or none leaves the
                loss finite.
        """
        if kfac.damping is not self:
            raise ValueError(f"calibrate: kfac must have this as its damping, got {kfac.damping}")
        if kfac.steps:
            raise RuntimeError(
                f"calibrate: it must come before the first step, got {kfac.steps} steps of kfac"
            )
        if not all(self.bounds[0] <= damping <= self.bounds[1] for damping in candidates):
            raise ValueError(f"calibrate: candidates must be in {self.bounds}, got {candidates}")
        losses, first = {}, self.damping
        try:
            for damping in candidates:
                self.damping = damping
                with _undone(kfac, undo):
                    take_step()
                    losses[damping] = float(_evaluated(kfac.model, loss_of))
        finally:
            self.damping = first
        finite = [damping for damping in candidates if math.isfinite(losses[damping])]
        if not finite:
            raise ValueError(
                f"calibrate: candidates must hold one that leaves the loss finite, got {losses}"
            )
        self.damping = min(finite, key=losses.__getitem__)

    def update(self, ratio: float) -> None:
        r"""Adapt the damping to a reduction ratio.

        Args:
            ratio: :math:`\rho`; one that is not a number counts as bad.
        """
        self.ratio = ratio
        power = self.decay**self.interval
        if ratio > 3 / 4:
            factor = power
        elif ratio >= 1 / 4:
            factor = 1.0
        else:
            factor = 1 / power
        self.damping = min(max(self.damping * factor, self.bounds[0]), self.bounds[1])

    def state_dict(self) -> dict[str, float | None]:
        """The damping and the latest ratio."""
        return {"damping": self.damping, "ratio": self.ratio}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Continue from a saved state.

        Args:
            state: Result of :meth:`state_dict`.

        Raises:
            ValueError: If the state does not hold a damping in bounds and a ratio.
        """
        damping = state.get("damping")
        if set(state) != {"damping", "ratio"} or damping is None:
            raise ValueError(f"load_state_dict: state must hold damping and ratio, got {state}")
        if not self.bounds[0] <= damping <= self.bounds[1]:
            raise ValueError(f"load_state_dict: damping must be in {self.bounds}, got {damping}")
        self.damping, self.ratio = damping, state["ratio"]
