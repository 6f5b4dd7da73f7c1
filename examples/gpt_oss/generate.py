"""Greedy decoding with a cache: one jitted function reads the prompt, another one makes every further token."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from examples.gpt_oss.config import Config
from examples.gpt_oss.model import Cache, GptOss


class Decoded(NamedTuple):
    """The next token of every sequence."""

    tokens: jax.Array  # int32 [B]
    logits: jax.Array  # [B, V], of which it is the highest
    cache: Cache


class Decoder:
    """A model's two compiled functions, for sequences of up to `length` tokens.

    `decode` makes as many steps as the cache has room for. Who calls `step` must count: one past the end overwrites
    the last position of the cache, without an error, for its position is known to the device alone.

    The model is split once, and its parameters are arguments of both functions, as a plain list: JAX takes an
    `nnx.State` of hundreds of arrays apart in milliseconds, at every call. The cache is donated: each step writes
    into the buffers of the one before. A step is one call of a jitted function from Python, its layers unrolled, and
    not a `jax.lax.scan` over steps: straight-line code on buffers that stay where they are is what XLA can capture in
    CUDA graphs, and the host, which waits for no result, can run ahead of the device.
    """

    def __init__(self, model: GptOss, *, length: int):
        self.config, self.dtype, self.length = model.config, model.dtype, length
        graph, state = nnx.split(model)
        self.parameters, structure = jax.tree.flatten(state)
        self.prefill, self.step = _compiled(graph, structure)

    def decode(self, prompt: ArrayLike) -> Iterator[Decoded]:
        """Token after token behind prompts `[B, T]` of one length, until `length` is reached; none is waited for.

        Raises:
          ValueError: prompt has not two axes, no token, or more than `length`.
        """
        prompt = jnp.asarray(prompt, jnp.int32)
        if prompt.ndim != 2 or not 1 <= prompt.shape[1] <= self.length:
            raise ValueError(
                f"prompt has shape {prompt.shape}. Expected [B, T] of 1 to {self.length} tokens, the decoder's length."
            )
        batch, tokens = prompt.shape
        decoded = self.prefill(self.parameters, prompt, Cache.empty(self.config, batch, self.length, self.dtype))
        yield decoded
        for _ in range(self.length - tokens):
            decoded = self.step(self.parameters, decoded.tokens, decoded.cache)
            yield decoded


@functools.cache
def _compiled(
    graph: nnx.GraphDef[GptOss], structure: jax.tree_util.PyTreeDef
) -> tuple[Callable[..., Decoded], Callable[..., Decoded]]:
    """Of parameters and a prompt [B, T] or tokens [B] and a cache: what is decoded. Once for all alike models."""

    def decoded(parameters: list[jax.Array], ids: jax.Array, cache: Cache, decode: bool) -> Decoded:
        model = nnx.merge(graph, jax.tree.unflatten(structure, parameters))
        output = model(ids, cache, decode=decode, last_only=True)
        logits = output.logits[:, 0]
        assert output.cache is not None
        return Decoded(jnp.argmax(logits, axis=-1).astype(jnp.int32), logits, output.cache)

    def prefill(parameters: list[jax.Array], prompt: jax.Array, cache: Cache) -> Decoded:
        return decoded(parameters, prompt, cache, decode=False)

    def step(parameters: list[jax.Array], tokens: jax.Array, cache: Cache) -> Decoded:
        return decoded(parameters, tokens[:, None], cache, decode=True)

    return jax.jit(prefill, donate_argnums=2), jax.jit(step, donate_argnums=2)


def prompt_ids(name: str, prompt: ArrayLike, config: Config) -> np.ndarray:
    """Prompts as an int32 array of token ids `[B, T]`.

    Args:
      name: what messages call them.
      prompt: integers; Python's, which may have any size, in an array of objects too.

    Raises:
      ValueError: they are none, or not in the vocabulary.
    """
    ids = np.asarray(prompt)
    vocabulary = config.vocab_size
    integers = np.issubdtype(ids.dtype, np.integer) or all(type(each) is int for each in ids.flat)
    if ids.ndim != 2 or not ids.size or not integers:
        raise ValueError(f"{name} is {ids.dtype} of shape {ids.shape}. Expected integers [B, T], one or more.")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(f"{name} has ids from {ids.min()} to {ids.max()}. Expected ids in [0, {vocabulary}).")
    return ids.astype(np.int32)


def stream(model: GptOss, prompt: ArrayLike, steps: int, *, end: Collection[int] = ()) -> Iterator[np.ndarray]:
    """Greedy continuations, token after token: int32 `[B]` each.

    Args:
      prompt: token ids `[B, T]`: B prompts of one length, without padding.
      steps: how many tokens to make at most.
      end: ids of which one ends a sequence. A sequence that has ended goes on while others have not; what comes
        behind the first of these ids is to be ignored.

    Raises:
      ValueError: a prompt that has no token, or an id that is not in the vocabulary; steps is not positive.
    """
    ids = prompt_ids("prompt", prompt, model.config)
    if steps < 1:
        raise ValueError(f"steps is {steps}. Expected at least 1.")
    decoder = Decoder(model, length=ids.shape[1] + steps - 1)
    ended = np.zeros(ids.shape[0], bool)
    of_step = (decoded.tokens for decoded in decoder.decode(ids))
    made = next(of_step)
    for following in itertools.chain(of_step, [None]):  # the device makes it while the host looks at the one before
        tokens = np.asarray(made)
        yield tokens
        ended |= np.isin(tokens, list(end))
        if following is None or ended.all():
            return
        made = following


def generate(model: GptOss, prompt: ArrayLike, steps: int, *, end: Collection[int] = ()) -> np.ndarray:
    """All that `stream` yields: int32 `[B, steps]`, or fewer columns where every sequence has ended."""
    return np.stack(list(stream(model, prompt, steps, end=end)), axis=1)
