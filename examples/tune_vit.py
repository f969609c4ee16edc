"""Tune both arms of `train_vit.py` on seed 0, a grid of equal size for each, one record per run.

The best settings of each arm then run on other seeds, to see how far seed 0 flattered them. A run
whose record is already in the file is not repeated, so an interrupted search goes on.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev

import torch
from arms import AdamWSettings, KFACSettings, Settings
from comparison import Record
from image_classification import classification
from image_data import load_images
from rich.console import Console
from rich.progress import track
from rich.table import Table
from train_vit import VisionTransformer
from training import train

CONFIRMATION_SEEDS = 1, 2, 3
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


def search(records_path: Path, confirm: int) -> list[Record]:
    """Run what the file lacks: the grid on seed 0, each arm's best settings on seeds 1, 2 and 3."""
    records_path.parent.mkdir(parents=True, exist_ok=True)
    records_path.touch()
    records = [json.loads(line) for line in records_path.read_text().splitlines()]
    problem = classification(VisionTransformer, load_images())

    def run(candidates: list[Settings], seed: int) -> None:
        done = [(settings_of(r), r["seed"]) for r in records]
        missing = [s for s in candidates if (s, seed) not in done]
        for settings in track(missing, f"Seed {seed}"):
            records.append(
                train(settings, problem, steps=STEPS[settings.arm], seed=seed, evaluations=5)
            )
            with open(records_path, "a") as file:
                file.write(json.dumps(records[-1]) + "\n")

    run(GRID, seed=0)
    best = []
    for arm in STEPS:
        ranked = sorted((r for r in records if r["arm"] == arm and r["seed"] == 0), key=final_loss)
        best += [settings_of(record) for record in ranked[:confirm]]
    for seed in CONFIRMATION_SEEDS:
        run(best, seed)
    return records


def settings_of(record: Record) -> Settings:
    """Return the settings of a run; those that are newer than its record are the defaults."""
    kind = AdamWSettings if record["arm"] == _ADAMW.arm else KFACSettings
    return kind(**record["settings"])


def final_loss(record: Record) -> float:
    """Return the validation loss at the end of a run."""
    return record["history"][-1]["validation_loss"]


def summary(records: list[Record]) -> Table:
    """List every setting with its loss on seed 0 and its mean loss on the other seeds."""
    result = Table("arm", "settings that differ from the centre", "seed 0", "seeds 1, 2, 3")
    for record in sorted(
        (r for r in records if r["seed"] == 0), key=lambda r: (r["arm"], final_loss(r))
    ):
        centre = asdict(_ADAMW if record["arm"] == _ADAMW.arm else _KFAC)
        changes = {k: v for k, v in record["settings"].items() if v != centre[k]}
        others = [
            final_loss(r)
            for r in records
            if r["settings"] == record["settings"] and r["seed"] in CONFIRMATION_SEEDS
        ]
        spread = f"{fmean(others):.4f} ± {stdev(others):.4f}" if others else ""
        result.add_row(record["arm"], str(changes), f"{final_loss(record):.4f}", spread)
    return result


def main() -> None:
    """Search, then print both arms from the best to the worst."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--threads", type=int, default=1, help="processor threads (default: 1)")
    add("--confirm", type=int, default=3, help="settings of each arm to confirm (default: 3)")
    add(
        "--records",
        type=Path,
        default=Path(__file__).parent / "output" / "vit_grid.jsonl",
        help="file of the records; runs that it holds are not repeated",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Console().print(summary(search(options.records, options.confirm)))


if __name__ == "__main__":
    main()
