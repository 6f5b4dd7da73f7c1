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
from collections.abc import Callable
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


@dataclasses.dataclass(frozen=True)
class Block:
    """What a block of one warpgroup multiplies: tiles of 64 experts by `tile_tokens` tokens, slice after slice."""

    dtype: Any  # of x and weight
    tile_tokens: int
    expert_tiles: int
    slices: int  # of these many tiles each, starting at those of its group
    slice_tiles: int
    max_stages: int
    shared_bytes: int

    @property
    def tiles(self) -> int:
        return self.slices * self.slice_tiles

    @property
    def stages(self) -> int:
        """Tiles of hidden in flight."""
        rows = self.expert_tiles * TILE_EXPERTS + self.tile_tokens
        return min(self.tiles, self.max_stages, self.shared_bytes // (rows * TILE_HIDDEN * self.dtype.itemsize))

    def scratch_types(self) -> list[Any]:
        """The last three arguments of `totals`."""
        import jax.experimental.pallas.mosaic_gpu as plgpu

        def buffers(number: int, rows: int) -> Any:
            tiled = plgpu.TilingTransform((8, TILE_HIDDEN))  # type: ignore[abstract]
            swizzled = plgpu.SwizzleTransform(TILE_HIDDEN * self.dtype.itemsize)  # type: ignore[abstract]
            return plgpu.SMEM((number, rows, TILE_HIDDEN), self.dtype, transforms=(tiled, swizzled))

        return [
            buffers(self.stages * self.expert_tiles, TILE_EXPERTS),
            buffers(self.stages, self.tile_tokens),
            plgpu.Barrier(num_arrivals=self.expert_tiles + 1, num_barriers=self.stages),
        ]

    def totals(
        self,
        x_ref: Any,
        weight_ref: Any,
        token: Any,
        expert: Any,
        group: Any,
        weight_buffer: Any,
        x_buffer: Any,
        loaded: Any,
        *,
        interpret: Any,
        before_refill: Callable[[], None] | None = None,
    ) -> tuple[jax.Array, ...]:
        """One [64 experts, tokens] float32 total per expert tile, over the slices of one group, in WGMMA layout.

        `before_refill` orders what the warps have read of a stage before a copy into it, where Pallas does not.
        """
        import jax.experimental.pallas as pl
        import jax.experimental.pallas.mosaic_gpu as plgpu

        tiles, stages = self.tiles, self.stages

        def rows(buffer: Any, index: Any, count: int) -> Any:
            """One tile of a shared-memory buffer as plain swizzled rows, the target of a TMA copy.

            wgmma wants the buffer tiled by (8, 64). Tiled and plain are the same bytes, but a copy into the tiled view
            would need tokens, experts and hidden to be whole tiles. The interpreter knows no views and needs none.
            """
            if interpret is not None:
                return buffer.at[index]
            return dataclasses.replace(buffer, transforms=buffer.transforms[:1]).at[index].reshape(count, TILE_HIDDEN)

        def load(tile: Any) -> None:
            stage = tile % stages
            hidden = pl.ds((group * tiles + tile) * TILE_HIDDEN, TILE_HIDDEN)
            for number in range(self.expert_tiles):
                of_tile = weight_ref.at[pl.ds(expert + number * TILE_EXPERTS, TILE_EXPERTS), hidden]
                target = rows(weight_buffer, stage * self.expert_tiles + number, TILE_EXPERTS)
                plgpu.copy_gmem_to_smem(of_tile, target, loaded.at[stage])
            of_tile = x_ref.at[pl.ds(token, self.tile_tokens), hidden]
            plgpu.copy_gmem_to_smem(of_tile, rows(x_buffer, stage, self.tile_tokens), loaded.at[stage])

        def multiply(tile: Any, accumulators: tuple[Any, ...]) -> None:
            stage = tile % stages
            plgpu.barrier_wait(loaded.at[stage])  # of this very stage: weight and x are both there
            for number, accumulator in enumerate(accumulators):
                of_tile = weight_buffer.at[stage * self.expert_tiles + number]
                plgpu.wgmma(accumulator, of_tile, x_buffer.at[stage].T)
            if stages < tiles:
                plgpu.wgmma_wait(self.expert_tiles)  # the tile before has been read, so its stage is free
                if before_refill is not None:
                    before_refill()
                pl.when((tile >= 1) & (tile + stages <= tiles))(lambda: load(tile - 1 + stages))

        def slice_sums(index: Any) -> tuple[jax.Array, ...]:
            def chain(*accumulators: Any) -> tuple[jax.Array, ...]:
                first = index * self.slice_tiles
                if stages == tiles:
                    for tile in range(self.slice_tiles):
                        multiply(first + tile, accumulators)
                else:
                    lax.fori_loop(0, self.slice_tiles, lambda tile, _: multiply(first + tile, accumulators), None)
                return tuple(accumulator[...] for accumulator in accumulators)

            accumulator = plgpu.ACC((TILE_EXPERTS, self.tile_tokens), jnp.float32)
            return pl.run_scoped(chain, *[accumulator] * self.expert_tiles)

        for tile in range(stages):
            load(tile)
        totals = slice_sums(0)
        if self.slices > 1:

            def add_slice(index: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                return tuple(total + part for total, part in zip(totals, slice_sums(index), strict=True))

            totals = lax.fori_loop(1, self.slices, add_slice, totals)
        return totals


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
    block = Block(x.dtype, tile_tokens, 1, slices_per_group, slices.tiles, config.max_stages, SHARED_BYTES)

    def kernel(x_ref: Any, weight_ref: Any, sums_ref: Any, *scratch: Any) -> None:
        expert = lax.axis_index("expert_tile") * TILE_EXPERTS
        group = lax.axis_index("group")
        token = lax.axis_index("token_tile") * tile_tokens
        (total,) = block.totals(x_ref, weight_ref, token, expert, group, *scratch, interpret=interpret)
        # Transposed on the way out, eight experts of a token side by side: whole 32-byte sectors of [T, E].
        target = sums_ref.at[group, pl.ds(token, tile_tokens), pl.ds(expert, TILE_EXPERTS)]
        target.T[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)

    sums = jax.ShapeDtypeStruct((groups, token_tiles * tile_tokens, expert_tiles * TILE_EXPERTS), jnp.float32)
    call = plgpu.kernel(
        kernel,
        out_type=sums,
        grid=(expert_tiles, groups, token_tiles),  # the last one is CUDA's x, the only one that may pass 65535
        grid_names=("expert_tile", "group", "token_tile"),
        scratch_types=block.scratch_types(),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # Warpgroup semantics infers one view per buffer
            unsafe_no_auto_barriers=block.stages == block.tiles,  # no stage is filled twice: there is nothing to order
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
