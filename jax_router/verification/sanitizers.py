"""compute-sanitizer on the standalone program of the CUDA kernels (csrc/check.cu), where the tool is."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_router import build, toolchain
from jax_router.verification.edits import Edit, EditError, copy_edited
from jax_router.verification.process import kill
from jax_router.verification.result import Result

# Shared memory is not tracked by initcheck; leaks are not what memcheck is asked about.
TOOLS = ("memcheck", "synccheck", "initcheck", "racecheck")  # the slowest last
EXTENT = {"racecheck": "--tiny"}  # it takes a thousand times as long as the program alone
SECONDS = 600.0  # of one tool
FOUND = 9  # exit status when the tool reports something
SUMMARY = re.compile(r"^========= (ERROR|RACECHECK) SUMMARY: (\d+)", re.MULTILINE)
REPORTED = re.compile(r"^========= (?!COMPUTE-SANITIZER|.*SUMMARY)\S", re.MULTILINE)  # what follows is indented
OF_THE_PROGRAM = re.compile(r"^FAILED|^launch refused|^\S+:\d+: .+ failed: ", re.MULTILINE)  # csrc/check_support.h
TRUSTED_SINCE = (2026, 4)  # of racecheck's reports: 2025.3 takes barriers for races whose order others establish
INSTALL = 'Run pip install "nvidia-cuda-sanitizer-api>=13.5".'
# Under racecheck (2026.4) no thread passes a wait at the cluster's barrier before all threads of the cluster have come
# to theirs, though all they must have done is arrive. The warps of the many-token kernel that copy come to theirs last,
# after they have waited for warps that this holds up. In the copy of the sources that racecheck gets they come to it
# before their later copies. That hides no race: no other block touches the stages they copy to, and of what their own
# does before it arrives they use only the stages' barriers, which kOtherStages orders in both.
WAITS_EARLY = (
    Edit(
        "sm90_router_gemm_many_tokens.cu",
        """      if constexpr (!kSplit) shared.cluster_sum.arrive(log2_tiles);
      if (elect_one()) copy_units(kUnitsAhead, most_units);
""",
        """      if constexpr (!kSplit) shared.cluster_sum.arrive(log2_tiles), shared.cluster_sum.wait_for_owners();
      if (elect_one()) copy_units(kUnitsAhead, most_units);
""",
    ),
    Edit(
        "sm90_router_gemm_many_tokens.cu",
        """    } else if constexpr (!kSplit) {
      shared.cluster_sum.arrive(log2_tiles);
    }
    if constexpr (!kSplit) shared.cluster_sum.wait_for_owners();
""",
        """    } else if constexpr (!kSplit) {
      shared.cluster_sum.arrive(log2_tiles), shared.cluster_sum.wait_for_owners();
    }

""",
    ),
)
EDITS = {"racecheck": WAITS_EARLY}


@dataclass(frozen=True)
class Sanitizer:
    """A compute-sanitizer and its version, "2026.4.0.0"."""

    path: Path
    version: str

    @property
    def release(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")))


def find_sanitizer() -> Sanitizer | None:
    """The newest that runs: on PATH, beside the compiler, or of the PyPI package; None where there is none."""
    on_path = shutil.which("compute-sanitizer")
    folders = [] if on_path is None else [Path(on_path).parent]
    with contextlib.suppress(toolchain.BuildError):
        folders.append(toolchain.find_compiler().nvcc.resolve().parent)
    folders += [toolkit / "bin" for toolkit in toolchain.wheel_toolkits()]
    found = [_asked(folder / "compute-sanitizer") for folder in folders]
    return max((each for each in found if each is not None), key=lambda each: each.release, default=None)


def _asked(path: Path) -> Sanitizer | None:
    try:
        said = subprocess.run(
            [str(path), "--version"], capture_output=True, text=True, errors="replace", timeout=20
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r"Version (\d+(?:\.\d+)+)", said)
    return None if version is None else Sanitizer(path, version[1])


def build_program(csrc: Path) -> Path:
    """Compile the standalone program of the sources in a folder, beside them.

    Raises:
      BuildError: it does not compile.
    """
    compiler = toolchain.find_compiler()
    program = csrc / "router_gemm_check"
    flags = ("-O3", "-lineinfo", "-std=c++20", build.GENERATE, "--threads=0", *compiler.link_flags)
    sources = map(str, sorted(csrc.glob("*.cu")))
    toolchain.run([str(compiler.nvcc), "-ccbin", str(compiler.host), *flags, *sources, "-o", str(program)], str(csrc))
    return program


def check_sanitizers(
    alive: Callable[[int], None], seconds: float = SECONDS, tools: tuple[str, ...] = TOOLS, csrc: Path | None = None
) -> Iterator[Result]:
    """One result per tool, all of which run at once; of the sources in `csrc` if given."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        yield from (Result(tool, None, reason=f"compute-sanitizer is not installed: {INSTALL}") for tool in tools)
        return
    with tempfile.TemporaryDirectory() as folder:
        programs: dict[tuple[Edit, ...], Path | str] = {}  # or why there is none
        for edits in dict.fromkeys(EDITS.get(tool, ()) for tool in tools):
            try:
                copy = Path(folder, str(len(programs)))
                copy_edited(csrc or build.csrc_directory(), copy, edits)
                programs[edits] = build_program(copy)
            except (toolchain.BuildError, EditError) as error:
                programs[edits] = f"the standalone program cannot be built: {error}"
            alive(0)
        stopped = threading.Event()

        def run(tool: str) -> Result:
            program = programs[EDITS.get(tool, ())]
            if isinstance(program, str):
                return Result(tool, None, reason=program)
            return _run(sanitizer, tool, program, seconds, alive, stopped)

        with ThreadPoolExecutor(len(tools)) as pool:
            try:
                yield from pool.map(run, tools)
            finally:  # the pool waits for what runs
                stopped.set()


def _run(
    sanitizer: Sanitizer, tool: str, program: Path, seconds: float, alive: Callable[[int], None],
    stopped: threading.Event,
) -> Result:  # fmt: skip
    started = time.monotonic()
    extent = EXTENT.get(tool, "--small")
    command = [str(sanitizer.path), "--tool", tool, "--error-exitcode", str(FOUND), str(program), extent]
    # A group of its own: the tool's end would leave the program running, and holding the pipe.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0
    ) as process:
        output = status = None
        try:
            while output is None and not stopped.is_set() and time.monotonic() - started < seconds:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output, _ = process.communicate(timeout=min(1.0, seconds))
                    status = process.returncode
                alive(0)
        finally:
            kill(process)
        if output is None:
            output, _ = process.communicate()
    passed, reason = judge(sanitizer, tool, status, output)
    figures: dict[str, Any] = {"version": sanitizer.version}
    if tool in EDITS:
        figures["edited"] = sorted({edit.file for edit in EDITS[tool]})
    return Result(tool, passed, _launches(output), time.monotonic() - started, figures, reason=reason)


def _launches(output: str) -> int:
    return sum(map(int, re.findall(r"(\d+) (?:launches|routings)", output)))


def judge(sanitizer: Sanitizer, tool: str, status: int | None, output: str) -> tuple[bool | None, str | None]:
    """Whether a tool passed the program, None if that says nothing of the kernels, and why not.

    Its status is None if it was ended; what it had reported until then counts.
    """
    reports = {name: int(count) for name, count in SUMMARY.findall(output)}
    if status == 0 and not any(reports.values()):  # warnings leave the status as it is
        return (True, None) if _launches(output) else (None, f"the program launched nothing: {output[-2000:]}")
    of_the_program = OF_THE_PROGRAM.search(output) is not None
    if status is None and not of_the_program and not REPORTED.search(output):
        return None, f"{tool} was ended before it came to its end"
    if status not in (None, 0, FOUND) and not of_the_program and not reports.get("RACECHECK"):
        return None, f"{tool} ended with status {status}: {output[-2000:]}"
    said = [line for line in output.splitlines() if line.startswith("=========") or "FAILED" in line]
    reason = "\n".join(said[:12]) or output[-2000:]
    if tool == "racecheck" and sanitizer.release < TRUSTED_SINCE and not of_the_program:
        return None, (
            f"racecheck of compute-sanitizer {sanitizer.version} may take barriers for races, as 2025.3 does. "
            f"{INSTALL}\n{reason}"
        )
    return False, reason
