"""Triton kernels, one operator family a module; they import torch, Triton and one another only."""
