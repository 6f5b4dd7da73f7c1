// The launcher: checks a problem, picks a configuration of the one reduction tree, launches it.
#include "launch.cuh"
#include "sm90_router_gemm.cuh"

namespace jax_router {
namespace {

constexpr struct {
  const Config* first;
  int count;
} kLists[] = {{one_token_configs, kOneTokenConfigs},
              {few_tokens_configs, kFewTokensConfigs},
              {many_tokens_configs, kManyTokensConfigs},
              {float32_one_token_configs, kFloat32OneTokenConfigs},
              {float32_configs, kFloat32Configs}};
constexpr int kConfigs = [] {
  int count = 0;
  for (const auto& list : kLists) count += list.count;
  return count;
}();

const Config& config_at(int index) {
  const auto* list = kLists;
  for (; index >= list->count; ++list) index -= list->count;
  return list->first[index];
}

// ---- What is taken -------------------------------------------------------------------------------------------------

// Why the kernels do not take this problem, or JR_OK. The only statement of their limits besides the Python predicate.
int check_problem(const jr_router_gemm_args& a, const Report& report) {
  if (a.dtype < JR_BFLOAT16 || a.dtype > JR_FLOAT32 ||
      (a.weight_dtype != a.dtype && (a.dtype != JR_BFLOAT16 || a.weight_dtype != JR_FLOAT32)))
    return report.fail(
        JR_UNSUPPORTED,
        "dtype is %d and weight_dtype %d; expected both bfloat16 (0), both float16 (1), both float32 (2) "
        "or bfloat16 and float32",
        a.dtype, a.weight_dtype);
  if (a.bias_dtype != JR_NONE && a.bias_dtype != JR_FLOAT32 && a.bias_dtype != a.dtype)
    return report.fail(JR_UNSUPPORTED, "bias_dtype is %d; expected none (-1), float32 (2) or x's dtype (%d)",
                       a.bias_dtype, a.dtype);
  if (a.out_dtype != JR_FLOAT32 && a.out_dtype != a.dtype)
    return report.fail(JR_UNSUPPORTED, "out_dtype is %d; expected float32 (2) or x's dtype (%d)", a.out_dtype, a.dtype);
  if (a.tokens < 0 || a.tokens > (int64_t(1) << 27))
    return report.fail(JR_UNSUPPORTED, "tokens is %lld; expected 0 to 2^27", static_cast<long long>(a.tokens));
  if (a.hidden < 8 || a.hidden % 8 != 0 || a.hidden > kMaxHidden)
    return report.fail(JR_UNSUPPORTED, "hidden is %lld; expected a multiple of 8 from 8 to %d",
                       static_cast<long long>(a.hidden), kMaxHidden);
  if (a.weight_layout != JR_EXPERTS_HIDDEN && a.weight_layout != JR_HIDDEN_EXPERTS)
    return report.fail(JR_UNSUPPORTED, "weight_layout is %d; expected [experts, hidden] (0) or [hidden, experts] (1)",
                       a.weight_layout);
  if (a.weight_layout == JR_HIDDEN_EXPERTS && a.experts % 8 != 0)
    return report.fail(JR_UNSUPPORTED, "experts is %lld; expected a multiple of 8 with weights [hidden, experts]",
                       static_cast<long long>(a.experts));
  if (a.experts < 1 || a.experts > (1 << 16))
    return report.fail(JR_UNSUPPORTED, "experts is %lld; expected 1 to 65536", static_cast<long long>(a.experts));
  if (a.tokens * ceil_div(int(a.experts), kTileExperts) >= int64_t(1) << 31)
    return report.fail(JR_UNSUPPORTED, "tokens times experts rounded up to 8 is %lld; expected less than 2^34",
                       static_cast<long long>(a.tokens * ceil_div(int(a.experts), kTileExperts) * kTileExperts));
  return JR_OK;
}

int check_pointers(const jr_router_gemm_args& a, const Report& report) {
  if (a.workspace_bytes < 0 || (a.workspace == nullptr) != (a.workspace_bytes == 0))
    return report.fail(JR_UNSUPPORTED, "workspace is %p with %lld bytes; expected device memory, or NULL and 0",
                       a.workspace, static_cast<long long>(a.workspace_bytes));
  const auto misaligned = [](const void* pointer, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes != 0;
  };
  if (a.x == nullptr || a.weight == nullptr || a.out == nullptr || (a.bias == nullptr) != (a.bias_dtype == JR_NONE))
    return report.fail(JR_UNSUPPORTED, "x is %p, weight %p, bias %p (dtype %d), out %p; expected device memory", a.x,
                       a.weight, a.bias, a.bias_dtype, a.out);
  if (misaligned(a.x, 16) || misaligned(a.weight, 16) || misaligned(a.out, 16) || misaligned(a.workspace, 16))
    return report.fail(JR_UNSUPPORTED,
                       "x is at %p, weight at %p, out at %p, workspace at %p; expected 16-byte alignment", a.x,
                       a.weight, a.out, a.workspace);
  return JR_OK;
}

int operands_of(const jr_router_gemm_args& a) { return a.weight_dtype == a.dtype ? a.dtype : kFloat32Weight; }
int bytes_of(int dtype) { return dtype == JR_FLOAT32 ? 4 : 2; }

int64_t token_tiles(const Config& config, const jr_router_gemm_args& a) {
  return (a.tokens + config.block_tokens - 1) / config.block_tokens;
}
int expert_tiles(const Config& config, const jr_router_gemm_args& a) {
  return ceil_div(int(a.experts), config.block_experts);
}

int part_row(const jr_router_gemm_args& a) { return ceil_div(int(a.experts), 4) * 4; }
int64_t parts_bytes(const Config& config, const jr_router_gemm_args& a) {
  return config.splits == 1 ? 0 : config.splits * a.tokens * part_row(a) * int64_t(sizeof(float));
}

constexpr int kMaxGridY = 65535;

// Whether a configuration takes this problem: its layout of the weight, its blocks fit a multiprocessor, its tiles a
// grid, its partial sums the workspace.
bool fits(const Config& config, const jr_router_gemm_args& a) {
  return config.kernel[a.weight_layout][operands_of(a)] != nullptr && a.tokens <= config.max_tokens &&
         units_of(int(a.hidden)) >= config.min_units && a.hidden <= config.max_hidden &&
         config.shared_bytes(int(a.hidden)) <= kMaxSharedBytes &&
         (config.tiled || expert_tiles(config, a) <= kMaxGridY) && parts_bytes(config, a) <= a.workspace_bytes;
}

// ---- Which configuration -------------------------------------------------------------------------------------------

// Estimated microseconds of a configuration: waves of clusters, each as long as its bytes. Ranks configurations; says
// nothing about bits, which are equal.
double estimate(const Config& config, const jr_router_gemm_args& a, bool routed) {
  // cudaOccupancyMaxActiveClusters of an H200, one block on a multiprocessor. Not asked again on an H100.
  const int at_once = config.cluster == 8 ? 15 : config.cluster == 4 ? 30 : config.cluster == 2 ? 66 : 132;
  const int hidden = int(a.hidden), shared = config.shared_bytes(hidden) + kReservedSharedBytes;
  const int resident = max(1, min((kMaxSharedBytes + kReservedSharedBytes) / shared,
                                  kRegisters / (config.registers * config.threads(hidden))));
  const int64_t clusters = token_tiles(config, a) * expert_tiles(config, a) * config.splits;
  const int64_t waves = (clusters + at_once * resident - 1) / (at_once * resident);
  const double tokens = a.tokens < config.block_tokens ? double(a.tokens) : config.block_tokens;
  const double of_tokens = tokens * bytes_of(a.dtype), of_experts = config.block_experts * bytes_of(a.weight_dtype);
  const double kilobytes = (of_tokens + of_experts) * hidden / (config.cluster * config.splits) * 1e-3;  // of a block
  const Cost& cost = config.cost[a.weight_layout];
  const double saved = routed && waves == 1 ? config.summed_elsewhere : 0;
  return cost.first - saved + double(waves - 1) * cost.wave + double(waves) * kilobytes * cost.per_block_kilobyte +
         double(clusters) * config.cluster * kilobytes * 1e-3 * cost.per_megabyte;
}

// The cheapest configuration that fits; there is one for every problem that check_problem takes.
int pick(const jr_router_gemm_args& a, bool routed) {
  int best = -1;
  double least = 0;
  for (int i = 0; i < kConfigs; ++i) {
    if (!fits(config_at(i), a)) continue;
    const double microseconds = estimate(config_at(i), a, routed);
    if (best < 0 || microseconds < least) best = i, least = microseconds;
  }
  return best;
}

// ---- Launch --------------------------------------------------------------------------------------------------------

int prepare_current_device(const Report& report) {
  static OncePerDevice once;
  return once.run(report, [&](int) -> int {
    for (int i = 0; i < kConfigs; ++i) {
      for (const auto& kernels : config_at(i).kernel) {
        for (const void* kernel : kernels) {
          if (kernel == nullptr) continue;
          JR_CHECK(report, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes));
        }
      }
    }
    for (const void* kernel : sum_parts_kernels) {
      cudaFuncAttributes loaded;  // now, and not during a capture
      JR_CHECK(report, cudaFuncGetAttributes(&loaded, kernel));
    }
    return JR_OK;
  });
}

// Describes a row-major [rows, columns] matrix to the copy engine in boxes of `box_rows` by `box_columns`, 64 or 32,
// whose chunks it swizzles within a row of the box.
int describe(CUtensorMap* map, const void* matrix, int dtype, int64_t rows, int64_t columns, int box_rows,
             int box_columns, const Report& report) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr)
    return report.fail(JR_CUDA_ERROR, "the driver has no cuTensorMapEncodeTiled; expected CUDA 12.0 or newer");
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, stride = cuuint64_t(columns) * 2;
  const cuuint32_t box[2] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const CUtensorMapDataType type =
      dtype == JR_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(matrix), sizes, &stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return JR_OK;
  return report.fail(JR_CUDA_ERROR, "cuTensorMapEncodeTiled for %lld x %lld in %d x %d at %p failed: CUresult %d",
                     static_cast<long long>(rows), static_cast<long long>(columns), box_rows, box_columns, matrix,
                     int(result));
}

// See enqueue_gemm().
int launch(const Config& config, const jr_router_gemm_args& a, Problem* routed, cudaStream_t stream,
           const Report& report) {
  TiledProblem tiled = {device_problem(a, config.block_experts), {}, {}};
  Problem& problem = tiled.problem;
  if (config.splits > 1) problem.parts = static_cast<float*>(a.workspace);
  // From where on blocks that only wait take room from blocks that multiply, nothing is launched ahead of its time.
  constexpr int kMostFollowed = 64;
  problem.followed = routed != nullptr && a.tokens <= kMostFollowed;
  if (config.tiled) {
    // A partial tile of tokens copies no more rows than it has, in whole swizzle atoms.
    problem.box_tokens = a.tokens < config.block_tokens ? (int(a.tokens) + 7) / 8 * 8 : config.block_tokens;
    int status = describe(&tiled.x, a.x, a.dtype, a.tokens, a.hidden, problem.box_tokens, kUnit, report);
    if (status != JR_OK) return status;
    status = a.weight_layout == JR_EXPERTS_HIDDEN
                 ? describe(&tiled.weight, a.weight, a.dtype, a.experts, a.hidden, config.block_experts, kUnit, report)
                 : describe(&tiled.weight, a.weight, a.dtype, a.hidden, a.experts, kUnit,
                            min(config.block_experts, kMaxBoxExperts), report);
    if (status != JR_OK) return status;
  }
  const unsigned tiles = unsigned(token_tiles(config, a)), parts = unsigned(config.cluster * config.splits);
  const unsigned planes = ceil_div(int(tiles), kMaxGridY);
  const dim3 blocks = config.tiled ? dim3(parts * problem.expert_tiles, ceil_div(int(tiles), int(planes)), planes)
                                   : dim3(parts * tiles, problem.expert_tiles);
  void* const parameter = config.tiled ? static_cast<void*>(&tiled) : static_cast<void*>(&problem);
  const int status = enqueue(
      Launch(blocks, config.threads(problem.hidden), config.shared_bytes(problem.hidden), config.cluster, stream),
      config.kernel[a.weight_layout][operands_of(a)], parameter, config.name, a, report);
  if (routed != nullptr) *routed = problem;
  if (status != JR_OK || config.splits == 1 || routed != nullptr) return status;
  const int64_t quads = a.tokens * (problem.part_row / 4);
  const dim3 sum_blocks(unsigned((quads + kSumPartsThreads - 1) / kSumPartsThreads));
  return enqueue(Launch(sum_blocks, kSumPartsThreads, 0, 1, stream), sum_parts_kernels[a.dtype], &problem, config.name,
                 a, report);
}

}  // namespace

int check_gemm(const jr_router_gemm_args& a, const Report& report) {
  const int status = check_problem(a, report);
  return status != JR_OK || a.tokens == 0 ? status : check_pointers(a, report);
}

Problem device_problem(const jr_router_gemm_args& a, int block_experts) {
  return {.x = a.x,
          .weight = a.weight,
          .bias = a.bias,
          .out = a.out,
          .parts = nullptr,
          .tokens = a.tokens,
          .hidden = int(a.hidden),
          .experts = int(a.experts),
          .bias_dtype = a.bias_dtype,
          .out_dtype = a.out_dtype,
          .expert_tiles = ceil_div(int(a.experts), block_experts),
          .box_tokens = 0,
          .part_row = part_row(a),
          .followed = false};
}

int enqueue_gemm(const jr_router_gemm_args& a, Problem* routed, cudaStream_t stream, const Report& report) {
  if (const int status = prepare_current_device(report); status != JR_OK) return status;
  const int config = a.config == -1 ? pick(a, routed != nullptr) : a.config;
  if (config < 0 || config >= kConfigs || (a.config != -1 && !fits(config_at(config), a)))
    return report.fail(JR_UNSUPPORTED,
                       "config is %d; expected -1 or one of 0 to %d that fits tokens=%lld hidden=%lld experts=%lld, "
                       "weight_layout=%d and %lld bytes of workspace",
                       config, kConfigs - 1, static_cast<long long>(a.tokens), static_cast<long long>(a.hidden),
                       static_cast<long long>(a.experts), a.weight_layout, static_cast<long long>(a.workspace_bytes));
  return launch(config_at(config), a, routed, stream, report);
}

}  // namespace jax_router

using namespace jax_router;

int jr_router_gemm_num_configs(void) { return kConfigs; }

const char* jr_router_gemm_config_name(int config) {
  return config >= 0 && config < kConfigs ? config_at(config).name : "";
}

int jr_router_gemm_config_fits(int config, const jr_router_gemm_args* args) {
  return config >= 0 && config < kConfigs && check_problem(*args, Report{}) == JR_OK && fits(config_at(config), *args);
}

int jr_router_gemm_pick_config(const jr_router_gemm_args* args) {
  return check_problem(*args, Report{}) == JR_OK ? pick(*args, false) : -1;
}

int jr_router_gemm(const jr_router_gemm_args* args, void* stream, char* message, size_t message_bytes) {
  const Report report{message, message_bytes};
  if (const int status = check_gemm(*args, report); status != JR_OK) return status;
  return args->tokens == 0 ? JR_OK : enqueue_gemm(*args, nullptr, static_cast<cudaStream_t>(stream), report);
}

int jr_router_gemm_naive(const jr_router_gemm_args* args, void* stream, char* message, size_t message_bytes) {
  const Report report{message, message_bytes};
  if (const int status = check_gemm(*args, report); status != JR_OK) return status;
  if (args->tokens == 0) return JR_OK;
  const Problem problem = device_problem(*args, kTileExperts);
  return report.check(launch_naive(args->weight_layout, operands_of(*args), problem, static_cast<cudaStream_t>(stream)),
                      "launch of sm90_router_gemm_naive");
}
