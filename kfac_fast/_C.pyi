"""Native kernels of kfac_fast, built from csrc/module.cpp; import torch first."""

version: str
compiler: str
cxx_standard: int
torch_target: str
cuda_archs: str

def instruction_set() -> str: ...
def instruction_sets() -> tuple[str, ...]: ...
def use_instruction_set(name: str) -> None: ...
