"""laplace-torch's Kronecker-factored curvature, computed by kfac_fast.

Pass a class of this module for the backend::

    la = Laplace(model, "classification", hessian_structure="kron",
                 backend=kfac_fast.integrations.laplace.KFACGGN)
    la.fit(data)

It serves all weights and the last layer, and the marginal likelihood on top of them. The factors
are those of laplace-torch's own curvlinops backend to rounding, see
:mod:`kfac_fast.integrations.curvlinops`; other structures than ``"kron"`` are that backend's.

Tested with laplace-torch 0.3 and curvlinops-for-pytorch 3.0.1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kfac_fast.integrations.curvlinops import enabled
from kfac_fast.integrations.versions import require

require("laplace-torch", "0.3")

from laplace.curvature.curvlinops import CurvlinopsEF, CurvlinopsGGN  # noqa: E402


class _Kron:
    """What both backends have in common."""

    def kron(self, x: Any, y: Tensor, N: int, **options: Any) -> tuple[Tensor, Any]:  # noqa: N803
        """Loss and Kronecker factors of a batch; see laplace-torch's ``CurvatureInterface``."""
        library: Any = super()
        with enabled():
            loss, factors = library.kron(x, y, N, **options)
        return loss, factors


class KFACGGN(_Kron, CurvlinopsGGN):  # type: ignore[misc]
    """The generalised Gauss-Newton matrix: type-2, or Monte-Carlo with ``stochastic=True``."""


class KFACEF(_Kron, CurvlinopsEF):  # type: ignore[misc]
    """The empirical Fisher."""
