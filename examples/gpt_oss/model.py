"""gpt-oss in Flax NNX: modules and parameters are named and laid out as in a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from rich.progress import Progress

import jax_router as jr
from examples.gpt_oss.attention import Attention, LayerCache
from examples.gpt_oss.checkpoint import read_checkpoint
from examples.gpt_oss.config import Config
from examples.gpt_oss.experts import Experts
from examples.gpt_oss.layers import Linear, RMSNorm, normal
from examples.gpt_oss.rotary import rotations
from jax_router import checks
from jax_router.nnx import Router

Implementation = str | Sequence[str] | None


class Cache(NamedTuple):
    """What a decoded token needs of those before it: how many there are, and every layer's keys and values."""

    position: jax.Array  # int32, of the next token
    layers: tuple[LayerCache, ...]

    @classmethod
    def empty(cls, config: Config, batch: int, length: int, dtype: DTypeLike) -> Cache:
        layers = range(config.num_hidden_layers)
        return cls(jnp.int32(0), tuple(LayerCache.empty(config, batch, length, dtype) for _ in layers))


class Output(NamedTuple):
    """Of tokens `[B, T]`. Under jit, what is not used is not computed."""

    logits: jax.Array  # [B, T, V], or [B, 1, V] of the last token alone
    cache: Cache | None
    hidden_states: tuple[jax.Array, ...]  # [B, T, H]: the embedding, then what each layer returns
    routings: tuple[jr.Routing, ...]  # of each layer, [B T, k]


class MLP(nnx.Module):
    """Router and experts of one layer."""

    def __init__(
        self, config: Config, *, round_logits: bool, implementation: Implementation, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.router = Router(
            config.hidden_size,
            config.num_local_experts,
            spec=config.spec(round_logits),
            use_bias=True,
            param_dtype=dtype,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            implementation=implementation,
            rngs=rngs,
        )
        self.experts = Experts(config, dtype=dtype, rngs=rngs)
        self.round_logits = round_logits

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jr.Routing]:
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens)
        weights = routing.weights.astype(x.dtype) if self.round_logits else routing.weights
        return self.experts(tokens, routing.experts, weights).reshape(x.shape), routing


class Layer(nnx.Module):
    """Attention and MLP, each behind its norm and added to what it was given."""

    def __init__(
        self,
        config: Config,
        layer: int,
        *,
        round_logits: bool,
        implementation: Implementation,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        hidden, epsilon = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, round_logits=round_logits, implementation=implementation, dtype=dtype, rngs=rngs)
        self.input_layernorm = RMSNorm(hidden, epsilon=epsilon, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(hidden, epsilon=epsilon, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        cache: LayerCache | None,
        position: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None, jr.Routing]:
        attended, cache = self.self_attn(self.input_layernorm(x), rotation, cache, position)
        x = x + attended
        mixed, routing = self.mlp(self.post_attention_layernorm(x))
        return x + mixed, cache, routing


class Embedding(nnx.Module):
    """Rows of weight `[V, H]`."""

    def __init__(self, config: Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = normal((config.vocab_size, config.hidden_size), config.initializer_range, dtype, rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.weight[...][ids]


class Trunk(nnx.Module):
    """The model up to its last norm; `model.` in a checkpoint."""

    def __init__(
        self, config: Config, *, round_logits: bool, implementation: Implementation, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.embed_tokens = Embedding(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            Layer(config, layer, round_logits=round_logits, implementation=implementation, dtype=dtype, rngs=rngs)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)


class GptOss(nnx.Module):
    """The whole model, with random weights; `load` reads a checkpoint's.

    Args:
      round_logits: False: router logits and the experts' weights are float32. True: both are rounded to dtype, as in
        transformers.
      implementation: of the routers, as in `jax_router.route`.
      dtype: of the parameters and of the computation; None: config.dtype.
    """

    def __init__(
        self,
        config: Config,
        *,
        round_logits: bool = False,
        implementation: Implementation = None,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype or config.dtype)
        self.model = Trunk(
            config, round_logits=round_logits, implementation=implementation, dtype=self.dtype, rngs=rngs
        )
        self.lm_head = Linear(
            config.hidden_size,
            config.vocab_size,
            bias=False,
            deviation=config.initializer_range,
            dtype=self.dtype,
            rngs=rngs,
        )

    def __call__(
        self, ids: jax.Array, cache: Cache | None = None, *, decode: bool = False, last_only: bool = False
    ) -> Output:
        """Logits of tokens.

        Args:
          ids: integers `[B, T]`.
          cache: None to keep nothing, else where keys and values are written: from its beginning, or with `decode`
            behind those that it has.
          decode: ids is one token per sequence, which sees what the cache has. False: T tokens that see one another.
            cache.position must be less than the length of the cache, which only a device knows: a step past the end
            overwrites the last position, without an error.
          last_only: return the logits of the last token alone.

        Raises:
          ValueError: decode without a cache or with several tokens of a sequence; a cache for other batches or for
            fewer tokens.
        """
        _check_cache(ids, cache, decode)
        position = cache.position if decode and cache is not None else None
        positions = jnp.arange(ids.shape[1]) if position is None else position[None]
        rotation = rotations(self.config, positions, self.dtype)
        x = self.model.embed_tokens(ids)
        hidden_states, routings = [x], []
        caches: list[LayerCache] = []
        for index, layer in enumerate(self.model.layers):
            x, of_layer, routing = layer(x, rotation, None if cache is None else cache.layers[index], position)
            hidden_states.append(x)
            routings.append(routing)
            if of_layer is not None:
                caches.append(of_layer)
        normed = self.model.norm(x[:, -1:] if last_only else x)
        if cache is not None:
            cache = Cache(positions[-1] + 1, tuple(caches))
        return Output(self.lm_head(normed), cache, tuple(hidden_states), tuple(routings))


def _check_cache(ids: jax.Array, cache: Cache | None, decode: bool) -> None:
    if decode and (cache is None or ids.shape[1] != 1):
        found = "without a cache" if cache is None else f"with ids of shape {ids.shape}"
        raise ValueError(f"decode is True {found}. Expected a cache and ids [B, 1].")
    if cache is not None:
        batch, length = cache.layers[0].keys.shape[:2]
        if ids.shape[0] != batch or ids.shape[1] > length:
            raise ValueError(
                f"ids has shape {ids.shape} but cache is for {batch} sequences of {length} tokens. Expected as many "
                "sequences, and at most as many tokens; pass Cache.empty of a greater length."
            )


def named_tensors(model: GptOss) -> dict[str, jax.Array]:
    """A model's parameters by their names in a checkpoint."""
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}


def expected_tensors(config: Config, dtype: DTypeLike | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every tensor that a checkpoint of this config has, the experts dequantized."""
    return named_tensors(_abstract(config, dtype=dtype))  # type: ignore[return-value]


def _name(path: tuple[Any, ...]) -> str:
    """Of a parameter in a checkpoint."""
    return ".".join(map(str, path)).replace("router.kernel", "router.weight")


def _abstract(config: Config, **options: Any) -> GptOss:
    """The model with shapes and dtypes instead of arrays."""
    return nnx.eval_shape(lambda: GptOss(config, **options, rngs=nnx.Rngs(0)))


def from_tensors(
    config: Config,
    tensors: Mapping[str, jax.Array],
    *,
    round_logits: bool = False,
    implementation: Implementation = None,
    dtype: DTypeLike | None = None,
) -> GptOss:
    """The model of tensors that are named as in a checkpoint, as `expected_tensors` says."""
    model = _abstract(config, round_logits=round_logits, implementation=implementation, dtype=dtype)
    graph, state = nnx.split(model)
    filled = [(path, variable.replace(tensors[_name(path)])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def check_options(config: Config, *, implementation: Implementation = None, dtype: DTypeLike | None = None) -> None:
    """Check that a model of this config can be computed in a dtype, and its routers by an implementation, here.

    Raises:
      TypeError, ValueError: no dtype or implementation that is taken.
      NotImplementedError: no implementation named can run: on this device, in this dtype.
    """
    name = checks.input_dtype("dtype", dtype or config.dtype)
    jr.explain(
        tokens=1,
        hidden=config.hidden_size,
        experts=config.num_local_experts,
        dtype=name,
        bias=True,
        spec=config.spec(),
        implementation=implementation,
    )


def load(
    directory: str | Path,
    *,
    round_logits: bool = False,
    implementation: Implementation = None,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
) -> GptOss:
    """The model in a directory with config.json and safetensors, one file or several with their index.

    Args:
      round_logits, implementation, dtype: as in `GptOss`; checked before the tensors are read.
      progress: as in `read_checkpoint`.

    Raises:
      NotImplementedError: no implementation named can run here.
      ValueError: an argument that is not taken, the config.json is not one of a gpt-oss model that this can compute, or
        tensors are missing, unknown or of another shape.
      FileNotFoundError: no safetensors file, or one that the index names is missing.
    """
    config = Config.read(directory)
    check_options(config, implementation=implementation, dtype=dtype)
    tensors = read_checkpoint(directory, expected_tensors(config, dtype), progress=progress)
    return from_tensors(config, tensors, round_logits=round_logits, implementation=implementation, dtype=dtype)
