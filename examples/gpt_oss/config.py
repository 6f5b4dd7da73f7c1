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
_DIMENSIONS = (
    "num_hidden_layers", "num_local_experts", "num_experts_per_tok", "vocab_size", "hidden_size", "intermediate_size",
    "head_dim", "num_attention_heads", "num_key_value_heads", "sliding_window",
)  # fmt: skip
_POSITIVE = ("rms_norm_eps", "swiglu_alpha", "swiglu_limit", "initializer_range")


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the rotary embedding: arXiv 2309.00071, `rope_type` "yarn" of transformers."""

    factor: float = 32.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False
    attention_factor: float | None = None  # of cos and sin; None: 0.1 log(factor) + 1

    def __post_init__(self) -> None:
        _expect(_is_number(self.factor) and self.factor >= 1, "factor", self.factor, "a number of at least 1")
        original = self.original_max_position_embeddings
        _expect_positive_integer("original_max_position_embeddings", original)
        for name in ("beta_fast", "beta_slow"):
            _expect_positive(name, getattr(self, name))
        _expect(isinstance(self.truncate, bool), "truncate", self.truncate, "True or False")
        if self.attention_factor is not None:
            _expect_positive("attention_factor", self.attention_factor)

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
        for name in _DIMENSIONS:
            _expect_positive_integer(name, getattr(self, name))
        for name in _POSITIVE:
            _expect_positive(name, getattr(self, name))
        _expect(_is_number(self.rope_theta) and self.rope_theta > 1, "rope_theta", self.rope_theta, "a number above 1")
        if not self.layer_types:
            alternating = (FULL if layer % 2 else SLIDING for layer in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", tuple(alternating))
        _expect(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number")
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        _expect(heads % shared == 0, "num_key_value_heads", shared, f"a divisor of num_attention_heads={heads}")
        experts, top_k = self.num_local_experts, self.num_experts_per_tok
        _expect(top_k <= experts, "num_experts_per_tok", top_k, f"at most num_local_experts={experts}")
        known = all(kind in (SLIDING, FULL) for kind in self.layer_types)
        of_layers = known and len(self.layer_types) == self.num_hidden_layers
        accepted = f"{self.num_hidden_layers} (num_hidden_layers) times {SLIDING!r} or {FULL!r}"
        _expect(of_layers, "layer_types", list(self.layer_types), accepted)
        _expect(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        ids = all(_is_integer(each) and each >= 0 for each in self.eos_token_ids)
        _expect(ids, "eos_token_id", list(self.eos_token_ids), "token ids, integers from 0 on")

    def spec(self, round_logits: bool = False) -> jr.RoutingSpec:
        """The rule of the routers; rounding as in `jax_router.RoutingSpec`."""
        fields = {"model_type": "gpt_oss", "num_experts_per_tok": self.num_experts_per_tok}
        return jr.RoutingSpec.from_hf_config(fields, round_logits=round_logits)

    @classmethod
    def read(cls, directory: str | Path) -> Config:
        """The config.json in a checkpoint's directory.

        Raises:
          ValueError: there is none, it is no JSON object, or `from_hf` refuses it.
        """
        path = Path(directory) / "config.json"
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
        method = (_object(fields, "quantization_config") or {}).get("quant_method")
        _expect(method in (None, "mxfp4"), "quantization_config.quant_method", method, "'mxfp4', or no quantization")
        missing = [name for name in _DIMENSIONS if fields.get(name) is None]
        _expect(not missing, ", ".join(missing), None, "a positive integer each")
        taken = {name: fields[name] for name in (*_DIMENSIONS, *_POSITIVE) if fields.get(name) is not None}
        for name in ("torch_dtype", "dtype"):  # the older name, where the other is null too
            if fields.get(name) is not None:
                taken["dtype"] = fields[name]
        if (kinds := fields.get("layer_types")) is not None:
            _expect(isinstance(kinds, list), "layer_types", kinds, f"a list of {SLIDING!r} and {FULL!r}")
            taken["layer_types"] = tuple(kinds)
        if (end := fields.get("eos_token_id")) is not None:
            taken["eos_token_ids"] = tuple(end) if isinstance(end, list) else (end,)
        return cls(**taken, **_rotary(fields))


_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor")


def _rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and yarn, from `rope_parameters` (transformers 5) or from `rope_scaling` beside `rope_theta`.

    As in transformers, `rope_scaling` is read first, no rope_type is "default", and where there is neither object the
    model has gpt-oss's YaRN.
    """
    name = "rope_scaling" if _object(fields, "rope_scaling") else "rope_parameters"
    given = _object(fields, name)
    rope = {} if given is None else given
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    _expect(
        not nested, ", ".join(f"{name}.{key}" for key in nested), "a dict", "the same for all layers, without a dict"
    )
    kind = rope.get("rope_type", rope.get("type", "default"))
    _expect(kind in ("default", "yarn"), f"{name}.rope_type", kind, "'default' or 'yarn'")
    for unsupported in ("mscale", "mscale_all_dim"):
        _expect(rope.get(unsupported) is None, f"{name}.{unsupported}", rope.get(unsupported), "none")
    for where, part in (("partial_rotary_factor", fields), (f"{name}.partial_rotary_factor", rope)):
        turned = part.get("partial_rotary_factor")
        _expect(turned in (None, 1), where, turned, "1.0 or none: all dimensions of a head turn")
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    of_theta = {} if theta is None else {"rope_theta": theta}
    if given is not None and kind == "default":
        return {**of_theta, "yarn": None}
    # transformers takes that of the whole config before that of the object.
    original, outer = "original_max_position_embeddings", fields.get("original_max_position_embeddings")
    inner = Yarn.original_max_position_embeddings if given is None else rope.get(original)
    _expect(outer in (None, inner), original, outer, f"none, or that of {name}, {inner!r}")
    if given is None:
        return of_theta
    missing = [key for key in ("factor", original) if rope.get(key) is None]
    _expect(not missing, ", ".join(f"{name}.{key}" for key in missing), None, "a number each")
    # transformers truncates where the field is missing, but not where it is null; the others have Yarn's defaults then.
    scaling = {"truncate": "truncate" not in rope} | {key: rope[key] for key in _YARN if rope.get(key) is not None}
    try:
        return {**of_theta, "yarn": Yarn(**scaling)}
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def _object(fields: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A field that is a JSON object or null, or that is not there."""
    value = fields.get(name)
    _expect(value is None or isinstance(value, dict), name, value, "an object, or none")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _expect_positive_integer(name: str, value: Any) -> None:
    _expect(_is_integer(value) and value > 0, name, value, "a positive integer")


def _expect_positive(name: str, value: Any) -> None:
    _expect(_is_number(value) and value > 0, name, value, "a positive number")


def _expect(holds: bool, name: str, value: Any, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}. Expected {accepted}.")
