"""Kernels broken on purpose: each fault is a small edit of the sources in csrc. scripts/faults.py applies and compiles.

They prove the checks of `jax-router verify`: each is a mistake that a router kernel has had or could have, and names
the checks that must see it. The shipped sources carry no switches for tests; what an edit replaces is text of theirs,
and an edit that no longer applies is an error.
"""

from __future__ import annotations

from fault_base import CHECKS, Fault
from fault_list_float32 import FLOAT32_FAULTS

from jax_router.verification.edits import Edit

__all__ = ["CHECKS", "FAULTS", "Edit", "Fault"]

ONE_TOKEN = "sm90_router_gemm_one_token.cu"
FEW_TOKENS = "sm90_router_gemm_few_tokens.cu"
MANY_TOKENS = "sm90_router_gemm_many_tokens.cu"
SUM_PARTS = "sm90_sum_parts.cu"
SELECT = "sm90_route_select.cu"
FUSED = "sm90_route_fused.cu"
ROUTE = "sm90_route.cuh"

FAULTS = (
    Fault(
        name="obsolete-barrier",
        what="a consumer whose probe of a stage fails spins on the ring's first stage, which was filled long ago",
        edits=(
            Edit(
                MANY_TOKENS,
                "      barrier_wait(filled_of(stage), i / M::kRingStages);\n",
                "      uint32_t done;\n"
                '      asm volatile("{\\n.reg .pred p;\\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 "\n'
                '                   "p, [%1], %2;\\nselp.u32 %0, 1, 0, p;\\n}\\n"\n'
                '                   : "=r"(done)\n'
                '                   : "r"(filled_of(stage)), "r"(i / M::kRingStages & 1)\n'
                '                   : "memory");\n'
                "      if (done == 0) barrier_wait(filled_of(stage_of(ring, 0)), i / M::kRingStages);\n",
            ),
        ),
        seen_by=("load", "hang"),
        tokens=(128, 256, 512, 1024),
        extends_to="the many-token kernel; the other kernels have no ring of barriers",
        missed_by_parity=True,
        found_by_quick=True,
    ),
    Fault(
        name="probe-once",
        what="barriers are probed once and the answer is ignored: no loop around try_wait",
        edits=(Edit("sm90_primitives.cuh", "} while (done == 0);  ", "} while (done > 1);  "),),
        seen_by=("load", "hang"),
        tokens=(16, 64, 256),
        extends_to="every kernel but the one-token kernel: rings, and the sums that travel through a cluster",
    ),
    Fault(
        name="barrier-not-reached",
        what="the consumers meet at a barrier of the whole block, which the 128 threads that copy do not reach",
        edits=(
            Edit(
                MANY_TOKENS,
                "named_barrier(kConsumersMet, kConsumers);  // the stages",
                "__syncthreads();  // the stages",
            ),
        ),
        # Threads that ended count as having arrived. With large tiles in clusters they wait for the consumers instead.
        seen_by=("hang", "sanitizers"),
        shapes=("DeepSeek-V3",),
        tokens=(128, 256, 512),
        extends_to="hangs with tiles of 64 experts and more in clusters; elsewhere only the sanitizer can tell",
    ),
    Fault(
        name="weights-before-wait",
        what="the first weights are copied to shared memory before the dependency wait",
        edits=(
            Edit(ONE_TOKEN, "  grid_dependency_wait();\n", ""),
            Edit(
                ONE_TOKEN,
                "for (int operand = 0; operand <= kExperts; ++operand) {\n",
                "for (int operand = kExperts; operand >= 0; --operand) {\n"
                "      if (kNumber == 0 && operand == 0) grid_dependency_wait();\n",
            ),
            Edit(FEW_TOKENS, "  grid_dependency_wait();\n", ""),
            Edit(
                FEW_TOKENS,
                "        copy_weights(unit + i, weight_stage + i * F::kExperts * kRowBytes);\n",
                "        copy_weights(unit + i, weight_stage + i * F::kExperts * kRowBytes);\n"
                "      }\n"
                "      if (slot == stage && i == 0) grid_dependency_wait();\n"
                "      if (i < slice_units) {\n",
            ),
            Edit(MANY_TOKENS, "    grid_dependency_wait();\n    if (elect_one()) copy", "    if (elect_one()) copy"),
            Edit(
                MANY_TOKENS,
                "    copy_box(base + offsetof(Shared, x)",
                "    const auto copy_x = [&] {\n    copy_box(base + offsetof(Shared, x)",
            ),
            Edit(
                MANY_TOKENS,
                "filled_of(stage));\n    const uint32_t weight =",
                "filled_of(stage));\n    };\n    const uint32_t weight =",
            ),
            Edit(
                MANY_TOKENS,
                "filled_of(stage));\n    }\n  };\n",
                "filled_of(stage));\n    }\n    if (i == 0) grid_dependency_wait();\n    copy_x();\n  };\n",
            ),
            Edit(FUSED, "  grid_dependency_wait();\n\n", "  copy_weights(0);\n  grid_dependency_wait();\n\n"),
            Edit(FUSED, "  commit_copies();\n  copy_weights(0);\n", "  commit_copies();\n"),
            Edit(FUSED, "wait_for_copies<2>();", "wait_for_copies<1>();"),
        ),
        seen_by=("neighbours",),
        extends_to="every kernel that reads weights",
        missed_by_parity=True,
    ),
    Fault(
        name="trigger-before-store",
        what="every launch lets its successor start before it has stored its outputs",
        edits=(
            Edit(ONE_TOKEN, "if (p.followed) grid_launch_next();", "grid_launch_next();"),
            Edit(FEW_TOKENS, "if (p.followed) grid_launch_next();", "grid_launch_next();"),
            Edit(MANY_TOKENS, "if (p.followed) grid_launch_next();", "grid_launch_next();"),
            Edit(SUM_PARTS, "  grid_dependency_wait();\n", "  grid_dependency_wait();\n  grid_launch_next();\n"),
            Edit(SELECT, "  grid_dependency_wait();\n", "  grid_dependency_wait();\n  grid_launch_next();\n"),
            Edit(FUSED, "    grid_dependency_wait();\n", "    grid_dependency_wait();\n    grid_launch_next();\n"),
        ),
        seen_by=("neighbours",),
        extends_to="every kernel; it bites a consumer of which some threads do not wait",
        missed_by_parity=True,
    ),
    Fault(
        name="missing-wait",
        what="the launches that read x and the weights have no dependency wait",
        edits=(
            Edit(ONE_TOKEN, "  grid_dependency_wait();\n", ""),
            Edit(FEW_TOKENS, "  grid_dependency_wait();\n", ""),
            Edit(MANY_TOKENS, "    grid_dependency_wait();\n", "", count=2),
            Edit(FUSED, "    grid_dependency_wait();\n", ""),
            Edit(FUSED, "\n  grid_dependency_wait();\n", "\n"),
        ),
        seen_by=("neighbours",),
        extends_to="every kernel but those that wait for the launch before them of the same call",
        missed_by_parity=True,
    ),
    Fault(
        name="missing-wait-within",
        what="the second launch of a call does not wait for the first: it reads what the call before left there",
        edits=(
            Edit(SUM_PARTS, "  grid_dependency_wait();\n", ""),
            Edit(SELECT, "  grid_dependency_wait();\n", ""),
        ),
        seen_by=("experts", "load", "neighbours"),
        operations=("route",),
        shapes=("DeepSeek-V3",),
        tokens=(1, 16, 64),
        extends_to="the sums of split router GEMMs too; past 64 tokens the first launch has as good as ended by then",
    ),
    Fault(
        name="stale-tensor-map",
        what="the copy engine's description of the weights is kept by shape, and with it their address",
        edits=(
            Edit(
                "router_gemm.cu",
                "    status = a.weight_layout == JR_EXPERTS_HIDDEN\n",
                "    static struct {\n"
                "      int64_t experts, hidden;\n"
                "      int dtype, box;\n"
                "      CUtensorMap map;\n"
                "    } kept = {};\n"
                "    if (a.weight_layout == JR_EXPERTS_HIDDEN && kept.experts == a.experts &&\n"
                "        kept.hidden == a.hidden && kept.dtype == a.dtype && kept.box == config.block_experts)\n"
                "      tiled.weight = kept.map;\n"
                "    else\n"
                "    status = a.weight_layout == JR_EXPERTS_HIDDEN\n",
            ),
            Edit(
                "router_gemm.cu",
                "min(config.block_experts, kMaxBoxExperts), report);\n    if (status != JR_OK) return status;\n",
                "min(config.block_experts, kMaxBoxExperts), report);\n    if (status != JR_OK) return status;\n"
                "    if (a.weight_layout == JR_EXPERTS_HIDDEN)\n"
                "      kept = {a.experts, a.hidden, a.dtype, config.block_experts, tiled.weight};\n",
            ),
        ),
        # Checks that compare launches of the same weights with each other see what was kept for the first of them.
        seen_by=("accuracy", "experts"),
        tokens=(128, 256, 1024),
        extends_to="the many-token kernel, from the second address of weights of one shape on",
    ),
    Fault(
        name="bias-unguarded",
        what="the bias, or the correction bias, is read beyond the last expert",
        edits=(
            Edit("sm90_tile.cuh", "p.bias_dtype == JR_NONE || expert >= p.experts)", "p.bias_dtype == JR_NONE)"),
            Edit(ROUTE, "kPerLane, last = experts - 1;", "kPerLane, last = max(experts, 32 * kPerLane) - 1;"),
        ),
        seen_by=("memory", "sanitizers"),
        shapes=("2880x33", "720x33"),
        extends_to="experts that fill no tile; what is read goes into logits that nobody stores",
        missed_by_parity=True,
    ),
    Fault(
        name="stores-beyond-the-end",
        what="a block stores the logits of experts that do not exist: beyond the row, or the buffer",
        edits=(
            Edit(
                ONE_TOKEN,
                "lane / 4 < kExperts && t == 0 && block_expert + lane / 4 < unsigned(p.experts);",
                "lane / 4 < kExperts && t == 0;",
            ),
        ),
        seen_by=("memory", "sanitizers"),
        operations=("router_gemm",),
        shapes=("2880x33", "720x33"),
        tokens=(1,),
        extends_to="the one-token kernel; of several tokens it may overwrite the next one's first logit",
    ),
    Fault(
        name="partial-tile-dropped",
        what="the last unit of K is dropped where it is not full",
        edits=(Edit("reduction_tree.cuh", "return ceil_div(hidden, kUnit);", "return int(unsigned(hidden) / kUnit);"),),
        seen_by=("accuracy", "experts"),
        shapes=("720x33", "2824x128"),
        extends_to="every kernel, the naive one too, where hidden is no multiple of 64",
    ),
    Fault(
        name="arrival-order",
        what="warps add their slice sums to one sum with atomics, in the order in which they get there",
        edits=(
            Edit(
                FEW_TOKENS,
                "  grid_dependency_wait();\n",
                "  for (unsigned i = threadIdx.x; i < slots * Sum::kQuads; i += blockDim.x) slice_sums[i] = {};\n"
                "  __syncthreads();\n"
                "  grid_dependency_wait();\n",
            ),
            Edit(FEW_TOKENS, "slice_sums + slot * Sum::kQuads + lane;", "slice_sums + lane;"),
            Edit(
                FEW_TOKENS,
                "for (int n = 0; n < kExpertTiles; ++n) slot_sums[(m * kExpertTiles + n) * 32] = sums[m][n];\n",
                "for (int n = 0; n < kExpertTiles; ++n) {\n"
                "        float* const sum = &slot_sums[(m * kExpertTiles + n) * 32].x;\n"
                "        atomicAdd(sum, sums[m][n].x), atomicAdd(sum + 1, sums[m][n].y);\n"
                "        atomicAdd(sum + 2, sums[m][n].z), atomicAdd(sum + 3, sums[m][n].w);\n"
                "      }\n",
            ),
        ),
        seen_by=("bits",),
        tokens=(8, 16),
        extends_to="the few-token kernel",
        missed_by_parity=True,
    ),
    Fault(
        name="split-by-tokens",
        what="beyond 16 tokens the parts of K are added left to right instead of in the tree",
        edits=(
            Edit(
                "sm90_cluster_sum.cuh",
                "      store_quad<Element>(p, place, tree_sum<kCluster>(0, [&](int sender) {\n"
                "                            return !kPushed && sender == rank ? sums[quad] : "
                "received[slot_of(sender, rank)][owned];\n"
                "                          }));\n",
                "      const auto part = [&](int sender) {\n"
                "        return !kPushed && sender == rank ? sums[quad] : received[slot_of(sender, rank)][owned];\n"
                "      };\n"
                "      float4 total = tree_sum<kCluster>(0, part);\n"
                "      if (p.tokens > 16) {\n"
                "        total = part(0);\n"
                "        for (int sender = 1; sender < kCluster; ++sender) total = total + part(sender);\n"
                "      }\n"
                "      store_quad<Element>(p, place, total);\n",
            ),
            Edit(
                "sm90_sum_parts.cuh",
                "return tree_sum<kSplits>(0, [&](int part) { return parts[part]; });",
                "return ((parts[0] + parts[1]) + parts[2]) + parts[3];",
            ),
        ),
        seen_by=("bits",),
        operations=("router_gemm",),
        tokens=(17, 32, 64, 256),
        extends_to="clusters of 4 and 8, and split tiles, behind which route selects too, but for its single launch",
        missed_by_parity=True,
    ),
    Fault(
        name="ties-to-highest",
        what="of equal choices the highest expert is taken",
        edits=(
            Edit(ROUTE, "for (int j = kPerLane - 1; j >= 0; --j)", "for (int j = 0; j < kPerLane; ++j)", count=2),
            Edit(ROUTE, "const int winner = __ffs(int(winners)) - 1;", "const int winner = 31 - __clz(int(winners));"),
        ),
        seen_by=("experts",),
        operations=("route",),
        extends_to="tokens with equal choices",
    ),
    Fault(
        name="rounded-logits",
        what="logits are rounded to x's dtype before they are compared, asked or not",
        edits=(Edit(ROUTE, "if (spec.round_logits != 0) {", "if (spec.round_logits >= 0) {"),),
        seen_by=("experts",),
        operations=("route",),
        extends_to="experts and weights of some tokens in a hundred; the logits returned are as they should be",
    ),
    Fault(
        name="row-not-written",
        what="the last row is not written when 8 divides tokens + 1",
        edits=(
            Edit(
                "sm90_cluster_sum.cuh",
                "    const unsigned end = owned_quads(log2_tiles);\n",
                "    const unsigned end = owned_quads(log2_tiles);\n"
                "    Problem written = p;\n"
                "    written.tokens -= p.tokens % 8 == 7;\n",
            ),
            Edit("sm90_cluster_sum.cuh", "place_quad(p, block_token", "place_quad(written, block_token"),
            Edit(
                MANY_TOKENS,
                "        const float* const bias = &shared.cluster_sum.bias",
                "        Problem written = p;\n"
                "        written.tokens -= p.tokens % 8 == 7;\n"
                "        const float* const bias = &shared.cluster_sum.bias",
            ),
            Edit(MANY_TOKENS, "place_quad(p, block_token", "place_quad(written, block_token"),
            Edit(
                ONE_TOKEN,
                "block_expert + lane / 4 < unsigned(p.experts);",
                "block_expert + lane / 4 < unsigned(p.experts) &&\n"
                "                      (p.tokens % 8 != 7 || blockIdx.x + 1 < gridDim.x);",
            ),
            Edit(SUM_PARTS, "token >= unsigned(p.tokens)", "token >= unsigned(p.tokens - (p.tokens % 8 == 7))"),
            Edit(SELECT, "token >= unsigned(p.tokens)", "token >= unsigned(p.tokens - (p.tokens % 8 == 7))"),
            Edit(
                FUSED,
                "min(unsigned(p.tokens) - block_token",
                "min(unsigned(p.tokens - (p.tokens % 8 == 7)) - block_token",
            ),
        ),
        seen_by=("memory",),
        tokens=(7, 15, 63, 127, 1023),
        extends_to="every kernel but the naive one",
    ),
    Fault(
        name="negative-keys",
        what="top-k compares floats by their bits with the sign flipped: negative choices are in reverse",
        edits=(
            Edit(ROUTE, "bits ^ (uint32_t(int32_t(bits) >> 31) | 1u << 31);", "bits ^ (1u << 31);"),
            Edit(ROUTE, "key ^ (~uint32_t(int32_t(key) >> 31) | 1u << 31)", "key ^ (1u << 31)"),
        ),
        seen_by=("experts",),
        operations=("route",),
        extends_to="tokens with a negative choice among their best: random logits have none",
    ),
    Fault(
        name="correction-in-weights",
        what="weights are computed from the choices, with the correction bias, instead of from the scores",
        edits=(
            Edit(
                ROUTE,
                "      weight = score<kScore>(softmax, logit);\n",
                "      weight = score<kScore>(softmax, logit);\n"
                "      if (!kPlain && exists && r.correction_bias_dtype != JR_NONE)\n"
                "        weight += load_per_expert(r.correction_bias, r.correction_bias_dtype, expert);\n",
            ),
        ),
        seen_by=("experts",),
        operations=("route",),
        shapes=("DeepSeek-V3",),
        extends_to="every spec with a correction bias but softmax_topk",
    ),
    *FLOAT32_FAULTS,
)
