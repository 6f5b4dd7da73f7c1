"""compute-sanitizer on the standalone program of the CUDA kernels (csrc/check.cu --small), where the tool is."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jax_router import build, toolchain
from jax_router.verification.process import kill
from jax_router.verification.result import Result

# Shared memory is not tracked by initcheck; leaks are not what memcheck is asked about.
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
EXTENT = {"racecheck": "--tiny"}  # it takes a thousand times as long as the program alone
SECONDS = 600.0  # of one tool
FOUND = 9  # exit status when the tool reports something
OF_THE_PROGRAM = re.compile(r"^FAILED|^launch refused|^\S+:\d+: .+ failed: ", re.MULTILINE)  # csrc/check_support.h


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH or in the toolkit of the compiler, or None."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return found
    try:
        beside = toolchain.find_compiler().nvcc.resolve().parent / "compute-sanitizer"
    except toolchain.BuildError:
        return None
    return str(beside) if beside.is_file() else None


def build_program(folder: Path, csrc: Path | None = None) -> Path:
    """Compile the standalone program of the shipped sources, or of those in `csrc`.

    Raises:
      BuildError: it does not compile.
    """
    compiler = toolchain.find_compiler()
    sources = sorted((csrc or build.csrc_directory()).glob("*.cu"))
    program = folder / "router_gemm_check"
    flags = ("-O3", "-lineinfo", "-std=c++20", build.GENERATE, "--threads=0", *compiler.link_flags)
    toolchain.run(
        [str(compiler.nvcc), "-ccbin", str(compiler.host), *flags, *map(str, sources), "-o", str(program)], str(folder)
    )
    return program


def check_sanitizers(
    alive: Callable[[int], None], seconds: float = SECONDS, tools: tuple[str, ...] = TOOLS, csrc: Path | None = None
) -> list[Result]:
    """One result per tool: "memcheck", "racecheck", "synccheck", "initcheck"; of the sources in `csrc` if given."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return [Result(tool, None, reason="compute-sanitizer is not installed") for tool in tools]
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = build_program(Path(folder), csrc)
        except toolchain.BuildError as error:
            return [Result(tool, None, reason=f"the standalone program does not compile: {error}") for tool in tools]
        alive(0)
        return [_run(sanitizer, tool, program, seconds, alive) for tool in tools]


def _run(sanitizer: str, tool: str, program: Path, seconds: float, alive: Callable[[int], None]) -> Result:
    started = time.monotonic()
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), str(program), EXTENT.get(tool, "--small")]
    # A group of its own: the tool's end would leave the program running, and holding the pipe.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        while True:
            try:
                output, _ = process.communicate(timeout=5)
                break
            except subprocess.TimeoutExpired:
                alive(0)
                if time.monotonic() - started > seconds:
                    kill(process)
                    reason = f"{tool} took longer than {seconds:.0f} s"
                    return Result(tool, None, 0, time.monotonic() - started, reason=reason)
    finally:
        kill(process)
        process.wait()
    took = time.monotonic() - started
    launches = sum(map(int, re.findall(r"(\d+) (?:launches|routings)", output)))
    if process.returncode == 0 and launches == 0:
        return Result(tool, None, 0, took, reason=f"the program launched nothing: {output[-2000:]}")
    if process.returncode == 0:
        return Result(tool, True, launches, took)
    if process.returncode != FOUND and not OF_THE_PROGRAM.search(output):
        reason = f"{tool} ended with status {process.returncode}: {output[-2000:]}"
        return Result(tool, None, launches, took, reason=reason)
    said = [line for line in output.splitlines() if line.startswith("=========") or "FAILED" in line]
    return Result(tool, False, launches, took, reason="\n".join(said[:12]) or output[-2000:])
