"""The files of a Hugging Face safetensors checkpoint: which has which tensor, and opening them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STORED = ("BF16", "F16", "F32")  # the dtypes of weights that are taken, as safetensors names them
INDEX = "model.safetensors.index.json"


def folder(directory: str | Path) -> Path:
    """`directory`, if it is one.

    Raises:
      FileNotFoundError: it is not.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"directory is {str(directory)!r}, which is no directory. Expected one with config.json and *.safetensors; "
            "pass the folder that a checkpoint was downloaded or saved to."
        )
    return directory


def read_json(file: Path, what: str) -> Any:
    """What a JSON file has; `what` it is and what to do complete the message.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.name} is missing in {str(file.parent)!r}. Expected {what}.") from None
    except ValueError as error:
        raise ValueError(f"{file.name} in {str(file.parent)!r} is no JSON: {error}. Expected {what}.") from None


def tensor_files(directory: Path) -> dict[str, Path]:
    """The file of every tensor, found as transformers finds it: model.safetensors, the index, or else all there are.

    Raises:
      FileNotFoundError: there is none.
      ImportError: the package safetensors is missing.
      ValueError: a file or the index is broken, or, without an index, a tensor is in two files.
    """
    single, index = directory / "model.safetensors", directory / INDEX
    if index.exists() and not single.exists():
        what = "the index of the shards, with a weight_map; download it again"
        content = read_json(index, what)
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
            raise ValueError(f"{INDEX} in {str(directory)!r} has no weight_map of file names. Expected {what}.")
        return {name: directory / shard for name, shard in names.items()}
    found: dict[str, Path] = {}
    for file in [single] if single.exists() else sorted(directory.glob("*.safetensors")):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no mapping
                if name in found:
                    raise ValueError(
                        f"{name} is both in {found[name].name} and in {file.name} of {str(directory)!r}. Expected "
                        f"every tensor once; move the files of one checkpoint away, or add {INDEX}."
                    )
                found[name] = file
    if not found:
        raise FileNotFoundError(
            f"directory is {str(directory)!r}, which has no tensors in *.safetensors. Expected model.safetensors or "
            "shards; download them, or save the model with save_pretrained."
        )
    return found


def by_file(files: Mapping[str, Path]) -> dict[Path, list[str]]:
    """The names of the tensors of every file, the files in order: how each is opened once."""
    names: dict[Path, list[str]] = {file: [] for file in sorted(set(files.values()))}
    for name, file in files.items():
        names[file].append(name)
    return names


@contextmanager
def opened(file: Path, names: Collection[str] = ()) -> Iterator[Any]:
    """A safetensors file, of which nothing but the table of its tensors is read yet: `safetensors.safe_open` in numpy.

    Args:
      file: to open.
      names: of tensors that it has by the index; none where the file was found without one.

    Raises:
      FileNotFoundError: no such file.
      ImportError: the package safetensors is missing.
      ValueError: it is broken, or lacks one of the tensors.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            'reading a checkpoint needs safetensors, which is missing. Run pip install ".[verify]" in the checkout of '
            "jax_router."
        ) from error
    if not file.is_file() and not names:
        raise FileNotFoundError(
            f"{file.name} in {str(file.parent)!r} is a folder, or a link to a file that is not there. Expected a "
            "safetensors file; download it again, or move it away."
        )
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.name} is missing in {str(file.parent)!r}, but has tensors to read, by {INDEX}. Expected every "
            "shard that has; download it too."
        )
    try:
        with safe_open(file, framework="numpy") as tensors:
            present = set(tensors.keys())
            for name in names:
                if name not in present:
                    raise ValueError(
                        f"{name} is not in {file.name}, where {INDEX} has it. Expected an index of these shards; "
                        "download both again."
                    )
            yield tensors
    except SafetensorError as error:
        raise ValueError(
            f"{file.name} in {str(file.parent)!r} is no whole safetensors file: {error}. Expected one; download it "
            "again."
        ) from None


def stored_as(name: str, dtype: str, file: Path, accepted: Collection[str] = STORED) -> None:
    """Check that a tensor is stored in a dtype that is taken.

    Raises:
      ValueError: it is stored in another one.
    """
    if dtype not in accepted:
        raise ValueError(
            f"{name} is stored as {dtype} in {file.name}. Expected {', '.join(accepted)}; save the model with this "
            "tensor so, dequantized if it is quantized."
        )
