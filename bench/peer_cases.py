"""What is timed of other libraries on which networks, and the bars; data only."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """A result of a library on a network of ``peer_networks.py``.

    Attributes:
        library: Its name.
        result: With the library, a key of ``MAKERS`` in ``peer_calls.py``; a Monte-Carlo Fisher
            with one sample unless said.
        network: Name of the network.
        faster: Least ratio of the library's time to that with kfac_fast.
        beyond: The same of what is beyond the bare passes; None if they are not timed.
        memory: Least ratio of the library's extra memory to that with kfac_fast; None for no bar.
    """

    library: str
    result: str
    network: str
    faster: float = 1.0
    beyond: float | None = None
    memory: float | None = None

    def __str__(self) -> str:
        """Library, result and network."""
        return f"{self.library} {self.result} {self.network}"


CASES = (
    Case("curvlinops", "factors, expand", "resnet18-cifar", 2.8, beyond=5.0, memory=2.0),
    Case("curvlinops", "factors, expand, type-2", "resnet18-cifar", 1.25, memory=2.0),
    Case("curvlinops", "factors, reduce", "resnet18-cifar", 1.4, memory=2.0),
    Case("curvlinops", "factors, expand", "vit-ti-cifar"),
    Case("curvlinops", "factors, reduce", "vit-ti-cifar"),
    Case("curvlinops", "factors, expand", "gpt-128"),
    Case("curvlinops", "factors, expand", "mlp-1024"),
    Case("curvlinops", "EKFAC", "wrn-16-2-cifar"),
    Case("curvlinops", "EKFAC", "vit-ti-cifar"),
    Case("curvlinops", "inverses", "resnet18-cifar"),
    Case("curvlinops", "inverses", "vit-ti-cifar"),
    Case("curvlinops", "inverses", "vit-48-fashion-mnist", 4.0),
    Case("curvlinops", "inverses", "mlp-1024"),
    Case("curvlinops", "refresh", "resnet18-cifar"),
    Case("curvlinops", "refresh", "vit-ti-cifar"),
    Case("curvlinops", "refresh", "gpt-128"),
    Case("curvlinops", "refresh", "mlp-1024"),
    Case("laplace-torch", "fit", "wrn-16-2-cifar", 2.2, memory=2.0),
    Case("laplace-torch", "fit, type-2", "wrn-16-2-cifar", 1.5, memory=2.0),
    Case("kronfluence", "covariances", "resnet18-cifar", 2.0, memory=2.0),
    Case("kronfluence", "covariances", "vit-ti-cifar"),
    Case("kronfluence", "covariances", "gpt-128", 1.1),
    Case("kronfluence", "covariances", "mlp-1024", 1.1),
    Case("kronfluence", "eigendecompositions", "gpt-128"),
    Case("kronfluence", "lambda matrices", "wrn-16-2-cifar"),
    Case("kronfluence", "lambda matrices", "gpt-128"),
    Case("nngeometry", "factors", "resnet18-cifar", memory=2.0),
    Case("nngeometry", "factors", "mlp-1024"),
    Case("nngeometry", "inverses", "wrn-16-2-cifar"),
    Case("nngeometry", "inverses", "mlp-1024"),
    Case("asdl", "factors", "resnet18-cifar", memory=2.0),
    Case("asdl", "factors", "vit-ti-cifar"),
    Case("asdl", "factors", "mlp-1024"),
    Case("asdl", "inverses", "wrn-16-2-cifar"),
    Case("asdl", "inverses", "mlp-1024"),
    Case("asdl", "inverses", "vit-48-fashion-mnist", 4.0),
    Case("singd", "step, empirical", "resnet18-cifar", memory=2.0),
    Case("singd", "step, empirical", "vit-ti-cifar"),
    Case("singd", "step, empirical", "mlp-1024"),
    Case("curvlinops", "factors, expand", "small-mlp"),
    Case("curvlinops", "inverses", "small-mlp"),
    Case("curvlinops", "refresh", "small-mlp"),
)
"""Those on a small network are for tests: their times are those of calls, not of results."""
