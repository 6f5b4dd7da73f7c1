// Standalone check of the kernels, no Python: references on the CPU, every kernel against them, then the times.
//
//   nvcc -O3 -std=c++20 -gencode=arch=compute_90a,code=sm_90a csrc/*.cu -o router_gemm_check
//   ./router_gemm_check                       checks, launches between neighbours, then times
//   ./router_gemm_check --check               checks only: router GEMM, then routing (check_route.cu)
//   ./router_gemm_check --small               the same on a few small awkward shapes, for compute-sanitizer
//   ./router_gemm_check --tiny                the same on fewer launches, for compute-sanitizer's racecheck
//   ./router_gemm_check --overlap [launches]  only launches between programmatic neighbours under memory traffic, so
//                                             many per case: router GEMM, then routing (check_overlap*.cu)
//   ./router_gemm_check --time [shapes]       only times of the router GEMM, of the first so many shapes
//
// Accuracy is judged against the float64 reference; every configuration must then give the naive kernel's bits, for
// every number of tokens and every position of a row, and from weights stored [hidden, experts] where it takes them.
// Outputs are poisoned before each launch and followed by a canary.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <random>
#include <vector>

#include "check_overlap.h"
#include "check_route.h"
#include "check_support.h"
#include "reduction_tree.cuh"
#include "router_gemm.h"

namespace {

using namespace jax_router;
using namespace jax_router_check;

const std::vector<int> kTokens = {1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 48, 63, 64, 65, 255, 1024};
const std::vector<int> kFewTokens = {17, 1};  // of kTiny

struct Operands {
  int dtype, weight_dtype;
};
constexpr Operands kOperands[] = {
    {JR_BFLOAT16, JR_BFLOAT16}, {JR_FLOAT16, JR_FLOAT16}, {JR_BFLOAT16, JR_FLOAT32}, {JR_FLOAT32, JR_FLOAT32}};

struct Case {
  int experts, hidden, dtype, weight_dtype, bias_dtype, out_dtype;
  double mean, scale;  // of x; products of small ones do not reach the tensor core's normal range in float16
};

struct Checker {
  const std::vector<int>& tokens_list;
  const bool once;       // with the first number of tokens that a configuration takes
  const int max_tokens;  // of the reference
  DeviceBuffer workspace{kWorkspaceBytes + kCanaryBytes};
  std::vector<bool> checked[2] = {};  // by layout of the weight and configuration
  long launches = 0, failures = 0;
  double worst_error = 0;  // in units of the bound

  void fail(const Case& c, const char* what, const char* kernel, int tokens, long index) {
    if (++failures <= 20)
      printf("FAILED %s: %s experts=%d hidden=%d dtype=%d weight=%d bias=%d out=%d tokens=%d element=%ld\n", what,
             kernel, c.experts, c.hidden, c.dtype, c.weight_dtype, c.bias_dtype, c.out_dtype, tokens, index);
  }

  // Poisons the output and the workspace, launches, checks the canaries and returns the output bytes. config -2 is the
  // naive kernel.
  std::vector<uint8_t> run(const Case& c, jr_router_gemm_args args, int config, const DeviceBuffer& out,
                           size_t out_bytes) {
    char message[512] = "";
    out.poison(out_bytes + kCanaryBytes);
    workspace.poison(kWorkspaceBytes + kCanaryBytes);
    args.out = out.data;
    args.config = config;
    launch_ok(config == -2 ? jr_router_gemm_naive(&args, nullptr, message, sizeof(message))
                           : jr_router_gemm(&args, nullptr, message, sizeof(message)),
              message);
    CUDA_OK(cudaDeviceSynchronize());
    std::vector<uint8_t> result(out_bytes + kCanaryBytes), past_workspace(kCanaryBytes);
    out.read(result.data(), result.size());
    workspace.read(past_workspace.data(), kCanaryBytes, kWorkspaceBytes);
    if (!poisoned(&result[out_bytes], kCanaryBytes))
      fail(c, "wrote past the output", jr_router_gemm_config_name(config), int(args.tokens), 0);
    if (!poisoned(past_workspace.data(), kCanaryBytes))
      fail(c, "wrote past the workspace", jr_router_gemm_config_name(config), int(args.tokens), 0);
    result.resize(out_bytes);
    ++launches;
    return result;
  }

  void check(const Case& c, std::mt19937& random) {
    const double weight_scale = c.scale / sqrt(double(c.hidden));
    const HostArray x(size_t(max_tokens) * c.hidden, c.dtype, c.scale, c.scale * c.mean, random);
    const HostArray weight(size_t(c.experts) * c.hidden, c.weight_dtype, weight_scale, weight_scale * c.mean, random);
    const HostArray bias(size_t(c.experts), c.bias_dtype == JR_NONE ? JR_FLOAT32 : c.bias_dtype, 1.0, 0.0, random);
    const size_t row_bytes = c.experts * bytes_of(c.out_dtype);
    DeviceBuffer device_x(x.bytes.size()), device_weight(weight.bytes.size()), device_bias(bias.bytes.size()),
        out(max_tokens * row_bytes + kCanaryBytes);
    device_x.write(x.bytes.data(), x.bytes.size());
    device_weight.write(weight.bytes.data(), weight.bytes.size());
    device_bias.write(bias.bytes.data(), bias.bytes.size());

    jr_router_gemm_args args = {};
    args.x = device_x.data;
    args.weight = device_weight.data;
    args.bias = c.bias_dtype == JR_NONE ? nullptr : device_bias.data;
    args.tokens = max_tokens;
    args.hidden = c.hidden;
    args.experts = c.experts;
    args.dtype = c.dtype;
    args.weight_dtype = c.weight_dtype;
    args.bias_dtype = c.bias_dtype;
    args.out_dtype = c.out_dtype;
    args.workspace = workspace.data;
    args.workspace_bytes = kWorkspaceBytes;
    const std::vector<uint8_t> expected = run(c, args, -2, out, max_tokens * row_bytes);
    check_accuracy(c, x, weight, bias, expected);

    check_configs(c, args, JR_EXPERTS_HIDDEN, out, expected);
    if (c.experts % 8 != 0) return;
    std::vector<uint8_t> stored(weight.bytes.size());
    const size_t bytes = bytes_of(c.weight_dtype);
    for (size_t i = 0; i < stored.size() / bytes; ++i) {
      const size_t k = i / size_t(c.experts), expert = i % size_t(c.experts);
      memcpy(&stored[i * bytes], &weight.bytes[(expert * size_t(c.hidden) + k) * bytes], bytes);
    }
    device_weight.write(stored.data(), stored.size());
    check_configs(c, args, JR_HIDDEN_EXPERTS, out, expected);
  }

  // That every configuration, the picked one and the naive kernel give `expected`, on any of its rows.
  void check_configs(const Case& c, jr_router_gemm_args args, int layout, const DeviceBuffer& out,
                     const std::vector<uint8_t>& expected) {
    const size_t row_bytes = c.experts * bytes_of(c.out_dtype);
    args.weight_layout = layout;
    if (layout != JR_EXPERTS_HIDDEN && run(c, args, -2, out, max_tokens * row_bytes) != expected)
      fail(c, "bits differ from those of the other layout", "naive", max_tokens, 0);
    checked[layout].resize(jr_router_gemm_num_configs());
    for (int config = -1; config < jr_router_gemm_num_configs(); ++config) {
      int start = 0;
      for (const int tokens : tokens_list) {
        // Anywhere in x or at its end, where compute-sanitizer sees reads beyond it; every other time the one or other.
        start = (tokens + config) % 2 == 0 ? max_tokens - tokens : (start + 37) % (max_tokens - tokens + 1);
        jr_router_gemm_args part = args;
        part.tokens = tokens;
        if (config >= 0 && !jr_router_gemm_config_fits(config, &part)) continue;
        if (config >= 0) checked[layout][config] = true;
        part.x = static_cast<const uint8_t*>(args.x) + size_t(start) * c.hidden * bytes_of(c.dtype);
        // A row of hidden % 8 == 0 two-byte elements keeps the alignment.
        const std::vector<uint8_t> got = run(c, part, config, out, tokens * row_bytes);
        const auto difference = std::mismatch(got.begin(), got.end(), expected.begin() + start * row_bytes).first;
        if (difference != got.end())
          fail(c, layout == 0 ? "bits differ from the naive kernel" : "bits differ with [hidden, experts]",
               config < 0 ? "auto" : jr_router_gemm_config_name(config), tokens,
               long(difference - got.begin()) / long(bytes_of(c.out_dtype)));
        if (once) break;
      }
    }
  }

  // |error| <= depth * 2^-23 * sum |x w| + half an ulp of the output: the tree's longest path is `depth` additions (MMA
  // steps of a slice and four levels inside a step, slices of a group, four levels of groups, the bias), each of which
  // truncates by at most one ulp (2^-23) of a partial sum that sum |x w| bounds. With float32 weights a slice is one
  // unit, whose steps are added up; then what its smaller products sum up to, and what is left out is a last ulp.
  void check_accuracy(const Case& c, const HostArray& x, const HostArray& weight, const HostArray& bias,
                      const std::vector<uint8_t>& got) {
    const int depth = c.weight_dtype == JR_FLOAT32
                          ? kUnit / 16 + 4 + 1 + ceil_div(units_of(c.hidden), kGroups) + 4 + 1 + 1
                          : kUnitsPerSlice * kUnit / 16 + 4 + slices_per_group(c.hidden) + 4 + 1;
    const double half_ulp = c.out_dtype == JR_FLOAT32    ? ldexp(1, -24)
                            : c.out_dtype == JR_BFLOAT16 ? ldexp(1, -8)
                                                         : ldexp(1, -11);
    const double smallest = c.out_dtype == JR_FLOAT16 ? ldexp(1, -25) : 0;  // half the smallest float16
    const int rows = int(std::max<long>(3, 30000000L / (long(c.experts) * c.hidden)));
    for (int i = 0; i < std::min(rows, max_tokens); ++i) {
      const int token = rows >= max_tokens ? i : int((long(i) * 397) % max_tokens);
      for (int expert = 0; expert < c.experts; ++expert) {
        double sum = c.bias_dtype == JR_NONE ? 0 : bias.values[expert], magnitude = fabs(sum);
        const double* a = &x.values[size_t(token) * c.hidden];
        const double* b = &weight.values[size_t(expert) * c.hidden];
        for (int k = 0; k < c.hidden; ++k) {
          sum += a[k] * b[k];
          magnitude += fabs(a[k] * b[k]);
        }
        const long index = long(token) * c.experts + expert;
        const double value = read_as_double(&got[index * bytes_of(c.out_dtype)], c.out_dtype);
        const double bound = depth * ldexp(1, -23) * magnitude * (1 + half_ulp) + half_ulp * fabs(sum) + smallest;
        const double error = fabs(value - sum) / bound;
        if (!(error <= 1)) fail(c, "error above the bound", "naive", max_tokens, index);
        worst_error = std::max(worst_error, error);
      }
    }
  }
};

int check_all(Extent extent) {
  const bool tiny = extent == Extent::kTiny;
  std::vector<std::array<int, 2>> shapes = {{3, 72}, {31, 2688}, {40, 1096}};
  if (!tiny) shapes.insert(shapes.end(), {{1, 8}, {8, 720}, {72, 1000}, {5, 2824}, {5, 8192}, {2, 17408}});
  if (extent == Extent::kFull) {
    shapes.insert(shapes.end(), {{33, 2880},
                                 {128, 2880},
                                 {32, 2880},
                                 {160, 5120},
                                 {256, 7168},
                                 {384, 7168},
                                 {896, 2688},
                                 {8, 16384},
                                 {3, 65536},
                                 {64, 2048},
                                 {512, 2048}});
  }
  std::mt19937 random(20261123);
  Checker checker = {tiny ? kFewTokens : kTokens, tiny, max_tokens_of(extent)};
  int cases = 0;
  for (size_t shape = 0; shape < shapes.size(); ++shape) {
    const auto [experts, hidden] = shapes[shape];
    for (size_t kind = 0; kind < std::size(kOperands); ++kind, ++cases) {
      const auto [dtype, weight_dtype] = kOperands[kind];
      const int biases[] = {JR_NONE, JR_FLOAT32, dtype}, outs[] = {JR_FLOAT32, dtype};
      const size_t variant = shape + kind;  // nine shapes give every kind of operands all of these
      checker.check({experts, hidden, dtype, weight_dtype, biases[variant % 3], outs[variant % 2],
                     variant / 3 % 2 ? 0.5 : 0.0, 1.0},
                    random);
    }
  }
  for (const double scale : {ldexp(1, -12), ldexp(1, -14)}) {
    if (tiny) break;
    checker.check({31, 2688, JR_FLOAT16, JR_FLOAT16, JR_NONE, JR_FLOAT32, 0.0, scale}, random);
    ++cases;
  }
  for (int layout = 0; layout < 2; ++layout) {
    jr_router_gemm_args any = {};
    any.tokens = 1;
    any.hidden = 2048;
    any.experts = 64;
    any.bias_dtype = JR_NONE;
    any.out_dtype = JR_FLOAT32;
    any.weight_layout = layout;
    any.workspace_bytes = kWorkspaceBytes;
    for (int config = 0; config < jr_router_gemm_num_configs(); ++config) {
      const bool fits = std::any_of(std::begin(kOperands), std::end(kOperands), [&](const Operands& kind) {
        any.dtype = kind.dtype;
        any.weight_dtype = kind.weight_dtype;
        return jr_router_gemm_config_fits(config, &any) != 0;
      });
      if (!fits || checker.checked[layout][config]) continue;
      printf("FAILED: no case fits %s, layout %d\n", jr_router_gemm_config_name(config), layout);
      ++checker.failures;
    }
  }
  printf("checked %d cases, %ld launches: worst error %.3f of the bound, %ld failures\n", cases, checker.launches,
         checker.worst_error, checker.failures);
  return checker.failures == 0 ? 0 : 1;
}

double median_microseconds(int operation, const std::vector<jr_router_gemm_args>& variants, int launches) {
  float samples[25];
  char message[512] = "";
  if (jr_time_graph(operation, variants.data(), int(variants.size()), launches, 25, samples, message,
                    sizeof(message)) != JR_OK) {
    fprintf(stderr, "timing failed: %s\n", message);
    exit(2);
  }
  std::sort(samples, samples + 25);
  return samples[12];
}

void time_shape(int experts, int hidden, bool with_bias) {
  constexpr size_t kRotatedBytes = size_t(160) << 20;  // well past the 60 MB of L2
  const int tokens_list[] = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096};
  const size_t weight_bytes = size_t(experts) * hidden * 2;
  const int copies = int(kRotatedBytes / weight_bytes) + 1;
  std::mt19937 random(1);
  const HostArray x(size_t(1024) * hidden, JR_BFLOAT16, 1.0, 0.0, random),
      bias(size_t(experts), JR_FLOAT32, 1.0, 0.0, random);
  const HostArray weight(size_t(experts) * hidden, JR_BFLOAT16, 0.02, 0.0, random);
  DeviceBuffer device_x(size_t(16384) * hidden * 2), device_bias(bias.bytes.size()),
      device_weight(copies * weight_bytes), out(size_t(16384) * experts * 4), workspace(kWorkspaceBytes);
  for (int i = 0; i < 16; ++i) device_x.write(x.bytes.data(), x.bytes.size(), i * x.bytes.size());
  for (int i = 0; i < copies; ++i) device_weight.write(weight.bytes.data(), weight_bytes, i * weight_bytes);
  device_bias.write(bias.bytes.data(), bias.bytes.size());

  jr_router_gemm_args args = {};
  args.x = device_x.data;
  args.weight = device_weight.data;
  args.bias = with_bias ? device_bias.data : nullptr;
  args.out = out.data;
  args.workspace = workspace.data;
  args.workspace_bytes = kWorkspaceBytes;
  args.hidden = hidden;
  args.experts = experts;
  args.bias_dtype = with_bias ? JR_FLOAT32 : JR_NONE;
  args.out_dtype = JR_FLOAT32;
  const auto time = [&](int operation, int tokens, int config, bool cold) {
    std::vector<jr_router_gemm_args> variants(cold ? copies : 1, args);
    for (size_t i = 0; i < variants.size(); ++i) {
      variants[i].weight = device_weight.at(i * weight_bytes);
      variants[i].tokens = tokens;
      variants[i].config = config;
    }
    return median_microseconds(operation, variants, cold ? std::max(copies, 48) : 192);
  };
  printf("\nhidden=%d experts=%d%s, microseconds warm/cold L2; empty launch %.2f, read of the weight %.2f/%.2f\n",
         hidden, experts, with_bias ? " + bias" : "", time(JR_OP_EMPTY, 1, -1, false),
         time(JR_OP_READ_WEIGHT, 1, -1, false), time(JR_OP_READ_WEIGHT, 1, -1, true));
  for (const int tokens : tokens_list) {
    printf("T=%-6d", tokens);
    args.tokens = tokens;
    const int picked = jr_router_gemm_pick_config(&args);
    for (int config = 0; config < jr_router_gemm_num_configs(); ++config) {
      if (!jr_router_gemm_config_fits(config, &args)) continue;
      const char* name = jr_router_gemm_config_name(config);
      const bool one = strncmp(name, "one", 3) == 0, few = strncmp(name, "few", 3) == 0;
      if (config != picked && (tokens > 8 ? one : false)) continue;  // not in question
      if (config != picked && (tokens > 128 ? few : tokens < 64 && !one && !few)) continue;
      printf(" %s%s %.2f/%.2f", config == picked ? "*" : "", jr_router_gemm_config_name(config),
             time(JR_OP_ROUTER_GEMM, tokens, config, false), time(JR_OP_ROUTER_GEMM, tokens, config, true));
    }
    printf("\n");
    fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const char* only = argc < 2 ? "" : argv[1];
  const bool tiny = strcmp(only, "--tiny") == 0, small = strcmp(only, "--small") == 0;
  const bool check = tiny || small || argc < 2 || strcmp(only, "--check") == 0;
  const bool time = argc < 2 || strcmp(only, "--time") == 0, overlap = argc < 2 || strcmp(only, "--overlap") == 0;
  if (!check && !time && !overlap) {
    fprintf(stderr, "usage: %s [--check | --small | --tiny | --overlap [launches] | --time [shapes]]\n", argv[0]);
    return 2;
  }
  const Extent extent = tiny ? Extent::kTiny : small ? Extent::kSmall : Extent::kFull;
  int status = check ? check_all(extent) | check_route(extent) : 0;
  const int launches_per_case = argc > 2 ? atoi(argv[2]) : 1000;
  if (overlap) status |= check_overlap(launches_per_case) | check_overlap_route(launches_per_case);
  if (time) {
    const int shapes[][2] = {{128, 2880}, {256, 7168}, {384, 7168}, {32, 2880}, {128, 2048}, {128, 4096},
                             {512, 2048}, {160, 5120}, {256, 3072}, {8, 4096},  {128, 5120}, {64, 2048}};
    int left = argc > 2 ? atoi(argv[2]) : 1000;
    for (const auto& [experts, hidden] : shapes) {
      if (left-- > 0) time_shape(experts, hidden, hidden == 2880);
    }
  }
  return status;
}
