"""Compile the CUDA kernels once, keep the library in a per-user cache, and load it.

Nothing here runs at import. `jax-router build` compiles ahead; otherwise the first use on a GPU does, and says so.

The cache (`JAX_ROUTER_CACHE`, else the user's cache folder) holds per library a `.so`, a `.json` beside it with its
digest and the log of the compilers, and a `.lock`. The name of a library is two digests: of what is compiled (sources,
flags, FFI headers, C library) and of what compiles it. A machine without a compiler therefore still finds a library
that was compiled ahead, from these very sources.
"""

import concurrent.futures
import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jax_router.toolchain import BuildError, Compiler, compiler_warnings, find_compiler, kernel_resources, run

if TYPE_CHECKING:
    import typer

ARCHITECTURE = "sm_90a"
GENERATE = f"-gencode=arch=compute_{ARCHITECTURE.removeprefix('sm_')},code={ARCHITECTURE}"
NVCC_FLAGS = (
    "-O3",
    "-std=c++20",
    GENERATE,
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    "-Xfatbin=-compress-all",  # a fifth of the size
    "-Xptxas=-v,-warn-spills",  # the log is where `jax-router build --check` finds registers and spills
)
HOST_FLAGS = ("-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffunction-sections", "-Wall", "-Wextra")
LINK_FLAGS = ("-shared", "-cudart=static", "-Xlinker=--version-script=exports.map,-s,--gc-sections,-z,defs")
# The C interface and the FFI handler; cudart's and the C++ library's symbols must not meet those of other libraries.
EXPORTS = "{ global: jr_*; local: *; };\n"
STANDALONE_PROGRAM = (  # in csrc, but no part of the library
    "check.cu",
    "check_neighbours.cu",
    "check_neighbours.h",
    "check_overlap.cu",
    "check_overlap.h",
    "check_overlap_route.cu",
    "check_route.cu",
    "check_route.h",
    "check_route_reference.cu",
    "check_route_reference.h",
    "check_support.h",
)

CACHE_VARIABLE = "JAX_ROUTER_CACHE"
LIBRARY_VARIABLE = "JAX_ROUTER_LIBRARY"


def csrc_directory() -> Path:
    """The folder of the kernel sources: inside the installed package, else at the root of the repository.

    Raises:
      BuildError: neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "router_gemm.h").is_file():
            return folder
    raise BuildError(f"the kernel sources are missing: no csrc beside or in {package}. Install jax_router again.")


def source_files() -> list[Path]:
    """Every file that the kernels' library is compiled from, headers included, sorted by name."""
    return [path for path in _sources_in(csrc_directory()) if path.name not in STANDALONE_PROGRAM]


def verification_files() -> list[Path]:
    """Every file that the library of the verification is compiled from: it shares the kernels' headers."""
    headers = [path for path in source_files() if path.suffix in (".cuh", ".h")]
    return [*_sources_in(csrc_directory() / "verification"), *headers]


def _sources_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".cu", ".cuh", ".cc", ".h"))


KERNELS, VERIFICATION = "jax_router", "jax_router_verification"  # the libraries


def digest(files: Iterable[Path], *texts: str) -> str:
    """sha256 over the names and bytes of `files` and over `texts`, as a hexadecimal string."""
    state = hashlib.sha256()
    parts = [part for path in files for part in (path.name.encode(), path.read_bytes())]
    for part in (*parts, *map(str.encode, texts)):
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()


def flags() -> tuple[str, ...]:
    """The flags of all compilers: part of what a measured record depends on."""
    return (*NVCC_FLAGS, *HOST_FLAGS, *LINK_FLAGS, EXPORTS)


def ffi_include_directory() -> Path:
    """The FFI headers of the jaxlib that will load the library."""
    import jax

    return Path(jax.ffi.include_dir())


def ffi_version() -> int:
    """Version of these headers as major * 1000 + minor, the value of the library's `jr_ffi_api_version()`."""
    header = (ffi_include_directory() / "xla" / "ffi" / "api" / "c_api.h").read_text()
    major, minor = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR"))
    if major is None or minor is None:
        raise BuildError("the FFI headers of this jaxlib name no version. Install a released jaxlib, 0.10.2 or newer.")
    return int(major[1]) * 1000 + int(minor[1])


def cache_directory() -> Path:
    """Where libraries are kept: `JAX_ROUTER_CACHE`, else `jax_router` in the user's cache folder.

    Raises:
      BuildError: this user has no home folder, and no variable names another.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax_router"
    except RuntimeError as error:  # no HOME, and a user without an entry in the password database
        raise BuildError(f"there is no cache folder ({error}). Set {CACHE_VARIABLE} to a writable folder.") from error


def build(*, force: bool = False, library: str = KERNELS) -> Path:
    """A compiled library: from the cache, else compiled now, once for all processes of this user.

    Args:
      force: compile although the cache has it.
      library: KERNELS, or VERIFICATION for what runs beside them while they are verified.

    Returns:
      The path of the shared library.

    Raises:
      BuildError: no compiler, a compiler that failed, or no folder to write to; says what to install or to set.
    """
    runs_with = (ARCHITECTURE, str(ffi_version()), version("jaxlib"), platform.machine(), *platform.libc_ver())
    sources = source_files() if library == KERNELS else verification_files()
    content = digest(sources, *flags(), *runs_with)
    try:
        compiler = find_compiler()
    except BuildError as error:
        ahead = {path: _damage(path) for path in sorted(cache_directory().glob(f"{library}-{content[:16]}-*.so"))}
        whole = [path for path, damage in ahead.items() if not damage]
        if whole and not force:
            return whole[-1]
        damaged = "".join(
            f" {path}, compiled ahead, is damaged ({damage})." for path, damage in ahead.items() if damage
        )
        raise BuildError(f"{error}{damaged}") from error
    name = f"{library}-{content[:16]}-{digest((), compiler.version, compiler.host_version)[:8]}.so"
    cached = cache_directory() / name
    if not force and not _damage(cached):
        return cached
    target = _writable_directory() / name
    with _lock(target):
        damage = _damage(target)
        if damage and damage != _ABSENT:
            _say(f"jax_router: {target} is damaged ({damage}); compiling it again\n")
        if force or damage:
            _compile(compiler, target, sources)
    return target


def load_library() -> ctypes.CDLL:
    """Build the library if the cache lacks it, and load it. `JAX_ROUTER_LIBRARY` names one to load instead.

    Raises:
      BuildError: as `build`, or the library does not load.
    """
    chosen = os.environ.get(LIBRARY_VARIABLE)
    if chosen:
        try:
            return ctypes.CDLL(chosen)
        except OSError as error:
            raise BuildError(
                f"{LIBRARY_VARIABLE}={chosen} does not load: {error}. Expected the output of `jax-router build "
                f"--output`; unset it to use the cache."
            ) from error
    path = build()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        _say(f"jax_router: {path} does not load ({error}); compiling it again\n")
    path = build(force=True)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(
            f"the library compiles and does not load: {error}. Compile it on the machine that uses it, with a compiler "
            f"whose C++ library is installed there."
        ) from error


def compiler_log(library: Path) -> str:
    """What the compilers of a cached library were called with and said."""
    return str(_record(library)["log"])


def register(app: "typer.Typer") -> None:
    """Add the command `build` to the command line."""
    import typer

    @app.command("build")
    def build_command(
        force: Annotated[bool, typer.Option("--force", help="Compile although the cache has the library.")] = False,
        verbose: Annotated[bool, typer.Option("--verbose", help="Print registers, shared memory and spills.")] = False,
        check: Annotated[bool, typer.Option("--check", help="Exit with 1 on any warning or register spill.")] = False,
        output: Annotated[Path | None, typer.Option("--output", help="Copy the library to this path as well.")] = None,
    ) -> None:
        """Compile the CUDA kernels ahead of their first use. Exits with 2 when there is nothing to compile with."""
        try:
            library = build(force=force)
            if output is not None:
                shutil.copyfile(library, output)
        except (BuildError, OSError) as error:
            typer.echo(f"jax-router build: {error}", err=True)
            raise typer.Exit(2) from error
        log = compiler_log(library)
        rows = kernel_resources(log)
        typer.echo(f"{library}  {library.stat().st_size / 1e6:.2f} MB, {len(rows)} kernels")
        if output is not None:
            typer.echo(f"copied to {output}; {LIBRARY_VARIABLE}={output} uses it")
        if verbose:
            typer.echo(f"{'registers':>9} {'shared B':>9} {'stack B':>8} {'spill B':>8}  kernel")
            for row in rows:
                numbers = f"{row.registers:9} {row.shared_bytes:9} {row.stack_bytes:8} {row.spill_bytes:8}"
                typer.echo(f"{numbers}  {row.name}")
        if check:
            spills = [f"{row.name} spills {row.spill_bytes} bytes" for row in rows if row.spill_bytes]
            faults = compiler_warnings(log) + spills
            typer.echo("\n".join(faults) if faults else "no warning, no spill", err=bool(faults))
            raise typer.Exit(1 if faults else 0)


def compile_command(compiler: Compiler, source: Path, made: str) -> list[str]:
    """What compiles one source, a .cu or .cc beside the headers it includes, to the object `made`."""
    if source.suffix == ".cu":
        return [*_nvcc(compiler), *NVCC_FLAGS, "-c", str(source), "-o", made]
    return [str(compiler.host), *HOST_FLAGS, "-isystem", str(ffi_include_directory()), "-c", str(source), "-o", made]


def link_command(compiler: Compiler, objects: Iterable[str], made: str) -> list[str]:
    """What links `objects` to the library `made`, in a folder where `exports.map` holds `EXPORTS`."""
    return [*_nvcc(compiler), GENERATE, *LINK_FLAGS, *compiler.link_flags, *objects, "-o", made]


def _nvcc(compiler: Compiler) -> list[str]:
    return [str(compiler.nvcc), "-ccbin", str(compiler.host)]


def _compile(compiler: Compiler, target: Path, sources: Iterable[Path]) -> None:
    """Compile every source in parallel, link, and give record and library their final names, in one step each."""
    started = time.monotonic()
    how = f"for {ARCHITECTURE} with nvcc {compiler.release}, once, in {target.parent}"
    _say(f"jax_router: compiling the CUDA kernels {how} ...")
    outcome = "failed"
    try:
        # In the folder of the target, so that os.replace stays on one file system.
        with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
            made = {path: f"{path.name}.o" for path in sources if path.suffix in (".cu", ".cc")}
            commands = [compile_command(compiler, path, name) for path, name in made.items()]
            Path(folder, "exports.map").write_text(EXPORTS)
            link = link_command(compiler, made.values(), "library.so")
            with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                logs = list(pool.map(lambda command: run(command, folder), commands))
            log = "".join([*logs, run(link, folder)])
            library, record = Path(folder, "library.so"), Path(folder, "library.json")
            seconds = round(time.monotonic() - started, 1)
            versions = {"nvcc": compiler.version, "host": compiler.host_version}
            facts = {"sha256": _sha256(library), "seconds": seconds, **versions, "log": log}
            record.write_text(json.dumps(facts, indent=1))
            os.replace(record, target.with_suffix(".json"))
            os.replace(library, target)
        outcome = f"done in {seconds} s"
    except OSError as error:
        reason = f"cannot write to {target.parent}: {error}"
        raise BuildError(f"{reason}. Set {CACHE_VARIABLE} to a writable folder.") from error
    finally:
        _say(f" {outcome}\n")


_ABSENT = "not there"


def _damage(library: Path) -> str | None:
    """Why a cached library must not be loaded, or None. A truncated one would not fail to load: it would crash."""
    if not library.is_file():
        return _ABSENT
    try:
        return None if _sha256(library) == _record(library)["sha256"] else "wrong digest"
    except (OSError, ValueError, KeyError) as error:
        return f"no readable record: {error}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _record(library: Path) -> dict[str, Any]:
    return dict(json.loads(library.with_suffix(".json").read_text()))


def _writable_directory() -> Path:
    """The cache folder, or with a warning one in the temporary folder that only this user can write to."""
    reasons: list[str] = []
    for folder in (cache_directory(), Path(tempfile.gettempdir()) / f"jax_router-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            if reasons and (folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022):
                raise PermissionError(f"{folder} can be written by others")
        except OSError as error:
            reasons.append(str(error))
            continue
        if reasons:
            warnings.warn(
                f"the cache folder of jax_router cannot be written ({reasons[0]}); using {folder}. Set "
                f"{CACHE_VARIABLE} to a writable folder to keep the compiled kernels.",
                RuntimeWarning,
                stacklevel=2,
            )
        return folder
    raise BuildError(f"no folder to compile in ({'; '.join(reasons)}). Set {CACHE_VARIABLE} to a writable folder.")


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold the lock of a library. The system releases the lock of a process that is killed."""
    import fcntl  # here, because Windows has none, and this module must import there

    path = target.with_suffix(".lock")
    try:
        file = path.open("w")
    except OSError as error:
        raise BuildError(f"cannot lock {path}: {error}. Set {CACHE_VARIABLE} to a folder of your own.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("jax_router: waiting for another process that compiles the CUDA kernels\n")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
