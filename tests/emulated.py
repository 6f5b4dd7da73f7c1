"""The kernels' sources beside the emulation of CUDA in tests/emulation, compiled for the CPU."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jax_router import build

EMULATION = Path(__file__).parent / "emulation"
PLAIN_LAUNCH = re.compile(r"(\S+)<<<(\w+), (\w+), 0, stream>>>\((\w+)\);")
# glibc's checked longjmp takes the jump to another fiber's stack for an error, where a distribution asks for checks.
FLAGS = ("-std=c++20", "-w", "-fPIC", "-pthread", "-U_FORTIFY_SOURCE")
HEADER = "cuda_runtime.h"  # nvcc includes it by itself
WORKSPACE_BYTES = 16 << 20


class Sources:
    """The kernels' sources beside the emulation, compiled to objects that faulty copies can be linked with.

    Args:
      shared: a folder of all workers of pytest-xdist: the first that needs the objects makes them, the others wait.
      own: a folder of this worker, for libraries and faulty copies.
    """

    def __init__(self, shared: Path, own: Path):
        self.folder, self.own = shared, own
        shared.mkdir(exist_ok=True)
        complete = shared / "complete"
        with (shared / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                self._copy_sources()
            self.units = [*sorted(shared.glob("*.cu")), shared / "launch.cc"]
            self.objects = {unit: unit.with_suffix(".o") for unit in self.units}
            if not complete.exists():
                header = str(shared / HEADER)  # most of what most units are
                self._run(*FLAGS, "-O1", "-x", "c++-header", header, "-o", f"{header}.gch")
                self._compile(self.units, "-O1")  # with -O2 compiling takes longer by more than the tests save
                complete.touch()

    def _copy_sources(self) -> None:
        for path in build.source_files():
            if path.name not in ("ffi.cc", "bench.cu"):
                text = PLAIN_LAUNCH.sub(r"emulation::launch_plain(\2, \3, [=] { \1(\4); });", path.read_text())
                (self.folder / path.name).write_text(text)
        for path in EMULATION.iterdir():
            shutil.copy(path, self.folder)

    def _compile(self, units: Sequence[Path], optimization: str) -> list[Path]:
        def compile_one(unit: Path) -> Path:
            made = unit.with_suffix(".o")
            include = ("-I", str(unit.parent), "-I", str(self.folder), "-include", HEADER)
            self._run(*FLAGS, optimization, *include, "-x", "c++", "-c", str(unit), "-o", str(made))
            return made

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(compile_one, units))

    def link(self, name: str, **replaced: Path) -> Path:
        objects = [str(replaced.get(unit.stem, made)) for unit, made in self.objects.items()]
        self._run("-shared", "-pthread", *objects, "-o", str(self.own / name))
        return self.own / name

    def faulty(self, file: str, old: str, new: str, units: Sequence[str] = ()) -> Path:
        """The library with `old` replaced in a file; of a header, in all `units`: the linker keeps one copy."""
        text = (self.folder / file).read_text()
        assert text.count(old) == 1, f"the fault no longer applies to {file}"
        folder = self.own / "faulty"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        made = [folder / unit for unit in units or (file,)]
        headers = {*self.folder.glob("*.h"), *self.folder.glob("*.cuh")} - {self.folder / HEADER}
        for path in (*headers, *(self.folder / unit.name for unit in made)):
            shutil.copy(path, folder)
        (folder / file).write_text(text.replace(old, new))
        objects = self._compile(made, "-Og")  # these run once: half the time in all
        return self.link("faulty.so", **dict(zip((unit.stem for unit in made), objects, strict=True)))

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


def in_a_process(script: str, library: Path, *cases: Sequence[object]) -> tuple[list[dict[str, Any]], str]:
    """What a test file run as a script prints of each case, up to one that ends the process; and what it says then."""
    command = [sys.executable, script, str(library), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr[-2000:]


def answer(examine: Callable[..., dict[str, Any]]) -> None:
    """The other side of `in_a_process`."""
    _, library, cases = sys.argv
    for case in json.loads(cases):
        print(json.dumps(examine(library, *case)), flush=True)
