"""The code of the README and of docs/numerics.md runs, and the README's generated parts are there."""

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


def test_what_the_numerics_page_says_of_cosine_and_tolerances_is_what_its_code_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = README.parent / "docs" / "numerics.md"
    [block] = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile(block, str(page), "exec"), {})
    said = re.findall(r"# (\d+)%", block)
    assert re.findall(r": (\d+)% of the tokens", capsys.readouterr().out) == said == ["80", "6"]


def test_the_generated_parts_of_the_readme_are_filled() -> None:
    parts = dict(re.findall(r"<!-- generated: ([\w-]+) -->\n(.*?)<!-- end", README.read_text(), re.DOTALL))
    assert {"provenance", "table", "plot", "winners", "bars", "route-table", "route-plot"} <= set(parts)
    assert all(part.strip() for part in parts.values())
