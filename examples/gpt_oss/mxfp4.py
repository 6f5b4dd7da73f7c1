"""MXFP4: values of four bits, and one power of two for every 32 of them, as gpt-oss stores its experts; in JAX.

Source: OCP Microscaling Formats (MX) 1.0, E2M1 and E8M0; convert_moe_packed_tensors of transformers 5.23.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import checks

BYTES = 16  # of a block, two values each
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; the codes 8 to 15 are their negatives
BIAS, NAN_SCALE = 127, 255


def dequantized_shape(blocks: tuple[int, ...], scales: tuple[int, ...], *, prefix: str = "") -> tuple[int, ...]:
    """The shape of what `dequantize` returns for blocks and scales of these shapes.

    Args:
      blocks, scales: their shapes.
      prefix: of their names, in messages.

    Raises:
      ValueError: they are not of one tensor in MXFP4.
    """
    if len(blocks) < 3 or blocks[-1] != BYTES:
        raise ValueError(
            f"{prefix}blocks has shape {blocks}. Expected (..., out, in / 32, {BYTES}), two values in every byte; pass "
            "the blocks as gpt-oss-20b has them."
        )
    *leading, rows, groups, _ = blocks
    if scales != (*leading, rows, groups):
        raise ValueError(
            f"{prefix}scales has shape {scales} but {prefix}blocks has shape {blocks}. Expected scales of shape "
            f"{(*leading, rows, groups)}; pass those of these blocks."
        )
    return (*leading, groups * 2 * BYTES, rows)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(blocks: jax.Array, scales: jax.Array, *, dtype: Any = "bfloat16") -> jax.Array:
    """A weight stored in MXFP4, transposed from [..., out, in] as it is stored to [..., in, out] as gpt-oss uses it.

    A value is `e2m1 * 2**(scale - 127)`. bfloat16 and float32 hold every one exactly, those of the lowest scales as
    subnormals, but for those from 2**128 on, which are infinities: magnitudes from 4 at scale 253, from 2 at 254. Scale
    255 is the NaN of E8M0, and so is all of its block (transformers takes it for 2**128). float16 is rounded to
    nearest: 0 or subnormal below 2**-14, an infinity from 65520 on.

    Args:
      blocks: `[..., out, in / 32, 16]` in uint8, the lower four bits of a byte first.
      scales: `[..., out, in / 32]` in uint8.
      dtype: bfloat16, float16 or float32.

    Returns:
      `[..., in, out]` in `dtype`. No arithmetic is done on a device: values come from a table of all there are, with
      the same bits everywhere.

    Raises:
      ValueError: other shapes or dtypes.

    >>> block = np.full((1, 1, 16), 0x72, np.uint8)  # 1, 6, 1, 6 ... of one row
    >>> dequantize(block, np.array([[128]], np.uint8))[:4, 0]
    Array([2, 12, 2, 12], dtype=bfloat16)
    """
    shape = dequantized_shape(blocks.shape, scales.shape)
    for name, array in (("blocks", blocks), ("scales", scales)):
        if array.dtype != jnp.uint8:
            raise ValueError(f"{name} is an array of {array.dtype}. Expected uint8; pass the bytes as they are stored.")
    table = _table(checks.input_dtype("dtype", dtype))
    codes = (blocks[..., None] >> np.array([0, 4], np.uint8)) & 15  # [..., out, in / 32, 16, 2]
    places = scales[..., None, None].astype(np.uint16) * 16 + codes.astype(np.uint16)
    values = jnp.asarray(table).at[places].get(mode="promise_in_bounds")
    return values.reshape(*shape[:-2], shape[-1], shape[-2]).swapaxes(-1, -2)


def _table(dtype: str) -> np.ndarray:
    """The value of every scale and code, at scale * 16 + code."""
    magnitudes = np.array(MAGNITUDES)
    values = np.ldexp(np.concatenate([magnitudes, -magnitudes]), np.arange(256)[:, None] - BIAS)
    values[NAN_SCALE] = np.nan
    with np.errstate(over="ignore"):
        return values.ravel().astype(jnp.dtype(dtype))
