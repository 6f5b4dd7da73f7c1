"""What the routers of Hugging Face transformers compute: one row per family, and the RoutingSpec of a configuration.

The rows were read in the modeling files of transformers 5.23; tests/test_hf_routers.py compares every one with the
PyTorch module. docs/models.md shows them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax_router.routing import RoutingSpec

# The fields of config.json, each under all the names that families have for it.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
NORM = ("norm_topk_prob", "moe_renormalize", "route_norm")
SCALE = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
GROUPS, GROUP_TOPK = ("n_group", "num_expert_group"), ("topk_group",)
SCORING = ("scoring_func", "score_func", "score_function", "moe_router_activation", "moe_router_activation_func")
PARTS = ("text_config", "thinker_config", "language_config", "llm_config")  # where a model of many parts has its text

# How a 16-bit model of the family computes its router.
FLOAT32 = "float32"  # x and weight are widened first
ROUNDED = "rounded logits"  # a 16-bit linear layer, float32 from there on, or 16 bits after the selection alone
ROUNDED_SCORES = "rounded scores"  # the scores are in 16 bits too, before the selection or the division

Field = tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """The router of a family: the fields of a RoutingSpec, each a value or the config.json field that has it."""

    score_function: str
    renormalize: bool | Field = False
    epsilon: float = 0.0
    minimum: float | Field = 0.0
    scaling: float | Field = 1.0  # not what a block multiplies the summed experts with
    over_top_k: bool = False  # the weights are divided by top_k
    grouped: bool = False
    group_score: str = "top2_sum"
    masked_choice: float = -math.inf
    select_on: str = "scores"
    precision: str = ROUNDED
    only: tuple[tuple[str, Any, str], ...] = ()  # field, the one value that is expressed, what to do with another


@dataclass(frozen=True)
class Switch:
    """A family whose router depends on the value of a field."""

    field: str
    cases: Mapping[Any, Family]


@dataclass(frozen=True)
class Refused:
    """A family that no RoutingSpec expresses, and why: completes "its router ..."."""

    reason: str


SOFTMAX = Family("softmax")
SOFTMAX_NORM = Family("softmax", renormalize=True)
SOFTMAX_MAYBE_NORM = Family("softmax", renormalize=NORM)
SOFTMAX_TOPK = Family("softmax_topk")
SIGMOID_NORM = Family("sigmoid", renormalize=True)
SIGMOID_SCALED = Family("sigmoid", renormalize=True, epsilon=1e-20, scaling=SCALE)
DEEPSEEK_V2 = Switch(
    "topk_method",
    {
        "greedy": Family("softmax", scaling=SCALE, precision=FLOAT32),
        "group_limited_greedy": Family(
            "softmax", scaling=SCALE, grouped=True, group_score="max", masked_choice=0.0, precision=FLOAT32
        ),
    },
)
DEEPSEEK_V3 = Family("sigmoid", renormalize=NORM, epsilon=1e-20, scaling=SCALE, grouped=True, precision=FLOAT32)
ERNIE = Family("softmax", renormalize=True, minimum=("moe_norm_min",), precision=FLOAT32)

FAMILIES: Mapping[str, Family | Switch | Refused] = {
    "afmoe": SIGMOID_SCALED,
    "aria_text": SOFTMAX_TOPK,
    "axk1": DEEPSEEK_V3,
    "axk2": Family(
        "sigmoid", renormalize=NORM, epsilon=1e-20, scaling=SCALE, grouped=True, masked_choice=0.0, precision=FLOAT32
    ),
    "bailing_hybrid": DEEPSEEK_V3,
    "beam": Family("sigmoid", renormalize=NORM, epsilon=1e-20, grouped=True, precision=FLOAT32),
    "cohere2_moe": Switch(
        "expert_selection_fn",
        {"softmax": SOFTMAX_TOPK, "sigmoid": Family("sigmoid", renormalize=NORM, precision=ROUNDED_SCORES)},
    ),
    # A norm of order 1 is the sum, as the weights are positive.
    "dbrx": Switch(
        "moe_normalize_expert_weights",
        {
            1.0: Family("softmax", renormalize=True, precision=ROUNDED_SCORES),
            None: Family("softmax", precision=ROUNDED_SCORES),
        },
    ),
    "deepseek_ocr2_text": DEEPSEEK_V2,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": DEEPSEEK_V3,
    # Both of its routers: the hash layers are the replay of a table's experts.
    "deepseek_v4": Switch(
        "scoring_func",
        {
            name: Family(name, renormalize=True, epsilon=1e-20, scaling=SCALE, precision=ROUNDED_SCORES)
            for name in ("sqrtsoftplus", "sigmoid")
        },
    ),
    "diffusion_gemma_text": SOFTMAX_NORM,
    "dots1": DEEPSEEK_V3,
    "dots3_note_text": DEEPSEEK_V3,
    "dots3_note_vision_encoder": Family(
        "sigmoid", renormalize=True, epsilon=1e-20, scaling=SCALE, precision=FLOAT32
    ),
    "doge": Refused("takes the top-k twice, of two halves of the keys and of their sums"),
    "ernie4_5_moe": ERNIE,
    "ernie4_5_vl_moe_text": ERNIE,
    "exaone_moe": DEEPSEEK_V3,
    "flex_olmo": SOFTMAX_MAYBE_NORM,
    "flint": Family("sigmoid", renormalize=NORM, precision=FLOAT32),
    # On the states behind the router's own norm and scale, with per_expert_scale as expert_scale.
    "gemma4_text": Family(
        "softmax", renormalize=True,
        only=(("enable_moe_block", True, "this model has no router, pass the config of one that has"),),
    ),
    "glm4_moe": DEEPSEEK_V3,
    "glm4_moe_lite": DEEPSEEK_V3,
    "glm4v_moe_text": DEEPSEEK_V3,
    "glm5_next_text": DEEPSEEK_V3,
    "glm_moe_dsa": DEEPSEEK_V3,
    "gpt_oss": SOFTMAX_TOPK,
    "granitemoe": SOFTMAX_TOPK,
    "granitemoe_swa": SOFTMAX_TOPK,
    "granitemoehybrid": SOFTMAX_TOPK,
    "granitemoeshared": SOFTMAX_TOPK,
    "hunyuan_v1_moe": SOFTMAX_NORM,
    "hy_v3": Family("sigmoid", renormalize=True, epsilon=1e-20, scaling=SCALE, precision=FLOAT32),
    "hy_v4": DEEPSEEK_V3,
    "inkling2_text": Switch(
        "scoring_func",
        {
            name: Family(name, renormalize=True, epsilon=1e-20, scaling=SCALE, precision=FLOAT32)
            for name in ("sigmoid", "sqrtsoftplus")
        },
    ),
    "inkling_text": Refused("normalizes the selected experts together with the shared ones"),
    "jamba": SOFTMAX,
    "jetmoe": SOFTMAX_TOPK,
    "kimi_k2": DEEPSEEK_V3,  # the name in the config.json of Kimi-K2, which transformers reads as deepseek_v3
    "kimi_linear": DEEPSEEK_V3,
    "kolibri1": Family("sigmoid", renormalize=NORM, select_on="logits", precision=FLOAT32),
    "laguna": Family(
        "sigmoid", renormalize=True,
        only=(("moe_router_logit_softcapping", 0.0, "cap the logits by tanh and write this router in JAX"),),
    ),
    "lfm2_moe": Family("sigmoid", renormalize=NORM, epsilon=1e-6, scaling=SCALE, precision=ROUNDED_SCORES),
    "llama4_text": Family("sigmoid"),
    "longcat_flash": Family("softmax", scaling=SCALE, precision=FLOAT32),
    "mellum": SOFTMAX_MAYBE_NORM,
    "mimo_v2_flash": DEEPSEEK_V3,
    "minimax": SOFTMAX_NORM,
    "minimax_m2": SIGMOID_NORM,
    "minimax_m3_vl_text": SIGMOID_NORM,
    "mistral4": Family(
        "softmax", renormalize=NORM, epsilon=1e-20, scaling=SCALE, grouped=True, masked_choice=0.0,
        precision=ROUNDED_SCORES,
    ),
    "mistral_large4_text": Family(
        "softmax", renormalize=True, epsilon=1e-20, scaling=SCALE, grouped=True, masked_choice=0.0, precision=FLOAT32
    ),
    "mixtral": SOFTMAX_NORM,
    "muse_spark_text": Family(
        "sigmoid", renormalize=True, epsilon=1e-15, scaling=SCALE, precision=FLOAT32,
        only=(("output_multiplier", 1.0, "multiply the logits and write this router in JAX"),),
    ),
    "nemotron_h": DEEPSEEK_V3,
    "nllb-moe": Refused("drops tokens beyond an expert's capacity, so that a token's experts depend on its batch"),
    "olmoe": SOFTMAX_MAYBE_NORM,
    "openai_privacy_filter": Family("softmax_topk", over_top_k=True, precision=FLOAT32),
    "phimoe": Refused("picks one expert after the other by sparsemixer, each weight a softmax over other experts"),
    "qwen2_moe": SOFTMAX_MAYBE_NORM,
    "qwen3_5_moe_text": SOFTMAX_NORM,
    "qwen3_moe": SOFTMAX_MAYBE_NORM,
    "qwen3_next": SOFTMAX_MAYBE_NORM,
    "qwen3_omni_moe_talker_text": SOFTMAX_MAYBE_NORM,
    "qwen3_omni_moe_text": SOFTMAX_MAYBE_NORM,
    "qwen3_vl_moe_text": SOFTMAX_NORM,
    "qwen4_exp_text": SOFTMAX_MAYBE_NORM,
    "solar_open": DEEPSEEK_V3,
    "step3p5": SIGMOID_NORM,
    "switch_transformers": Refused(
        "drops tokens beyond an expert's capacity, so that a token's experts depend on its batch"
    ),
    "unlimited_ocr_text": DEEPSEEK_V2,
    "zaya": Refused("is a network with a state that goes from layer to layer, and one of its choices is no expert"),
}  # fmt: skip

_ABSENT = object()


def spec_from_hf_config(config: Any, round_logits: bool = False) -> RoutingSpec:
    """What `RoutingSpec.from_hf_config` returns; its docstring is the contract."""
    model_type, part = text_model(config)
    row = FAMILIES[model_type]
    if isinstance(row, Refused):
        raise NotImplementedError(
            f"model_type is {model_type!r}, whose router {row.reason}. Expected a family that a RoutingSpec expresses; "
            "write this router in JAX by itself."
        )
    if isinstance(row, Switch):
        value = read_field(part, model_type, (row.field,))
        if value not in row.cases:
            raise NotImplementedError(
                f"{row.field} is {value!r} in a config of {model_type!r}. Expected one of "
                f"{', '.join(map(repr, row.cases))}; see what its router does with {value!r} and {BY_HAND}."
            )
        row = row.cases[value]
    for field, expressed, remedy in row.only:
        value = read_field(part, model_type, (field,))
        if value != expressed:
            raise NotImplementedError(
                f"{field} is {value!r} in a config of {model_type!r}. Expected {expressed!r}; {remedy}."
            )
    _contradictions(part, model_type, row)
    if round_logits and row.precision == ROUNDED_SCORES:
        raise NotImplementedError(
            f"round_logits is True but a 16-bit {model_type!r} rounds its scores too. Expected False, which is the "
            "model in float32; leave round_logits out."
        )

    def value_of(name: Any) -> Any:
        return read_field(part, model_type, name) if isinstance(name, tuple) else name

    top_k, scaling, groups = value_of(TOP_K), value_of(row.scaling), value_of(GROUPS) if row.grouped else None
    if top_k is None:
        raise ValueError(
            f"{TOP_K[0]} is None in a config of {model_type!r}. Expected the number of experts per token; this model "
            "has no experts, pass the config of one that has."
        )
    if groups == 1:
        groups = None
    return RoutingSpec(
        top_k=top_k,
        score_function=row.score_function,
        renormalize=(renormalize := value_of(row.renormalize)),
        renormalize_epsilon=row.epsilon if renormalize else 0.0,
        renormalize_min=value_of(row.minimum) if renormalize else 0.0,
        scaling_factor=1.0 / top_k if row.over_top_k else 1.0 if scaling is None else scaling,
        num_groups=groups,
        group_topk=None if groups is None else value_of(GROUP_TOPK),
        group_score=row.group_score if groups is not None else "top2_sum",
        masked_choice=row.masked_choice if groups is not None else -math.inf,
        select_on=row.select_on,
        round_logits=round_logits and row.precision == ROUNDED,
    )


BY_HAND = f"set the fields of RoutingSpec by hand ({', '.join(RoutingSpec.__dataclass_fields__)})"


def _get(config: Any, name: str) -> Any:
    """A field of a configuration, or _ABSENT."""
    if isinstance(config, Mapping):
        overrides = config.get("per_layer_config") or {}
        if not any(name in layer for layer in overrides.values()):
            return config.get(name, _ABSENT)
    else:
        try:
            return getattr(config, name, _ABSENT)
        except RuntimeError:  # of transformers, for a field that layers override
            pass
    raise NotImplementedError(
        f"{name} is not one value but in the config's per_layer_config. Expected one for all layers; make a spec per "
        "layer, from config.per_layer_config[layer]."
    )


def text_model(config: Any) -> tuple[str, Any]:
    """The model_type in the table, and the part of the configuration that has the router's fields."""
    model_type = _get(config, "model_type")
    if not isinstance(model_type, str):
        found = "none" if model_type is _ABSENT else repr(model_type)
        raise ValueError(
            f"config is a {type(config).__name__} whose model_type is {found}. Expected a configuration of "
            "transformers or the dict of a config.json; pass one of these."
        )
    if model_type in FAMILIES:
        return model_type, _get(config, "ffn_config") if model_type == "dbrx" else config
    for name in PARTS:
        part = _get(config, name)
        if part is not _ABSENT and part is not None:
            return text_model(part)
    close = difflib.get_close_matches(model_type, FAMILIES, 3)
    hint = f" (close: {', '.join(close)})" if close else ""
    raise ValueError(
        f"model_type is {model_type!r}. Expected one of the {len(FAMILIES)} of docs/models.md{hint}; for another "
        f"router {BY_HAND}, as its code has them."
    )


def read_field(config: Any, model_type: str, names: Field) -> Any:
    """The value of a field under any of its names; of a list with one value per layer, the one that all layers have."""
    value = next((found for name in names if (found := _get(config, name)) is not _ABSENT), _ABSENT)
    if value is _ABSENT:
        raise ValueError(
            f"config of {model_type!r} has no {names[0]}. Expected {' or '.join(names)}; pass the config of "
            f"transformers.AutoConfig, which has the defaults, or {BY_HAND}."
        )
    if isinstance(value, list | tuple):
        if len(set(value)) != 1:
            raise NotImplementedError(
                f"{names[0]} is {value!r} in a config of {model_type!r}. Expected one value for all layers; make a "
                "spec per layer, from a copy of the config with the layer's value."
            )
        return value[0]
    return value


def _contradictions(config: Any, model_type: str, row: Family) -> None:
    """Refuse a field that the family's router does not read, if it asks for another computation than the router's."""
    fixed: list[tuple[str, Any]] = [(name, row.score_function.removesuffix("_topk")) for name in SCORING]
    if row.score_function != "softmax_topk" and isinstance(row.renormalize, bool):
        fixed += [(name, row.renormalize) for name in NORM]
    if row.score_function == "sigmoid" and row.grouped:
        fixed += [("topk_method", "noaux_tc")]
    for name, expected in fixed:
        value = _get(config, name)
        if value not in (_ABSENT, None, expected):
            raise NotImplementedError(
                f"{name} is {value!r} in a config of {model_type!r}, whose router in transformers always computes "
                f"{expected!r}. Expected {expected!r}; see which router was meant and {BY_HAND}."
            )
