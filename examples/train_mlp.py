"""Train a deep autoencoder of digits with Adam, and with SGD behind K-FAC: read this one first."""

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch
from comparison import Record, save
from image_data import DATA_HELP, load_images
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR

from kfac_fast import KFAC


def autoencoder(*widths: int) -> nn.Sequential:
    """Return layers down to the code and back up to the logits of the pixels, tanh in between."""
    sizes = pairwise([*widths, *widths[-2::-1]])
    layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def unit_pixels(images: Tensor) -> Tensor:
    """Return the images as rows of pixels in [0, 1]."""
    black, white = images.aminmax()
    return (images.flatten(1) - black) / (white - black)


def train(arm: str, pixels: Tensor, validation: Tensor, *, steps: int, seed: int) -> Record:
    """Train on batches of 256 images."""
    torch.manual_seed(seed)
    model, history, seconds = autoencoder(784, 256, 64, 16), [], 0.0
    if arm == "K-FAC":
        optimizer = torch.optim.SGD(model.parameters(), lr=6e-3, momentum=0.9)
        every = {"factor_update_steps": 5, "inverse_update_steps": 5}
        kfac = KFAC(model, fisher="mc", grafting="adam", damping=1e-4, factor_decay=0.7, **every)
        kfac.attach(optimizer)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rate = LinearLR(optimizer, start_factor=1, end_factor=0, total_iters=steps)
    for step in track(range(1, steps + 1), f"{arm}, seed {seed}"):
        start = time.perf_counter()
        batch = pixels[torch.randint(len(pixels), (256,))]
        logits = model(batch)
        if arm == "K-FAC":
            kfac.update_curvature(logits, loss="bce_with_logits")
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits, batch).backward()
        optimizer.step()
        rate.step()
        seconds += time.perf_counter() - start
        if step % 10 == 0 or step == steps:
            with torch.no_grad():
                error = (model(validation).sigmoid() - validation).square().sum(1).mean().item()
            history.append({"step": step, "seconds": seconds, "validation_error": error})
    return {"arm": arm, "steps": steps, "seed": seed, "history": history}


def main(arguments: list[str] | None = None) -> None:
    """Train both arms on every seed; save records and plot, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="steps of both arms (300)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run each")
    parser.add_argument("--data", default="mnist-5k", help=DATA_HELP)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    chosen = parser.parse_args(arguments)
    data = load_images(chosen.data)
    pixels = unit_pixels(data.train_images), unit_pixels(data.validation_images)
    arms = [(arm, seed) for seed in chosen.seeds for arm in ("Adam", "K-FAC")]
    runs = [train(arm, *pixels, steps=chosen.steps, seed=seed) for arm, seed in arms]
    save(runs, ["validation_error"], chosen.output, "train_mlp")


if __name__ == "__main__":
    main()
