"""Checkpoints are whole, whenever the process that writes them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import kfac_fast
from kfac_fast.checkpoint import save_checkpoint

WRITER = """
import sys, torch
from kfac_fast.checkpoint import save_checkpoint
for number in range(10**6):
    save_checkpoint({"number": number, "data": torch.full((2**18,), float(number))}, sys.argv[1])
    print(number, flush=True)
"""


def test_a_state_of_everything_survives(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    kfac = kfac_fast.KFAC(model)
    model(torch.randn(4, 3)).square().mean().backward()
    kfac.step()
    path = tmp_path / "run.pt"
    for _ in range(2):  # the second one replaces the first
        save_checkpoint({"model": model.state_dict(), "kfac": kfac.state_dict()}, path)
    state = torch.load(path, weights_only=True)
    other = kfac_fast.KFAC(nn.Linear(3, 2))
    other.load_state_dict(state["kfac"])
    assert other.steps == 1 and torch.equal(state["model"]["weight"], model.weight)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_file_has_the_mode_the_name_and_the_place_that_it_would_have(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / ("n" * 250)
    torch.save({}, plain)
    save_checkpoint({}, ours)
    assert ours.stat().st_mode == plain.stat().st_mode
    ours.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(ours)
    save_checkpoint({"number": 1}, link)
    assert link.is_symlink() and torch.load(ours, weights_only=True) == {"number": 1}
    assert ours.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003])
def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path, delay: float) -> None:
    path = tmp_path / "run.pt"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        numbers = [int(writer.stdout.readline()) for _ in range(5)]
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        numbers += map(int, writer.stdout.read().split())
    last = numbers[-1]
    state = torch.load(path, weights_only=True)
    assert last <= state["number"] <= last + 1
    assert (state["data"] == state["number"]).all()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint({"number": 1}, path)
    with pytest.raises((AttributeError, TypeError), match="pickle|local"):
        save_checkpoint({"number": 2, "function": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"number": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    with pytest.raises(OSError, match="missing"):
        save_checkpoint({}, tmp_path / "missing" / "run.pt")
