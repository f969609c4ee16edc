"""``bench/gpu.sh`` as far as it goes without a GPU: arguments, stages, limits, records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script as a module, its environment elsewhere."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import gpu

    monkeypatch.setattr(gpu, "ENVIRONMENT", tmp_path / "environment")
    monkeypatch.setattr(gpu, "PYTHON", str(tmp_path / "environment/bin/python"))
    return gpu


@pytest.fixture
def setup(gpu: Any, tmp_path: Path) -> Any:
    return gpu.Setup(tmp_path, "cpu", None, 0.01, 1)


def stage(gpu: Any, *scripts: str, limit: int = 60) -> Any:
    """A stage that runs pieces of Python."""
    return gpu.Stage(lambda setup: [[sys.executable, "-c", s] for s in scripts], limit, ())


def run_stages(gpu: Any, setup: Any, stages: dict[str, Any], monkeypatch: Any) -> tuple[int, Any]:
    """Exit status, and what became of each stage."""
    monkeypatch.setattr(gpu, "STAGES", stages)
    status = gpu.run_stages(list(reversed(stages)), setup, {"torch": "2.11"})
    lines = (setup.folder / "stages.jsonl").read_text().splitlines()
    return status, [json.loads(line) for line in lines]


def test_all_stages_by_default(gpu: Any) -> None:
    assert gpu.parse(["out"]).stages == list(gpu.STAGES)
    found = gpu.parse(["out", "plot", "test", "-k", "gram"])
    assert found.folder == Path("out") and found.select == "gram"
    assert found.stages == ["plot", "test"]


def test_an_unknown_stage_is_refused() -> None:
    made = subprocess.run(
        [ROOT / "bench/gpu.sh", "out", "nope"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 2
    assert "STAGE must be one of build, test, sanitize, bench, plot, got 'nope'" in made.stderr


def test_each_stage_is_well_under_ten_minutes(gpu: Any) -> None:
    assert all(stage.limit <= 480 for stage in gpu.STAGES.values())
    assert gpu.STAGES["build"].limit <= 180


def test_a_failed_stage_hides_nothing(gpu: Any, setup: Any, monkeypatch: Any) -> None:
    stages = {
        "first": stage(gpu, "print('one')"),
        "second": stage(gpu, "raise SystemExit(3)", "print('two')"),
        "third": stage(gpu),
        "fourth": stage(gpu, "import time; time.sleep(30)", "print('never')", limit=0),
        "fifth": stage(gpu, "print('three')"),
    }
    status, lines = run_stages(gpu, setup, stages, monkeypatch)
    assert status == 1
    assert [(line["stage"], line["status"]) for line in lines] == [
        ("first", "passed"),
        ("second", "failed"),
        ("third", "skipped"),
        ("fourth", "failed"),
        ("fifth", "passed"),
    ]
    remarks = [line["remark"] for line in lines]
    assert remarks[1] == "command 1 of 2 ended with status 3"
    assert "compute-sanitizer" in remarks[2]
    assert remarks[3] == "command 1 of 2 was stopped, for the stage may take 0 s"
    assert all(line["torch"] == "2.11" for line in lines)
    log = (setup.folder / "log.txt").read_text()
    positions = [log.find(f"\n{word}\n") for word in ("one", "two", "three")]
    assert positions == sorted(positions) and positions[0] > 0 and "\nnever\n" not in log


def test_without_failures_the_exit_status_is_zero(gpu: Any, setup: Any, monkeypatch: Any) -> None:
    stages = {"first": stage(gpu, ""), "second": stage(gpu)}
    assert run_stages(gpu, setup, stages, monkeypatch)[0] == 0


def test_a_selection_may_leave_no_test(gpu: Any, setup: Any, monkeypatch: Any) -> None:
    stages = {"first": stage(gpu, "raise SystemExit(5)")}
    assert run_stages(gpu, setup, stages, monkeypatch)[0] == 1
    assert run_stages(gpu, setup._replace(select="gram"), stages, monkeypatch)[0] == 0


def test_what_is_stopped_leaves_nothing_behind(gpu: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "LAST_SECONDS", 0.2)
    stubborn = 'trap "" INT; sleep 60 & echo $!; wait'
    with open(tmp_path / "output", "wb") as output:
        assert gpu.run(["sh", "-c", stubborn], 2.0, output) is None
    child = int((tmp_path / "output").read_text())
    state = Path(f"/proc/{child}/status")
    deadline = time.monotonic() + 10
    while state.exists() and "State:\tZ" not in state.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_environment_sees_this_ones_packages(gpu: Any) -> None:
    gpu.make_environment()
    gpu.make_environment()
    facts = gpu.probe(["build"])
    assert facts["torch"] and facts["absent"] == []
    script = "import sys, pytest; print(sys.prefix, pytest.__file__)"
    shown = subprocess.run([gpu.PYTHON, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [str(gpu.ENVIRONMENT), pytest.__file__]


def test_what_is_missing_is_said_first(gpu: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "PYTHON", sys.executable)
    needs = ("pytest", "absent_one", "sh", "absent_two")
    monkeypatch.setitem(gpu.STAGES, "plot", gpu.Stage(gpu.plot, 1, needs))
    with pytest.raises(SystemExit, match="lacks absent_one, absent_two: bring wheels in a folder"):
        gpu.probe(["plot"])


def test_a_folder_without_wheels_is_refused(gpu: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no wheels"):
        gpu.install_wheels(tmp_path)


def test_every_file_with_a_gpu_test_is_run(gpu: Any, setup: Any) -> None:
    first, large = gpu.test(setup)
    files = {Path(word).name for word in first if word.endswith(".py")}
    assert {path.name for path in (ROOT / "tests").glob("test_*_gpu.py")} <= files
    assert "test_gram.py" in files and "test_ops.py" not in files
    assert "gpu and not large" in first and "gpu and large" in large
    assert "-n" not in first
    beside, alone = gpu.test(setup._replace(workers=4, select="gram"))
    assert beside[0] == "env" and beside[-4:] == ["-k", "gram", "-n", "4"]
    assert alone[-2:] == ["-k", "gram"]


def test_the_sanitizers_watch_tests_of_every_compiled_kernel(
    gpu: Any, setup: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    for name in ("PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu, "PYTHON", sys.executable)
    commands = gpu.sanitize(setup)
    assert [command[command.index("--tool") + 1] for command in commands] == [
        "memcheck",
        "racecheck",
    ]
    command = commands[0]
    pytest_command = command[command.index(sys.executable) :]
    collected = subprocess.run(
        [*pytest_command, "--collect-only", "-q"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    for name in gpu.SANITIZED:
        assert f"tests/{name}.py::" in collected
    assert "triton" not in collected and "2048" not in collected


def test_killed_benchmarks_leave_records(gpu: Any, setup: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "PYTHON", sys.executable)
    ((*command,),) = gpu.bench(setup._replace(select="small and gram"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not setup.records.exists() or setup.records.read_text().count("\n") < 2:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    lines = [json.loads(line) for line in setup.records.read_text().splitlines()]
    import report

    names = [field.name for field in fields(report.Record)]
    assert all(list(line) == names for line in lines)

    # The newest of each is shown, and plots are drawn.
    again = lines[0] | {"p50_ms": 1234.0}
    with setup.records.open("a") as file:
        file.write(json.dumps(again) + "\n")
    (plot,) = gpu.plot(setup)
    printed = subprocess.run(plot, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "1234" in printed
    loaded = report.load(setup.records)
    assert [record.p50_ms for record in loaded] == [1234.0, *(line["p50_ms"] for line in lines[1:])]
    for name in ("ratios.png", "floors.png"):
        assert (setup.folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_plot_needs_records(gpu: Any, setup: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "PYTHON", sys.executable)
    (plot,) = gpu.plot(setup)
    made = subprocess.run(plot, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2 and "there are no results yet" in made.stderr


def test_make_hands_its_arguments_on() -> None:
    shown = subprocess.run(
        ["make", "--dry-run", "gpu", "GPU_ARGS=results test -k gram", "PYTHON=python3.99"],
        cwd=ROOT,
        # Within `make test` it is a make's make, which prints the folders that it enters.
        env={k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "PYTHON=python3.99 bench/gpu.sh results test -k gram\n"
