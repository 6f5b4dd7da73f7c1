"""The dimensions of a gpt-oss model, read from the config.json of a Hugging Face checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax_router as jr

SLIDING, FULL = "sliding_attention", "full_attention"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the rotary embedding: arXiv 2309.00071, `rope_type` "yarn" of transformers."""

    factor: float = 32.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False
    attention_factor: float | None = None  # of cos and sin; None: 0.1 log(factor) + 1

    @property
    def scale(self) -> float:
        """What cos and sin are multiplied with."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Config:
    """What of a config.json decides what the model computes. The defaults are gpt-oss-20b's."""

    num_hidden_layers: int = 24
    num_local_experts: int = 32
    num_experts_per_tok: int = 4
    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    head_dim: int = 64
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    sliding_window: int = 128
    layer_types: tuple[str, ...] = ()  # empty: alternating, sliding first
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    yarn: Yarn | None = field(default_factory=Yarn)  # None: rotary embedding without scaling
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.layer_types:
            alternating = (FULL if layer % 2 else SLIDING for layer in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", tuple(alternating))
        for name in (
            "num_hidden_layers", "num_local_experts", "num_experts_per_tok", "vocab_size", "hidden_size",
            "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads", "sliding_window",
        ):  # fmt: skip
            value = getattr(self, name)
            _expect(isinstance(value, int) and value > 0, name, value, "a positive integer")
        _expect(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number")
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        _expect(heads % shared == 0, "num_key_value_heads", shared, f"a divisor of num_attention_heads={heads}")
        experts, top_k = self.num_local_experts, self.num_experts_per_tok
        _expect(top_k <= experts, "num_experts_per_tok", top_k, f"at most num_local_experts={experts}")
        of_layers = len(self.layer_types) == self.num_hidden_layers and set(self.layer_types) <= {SLIDING, FULL}
        accepted = f"{self.num_hidden_layers} (num_hidden_layers) times {SLIDING!r} or {FULL!r}"
        _expect(of_layers, "layer_types", list(self.layer_types), accepted)
        _expect(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")

    def spec(self, round_logits: bool = False) -> jr.RoutingSpec:
        """The rule of the routers; rounding as in `jax_router.RoutingSpec`."""
        fields = {"model_type": "gpt_oss", "num_experts_per_tok": self.num_experts_per_tok}
        return jr.RoutingSpec.from_hf_config(fields, round_logits=round_logits)

    @classmethod
    def read(cls, directory: Path) -> Config:
        """The config.json in a checkpoint's directory.

        Raises:
          ValueError: there is none, it is no JSON object, or `from_hf` refuses it.
        """
        path = directory / "config.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}. Expected the config.json of a checkpoint.") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{path} holds a {type(fields).__name__}. Expected a JSON object.")
        try:
            return cls.from_hf(fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Config:
        """The config of the fields of a config.json, as OpenAI published it or as transformers 5 writes it.

        A field that is missing has gpt-oss-20b's value, but for the dimensions, which must be there.

        Raises:
          ValueError: another model, a field that is missing or makes no sense, or one that asks for what this model
            does not do.
        """
        model_type = fields.get("model_type")
        _expect(model_type == "gpt_oss", "model_type", model_type, "'gpt_oss'")
        for name, only in (("hidden_act", "silu"), ("attention_bias", True), ("tie_word_embeddings", False)):
            _expect(fields.get(name, only) == only, name, fields.get(name), repr(only))
        quantized = fields.get("quantization_config")
        method = None if quantized is None else quantized.get("quant_method")
        _expect(method in (None, "mxfp4"), "quantization_config.quant_method", method, "'mxfp4', or no quantization")
        missing = [name for name in _DIMENSIONS if fields.get(name) is None]
        _expect(not missing, ", ".join(missing), None, "a positive integer each")
        taken = {name: fields[name] for name in (*_DIMENSIONS, *_OPTIONAL) if fields.get(name) is not None}
        dtype = fields.get("dtype") or fields.get("torch_dtype")
        end = fields.get("eos_token_id")
        return cls(
            **taken,
            **_rotary(fields),
            layer_types=tuple(fields.get("layer_types") or ()),
            **({} if dtype is None else {"dtype": dtype}),
            eos_token_ids=() if end is None else tuple(end) if isinstance(end, list) else (end,),
        )


_DIMENSIONS = (
    "num_hidden_layers", "num_local_experts", "num_experts_per_tok", "vocab_size", "hidden_size", "intermediate_size",
    "head_dim", "num_attention_heads", "num_key_value_heads", "sliding_window",
)  # fmt: skip
_OPTIONAL = ("rms_norm_eps", "swiglu_alpha", "swiglu_limit", "initializer_range")
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor")


def _rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and yarn, from `rope_parameters` (transformers 5) or from `rope_scaling` beside `rope_theta`."""
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    rope = fields.get(name) or {}
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    _expect(
        not nested, ", ".join(f"{name}.{key}" for key in nested), "a dict", "the same for all layers, without a dict"
    )
    kind = rope.get("rope_type", rope.get("type", "default"))
    _expect(kind in ("default", "yarn"), f"{name}.rope_type", kind, "'default' or 'yarn'")
    for unsupported in ("mscale", "mscale_all_dim", "partial_rotary_factor"):
        _expect(rope.get(unsupported) is None, f"{name}.{unsupported}", rope.get(unsupported), "none")
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    given: dict[str, Any] = {} if theta is None else {"rope_theta": float(theta)}
    if kind == "default":
        return {**given, "yarn": None}
    missing = [key for key in ("factor", "original_max_position_embeddings") if rope.get(key) is None]
    _expect(not missing, ", ".join(f"{name}.{key}" for key in missing), None, "a number each")
    # transformers truncates where the field is missing; beta_fast and beta_slow have the defaults of Yarn there too.
    scaling = {"truncate": True} | {key: rope[key] for key in _YARN if rope.get(key) is not None}
    return {**given, "yarn": Yarn(**scaling)}


def _expect(holds: bool, name: str, value: Any, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}. Expected {accepted}.")
