// What the norm sites of diffusers' RMSNorm over the whole width share with their gradients.
//
// A row is a block's. ATen has a warp for it, each of whose lanes keeps four sums, one for each place
// in a group of four elements (mean_square.cuh): here each sum is a thread's. The row stays in
// registers; threads share it, for the sums, in shared memory.
#pragma once
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

// Of what each thread of the block has added up, in all of them.
__device__ __forceinline__ float sum_of_threads(const Pack<float, kPlaces> (&sums)[32]) {
  const float sum = sum_of_group(sums[threadIdx.x % 32].v);
  return add_along(1, add_along(2, add_along(4, add_along(8, add_along(16, sum)))));
}

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
  return sum_of_threads(exchange.sums);
}

__device__ __forceinline__ float root_of_mean(float sum, const Problem& p) {
  return rsqrtf(__fadd_rn(__fmul_rn(sum, p.mean_factor), p.eps));
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

// Whether ATen has a warp for a row, and all operands are of the kernels' dtype and aligned.
inline bool fits_a_block(const Problem& p, int lanes) {
  constexpr DType t = dtype_of<T>;
  const auto rows = [&](const Rows& r) {
    return r.data == nullptr || (r.dtype == t && aligned16(r.data, t, r.batch_stride, r.token_stride));
  };
  const auto modulation = [&](const Modulation& m) { return m.table.data == nullptr && fast_modulation(m, t); };
  return p.x.dtype == t && lanes == 32 && p.width >= kGrouped && p.width <= kMostMeanWidth && p.width * bytes(t) % 16 == 0 &&
         p.tokens <= 0x7fffffff && p.batch <= 0xffff && rows(p.x) && rows(p.residual) && modulation(p.gate) && modulation(p.scale) &&
         modulation(p.shift) && fast_vector(p.weight, t) && fast_vector(p.x_weight, t) && p.bias.data == nullptr;
}

}  // namespace ditnorm
