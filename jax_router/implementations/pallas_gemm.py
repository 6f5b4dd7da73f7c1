"""The router GEMM as a Pallas kernel on Mosaic GPU: experts on the M side of wgmma, tokens on N, all loads by TMA.

Layout: x [T, H] and weight [E, H] are read where they are, row-major; TMA fills what lies outside of them with zeros,
so nothing is padded in memory. The kernel writes float32 sums [groups, T padded, E padded]. One elementwise kernel of
XLA adds the groups and the bias, and rounds once; in routing, the kernel of `pallas_routing.py` adds them.

Numerics: hidden is cut into tiles of 64 and these into at most 16 equal slices, by hidden alone (`slices_of`). wgmma
chains the tiles of a slice in ascending order from zero. Slice sums are added in ascending order within each of at most
four quarters, and so are the quarters. A block has one slice (few tokens), a quarter, or everything (many tokens) and
leaves one group; what it does not add is added behind it (`add_up`). All are the same tree, and the shape of the tile
does not enter it, so a row's bits do not depend on the batch.

Work: a block has 64 experts and `tile_tokens` tokens for one warpgroup, which asks for as many tiles as shared memory
holds before it multiplies the first; or 128 experts for two, beside which a third one only copies. What limits it is
the bytes that a multiprocessor takes in, about 64 per clock: 64 experts of a 7168-wide model are 917 KB. So few tokens
are spread over as many blocks as the tree has slices; as tokens grow, groups cost more to write and to read again than
blocks save, and wider tiles read x and the weights less often. `pick_config` weighs these two. Expert tiles are the
fast axis of the grid: blocks that run at the same time share their tokens, so x comes from HBM once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

TILE_EXPERTS = 64  # M of one wgmma
TILE_HIDDEN = 64  # 128 bytes of a 16-bit row: the widest swizzle that TMA and wgmma share
MAX_SLICES = 16
QUARTERS = 4
COPIER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232  # per thread: 40 + 2 * 232 of the 512 that three warpgroups share
SHARED_BYTES = 200 * 1024  # of the 227 KB a Hopper block may have
MULTIPROCESSORS = 132  # of an H100 or H200; `pick_config` counts waves of blocks
GROUP_SUM_BYTES = 12 * 1024 * 1024  # a quarter of the L2: so many of several groups come back from there


@dataclasses.dataclass(frozen=True)
class Slices:
    """The reduction tree: `count` slices of `tiles` tiles of `TILE_HIDDEN`. The last one may reach beyond hidden."""

    count: int
    tiles: int

    def of_block(self, split: int) -> tuple[int, ...]:
        """How many slices of each quarter a block adds up, if up to `split` blocks share K (see `Config`).

        The last block may have slices beyond the last one. They are zero.
        """
        per_quarter = tiles_of(self.count, QUARTERS)
        if split == MAX_SLICES:
            return (1,)
        if split == QUARTERS:
            return (per_quarter,)
        return tuple(min(per_quarter, self.count - first) for first in range(0, self.count, per_quarter))


@dataclasses.dataclass(frozen=True)
class Config:
    """How the same tree is spread over the GPU. Every configuration gives the same bits."""

    tile_tokens: int  # N of one wgmma: a multiple of 8, at most 256 for single slices, else 128: sums fit registers
    split: int  # blocks that share a tile's K: MAX_SLICES (one per slice), QUARTERS (one per quarter) or 1
    warpgroups: int = 1  # that multiply, each 64 experts; 1, or 2 beside one that copies
    max_stages: int = 16  # tiles in flight per block, as far as shared memory holds them; at least 2


CONFIGS = (
    Config(8, split=16),
    Config(16, split=16),
    Config(32, split=16),
    Config(64, split=16),
    Config(32, split=4),
    Config(64, split=4),
    Config(64, split=4, warpgroups=2),
    Config(128, split=4, warpgroups=2),
    Config(64, split=1),
    Config(64, split=1, warpgroups=2),
)


def slices_of(hidden: int) -> Slices:
    """The reduction tree of a hidden size. It depends on nothing else, or a token's bits would depend on its batch."""
    tiles = tiles_of(hidden, TILE_HIDDEN)
    tiles_per_slice = tiles_of(tiles, MAX_SLICES)
    return Slices(tiles_of(tiles, tiles_per_slice), tiles_per_slice)


def pick_config(tokens: int, hidden: int, experts: int) -> Config:
    """The configuration that costs least: bytes that a multiprocessor takes in, and a 30th of the bytes of the groups.

    Sums of a single group cost nothing more. More of several groups than `GROUP_SUM_BYTES` are not made. Both numbers
    were fitted to times on an H100 of four models at ten numbers of tokens, logits and routing, 2026-11-27.
    """
    slices = slices_of(hidden)

    def cost(config: Config) -> float:
        tile_experts = TILE_EXPERTS * config.warpgroups
        slices_per_block = sum(slices.of_block(config.split))
        groups = tiles_of(slices.count, slices_per_block)
        tiles = tiles_of(tokens, config.tile_tokens) * tiles_of(experts, tile_experts)
        sums = 4 * groups * tiles * config.tile_tokens * tile_experts if groups > 1 else 0
        if sums > GROUP_SUM_BYTES:
            return math.inf
        waves = tiles_of(groups * tiles, MULTIPROCESSORS)
        read = 2 * slices_per_block * slices.tiles * TILE_HIDDEN * (tile_experts + config.tile_tokens)
        return waves * read + sums / 30

    return min(CONFIGS, key=cost)


def group_sums(x: jax.Array, weight: jax.Array, config: Config, slices: Slices, interpret: Any = None) -> jax.Array:
    """The kernel: float32 [groups, T padded, E padded], of which `add_up` makes x @ weight.T.

    Padding is to whole tiles and holds zeros. The groups are the slices, the quarters, or one with everything.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    tile_tokens, tile_experts = config.tile_tokens, TILE_EXPERTS * config.warpgroups
    token_tiles, expert_tiles = tiles_of(x.shape[0], tile_tokens), tiles_of(weight.shape[0], tile_experts)
    quarters = slices.of_block(config.split)
    groups = tiles_of(slices.count, sum(quarters))
    tiles = sum(quarters) * slices.tiles
    stage_bytes = (tile_experts + tile_tokens) * TILE_HIDDEN * x.dtype.itemsize
    stages = min(tiles, config.max_stages, SHARED_BYTES // stage_bytes)
    copier = config.warpgroups == 2

    def rows(buffer: Any, stage: Any, count: int) -> Any:
        """One stage of a shared-memory buffer as plain swizzled rows, the target of a TMA copy.

        wgmma wants the buffer tiled by (8, 64). Tiled and plain are the same bytes, but a copy into the tiled view
        would need tokens, experts and hidden to be whole tiles. The interpreter knows no views and needs none.
        """
        if interpret is not None:
            return buffer.at[stage]
        return dataclasses.replace(buffer, transforms=buffer.transforms[:1]).at[stage].reshape(count, TILE_HIDDEN)

    def kernel(
        x_ref: Any, weight_ref: Any, sums_ref: Any, weight_buffer: Any, x_buffer: Any, loaded: Any, read: Any = None
    ) -> None:
        group, tile_index = lax.axis_index("group"), lax.axis_index("tile")
        token, expert = tile_index // expert_tiles * tile_tokens, tile_index % expert_tiles * tile_experts
        warpgroup = lax.axis_index("warpgroup") if copier else 0

        def load(tile: Any) -> None:
            stage = tile % stages
            hidden = pl.ds((group * tiles + tile) * TILE_HIDDEN, TILE_HIDDEN)
            for source, first, buffer, count in (
                (weight_ref, expert, weight_buffer, tile_experts),
                (x_ref, token, x_buffer, tile_tokens),
            ):
                of_tile = source.at[pl.ds(first, count), hidden]
                plgpu.copy_gmem_to_smem(of_tile, rows(buffer, stage, count), loaded.at[stage])

        def load_first() -> None:
            for tile in range(stages):
                load(tile)

        def copy() -> None:
            def load_once_read(tile: Any) -> None:
                plgpu.barrier_wait(read.at[tile % stages])
                load(tile)

            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
            load_first()
            if stages < tiles:
                lax.fori_loop(stages, tiles, lambda tile, _: load_once_read(tile), None)

        def multiply(tile: Any, accumulator: Any) -> None:
            stage = tile % stages
            plgpu.barrier_wait(loaded.at[stage])  # of this very stage: weight and x are both there
            of_weight = weight_buffer.at[stage]
            if copier:
                of_weight = of_weight.at[pl.ds(warpgroup * TILE_EXPERTS, TILE_EXPERTS)]
            plgpu.wgmma(accumulator, of_weight, x_buffer.at[stage].T)
            if stages < tiles:
                plgpu.wgmma_wait(1)  # the tile before has been read, so its stage is free

                @pl.when((tile >= 1) & (tile + stages <= tiles))
                def _() -> None:
                    if copier:
                        plgpu.barrier_arrive(read.at[(tile - 1) % stages])
                    else:
                        load(tile - 1 + stages)

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

        def quarter_sum(first: int, count: int) -> jax.Array:
            # From +0, which no sum of -0 survives: slices beyond the last one must not change a bit.
            total = slice_sum(first) + 0.0
            if count == 1:
                return total
            return lax.fori_loop(first + 1, first + count, lambda index, total: total + slice_sum(index), total)

        def multiply_all() -> None:
            if copier:
                plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")
            # One quarter after the other: their tiles come in this order.
            total = quarter_sum(0, quarters[0])
            for quarter in range(1, len(quarters)):
                total = total + quarter_sum(quarter * quarters[0], quarters[quarter])
            # Transposed on the way out, eight experts of a token side by side: whole 32-byte sectors of [T, E].
            of_experts = pl.ds(expert + warpgroup * TILE_EXPERTS, TILE_EXPERTS)
            target = sums_ref.at[group, pl.ds(token, tile_tokens), of_experts]
            target.T[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)

        if copier:
            pl.when(warpgroup == config.warpgroups)(copy)
            pl.when(warpgroup < config.warpgroups)(multiply_all)
        else:
            load_first()
            multiply_all()

    def stages_of(count: int) -> Any:
        tiled = plgpu.TilingTransform((8, TILE_HIDDEN))  # type: ignore[abstract]
        swizzled = plgpu.SwizzleTransform(TILE_HIDDEN * x.dtype.itemsize)  # type: ignore[abstract]
        return plgpu.SMEM((stages, count, TILE_HIDDEN), x.dtype, transforms=(tiled, swizzled))

    scratch: list[Any] = [
        stages_of(tile_experts),
        stages_of(tile_tokens),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ]
    threads: dict[str, Any] = {}
    if copier:
        scratch.append(plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=stages))
        threads = {"num_threads": config.warpgroups + 1, "thread_name": "warpgroup"}
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((groups, token_tiles * tile_tokens, expert_tiles * tile_experts), jnp.float32),
        grid=(groups, token_tiles * expert_tiles),  # the last one is CUDA's x, the only one that may pass 65535
        grid_names=("group", "tile"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # Warpgroup semantics infers one view per buffer
            # No stage is filled twice, or the copier waits until it has been read: there is nothing to order.
            unsafe_no_auto_barriers=stages == tiles or copier,
        ),
        kernel_name="sm90_pallas_router_gemm",
        interpret=interpret,
        **threads,
    )
    return call(x, weight)


def add_up(groups: list[jax.Array]) -> jax.Array:
    """The sum of the groups that `group_sums` leaves, in the order of the tree.

    Explicit additions, because XLA may order a reduction as it likes.
    """
    per_quarter = tiles_of(len(groups), QUARTERS)
    quarters = [groups[first : first + per_quarter] for first in range(0, len(groups), per_quarter)]
    return functools.reduce(jnp.add, [functools.reduce(jnp.add, quarter) for quarter in quarters])


def add_groups(sums: jax.Array, tokens: int, experts: int) -> jax.Array:
    """Logits [tokens, experts] in float32 from what `group_sums` returns. XLA fuses this, the bias and the rounding."""
    return add_up([sums[group, :tokens, :experts] for group in range(sums.shape[0])])


def tiles_of(size: int, tile: int) -> int:
    return -(-size // tile)
