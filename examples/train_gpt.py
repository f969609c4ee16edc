"""Train a small GPT on characters of Python's language reference with K-FAC and with AdamW.

The text is `pydoc_data.topics` of the standard library. The loss is a mean over tokens, so K-FAC is
told how many of its terms belong to one sequence. It preconditions the embedding by the counts of
its characters, the other layers by their covariances; AdamW trains layer norms and positions.
"""

import platform
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from arms import AdamWSettings, KFACSettings
from torch import Tensor, nn
from torch.nn import functional as F
from training import Problem, command_line, compare
from transformer import Block

from kfac_fast import KFAC

ARMS = {
    "adamw": AdamWSettings(learning_rate=1.6e-2, weight_decay=0.05),
    "expand": KFACSettings(
        approx="expand",
        learning_rate=0.3,
        weight_decay=0,
        damping=1e-2,
        grafting=None,
        kl_clip=1e-2,
        early_steps=20,
    ),
}
CONTEXT = 64


class GPT(nn.Module):
    """Embedding, causal transformer blocks, and a linear head at every position."""

    def __init__(self, characters: int, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.5 * torch.randn(CONTEXT, width))
        blocks = (Block(width, heads, 2 * width, causal=True) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[N, CONTEXT]` to scores of the next one, `[N, characters, CONTEXT]`."""
        hidden = self.blocks(self.embedding(tokens) + self.positions)
        return self.head(self.norm(hidden)).mT


def language_model(text: str, batch_size: int) -> Problem:
    """Return the problem of predicting the next character; the last tenth is for validation."""
    alphabet = sorted(set(text))
    code = {character: index for index, character in enumerate(alphabet)}
    tokens = torch.tensor([code[character] for character in text])
    train, validation = tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]
    held_out = validation.unfold(0, CONTEXT + 1, CONTEXT)[:256]

    def batches(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        windows = train.unfold(0, CONTEXT + 1, 1)
        while True:
            yield windows[torch.randint(len(windows), (batch_size,), generator=generator)]

    def loss(model: nn.Module, windows: Tensor, kfac: KFAC | None) -> Tensor:
        return F.cross_entropy(model(windows[:, :-1]), windows[:, 1:])

    return Problem(
        f"pydoc_data.topics of Python {platform.python_version()}",
        lambda: GPT(len(alphabet)),
        batches,
        loss,
        lambda model: {"validation_loss": loss(model, held_out, None).item()},
        details={"batch_size": batch_size, "context": CONTEXT},
        kfac_options={"loss_terms_per_example": CONTEXT},
    )


def main(arguments: list[str] | None = None) -> None:
    """Train the chosen arms on every seed; save records and plot, print the table."""
    parser = command_line(__doc__, ARMS, chosen=[*ARMS], steps=300, kfac_share=0.75)
    parser.set_defaults(batch_size=64)
    options = parser.parse_args(arguments)
    problem = language_model("\n".join(topics.values()), options.batch_size)
    compare(problem, options, "train_gpt", ["validation_loss"])


if __name__ == "__main__":
    main()
