"""The router GEMM as a Pallas kernel on Mosaic GPU: experts on the M side of wgmma, tokens on N, all loads by TMA.

Layout: x [T, H] and weight [E, H] are read where they are, row-major; TMA fills what lies outside of them with zeros,
so nothing is padded in memory. The kernel writes float32 sums [groups, T padded, E padded]. One elementwise kernel of
XLA adds the groups and the bias, and rounds once; in routing, the kernel of `pallas_routing.py` adds them.

Numerics: hidden is cut into tiles of 64 and these into at most 16 equal slices, by hidden alone (`slices_of`). wgmma
chains the tiles of a slice in ascending order from zero, and slice sums are added in ascending order. Few tokens: one
block per slice (a group each), XLA adds the groups. Many tokens: a block walks all slices and keeps the total. Both are
the same tree, and the width of the token tile does not enter it, so a row's bits do not depend on the batch.

Work: a block is one warpgroup with 64 experts and `tile_tokens` tokens. It asks for as many tiles as its shared memory
holds before it multiplies the first. One multiprocessor takes in only about 64 bytes per clock, and 64 experts of a
7168-wide model are 917 KB: that is why slices become blocks until their sums no longer fit in L2.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

TILE_EXPERTS = 64  # M of one wgmma
TILE_HIDDEN = 64  # 128 bytes of a 16-bit row: the widest swizzle that TMA and wgmma share
MAX_SLICES = 16
SHARED_BYTES = 200 * 1024  # of the 227 KB a Hopper block may have
GROUP_SUM_BYTES = 24 * 1024 * 1024  # half of the H200's L2: beyond it the sums of the slices go through HBM


@dataclasses.dataclass(frozen=True)
class Slices:
    """The reduction tree: `count` slices of `tiles` tiles of `TILE_HIDDEN`. The last one may reach beyond hidden."""

    count: int
    tiles: int


@dataclasses.dataclass(frozen=True)
class Config:
    """How the same tree is spread over the GPU. Every configuration gives the same bits."""

    tile_tokens: int  # N of one wgmma: a multiple of 8, at most 256 if split and 128 if not, so that sums fit registers
    split: bool  # True: one block per slice. False: one block walks all slices
    max_stages: int = 16  # tiles in flight per block, as far as shared memory holds them; at least 2


CONFIGS = (
    Config(8, split=True),
    Config(16, split=True),
    Config(32, split=True),
    Config(64, split=True),
    Config(128, split=True),
    Config(64, split=False),
    Config(128, split=False),
)


def slices_of(hidden: int) -> Slices:
    """The reduction tree of a hidden size. It depends on nothing else, or a token's bits would depend on its batch."""
    tiles = tiles_of(hidden, TILE_HIDDEN)
    tiles_per_slice = tiles_of(tiles, MAX_SLICES)
    return Slices(tiles_of(tiles, tiles_per_slice), tiles_per_slice)


def pick_config(tokens: int, hidden: int, experts: int) -> Config:
    """The configuration of a problem: narrow tiles for few tokens, slices in parallel while their sums fit in L2.

    The fastest of each measured on an H200 at T = 16, 64 and 256 for 2880x128 and 7168x256, 2026-11-24.
    """
    tile_tokens = next((tile for most, tile in ((8, 8), (16, 16), (128, 32)) if tokens <= most), 64)
    rows, columns = tiles_of(tokens, tile_tokens) * tile_tokens, tiles_of(experts, TILE_EXPERTS) * TILE_EXPERTS
    if slices_of(hidden).count * rows * columns * 4 <= GROUP_SUM_BYTES:
        return Config(tile_tokens, split=True)
    return Config(128, split=False)


def group_sums(x: jax.Array, weight: jax.Array, config: Config, slices: Slices, interpret: Any = None) -> jax.Array:
    """The kernel: float32 [groups, T padded, E padded], whose sum over the groups in ascending order is x @ weight.T.

    Padding is to whole tiles and holds zeros. There is one group per slice if `config.split`, else one in all.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    tile_tokens = config.tile_tokens
    token_tiles = tiles_of(x.shape[0], tile_tokens)
    expert_tiles = tiles_of(weight.shape[0], TILE_EXPERTS)
    groups, slices_per_group = (slices.count, 1) if config.split else (1, slices.count)
    tiles = slices_per_group * slices.tiles
    stage_bytes = (TILE_EXPERTS + tile_tokens) * TILE_HIDDEN * x.dtype.itemsize
    stages = min(tiles, config.max_stages, SHARED_BYTES // stage_bytes)

    def rows(buffer: Any, stage: Any, count: int) -> Any:
        """One stage of a shared-memory buffer as plain swizzled rows, the target of a TMA copy.

        wgmma wants the buffer tiled by (8, 64). Tiled and plain are the same bytes, but a copy into the tiled view
        would need tokens, experts and hidden to be whole tiles. The interpreter knows no views and needs none.
        """
        if interpret is not None:
            return buffer.at[stage]
        return dataclasses.replace(buffer, transforms=buffer.transforms[:1]).at[stage].reshape(count, TILE_HIDDEN)

    def kernel(x_ref: Any, weight_ref: Any, sums_ref: Any, weight_buffer: Any, x_buffer: Any, loaded: Any) -> None:
        expert = lax.axis_index("expert_tile") * TILE_EXPERTS
        group = lax.axis_index("group")
        token = lax.axis_index("token_tile") * tile_tokens

        def load(tile: Any) -> None:
            stage = tile % stages
            hidden = pl.ds((group * tiles + tile) * TILE_HIDDEN, TILE_HIDDEN)
            for source, first, buffer, count in (
                (weight_ref, expert, weight_buffer, TILE_EXPERTS),
                (x_ref, token, x_buffer, tile_tokens),
            ):
                of_tile = source.at[pl.ds(first, count), hidden]
                plgpu.copy_gmem_to_smem(of_tile, rows(buffer, stage, count), loaded.at[stage])

        def multiply(tile: Any, accumulator: Any) -> None:
            stage = tile % stages
            plgpu.barrier_wait(loaded.at[stage])  # of this very stage: weight and x are both there
            plgpu.wgmma(accumulator, weight_buffer.at[stage], x_buffer.at[stage].T)
            if stages < tiles:
                plgpu.wgmma_wait(1)  # the tile before has been read, so its stage is free
                pl.when((tile >= 1) & (tile + stages <= tiles))(lambda: load(tile - 1 + stages))

        def slice_sum(index: Any) -> jax.Array:
            def chain(accumulator: Any) -> jax.Array:
                first = index * slices.tiles
                if stages == tiles:
                    for tile in range(slices.tiles):
                        multiply(first + tile, accumulator)
                else:
                    lax.fori_loop(0, slices.tiles, lambda tile, _: multiply(first + tile, accumulator), None)
                return accumulator[...]

            return pl.run_scoped(chain, plgpu.ACC((TILE_EXPERTS, tile_tokens), jnp.float32))

        for tile in range(stages):
            load(tile)
        total = slice_sum(0)
        if slices_per_group > 1:
            total = lax.fori_loop(1, slices_per_group, lambda index, total: total + slice_sum(index), total)
        # Transposed on the way out, eight experts of a token side by side: whole 32-byte sectors of [T, E].
        target = sums_ref.at[group, pl.ds(token, tile_tokens), pl.ds(expert, TILE_EXPERTS)]
        target.T[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)

    def stages_of(count: int) -> Any:
        tiled = plgpu.TilingTransform((8, TILE_HIDDEN))  # type: ignore[abstract]
        swizzled = plgpu.SwizzleTransform(TILE_HIDDEN * x.dtype.itemsize)  # type: ignore[abstract]
        return plgpu.SMEM((stages, count, TILE_HIDDEN), x.dtype, transforms=(tiled, swizzled))

    sums = jax.ShapeDtypeStruct((groups, token_tiles * tile_tokens, expert_tiles * TILE_EXPERTS), jnp.float32)
    call = plgpu.kernel(
        kernel,
        out_type=sums,
        grid=(expert_tiles, groups, token_tiles),  # the last one is CUDA's x, the only one that may pass 65535
        grid_names=("expert_tile", "group", "token_tile"),
        scratch_types=[
            stages_of(TILE_EXPERTS),
            stages_of(tile_tokens),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # Warpgroup semantics infers one view per buffer
            unsafe_no_auto_barriers=stages == tiles,  # no stage is filled twice: there is nothing to order
        ),
        kernel_name="sm90_pallas_router_gemm",
        interpret=interpret,
    )
    return call(x, weight)


def add_groups(sums: jax.Array, tokens: int, experts: int) -> jax.Array:
    """Logits [tokens, experts] in float32 from what `group_sums` returns, by additions in ascending order.

    Explicit additions, because XLA may order a reduction as it likes. It fuses them, the bias and the rounding.
    """
    return functools.reduce(jnp.add, [sums[group, :tokens, :experts] for group in range(sums.shape[0])])


def tiles_of(size: int, tile: int) -> int:
    return -(-size // tile)
