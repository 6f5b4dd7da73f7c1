"""Kernels broken on purpose, compiled: `python scripts/faults.py list`, `... build --output DIR [NAME...]`.

Each library is the shipped one but for the edits of its fault (fault_list.py): the same compilers and flags, for the
FFI of the jaxlib of the Python that runs this. `JAX_ROUTER_LIBRARY=DIR/NAME.so` makes jax_router use it. DIR/objects
keeps every object under a digest of what it is compiled from, so a fault costs what it changes.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fault_list import FAULTS, Fault

from jax_router import build
from jax_router.toolchain import BuildError, Compiler, compiler_warnings, find_compiler, run
from jax_router.verification.edits import EditError, copy_edited

INCLUDE = re.compile(r'^#include "(\w[\w.]*)"', re.MULTILINE)


class FaultError(RuntimeError):
    """A fault cannot be had: it is unknown, no longer applies to the sources, or does not compile."""


def named(names: Sequence[str]) -> list[Fault]:
    """The faults of these names in their order, all of them without names.

    Raises:
      FaultError: a name is none of them.
    """
    known = {fault.name: fault for fault in FAULTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise FaultError(
            f"NAME is {', '.join(unknown)}. Expected some of {', '.join(known)}; see python scripts/faults.py list."
        )
    return [known[name] for name in names or known]


def apply(fault: Fault, csrc: Path, to: Path) -> None:
    """Copy the files of the folder `csrc` to the folder `to`, which is made, and break them.

    Raises:
      FaultError: an edit does not find its text, or not as often as it says; nothing is left in `to`.
    """
    try:
        copy_edited(csrc, to, fault.edits)
    except EditError as error:
        raise FaultError(f"fault {fault.name} of scripts/fault_list.py no longer applies: {error}") from error


def compiled_from(source: Path) -> list[Path]:
    """A source and all headers of its folder that it includes, directly or not, sorted by name."""
    found, left = set(), [source]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += [path.parent / name for name in INCLUDE.findall(path.read_text()) if (path.parent / name).is_file()]
    return sorted(found)


def build_libraries(faults: Sequence[Fault], output: Path) -> Iterator[tuple[Fault, Path, list[str]]]:
    """Compile faulty libraries, one after the other in `faults`; objects of all of them in parallel.

    Args:
      faults: which.
      output: a folder for `NAME.so`, `NAME.digest` of what each is made of, and `objects` for later calls.

    Yields:
      Fault, library, and the lines in which compilers warned.

    Raises:
      FaultError: a fault does not apply or does not compile; objects that were made are kept.
      BuildError: there is no compiler; says what to install.
    """
    compiler = find_compiler()
    (output / "objects").mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".build-", dir=output) as scratch,
        concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        compiled: dict[Path, concurrent.futures.Future[None]] = {}
        objects: dict[str, list[Path]] = {}
        for fault in faults:
            folder = Path(scratch, fault.name)
            apply(fault, build.csrc_directory(), folder)
            units = [folder / path.name for path in build.source_files() if path.suffix in (".cu", ".cc")]
            objects[fault.name] = [output / "objects" / f"{unit.name}-{_digest(compiler, unit)}.o" for unit in units]
            for unit, made in zip(units, objects[fault.name], strict=True):
                if made not in compiled:  # most are those of another fault, or of none
                    compiled[made] = pool.submit(_compile, compiler, unit, made)
        try:
            for fault in faults:
                library, warned = _link(compiler, fault, objects[fault.name], compiled, output)
                (output / f"{fault.name}.digest").write_text(_library_digest(Path(scratch, fault.name)))
                yield fault, library, warned
        finally:
            pool.shutdown(cancel_futures=True)


def is_built(fault: Fault, output: Path) -> bool:
    """Whether `output` has the library of a fault of the present sources, for the jaxlib of this Python.

    Raises:
      FaultError: the fault no longer applies.
    """
    said = output / f"{fault.name}.digest"
    if not (output / f"{fault.name}.so").is_file() or not said.is_file():
        return False
    with tempfile.TemporaryDirectory() as scratch:
        apply(fault, build.csrc_directory(), Path(scratch, fault.name))
        return said.read_text() == _library_digest(Path(scratch, fault.name))


def _library_digest(folder: Path) -> str:
    """Of the broken sources of a library, and what compiles them but for the compilers."""
    sources = [folder / path.name for path in build.source_files()]
    return build.digest(sources, *build.flags(), str(build.ffi_version()), version("jaxlib"))


def _digest(compiler: Compiler, source: Path) -> str:
    """Of all that the object of a source depends on."""
    headers = (str(build.ffi_version()), version("jaxlib")) if source.suffix == ".cc" else ()
    compilers = (compiler.version, compiler.host_version)
    return build.digest(compiled_from(source), *build.flags(), *compilers, *headers)[:16]


def _compile(compiler: Compiler, source: Path, made: Path) -> None:
    """Compile a source unless that was done before. The object gets its name once it is whole and its log there."""
    if made.exists():
        return
    unfinished = source.with_suffix(".o")
    log = run(build.compile_command(compiler, source, str(unfinished)), str(source.parent))
    made.with_suffix(".log").write_text(log)
    os.replace(unfinished, made)


def _link(
    compiler: Compiler,
    fault: Fault,
    objects: Sequence[Path],
    compiled: dict[Path, concurrent.futures.Future[None]],
    output: Path,
) -> tuple[Path, list[str]]:
    with tempfile.TemporaryDirectory(prefix=".link-", dir=output) as folder:
        try:
            for made in objects:
                compiled[made].result()
            Path(folder, "exports.map").write_text(build.EXPORTS)
            log = run(build.link_command(compiler, [str(path) for path in objects], "library.so"), folder)
        except BuildError as error:
            raise FaultError(f"fault {fault.name} does not compile; mend its edits. {error}") from error
        library = output / f"{fault.name}.so"
        os.replace(Path(folder, "library.so"), library)
    logs = [path.with_suffix(".log").read_text() for path in objects]
    return library, compiler_warnings("".join([*logs, log]))


app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()


@app.command("list")
def list_command() -> None:
    """The faults, and the checks of `jax-router verify` that must see them."""
    for fault in FAULTS:
        where = (
            f"{' and '.join(fault.operations)}, {' or '.join(fault.shapes)}, tokens {', '.join(map(str, fault.tokens))}"
        )
        console.print(f"{fault.name}: {fault.what}", style="bold", soft_wrap=True, highlight=False)
        console.print(f"  files   {', '.join(dict.fromkeys(edit.file for edit in fault.edits))}", soft_wrap=True)
        console.print(f"  runs in {where}; {fault.extends_to}", soft_wrap=True, highlight=False)
        missed = "; missed by the plain parity tests" if fault.missed_by_parity else ""
        console.print(f"  seen by {' or '.join(fault.seen_by)}{missed}\n", soft_wrap=True, highlight=False)


@app.command("build")
def build_command(
    output: Annotated[Path, typer.Option("--output", help="Folder of the libraries, and of objects to take up again.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Which; all without names.")] = None,
) -> None:
    """Compile faulty libraries. Exits with 1 when a fault does not apply or compile, with 2 without a compiler."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        faults = named(names or ())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("compiling", total=len(faults))
            for fault, library, warned in build_libraries(faults, output.resolve()):
                said = "".join(f"\n  {line}" for line in warned)
                progress.console.print(
                    f"{fault.name}: {library}, {len(warned)} warnings{said}", markup=False, soft_wrap=True
                )
                progress.advance(task)
    except (FaultError, BuildError) as error:
        typer.echo(f"faults: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, FaultError) else 2) from error


if __name__ == "__main__":
    app()
