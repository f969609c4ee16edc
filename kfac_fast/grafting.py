"""Step sizes borrowed from another optimizer: K-FAC gives the direction, Adam the length."""

from __future__ import annotations

import torch
from torch import Tensor


class AdamNorm:
    r"""Length of the step that Adam without momentum would take on a layer's raw gradient.

    .. math:: \Big\| \frac{V_t}{\sqrt{\hat v_t} + \epsilon} \Big\|, \qquad
        \hat v_t = \frac{1 - \beta_2}{1 - \beta_2^t} \sum_{i \le t} \beta_2^{t-i} V_i^2

    A gradient whose square is not finite leaves the second moment as it was.

    Attributes:
        second_moment: Running average of the squared gradient, not bias-corrected.
        weight: Sum of the average's weights, the bias correction.
    """

    STATE = ("second_moment", "weight")
    KIND = "norms"

    def __init__(self, like: Tensor, beta2: float = 0.999, epsilon: float = 1e-8) -> None:
        self.beta2 = beta2
        self.epsilon = epsilon
        self.second_moment = torch.zeros_like(like)
        self.weight = like.new_zeros(())

    def update(self, gradient: Tensor) -> Tensor:
        """Average in a gradient and return the length of Adam's step on it.

        Args:
            gradient: Raw gradient of the layer, as a matrix.

        Returns:
            Scalar tensor.
        """
        squares = gradient.square()
        finite = squares.isfinite().all()
        self.second_moment.lerp_(torch.where(finite, squares, self.second_moment), 1 - self.beta2)
        self.weight.lerp_(torch.where(finite, 1, self.weight), 1 - self.beta2)
        root = (self.second_moment / self.weight).sqrt()
        length: Tensor = torch.linalg.vector_norm(gradient / (root + self.epsilon))
        return length
