"""Records of other libraries and their table, which need none of them; and a short run of one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
MADE_UP = {
    "op": "peer",
    "library": "curvlinops",
    "version": "3.0.1",
    "result": "factors, expand",
    "shape": "resnet18-cifar",
    "dtype": "float32",
    "implementation": "cpp",
    "rounds": 3,
    "p20_ms": 90.0,
    "p50_ms": 100.0,
    "p80_ms": 110.0,
    "baseline_p20_ms": 290.0,
    "baseline_p50_ms": 300.0,
    "baseline_p80_ms": 310.0,
    "ratio_of_medians": 3.0,
    "median_of_ratios": 3.1,
    "added_us": None,
    "error": 3e-7,
    "device": "A Processor",
    "threads": 2,
    "instruction_set": "avx512",
    "torch": "2.13.0",
    "kfac_fast": "0.1.0",
    "commit": "0123456789ab",
    "date": "2026-01-01",
}
BESIDE = {
    "KFAC ms": 98.0,
    "bare ms": 60.0,
    "result MB": 10.0,
    "peak MB": 30.0,
    "library peak MB": 50.0,
    "bare peak MB": 8.0,
    "KFAC peak MB": 31.0,
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module


def made_up(bench: Any, beside: dict[str, float] = BESIDE, **changes: Any) -> Any:
    return bench("record").PeerRecord(**(MADE_UP | changes), beside=beside)


def run(*arguments: object, **environment: str) -> str:
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_row_has_what_was_measured(bench: Any) -> None:
    report = bench("report")
    (row,) = report.peer_rows([made_up(bench)])
    assert dict(zip(report.PEER_COLUMNS, row, strict=True)) == {
        "library": "curvlinops 3.0.1",
        "result": "factors, expand",
        "network": "resnet18-cifar",
        "its own ms": "300",
        "on kfac_fast ms": "100",
        "faster (bar)": "3.00x (2.8x)",
        "beyond bare passes (bar)": "6.00x (5x)",
        "`KFAC` ms": "98.0",
        "bare ms": "60.0",
        "peak MB, its own": "50.0",
        "on kfac_fast": "30.0",
        "`KFAC`, state too": "31.0",
        "extra MB, its own": "32.0",
        "on kfac_fast ": "12.0",
        "less (bar)": "2.67x (2x)",
        "bars": "met",
    }


@pytest.mark.parametrize(
    ("changes", "beside", "missed"),
    [
        ({"ratio_of_medians": 2.79}, {}, ["faster"]),
        ({"p50_ms": 109.0}, {}, ["beyond"]),
        ({"p50_ms": 59.0}, {}, []),
        ({"baseline_p50_ms": 59.0}, {}, ["beyond"]),
        ({"baseline_p50_ms": 59.0, "p50_ms": 58.0}, {}, []),
        ({}, {"peak MB": 36.0}, ["memory"]),
        ({}, {"peak MB": 17.0}, []),
        ({}, {"peak MB": 19.0, "library peak MB": 17.0}, ["memory"]),
        ({}, {"peak MB": 17.0, "library peak MB": 16.0}, []),
        ({"ratio_of_medians": 0.5, "baseline_p50_ms": 0.9}, {}, []),
        ({"ratio_of_medians": 0.5, "shape": "vit-ti-cifar"}, {"peak MB": 99.0}, ["faster"]),
    ],
    ids=[
        "slow",
        "beyond",
        "nothing beyond",
        "nothing beyond there",
        "nothing beyond anywhere",
        "memory",
        "no extra",
        "no extra there",
        "no extra anywhere",
        "short",
        "no other bars",
    ],
)
def test_bars_that_are_missed(
    bench: Any, changes: dict[str, Any], beside: dict[str, float], missed: list[str]
) -> None:
    report, record = bench("report"), made_up(bench, BESIDE | beside, **changes)
    assert sorted(report.missed(record)) == sorted(missed)
    (row,) = report.peer_rows([record])
    assert row[-1] == (", ".join(f"{name} missed" for name in missed) or "met")


def test_what_was_not_measured_is_left_out(bench: Any) -> None:
    report = bench("report")
    (row,) = report.peer_rows([made_up(bench, {})])
    assert row[6:] == ("",) * 9 + ("met",)


def test_report_keeps_records_and_writes_the_table(bench: Any, tmp_path: Path) -> None:
    infos = [
        MADE_UP | {"beside": BESIDE},
        MADE_UP
        | {"beside": {}, "library": "asdl", "result": "factors"}
        | {"baseline_p50_ms": 0.1, "added_us": 12.0},
    ]
    results = tmp_path / "peers.json"
    results.write_text(json.dumps({"benchmarks": [{"extra_info": info} for info in infos]}))
    page = tmp_path / "benchmarks.md"
    page.write_text("a\n<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\nz\n")
    report = ("bench/report.py", results, "--records", tmp_path, "--markdown", page)
    printed = run(*report)
    assert "A Processor" in printed and "3.00x (2.8x)" in printed
    kept = (tmp_path / "a-processor" / "peer.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == infos
    assert not list(tmp_path.rglob("*.png"))
    text = page.read_text()
    assert "| curvlinops 3.0.1 | factors, expand | resnet18-cifar | 300 | 100 |" in text
    assert "| asdl 3.0.1 | factors | resnet18-cifar | 0.100 | 100 | +12.0 us |" in text
    assert text.count("\n| ") == 4


def test_the_page_can_be_written(bench: Any, tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text())
    report = bench("report")
    report.insert(page, report.markdown([], [], [made_up(bench)]))
    assert "| curvlinops 3.0.1 | factors, expand |" in page.read_text()


def test_cases_name_what_there_is(bench: Any) -> None:
    cases, calls, networks = bench("peer_cases").CASES, bench("peer_calls"), bench("peer_networks")
    assert len({case[:3] for case in cases}) == len(cases)
    assert {case[:2] for case in cases} == set(calls.MAKERS)
    assert {case.network for case in cases} == set(networks.NETWORKS)


@pytest.mark.parametrize("network", ["gpt-128", "vit-48-fashion-mnist", "small-mlp"])
def test_only_linear_layers_and_convolutions_are_not_frozen(bench: Any, network: str) -> None:
    problem = bench("peer_networks").problem(network, "cpu")
    sizes = [weight.numel() for layer in problem.layers for weight in layer.parameters()]
    assert sum(weight.numel() for weight in problem.weights) == sum(sizes) > 0


@pytest.mark.parametrize(("fisher", "times"), [("mc", 1), ("type-2", 10)])
def test_bare_passes_reach_every_layer_and_no_weight(bench: Any, fisher: str, times: int) -> None:
    problem = bench("peer_networks").problem("small-mlp", "cpu")
    seen: list[torch.Tensor] = []

    def watch(module: Any, inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(seen.append)

    for layer in problem.layers:
        layer.register_forward_hook(watch)
    bench("peer_calls").bare_passes(problem, fisher)()
    assert len(seen) == times * len(problem.layers)
    assert all(weight.grad is None for weight in problem.weights)


def test_a_run_leaves_records(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch")
    path = tmp_path / "peers.json"
    short = ("-k", "small", "--seconds=0.01", f"--benchmark-json={path}")
    run("-m", "pytest", "bench/bench_peers.py", *short, OMP_NUM_THREADS="1")
    records = [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"]]
    assert [record["result"] for record in records] == ["factors, expand", "inverses", "refresh"]
    for record in records:
        assert list(record) == [field.name for field in fields(bench("record").PeerRecord)]
        assert record["rounds"] >= 3 and record["error"] < 1e-3
        ratio = record["baseline_p50_ms"] / record["p50_ms"]
        assert record["ratio_of_medians"] == pytest.approx(ratio)
        measured = {name for name, value in record["beside"].items() if value != 0}
        expected = {"KFAC ms"}
        if record["result"].startswith("factors"):
            expected.add("bare ms")
        if not bench("memory").missing("cpu"):
            expected |= {f"{name[:-3]} peak MB" for name in expected if name.endswith(" ms")}
            expected |= {"peak MB", "library peak MB", "result MB"}
        assert measured == expected


def test_a_missing_library_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = find_spec("laplace")
    if spec is not None and "peers" not in Path(spec.origin).parts:
        pytest.skip("laplace-torch is installed with the rest")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    printed = run("-m", "pytest", "bench/bench_peers.py", "-k", "laplace")
    assert "laplace-torch is not installed: make bench-peers installs it" in printed
