"""The benchmarks' error budget, their records, and what the report makes of them, on short runs."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kfac_fast.conv import ConvGeometry

ROOT = Path(__file__).parents[1]
OPERATORS = {
    "gram",
    "shared_gram",
    "feature_norm_gram",
    "channel_norm_gram",
    "mean_eigenvalues",
    "update_averages",
    "conv_expand_gram",
    "conv_reduce_gram",
    "conv_window_sum",
    "eigh",
    "damped_inverse",
    "damped_cholesky",
    "precondition",
    "cholesky_precondition",
}
# What is measured beside the smallest shapes, other than peaks.
BESIDE = {
    "conv_reduce_gram": {
        "unfold + sum, mm ms",
        "unfold + sum ms",
        "mm ms",
        "x.sum ms",
        "fill_ ms",
    },
    "conv_window_sum": {"unfold + sum ms", "einconv ms", "x.sum ms", "fill_ ms"},
}
PEAKS = {"conv_expand_gram": {"peak MB", "unfold peak MB"}}
# Batch, channels, size, kernel, stride, padding, dilation, groups.
CONVS = [
    (2, 4, (9,), 3, 2, 3, 2, 1),
    (2, 4, (6,), 2, 1, 0, 1, 4),
    (2, 4, (7, 5), 3, 1, 1, 1, 1),
    (2, 4, (8, 7), 2, 3, 1, 2, 2),
    (2, 4, (4, 5, 3), 2, 1, 1, 1, 1),
    (2, 4, (5, 7, 6), 2, 2, 1, 2, 4),
]


def run(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # idle threads of busy cores spin
    result = subprocess.run(
        command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a run of the smallest shapes."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    run("-m", "pytest", "bench/", "-k", "small", "--seconds=0.01", f"--benchmark-json={path}")
    return path


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module


def entries(path: Path, steps: bool = False) -> list[dict[str, Any]]:
    """The records of operators, or of training steps."""
    benchmarks = json.loads(path.read_text())["benchmarks"]
    infos = [benchmark["extra_info"] for benchmark in benchmarks]
    return [info for info in infos if (info["op"] == "step") == steps]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_operator_leaves_a_record(results: Path, bench: Any) -> None:
    records = entries(results)
    assert {record["op"] for record in records} == OPERATORS
    for record in records:
        assert list(record) == [field.name for field in fields(bench("record").Record)]
        assert 0 < record["p20_ms"] <= record["p50_ms"] <= record["p80_ms"]
        ratio = record["baseline_p50_ms"] / record["p50_ms"]
        assert record["ratio_of_medians"] == pytest.approx(ratio)
        assert (record["added_us"] is None) == (record["baseline_p50_ms"] >= 0.2)
        assert record["rounds"] >= 5 and record["error"] < 1e-3


def test_what_is_measured_beside(results: Path, bench: Any) -> None:
    expected = BESIDE if bench("memory").missing("cpu") else BESIDE | PEAKS
    for record in entries(results):
        if record["op"].startswith("conv"):
            assert set(record["beside"]) == expected.get(record["op"], set())
        assert all(value > 0 for value in record["beside"].values())


def test_statistics_of_pytest_benchmark_are_of_the_same_calls(results: Path) -> None:
    for benchmark in json.loads(results.read_text())["benchmarks"]:
        record, stats = benchmark["extra_info"], benchmark["stats"]
        if record["op"] == "step":  # a round of them is several steps
            continue
        assert stats["rounds"] == record["rounds"]
        assert 1e3 * stats["median"] >= record["p50_ms"]


def test_report(
    bench: Any,
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- benchmarks:begin -->\nstale\n<!-- benchmarks:end -->\nz\n")
    report = ["report.py", results, "--records", tmp_path, "--markdown", readme]
    monkeypatch.setattr(sys, "argv", [*map(str, report)])
    bench("report").main()
    printed = capsys.readouterr().out
    bench("report").main()
    assert capsys.readouterr().out == printed
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for name in ("ratios.png", "floors.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    text = readme.read_text()
    assert text.startswith("a\n<!-- benchmarks:begin -->\n")
    assert text.endswith("\n<!-- benchmarks:end -->\nz\n") and "stale" not in text
    for record in entries(results):
        assert record["shape"] in printed and f"| {record['shape']} |" in text
    assert len(lines(folder / "step.jsonl")) == len(entries(results, steps=True))
    (folder / "step.jsonl").unlink()
    kept = [record for path in folder.glob("*.jsonl") for record in lines(path)]
    assert sorted((r["op"], r["shape"]) for r in kept) == sorted(
        (r["op"], r["shape"]) for r in entries(results)
    )


def test_newer_record_replaces_only_its_like(bench: Any, results: Path, tmp_path: Path) -> None:
    report = bench("report")
    old = report.load(results)[0]
    other, newer = (
        report.Record(**{**vars(old), **change})
        for change in ({"implementation": "other"}, {"p50_ms": 12.0})
    )
    for records in ([old, other], [newer]):
        report.keep(records, tmp_path)
    (path,) = tmp_path.iterdir()
    first, second = lines(path)
    assert [first["implementation"], second["implementation"]] == [old.implementation, "other"]
    assert first["p50_ms"] == 12.0 != second["p50_ms"]


def test_training_steps_leave_records(results: Path, bench: Any) -> None:
    records = entries(results, steps=True)
    assert {record["approx"] for record in records} == {"expand", "reduce"}
    for record in records:
        assert list(record) == [field.name for field in fields(bench("record").StepRecord)]
        assert record["rounds"] >= 5 and record["sgd_ms"] > 0 and record["error"] < 1e-3
        kinds = [record[f"{kind}_ratio"] for kind in ("plain", "update", "refresh")]
        mean = 0.9 * kinds[0] + 0.09 * kinds[1] + 0.01 * kinds[2]
        assert record["intervals_ratio"] == pytest.approx(mean)
        assert (record["peak_mb"] is None) == bool(bench("memory").missing("cpu"))
    assert len(bench("report").load_steps(results)) == len(records)


def test_the_three_kinds_of_step_do_what_they_are_named_for(bench: Any) -> None:
    step, networks = bench("bench_step"), bench("networks")
    make, batch = networks.NETWORKS["small-resnet8"]
    training = step.Training(make(), torch.randn(batch), "reduce")
    reports: list[Any] = []
    training.kfac.callback = reports.append
    for kind in ("refresh", "plain", "update"):
        training.step(kind)
    did = [(report.updated, report.refreshed) for report in reports]
    assert did == [(True, True), (False, False), (True, False)]
    assert all(report.inner_product > 0 for report in reports)
    before = [parameter.clone() for parameter in training.model.parameters()]
    training.step("refresh")
    assert all(map(torch.equal, before, training.model.parameters()))


def test_ratios_are_to_sgd_in_the_same_round(bench: Any) -> None:
    step = bench("bench_step")
    kinds = {"plain": 1.5, "update": 2.0, "refresh": 4.0}
    sgd = [1.0, 10.0, 2.0, 5.0, 3.0]
    seconds = {"sgd": sgd}
    for kind, ratio in kinds.items():
        seconds[f"ours {kind}"] = [ratio * second for second in sgd]
        seconds[f"reference {kind}"] = [2 * ratio * sgd[0], 2 * ratio * sgd[3]]
    assert step.ratios(seconds, "ours", {}) == kinds
    every = {f"reference {kind}": 3 for kind in kinds}
    assert step.ratios(seconds, "reference", every) == {k: 2 * r for k, r in kinds.items()}
    assert step.at_intervals(kinds) == pytest.approx(1.35 + 0.18 + 0.04)


def test_activations_are_what_the_backward_pass_keeps(bench: Any) -> None:
    step = bench("bench_step")
    model = torch.nn.Sequential(torch.nn.Linear(3, 10), torch.nn.Tanh())
    training = step.Training(model, torch.randn(5, 3))
    # Input, output of tanh, log-softmax, targets and the loss's total weight.
    assert step.activation_bytes(training) == 4 * (15 + 50 + 50) + 8 * 5 + 4


def test_means_leave_out_added_microseconds(bench: Any, results: Path) -> None:
    report, families = bench("report"), bench("shapes").FAMILIES
    first, second, third, *_ = families["3x3"]
    like = vars(report.load(results)[0]) | {"op": "conv_expand_gram"}
    records = [
        report.Record(**{**like, "shape": shape, "ratio_of_medians": ratio, "added_us": added})
        for shape, ratio, added in ((first, 2.0, None), (second, 8.0, None), (third, 99.0, 1.0))
    ]
    assert report.mean_rows(records) == [("conv_expand_gram", "3x3", "4.00x", "2.00x", "2")]


def test_beside_is_in_times_of_ours(bench: Any, results: Path) -> None:
    report = bench("report")
    like = vars(report.load(results)[0]) | {"shape": "s", "p50_ms": 2.0}
    terms = {"unfold + sum ms": 80.0, "mm ms": 1.9, "x.sum ms": 1.0}
    records = [
        report.Record(**{**like, "op": op, "beside": beside})
        for op, beside in (
            ("conv_window_sum", {"x.sum ms": 1.0}),
            ("conv_expand_gram", {"peak MB": 10.0, "unfold peak MB": 50.0}),
            ("conv_reduce_gram", terms),
            ("gram", {}),
        )
    ]
    assert report.beside_rows(records) == [
        ("conv_window_sum", "s", "x.sum 1.00 ms (0.500x)", ""),
        ("conv_expand_gram", "s", "peak 10.0 MB, unfold peak 50.0 MB (5.00x)", ""),
        (
            "conv_reduce_gram",
            "s",
            "unfold + sum 80.0 ms (40.0x), mm 1.90 ms (0.950x), x.sum 1.00 ms (0.500x)",
            "32.8x",
        ),
    ]


def test_record_names_the_way_of_the_implementation(bench: Any, results: Path) -> None:
    served, report = bench("measure").served, bench("report")
    refused = "gram on cpu: triton refuses: Triton needs a GPU\n"
    assert served(f"{refused}gram on cpu: cpp serves this call") == ("cpp", None)
    explanation = "conv_expand_gram on cpu: cpp serves this call by offset correlation"
    assert served(explanation) == ("cpp", "offset correlation")
    assert served(refused.strip()) is None and served("") is None
    record = report.load(results)[0]
    chosen = report.Record(**{**vars(record), "implementation": "cpp", "way": "offsets"})
    assert "cpp (offsets)" in report.cells(chosen)


def test_slow_calls_sit_out_rounds(bench: Any) -> None:
    took = {"slow": 0.05, "fast": 0.001}
    calls = {name: lambda name=name: name for name in took}
    turns = bench("measure").turns(calls, lambda call: took[call()], rounds=400, seconds=1.0)
    assert turns == {"slow": 40, "fast": 1}  # half a second for each: 10 rounds, 500 rounds


def test_peak_is_that_of_what_a_call_allocates(bench: Any) -> None:
    missing = bench("memory").missing("cpu")
    if missing:
        pytest.skip(missing)
    script = """
import sys; sys.path.insert(0, "bench")
import memory, torch
fill = lambda megabytes: torch.empty(megabytes * 10**6, dtype=torch.uint8).fill_(1)
fill(300)
hold = lambda: (fill(40), fill(60))
print(*(memory.peak_growth(call) for call in (lambda: None, lambda: fill(60), hold)))
"""
    # A process of its own: how it allocates is set for good.
    nothing, one, two = (int(number) / 1e6 for number in run("-c", script).split())
    assert nothing < 0.6
    assert one == pytest.approx(60, abs=0.6) and two == pytest.approx(100, abs=0.6)


@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("op", ["conv_expand_gram", "conv_reduce_gram", "conv_window_sum"])
def test_ways_of_a_convolution_agree(bench: Any, op: str, conv: tuple[Any, ...]) -> None:
    batch, channels, size, kernel, stride, padding, dilation, groups = conv
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    steps = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    geometry = ConvGeometry.normalize(op, len(size), kernel, **steps)
    arguments = (x, *geometry.arguments(), False, 1.0, 0.0)
    ways = getattr(bench("baselines_conv"), op)(x, bench("shapes").Conv(*conv), arguments)
    features, stack = geometry.features(channels), () if groups == 1 else (groups,)
    shape = (batch, *stack, features)
    if op != "conv_window_sum":
        shape = (*stack, features, features)
    results = {name: way(x.new_full(shape, math.nan)) for name, way in ways.items()}
    for name, result in results.items():
        torch.testing.assert_close(result.reshape(shape), results["reference"], msg=name)


@pytest.mark.parametrize("text", ["", "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"])
def test_markdown_needs_its_comments(bench: Any, tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="must hold one <!-- benchmarks:begin -->"):
        bench("report").insert(path, "table")
    assert path.read_text() == text


@pytest.mark.parametrize("out", [1.0 + 1e-5, math.nan])
def test_result_over_its_error_budget_fails(bench: Any, out: float) -> None:
    errors: ModuleType = bench("errors")
    exact = torch.ones(2, 3, 3, dtype=torch.float64)
    near = exact.float()
    near[1, 0, 0] += 1e-6
    errors.check_budget([near], [near], [exact])
    far = near.clone()
    far[0, 2, 1] = out
    with pytest.raises(pytest.fail.Exception, match="is over"):
        errors.check_budget([far], [near], [exact])


def test_way_that_computes_something_else_fails(bench: Any) -> None:
    errors: ModuleType = bench("errors")
    errors.check_ways({"right": 1e-6})
    with pytest.raises(AssertionError, match=r"\['wrong', 'nan'\] compute something else"):
        errors.check_ways({"right": 1e-6, "wrong": 0.1, "nan": math.nan})
