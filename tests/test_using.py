"""The pages of docs/using: the code of each runs as one program, in a process of its own, on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "using").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_without_a_warning(page, tmp_path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks, "the page shows no code"
    program = tmp_path / f"{page.stem}.py"
    program.write_text("\n".join(blocks))
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    in_haste = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # the time is that of compiling
    environment |= in_haste | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "error", str(program)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_links_every_page() -> None:
    linked = re.findall(r"\(docs/using/([\w-]+\.md)\)", (ROOT / "README.md").read_text())
    assert {page.name for page in PAGES} <= set(linked)
