"""Hugging Face safetensors checkpoints of gpt-oss as JAX arrays, with experts in MXFP4 or in floating point."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from examples.gpt_oss import mxfp4
from jax_router import checks, safetensors_files

if TYPE_CHECKING:
    from rich.progress import Progress

MXFP4 = ("_blocks", "_scales")  # what the names of a tensor's two parts end in
NAMED = 3  # tensors that a message names of many


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it."""

    file: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]


def read_checkpoint(
    directory: str | Path, expected: Mapping[str, jax.ShapeDtypeStruct], *, progress: Progress | None = None
) -> dict[str, jax.Array]:
    """Every tensor of a checkpoint, on the default device.

    All names, shapes and dtypes are checked before anything is read. Each tensor is read once, file after file, and put
    on the device before the next is read, so that host memory holds one. MXFP4 is dequantized on the device, where
    blocks wait for their scales if these are in another file.

    Args:
      directory: with model.safetensors, or the shards and model.safetensors.index.json, or other *.safetensors.
      expected: by its name in transformers' `GptOssForCausalLM` the shape of every tensor, and the dtype to hold it in:
        bfloat16, float16 or float32. One of three axes, experts' [E, in, out], may be stored in MXFP4, as
        openai/gpt-oss-20b stores `...experts.gate_up_proj`: `..._blocks` [E, out, in / 32, 16] and `..._scales`
        [E, out, in / 32] in uint8. Others may not: those of two axes are [out, in] in the model too.
      progress: shows a task "reading N tensors", in bytes, if given.

    Returns:
      The tensors in the order of `expected`, in its dtypes. What is stored in bfloat16, float16 or float32 is cast,
      rounded to nearest; of MXFP4 see `mxfp4.dequantize`.

    Raises:
      FileNotFoundError: no such directory, no safetensors file in it, or a shard of the index is missing.
      ImportError: the package safetensors is missing.
      ValueError: a broken file or index, missing, extra or misshaped tensors, blocks without scales, scales without
        blocks, or a dtype that is not taken.
    """
    directory = safetensors_files.folder(directory)
    dtypes = {name: checks.input_dtype(f"the dtype of {name}", struct.dtype) for name, struct in expected.items()}
    stored = _stored(safetensors_files.tensor_files(directory))
    parts = {name: _parts(name, len(struct.shape), stored) for name, struct in expected.items()}
    needed = {part: name for name, names in parts.items() for part in names}
    _check_names(directory, expected, needed, stored)
    for name in expected:
        _check_tensor(name, {part: stored[part] for part in parts[name]}, expected[name].shape)

    sizes = {part: _bytes(stored[part]) for part in needed}
    task = None
    if progress is not None:
        task = progress.add_task(f"reading {len(sizes)} tensors", total=sum(sizes.values()))
    waiting: dict[str, jax.Array] = {}
    tensors: dict[str, jax.Array] = {}
    for file, names in safetensors_files.by_file({part: stored[part].file for part in needed}).items():
        with safetensors_files.opened(file, names) as opened:
            for part in names:
                waiting[part] = jax.block_until_ready(jnp.asarray(opened.get_tensor(part)))
                name = needed[part]
                if all(other in waiting for other in parts[name]):
                    tensors[name] = _tensor([waiting.pop(other) for other in parts[name]], dtypes[name])
                if progress is not None and task is not None:
                    progress.advance(task, sizes[part])
    return {name: tensors[name] for name in expected}


def _stored(files: Mapping[str, Path]) -> dict[str, Stored]:
    """Every tensor by its name, from the tables of the files; those that the index does not name too."""
    where = dict(files)
    stored = {}
    for file, names in safetensors_files.by_file(files).items():
        with safetensors_files.opened(file, names) as opened:
            for name in opened.keys():  # noqa: SIM118, it is no mapping
                if where.setdefault(name, file) == file:
                    entry = opened.get_slice(name)
                    stored[name] = Stored(file, entry.get_dtype(), tuple(entry.get_shape()))
    return stored


def _parts(name: str, axes: int, stored: Collection[str]) -> tuple[str, ...]:
    """The names of what a tensor is stored as: its own, or of experts' three axes those of blocks and scales.

    Raises:
      ValueError: there is one of blocks and scales without the other.
    """
    if name in stored or axes != 3:
        return (name,)
    parts = tuple(name + ending for ending in MXFP4)
    present = [part for part in parts if part in stored]
    if len(present) == 1:
        [absent] = set(parts) - set(present)
        raise ValueError(
            f"{present[0]} is half of a tensor in MXFP4: there is no {absent}. Expected both, or {name} in floating "
            "point; download the whole checkpoint again."
        )
    return parts if present else (name,)


def _check_names(
    directory: Path, expected: Collection[str], needed: Mapping[str, str], stored: Collection[str]
) -> None:
    """Check that the checkpoint has the model's tensors and no others.

    Raises:
      ValueError: it does not.
    """
    found = []
    if missing := [name for part, name in needed.items() if part not in stored]:
        found.append(f"misses {len(missing)} of its {len(expected)} tensors: {_some(missing)}")
    if extra := [name for name in stored if name not in needed]:
        found.append(f"has no place for {len(extra)} of the {len(stored)} tensors: {_some(extra)}")
    if found:
        raise ValueError(
            f"directory is {str(directory)!r}, where the model {'; it '.join(found)}. Expected its tensors and no "
            "others; pass the whole checkpoint, as transformers saves it, and a model of its config.json."
        )


def _check_tensor(name: str, parts: Mapping[str, Stored], shape: tuple[int, ...]) -> None:
    """Check that a tensor is stored in dtypes that are taken and has the model's shape.

    Raises:
      ValueError: it is not, or has not.
    """
    accepted = safetensors_files.STORED if name in parts else ("U8",)
    for part, tensor in parts.items():
        safetensors_files.stored_as(part, tensor.dtype, tensor.file, accepted)
    shapes = [tensor.shape for tensor in parts.values()]
    found = shapes[0] if name in parts else mxfp4.dequantized_shape(*shapes, prefix=f"{name}_")
    if found != shape:
        raise ValueError(
            f"{name} has shape {found} in {str(next(iter(parts.values())).file)!r} but the model has {shape}. Expected "
            "the model's shape; make the model of the config.json of this checkpoint."
        )


def _tensor(parts: list[jax.Array], dtype: str) -> jax.Array:
    """A tensor of what it is stored as."""
    return parts[0].astype(dtype) if len(parts) == 1 else mxfp4.dequantize(*parts, dtype=dtype)


def _bytes(tensor: Stored) -> int:
    return math.prod(tensor.shape) * {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}[tensor.dtype]


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
