"""The plots of a run: how many times as fast as PyTorch, and how near to the floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from record import Record

matplotlib.use("Agg")  # draws files only; needs no display
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


def _operators(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.op for record in records))


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(axes: Axes, records: Sequence[Record], values: Sequence[float], label: str) -> None:
    """Horizontal bars in the order of the records, a colour for each operator."""
    colours = [f"C{_operators(records).index(record.op)}" for record in records]
    names = [f"{record.op}  {record.shape}" for record in records]
    # The ratio of an equal is 1, of which the logarithmic axis makes the bars' common start.
    start = 1.0 if label.startswith("times") else 0.0
    lengths = [value - start for value in values]
    bars = axes.barh(range(len(values)), lengths, left=start, color=colours)
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=7)
    axes.set_yticks(range(len(values)), names, fontsize=7)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.axvline(start, color="black", linewidth=0.8)
    axes.set_xlabel(label)


def draw_ratios(records: Sequence[Record], path: Path, title: str) -> None:
    """Draw the ratios, and below them the microseconds added to short calls."""
    long = [record for record in records if record.added_us is None]
    short = [record for record in records if record.added_us is not None]
    heights = [len(part) + 3 for part in (long, short) if part]
    figure, all_axes = pyplot.subplots(
        len(heights),
        figsize=(9, 0.19 * sum(heights) + 0.6),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    axes = iter(all_axes[:, 0])
    if long:
        ratios = next(axes)
        _bars(ratios, long, [r.ratio_of_medians for r in long], "times as fast as PyTorch")
        ratios.set_xscale("log", base=2)
        ratios.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if short:
        _bars(next(axes), short, [r.added_us for r in short], "microseconds added to PyTorch's")
    _save(figure, path, title)


def draw_floors(records: Sequence[Record], path: Path, title: str) -> None:
    """Draw the share of the floor that each call attains, over its operations per byte.

    A line leads from PyTorch's share to ours.
    """
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for number, op in enumerate(_operators(records)):
        group = [record for record in records if record.op == op]
        intensity = [record.gflop_per_s / record.gb_per_s for record in group]
        ours = [record.percent_of_floor for record in group]
        theirs = [
            share / record.ratio_of_medians for share, record in zip(ours, group, strict=True)
        ]
        axes.vlines(intensity, theirs, ours, color=f"C{number}", linewidth=0.8, alpha=0.5)
        axes.scatter(intensity, theirs, color=f"C{number}", marker="_", s=25)
        axes.scatter(intensity, ours, color=f"C{number}", s=14, label=op)
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.set_xlabel("operations of the definition per byte of inputs and result")
    axes.set_ylabel("share of the floor: dots are ours, dashes PyTorch's")
    axes.legend(fontsize=7)
    _save(figure, path, title)
