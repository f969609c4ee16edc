"""Tune both arms of `train_vit.py` on seed 0: a grid of equal size for each, one record per run.

A run whose record is already in the file is not repeated, so an interrupted search goes on.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from image_data import load_images
from rich.progress import track
from train_vit import AdamWSettings, KFACSettings, train

STEPS = {"AdamW": 800, "K-FAC reduce": 600}
_ADAMW = AdamWSettings(learning_rate=8e-3, weight_decay=0.05, beta2=0.98, other_learning_rate=8e-3)
_KFAC = KFACSettings(
    learning_rate=1.5e-3,
    weight_decay=0.05,
    damping=1e-5,
    factor_decay=0.7,
    update_steps=5,
    other_learning_rate=2e-2,
)
GRID = [
    _ADAMW,
    replace(_ADAMW, learning_rate=4e-3),
    replace(_ADAMW, learning_rate=1.6e-2),
    replace(_ADAMW, weight_decay=0.2),
    replace(_ADAMW, weight_decay=0.5),
    replace(_ADAMW, beta2=0.95),
    replace(_ADAMW, beta2=0.999),
    replace(_ADAMW, other_learning_rate=4e-3),
    replace(_ADAMW, other_learning_rate=2e-2),
    replace(_ADAMW, learning_rate=4e-3, weight_decay=0.2),
    replace(_ADAMW, learning_rate=4e-3, other_learning_rate=2e-2),
    replace(_ADAMW, weight_decay=0.2, other_learning_rate=2e-2),
    replace(_ADAMW, weight_decay=1.0),
    replace(_ADAMW, weight_decay=0.5, beta2=0.95),
    replace(_ADAMW, weight_decay=0.5, other_learning_rate=2e-2),
    replace(_ADAMW, weight_decay=0.5, learning_rate=1.2e-2),
    replace(_ADAMW, weight_decay=1.0, learning_rate=4e-3),
    replace(_ADAMW, weight_decay=0.3, learning_rate=1.6e-2),
    _KFAC,
    replace(_KFAC, learning_rate=1e-3),
    replace(_KFAC, learning_rate=2e-3),
    replace(_KFAC, weight_decay=0.1),
    replace(_KFAC, weight_decay=0.2),
    replace(_KFAC, damping=1e-3),
    replace(_KFAC, factor_decay=0.95),
    replace(_KFAC, update_steps=10),
    replace(_KFAC, other_learning_rate=1e-2),
    replace(_KFAC, other_learning_rate=4e-2),
    replace(_KFAC, weight_decay=0.1, update_steps=10),
    replace(_KFAC, weight_decay=0.4),
    replace(_KFAC, weight_decay=0.2, other_learning_rate=1e-2),
    replace(_KFAC, weight_decay=0.2, damping=1e-3),
    replace(_KFAC, weight_decay=0.2, learning_rate=1e-3),
    replace(_KFAC, weight_decay=0.4, learning_rate=1e-3),
    replace(_KFAC, weight_decay=0.4, damping=1e-3, other_learning_rate=1e-2),
    replace(_KFAC, grafting=None, kl_clip=1e-3, learning_rate=1e-2, damping=1e-2),
]


def main() -> None:
    """Run what is missing of the grid and print both arms from the best to the worst."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default: 1)")
    parser.add_argument(
        "--records", type=Path, default=Path(__file__).parent / "output" / "vit_grid.jsonl"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.records.parent.mkdir(parents=True, exist_ok=True)
    options.records.touch()
    images = load_images()
    records = [json.loads(line) for line in options.records.read_text().splitlines()]
    for settings in track(GRID, "Tuning"):
        if any((r["arm"], r["settings"]) == (settings.arm, asdict(settings)) for r in records):
            continue
        records.append(train(settings, images, steps=STEPS[settings.arm], seed=0))
        with open(options.records, "a") as file:
            file.write(json.dumps(records[-1]) + "\n")
    for record in sorted(records, key=lambda r: (r["arm"], r["history"][-1]["validation_loss"])):
        print(record["arm"], record["history"][-1]["validation_loss"], record["settings"])


if __name__ == "__main__":
    main()
