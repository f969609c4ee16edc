"""Classifiers of small images: what the examples with images share."""

from collections.abc import Callable
from typing import Any

from arms import Settings
from image_data import DATA_HELP, Images, batches, load_images
from torch import Tensor, nn
from torch.nn import functional as F
from training import Problem, command_line, compare

from kfac_fast import KFAC


def classification(
    model: Callable[[], nn.Module], images: Images, batch_size: int = 256, shift: int = 2
) -> Problem:
    """Return the problem of classifying images, moved by up to `shift` pixels in training."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], kfac: KFAC | None) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels)

    def evaluate(model: nn.Module) -> dict[str, float]:
        scores, labels = model(images.validation_images), images.validation_labels
        accuracy = (scores.argmax(1) == labels).float().mean().item()
        return {"validation_loss": F.cross_entropy(scores, labels).item(), "accuracy": accuracy}

    return Problem(
        images.name,
        model,
        lambda seed: batches(images, batch_size, shift, seed),
        loss,
        evaluate,
        details={"batch_size": batch_size, "shift": shift},
    )


def compare_classifiers(
    model: Callable[[], nn.Module],
    arguments: list[str] | None,
    *,
    name: str,
    description: str | None,
    arms: dict[str, Settings],
    **defaults: Any,
) -> None:
    """Train arms on images as the command line says; see `training.command_line`."""
    parser = command_line(description, arms, **defaults)
    parser.add_argument("--data", default="mnist-5k", help=DATA_HELP)
    shift_help = "random move of training images in pixels (%(default)s)"
    parser.add_argument("--shift", type=int, default=2, help=shift_help)
    options = parser.parse_args(arguments)
    problem = classification(model, load_images(options.data), options.batch_size, options.shift)
    compare(problem, options, name, ["validation_loss", "accuracy"])
