"""Train a graph network on molecules of QM9 with K-FAC (expand or reduce) and with a tuned AdamW.

The network predicts eight properties of a molecule from its atoms and bonds. K-FAC is told which
molecule every atom and every bond belongs to: reduce averages over those of one molecule.
"""

from dataclasses import replace
from pathlib import Path

import torch
from arms import AdamWSettings, KFACSettings
from molecules import (
    CACHE,
    EDGE_FEATURES,
    INSTALL,
    NODE_FEATURES,
    PROPERTIES,
    Batch,
    Molecule,
    batches,
    collate,
    load_molecules,
)
from torch import Tensor, nn
from torch.nn import functional as F
from training import Problem, command_line, compare

from kfac_fast import KFAC

_KFAC = KFACSettings(
    learning_rate=6e-2,
    weight_decay=0,
    damping=2.5e-3,
    grafting=None,
    kl_clip=1e-3,
    other_learning_rate=8e-3,
    early_steps=20,
)
ARMS = {
    "adamw": AdamWSettings(1.2e-2, weight_decay=0.01, beta2=0.95, other_learning_rate=1.2e-2),
    "reduce": _KFAC,
    "expand": replace(_KFAC, approx="expand"),
}


class GraphNet(nn.Module):
    """Rounds of messages along the edges; the sum over the nodes of a graph says what it is."""

    def __init__(self, width: int = 48, rounds: int = 2) -> None:
        super().__init__()
        self.node_encoder = nn.Linear(NODE_FEATURES, width)
        self.edge_encoder = nn.Linear(EDGE_FEATURES, width)
        self.edge_updates = nn.ModuleList(_mlp(3 * width, width, width) for _ in range(rounds))
        self.node_updates = nn.ModuleList(_mlp(2 * width, width, width) for _ in range(rounds))
        self.head = _mlp(width, width, len(PROPERTIES))

    def forward(self, batch: Batch) -> Tensor:
        """Return the properties, `[graphs, PROPERTIES]`."""
        nodes, edges = self.node_encoder(batch.nodes), self.edge_encoder(batch.edges)
        sources, targets = batch.ends
        for edge_update, node_update in zip(self.edge_updates, self.node_updates, strict=True):
            edges = edges + edge_update(torch.cat([nodes[sources], nodes[targets], edges], 1))
            received = torch.zeros_like(nodes).index_add(0, targets, edges)
            nodes = nodes + node_update(torch.cat([nodes, received], 1))
        graphs = nodes.new_zeros(len(batch.properties), nodes.shape[1])
        return self.head(graphs.index_add(0, batch.graph_of_node, nodes) / 3)


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    first, last = nn.Linear(inputs, width), nn.Linear(width, outputs)
    return nn.Sequential(first, nn.LayerNorm(width), nn.ReLU(), last)


def regression(train: list[Molecule], validation: list[Molecule], batch_size: int) -> Problem:
    """Return the problem of predicting the properties of molecules."""
    held_out = collate(validation)

    def loss(model: nn.Module, batch: Batch, kfac: KFAC | None) -> Tensor:
        if kfac is None:
            return F.mse_loss(model(batch), batch.properties)
        graphs = len(batch.properties)
        kfac.share_rows("^node", segments=batch.graph_of_node, num_segments=graphs)
        kfac.share_rows("^edge", segments=batch.graph_of_edge, num_segments=graphs)
        outputs = model(batch)
        kfac.update_curvature(outputs, loss="mse")
        return F.mse_loss(outputs, batch.properties)

    def evaluate(model: nn.Module) -> dict[str, float]:
        outputs = model(held_out)
        return {
            "validation_loss": F.mse_loss(outputs, held_out.properties).item(),
            "absolute_error": F.l1_loss(outputs, held_out.properties).item(),
        }

    return Problem(
        "QM9",
        GraphNet,
        lambda seed: batches(train, batch_size, seed),
        loss,
        evaluate,
        details={"batch_size": batch_size, "molecules": len(train)},
        kfac_options={"fisher": "mc"},
    )


def main(arguments: list[str] | None = None) -> None:
    """Train the chosen arms on every seed; save records and plot, print the table."""
    parser = command_line(__doc__, ARMS, chosen=["adamw", "reduce"], steps=600, kfac_share=0.5)
    add = parser.add_argument
    add("--molecules", type=int, default=30_000, help="training molecules (%(default)s)")
    help_text = f"folder that keeps the parsed molecules (%(default)s); parsing needs {INSTALL}"
    add("--cache", type=Path, default=CACHE, help=help_text)
    options = parser.parse_args(arguments)
    problem = regression(*load_molecules(options.molecules, options.cache), options.batch_size)
    compare(problem, options, "train_gnn", ["validation_loss", "absolute_error"])


if __name__ == "__main__":
    main()
