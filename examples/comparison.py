"""Records, plot and table of training runs that compare optimizers on one problem."""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

# One run: `arm`, `steps`, `seed` and `history`, whose rows hold `step`, `seconds` and the metrics.
Record = dict[str, Any]


def save(records: list[Record], metrics: list[str], folder: Path, name: str) -> None:
    """Save the records and a plot of the first metric; print the table of all metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    plot(records, metrics[0], folder / f"{name}.png")
    console = Console()
    console.print(table(records, metrics))
    console.print(f"Records and plot: {folder / name}.jsonl, .png")


def plot(records: list[Record], metric: str, path: Path) -> None:
    """Draw a metric against steps and against seconds: means over the seeds bold, seeds thin."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, clock in zip(panels, ("step", "seconds"), strict=True):
        for index, (arm, runs) in enumerate(_by_arm(records).items()):
            clocks = [_column(run, clock) for run in runs]
            values = [_column(run, metric) for run in runs]
            for x, y in zip(clocks, values, strict=True):
                panel.plot(x, y, color=f"C{index}", linewidth=0.6, alpha=0.5)
            panel.plot(
                _mean(clocks), _mean(values), color=f"C{index}", label=f"{arm}, {len(runs)} seeds"
            )
        panel.set(xlabel=clock, yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel(metric.replace("_", " "))
    panels[0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(records: list[Record], metrics: list[str]) -> Table:
    """Sum up the last evaluations of each arm: mean and, over several seeds, standard deviation."""
    longest = max(run["steps"] for run in records)
    columns = "arm", "steps", *metrics, "seconds", "ms per step"
    result = Table(*(name.replace("_", " ") for name in columns))
    for arm, runs in _by_arm(records).items():
        steps = runs[0]["steps"]
        seconds = fmean(_column(run, "seconds")[-1] for run in runs)
        final = [_spread([_column(run, metric)[-1] for run in runs]) for metric in metrics]
        share, per_step = f"{steps} ({steps / longest:.0%})", 1000 * seconds / steps
        result.add_row(arm, share, *final, f"{seconds:.1f}", f"{per_step:.1f}")
    return result


def _by_arm(records: list[Record]) -> dict[str, list[Record]]:
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record["arm"], []).append(record)
    return arms


def _column(record: Record, key: str) -> list[float]:
    return [row[key] for row in record["history"]]


def _mean(columns: list[list[float]]) -> list[float]:
    return [fmean(values) for values in zip(*columns, strict=True)]


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")
