// Norm sites of diffusers' RMSNorm over the whole width: the norm of a stream, modulated; the same
// of a stream that a branch has just been added to; and a branch that is normed itself before.
//
//   n = norm(x)                   where the branch is normed ("sandwich")
//   r = residual + gate * n       where there is a residual
//   y = norm(r) * (1 + scale) + shift
//
// A row is a block's. ATen has a warp for it, each of whose lanes keeps four sums of squares, one
// for each place in a group of four elements (mean_square.cuh): here each sum is a thread's. The row
// stays in registers between its two norms; threads share it, for the sums, in shared memory.
#include "dispatch.cuh"
#include "formulas.cuh"
#include "launch.h"
#include "mean_square.cuh"
#include "modulation.cuh"
#include "unroll.cuh"

namespace ditnorm {

constexpr int kPlaces = 4, kMeanThreads = 32 * kPlaces;  // of a group; of a block: one for each of ATen's sums

// What the models with these norms run in. The other dtypes go through any_mean_norm_kernel.
using T = __nv_bfloat16;
constexpr int N = 16 / sizeof(T), kStep = kMeanThreads * N, kTiles = kMostMeanWidth / kStep;
constexpr auto kEach = std::make_integer_sequence<int, kTiles>{};
using Columns = Pack<T, N>[kTiles];  // those of one thread

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
  const int height = std::min(last_power_of_2(rows), kMostMeanLanes / std::min(across, 32));
  return std::min(across, kMostMeanLanes / height);
}

// Blocks of a multiprocessor: more would spill registers.
template <Site SITE>
constexpr int kMeanBlocks = SITE == Site::norm_residual_norm ? 5 : 6;

struct MeanExchange {
  Pack<T, N> row[kTiles * kMeanThreads];
  Pack<float, kPlaces> sums[32];
};

// The columns of one thread.
struct Place {
  const int width, first;
  __device__ __forceinline__ explicit Place(const Problem& p)
      : width(static_cast<int>(p.width)), first(static_cast<int>(threadIdx.x) * N) {}

  __device__ __forceinline__ bool inside(int i) const { return first + i * kStep < width; }

  // f(i) for each access that any thread of the block has.
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    ditnorm::each(kEach, [&](auto i) {
      if (i * kStep < width) f(i);
    });
  }

  // Asks for what stands in these columns, if it is there. What is outside of the row is nothing.
  template <class LOAD>
  __device__ __forceinline__ void ask(Columns& columns, bool there, float missing, LOAD load) const {
    if (there) {
      ditnorm::each(kEach, [&](auto i) {
        if (inside(i)) columns[i] = load(i * kStep);
      });
    } else {
      ditnorm::each(kEach, [&](auto i) { columns[i] = filled<T, N>(missing); });
    }
  }
  __device__ __forceinline__ void ask(Columns& columns, const Vector& vector, float missing) const {
    const T* const source = static_cast<const T*>(vector.data) + first;
    ask(columns, vector.data != nullptr, missing, [&](int offset) { return load_pack<T, N>(source + offset); });
  }
  __device__ __forceinline__ void ask(Columns& columns, const Modulation& m, const Token& at, const Index& index, float missing) const {
    const ModulationRow<T, N> source(m, at, index, first);
    ask(columns, m.data != nullptr, missing, [&](int offset) { return source.load(offset); });
  }
};

// A row's sum of squares, in every thread of the block. `meanwhile`: what is to be asked for when
// the row has arrived. Behind the row `exchange` has zeros.
template <class MEANWHILE>
__device__ __forceinline__ float row_sum_of_squares(const Columns& v, const Place& place, MeanExchange& exchange, MEANWHILE meanwhile) {
  const int thread = static_cast<int>(threadIdx.x);
  each(kEach, [&](auto i) {
    if (place.inside(i)) exchange.row[thread + i * kMeanThreads] = v[i];
  });
  meanwhile();
  __syncthreads();
  const T* const own = exchange.row->v + thread;
  float sum = 0.0f;
  place.each([&](auto i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float element = to_float(own[i * kStep + j * kMeanThreads]);
      sum = __fmaf_rn(element, element, sum);  // its square is exact
    }
  });
  exchange.sums[thread / kPlaces].v[thread % kPlaces] = sum;
  __syncthreads();
  sum = sum_of_group(exchange.sums[thread % 32].v);
  return add_along(1, add_along(2, add_along(4, add_along(8, add_along(16, sum)))));
}

__device__ __forceinline__ float root_of_mean(float sum, const Problem& p) {
  return rsqrtf(__fadd_rn(__fmul_rn(sum, p.mean_factor), p.eps));
}

// residual + gate * branch. The branch: x, or where NORMS norm(x) * weight.
template <bool ROUND, bool NORMS>
__device__ __forceinline__ Pack<T, N> added(const Pack<T, N>& residual, const Pack<T, N>& x, float rstd, const Pack<T, N>& weight,
                                            const Pack<T, N>& gate) {
  if constexpr (ROUND) return add_gated_rounded(residual, NORMS ? normalize_rounded(x, rstd, weight) : x, gate);
  float sum[N], branch[N], factor[N];
  to_floats(branch, x);
  to_floats(factor, weight);
#pragma unroll
  for (int j = 0; NORMS && j < N; ++j) branch[j] = __fmul_rn(__fmul_rn(branch[j], rstd), factor[j]);
  to_floats(sum, residual);
  to_floats(factor, gate);
#pragma unroll
  for (int j = 0; j < N; ++j) sum[j] = add_gated<T, false>(sum[j], branch[j], factor[j]);
  return from_floats<T, N>(sum);
}

// norm(v) * weight * (1 + scale) + shift
template <bool ROUND>
__device__ __forceinline__ Pack<T, N> modulated(const Pack<T, N>& v, float rstd, const Pack<T, N>& weight, const Pack<T, N>& scale,
                                                const Pack<T, N>& shift) {
  if constexpr (ROUND) return modulate_rounded(normalize_rounded(v, rstd, weight), scale, shift);
  float n[N], factor[N], sum[N];
  to_floats(n, v);
  to_floats(factor, weight);
#pragma unroll
  for (int j = 0; j < N; ++j) n[j] = __fmul_rn(__fmul_rn(n[j], rstd), factor[j]);
  to_floats(factor, scale);
  to_floats(sum, shift);
#pragma unroll
  for (int j = 0; j < N; ++j) n[j] = modulate<T, false>(n[j], factor[j], sum[j]);
  return from_floats<T, N>(n);
}

template <bool ROUND, Site SITE>
__global__ void __launch_bounds__(kMeanThreads, kMeanBlocks<SITE>) mean_norm_kernel(const Problem p) {
  constexpr Cache kCache = kHasResidual<SITE> ? Cache::normal : Cache::streaming;
  __shared__ MeanExchange exchange;
  const Place place(p);
  each(kEach, [&](auto i) {
    if (!place.inside(i)) exchange.row[threadIdx.x + i * kMeanThreads] = filled<T, N>(0.0f);
  });
  wait_for_previous_kernel();
  const Token at(p, blockIdx.y, blockIdx.x);
  const int64_t target = (at.batch * p.tokens + at.token) * p.width + place.first;
  const auto ask_rows = [&](Columns& columns, const Rows& rows) {
    const T* const source = static_cast<const T*>(rows.data) + at.offset(rows) + place.first;
    place.ask(columns, true, 0.0f, [&](int offset) { return load_row<kCache, T, N>(source + offset); });
  };
  Columns v, weight;
  ask_rows(v, p.x);

  if constexpr (kHasResidual<SITE>) {
    Columns residual, gate;
    ask_rows(residual, p.residual);
    float rstd = 1.0f;
    const auto ask_gate = [&] { place.ask(gate, p.gate, at, p.index, kNoGate); };
    if constexpr (kNormsX<SITE>) {
      const auto ask = [&] { place.ask(weight, p.x_weight, kNoWeight), ask_gate(); };
      rstd = root_of_mean(row_sum_of_squares(v, place, exchange, ask), p);
    } else {
      ask_gate();
    }
    const bool unknown = !at.valid && p.gate.data != nullptr;
    T* const r = static_cast<T*>(p.r) + target;
    place.each([&](auto i) {
      v[i] = added<ROUND, kNormsX<SITE>>(residual[i], v[i], rstd, weight[i], gate[i]);
      if (unlikely(unknown)) v[i] = filled<T, N>(kNaN);
      if (place.inside(i)) store_row<kCache>(r + i * kStep, v[i]);
    });
  }

  if constexpr (kNormsResult<SITE>) {
    Columns scale, shift;
    const auto ask = [&] {
      place.ask(weight, p.weight, kNoWeight);
      place.ask(scale, p.scale, at, p.index, kNoScale);
      place.ask(shift, p.shift, at, p.index, kNoShift);
    };
    const float rstd = at.valid ? root_of_mean(row_sum_of_squares(v, place, exchange, ask), p) : kNaN;
    T* const y = static_cast<T*>(p.y) + target;
    place.each([&](auto i) {
      const auto result = modulated<ROUND>(v[i], rstd, weight[i], scale[i], shift[i]);
      if (place.inside(i)) store_row<kCache>(y + i * kStep, result);
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
  const dim3 grid(static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.batch));
  return launch(&mean_norm_kernel<ROUND, SITE>, grid, kMeanThreads, stream, p);
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

// Whether ATen has a warp for a row, and all operands are of the kernels' dtype and aligned.
bool fits_a_block(const Problem& p, int lanes) {
  constexpr DType t = dtype_of<T>;
  const auto rows = [&](const Rows& r) {
    return r.data == nullptr || (r.dtype == t && aligned16(r.data, t, r.batch_stride, r.token_stride));
  };
  const auto modulation = [&](const Modulation& m) { return m.table.data == nullptr && fast_modulation(m, t); };
  return p.x.dtype == t && lanes == 32 && p.width >= kGrouped && p.width <= kMostMeanWidth && p.width * bytes(t) % 16 == 0 &&
         p.tokens <= 0x7fffffff && p.batch <= 0xffff && rows(p.x) && rows(p.residual) && modulation(p.gate) && modulation(p.scale) &&
         modulation(p.shift) && fast_vector(p.weight, t) && fast_vector(p.x_weight, t) && p.bias.data == nullptr;
}

int mean_norm(const Problem& p, void* stream) {
  const int lanes = mean_lanes(p.batch * p.tokens, p.width);
  if (!fits_a_block(p, lanes)) return launch(&any_mean_norm_kernel, blocks(p.batch * p.tokens), kAnyThreads, stream, p, lanes);
  return p.round_each ? launch_site<true>(p, stream) : launch_site<false>(p, stream);
}

}  // namespace ditnorm
