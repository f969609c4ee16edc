"""K-FAC for PyTorch: fast factors, inverses and preconditioning for any optimizer."""

from kfac_fast.backends import explain, use
from kfac_fast.checkpoint import save_checkpoint
from kfac_fast.damping import LevenbergMarquardt
from kfac_fast.decomposition import Decomposition
from kfac_fast.ops import (
    channel_norm_gram,
    cholesky_precondition,
    conv_expand_gram,
    conv_reduce_gram,
    conv_window_sum,
    damped_cholesky,
    damped_inverse,
    eigh,
    feature_norm_gram,
    gram,
    mean_eigenvalues,
    precondition,
    shared_gram,
    update_averages,
)
from kfac_fast.preconditioner import KFAC
from kfac_fast.quadratic import QuadraticModel
from kfac_fast.steps import StepReport

__all__ = [
    "Decomposition",
    "KFAC",
    "LevenbergMarquardt",
    "QuadraticModel",
    "StepReport",
    "channel_norm_gram",
    "cholesky_precondition",
    "conv_expand_gram",
    "conv_reduce_gram",
    "conv_window_sum",
    "damped_cholesky",
    "damped_inverse",
    "eigh",
    "explain",
    "feature_norm_gram",
    "gram",
    "mean_eigenvalues",
    "precondition",
    "save_checkpoint",
    "shared_gram",
    "update_averages",
    "use",
]
