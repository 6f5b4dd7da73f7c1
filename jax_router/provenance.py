"""What a measured number depends on: the machine, the versions, and a hash of everything that is measured."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax_router import build, toolchain


def source_hash() -> str:
    """sha256 over the kernel sources (names and bytes), the compilers' flags and the Pallas kernel.

    A record with another hash was measured on other kernels and proves nothing about these.
    """
    pallas = Path(__file__).resolve().parent.glob("implementations/pallas*.py")
    return build.digest([*build.source_files(), *sorted(pallas)], *build.flags())


def provenance() -> dict[str, Any]:
    """The facts that go with a measurement; what a machine lacks (a GPU, a driver, torch, nvcc) is None.

    Returns:
      gpu and compute_capability as JAX names them, driver, nvcc, versions of Python and packages as strings; date, UTC
      in ISO 8601; source_hash.
    """
    import jax

    import jax_router

    device = jax.local_devices()[0]
    on_gpu = device.platform == "gpu"
    return {
        "gpu": device.device_kind if on_gpu else None,
        "compute_capability": getattr(device, "compute_capability", None) if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "nvcc": _nvcc(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("jax", "jaxlib", "torch", "numpy")},
        "jax_router": jax_router.__version__,
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "source_hash": source_hash(),
    }


def gpu_name(facts: Mapping[str, Any]) -> str:
    """Of the GPU in a provenance, for names of files: h200 of NVIDIA H200, cpu without a GPU."""
    return (facts["gpu"] or "cpu").lower().removeprefix("nvidia ").replace(" ", "_")


def stale_records(records: Iterable[Path]) -> dict[Path, str]:
    """The records (JSON, or JSON lines in a .jsonl file) that do not belong to the present sources, and why.

    A record belongs to them when every `source_hash` in it, at any depth, is `source_hash()`, and it has one.
    """
    present = source_hash()
    stale = {}
    for path in records:
        text = path.read_text(encoding="utf-8")
        documents = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
        hashes = {found for document in documents for found in _recorded_hashes(document)}
        if not hashes:
            stale[path] = "it has no source_hash"
        elif hashes != {present}:
            others = ", ".join(sorted(str(found)[:12] for found in hashes - {present}))
            stale[path] = f"it was measured on sources {others}, these are {present[:12]}"
    return stale


def _recorded_hashes(document: Any) -> Iterator[Any]:
    if isinstance(document, dict):
        if "source_hash" in document:
            yield document["source_hash"]
        document = list(document.values())
    if isinstance(document, list):
        for part in document:
            yield from _recorded_hashes(part)


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def _nvcc() -> str | None:
    try:
        found = re.search(r"V(\d+(\.\d+)+)", toolchain.find_compiler().version)
    except toolchain.BuildError:
        return None
    return found[1] if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
