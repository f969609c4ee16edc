"""Train a small vision transformer with K-FAC (expand or reduce) and with a tuned AdamW.

K-FAC preconditions the gradient of every linear layer before SGD with momentum uses it; AdamW
trains what is left (layer norms, positions). Both arms share data, model, batches and the shape of
the schedule; each has the settings that were best in `tune_vit.py`'s grid on seed 0.
"""

import torch
from arms import AdamWSettings, KFACSettings
from image_classification import compare_classifiers
from torch import Tensor, nn
from transformer import Block

ARMS = {
    "adamw": AdamWSettings(),
    "reduce": KFACSettings(),
    "expand": KFACSettings(approx="expand"),
}


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


def main(arguments: list[str] | None = None) -> None:
    """Train the chosen arms on every seed; save records and plot, print the table."""
    compare_classifiers(
        VisionTransformer,
        arguments,
        description=__doc__,
        arms=ARMS,
        chosen=["adamw", "reduce"],
        name="train_vit",
        steps=800,
        kfac_share=0.75,
    )


if __name__ == "__main__":
    main()
