"""Molecules of QM9 as graphs of atoms and bonds, with eight properties each."""

import csv
import importlib.util
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

INSTALL = "pip install --no-deps qm9pack==1.0.3 rdkit==2026.9.1"
PROPERTIES = (
    "Dipole_debye",
    "Polarizability_bohr3",
    "HOMO_au",
    "LUMO_au",
    "HOMO_LUMO_gap_au",
    "R2_bohr2",
    "ZPVE_au",
    "Heatcapacity_Cv_cal_mol_K",
)
ELEMENTS = 6, 7, 8, 9
BONDS = 1.0, 1.5, 2.0, 3.0
NODE_FEATURES = len(ELEMENTS) + 8  # element, 0 to 4 hydrogens, charge, aromatic, in a ring
EDGE_FEATURES = len(BONDS) + 1  # order, in a ring
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "kfac_fast").expanduser()
SPLIT_SEED = 0


class Molecule(NamedTuple):
    """A graph whose nodes are the heavy atoms; each bond is two edges, one in either direction."""

    nodes: Tensor  # [atoms, NODE_FEATURES]
    edges: Tensor  # [edges, EDGE_FEATURES]
    ends: Tensor  # [2, edges], the atoms that an edge leads from and to
    properties: Tensor  # [PROPERTIES]


class Batch(NamedTuple):
    """Molecules side by side, the atoms numbered through."""

    nodes: Tensor
    edges: Tensor
    ends: Tensor
    graph_of_node: Tensor  # [nodes]
    properties: Tensor  # [graphs, PROPERTIES]

    @property
    def graph_of_edge(self) -> Tensor:
        """The molecule of each edge."""
        return self.graph_of_node[self.ends[0]]


def collate(molecules: Iterable[Molecule]) -> Batch:
    """Put molecules side by side."""
    nodes, edges, ends, properties = zip(*molecules, strict=True)
    sizes = torch.tensor([len(atoms) for atoms in nodes])
    firsts = (sizes.cumsum(0) - sizes).tolist()
    return Batch(
        torch.cat(nodes),
        torch.cat(edges),
        torch.cat([pairs + first for pairs, first in zip(ends, firsts, strict=True)], 1),
        torch.arange(len(sizes)).repeat_interleave(sizes),
        torch.stack(properties),
    )


def batches(molecules: list[Molecule], size: int, seed: int) -> Iterator[Batch]:
    """Yield shuffled batches without end; an epoch's incomplete last batch is left out."""
    if not 0 < size <= len(molecules):
        raise ValueError(f"batch size must be in 1 to {len(molecules)}, got {size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(molecules), generator=generator)
        for chosen in order.split(size)[: len(order) // size]:
            yield collate(molecules[index] for index in chosen.tolist())


def load_molecules(
    count: int = 30_000, cache: Path = CACHE
) -> tuple[list[Molecule], list[Molecule]]:
    """Load random molecules of QM9, from the cache if they were parsed before.

    Args:
        count: Number of training molecules; for validation there are a tenth as many.
        cache: Folder that keeps the parsed molecules.

    Returns:
        Training and validation molecules, the properties standardised over the former.
    """
    if count < 10:
        raise ValueError(f"molecules must be at least 10, got {count}")
    path = cache / f"qm9_{count}.pt"
    if not path.exists():
        rows = list(qm9_rows())
        if count + count // 10 > len(rows):
            raise ValueError(f"molecules must be at most {len(rows) * 10 // 11}, got {count}")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED))
        chosen = [rows[index] for index in order[: count + count // 10].tolist()]
        save([parse(*row) for row in track(chosen, "Parsing molecules")], path)
    saved = torch.load(path)
    deviation, mean = torch.std_mean(saved["properties"][:count], 0)
    molecules = [
        Molecule(nodes.float(), edges.float(), ends, properties)
        for nodes, edges, ends, properties in zip(
            saved["nodes"].split(saved["node_counts"]),
            saved["edges"].split(saved["edge_counts"]),
            saved["ends"].split(saved["edge_counts"], 1),
            (saved["properties"] - mean) / deviation,
            strict=True,
        )
    ]
    return molecules[:count], molecules[count:]


def save(molecules: list[Molecule], path: Path) -> None:
    """Write molecules to a file for `load_molecules`."""
    nodes, edges, ends, properties = zip(*molecules, strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "nodes": torch.cat(nodes),
        "node_counts": [len(atoms) for atoms in nodes],
        "edges": torch.cat(edges),
        "edge_counts": [len(bonds) for bonds in edges],
        "ends": torch.cat(ends, 1),
        "properties": torch.stack(properties),
    }
    torch.save(content, path)


def qm9_rows() -> Iterator[tuple[str, list[float]]]:
    """Read the SMILES and the properties of each molecule inside the package qm9pack."""
    # The package is not imported: that would need pandas.
    packages = {name: importlib.util.find_spec(name) for name in ("qm9pack", "rdkit")}
    missing = [name for name, found in packages.items() if found is None]
    if missing:
        raise ModuleNotFoundError(f"QM9 needs the packages {' and '.join(missing)}: {INSTALL}")
    folder = Path(packages["qm9pack"].submodule_search_locations[0], "data")
    for path in sorted(folder.glob("qm9_part*.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                yield row["SMILES"], [float(row[name]) for name in PROPERTIES]


def parse(smiles: str, properties: list[float]) -> Molecule:
    """Turn the SMILES of a molecule into its graph, with features of small whole numbers."""
    from rdkit import Chem  # needed only where the cache is empty

    molecule = Chem.MolFromSmiles(smiles)
    nodes = [
        [*(atom.GetAtomicNum() == element for element in ELEMENTS)]
        + [atom.GetTotalNumHs() == count for count in range(5)]
        + [atom.GetFormalCharge(), atom.GetIsAromatic(), atom.IsInRing()]
        for atom in molecule.GetAtoms()
    ]
    edges, ends = [], []
    for bond in molecule.GetBonds():
        order = bond.GetBondTypeAsDouble()
        pair = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        edges += 2 * [[*(order == known for known in BONDS), bond.IsInRing()]]
        ends += [pair, pair[::-1]]
    return Molecule(
        torch.tensor(nodes, dtype=torch.int8),
        torch.tensor(edges, dtype=torch.int8).reshape(-1, EDGE_FEATURES),
        torch.tensor(ends, dtype=torch.int64).reshape(-1, 2).T,
        torch.tensor(properties),
    )
