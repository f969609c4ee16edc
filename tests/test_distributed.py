"""Several processes are refused: their factors would differ."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, torch
from kfac_fast import KFAC
store = torch.distributed.FileStore(sys.argv[1], 2)
torch.distributed.init_process_group("gloo", store=store, rank=int(sys.argv[2]), world_size=2)
try:
    KFAC(torch.nn.Linear(2, 2))
except RuntimeError as error:
    print(error)
torch.distributed.destroy_process_group()
"""


def test_a_group_of_two_processes_is_refused(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "store"), str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=60)
        assert "KFAC: the process group must have one process, got 2" in output
