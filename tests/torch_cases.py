"""Numbers for routers in numpy, and a GPU that is pretended: for tests of the kernels on PyTorch's tensors."""

from __future__ import annotations

import contextlib
import types

import ml_dtypes
import numpy as np
import pytest
import torch

import jax_router.torch as jrt
from jax_router.dispatch import Device
from jax_router.implementations import cuda

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
STREAM = 4096  # the current one of the pretended GPU


def numbers(tokens: int, hidden: int, experts: int, *, dtype: str = "bfloat16", seed: int = 0) -> list[np.ndarray]:
    """x, weight, bias, correction bias and expert scale: the logits have a standard deviation of about 1."""
    random = np.random.default_rng([seed, hidden, experts])
    x = random.standard_normal((tokens, hidden), np.float32)
    weight = random.standard_normal((experts, hidden), np.float32) / np.sqrt(hidden, dtype=np.float32)
    bias, correction = random.standard_normal((2, experts), np.float32)
    scale = random.uniform(0.5, 2, experts).astype(np.float32)
    return [*(array.astype(DTYPES[dtype]) for array in (x, weight, bias)), correction / 8, scale]


def pretend_a_gpu(patch: pytest.MonkeyPatch) -> list[torch.device]:
    """Take tensors of the CPU for those of a Hopper GPU, and launch nothing.

    Returns:
      The devices that are made the current one at the moment.
    """
    made_current: list[torch.device] = []

    @contextlib.contextmanager
    def device(of: torch.device):
        made_current.append(of)
        yield
        made_current.pop()

    patch.setattr(jrt, "_device", lambda device: Device("gpu", "NVIDIA H200 of a test", "9.0"))
    patch.setattr(torch.cuda, "device", device)
    patch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=STREAM))
    patch.setattr(cuda, "call", lambda *_: None)
    return made_current
