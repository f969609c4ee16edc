"""The public operators: Gram matrices, damped inverses, eigenbases, preconditioning.

The Gram operators accumulate, ``out <- beta * out + alpha * (...)``, so a fresh factor, one summed
over micro-batches and a running average are the same call. No operator is differentiable: they
detach their inputs. Geometry arguments are ints or tuples as in :mod:`torch.nn.functional`,
features are ordered as in :func:`torch.nn.functional.unfold`, and the bias entry comes last.
Results of float64 inputs are float64; of float32, bfloat16 and float16 inputs float32.
"""

from kfac_fast.ops.convolutions import conv_expand_gram, conv_reduce_gram, conv_window_sum
from kfac_fast.ops.covariances import mean_eigenvalues, update_averages
from kfac_fast.ops.matrices import (
    DampedInverses,
    Damping,
    Eigendecompositions,
    Preconditioned,
    cholesky_precondition,
    damped_cholesky,
    damped_inverse,
    eigh,
    precondition,
)
from kfac_fast.ops.norms import channel_norm_gram, feature_norm_gram
from kfac_fast.ops.rows import gram, shared_gram

__all__ = [
    "DampedInverses",
    "Damping",
    "Eigendecompositions",
    "Preconditioned",
    "channel_norm_gram",
    "cholesky_precondition",
    "conv_expand_gram",
    "conv_reduce_gram",
    "conv_window_sum",
    "damped_cholesky",
    "damped_inverse",
    "eigh",
    "feature_norm_gram",
    "gram",
    "mean_eigenvalues",
    "precondition",
    "shared_gram",
    "update_averages",
]
