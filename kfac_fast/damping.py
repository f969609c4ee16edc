"""Damping that adapts to how well the quadratic model predicts the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kfac_fast.preconditioner import KFAC


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients, and leave running statistics of normalisations as they are."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with torch.no_grad():
        try:
            yield
        finally:
            for module, name, buffer, old in kept:
                module._buffers[name] = buffer
                if not torch.equal(buffer, old):  # for some cannot be written to
                    buffer.copy_(old)


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
    preconditioned should hardly move: the model does not know them.

    Args:
        damping: First damping :math:`\lambda`.
        interval: Steps :math:`T` between adaptations. Only these evaluate the loss, twice, and make
            the host wait for the device.
        decay: :math:`\omega`, in (0, 1).
        bounds: Least and largest damping.

    Attributes:
        damping: Present damping.
        ratio: Latest :math:`\rho`; None before the first adaptation.

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

    def __call__(self, step: int) -> float:
        """The present damping, whatever the step."""
        return self.damping

    @contextmanager
    def adapt(self, kfac: KFAC, loss_of: Callable[[], Tensor]) -> Iterator[None]:
        """Put around ``kfac.step()`` and ``optimizer.step()``; adapts the damping when it is due.

        Args:
            kfac: The preconditioner.
            loss_of: Evaluates the training loss on the batch that the gradients are of.

        Yields:
            Nothing.
        """
        if kfac.steps % self.interval:
            yield
            return
        parameters = list(kfac.parameters())
        before = {p: p.detach().clone() for p in parameters}
        gradients = {
            p: torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters
        }
        with _buffers_kept(kfac.model):
            loss = loss_of()
        yield
        with _buffers_kept(kfac.model):
            actual = loss_of() - loss
        steps = {p: p.detach() - old for p, old in before.items()}
        predicted = kfac.predicted_change(gradients, steps)
        # A step that the model itself expects to raise the loss is too long, whatever came of it.
        self.update(float(actual) / float(predicted) if predicted < 0 else math.nan)

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
