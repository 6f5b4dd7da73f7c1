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
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

TILE_EXPERTS = 64  # M of one wgmma
TILE_HIDDEN = 64  # 128 bytes of a 16-bit row: the widest swizzle that TMA and wgmma share
MAX_SLICES = 16
QUARTERS = 4
SHARED_BYTES = 200 * 1024  # of the 227 KB a Hopper block may have
GROUP_SUM_BYTES = 24 * 1024 * 1024  # half of the H200's L2: beyond it the sums of the slices go through HBM


@dataclasses.dataclass(frozen=True)
class Slices:
    """The reduction tree: `count` slices of `tiles` tiles of `TILE_HIDDEN`. The last one may reach beyond hidden.

    The slices of a quarter are added in ascending order, then the quarters.
    """

    count: int
    tiles: int

    @property
    def per_quarter(self) -> int:
        return tiles_of(self.count, QUARTERS)

    @property
    def quarters(self) -> int:
        return tiles_of(self.count, self.per_quarter)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the same tree is spread over the GPU. Every configuration gives the same bits."""

    tile_tokens: int  # N of one wgmma: a multiple of 8, at most 256 if split into slices, else 128: sums fit registers
    split: int  # blocks that share a tile's K: 16 (one per slice), 4 (one per quarter) or 1
    warpgroups: int = 1  # each with 64 experts of the block's tile
    copier: bool = False  # a warpgroup that does nothing but copy
    multicast: int = 1  # blocks of neighbouring expert tiles in a cluster, which share x; needs a copier
    max_stages: int = 16  # tiles in flight per block, as far as shared memory holds them; at least 2
    shared_kb: int = 200  # 100: two blocks per multiprocessor
    pdl: str = (
        "trigger"  # "": no programmatic launch; "wait"; "trigger": the sums' kernel lets the next one start early
    )
    finish: str = "pallas"  # who adds the groups of router_gemm: "xla" or "pallas" (where experts % 32 == 0)


CONFIGS = (
    *(Config(tile, 16, pdl="", finish="xla") for tile in (8, 16, 32, 64, 128)),
    Config(128, 1, pdl="", finish="xla"),
    *(Config(tile, 16, pdl="wait") for tile in (8, 64)),
    *(Config(tile, 16, pdl="trigger", finish="xla") for tile in (8, 64)),
    *(Config(tile, 16) for tile in (8, 16, 32, 64, 128)),
    *(Config(tile, 4) for tile in (8, 16, 32, 64, 128)),
    *(Config(tile, 16, copier=True) for tile in (64, 128)),
    *(Config(tile, 4, copier=True) for tile in (64, 128)),
    *(Config(tile, 16, warpgroups=2, copier=True) for tile in (16, 32, 64, 128)),
    *(Config(tile, 4, warpgroups=2, copier=True) for tile in (32, 64, 128)),
    *(Config(tile, 4, warpgroups=2, copier=True, shared_kb=100) for tile in (32, 64, 128)),
    Config(128, 4, copier=True, shared_kb=100),
    Config(128, 4, copier=True, multicast=2),
    Config(128, 4, warpgroups=2, copier=True, multicast=2),
    Config(64, 1),
    Config(128, 1),
    Config(128, 1, copier=True),
    Config(128, 1, copier=True, shared_kb=100),
    Config(64, 1, warpgroups=2, copier=True),
    Config(64, 1, warpgroups=2, copier=True, shared_kb=100),
    Config(128, 1, warpgroups=2, copier=True),
    Config(128, 1, copier=True, multicast=2),
    Config(128, 1, warpgroups=2, copier=True, multicast=2),
    Config(128, 1, copier=True, multicast=4),
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
        return Config(tile_tokens, split=16)
    return Config(128, split=1)


def group_sums(x: jax.Array, weight: jax.Array, config: Config, slices: Slices, interpret: Any = None) -> jax.Array:
    """The kernel: float32 [groups, T padded, E padded], of which `add_up` makes x @ weight.T.

    Padding is to whole tiles and holds zeros. The groups are the slices, the quarters, or one with everything.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    tile_tokens, warpgroups, multicast = config.tile_tokens, config.warpgroups, config.multicast
    token_tiles = tiles_of(x.shape[0], tile_tokens)
    tile_experts = TILE_EXPERTS * warpgroups
    expert_tiles = tiles_of(tiles_of(weight.shape[0], tile_experts), multicast)  # of a cluster
    # Slices of every quarter that a block adds up, and blocks.
    spans: tuple[int, ...]
    if config.split == 16:
        groups, spans = slices.count, (1,)
    elif config.split == 4:
        groups, spans = slices.quarters, (slices.per_quarter,)  # what is beyond the last slice is zero
    else:
        rest = slices.count - (slices.quarters - 1) * slices.per_quarter
        groups, spans = 1, (slices.per_quarter,) * (slices.quarters - 1) + (rest,)
    tiles = sum(spans) * slices.tiles
    stage_bytes = (tile_experts + tile_tokens) * TILE_HIDDEN * x.dtype.itemsize
    stages = min(tiles, config.max_stages, config.shared_kb * 1024 // stage_bytes)

    def rows(buffer: Any, stage: Any, count: int) -> Any:
        """One stage of a shared-memory buffer as plain swizzled rows, the target of a TMA copy.

        wgmma wants the buffer tiled by (8, 64). Tiled and plain are the same bytes, but a copy into the tiled view
        would need tokens, experts and hidden to be whole tiles. The interpreter knows no views and needs none.
        """
        if interpret is not None:
            return buffer.at[stage]
        return dataclasses.replace(buffer, transforms=buffer.transforms[:1]).at[stage].reshape(count, TILE_HIDDEN)

    def kernel(
        x_ref: Any, weight_ref: Any, sums_ref: Any, weight_buffer: Any, x_buffer: Any, loaded: Any, consumed: Any = None
    ) -> None:
        if interpret is None and config.pdl:
            plgpu.griddepcontrol_wait()
            if config.pdl == "trigger":
                plgpu.griddepcontrol_launch_dependents()
        group, tile_index = lax.axis_index("group"), lax.axis_index("tile")
        token = tile_index // expert_tiles * tile_tokens
        expert = tile_index % expert_tiles * (multicast * tile_experts)
        if multicast > 1:
            expert = expert + lax.axis_index("peer") * tile_experts
        warpgroup = lax.axis_index("warpgroup") if config.copier else 0

        def load(tile: Any) -> None:
            stage = tile % stages
            hidden = pl.ds((group * tiles + tile) * TILE_HIDDEN, TILE_HIDDEN)
            of_weight = weight_ref.at[pl.ds(expert, tile_experts), hidden]
            plgpu.copy_gmem_to_smem(of_weight, rows(weight_buffer, stage, tile_experts), loaded.at[stage])
            of_x = x_ref.at[pl.ds(token, tile_tokens), hidden]
            axes = "peer" if multicast > 1 else None
            plgpu.copy_gmem_to_smem(of_x, rows(x_buffer, stage, tile_tokens), loaded.at[stage], collective_axes=axes)

        def load_again(tile: Any) -> None:
            plgpu.barrier_wait(consumed.at[tile % stages])
            load(tile)

        def load_first() -> None:
            for tile in range(stages):
                load(tile)

        def copy() -> None:
            if interpret is None and warpgroups == 2:
                plgpu.set_max_registers(40, action="decrease")
            load_first()
            if stages < tiles:
                lax.fori_loop(stages, tiles, lambda tile, _: load_again(tile), None)

        def multiply(tile: Any, accumulator: Any) -> None:
            stage = tile % stages
            plgpu.barrier_wait(loaded.at[stage])  # of this very stage: weight and x are both there
            of_weight = weight_buffer.at[stage]
            if warpgroups > 1:
                of_weight = of_weight.at[pl.ds(warpgroup * TILE_EXPERTS, TILE_EXPERTS)]
            plgpu.wgmma(accumulator, of_weight, x_buffer.at[stage].T)
            if stages < tiles:
                plgpu.wgmma_wait(1)  # the tile before has been read, so its stage is free

                @pl.when((tile >= 1) & (tile + stages <= tiles))
                def _() -> None:
                    if config.copier:
                        plgpu.barrier_arrive(consumed.at[(tile - 1) % stages])
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

        def add_slices() -> None:
            if interpret is None and warpgroups == 2:
                plgpu.set_max_registers(232, action="increase")
            quarters, first = [], 0
            for span in spans:
                # From +0, which no sum of -0 survives: slices beyond the last one must not change a bit.
                total = slice_sum(first) + 0.0
                if span > 1:
                    total = lax.fori_loop(first + 1, first + span, lambda index, total: total + slice_sum(index), total)
                quarters = [total] if not quarters else [quarters[0] + total]
                first += span
            # Transposed on the way out, eight experts of a token side by side: whole 32-byte sectors of [T, E].
            columns = pl.ds(expert + warpgroup * TILE_EXPERTS, TILE_EXPERTS)
            target = sums_ref.at[group, pl.ds(token, tile_tokens), columns]
            target.T[...] = plgpu.layout_cast(quarters[0], plgpu.Layout.WGMMA_TRANSPOSED)

        if config.copier:
            pl.when(warpgroup == warpgroups)(copy)
            pl.when(warpgroup < warpgroups)(add_slices)
        else:
            load_first()
            add_slices()

    def stages_of(count: int) -> Any:
        tiled = plgpu.TilingTransform((8, TILE_HIDDEN))  # type: ignore[abstract]
        swizzled = plgpu.SwizzleTransform(TILE_HIDDEN * x.dtype.itemsize)  # type: ignore[abstract]
        return plgpu.SMEM((stages, count, TILE_HIDDEN), x.dtype, transforms=(tiled, swizzled))

    columns = expert_tiles * multicast * tile_experts
    scratch = [stages_of(tile_experts), stages_of(tile_tokens), plgpu.Barrier(num_arrivals=2, num_barriers=stages)]
    if config.copier and stages < tiles:
        if multicast > 1:
            scratch.append(
                plgpu.ClusterBarrier(collective_axes=("peer",), num_arrivals=warpgroups, num_barriers=stages)
            )
        else:
            scratch.append(plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages))
    threads = {"num_threads": warpgroups + 1, "thread_name": "warpgroup"} if config.copier else {}
    clusters = {"cluster": (multicast,), "cluster_names": ("peer",)} if multicast > 1 else {}
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((groups, token_tiles * tile_tokens, columns), jnp.float32),
        # The last one is CUDA's x, the only one that may pass 65535. Neighbours have the same x.
        grid=(groups, token_tiles * expert_tiles),
        grid_names=("group", "tile"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # Warpgroup semantics infers one view per buffer
            # No stage is filled twice, or barriers say when: there is nothing to order.
            unsafe_no_auto_barriers=stages == tiles or config.copier,
        ),
        kernel_name="sm90_pallas_router_gemm",
        interpret=interpret,
        **threads,
        **clusters,
    )
    return call(x, weight)


def add_up(sums: list[Any], slices: Slices) -> Any:
    """The groups that `group_sums` leaves, added in the order of the tree.

    Explicit additions, because XLA may order a reduction as it likes.
    """
    if len(sums) > slices.quarters:
        firsts = range(0, len(sums), slices.per_quarter)
        sums = [functools.reduce(operator.add, sums[first : first + slices.per_quarter]) for first in firsts]
    return functools.reduce(operator.add, sums)


def add_groups(sums: jax.Array, tokens: int, experts: int, slices: Slices) -> jax.Array:
    """Logits [tokens, experts] in float32 from what `group_sums` returns. XLA fuses the bias and the rounding."""
    return add_up([sums[group, :tokens, :experts] for group in range(sums.shape[0])], slices)


def tiles_of(size: int, tile: int) -> int:
    return -(-size // tile)
