"""Native kernels of kfac_fast, built from csrc/module.cpp; import torch first."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar

from torch import Tensor

version: str
compiler: str
cxx_standard: int
torch_target: str
cuda_archs: str

def instruction_set() -> str: ...
def instruction_sets() -> tuple[str, ...]: ...
def use_instruction_set(name: str) -> None: ...

# The operators' kernels for the CPU return None where they refuse an argument, whatever its type.
# Those that accumulate make the result where ``out`` is None; those on lists return True, or
# ``info`` if they make it because it is None.

def gram(*args: object) -> Tensor | None: ...
def shared_gram(*args: object) -> Tensor | None: ...
def feature_norm_gram(*args: object) -> Tensor | None: ...
def channel_norm_gram(*args: object) -> Tensor | None: ...
def mean_eigenvalues(*args: object) -> bool | None: ...
def update_averages(*args: object) -> bool | None: ...
def damped_inverse(*args: object) -> Tensor | bool | None: ...
def damped_cholesky(*args: object) -> Tensor | bool | None: ...
def precondition(*args: object) -> bool | None: ...
def cholesky_precondition(*args: object) -> bool | None: ...

class ConvKernel:
    """A convolution's kernel with the plan of one geometry."""

    def __init__(
        self, name: str, plan: Sequence[int], sizes: Sequence[int], groups: int
    ) -> None: ...
    def __call__(
        self, x: Tensor, bias: bool, alpha: float, beta: float, out: Tensor | None
    ) -> Tensor | None: ...

def conv_operator(op: str, plan: Callable[..., ConvKernel]) -> Callable[..., Tensor | None]:
    """A convolution operator, which keeps the kernels of the geometries that it is called with."""

def quick_calls(
    kernels: dict[str, Callable[..., object]],
    listeners: Sequence[Callable[[], int]],
    requests: Sequence[ContextVar[object]],
) -> Callable[[str, tuple[object, ...]], object]:
    """Calls of kernels, which return None if a listener says so or a request is not None."""
