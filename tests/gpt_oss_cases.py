"""A small gpt-oss model whose routing and greedy tokens are well determined, for tests with and without PyTorch."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from examples.gpt_oss.config import Config, Yarn
from examples.gpt_oss.model import expected_tensors

CONFIG = Config(
    num_hidden_layers=3,
    num_local_experts=12,
    vocab_size=96,
    hidden_size=64,
    intermediate_size=48,
    head_dim=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=16,
    yarn=Yarn(factor=4.0, original_max_position_embeddings=64),
    dtype="float32",
)
SEED = 0
CONTRIBUTION = 0.35  # of what a layer adds, in units of its inputs
GAP = 0.35  # between the last selected and the first other expert of a bare embedding, in standard deviations of logits
TOKEN_GAP = 0.8


def tensors(config: Config = CONFIG, seed: int = SEED) -> dict[str, np.ndarray]:
    """Random float32 tensors that are bfloat16 numbers, by their names in a checkpoint.

    An embedding is drawn again until every router, given it alone, tells the experts that it selects from the others by
    GAP; the layers add less to it than it is, so that most of that gap is left when rounding comes to it.
    """
    random = np.random.default_rng(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = random.standard_normal(shape)
        if "norm" in name:
            values = 1 + 0.1 * values
        elif name.endswith(("bias", "sinks")):
            values *= 0.2
        elif "embed" not in name:
            values *= shape[1] ** -0.5  # in both layouts, [O, I] and [E, I, O], axis 1 is summed over
            if "o_proj" in name or "down_proj" in name:
                values *= CONTRIBUTION
        return values.astype(ml_dtypes.bfloat16).astype(np.float32)

    made = {name: drawn(name, struct.shape) for name, struct in expected_tensors(config).items()}
    embeddings = np.empty((0, config.hidden_size), np.float32)
    while len(embeddings) < config.vocab_size:
        candidates = drawn("embed", (4096, config.hidden_size))
        embeddings = np.concatenate((embeddings, candidates[_told_apart(candidates, made, config.num_experts_per_tok)]))
    return made | {"model.embed_tokens.weight": embeddings[: config.vocab_size]}


def _told_apart(embeddings: np.ndarray, made: dict[str, np.ndarray], top_k: int) -> np.ndarray:
    """Whether each embedding, with nothing added, has experts and a next token that lead by GAP and TOKEN_GAP."""
    normed = embeddings / np.sqrt((embeddings**2).mean(-1, keepdims=True))
    ranked = np.sort((normed * made["model.norm.weight"]) @ made["lm_head.weight"].T)
    told_apart = ranked[:, -1] - ranked[:, -2] > TOKEN_GAP
    for name in made:
        if name.endswith("router.weight"):
            norm = made[name.replace("mlp.router", "post_attention_layernorm")]
            ranked = np.sort((normed * norm) @ made[name].T + made[name.replace("weight", "bias")])
            told_apart &= ranked[:, -top_k] - ranked[:, -top_k - 1] > GAP
    return told_apart
