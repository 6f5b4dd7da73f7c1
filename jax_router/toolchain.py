"""The compilers of the CUDA kernels, nvcc and the host's C++ compiler: find them, run them, read their log."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST_RELEASE = (12, 5)  # the first runtime with cudaGetDriverEntryPointByVersion

# What a PyPI toolkit (nvidia/cu13 in site-packages) must hold, and the package that brings it. jax[cuda13] brings all
# but the last, which cuda_fp16.h includes.
WHEEL_PIECES = {
    "nvvm/bin/cicc": "nvidia-nvvm",
    "include/crt/host_config.h": "nvidia-cuda-crt",
    "include/cuda_runtime.h": "nvidia-cuda-runtime",
    "lib/libcudart_static.a": "nvidia-cuda-runtime",
    "include/cccl/nv/target": "nvidia-cuda-cccl",
}
INSTALL = (
    "Install the CUDA toolkit, 12.5 or newer, and set CUDA_HOME to it; or run\n"
    "  pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl"
)


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded. The message says why and what to install or to set."""


@dataclass(frozen=True)
class Compiler:
    """A pair of compilers that works: nvcc and the host's, with what they say of themselves."""

    nvcc: Path
    origin: str  # where nvcc was found: "CUDA_HOME", "CUDA_PATH", "PATH" or "PyPI"
    version: str  # all that nvcc --version prints
    release: str  # "13.0"
    host: Path
    host_version: str
    link_flags: tuple[str, ...]  # -L of the toolkit's libraries, where nvcc does not look by itself


def find_compiler() -> Compiler:
    """nvcc from CUDA_HOME, CUDA_PATH, PATH or the PyPI wheels, the first there is; the host's from CXX or PATH.

    Raises:
      BuildError: there is none, the first one found is too old or lacks a piece; says what to install.
    """
    nvcc, origin = _find_nvcc()
    version = _ask_version(nvcc, INSTALL)
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None or (int(release[1]), int(release[2])) < OLDEST_RELEASE:
        found = f"release {release[1]}.{release[2]}" if release else f"no nvcc:\n{version.strip()}"
        needed = ".".join(map(str, OLDEST_RELEASE))
        raise BuildError(f"{nvcc} (from {origin}) is {found}, and the kernels need nvcc {needed} or newer. {INSTALL}")
    host = _find_host_compiler()
    host_version = _ask_version(host, "Set CXX to a C++17 compiler that nvcc supports.")
    toolkit = nvcc.resolve().parent.parent
    # A PyPI toolkit keeps its libraries in lib, where its own nvcc does not look.
    libraries = toolkit / "lib"
    link_flags = (f"-L{libraries}",) if (libraries / "libcudart_static.a").is_file() else ()
    return Compiler(nvcc, origin, version, f"{release[1]}.{release[2]}", host, host_version, link_flags)


def run(command: Sequence[str], folder: str) -> str:
    """Run a compiler in `folder`. Returns the command and all that it printed.

    Raises:
      BuildError: it failed; with the command, the end of its output and what may be missing.
    """
    shown = "$ " + " ".join(command) + "\n"
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}. {INSTALL}") from error
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise BuildError(
            f"a compiler failed with exit status {done.returncode}. It was called with\n{shown}and its output ends "
            f"with\n{tail}\nIf a header or a library is missing: {INSTALL}\nIf the host compiler is refused: set CXX "
            f"to one that nvcc supports."
        )
    return shown + done.stdout


@dataclass(frozen=True)
class KernelResources:
    """What ptxas gave one kernel. Bytes of shared memory are the static ones; a launcher may ask for more."""

    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int  # stores and loads together


def kernel_resources(log: str) -> list[KernelResources]:
    """The resource table of a compiler log, one row per kernel, sorted by name."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = list(entry.finditer(log))
    names = _demangle([match["name"] for match in found])
    rows = []
    for match, name in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        shared_bytes = int(shared[1]) if shared else 0
        spill_bytes = int(match["stores"]) + int(match["loads"])
        rows.append(KernelResources(name, int(match["registers"]), shared_bytes, int(match["stack"]), spill_bytes))
    return sorted(rows, key=lambda row: row.name)


def compiler_warnings(log: str) -> list[str]:
    """The lines of a compiler log that are warnings."""
    said = (line for line in log.splitlines() if not line.startswith("$ "))
    return [line for line in said if re.search(r"\bwarning\b", line, re.IGNORECASE)]


def _demangle(names: Sequence[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return list(names)
    plain = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    return plain if len(plain) == len(names) else list(names)


def _find_nvcc() -> tuple[Path, str]:
    looked = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and _is_executable(Path(home, "bin", "nvcc")):
            return Path(home, "bin", "nvcc"), variable
        looked.append(f"{variable} ({f'{home} has no bin/nvcc' if home else 'not set'})")
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path), "PATH"
    looked.append("PATH (no nvcc)")
    incomplete = []
    for toolkit in wheel_toolkits():
        if not _is_executable(toolkit / "bin" / "nvcc"):
            continue
        missing = dict.fromkeys(package for piece, package in WHEEL_PIECES.items() if not (toolkit / piece).exists())
        if not missing:
            return toolkit / "bin" / "nvcc", "PyPI"
        incomplete.append(f"the nvcc of PyPI lacks pieces that kernels need. Run\n  pip install {' '.join(missing)}")
    if incomplete:
        raise BuildError(incomplete[0])
    looked.append("PyPI packages (none with nvcc)")
    raise BuildError(f"there is no CUDA compiler; looked in {', '.join(looked)}. {INSTALL}")


def wheel_toolkits() -> list[Path]:
    """The folders of PyPI toolkits, newest CUDA first: site-packages/nvidia/cu13."""
    spec = importlib.util.find_spec("nvidia")
    locations = spec.submodule_search_locations if spec is not None else None
    return sorted((path for place in locations or () for path in Path(place).glob("cu[0-9]*")), reverse=True)


def _find_host_compiler() -> Path:
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else ("g++", "c++", "clang++"):
        found = shutil.which(name)
        if found:
            return Path(found)
    if chosen:
        raise BuildError(f"CXX={chosen} is no program that can be run. Set it to a C++17 compiler, or unset it.")
    raise BuildError("there is no C++ compiler on PATH (g++, c++, clang++). Install g++, or set CXX to one.")


def _is_executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _ask_version(program: Path, advice: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, errors="replace")
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{program} --version failed: {error}. {advice}") from error
    return done.stdout
