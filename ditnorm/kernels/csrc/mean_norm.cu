// Norm sites of diffusers' RMSNorm over the whole width: the norm of a stream, modulated; the same
// of a stream that a branch has just been added to; and a branch that is normed itself before.
//
//   n = norm(x)                   where the branch is normed ("sandwich")
//   r = residual + gate * n       where there is a residual
//   y = norm(r) * (1 + scale) + shift
//
// A row is one warp's, since that is who adds up its squares in ATen (mean_square.cuh); it stays in
// registers between its two norms.
#include "dispatch.cuh"
#include "formulas.cuh"
#include "launch.h"
#include "mean_square.cuh"
#include "modulation.cuh"
#include "unroll.cuh"

namespace ditnorm {

constexpr int kWarpSize = 32, kMeanWarps = 4;

// What the models with these norms run in. The other dtypes go through any_mean_norm_kernel.
using T = __nv_bfloat16;
constexpr int N = 16 / sizeof(T), kStep = kWarpSize * N, kTiles = kMostMeanWidth / kStep;
constexpr auto kEach = std::make_integer_sequence<int, kTiles>{};

// What a kernel does with a row.
enum class Site { norm, residual_norm, norm_residual_norm, norm_residual };
template <Site SITE>
constexpr bool kNormsX = SITE == Site::norm_residual_norm || SITE == Site::norm_residual;
template <Site SITE>
constexpr bool kHasResidual = SITE != Site::norm;
template <Site SITE>
constexpr bool kNormsResult = SITE != Site::norm_residual;

inline Site site_of(const Problem& p) {
  if (p.residual.data == nullptr) return Site::norm;
  if (!p.norms_x) return Site::residual_norm;
  return p.y == nullptr ? Site::norm_residual : Site::norm_residual_norm;
}

// ATen's lanes of a row in this order: 32 where there are rows enough for the warps of a block.
inline int mean_lanes(int64_t rows, int64_t width) {
  const auto last_power_of_2 = [](int64_t n) {
    int power = 1;
    while (power < kMostMeanLanes && power * 2 <= n) power *= 2;
    return power;
  };
  const int across = last_power_of_2(width >= kGrouped && width % 4 == 0 ? width / 4 : width);
  const int height = std::min(last_power_of_2(rows), kMostMeanLanes / std::min(across, kWarpSize));
  return std::min(across, kMostMeanLanes / height);
}

// A row's sum of squares, of the warp that holds its accesses i * 32 + lane, and zeros beyond it. An
// access is a group of each of two of ATen's lanes, and the upper half warp has the same lanes as
// the lower, a turn later. They share them out: the lower half warp becomes the even lanes.
__device__ __forceinline__ float row_sum_of_squares(const Pack<T, N> (&row)[kTiles], int width) {
  const bool upper = threadIdx.x & 16;
  float sums[4] = {};
  each(kEach, [&](auto i) {
    if (i * kStep >= width) return;
    Pack<T, 4> groups[2], first, second;
    __builtin_memcpy(groups, &row[i], sizeof groups);
    Access<8> own = groups[0].words[0], others = groups[1].words[0];
    if (upper) own = groups[1].words[0], others = groups[0].words[0];
    others.x = __shfl_xor_sync(0xffffffffu, others.x, 16);
    others.y = __shfl_xor_sync(0xffffffffu, others.y, 16);
    first.words[0] = upper ? others : own;
    second.words[0] = upper ? own : others;
    float v[4];
    to_floats(v, first);
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] = __fmaf_rn(v[j], v[j], sums[j]);  // their squares are exact
    to_floats(v, second);
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] = __fmaf_rn(v[j], v[j], sums[j]);
  });
  return add_along(16, add_along(1, add_along(2, add_along(4, add_along(8, sum_of_group(sums))))));
}

__device__ __forceinline__ float root_of_mean(float sum, const Problem& p) {
  return rsqrtf(__fadd_rn(__fmul_rn(sum, p.mean_factor), p.eps));
}

// N elements of norm(v) * weight, in float32 with the roundings of the law. Where there is no weight
// nobody loads it.
template <bool ROUND>
__device__ __forceinline__ void normalize(float (&out)[N], const Pack<T, N>& v, float rstd, const Vector& weight, int column) {
  to_floats(out, v);
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = round_to<T, ROUND>(__fmul_rn(out[j], rstd));
  if (weight.data == nullptr) return;
  float w[N];
  to_floats(w, load_pack<T, N>(static_cast<const T*>(weight.data) + column));
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = round_to<T, ROUND>(__fmul_rn(out[j], w[j]));
}

template <bool ROUND, Site SITE>
__global__ void __launch_bounds__(kMeanWarps* kWarpSize, 2) mean_norm_kernel(const Problem p) {
  const unsigned token = blockIdx.x * kMeanWarps + threadIdx.x / kWarpSize;
  if (token >= static_cast<unsigned>(p.tokens)) return;
  const int first = static_cast<int>(threadIdx.x) % kWarpSize * N, width = static_cast<int>(p.width);
  const auto inside = [&](int i) { return first + i * kStep < width; };
  wait_for_previous_kernel();
  const Token at(p, blockIdx.y, token);
  const int64_t out = (at.batch * p.tokens + token) * p.width + first;
  const T* const x = static_cast<const T*>(p.x.data) + at.offset(p.x) + first;
  Pack<T, N> v[kTiles];
  each(kEach, [&](auto i) { v[i] = inside(i) ? load_row<Cache::normal, T, N>(x + i * kStep) : filled<T, N>(0.0f); });

  if constexpr (kHasResidual<SITE>) {
    const T* const residual = static_cast<const T*>(p.residual.data) + at.offset(p.residual) + first;
    const ModulationRow<T, N> gate(p.gate, at, p.index, first);
    const bool gated = p.gate.data != nullptr;
    float rstd = 1.0f;
    if constexpr (kNormsX<SITE>) rstd = root_of_mean(row_sum_of_squares(v, width), p);
    T* const r = static_cast<T*>(p.r) + out;
    each(kEach, [&](auto i) {
      if (!inside(i)) return;
      const auto streamed = load_row<Cache::normal, T, N>(residual + i * kStep);
      float branch[N], sum[N];
      if constexpr (kNormsX<SITE>) {
        normalize<ROUND>(branch, v[i], rstd, p.x_weight, first + i * kStep);
      } else {
        to_floats(branch, v[i]);
      }
      to_floats(sum, streamed);
      if (gated) {
        float gates[N];
        to_floats(gates, gate.load(i * kStep));
#pragma unroll
        for (int j = 0; j < N; ++j) branch[j] = round_to<T, ROUND>(__fmul_rn(gates[j], branch[j]));
      }
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] = __fadd_rn(sum[j], branch[j]);
      v[i] = unlikely(!at.valid) && gated ? filled<T, N>(kNaN) : from_floats<T, N>(sum);
      store_row<Cache::streaming>(r + i * kStep, v[i]);
    });
  }

  if constexpr (kNormsResult<SITE>) {
    const ModulationRow<T, N> scale(p.scale, at, p.index, first), shift(p.shift, at, p.index, first);
    const bool scaled = p.scale.data != nullptr, shifted = p.shift.data != nullptr;
    const float rstd = at.valid ? root_of_mean(row_sum_of_squares(v, width), p) : kNaN;
    T* const y = static_cast<T*>(p.y) + out;
    each(kEach, [&](auto i) {
      if (!inside(i)) return;
      float n[N], m[N];
      normalize<ROUND>(n, v[i], rstd, p.weight, first + i * kStep);
      if (scaled) {
        to_floats(m, scale.load(i * kStep));
#pragma unroll
        for (int j = 0; j < N; ++j) n[j] = round_to<T, ROUND>(__fmul_rn(n[j], round_to<T, ROUND>(__fadd_rn(1.0f, m[j]))));
      }
      if (shifted) {
        to_floats(m, shift.load(i * kStep));
#pragma unroll
        for (int j = 0; j < N; ++j) n[j] = __fadd_rn(n[j], m[j]);
      }
      store_row<Cache::streaming>(y + i * kStep, from_floats<T, N>(n));
    });
  }
}

constexpr int kAnyThreads = 128;

// An element of a vector or of a modulation's row with its table, or `missing`.
__device__ __forceinline__ float element(const Vector& vector, int64_t column, float missing) {
  if (vector.data == nullptr) return missing;
  float v[1];
  load_elements(v, vector.data, vector.dtype, column, 1);
  return v[0];
}
__device__ __forceinline__ float element(const Modulation& m, int64_t offset, int64_t column, float missing) {
  const float v = element(Vector{m.data, m.dtype}, offset + column, missing);
  return m.table.data == nullptr ? v : __fadd_rn(v, element(m.table, column, 0.0f));
}

// Any width, alignment, number of rows, and mix of dtypes: a block a row, element by element.
__global__ void __launch_bounds__(kAnyThreads, 4) any_mean_norm_kernel(const Problem p, const int lanes) {
  const auto rounded = [&](float v) { return p.round_each ? round_to(v, p.x.dtype) : v; };
  const auto normalized = [&](float v, float rstd, const Vector& weight, const Vector& bias, int64_t column) {
    v = rounded(__fmul_rn(v, rstd));
    if (weight.data != nullptr) v = rounded(__fmul_rn(v, element(weight, column, kNoWeight)));
    return bias.data == nullptr ? v : rounded(__fadd_rn(v, element(bias, column, kNoBias)));
  };
  const bool residual = p.residual.data != nullptr;
  const DType r_dtype = residual ? p.residual.dtype : p.x.dtype;
  const int width = static_cast<int>(p.width);
  __shared__ float sums[kMostMeanLanes];  // through whose barriers the block also reads what it has stored in r
  wait_for_previous_kernel();
  for (int64_t row = blockIdx.x; row < p.batch * p.tokens; row += gridDim.x) {
    const int64_t batch = p.batch == 1 ? 0 : row / p.tokens;
    const Token at(p, batch, row - batch * p.tokens);
    const int64_t x_offset = at.offset(p.x), residual_offset = at.offset(p.residual), out = row * p.width;
    const auto x = [&](int64_t column) { return element(Vector{p.x.data, p.x.dtype}, x_offset + column, 0.0f); };
    const auto r = [&](int64_t column) { return residual ? element(Vector{p.r, r_dtype}, out + column, 0.0f) : x(column); };
    if (residual) {
      const float rstd = p.norms_x ? root_of_mean(mean_order_sum_of_squares(width, x, lanes, sums), p) : 1.0f;
      const int64_t gates = at.offset(p.gate, p.index);
      for (int64_t column = threadIdx.x; column < width; column += kAnyThreads) {
        const float branch = p.norms_x ? normalized(x(column), rstd, p.x_weight, Vector{}, column) : x(column);
        const float gate = at.valid || p.gate.data == nullptr ? element(p.gate, gates, column, kNoGate) : kNaN;
        const float streamed = element(Vector{p.residual.data, r_dtype}, residual_offset + column, 0.0f);
        store_float(p.r, r_dtype, out + column, __fadd_rn(streamed, rounded(__fmul_rn(gate, branch))));
      }
    }
    if (p.y == nullptr) continue;
    const float rstd = at.valid ? root_of_mean(mean_order_sum_of_squares(width, r, lanes, sums), p) : kNaN;
    const int64_t scales = at.offset(p.scale, p.index), shifts = at.offset(p.shift, p.index);
    for (int64_t column = threadIdx.x; column < width; column += kAnyThreads) {
      float n = normalized(r(column), rstd, p.weight, p.bias, column);
      if (p.scale.data != nullptr) n = rounded(__fmul_rn(n, rounded(__fadd_rn(1.0f, element(p.scale, scales, column, kNoScale)))));
      store_float(p.y, p.x.dtype, out + column, __fadd_rn(n, element(p.shift, shifts, column, kNoShift)));
    }
  }
}

template <bool ROUND, Site SITE>
int launch_mean_norm_kernel(const Problem& p, void* stream) {
  const dim3 grid(static_cast<unsigned>((p.tokens + kMeanWarps - 1) / kMeanWarps), static_cast<unsigned>(p.batch));
  return launch(&mean_norm_kernel<ROUND, SITE>, grid, kMeanWarps * kWarpSize, stream, p);
}

template <bool ROUND>
int launch_site(const Problem& p, void* stream) {
  switch (site_of(p)) {
    case Site::norm: return launch_mean_norm_kernel<ROUND, Site::norm>(p, stream);
    case Site::residual_norm: return launch_mean_norm_kernel<ROUND, Site::residual_norm>(p, stream);
    case Site::norm_residual_norm: return launch_mean_norm_kernel<ROUND, Site::norm_residual_norm>(p, stream);
    default: return launch_mean_norm_kernel<ROUND, Site::norm_residual>(p, stream);
  }
}

// Whether a row is one warp's, and all operands are of the kernels' dtype and aligned.
bool fits_a_warp(const Problem& p, int lanes) {
  constexpr DType t = dtype_of<T>;
  const auto rows = [&](const Rows& r) {
    return r.data == nullptr || (r.dtype == t && aligned16(r.data, t, r.batch_stride, r.token_stride));
  };
  const auto modulation = [&](const Modulation& m) { return m.table.data == nullptr && fast_modulation(m, t); };
  return p.x.dtype == t && lanes == kWarpSize && p.width >= kGrouped && p.width <= kMostMeanWidth && p.width * bytes(t) % 16 == 0 &&
         p.tokens <= 0x7fffffff - kMeanWarps && p.batch <= 0xffff && rows(p.x) && rows(p.residual) && modulation(p.gate) &&
         modulation(p.scale) && modulation(p.shift) && fast_vector(p.weight, t) && fast_vector(p.x_weight, t) && p.bias.data == nullptr;
}

int mean_norm(const Problem& p, void* stream) {
  const int lanes = mean_lanes(p.batch * p.tokens, p.width);
  if (!fits_a_warp(p, lanes)) return launch(&any_mean_norm_kernel, blocks(p.batch * p.tokens), kAnyThreads, stream, p, lanes);
  return p.round_each ? launch_site<true>(p, stream) : launch_site<false>(p, stream);
}

}  // namespace ditnorm
