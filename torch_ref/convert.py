"""Arrays between numpy and PyTorch, bit by bit. numpy has no bfloat16 of its own: ml_dtypes brings it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch


def to_torch(array: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """A copy of a numpy array as a tensor of the same dtype and the same bits, NaN payloads included.

    >>> to_torch(np.array([1.5], ml_dtypes.bfloat16))
    tensor([1.5000], dtype=torch.bfloat16)
    """
    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy of a tensor as a numpy array of the same dtype and the same bits.

    >>> to_numpy(torch.tensor([1.5], dtype=torch.bfloat16)).dtype
    dtype(bfloat16)
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()
