"""Train a small residual network on digits with K-FAC (expand and reduce), AdamW and SGD.

K-FAC preconditions the convolutions and the classifier; AdamW trains batch norm. Expand takes every
pixel for a term of the covariances, reduce the mean over the pixels of an image.
"""

from arms import AdamWSettings, KFACSettings, SGDSettings
from image_classification import compare_classifiers
from torch import Tensor, nn
from torch.nn import functional as F

ARMS = {
    "sgd": SGDSettings(),
    "adamw": AdamWSettings(),
    "expand": KFACSettings(approx="expand"),
    "reduce": KFACSettings(learning_rate=3e-3),
}


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut: `[N, inputs, H, W]` to `outputs` channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the convolutions' output to the shortcut's."""
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.shortcut(x) + self.second_norm(self.second(y)))


class ResNet(nn.Module):
    """One residual block for each width, mean over the pixels, linear classifier."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        sizes = zip((widths[0], *widths), widths, (1, 2, 2), strict=False)
        self.blocks = nn.Sequential(*(ResidualBlock(*size) for size in sizes))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[N, 28, 28]` to class scores `[N, classes]`."""
        x = F.relu(self.stem_norm(self.stem(images[:, None])))
        return self.head(self.blocks(x).mean((2, 3)))


def main(arguments: list[str] | None = None) -> None:
    """Train the chosen arms on every seed; save records and plot, print the table."""
    compare_classifiers(
        ResNet,
        arguments,
        description=__doc__,
        arms=ARMS,
        chosen=[*ARMS],
        name="train_resnet",
        steps=100,
        kfac_share=0.75,
    )


if __name__ == "__main__":
    main()
