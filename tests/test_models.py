"""Published routers are found by name, and every number has a source."""

from __future__ import annotations

import dataclasses

import pytest

import jax_router as jr
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
}


def test_the_numbers_are_those_of_the_configuration_files() -> None:
    assert {
        name: (model.hidden, model.experts, model.top_k, model.bias) for name, model in jr.models.items()
    } == PUBLISHED


@pytest.mark.parametrize("model", jr.models.values(), ids=jr.models)
def test_every_model_names_its_source(model: Model) -> None:
    assert model.source.startswith(f"config.json of {model.repository} (hidden_size, ")
    assert model.repository.count("/") == 1
    assert len(model.read_in) > 20
    assert 1 <= model.top_k <= model.experts
    assert jr.models[model.name] is model


def test_an_unknown_name_suggests_the_close_ones() -> None:
    with pytest.raises(UnknownModelError) as caught:
        jr.models["deepseek-v3"]
    assert isinstance(caught.value, KeyError)
    assert str(caught.value).startswith("model is 'deepseek-v3'. Expected one of gpt-oss-20b, ")
    assert str(caught.value).endswith("; did you mean DeepSeek-V3?")
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
