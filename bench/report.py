"""Show and keep the results of a benchmark run.

``python bench/report.py bench/output/bench.json`` prints tables and draws ``ratios.png`` and
``floors.png`` beside the JSON; it also takes the file of ``--append-records``, whose name ends in
``.jsonl``. ``--records bench/results`` also keeps the records and the plots under the device's
name; ``--markdown README.md`` also writes the tables between that file's two ``benchmarks``
comments. A run of ``make bench-peers`` leaves ``bench/output/peers.json``, whose table is that of
``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean
from typing import Any, TypeVar

import plots
from peer_cases import CASES, Case
from record import AnyRecord, PeerRecord, Record, StepRecord
from rich.console import Console
from rich.table import Table
from shapes import FAMILIES

COLUMNS = (
    "operator",
    "shape",
    "dtype",
    "PyTorch ms",
    "kfac_fast ms",
    "faster",
    "error (PyTorch's)",
    "implementation",
    "PyTorch's way",
)
MEAN_COLUMNS = ("operator", "shapes", "faster, geometric mean", "least", "number of shapes")
BESIDE_COLUMNS = ("operator", "shape", "beside (times ours)", "bar")
STEP_COLUMNS = (
    "network",
    "K-FAC",
    "SGD ms",
    "hooks",
    "plain",
    "update",
    "refresh",
    "every 10 / 100",
    "reference: refresh",
    "every 10 / 100 ",
    "MB: state",
    "peak",
    "activations",
)
PEER_COLUMNS = (
    "library",
    "result",
    "network",
    "its own ms",
    "on kfac_fast ms",
    "faster (bar)",
    "beyond bare passes (bar)",
    "`KFAC` ms",
    "bare ms",
    "peak MB, its own",
    "on kfac_fast",
    "`KFAC`, state too",
    "extra MB, its own",
    "on kfac_fast ",
    "less (bar)",
    "bars",
)
NUMBERS = (*COLUMNS[3:7], *MEAN_COLUMNS[2:], "bar", *STEP_COLUMNS[2:], *PEER_COLUMNS[3:15])
# A full product takes about 1.9 times as long as the triangle of it that a Gram needs.
TRIANGLE_SAVES = 1.9
ATTAINED = 0.8
BARRED_FROM_MS = 1.0  # other libraries' shorter calls have no bars in time
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


Rows = list[tuple[str, ...]]
Timed = Record | PeerRecord
OneKind = TypeVar("OneKind", bound=AnyRecord)


def _infos(path: Path) -> list[dict[str, Any]]:
    """Of pytest-benchmark's JSON; of appended lines the newest of each benchmark."""
    if path.suffix == ".jsonl":
        lines = map(json.loads, path.read_text().splitlines())
        newest = {(line["op"], *_identity(line)): line for line in lines}
        operators = list(dict.fromkeys(line["op"] for line in newest.values()))
        return sorted(newest.values(), key=lambda line: operators.index(line["op"]))
    benchmarks = json.loads(path.read_text())["benchmarks"]
    return [benchmark["extra_info"] for benchmark in benchmarks]


def load(path: Path) -> list[Record]:
    """The records of operators of a run, in its order."""
    return [Record(**info) for info in _infos(path) if info["op"] not in ("step", "peer")]


def load_steps(path: Path) -> list[StepRecord]:
    """The records of training steps."""
    return [StepRecord(**info) for info in _infos(path) if info["op"] == "step"]


def load_peers(path: Path) -> list[PeerRecord]:
    """The records of other libraries."""
    return [PeerRecord(**info) for info in _infos(path) if info["op"] == "peer"]


def by_operator(records: Sequence[OneKind]) -> Iterator[tuple[str, list[OneKind]]]:
    """Runs of records of one operator."""
    return ((op, list(group)) for op, group in groupby(records, lambda record: record.op))


def faster(record: Timed) -> str:
    """The baseline's time over ours; for short calls the microseconds added to it."""
    if record.added_us is not None:
        return f"{record.added_us:+.1f} us"
    return f"{record.ratio_of_medians:.2f}x"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def cells(record: Record) -> tuple[str, ...]:
    """The record's row of the table, one cell for each of ``COLUMNS``."""
    return (
        record.op,
        record.shape,
        record.dtype,
        _short(record.baseline_p50_ms),
        _short(record.p50_ms),
        faster(record),
        f"{record.error:.0e} ({record.baseline_error:.0e})",
        record.implementation + (f" ({record.way})" if record.way else ""),
        record.baseline,
    )


def mean_rows(records: Sequence[Record]) -> Rows:
    """Geometric mean and least ratio of each operator's families; added microseconds left out."""
    rows = []
    for op, group in by_operator(records):
        for family, shapes in FAMILIES.items():
            ratios = [
                record.ratio_of_medians
                for record in group
                if record.shape in shapes and record.added_us is None
            ]
            if ratios:
                mean, least = geometric_mean(ratios), min(ratios)
                rows.append((op, family, f"{mean:.2f}x", f"{least:.2f}x", str(len(ratios))))
    return rows


def _beside(record: Record, name: str) -> str:
    """One entry of ``record.beside``: its value, and how many times ours it is."""
    what, _, unit = name.rpartition(" ")
    value, ours = record.beside[name], {"ms": record.p50_ms, "MB": record.beside.get("peak MB")}
    times = "" if name == "peak MB" else f" ({_short(value / ours[unit])}x)"
    return f"{what} {_short(value)} {unit}{times}"


def reduce_bar(beside: dict[str, float]) -> float:
    """How many times as long as ``conv_reduce_gram`` the way ``unfold + sum, mm`` is to take.

    That way unfolds and multiplies; ours has to read the input once and to compute one triangle of
    the product. The bar is most of the ratio of these.
    """
    product = beside["mm ms"]
    theirs = beside["unfold + sum ms"] + product
    return ATTAINED * theirs / (beside["x.sum ms"] + product / TRIANGLE_SAVES)


def beside_rows(records: Sequence[Record]) -> Rows:
    """What was measured beside ours; the bar where it is made of that."""
    rows = []
    for record in records:
        entries = ", ".join(_beside(record, name) for name in record.beside)
        made = record.op == "conv_reduce_gram"
        bar = f"{_short(reduce_bar(record.beside))}x" if made else ""
        if entries:
            rows.append((record.op, record.shape, entries, bar))
    return rows


def _added(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def step_rows(records: Sequence[StepRecord]) -> Rows:
    """What K-FAC adds to a step of SGD, one row for each of ``STEP_COLUMNS``."""
    return [
        (
            record.shape,
            record.approx,
            _short(record.sgd_ms),
            f"{100 * record.hooks_ms / record.sgd_ms:+.2f} %",
            _added(record.plain_ratio),
            _added(record.update_ratio),
            _added(record.refresh_ratio),
            _added(record.intervals_ratio),
            _added(record.reference_refresh_ratio),
            _added(record.reference_intervals_ratio),
            _short(record.state_mb),
            "" if record.peak_mb is None else _short(record.peak_mb),
            _short(record.activations_mb),
        )
        for record in records
    ]


def extras(record: PeerRecord) -> tuple[float | None, float | None]:
    """Peak memory beyond that of bare passes and the result, in MB: the library's and ours.

    It is not positive where the result is formed as memory of the passes becomes free. Without such
    passes it is None.
    """
    beside = record.beside
    if "bare peak MB" not in beside:
        return None, None
    needed = beside["bare peak MB"] + beside.get("result MB", 0.0)
    return beside["library peak MB"] - needed, beside["peak MB"] - needed


def _ratios(record: PeerRecord) -> dict[str, float]:
    """The library's over ours: time, time beyond bare passes, extra memory; what was measured.

    The last two are infinite where nothing is beyond on our side alone, zero where nothing is on
    the library's alone, and not there where nothing is on either.
    """
    short = record.baseline_p50_ms < BARRED_FROM_MS
    found = {} if short else {"faster": record.ratio_of_medians}
    pairs = {"memory": extras(record)}
    if "bare ms" in record.beside and not short:
        bare = record.beside["bare ms"]
        pairs["beyond"] = record.baseline_p50_ms - bare, record.p50_ms - bare
    for name, (own, ours) in pairs.items():
        if own is not None and ours is not None and max(own, ours) > 0:
            found[name] = max(own, 0.0) / ours if ours > 0 else math.inf
    return found


def _case(record: PeerRecord) -> Case:
    (case,) = (c for c in CASES if c[:3] == (record.library, record.result, record.shape))
    return case


def missed(record: PeerRecord) -> list[str]:
    """The bars of a record's case that it does not reach; short calls have none in time."""
    bars = _case(record)._asdict()
    ratios = _ratios(record).items()
    return [name for name, ratio in ratios if bars[name] is not None and ratio < bars[name]]


def peer_rows(records: Sequence[PeerRecord]) -> Rows:
    """Other libraries, one row for each of ``PEER_COLUMNS``."""
    rows = []
    for record in records:
        bars, ratios = _case(record)._asdict(), _ratios(record)
        numbers = {name: _short(value) for name, value in record.beside.items()}
        barred = {
            name: ("all" if math.isinf(ratio) else f"{ratio:.2f}x")
            + (f" ({bars[name]:g}x)" if bars[name] is not None else "")
            for name, ratio in ratios.items()
        }
        own, ours = extras(record)
        rows.append(
            (
                f"{record.library} {record.version}",
                record.result,
                record.shape,
                _short(record.baseline_p50_ms),
                _short(record.p50_ms),
                barred.get("faster") or faster(record),
                barred.get("beyond", ""),
                numbers.get("KFAC ms", ""),
                numbers.get("bare ms", ""),
                numbers.get("library peak MB", ""),
                numbers.get("peak MB", ""),
                numbers.get("KFAC peak MB", ""),
                "" if own is None else f"{own:.1f}",
                "" if ours is None else f"{ours:.1f}",
                barred.get("memory", ""),
                ", ".join(f"{name} missed" for name in missed(record)) or "met",
            )
        )
    return rows


def conditions(record: AnyRecord) -> str:
    """What the run was made on, in one line."""
    instruction_set = f", {record.instruction_set}" if record.instruction_set else ""
    return (
        f"{record.device}, {record.threads} threads{instruction_set}, torch {record.torch}, "
        f"kfac_fast {record.kfac_fast} at {record.commit}, {record.date}"
    )


def _table(columns: Sequence[str]) -> Table:
    table = Table()
    for name in columns:
        table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=True)
    return table


def print_tables(
    records: Sequence[Record],
    steps: Sequence[StepRecord],
    peers: Sequence[PeerRecord],
    console: Console,
) -> None:
    """Print all records, their means, what was measured beside them, steps, other libraries."""
    console.print(conditions([*records, *steps, *peers][0]))
    table = _table(COLUMNS)
    for _, group in by_operator(records):
        for record in group:
            slower = record.added_us is None and record.ratio_of_medians < 1
            table.add_row(*cells(record), style="red" if slower else None)
        table.add_section()
    if records:
        console.print(table)
    for columns, rows in further_tables(records, steps, peers):
        table = _table(columns)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def further_tables(
    records: Sequence[Record], steps: Sequence[StepRecord], peers: Sequence[PeerRecord]
) -> list[tuple[tuple[str, ...], Rows]]:
    """Columns and rows of the tables after the first that are not empty."""
    tables = [
        (MEAN_COLUMNS, mean_rows(records)),
        (BESIDE_COLUMNS, beside_rows(records)),
        (STEP_COLUMNS, step_rows(steps)),
        (PEER_COLUMNS, peer_rows(peers)),
    ]
    return [(columns, rows) for columns, rows in tables if rows]


def _markdown_table(columns: Sequence[str], rows: Rows) -> str:
    rule = ["---:" if name in NUMBERS else "---" for name in columns]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *rows])


def markdown(
    records: Sequence[Record], steps: Sequence[StepRecord], peers: Sequence[PeerRecord]
) -> str:
    """The tables in Markdown."""
    first = [(COLUMNS, [cells(record) for record in records])] if records else []
    tables = [*first, *further_tables(records, steps, peers)]
    head = f"{conditions([*records, *steps, *peers][0])}."
    return "\n\n".join([head, *(_markdown_table(*t) for t in tables)])


def insert(path: Path, text: str) -> None:
    """Replace what is between a file's ``benchmarks`` comments.

    Raises:
        ValueError: If the file does not have both comments once, in order.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    between, end, after = rest.partition(END)
    if not begin or not end or BEGIN in between + after or END in before + after:
        raise ValueError(f"{path} must hold one {BEGIN} and, after it, one {END}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _line(record: AnyRecord) -> dict[str, Any]:
    return {name: _rounded(value) for name, value in asdict(record).items()}


def _identity(line: dict[str, Any]) -> tuple[str, ...]:
    """What a later record of the same thing replaces it by."""
    names = ("library", "result", "shape", "approx", "dtype", "implementation")
    return tuple(line.get(name, "") for name in names)


def keep(records: Sequence[AnyRecord], folder: Path) -> None:
    """Write ``<operator>.jsonl`` into the folder; records that were not measured again stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for op, group in by_operator(records):
        path = folder / f"{op}.jsonl"
        old = path.read_text().splitlines() if path.exists() else []
        lines = [json.loads(line) for line in old] + [_line(record) for record in group]
        newest = {_identity(line): line for line in lines}
        path.write_text("".join(json.dumps(line) + "\n" for line in newest.values()))


def device_folder(records: Sequence[AnyRecord]) -> str:
    """The device's name as a folder."""
    return re.sub(r"[^a-z0-9]+", "-", records[0].device.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "json", type=Path, help="what --benchmark-json wrote, or --append-records as FILE.jsonl"
    )
    parser.add_argument("--records", type=Path, help="keep the records under this folder")
    parser.add_argument("--markdown", type=Path, help="file whose table to replace")
    arguments = parser.parse_args()
    if not arguments.json.is_file():
        parser.error(f"there are no results yet: {arguments.json} is not a file")
    kinds = load(arguments.json), load_steps(arguments.json), load_peers(arguments.json)
    if not any(kinds):
        parser.error(f"{arguments.json} holds no benchmark")
    console = Console()
    print_tables(*kinds, console if console.is_terminal else Console(width=280))
    records, *_ = kinds
    everything = [record for kind in kinds for record in kind]
    folder = arguments.json.parent
    if arguments.records:
        folder = arguments.records / device_folder(everything)
        keep(everything, folder)
    if records:
        for draw, name in ((plots.draw_ratios, "ratios.png"), (plots.draw_floors, "floors.png")):
            draw(records, folder / name, conditions(records[0]))
            console.print(f"plot: {folder / name}")
    if arguments.markdown:
        insert(arguments.markdown, markdown(*kinds))


if __name__ == "__main__":
    main()
