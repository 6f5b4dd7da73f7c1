"""The README's code runs, and its generated parts are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_code_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks, "the README shows no code"
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, str(README), "exec"), names)
        assert names["routing"].experts.shape == names["routing"].weights.shape == (8, 4)
    assert "xla" in capsys.readouterr().out


def test_the_generated_parts_of_the_readme_are_filled() -> None:
    parts = dict(re.findall(r"<!-- generated: ([\w-]+) -->\n(.*?)<!-- end", README.read_text(), re.DOTALL))
    assert {"provenance", "table", "plot", "winners", "bars", "route-table", "route-plot"} <= set(parts)
    assert all(part.strip() for part in parts.values())
