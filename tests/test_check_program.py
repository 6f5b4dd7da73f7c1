"""csrc/check.cu, the check that needs no Python: it compiles everywhere, and on a GPU it finds nothing wrong."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jax_router import build, toolchain


def nvcc(folder: Path, *arguments: str) -> str:
    """Run nvcc as the head of check.cu says, with the host compiler's warnings; returns what it said."""
    try:
        compiler = toolchain.find_compiler()
    except build.BuildError as error:
        pytest.skip(f"the kernels cannot be compiled here: {error}")
    flags = ("-O3", "-std=c++20", build.GENERATE, "-Xcompiler=-Wall,-Wextra", "--threads=0", *compiler.link_flags)
    return toolchain.run([str(compiler.nvcc), "-ccbin", str(compiler.host), *flags, *arguments], str(folder))


def test_the_standalone_program_compiles_without_a_warning(tmp_path: Path) -> None:
    sources = [name for name in build.STANDALONE_PROGRAM if name.endswith(".cu")]
    log = nvcc(tmp_path, "-c", *(str(build.csrc_directory() / name) for name in sources))
    assert toolchain.compiler_warnings(log) == []
    assert {path.stem for path in tmp_path.glob("*.o")} == {Path(name).stem for name in sources}


@pytest.mark.gpu
def test_the_standalone_program_finds_nothing_wrong(tmp_path: Path) -> None:
    """Every configuration against the naive kernel and a CPU reference; then between programmatic neighbours."""
    nvcc(tmp_path, *map(str, sorted(build.csrc_directory().glob("*.cu"))), "-o", "router_gemm_check")
    for arguments in (["--check"], ["--overlap", "100"]):
        done = subprocess.run(
            [tmp_path / "router_gemm_check", *arguments], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
