"""MXFP4 is dequantized to the values of its definition, bit by bit, and to what transformers makes of it."""

from __future__ import annotations

import doctest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.gpt_oss import mxfp4

DTYPES = ("bfloat16", "float16", "float32")
EXPERTS, ROWS, GROUPS = 2, 64, 2


def value(code: int, scale: int) -> float:
    """Of a sign, two bits of exponent and one of mantissa (E2M1) and of a scale (E8M0), as the formats define them."""
    if scale == 255:
        return np.nan
    sign, exponent, mantissa = (-1.0) ** (code >> 3), code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return sign * magnitude * 2.0 ** (scale - 127)


VALUES = np.array([[value(code, scale) for code in range(16)] for scale in range(256)])


def stored() -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales: every scale once, in its block every code, at random places."""
    random = np.random.default_rng(5)
    scales = random.permutation(256).astype(np.uint8).reshape(EXPERTS, ROWS, GROUPS)
    codes = random.permuted(np.broadcast_to(np.arange(32) % 16, (*scales.shape, 32)), axis=-1).astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales


def reference(blocks: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """[experts, in, out], value by value."""
    result = np.full((EXPERTS, GROUPS * 32, ROWS), np.inf)
    for (expert, row, group, byte), pair in np.ndenumerate(blocks):
        of_scale = VALUES[scales[expert, row, group]]
        result[expert, group * 32 + 2 * byte, row] = of_scale[pair & 15]
        result[expert, group * 32 + 2 * byte + 1, row] = of_scale[pair >> 4]
    with np.errstate(over="ignore"):
        return result.astype(jnp.dtype(dtype))


def same_bits(found: Any, expected: np.ndarray) -> bool:
    """Whether two arrays are the same, in -0 and subnormals too; any NaN is a NaN."""
    found = np.asarray(found)
    bits = f"u{expected.dtype.itemsize}"
    same = (found.view(bits) == expected.view(bits)) | (np.isnan(found) & np.isnan(expected))
    return found.dtype == expected.dtype and found.shape == expected.shape and bool(same.all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_scale_is_the_value_of_the_format(dtype: str) -> None:
    blocks, scales = stored()
    assert same_bits(mxfp4.dequantize(blocks, scales, dtype=dtype), reference(blocks, scales, dtype))


def test_bfloat16_is_exact_but_for_infinities_from_2_to_the_128_on() -> None:
    blocks, scales = stored()
    exact = np.asarray(mxfp4.dequantize(blocks, scales)).astype(np.float64) == reference(blocks, scales, "float64")
    of_block = exact.reshape(EXPERTS, GROUPS, 32, ROWS).sum(axis=2).swapaxes(1, 2)
    # Every block has every code twice: 0.5 to 3 fit at scale 253, 0.5 to 1.5 at scale 254, and 0 and the negatives.
    fewer = {int(scale): int(of_block[place]) for place, scale in np.ndenumerate(scales) if of_block[place] < 32}
    assert fewer == {253: 2 * 12, 254: 2 * 8, 255: 0}


def test_it_is_jitted_into_a_program_of_any_leading_axes() -> None:
    blocks, scales = stored()
    whole = np.asarray(mxfp4.dequantize(blocks, scales))
    [row, *_] = jax.jit(lambda *parts: mxfp4.dequantize(*parts)[..., :1])(blocks[1], scales[1]).T
    assert same_bits(row, whole[1, :, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_gets_the_same_bits(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    from torch_ref.convert import to_numpy, to_torch

    blocks, scales = stored()
    scales = np.where(scales == 255, 127, scales).astype(np.uint8)  # theirs is 2**128, which E8M0 has not
    expected = theirs.convert_moe_packed_tensors(to_torch(blocks), to_torch(scales), dtype=getattr(torch, dtype))
    assert same_bits(mxfp4.dequantize(blocks, scales, dtype=dtype), to_numpy(expected))


@pytest.mark.parametrize(
    ("blocks", "scales", "dtype", "pattern"),
    [
        ((4, 2, 8), (4, 2), "bfloat16", r"^blocks has shape \(4, 2, 8\)\. Expected .* in / 32, 16.*; pass "),
        ((2, 16), (2,), "bfloat16", r"^blocks has shape \(2, 16\)\. Expected .*; pass "),
        ((4, 2, 16), (2, 4), "bfloat16", r"^scales has shape \(2, 4\) but blocks has .*\. Expected .* \(4, 2\); pass "),
        ((4, 2, 16), (4, 2), "float64", r"^dtype is float64\. Expected bfloat16, float16 or float32; pass "),
    ],
)
def test_what_is_no_mxfp4_is_refused(blocks: Any, scales: Any, dtype: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        mxfp4.dequantize(jnp.zeros(blocks, jnp.uint8), jnp.zeros(scales, jnp.uint8), dtype=dtype)


@pytest.mark.parametrize("name", ["blocks", "scales"])
def test_other_numbers_than_bytes_are_refused(name: str) -> None:
    parts = {"blocks": jnp.zeros((4, 2, 16), jnp.uint8), "scales": jnp.zeros((4, 2), jnp.uint8)}
    parts[name] = parts[name].astype(jnp.int8)
    with pytest.raises(ValueError, match=rf"^{name} is an array of int8\. Expected uint8; pass "):
        mxfp4.dequantize(**parts)


def test_the_example_of_the_docstring_is_true() -> None:
    result = doctest.testmod(mxfp4)
    assert result.attempted
    assert not result.failed
