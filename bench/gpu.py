"""Everything that needs a GPU, in stages: build, test, sanitize, benchmark, plot.

Works without a network, with the torch and the packages that the interpreter has: the build is
installed in a virtual environment in ``build/gpu`` that sees them all. Each stage has a limit of
time. Of the records, one line is appended as each benchmark ends, so that a killed run keeps them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / "build" / "gpu"
PYTHON = str(ENVIRONMENT / "bin" / "python")
# What a stage that is stopped has to come to an end by itself, and to print what it has found.
LAST_SECONDS = 10
NO_TEST_SELECTED = 5  # pytest's exit status

# Small shapes that take the compiled kernels through their branches, by test file.
SANITIZED = {
    "test_gram_gpu": "cuda and test_small",
    "test_inverse_gpu": "test_mixed_sizes or (test_every_size and ([100- or [129-))",
    "test_precondition_gpu": "test_mixed_sizes or (test_every_size and [33-)",
    "test_conv_gpu": "cuda and conv_window_sum and test_small",
}

PROBE = """
import importlib.util, json, platform, shutil, sys
has = lambda name: importlib.util.find_spec(name) is not None or shutil.which(name) is not None
facts = {"absent": [name for name in sys.argv[1:] if not has(name)], "xdist": has("xdist")}
facts["python"] = platform.python_version()
if has("torch"):
    import torch
    facts |= {"torch": torch.__version__, "device": None, "capability": None}
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        facts["capability"] = torch.cuda.get_device_capability()
print(json.dumps(facts))
"""


class Setup(NamedTuple):
    """What the stages' commands depend on.

    Attributes:
        folder: Where the results go.
        device: ``"cuda"``, or ``"cpu"`` to rehearse.
        select: pytest's ``-k`` of tests and benchmarks, or None.
        seconds: About how long to time each benchmark.
        workers: Processes that run tests at once.
    """

    folder: Path
    device: str
    select: str | None
    seconds: float
    workers: int

    @property
    def records(self) -> Path:
        """Where the benchmarks append their records."""
        return self.folder / "records.jsonl"

    def pytest(self, *arguments: str) -> list[str]:
        """The command that runs tests, of which ``select`` may leave none."""
        return [PYTHON, "-m", "pytest", *arguments, *(["-k", self.select] if self.select else [])]


Commands = list[list[str]]


def build(setup: Setup) -> Commands:
    """Build in place, and let the environment import it from there."""
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    return [[PYTHON, "-m", "pip", "install", "--verbose", *offline, "--editable", "."]]


def test(setup: Setup) -> Commands:
    """The tests that need a GPU: first the many, next to each other; then the large, alone."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    files = [str(path.relative_to(ROOT)) for path in paths if "mark.gpu" in path.read_text()]
    # A warning that a new GPU or torch brings is to be seen, but not to fail what it is not about.
    common = ("-W", "default", "--durations=10", *files)
    many = setup.pytest("-m", "gpu and not large", *common)
    if setup.workers > 1:
        threads = max(1, (os.cpu_count() or 1) // setup.workers)
        many = ["env", f"OMP_NUM_THREADS={threads}", *many, "-n", str(setup.workers)]
    return [many, setup.pytest("-m", "gpu and large", *common)]


def sanitize(setup: Setup) -> Commands:
    """The compiled kernels at small shapes, under the tools that watch memory and races."""
    tool = sanitizer()
    if tool is None:
        return []
    # An allocation of its own for each tensor: a larger one would hide what lies beyond its end.
    watch = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--error-exitcode", "1"]
    watch += ["--kernel-regex", "kns=kfac_fast", "--print-limit", "20"]
    chosen = " or ".join(f"({name} and ({tests}))" for name, tests in SANITIZED.items())
    files = [f"tests/{name}.py" for name in SANITIZED]
    tests = [PYTHON, "-m", "pytest", "-W", "default", *files, "-k", chosen]
    return [[*watch, "--tool", name, *tests] for name in ("memcheck", "racecheck")]


def bench(setup: Setup) -> Commands:
    """The benchmarks."""
    options = ("--device", setup.device, "--seconds", str(setup.seconds))
    return [setup.pytest("bench/", *options, "--append-records", str(setup.records))]


def plot(setup: Setup) -> Commands:
    """Tables and plots of all records in the folder."""
    return [[PYTHON, "bench/report.py", str(setup.records)]]


class Stage(NamedTuple):
    """A part of the run.

    Attributes:
        commands: Makes its commands; none if it cannot be done here.
        limit: Seconds that they may take together.
        needs: The modules, or programs, that they use.
    """

    commands: Callable[[Setup], Commands]
    limit: int
    needs: tuple[str, ...]


STAGES = {
    "build": Stage(build, 180, ("torch", "pip", "setuptools", "pybind11", "cmake", "ninja")),
    "test": Stage(test, 420, ("torch", "numpy", "pytest")),
    "sanitize": Stage(sanitize, 300, ("torch", "numpy", "pytest")),
    "bench": Stage(bench, 420, ("torch", "pytest", "pytest_benchmark", "einconv")),
    "plot": Stage(plot, 60, ("matplotlib", "rich")),
}


def sanitizer() -> str | None:
    """Path of compute-sanitizer, on PATH or in the toolkit."""
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [None, *(f"{place}/bin" for place in places if place)]
    found = (shutil.which("compute-sanitizer", path=folder) for folder in folders)
    return next(filter(None, found), None)


def make_environment() -> None:
    """A virtual environment that sees every package of this interpreter's."""
    if not Path(PYTHON).exists():
        venv.create(ENVIRONMENT, with_pip=False, symlinks=True)
    (site,) = ENVIRONMENT.glob("lib/python*/site-packages")
    theirs = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in theirs]
    (site / "everything_else.pth").write_text("".join(lines))


def install_wheels(folder: Path) -> None:
    """Install wheels that were brought along."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        raise SystemExit(f"gpu: {folder} holds no wheels")
    offline = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
    subprocess.run([PYTHON, "-m", "pip", "install", *offline, *wheels], check=True)


def probe(stages: Sequence[str]) -> dict[str, Any]:
    """What is here, and which of the modules that the stages need are not."""
    needs = dict.fromkeys(need for stage in stages for need in STAGES[stage].needs)
    command = [PYTHON, "-c", PROBE, *needs]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    facts: dict[str, Any] = json.loads(answer.stdout)
    if facts["absent"]:
        raise SystemExit(
            f"gpu: {sys.executable} lacks {', '.join(facts['absent'])}: bring wheels in a folder, "
            "with WHEELS=FOLDER or --wheels FOLDER, or choose other stages"
        )
    return facts


def run(command: Sequence[str], seconds: float, output: IO[bytes]) -> int | None:
    """Exit status of a command; None if it took longer. Nothing that it started stays behind."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        preexec_fn=os.setpgrp,  # no session of its own, which would outlive whoever ends this one
    )
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        return None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def run_stage(name: str, setup: Setup, output: IO[bytes]) -> tuple[str, str]:
    """Whether a stage passed, failed or was skipped, and a remark."""
    stage = STAGES[name]
    commands = stage.commands(setup)
    if not commands:
        return "skipped", "there is no compute-sanitizer on PATH, in CUDA_HOME or /usr/local/cuda"
    deadline = time.monotonic() + stage.limit
    fine = {0, NO_TEST_SELECTED} if setup.select else {0}
    remarks = []
    for number, command in enumerate(commands, 1):
        write(output, f"$ {' '.join(command)}")
        status = run(command, deadline - time.monotonic(), output)
        which = f"command {number} of {len(commands)}"
        if status is None:
            remarks.append(f"{which} was stopped, for the stage may take {stage.limit} s")
            break
        if status not in fine:
            remarks.append(f"{which} ended with status {status}")
    return ("failed" if remarks else "passed"), "; ".join(remarks)


def write(output: IO[bytes], line: str) -> None:
    """Write a line between the commands' own."""
    output.write(f"{line}\n".encode())
    output.flush()


def run_stages(names: Sequence[str], setup: Setup, facts: dict[str, Any]) -> int:
    """Run the stages, whatever becomes of those before, and append what became of each.

    Returns:
        The exit status, 1 if a stage failed.
    """
    log = subprocess.Popen(["tee", "-a", "-i", setup.folder / "log.txt"], stdin=subprocess.PIPE)
    assert log.stdin is not None
    table = []
    try:
        write(log.stdin, "gpu: " + ", ".join(f"{name} {fact}" for name, fact in facts.items()))
        for name in (name for name in STAGES if name in names):
            write(log.stdin, f"\n=== {name}")
            start = time.monotonic()
            status, remark = run_stage(name, setup, log.stdin)
            seconds = round(time.monotonic() - start, 1)
            entry = {"stage": name, "status": status, "remark": remark, "seconds": seconds, **facts}
            with open(setup.folder / "stages.jsonl", "a") as stages:
                stages.write(json.dumps(entry) + "\n")
            table.append((name, status, f"{seconds:.0f} s", remark))
        write(log.stdin, "\n=== all")
        for row in table:
            write(log.stdin, "{:9} {:8} {:>6}  {}".format(*row).rstrip())
    finally:
        log.stdin.close()
        log.wait()
    return int(any(status == "failed" for _, status, *_ in table))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where log, records and plots go")
    limits = ", ".join(f"{name} ({stage.limit} s)" for name, stage in STAGES.items())
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {limits}; default: all")
    parser.add_argument("-k", dest="select", help="pytest's -k, of tests and benchmarks")
    parser.add_argument("--seconds", type=float, default=0.3, help="to time each benchmark for")
    parser.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 1) // 2),
                        help="processes that run tests at once, with pytest-xdist")  # fmt: skip
    parser.add_argument("--wheels", type=Path, default=os.environ.get("WHEELS") or None,
                        help="folder of wheels to install first; default: $WHEELS")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu rehearses: its tests are skipped")  # fmt: skip
    found = parser.parse_args(arguments)
    unknown = [name for name in found.stages if name not in STAGES]
    if unknown:
        parser.error(f"STAGE must be one of {', '.join(STAGES)}, got {unknown[0]!r}")
    found.stages = found.stages or list(STAGES)
    return found


def main() -> int:
    """Check what is here, then run the stages."""
    found = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu: terminated"))
    make_environment()
    if found.wheels is not None:
        install_wheels(found.wheels)
    facts = probe(found.stages)
    if found.device == "cuda" and facts.get("device") is None and found.stages != ["plot"]:
        raise SystemExit("gpu: torch sees no CUDA device; --device cpu rehearses without one")
    workers = found.workers if facts.pop("xdist") and found.device == "cuda" else 1
    if found.device == "cuda" and facts.get("capability"):
        major, minor = facts["capability"]
        os.environ.setdefault("KFAC_FAST_CUDA", "1")
        # Instructions of one generation alone are a target of their own from 9.0 on.
        archs = f"{major}{minor}" + "a" * (major >= 9)
        os.environ.setdefault("KFAC_FAST_CUDA_ARCHS", archs)
    del facts["absent"]
    found.folder.mkdir(parents=True, exist_ok=True)
    setup = Setup(found.folder.resolve(), found.device, found.select, found.seconds, workers)
    return run_stages(found.stages, setup, facts)


if __name__ == "__main__":
    sys.exit(main())
