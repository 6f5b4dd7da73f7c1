"""Published routers are found by name, and every number has a source."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import jax_router as jr
from jax_router import checks
from jax_router.models import Model, UnknownModelError

# Written down a second time, from the configuration files: hidden, experts, experts per token, bias.
PUBLISHED = {
    "gpt-oss-20b": (2880, 32, 4, True),
    "gpt-oss-120b": (2880, 128, 4, True),
    "DeepSeek-V3": (7168, 256, 8, False),
    "Kimi-K2": (7168, 384, 8, False),
    "Qwen3-30B-A3B": (2048, 128, 8, False),
    "Qwen3-235B-A22B": (4096, 128, 8, False),
    "Qwen3-Next-80B-A3B": (2048, 512, 10, False),
    "Qwen3.5-397B-A17B": (4096, 512, 10, False),
    "GLM-4.5": (5120, 160, 8, False),
    "GLM-4.5-Air": (4096, 128, 8, False),
    "MiniMax-M2": (3072, 256, 8, False),
    "Mixtral-8x7B": (4096, 8, 2, False),
    "Llama-4-Maverick": (5120, 128, 1, False),
    "OLMoE-1B-7B": (2048, 64, 8, False),
    "Nemotron-3-Nano-30B-A3B": (2688, 128, 6, False),
    "DeepSeek-V2": (5120, 160, 6, False),
    "DeepSeek-V3.2": (7168, 256, 8, False),
    "DeepSeek-V4-Flash": (4096, 256, 6, False),
    "Kimi-Linear-48B-A3B": (2304, 256, 8, False),
    "GLM-5": (6144, 256, 8, False),
    "LongCat-Flash": (6144, 768, 12, False),
    "ERNIE-4.5-21B-A3B": (2560, 64, 6, False),
    "MiMo-V2-Flash": (4096, 256, 8, False),
    "LFM2-8B-A1B": (2048, 32, 4, False),
    "Hy3": (4096, 192, 8, False),
    "Gemma-4-26B-A4B": (2816, 128, 8, False),
}

_SIGMOID = {"score_function": "sigmoid", "renormalize": True}
_DEEPSEEK_V3 = {**_SIGMOID, "renormalize_epsilon": 1e-20}
# And what follows top_k, from the papers and the modeling files.
SPECS: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {"score_function": "softmax_topk"},
    "gpt-oss-120b": {"score_function": "softmax_topk"},
    "DeepSeek-V3": {**_DEEPSEEK_V3, "scaling_factor": 2.5, "num_groups": 8, "group_topk": 4},
    "Kimi-K2": {**_DEEPSEEK_V3, "scaling_factor": 2.827},
    "Qwen3-30B-A3B": {"renormalize": True},
    "Qwen3-235B-A22B": {"renormalize": True},
    "Qwen3-Next-80B-A3B": {"renormalize": True},
    "Qwen3.5-397B-A17B": {"renormalize": True},
    "GLM-4.5": {**_DEEPSEEK_V3, "scaling_factor": 2.5},
    "GLM-4.5-Air": _DEEPSEEK_V3,
    "MiniMax-M2": _SIGMOID,
    "Mixtral-8x7B": {"renormalize": True},
    "Llama-4-Maverick": {"score_function": "sigmoid"},
    "OLMoE-1B-7B": {},
    "Nemotron-3-Nano-30B-A3B": {**_DEEPSEEK_V3, "scaling_factor": 2.5},
    "DeepSeek-V2": {
        "scaling_factor": 16.0, "num_groups": 8, "group_topk": 3, "group_score": "max", "masked_choice": 0.0,
    },
    "DeepSeek-V3.2": {**_DEEPSEEK_V3, "scaling_factor": 2.5, "num_groups": 8, "group_topk": 4},
    "DeepSeek-V4-Flash": {**_DEEPSEEK_V3, "score_function": "sqrtsoftplus", "scaling_factor": 1.5},
    "Kimi-Linear-48B-A3B": {**_DEEPSEEK_V3, "scaling_factor": 2.446},
    "GLM-5": {**_DEEPSEEK_V3, "scaling_factor": 2.5},
    "LongCat-Flash": {"scaling_factor": 6.0},
    "ERNIE-4.5-21B-A3B": {"renormalize": True, "renormalize_min": 1e-12},
    "MiMo-V2-Flash": _DEEPSEEK_V3,
    "LFM2-8B-A1B": {**_SIGMOID, "renormalize_epsilon": 1e-6},
    "Hy3": {**_DEEPSEEK_V3, "scaling_factor": 2.826},
    "Gemma-4-26B-A4B": {"renormalize": True},
}  # fmt: skip


def test_the_numbers_are_those_of_the_configuration_files() -> None:
    assert {
        name: (model.hidden, model.experts, model.top_k, model.bias) for name, model in jr.models.items()
    } == PUBLISHED
    assert {name: model.spec for name, model in jr.models.items()} == {
        name: jr.RoutingSpec(top_k=PUBLISHED[name][2], **fields) for name, fields in SPECS.items()
    }


@pytest.mark.parametrize("model", jr.models.values(), ids=jr.models)
def test_every_model_names_its_source(model: Model) -> None:
    assert model.source.startswith(f"config.json of {model.repository} (hidden_size, ")
    assert model.repository.count("/") == 1
    assert len(model.read_in) > 20
    checks.spec_fits(model.spec, model.experts)
    assert jr.models[model.name] is model


def test_a_source_names_the_other_file_of_the_spec() -> None:
    source = jr.models["Qwen3-30B-A3B"].source
    assert "(hidden_size, num_experts, num_experts_per_tok, norm_topk_prob), read in the defaults of " in source
    assert source.endswith(", the spec in THUDM/slime scripts/models/qwen3-30B-A3B.sh")


def test_an_unknown_name_suggests_the_close_ones() -> None:
    with pytest.raises(UnknownModelError) as caught:
        jr.models["deepseek-v3"]
    assert isinstance(caught.value, KeyError)
    assert str(caught.value).startswith("model is 'deepseek-v3'. Expected one of gpt-oss-20b, ")
    assert str(caught.value).endswith("; did you mean DeepSeek-V3 or DeepSeek-V3.2 or DeepSeek-V2?")
    with pytest.raises(KeyError, match=r"for another model, pass its hidden and experts\.$"):
        jr.models["zzz"]


def test_models_is_a_mapping_that_cannot_be_changed() -> None:
    assert "gpt-oss-120b" in jr.models
    assert "nothing" not in jr.models
    assert jr.models.get("nothing") is None
    assert list(jr.models) == list(PUBLISHED)
    with pytest.raises(TypeError):
        jr.models["mine"] = jr.models["gpt-oss-20b"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        jr.models["gpt-oss-20b"].hidden = 1
