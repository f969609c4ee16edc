"""Other libraries on their own path and on kfac_fast's, timed in turn.

``make bench-peers`` installs the libraries into a folder of their own and runs it. Nothing here is
part of ``make bench``, and nothing is recorded. The network is a ResNet-18 for images of 32 x 32
pixels, its normalisations without parameters; the batch has 16 images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import memory
import torch
from rich.console import Console
from rich.table import Table
from timers import timer_of
from torch import Tensor, nn

Path = Callable[[], AbstractContextManager[None]]
Peer = tuple[str, Callable[[Path], Callable[[], Any]], Path]


class Block(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs, affine=False),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs, affine=False),
        )
        short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.around = nn.Identity() if inputs == outputs else short

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.around(x))


def resnet18() -> nn.Module:
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    widths += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
    stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64, affine=False), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)
    return nn.Sequential(*stem, *(Block(*width) for width in widths), *head).eval()


def batch(device: str) -> tuple[Tensor, Tensor]:
    return torch.randn(16, 3, 32, 32, device=device), torch.arange(16, device=device) % 10


def peers(device: str) -> Iterator[Peer]:
    """Name, what makes the call on a path, and kfac_fast's path."""
    import curvlinops
    from laplace.curvature.curvlinops import CurvlinopsGGN

    from kfac_fast.integrations.curvlinops import enabled
    from kfac_fast.integrations.laplace import KFACGGN

    model, data = resnet18().to(device), batch(device)
    loss, weights = nn.CrossEntropyLoss(), list(model.parameters())

    def operator(path: Path, approx: str) -> Any:
        options = {"kfac_approx": approx, "fisher_type": "mc", "check_deterministic": False}
        with path():
            return curvlinops.KFACLinearOperator(model, loss, weights, [data], **options)

    def factors(approx: str) -> Callable[[Path], Callable[[], Any]]:
        def made(path: Path) -> Callable[[], Any]:
            def call() -> None:
                operator(path, approx).compute_kronecker_factors()

            return call

        return made

    known = operator(nullcontext, "expand")
    known.compute_kronecker_factors()

    def inverses(path: Path) -> Callable[[], Any]:
        def call() -> None:
            with path():
                inverse = curvlinops.KFACInverseLinearOperator(known, damping=1e-3)
            for name in known._mapping:
                inverse._compute_or_get_cached_inverse(name)

        return call

    def kron(path: Path) -> Callable[[], Any]:
        kind = CurvlinopsGGN if path is nullcontext else KFACGGN
        backend = kind(model, "classification")
        return lambda: backend.kron(*data, N=len(data[0]))

    yield "curvlinops, expand, Monte-Carlo", factors("expand"), enabled
    yield "curvlinops, reduce, Monte-Carlo", factors("reduce"), enabled
    yield "curvlinops, all inverses", inverses, enabled
    yield "laplace-torch, kron, type-2", kron, enabled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=7, help="calls of each path, in turn")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    timer = timer_of(arguments.device)
    table = Table("library", "its own", "kfac_fast", "ratio", "memory, its own", "kfac_fast")
    for name, make, ours in peers(arguments.device):
        calls = [make(nullcontext), make(ours)]
        peaks = ["" if memory.missing(arguments.device) else _mebibytes(call) for call in calls]
        times = [[timer(call) for call in calls] for _ in range(arguments.rounds)]
        own, fast = (median(each) for each in zip(*times, strict=True))
        ratio = median(theirs / mine for theirs, mine in times)
        table.add_row(name, f"{own:.3f} s", f"{fast:.3f} s", f"{ratio:.2f}x", *peaks)
    Console().print(table)


def _mebibytes(call: Callable[[], Any]) -> str:
    call()
    return f"{memory.peak_growth(call) / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
