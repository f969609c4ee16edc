"""The training loop of the larger examples, and their command line."""

import argparse
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from arms import KFACSettings, Settings
from comparison import Record, save
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from kfac_fast import KFAC
from kfac_fast.backends import EXTENSION_BUILT


@dataclass(frozen=True)
class Problem:
    """A model and its data.

    Attributes:
        data: Name of the data set.
        model: Makes the model.
        batches: Yields training batches without end, in an order that a seed fixes.
        loss: The training loss of the model on a batch. It is given the preconditioner, if there is
            one, to tell it what the model's inputs and outputs do not.
        evaluate: The model's metrics on the validation data.
        details: What else the record of a run shall say.
        kfac_options: Options of `KFAC` that follow from the loss.
    """

    data: str
    model: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Any]]
    loss: Callable[[nn.Module, Any, KFAC | None], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]
    details: dict[str, Any] = field(default_factory=dict)
    kfac_options: dict[str, Any] = field(default_factory=dict)


def schedule(step: int, steps: int, warm_up: float = 0.05) -> float:
    """Return the share of the peak learning rate: linear warm-up, then a cosine to 0."""
    start = max(1, round(warm_up * steps))
    if step < start:
        return (step + 1) / start
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))


def train(
    settings: Settings,
    problem: Problem,
    *,
    steps: int,
    seed: int,
    evaluations: int = 20,
    report: Callable[[int, str], None] = lambda step, metrics: None,
) -> Record:
    """Train one model and return the record of the run.

    The clocks count the training steps only, not the evaluations.

    Args:
        settings: The arm and its hyper-parameters.
        problem: The model and its data.
        steps: Length of the schedule.
        seed: Fixes the initial weights and the batches.
        evaluations: How often the validation metrics are measured, evenly spread.
        report: Called after every step with the step and the latest metrics.

    Returns:
        Settings, versions and a history, one row per evaluation.
    """
    torch.manual_seed(seed)
    model = problem.model()
    stream = problem.batches(seed)
    history, shown, wall, processor = [], "", 0.0, 0.0
    with settings.optimizers(model, problem.kfac_options) as (optimizers, kfac):
        schedules = [LambdaLR(o, lambda step: schedule(step, steps)) for o in optimizers]
        for step in range(1, steps + 1):
            wall -= time.perf_counter()
            processor -= time.process_time()
            loss = problem.loss(model, next(stream), kfac)
            loss.backward()
            for optimizer, rate in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                rate.step()
            wall += time.perf_counter()
            processor += time.process_time()
            if step * evaluations // steps > (step - 1) * evaluations // steps:
                metrics = {"loss": loss.item(), **_evaluate(problem, model)}
                row = {"step": step, "seconds": wall, "processor_seconds": processor, **metrics}
                history.append({name: round(value, 4) for name, value in row.items()})
                shown = "  ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in metrics.items())
            report(step, shown)
    return {
        "arm": settings.arm,
        "settings": asdict(settings),
        "data": problem.data,
        "steps": steps,
        "seed": seed,
        **problem.details,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "extension_built": EXTENSION_BUILT,
        "versions": {p: version(p) for p in ("kfac_fast", "torch", "numpy")},
        "history": history,
    }


@torch.no_grad()
def _evaluate(problem: Problem, model: nn.Module) -> dict[str, float]:
    model.eval()
    metrics = problem.evaluate(model)
    model.train()
    return metrics


def command_line(
    description: str | None, arms: dict[str, Settings], *, chosen: list[str], **defaults: float
) -> argparse.ArgumentParser:
    """Return a parser of the options that the examples share.

    Args:
        description: What the example shows.
        arms: Settings by the name that chooses them.
        chosen: Arms that are trained unless others are asked for.
        defaults: Those of `steps` and `kfac_share`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arms", nargs="+", choices=arms, default=chosen, help=f"arms to train ({chosen})")
    add("--steps", type=int, help="length of the schedule without K-FAC (%(default)s)")
    add("--kfac-share", type=float, help="share of these steps for K-FAC (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run per arm each (1 2 3)")
    add("--batch-size", type=int, default=256, help="examples per step (%(default)s)")
    add("--threads", type=int, help="processor threads (default: PyTorch's)")
    add(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output",
        help="folder for the records, one line per run, and the plot",
    )
    parser.set_defaults(arms_by_name=arms, **defaults)
    return parser


def compare(problem: Problem, options: argparse.Namespace, name: str, metrics: list[str]) -> None:
    """Train the chosen arms on every seed; save records and plot, print the table.

    Args:
        problem: The model and its data.
        options: Those of `command_line`.
        name: Of the saved files, without suffix.
        metrics: Columns of the table; the first is plotted.
    """
    if options.steps < 1:
        raise ValueError(f"steps must be at least 1, got {options.steps}")
    if options.threads:
        torch.set_num_threads(options.threads)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    records = []
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[shown]}")) as progress:
        for seed, arm in itertools.product(options.seeds, options.arms):
            settings = options.arms_by_name[arm]
            share = options.kfac_share if isinstance(settings, KFACSettings) else 1
            steps = max(1, int(share * options.steps))
            task = progress.add_task(f"{settings.arm}, seed {seed}", total=steps, shown="")
            show = partial(_show, progress, task)
            records.append(train(settings, problem, steps=steps, seed=seed, report=show))
    save(records, metrics, options.output, name)


def _show(progress: Progress, task: TaskID, step: int, shown: str) -> None:
    progress.update(task, completed=step, shown=shown)
