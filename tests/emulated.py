"""The kernels' sources beside the emulation of CUDA in tests/emulation, compiled for the CPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jax_router import build

EMULATION = Path(__file__).parent / "emulation"
PLAIN_LAUNCH = re.compile(r"(\w+<\w+>)<<<(\w+), (\w+), 0, stream>>>\((\w+)\);")
FLAGS = ("-std=c++20", "-O2", "-w", "-fPIC", "-pthread", "-include", "cuda_runtime.h")  # nvcc includes that by itself
WORKSPACE_BYTES = 16 << 20


class Sources:
    """The kernels' sources beside the emulation, compiled to objects that faulty copies can be linked with."""

    def __init__(self, folder: Path):
        self.folder = folder
        for path in build.source_files():
            if path.name not in ("ffi.cc", "bench.cu"):
                text = PLAIN_LAUNCH.sub(r"emulation::launch_plain(\2, \3, [=] { \1(\4); });", path.read_text())
                (folder / path.name).write_text(text)
        for path in EMULATION.iterdir():
            shutil.copy(path, folder)
        self.units = [*sorted(folder.glob("*.cu")), folder / "launch.cc"]
        with ThreadPoolExecutor(2) as pool:
            self.objects = dict(zip(self.units, pool.map(self.compile, self.units), strict=True))

    def compile(self, unit: Path) -> Path:
        made = unit.with_suffix(".o")
        self._run(*FLAGS, "-I", str(unit.parent), "-x", "c++", "-c", str(unit), "-o", str(made))
        return made

    def link(self, name: str, **replaced: Path) -> Path:
        objects = [str(replaced.get(unit.stem, made)) for unit, made in self.objects.items()]
        self._run("-shared", "-pthread", *objects, "-o", str(self.folder / name))
        return self.folder / name

    def faulty(self, file: str, old: str, new: str, units: Sequence[str] = ()) -> Path:
        """The library with `old` replaced in a file; of a header, in all `units`: the linker keeps one copy."""
        text = (self.folder / file).read_text()
        assert text.count(old) == 1, f"the fault no longer applies to {file}"
        folder = self.folder / "faulty"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        made = [folder / unit for unit in units or (file,)]
        for path in (*self.folder.glob("*.h"), *self.folder.glob("*.cuh"), *(self.folder / unit.name for unit in made)):
            shutil.copy(path, folder)
        (folder / file).write_text(text.replace(old, new))
        with ThreadPoolExecutor(2) as pool:
            objects = dict(zip((unit.stem for unit in made), pool.map(self.compile, made), strict=True))
        return self.link("faulty.so", **objects)

    def _run(self, *arguments: str) -> None:
        done = subprocess.run([str(shutil.which("g++")), *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 16 bytes, as JAX's buffers do."""
    buffer = np.zeros(array.nbytes + 16, np.uint8)
    start = -buffer.ctypes.data % 16
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def in_a_process(script: str, library: Path, *arguments: object) -> tuple[dict[str, str], str]:
    """What a test file run as a script prints of a library, and what the emulation says if it ends the process."""
    command = [sys.executable, script, str(library), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return (json.loads(done.stdout) if done.returncode == 0 else {}), done.stderr[-2000:]
