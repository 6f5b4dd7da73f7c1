"""A small gpt-oss model whose routing and greedy tokens are well determined, for tests with and without PyTorch."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

import ml_dtypes
import numpy as np

from examples.gpt_oss.config import Config, Yarn
from examples.gpt_oss.model import expected_tensors

CONFIG = Config(
    num_hidden_layers=3,
    num_local_experts=12,
    vocab_size=64,
    hidden_size=64,
    intermediate_size=48,
    head_dim=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=16,
    rms_norm_eps=1e-3,
    rope_theta=1e4,
    swiglu_alpha=1.3,
    swiglu_limit=0.7,
    yarn=Yarn(factor=4.0, original_max_position_embeddings=64),
    dtype="float32",
)
SEED = 83  # with PROMPT, of some thousand pairs of both one with the widest gaps
PROMPT = np.array([29, 8, 45, 54, 56, 2], np.int32)
CONTRIBUTION = 0.2  # of what a layer adds, in units of its inputs
GAP = 1.2  # of router logits, whose standard deviation is about 1: of the last selected and the first other expert
SWEEPS = 50
TOKEN_GAP = 0.9  # of logits: of the first and the second token


@functools.cache
def tensors(config: Config = CONFIG, seed: int = SEED) -> dict[str, np.ndarray]:
    """Random float32 tensors that are bfloat16 numbers, by their names in a checkpoint.

    Embeddings are moved until every router, given one alone, selects experts by GAP, and the output a token by
    TOKEN_GAP. The layers add less to them than they are, so that few of these gaps close.
    """
    random = np.random.default_rng(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = random.standard_normal(shape, np.float32)
        if "norm" in name:
            values = 1 + 0.1 * values
        elif name.endswith(("bias", "sinks")):
            values *= 0.2
        elif "embed" not in name:
            values *= shape[1] ** -0.5  # in both layouts, [O, I] and [E, I, O], axis 1 is summed over
            if "o_proj" in name or "down_proj" in name:
                values *= CONTRIBUTION
        return values

    made = {name: drawn(name, struct.shape) for name, struct in expected_tensors(config).items()}
    embeddings = made["model.embed_tokens.weight"]
    zeros = np.zeros(config.vocab_size, np.float32)
    for _ in range(SWEEPS):
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            norm = made[f"{prefix}post_attention_layernorm.weight"]
            router = made[f"{prefix}mlp.router.weight"], made[f"{prefix}mlp.router.bias"]
            _widen(embeddings, norm, *router, place=config.num_experts_per_tok, gap=GAP)
        _widen(embeddings, made["model.norm.weight"], made["lm_head.weight"], zeros, place=1, gap=TOKEN_GAP)
    return {name: array.astype(ml_dtypes.bfloat16).astype(np.float32) for name, array in made.items()}


def _widen(x: np.ndarray, norm: np.ndarray, weight: np.ndarray, bias: np.ndarray, *, place: int, gap: float) -> None:
    """Move rows of x, in place, to where the best `place` of their logits lead by the gap, or nearer to there."""
    scale = np.sqrt((x**2).mean(-1, keepdims=True))
    logits = (x / scale * norm) @ weight.T + bias
    ranked = np.argsort(-logits)
    last, first_other = ranked[:, place - 1], ranked[:, place]
    lead = np.take_along_axis(logits, ranked, -1)
    lacking = np.maximum(gap - (lead[:, place - 1] - lead[:, place]), 0)[:, None]
    direction = (weight[last] - weight[first_other]) * norm
    x += scale * lacking * direction / (direction**2).sum(-1, keepdims=True)


def hf_fields(config: Config) -> dict[str, Any]:
    """The fields of a config.json, as transformers 5 has them."""
    fields = asdict(config)
    rope = fields.pop("yarn") | {"rope_type": "yarn", "rope_theta": fields.pop("rope_theta")}
    end = list(fields.pop("eos_token_ids")) or None
    fields["layer_types"] = list(config.layer_types)
    return fields | {"model_type": "gpt_oss", "rope_parameters": rope, "eos_token_id": end}
