"""The example gpt-oss by itself: its cache, both ways through its experts, its parameters and its configuration."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpt_oss_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_router as jr
from examples.gpt_oss import generate
from examples.gpt_oss.config import Config, Yarn
from examples.gpt_oss.experts import Experts
from examples.gpt_oss.layers import Linear
from examples.gpt_oss.model import Cache, GptOss, expected_tensors, from_tensors, named_tensors

CONFIG = replace(cases.CONFIG, num_hidden_layers=2, layer_types=())
pytestmark = pytest.mark.usefixtures("compiled_in_haste")
STEPS = 40  # beyond the window, on a sliding and on a full layer
UNIT = 2.0**-24  # of float32
BFLOAT16_TO_FLOAT32 = 2.0**-15  # of their units


def model(dtype: str = "float32", config: Config = CONFIG, **options: Any) -> GptOss:
    tensors = {name: jnp.asarray(array).astype(dtype) for name, array in cases.tensors(config).items()}
    return from_tensors(config, tensors, dtype=dtype, **options)


def full_forward(of: GptOss, ids: np.ndarray) -> np.ndarray:
    """Logits `[B, T, V]` without a cache."""
    graph, state = nnx.split(of)
    return np.asarray(jax.jit(lambda state, ids: nnx.merge(graph, state)(ids).logits)(state, ids), np.float32)


def test_decoding_with_the_cache_is_a_full_forward() -> None:
    """Two sequences, whose pairs are sorted by expert; those of the one in tests/test_gpt_oss.py are gathered.

    Both programs round where the model in bfloat16 does, and its distance to float32 tells what that comes to with its
    larger unit. In float32 each step of a sum rounds too, of 64 terms to sqrt(64) times the error of one rounding.
    """
    prompt = np.stack((cases.PROMPT, cases.PROMPT[::-1]))
    decoder = generate.Decoder(model(), length=prompt.shape[1] + STEPS - 1)
    decoded = list(decoder.decode(prompt))
    assert all(each.cache.layers[0].keys.is_deleted() for each in decoded[:-1]), "a step copies the cache"
    tokens, logits = (np.stack(each, axis=1) for each in zip(*(each[:2] for each in decoded), strict=True))
    ids = np.concatenate((prompt, tokens), axis=1)
    full = full_forward(model(), ids)
    slack = 2 * 64**0.5 * BFLOAT16_TO_FLOAT32 * np.abs(full_forward(model("bfloat16"), ids) - full).max()
    behind_the_prompt = full[:, prompt.shape[1] - 1 : -1]
    assert np.abs(logits - behind_the_prompt).max() <= slack
    np.testing.assert_array_equal(tokens, behind_the_prompt.argmax(-1))
    assert tokens.shape == (2, STEPS)
    assert len(np.unique(tokens)) > 4


@pytest.mark.parametrize("tokens", [1, 2], ids=["gathered", "sorted"])
def test_both_ways_through_the_experts_are_within_the_bound_of_their_rounding(tokens: int) -> None:
    """Against float64, with the error that every float32 operation can have carried to the result.

    A sum of n products is off by at most (n + 1) units of the sum of their magnitudes. The slope of gate sigmoid(alpha
    gate) is at most 1.1, and XLA's sigmoid is good to 4 units, as are the products behind it together.
    """
    config = replace(CONFIG, swiglu_limit=7.0, swiglu_alpha=1.702)
    experts = Experts(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    first, first_bias, second, second_bias = 2 * drawn(12, 64, 96), drawn(12, 96), drawn(12, 48, 64), drawn(12, 64)
    for variable, value in zip(
        (experts.gate_up_proj, experts.gate_up_proj_bias, experts.down_proj, experts.down_proj_bias),
        (first, first_bias, second, second_bias),
        strict=True,
    ):
        variable[...] = jnp.asarray(value)
    x, weights = drawn(tokens, 64), random.uniform(0.1, 1, (tokens, 4)).astype(np.float32)
    chosen = np.argsort(random.random((tokens, 12)))[:, :4].astype(np.int32)
    traced = jax.jit(lambda *operands: nnx.merge(*nnx.split(experts))(*operands)).trace(x, chosen, weights)
    assert ("ragged_dot" in str(traced.jaxpr)) == (3 * tokens * 4 > 12)
    computed = np.asarray(traced.lower().compile()(x, chosen, weights), np.float64)

    exact, bound = np.zeros((2, tokens, 64))
    clamped = 0
    for token, place in np.ndindex(tokens, 4):
        expert, weight, row = chosen[token, place], float(weights[token, place]), x[token].astype(np.float64)
        into, bias, out, last_bias = (
            each[expert].astype(np.float64) for each in (first, first_bias, second, second_bias)
        )
        gate_up = row @ into + bias
        error = (64 + 2) * UNIT * (np.abs(row) @ np.abs(into) + np.abs(bias))
        gate, up = np.minimum(gate_up[::2], 7), np.clip(gate_up[1::2], -7, 7)
        clamped += (gate_up[::2] > 7).sum() + (np.abs(gate_up[1::2]) > 7).sum()
        swish = gate / (1 + np.exp(-1.702 * gate))
        active = (up + 1) * swish
        error = np.abs(up + 1) * 1.1 * error[::2] + np.abs(swish) * error[1::2] + 8 * UNIT * np.abs(active)
        exact[token] += weight * (active @ out + last_bias)
        magnitude = np.abs(active) @ np.abs(out) + np.abs(last_bias)
        bound[token] += weight * (error @ np.abs(out) + (48 + 2 + 5) * UNIT * magnitude)
    assert clamped > 10
    assert (np.abs(computed - exact) <= bound).all()


def test_experts_of_no_tokens_return_none() -> None:
    experts = Experts(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert experts(jnp.zeros((0, 64)), jnp.zeros((0, 4), int), jnp.zeros((0, 4))).shape == (0, 64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_linear_layer_rounds_once_behind_its_bias(dtype: str) -> None:
    """Bit for bit: integers up to 2**24 are exact in float32, in any order of the sums.

    The products are beyond what dtype holds exactly, so a result that is rounded before the bias too is another one.
    """
    random = np.random.default_rng(0)
    x, weight, bias = (random.integers(-50, 51, shape).astype(np.float64) for shape in ((3, 5, 64), (48, 64), (48,)))
    linear = Linear(64, 48, deviation=1.0, dtype=dtype, rngs=nnx.Rngs(0))
    linear.weight[...], linear.bias[...] = (jnp.asarray(each, dtype) for each in (weight, bias))
    found = linear(jnp.asarray(x, dtype))
    product = x @ weight.T
    once, twice = (product + bias).astype(found.dtype), (product.astype(found.dtype) + bias).astype(found.dtype)
    assert (once != twice).any()
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, once)
    without = Linear(64, 48, bias=False, deviation=1.0, dtype=dtype, rngs=nnx.Rngs(0))
    without.weight[...] = linear.weight[...]
    np.testing.assert_array_equal(without(jnp.asarray(x, dtype)), product.astype(found.dtype))


@pytest.mark.parametrize("rounded", [False, True])
def test_logits_and_weights_are_rounded_to_the_dtype_of_the_model_on_request_alone(rounded: bool) -> None:
    mlp = model("bfloat16", round_logits=rounded, implementation="xla").model.layers[0].mlp
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 64)), jnp.bfloat16)
    mixed, routing = mlp(x)
    logits = jr.router_gemm(x[0], mlp.router.kernel[...], mlp.router.bias[...], implementation="xla")
    if rounded:
        logits = jax.lax.reduce_precision(logits, 8, 7)
    highest, experts = jax.lax.top_k(logits, 4)
    np.testing.assert_array_equal(routing.experts, experts)
    np.testing.assert_allclose(routing.weights, jax.nn.softmax(highest), rtol=8 * UNIT)  # exp, sum and division
    weights = routing.weights.astype(jnp.bfloat16 if rounded else jnp.float32)
    np.testing.assert_array_equal(mixed[0], mlp.experts(x[0], experts, weights))


def test_parameters_are_named_and_laid_out_as_in_a_checkpoint() -> None:
    expected = expected_tensors(CONFIG, "bfloat16")
    assert len(expected) == 3 + 2 * 17
    assert {name: each.shape for name, each in expected.items() if ".1.mlp." in name} == {
        "model.layers.1.mlp.router.weight": (12, 64),
        "model.layers.1.mlp.router.bias": (12,),
        "model.layers.1.mlp.experts.gate_up_proj": (12, 64, 96),
        "model.layers.1.mlp.experts.gate_up_proj_bias": (12, 96),
        "model.layers.1.mlp.experts.down_proj": (12, 48, 64),
        "model.layers.1.mlp.experts.down_proj_bias": (12, 64),
    }
    assert {each.dtype for each in expected.values()} == {jnp.dtype("bfloat16")}
    for name, array in named_tensors(model()).items():
        np.testing.assert_array_equal(array, cases.tensors(CONFIG)[name])


def test_generation_stops_when_every_sequence_has_ended() -> None:
    prompt = np.stack((cases.PROMPT, cases.PROMPT[::-1]))
    made = generate.generate(model(), prompt, STEPS)
    end = {int(made[0, 3]), int(made[1, 5])}
    first = [min(step for step, token in enumerate(row) if token in end) for row in made]
    stopped = generate.generate(model(), prompt, STEPS, end=end)
    np.testing.assert_array_equal(stopped, made[:, : max(first) + 1])


@pytest.mark.parametrize(
    ("prompt", "steps", "message"),
    [
        (np.array([1, 2]), 1, r"prompt is int64 of shape \(2,\). Expected integers \[B, T\]"),
        (np.zeros((1, 0), int), 1, r"prompt is int64 of shape \(1, 0\)"),
        (np.ones((1, 2)), 1, r"prompt is float64 of shape \(1, 2\)"),
        (np.array([[0, 64]]), 1, r"prompt has ids from 0 to 64. Expected ids in \[0, 64\)"),
        (np.array([[-1, 3]]), 1, r"prompt has ids from -1 to 3"),
        (np.array([[1]]), 0, "steps is 0. Expected at least 1"),
    ],
)
def test_a_prompt_that_makes_no_sense_is_refused(prompt: np.ndarray, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate.generate(model(), prompt, steps)


@pytest.mark.parametrize(
    ("batch", "tokens", "options", "message"),
    [
        (1, 9, {"cache": (1, 8)}, r"ids has shape \(1, 9\) but cache is for 1 sequences of 8 tokens"),
        (2, 3, {"cache": (1, 8)}, r"ids has shape \(2, 3\) but cache is for 1 sequences of 8 tokens"),
        (
            1,
            2,
            {"cache": (1, 8), "decode": True},
            r"decode is True with ids of shape \(1, 2\). Expected a cache and ids",
        ),
        (1, 1, {"decode": True}, "decode is True without a cache. Expected a cache and ids"),
    ],
)
def test_a_call_with_the_wrong_cache_is_refused(batch: int, tokens: int, options: dict, message: str) -> None:
    if "cache" in options:
        options = options | {"cache": Cache.empty(CONFIG, *options["cache"], "float32")}
    with pytest.raises(ValueError, match=message):
        model()(jnp.zeros((batch, tokens), int), **options)


@pytest.mark.parametrize("shape", [(1, 9), (1, 0), (3,)])
def test_a_decoder_refuses_a_prompt_that_is_none_or_does_not_fit(shape: tuple[int, ...]) -> None:
    decoder = generate.Decoder(model(), length=8)
    with pytest.raises(
        ValueError, match=rf"prompt has shape {re.escape(str(shape))}. Expected \[B, T\] of 1 to 8 tokens"
    ):
        next(decoder.decode(np.zeros(shape, int)))


PUBLISHED = {  # as in the config.json of openai/gpt-oss-20b
    "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"}, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "vocab_size": 201088,
}  # fmt: skip


def test_the_default_config_is_that_of_gpt_oss_20b_as_it_is_published() -> None:
    assert Config.from_hf(PUBLISHED) == replace(Config(), eos_token_ids=(200002,))


def test_a_config_is_what_it_was_before_it_was_written(tmp_path: Path) -> None:
    config = replace(CONFIG, eos_token_ids=(3, 4), yarn=Yarn(8.0, 32, truncate=True, attention_factor=1.5))
    (tmp_path / "config.json").write_text(json.dumps(cases.hf_fields(config)))
    assert Config.read(tmp_path) == config


ROPE = PUBLISHED["rope_scaling"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'. Expected 'gpt_oss'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'. Expected 'silu'"),
        ({"attention_bias": False}, "attention_bias is False. Expected True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True. Expected False"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method is 'gptq'"),
        ({"hidden_size": None, "head_dim": None}, "hidden_size, head_dim is None. Expected a positive integer each"),
        ({"hidden_size": "2880"}, "hidden_size is '2880'. Expected a positive integer"),
        ({"head_dim": 63}, "head_dim is 63. Expected an even number"),
        ({"num_key_value_heads": 7}, "num_key_value_heads is 7. Expected a divisor of num_attention_heads=64"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok is 33. Expected at most num_local_experts=32"),
        ({"num_hidden_layers": 23}, r"layer_types is \['sliding_attention'.*Expected 23 \(num_hidden_layers\) times"),
        ({"layer_types": ["linear_attention"] * 24}, "layer_types is .*Expected 24"),
        ({"torch_dtype": "float8"}, "dtype is 'float8'. Expected one of float32, bfloat16, float16"),
        ({"rope_scaling": {**ROPE, "rope_type": "llama3"}}, "rope_scaling.rope_type is 'llama3'"),
        ({"rope_scaling": {**ROPE, "mscale": 0.7}}, "rope_scaling.mscale is 0.7. Expected none"),
        ({"rope_scaling": None, "rope_parameters": {"all": ROPE}}, "rope_parameters.all is 'a dict'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor, rope_scaling.original_max_pos"),
        ({"rope_scaling": ["a"]}, r"rope_scaling is \['a'\]. Expected an object"),
        ({"rope_scaling": None, "rope_parameters": "yarn"}, "rope_parameters is 'yarn'. Expected an object"),
        ({"rope_scaling": {**ROPE, "factor": "32"}}, "rope_scaling.factor is '32'. Expected a number of at least 1"),
        ({"rope_scaling": {**ROPE, "factor": 0.5}}, "rope_scaling.factor is 0.5. Expected a number of at least 1"),
        (
            {"rope_scaling": {**ROPE, "original_max_position_embeddings": 0.5}},
            "rope_scaling.original_max_position_embeddings is 0.5. Expected a positive integer",
        ),
        ({"rope_scaling": {**ROPE, "beta_fast": True}}, "rope_scaling.beta_fast is True. Expected a positive number"),
        ({"rope_scaling": {**ROPE, "beta_slow": 0}}, "rope_scaling.beta_slow is 0. Expected a positive number"),
        ({"rope_scaling": {**ROPE, "truncate": 1}}, "rope_scaling.truncate is 1. Expected True or False"),
        ({"rope_scaling": {**ROPE, "attention_factor": "1"}}, "rope_scaling.attention_factor is '1'. Expected a pos"),
        ({"rope_scaling": {**ROPE, "partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor is 0.5. Expec"),
        ({"original_max_position_embeddings": 8192}, "original_max_pos.* is 8192. Expected none, or that of rope_sc"),
        ({"rope_scaling": None, "original_max_position_embeddings": 8192}, "original_max_pos.* is 8192. Expected none"),
        ({"dtype": "auto", "torch_dtype": "float32"}, "dtype is 'auto'. Expected one of float32"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5. Expected 1.0 or none"),
        ({"rope_theta": "x"}, "rope_theta is 'x'. Expected a number above 1"),
        ({"rope_theta": -1}, "rope_theta is -1. Expected a number above 1"),
        ({"rope_theta": float("nan")}, "rope_theta is nan. Expected a number above 1"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'. Expected a positive number"),
        ({"swiglu_limit": "7"}, "swiglu_limit is '7'. Expected a positive number"),
        ({"swiglu_alpha": -1}, "swiglu_alpha is -1. Expected a positive number"),
        ({"initializer_range": [0]}, r"initializer_range is \[0\]. Expected a positive number"),
        ({"vocab_size": True}, "vocab_size is True. Expected a positive integer"),
        ({"layer_types": 5}, "layer_types is 5. Expected a list of"),
        ({"layer_types": [{}] * 24}, "layer_types is .*Expected 24"),
        ({"quantization_config": "mxfp4"}, "quantization_config is 'mxfp4'. Expected an object"),
        ({"eos_token_id": "a"}, r"eos_token_id is \['a'\]. Expected token ids"),
        ({"eos_token_id": [1, -2]}, r"eos_token_id is \[1, -2\]. Expected token ids"),
    ],
)
def test_a_config_that_the_model_cannot_compute_is_refused(tmp_path: Path, changed: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | changed))
    with pytest.raises(ValueError, match=r"config\.json: " + message):
        Config.read(tmp_path)


@pytest.mark.parametrize(
    "changed", [{"partial_rotary_factor": 1.0}, {"rope_scaling": {**ROPE, "partial_rotary_factor": 1}}]
)
def test_all_dimensions_of_a_head_may_turn_explicitly(changed: dict) -> None:
    assert Config.from_hf(PUBLISHED | changed) == Config.from_hf(PUBLISHED)


def test_the_dtype_is_that_of_the_older_field_where_the_newer_one_is_null_or_missing() -> None:
    for fields in ({"torch_dtype": "float16"}, {"torch_dtype": "float16", "dtype": None}):
        assert Config.from_hf(PUBLISHED | fields).dtype == "float16"
    assert Config.from_hf(PUBLISHED | {"torch_dtype": "float16", "dtype": "float32"}).dtype == "float32"


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("{", "cannot be read"), ("[]", "holds a list")]
)
def test_a_config_json_that_is_none_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json {message}"):
        Config.read(tmp_path)


def test_the_code_of_the_page_runs() -> None:
    page = Path(__file__).parent.parent / "docs" / "gpt_oss.md"
    [block] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, str(page), "exec"), {})
