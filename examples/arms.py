"""The arms of a comparison: each has the optimizers and hyper-parameters that train a model."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from kfac_fast import KFAC

LAYERS = nn.Linear, nn.Conv2d, nn.Embedding
Optimizers = tuple[list[Optimizer], KFAC | None]


@dataclass(frozen=True)
class AdamWSettings:
    """AdamW on the layers; another learning rate, and no decay, for norms and positions."""

    learning_rate: float = 8e-3
    weight_decay: float = 0.5
    beta2: float = 0.98
    other_learning_rate: float = 8e-3

    @property
    def arm(self) -> str:
        """The name of this arm in tables and plots."""
        return "AdamW"

    @contextlib.contextmanager
    def optimizers(self, model: nn.Module, kfac_options: dict[str, Any]) -> Iterator[Optimizers]:
        """Provide the optimizers that together train `model`."""
        layers = [p for m in model.modules() if isinstance(m, LAYERS) for p in m.parameters()]
        main = AdamW(layers, self.learning_rate, (0.9, self.beta2), weight_decay=self.weight_decay)
        yield [main, _others(model, layers, self.other_learning_rate, self.beta2)], None


@dataclass(frozen=True)
class SGDSettings:
    """SGD with Nesterov momentum on everything."""

    learning_rate: float = 0.1
    weight_decay: float = 5e-4

    @property
    def arm(self) -> str:
        """The name of this arm in tables and plots."""
        return "SGD"

    @contextlib.contextmanager
    def optimizers(self, model: nn.Module, kfac_options: dict[str, Any]) -> Iterator[Optimizers]:
        """Provide the optimizer that trains `model`."""
        options = {"momentum": 0.9, "nesterov": True, "weight_decay": self.weight_decay}
        yield [SGD(model.parameters(), self.learning_rate, **options)], None


@dataclass(frozen=True)
class KFACSettings:
    """SGD with momentum behind K-FAC on the layers, AdamW on norms and positions.

    Factors and inverses are updated every `update_steps`, and at each of the first `early_steps`.
    """

    approx: Literal["expand", "reduce"] = "reduce"
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.2
    damping: float = 1e-5
    factor_decay: float = 0.7
    update_steps: int = 5
    grafting: Literal["adam"] | None = "adam"
    kl_clip: float | None = None
    other_learning_rate: float = 2e-2
    other_beta2: float = 0.98
    early_steps: int = 0

    @property
    def arm(self) -> str:
        """The name of this arm in tables and plots."""
        return f"K-FAC {self.approx}"

    @contextlib.contextmanager
    def optimizers(self, model: nn.Module, kfac_options: dict[str, Any]) -> Iterator[Optimizers]:
        """Provide the optimizers that together train `model`, and the preconditioner."""

        def every(step: int) -> int:
            return 1 if step < self.early_steps else self.update_steps

        with KFAC(
            model,
            approx=self.approx,
            damping=self.damping,
            factor_decay=self.factor_decay,
            factor_update_steps=every,
            inverse_update_steps=every,
            grafting=self.grafting,
            kl_clip=self.kl_clip,
            learning_rate=self.learning_rate,
            skip=["Norm"],  # AdamW's, with the positions
            **kfac_options,
        ) as kfac:
            covered = list(kfac.parameters())
            sgd = SGD(covered, self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)
            kfac.attach(sgd)
            others = _others(model, covered, self.other_learning_rate, self.other_beta2)
            yield [sgd, others], kfac


Settings = AdamWSettings | SGDSettings | KFACSettings


def _others(model: nn.Module, taken: list[Tensor], learning_rate: float, beta2: float) -> Optimizer:
    """AdamW without weight decay for the parameters of `model` that are not `taken`."""
    others = [p for p in model.parameters() if p not in set(taken)]
    return AdamW(others, learning_rate, (0.9, beta2), weight_decay=0)
