"""Writes docs/models.md from the table of jax_router/hf.py: python scripts/models_page.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax_router.hf import FAMILIES, Family, Refused, Switch

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

INTRODUCTION = """# Routers of Hugging Face transformers

`RoutingSpec.from_hf_config(config)` takes a configuration of transformers or the dict of a `config.json`. Its
`model_type` decides; of a model of many parts, that of its text model. `tests/test_hf_routers.py` compares every row of
the first table with the PyTorch modules of transformers 5.23, and fails for a router class that neither table covers.

The correction bias, the router's own bias and Gemma 4's `per_expert_scale` are arguments of `route`; the norm and the
scale before Gemma 4's router are the caller's. DeepSeek-V4's hash layers are `route(..., experts=table[ids])`. What a
block multiplies the sum of its experts with (beam, laguna, minimax_m3_vl, step3p5) is not in the spec.

Names in `code` are fields of the config, under any of their names (`moe_renormalize`, `route_scale`). "In 16 bits" is
what a 16-bit model of the family does. `round_logits=True` rounds the logits where they alone are rounded, leaves
routers in float32 as they are, and is refused where the scores are rounded too.
"""


def page() -> str:
    """The text of docs/models.md. Written by hand it would go stale: a test compares the two."""
    rows: dict[tuple[str, ...], list[str]] = {}
    refused: dict[str, list[str]] = {}
    for model_type, row in FAMILIES.items():
        if isinstance(row, Refused):
            refused.setdefault(row.reason, []).append(model_type)
            continue
        cases = row.cases.items() if isinstance(row, Switch) else [(None, row)]
        for value, family in cases:
            condition = f"{row.field}={value}" if isinstance(row, Switch) else ""
            rows.setdefault(_cells(family, condition), []).append(model_type)
            for field, expressed, remedy in family.only:
                reason = f"with another `{field}` than {expressed}: {remedy}"
                refused.setdefault(reason, []).append(model_type)
    expressed = [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in rows.items()]
    unexpressed = [f"| {', '.join(names)} | {reason} |" for reason, names in refused.items()]
    return "\n".join(
        (
            INTRODUCTION,
            "## Expressed\n",
            "| model_type | if | scores | renormalized | scaled by | groups | compared | in 16 bits |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *expressed,
            "\n## Refused\n",
            "| model_type | the router |",
            "| --- | --- |",
            *unexpressed,
            "",
        )
    )


def _field(value: Any) -> str:
    return f"`{value[0]}`" if isinstance(value, tuple) else str(value)


def _cells(family: Family, condition: str) -> tuple[str, ...]:
    norm = "if " + _field(family.renormalize) if isinstance(family.renormalize, tuple) else ""
    norm = norm or ("always" if family.renormalize else "no")
    norm += f", + {family.epsilon:g}" if family.epsilon else ""
    norm += f", at least {_field(family.minimum)}" if family.minimum else ""
    scaling = "1 / top_k" if family.over_top_k else "" if family.scaling == 1.0 else _field(family.scaling)
    groups = f"{family.group_score}, others {family.masked_choice:g}" if family.grouped else ""
    return condition, family.score_function, norm, scaling, groups, family.select_on, family.precision


if __name__ == "__main__":
    PAGE.write_text(page())
