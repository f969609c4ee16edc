"""The options of :class:`kfac_fast.KFAC`: what is allowed and where, the numbers of schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, Literal

import torch

DampingMode = Literal["factored", "plain", "exact"]
Schedule = float | Callable[[int], float]

CHOICES = {
    "approx": ("expand", "reduce"),
    "fisher": ("empirical", "mc", "exact", "curvature-propagation", "forward-only"),
    "loss_reduction": ("mean", "sum"),
    "damping_mode": ("factored", "plain", "exact"),
    "factor_dtype": (None, torch.float32, torch.float64),
    "grafting": (None, "adam"),
}
COUNTS = {  # least value
    "loss_terms_per_example": 1,
    "accumulation_steps": 1,
    "mc_samples": 1,
    "refinement_steps": 0,
}
BOUNDS = {  # lowest value, and the value to stay below
    "damping": (0, math.inf),
    "factor_decay": (0, 1),
    "factor_update_steps": (1, math.inf),
    "inverse_update_steps": (1, math.inf),
    "kl_clip": (1e-30, math.inf),
    "learning_rate": (1e-30, math.inf),
    "loss_scale": (1e-30, math.inf),
}
LAYER_OPTIONS = ("approx", "damping", "factor_decay")


def refuse_replicas() -> None:
    """Each process would precondition the common gradient by factors of its own.

    Raises:
        RuntimeError: If several processes train one model.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = torch.distributed.get_world_size()
        if size > 1:
            raise RuntimeError(f"KFAC: the process group must have one process, got {size}")


def check_optimizer_step(
    optimizer: torch.optim.Optimizer, arguments: Iterable[Any], length_counts: bool
) -> None:
    """Refuse a call of an attached optimizer whose gradients are not there yet, or still scaled.

    Args:
        optimizer: The optimizer.
        arguments: What its ``step`` was given.
        length_counts: Whether the step's length depends on that of the gradients.

    Raises:
        RuntimeError: If there is a closure, or the scale of gradients whose length counts.
    """
    if any(argument is not None for argument in arguments):
        raise RuntimeError("KFAC.attach: optimizer.step must be called without a closure, got one")
    if length_counts and getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "KFAC.attach: gradients must be unscaled for kl_clip, grafting and adapt, call "
            "scaler.unscale_(optimizer) before scaler.step, got a fused optimizer's scaled ones"
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Check all options but the numbers of schedules.

    Args:
        options: Values by name.

    Raises:
        ValueError: If a value is refused, or does not go with another.
    """
    for option, choices in CHOICES.items():
        _check_choice(option, options[option], choices)
    for option, least in COUNTS.items():
        count = options[option]
        if not isinstance(count, int) or count < least:
            raise ValueError(f"KFAC: {option} must be an int from {least}, got {count!r}")
    for pattern, own in options["layer_options"].items():
        if not isinstance(own, Mapping) or not set(own) <= set(LAYER_OPTIONS):
            raise ValueError(
                f"KFAC: layer_options must hold values of {LAYER_OPTIONS}, got {own!r} for "
                f"{pattern!r}"
            )
        if "approx" in own:
            _check_choice("approx", own["approx"], CHOICES["approx"])
    for option, value, against, why in _conflicts(options):
        if against:
            raise ValueError(f"KFAC: {option} must be {value} {why}, got {options[option]!r}")


def _check_choice(option: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"KFAC: {option} must be one of {choices}, got {value!r}")


def _conflicts(options: Mapping[str, Any]) -> list[tuple[str, str, bool, str]]:
    """Option, what it must be, whether it is something else, and why."""
    exact = options["damping_mode"] == "exact"
    corrected, clips = options["eigenvalue_correction"], options["kl_clip"] is not None
    rate = options["learning_rate"]
    is_rate = callable(rate) or (isinstance(rate, Real) and 0 < float(rate) < math.inf)
    return [
        (
            "eigenvalue_correction",
            "False",
            corrected and not exact,
            "unless damping_mode is 'exact'",
        ),
        (
            "eigenvalue_correction",
            "False",
            corrected and options["fisher"] == "forward-only",
            "with fisher 'forward-only', which has no gradients",
        ),
        (
            "refinement_steps",
            "0",
            exact and options["refinement_steps"] > 0,
            "with damping_mode 'exact', which has no inverses",
        ),
        ("learning_rate", "positive and finite", clips and not is_rate, "for kl_clip"),
        (
            "kl_clip",
            "None",
            clips and options["grafting"] is not None,
            "with grafting, which sets the step's length",
        ),
    ]


def number(option: str, schedule: Schedule, step: int) -> float:
    """A schedule's number at a step, checked.

    Args:
        option: Its name.
        schedule: A number, or a function of the step.
        step: Number of steps taken.

    Returns:
        The number.

    Raises:
        ValueError: If it is out of the option's bounds.
    """
    value = schedule(step) if callable(schedule) else schedule
    low, high = BOUNDS[option]
    if not isinstance(value, Real) or not low <= value < high:  # NumPy's numbers are real, too
        raise ValueError(f"KFAC: {option} must be in [{low}, {high}), got {value!r} at step {step}")
    if option.endswith("_steps") and value != int(value):
        raise ValueError(f"KFAC: {option} must be whole, got {value!r} at step {step}")
    return float(value)
