"""A configuration of Hugging Face transformers gives its router's spec, or an error that says what to do instead."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import jax_router as jr
from jax_router import hf

# Every field of every row, so that a row alone decides what is read.
COMPLETE = {
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "moe_norm_min": 0.5,
    "enable_moe_block": True,
    "moe_router_logit_softcapping": 0.0,
    "output_multiplier": 1.0,
}
MIXTRAL = {"model_type": "mixtral", "num_experts_per_tok": 2}


def complete(model_type: str, **changes: Any) -> dict[str, Any]:
    """A config.json of the family, with a value for all that it reads."""
    row = hf.FAMILIES[model_type]
    config = {"model_type": model_type, **COMPLETE}
    if isinstance(row, hf.Switch):
        config[row.field] = next(iter(row.cases))
        row = row.cases[config[row.field]]
    if isinstance(row, hf.Family) and isinstance(row.renormalize, bool) and row.score_function != "softmax_topk":
        config["norm_topk_prob"] = row.renormalize
    config |= changes
    return {"model_type": "dbrx", "ffn_config": config} if model_type == "dbrx" else config


ROWS = [
    (name, row.field, value, family) if isinstance(row, hf.Switch) else (name, None, None, family)
    for name, row in hf.FAMILIES.items()
    if not isinstance(row, hf.Refused)
    for value, family in (row.cases.items() if isinstance(row, hf.Switch) else [(None, row)])
]


@pytest.mark.parametrize(
    ("model_type", "field", "value", "family"), ROWS, ids=[f"{name}-{value}" for name, _, value, _ in ROWS]
)
def test_every_row_gives_its_spec(model_type: str, field: str | None, value: Any, family: hf.Family) -> None:
    changes = {} if field is None else {field: value}
    if isinstance(family.renormalize, bool) and family.score_function != "softmax_topk":
        changes["norm_topk_prob"] = family.renormalize
    spec = jr.RoutingSpec.from_hf_config(complete(model_type, **changes))
    renormalize = family.renormalize is not False
    assert spec == jr.RoutingSpec(
        top_k=4,
        score_function=family.score_function,
        renormalize=renormalize,
        renormalize_epsilon=family.epsilon,
        renormalize_min=0.5 if family.minimum else 0.0,
        scaling_factor=0.25 if family.over_top_k else 2.5 if family.scaling == hf.SCALE else 1.0,
        num_groups=8 if family.grouped else None,
        group_topk=4 if family.grouped else None,
        group_score=family.group_score,
        masked_choice=family.masked_choice,
        select_on=family.select_on,
    )


def test_a_family_that_no_spec_expresses_is_refused_with_the_reason() -> None:
    refused = {name: row.reason for name, row in hf.FAMILIES.items() if isinstance(row, hf.Refused)}
    assert len(refused) == 6
    for name, reason in refused.items():
        with pytest.raises(NotImplementedError) as caught:
            jr.RoutingSpec.from_hf_config(complete(name))
        assert str(caught.value) == (
            f"model_type is {name!r}, whose router {reason}. Expected a family that a RoutingSpec expresses; write "
            "this router in JAX by itself."
        )


def test_an_object_is_read_as_a_dict_is() -> None:
    for name, row in hf.FAMILIES.items():
        if not isinstance(row, hf.Refused) and name != "dbrx":
            config = complete(name)
            assert jr.RoutingSpec.from_hf_config(SimpleNamespace(**config)) == jr.RoutingSpec.from_hf_config(config)


def test_the_text_model_of_a_model_of_many_parts_is_found() -> None:
    text = complete("qwen3_omni_moe_text")
    expected = jr.RoutingSpec(top_k=4, renormalize=True)
    for parts in (
        {"text_config": text},
        {"vision_config": {"model_type": "siglip"}, "text_config": text},
        {"thinker_config": {"model_type": "qwen3_omni_moe_thinker", "text_config": text}, "talker_config": {}},
        {"text_config": None, "llm_config": text},
        {"language_config": text},
    ):
        assert jr.RoutingSpec.from_hf_config({"model_type": "of many parts", **parts}) == expected


def test_kimi_k2_is_read_as_deepseek_v3() -> None:
    config = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid"}
    kimi = jr.RoutingSpec.from_hf_config(complete("kimi_k2", topk_method="noaux_tc", **config))
    assert kimi == jr.RoutingSpec.from_hf_config(complete("deepseek_v3", **config))
    assert kimi.scaling_factor == 2.827


def test_one_group_or_none_is_no_groups() -> None:
    for groups, kept in ((1, 1), (None, None)):
        spec = jr.RoutingSpec.from_hf_config(complete("axk2", n_group=groups, topk_group=kept))
        assert (spec.num_groups, spec.group_topk) == (None, None)
        assert spec.masked_choice == -math.inf
    one = complete("deepseek_v2", topk_method="group_limited_greedy", n_group=1, topk_group=1)
    assert jr.RoutingSpec.from_hf_config(one) == jr.RoutingSpec.from_hf_config({**one, "topk_method": "greedy"})


def test_without_renormalization_there_is_no_epsilon_and_no_minimum() -> None:
    spec = jr.RoutingSpec.from_hf_config(complete("deepseek_v3", norm_topk_prob=False))
    assert (spec.renormalize, spec.renormalize_epsilon) == (False, 0.0)


def test_no_scaling_is_one_as_mimo_has_it() -> None:
    assert jr.RoutingSpec.from_hf_config(complete("mimo_v2_flash", routed_scaling_factor=None)).scaling_factor == 1.0


def test_every_other_name_of_a_field_is_read() -> None:
    config = {"model_type": "deepseek_v3", "topk_group": 4}
    expected = jr.RoutingSpec.from_hf_config(complete("deepseek_v3"))
    names = (hf.TOP_K, hf.NORM, hf.SCALE, hf.GROUPS)
    for top_k, norm, scale, groups in itertools.product(*names):
        found = jr.RoutingSpec.from_hf_config({**config, top_k: 4, norm: True, scale: 2.5, groups: 8})
        assert found == expected


def test_a_value_per_layer_counts_if_all_layers_have_it() -> None:
    assert jr.RoutingSpec.from_hf_config(complete("hunyuan_v1_moe", num_experts_per_tok=[8, 8, 8])).top_k == 8
    with pytest.raises(NotImplementedError) as caught:
        jr.RoutingSpec.from_hf_config(complete("hunyuan_v1_moe", num_experts_per_tok=[8, 4]))
    assert str(caught.value) == (
        "num_experts_per_tok is [8, 4] in a config of 'hunyuan_v1_moe'. Expected one value for all layers; make a spec "
        "per layer, from a copy of the config with the layer's value."
    )


class PerLayer:
    """As transformers does: a field that layers override cannot be read from the whole."""

    model_type = "mixtral"

    @property
    def num_experts_per_tok(self) -> int:
        raise RuntimeError("'num_experts_per_tok' is a per-layer attribute")


@pytest.mark.parametrize(
    "config", [{**MIXTRAL, "per_layer_config": {"1": {"num_experts_per_tok": 3}}}, PerLayer()], ids=["dict", "object"]
)
def test_a_field_that_layers_override_is_refused(config: Any) -> None:
    with pytest.raises(NotImplementedError) as caught:
        jr.RoutingSpec.from_hf_config(config)
    assert str(caught.value) == (
        "num_experts_per_tok is not one value but in the config's per_layer_config. Expected one for all layers; make "
        "a spec per layer, from config.per_layer_config[layer]."
    )
    others = {**MIXTRAL, "per_layer_config": {"1": {"num_local_experts": 4}}}
    assert jr.RoutingSpec.from_hf_config(others).top_k == 2


def test_round_logits_follows_the_family() -> None:
    for name, row in hf.FAMILIES.items():
        if isinstance(row, hf.Refused):
            continue
        config, family = complete(name), next(iter(row.cases.values())) if isinstance(row, hf.Switch) else row
        assert not jr.RoutingSpec.from_hf_config(config).round_logits
        if family.precision == hf.ROUNDED_SCORES:
            with pytest.raises(NotImplementedError) as caught:
                jr.RoutingSpec.from_hf_config(config, round_logits=True)
            assert str(caught.value) == (
                f"round_logits is True but a 16-bit {name!r} rounds its scores too. Expected False, which is the model "
                "in float32; leave round_logits out."
            )
        else:
            spec = jr.RoutingSpec.from_hf_config(config, round_logits=True)
            assert spec.round_logits == (family.precision == hf.ROUNDED)
    assert {row.precision for *_, row in ROWS} == {hf.FLOAT32, hf.ROUNDED, hf.ROUNDED_SCORES}


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        (
            "deepseek_v2", {"topk_method": "noaux_tc"},
            "topk_method is 'noaux_tc' in a config of 'deepseek_v2'. Expected one of 'greedy', 'group_limited_greedy'; "
            f"see what its router does with 'noaux_tc' and {hf.BY_HAND}.",
        ),
        (
            "cohere2_moe", {"expert_selection_fn": "relu"},
            "expert_selection_fn is 'relu' in a config of 'cohere2_moe'. Expected one of 'softmax', 'sigmoid'; see "
            f"what its router does with 'relu' and {hf.BY_HAND}.",
        ),
        (
            "dbrx", {"moe_normalize_expert_weights": 2.0},
            "moe_normalize_expert_weights is 2.0 in a config of 'dbrx'. Expected one of 1.0, None; see what its router "
            f"does with 2.0 and {hf.BY_HAND}.",
        ),
        (
            "laguna", {"moe_router_logit_softcapping": 30.0},
            "moe_router_logit_softcapping is 30.0 in a config of 'laguna'. Expected 0.0; cap the logits by tanh and "
            "write this router in JAX.",
        ),
        (
            "muse_spark_text", {"output_multiplier": 0.5},
            "output_multiplier is 0.5 in a config of 'muse_spark_text'. Expected 1.0; multiply the logits and write "
            "this router in JAX.",
        ),
        (
            "gemma4_text", {"enable_moe_block": False},
            "enable_moe_block is False in a config of 'gemma4_text'. Expected True; this model has no router, pass the "
            "config of one that has.",
        ),
        (
            "qwen3_vl_moe_text", {"norm_topk_prob": False},
            "norm_topk_prob is False in a config of 'qwen3_vl_moe_text', whose router in transformers always computes "
            f"True. Expected True; see which router was meant and {hf.BY_HAND}.",
        ),
        (
            "glm4_moe", {"scoring_func": "softmax"},
            "scoring_func is 'softmax' in a config of 'glm4_moe', whose router in transformers always computes "
            f"'sigmoid'. Expected 'sigmoid'; see which router was meant and {hf.BY_HAND}.",
        ),
        (
            "deepseek_v3", {"topk_method": "greedy"},
            "topk_method is 'greedy' in a config of 'deepseek_v3', whose router in transformers always computes "
            f"'noaux_tc'. Expected 'noaux_tc'; see which router was meant and {hf.BY_HAND}.",
        ),
    ],
)  # fmt: skip
def test_a_value_that_is_not_expressed_is_refused(model_type: str, changes: dict[str, Any], message: str) -> None:
    assert isinstance(jr.RoutingSpec.from_hf_config(complete(model_type)), jr.RoutingSpec)
    with pytest.raises(NotImplementedError) as caught:
        jr.RoutingSpec.from_hf_config(complete(model_type, **changes))
    assert str(caught.value) == message


def test_an_unknown_model_type_says_what_to_set_by_hand() -> None:
    with pytest.raises(ValueError, match=r"^model_type is 'deepseek_v5'\. ") as caught:
        jr.RoutingSpec.from_hf_config({"model_type": "deepseek_v5"})
    assert str(caught.value) == (
        f"model_type is 'deepseek_v5'. Expected one of the {len(hf.FAMILIES)} of docs/models.md (close: deepseek_v4, "
        "deepseek_v3, deepseek_v2); for another router set the fields of RoutingSpec by hand (top_k, score_function, "
        "renormalize, renormalize_epsilon, renormalize_min, scaling_factor, num_groups, group_topk, group_score, "
        "masked_choice, select_on, round_logits), as its code has them."
    )
    with pytest.raises(ValueError, match=r"of docs/models\.md; for another router set the fields of RoutingSpec by "):
        jr.RoutingSpec.from_hf_config({"model_type": "zzzzzzzz"})


def test_a_missing_field_names_all_its_names() -> None:
    with pytest.raises(ValueError, match=r"^config of ") as caught:
        jr.RoutingSpec.from_hf_config({**MIXTRAL, "model_type": "qwen3_moe"})
    assert str(caught.value) == (
        "config of 'qwen3_moe' has no norm_topk_prob. Expected norm_topk_prob or moe_renormalize or route_norm; pass "
        f"the config of transformers.AutoConfig, which has the defaults, or {hf.BY_HAND}."
    )


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^num_experts_per_tok is None") as caught:
        jr.RoutingSpec.from_hf_config({**MIXTRAL, "num_experts_per_tok": None})
    assert str(caught.value) == (
        "num_experts_per_tok is None in a config of 'mixtral'. Expected the number of experts per token; this model "
        "has no experts, pass the config of one that has."
    )


@pytest.mark.parametrize(
    ("config", "was"),
    [
        ({}, "dict whose model_type is none"),
        (3, "int whose model_type is none"),
        ({"model_type": 3}, "dict whose model_type is 3"),
    ],
)
def test_what_is_no_configuration_is_refused(config: Any, was: str) -> None:
    with pytest.raises(ValueError, match=r"^config is ") as caught:
        jr.RoutingSpec.from_hf_config(config)
    assert str(caught.value) == (
        f"config is a {was}. Expected a configuration of transformers or the dict of a config.json; pass one of these."
    )


def _models_page() -> ModuleType:
    script = Path(__file__).parents[1] / "scripts" / "models_page.py"
    module_spec = importlib.util.spec_from_file_location("models_page", script)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def test_the_page_of_models_is_that_of_the_table() -> None:
    module = _models_page()
    assert module.PAGE.read_text() == module.page(), "run python scripts/models_page.py"
    for model_type in hf.FAMILIES:
        assert model_type in module.page()
