"""Kronecker factors and inverses of asdl (ASDFGHJKL), computed by kfac_fast.

Have whatever asdl computes for a while take them::

    with kfac_fast.integrations.asdl.enabled():
        maker = KfacGradientMaker(model, config)
        maker.forward_and_backward()

It serves the Fisher shapes ``"kron"`` and ``"swift_kron"`` of linear layers and convolutions in two
dimensions, and ``Kron.update_inv``. Results are those of asdl to rounding, with ``scale /
data_size`` on both factors. Where they are not those of the Fisher, they are so here: the input
factor of a linear layer is not divided by the shared positions, patches are padded with zeros under
every ``padding_mode``, and those of a grouped convolution are taken over all groups, so that its
factors fit no weight. Under ``"swift_kron"``, a layer with fewer rows than features has its rows
kept, scaled in place, by asdl itself. Dilated convolutions, which asdl refuses, are served. Other
is how they are computed: patches are never written out for ``"kron"``, one triangle of a factor is
enough, and both inverses of a layer are one call, which leaves the factors' diagonals as they are.

Tested with asdfghjkl 0.1a5, as asdl is named where packages are installed from. The package that is
named asdl there is another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfac_fast import ops
from kfac_fast.integrations.convolutions import output_positions, zero_padded_geometry
from kfac_fast.integrations.versions import require

require("asdfghjkl", "0.1a5")

from asdl import core, operations, symmatrix  # noqa: E402  # isort: skip


class Linear(operations.Linear):  # type: ignore[misc]
    """asdl's ``Linear``; data are ``[N, in]`` and ``[N, out]``."""

    @staticmethod
    def cov_kron_A(module: nn.Linear, in_data: Tensor) -> Tensor:  # noqa: N802
        """Input factor."""
        return ops.gram(in_data)

    @staticmethod
    def cov_kron_B(module: nn.Linear, out_grads: Tensor) -> Tensor:  # noqa: N802
        """Gradient factor."""
        return ops.gram(out_grads)


class Conv2d(operations.Conv2d):  # type: ignore[misc]
    """asdl's ``Conv2d``; it takes inputs ``[N, C, H, W]`` and patches ``[N, D, positions]``."""

    _op_names: set[str]

    def forward_post_process(self, in_data: Tensor, out_data: Tensor) -> None:
        """Form the input factor from the input, and hand the rest over to asdl."""
        names = self._op_names
        if operations.OP_COV_KRON in names:
            total = self.cov_kron_A(self._module, in_data).mul_(self._cov_scale)
            self.accumulate_result(total, operations.OP_COV_KRON, "A")
        self._op_names = names - {operations.OP_COV_KRON}
        try:
            super().forward_post_process(in_data, out_data)
        finally:
            self._op_names = names

    @staticmethod
    def cov_kron_A(module: nn.Conv2d, in_data: Tensor) -> Tensor:  # noqa: N802
        """Input factor."""
        if in_data.dim() == 3:
            return ops.gram(in_data.mT, alpha=1 / in_data.shape[-1])
        geometry = zero_padded_geometry(module)
        scale = 1 / output_positions(module, in_data)
        return ops.conv_expand_gram(in_data, module.kernel_size, alpha=scale, **geometry)

    @staticmethod
    def cov_kron_B(module: nn.Conv2d, out_grads: Tensor) -> Tensor:  # noqa: N802
        """Gradient factor."""
        return ops.gram(out_grads.mT)


class Kron(symmatrix.Kron):  # type: ignore[misc]
    """asdl's ``Kron``, which inverts both factors in one call.

    A factor that is missing, or is kept as rows, or is not positive definite, is asdl's business.
    """

    def update_inv(
        self,
        damping: float = 1e-5,
        calc_A_inv: bool = True,  # noqa: N803
        calc_B_inv: bool = True,  # noqa: N803
        eps: float = 1e-7,
        replace: bool = False,
    ) -> None:
        """Invert the damped factors; see asdl's ``Kron``."""
        if not (self.has_A and self.has_B and self.A_is_square and self.B_is_square):
            super().update_inv(damping, calc_A_inv, calc_B_inv, eps, replace)
            return
        shares = self._shares(damping, eps)
        asked = [name for name, is_asked in (("A", calc_A_inv), ("B", calc_B_inv)) if is_asked]
        names = [name for name in asked if torch.any(getattr(self, name) != 0)]
        inverses, info, _ = ops.damped_inverse(
            [getattr(self, name) for name in names], [shares[name] for name in names]
        )
        if torch.any(info != 0):
            super().update_inv(damping, calc_A_inv, calc_B_inv, eps, replace)
            return
        for name, inverse in zip(names, inverses, strict=True):
            setattr(self, f"{name}_inv", inverse)
            if replace:
                setattr(self, name, None)

    def _shares(self, damping: float, eps: float) -> dict[str, Any]:
        """The damping of each factor, by the ratio of their average eigenvalues."""
        averages = [matrix.trace() / len(matrix) for matrix in (self.A, self.B)]
        pi = torch.sqrt(averages[0] / averages[1])
        if pi == 0 or pi == float("inf"):
            return {"A": damping, "B": damping}
        root = damping**0.5
        return {"A": max(root * pi, eps), "B": max(root / pi, eps)}


_OURS = {operations.Linear: Linear, operations.Conv2d: Conv2d}


@contextmanager
def enabled() -> Iterator[None]:
    """Have operations and matrices that are made inside of a ``with`` block be of these classes.

    Yields:
        Nothing.
    """
    choose, kron = core.get_op_class, symmatrix.Kron

    def chosen(module: nn.Module) -> Any:
        kind = choose(module)
        return _OURS.get(kind, kind)

    core.get_op_class, symmatrix.Kron = chosen, Kron
    try:
        yield
    finally:
        core.get_op_class, symmatrix.Kron = choose, kron
