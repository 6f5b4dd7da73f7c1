"""Routing in one launch on Mosaic GPU: a block multiplies its tokens with all experts and routes them.

Layout and numerics: the tree of `pallas_gemm.py`, whose slices a block walks in order, so the logits have its bits. The
totals of a token go through shared memory [tokens, E padded] to the warp that routes it, as in `pallas_routing.py`.

Work: every block reads the whole weight, through the 64 bytes per clock that a multiprocessor takes in. So this is for
tokens enough to fill the GPU and experts few enough to fit a block; else `group_sums` and a second launch are faster.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_router.implementations.pallas_gemm import SHARED_BYTES, TILE_EXPERTS, TILE_HIDDEN, Block, Slices, tiles_of
from jax_router.implementations.pallas_routing import Router

MAX_SUMS = 64 * 128  # float32 accumulators of a block, and as many totals: half of its registers


@dataclasses.dataclass(frozen=True)
class Fused:
    """One launch. Every configuration gives the same bits, those of `pallas_gemm.Config`."""

    tile_tokens: int  # N of one wgmma: a multiple of 8
    max_stages: int = 16  # tiles of hidden in flight per block, as far as shared memory holds them; at least 2


CONFIGS = (Fused(8), Fused(16), Fused(32))


def takes(config: Fused, experts: int) -> bool:
    """Whether a block's sums fit its registers, and two stages its shared memory."""
    rows = tiles_of(experts, TILE_EXPERTS) * TILE_EXPERTS
    stages = 2 * (rows + config.tile_tokens) * TILE_HIDDEN * 2
    return rows * config.tile_tokens <= MAX_SUMS and stages + rows * config.tile_tokens * 4 <= SHARED_BYTES


def route(
    x: jax.Array, weight: jax.Array, config: Fused, slices: Slices, router: Router, interpret: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The kernel: weights [T, k], experts [T, k] and logits [T, E] or None. `config` must take the experts."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    tile_tokens = config.tile_tokens
    expert_tiles = tiles_of(weight.shape[0], TILE_EXPERTS)
    shape = (tile_tokens, expert_tiles * TILE_EXPERTS)
    shared_bytes = SHARED_BYTES - shape[0] * shape[1] * 4
    block = Block(x.dtype, tile_tokens, expert_tiles, slices.count, slices.tiles, config.max_stages, shared_bytes)

    def kernel(x_ref: Any, weight_ref: Any, *others: Any) -> None:
        names = (*router.operands, *router.out_types)
        refs, (sums_buffer, *scratch) = dict(zip(names, others[: len(names)], strict=True)), others[len(names) :]
        token = lax.axis_index("token_tile") * tile_tokens
        zero = lax.axis_index(
            "all"
        )  # traced: tiles may reach beyond weight and x, which JAX refuses of constant indices
        # Orders a stage's readers before the copy into it, as commit_smem orders writers before readers below.
        ordered = {"interpret": interpret, "before_refill": plgpu.commit_smem}
        for number, total in enumerate(block.totals(x_ref, weight_ref, token, zero, zero, *scratch, **ordered)):
            target = sums_buffer.at[:, pl.ds(number * TILE_EXPERTS, TILE_EXPERTS)]
            target.T[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()

        def finish(step: Any, carry: None) -> None:
            first = step * router.rows
            pl.when(token + first < router.tokens)(
                lambda: router.finish(refs, token + first, router.load_sums(sums_buffer, first))
            )
            return carry

        lax.fori_loop(0, tile_tokens // router.rows, finish, None)

    call = plgpu.kernel(
        kernel,
        out_type=tuple(router.out_types.values()),
        grid=(1, tiles_of(router.tokens, tile_tokens)),
        grid_names=("all", "token_tile"),
        scratch_types=[plgpu.SMEM(shape, jnp.float32), *block.scratch_types()],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # Warpgroup semantics would choose the layouts
            unsafe_no_auto_barriers=True,  # they would stand around every store of a result; see commit_smem above
        ),
        kernel_name="sm90_pallas_route",
        interpret=interpret,
    )
    return router.results(call(x, weight, *router.operands.values()))
