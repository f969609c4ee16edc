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

ROOT = Path(__file__).parents[1]
OPERATORS = {
    "gram",
    "shared_gram",
    "conv_expand_gram",
    "conv_reduce_gram",
    "conv_window_sum",
    "damped_inverse",
    "precondition",
}


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


def entries(path: Path) -> list[dict[str, Any]]:
    return [benchmark["extra_info"] for benchmark in json.loads(path.read_text())["benchmarks"]]


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


def test_statistics_of_pytest_benchmark_are_of_the_same_calls(results: Path) -> None:
    for benchmark in json.loads(results.read_text())["benchmarks"]:
        record, stats = benchmark["extra_info"], benchmark["stats"]
        assert stats["rounds"] == record["rounds"]
        assert 1e3 * stats["median"] >= record["p50_ms"]


def test_report(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nz\n")
    report = ("bench/report.py", results, "--records", tmp_path, "--markdown", readme)
    printed = run(*report)
    assert run(*report) == printed
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (folder / "ratios.png").read_bytes().startswith(b"\x89PNG")
    text = readme.read_text()
    assert text.startswith("a\n<!-- benchmarks:begin -->\n")
    assert text.endswith("\n<!-- benchmarks:end -->\nz\n") and "old" not in text
    for record in entries(results):
        assert record["shape"] in printed and f"| {record['shape']} |" in text
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
