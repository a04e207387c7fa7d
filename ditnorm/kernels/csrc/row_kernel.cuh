// The fast kernels: one block a row, the row in registers, 16-byte accesses. They serve what models use: x and residual of one dtype T,
// modulations all in M (T or float32), affine and tables in T or float32, everything 16-byte aligned, width at most kMaxItems tiles.
#pragma once
#include "formulas.cuh"
#include "launch.h"
#include "statistics.cuh"

namespace ditnorm {

constexpr int kMaxItems = 16;

// A vector of T or float32 (which one is known at run time), read through the caches that all rows share.
template <class T, int N>
__device__ __forceinline__ void load_vector(float (&out)[N], const Vector& vector, int64_t column) {
  if (vector.dtype == DType::f32) {
    const auto pack = load_pack<float, N>(vector.data, column);
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = pack.v[j];
  } else {
    const auto pack = load_pack<T, N>(vector.data, column);
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = to_float(pack.v[j]);
  }
}

// A modulation's row as floats: what was loaded, plus its table.
template <class T, class M, int N>
__device__ __forceinline__ void modulation_values(float (&out)[N], const Pack<M, N>& pack, const Vector& table, int64_t column) {
  if (table.data != nullptr) {
    load_vector<T>(out, table, column);
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = __fadd_rn(to_float(pack.v[j]), out[j]);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = to_float(pack.v[j]);
  }
}

// ITEMS: the row's tiles of 512 elements, rounded up. RESIDUAL: scale_residual_norm_scale_shift.
template <class T, class M, bool RESIDUAL, Norm NORM, bool ROUND, int ITEMS>
__global__ void __launch_bounds__(kLanes* static_cast<int>(sizeof(T)) / 4) row_kernel(const Problem p) {
  constexpr int N = 16 / sizeof(T);  // elements of one access
  constexpr int LANES = N / kGroup;  // of ATen's lanes, that this thread is
  // Scale and shift are asked for before the reduction, with everything else, where the registers allow it.
  constexpr int kWords = sizeof(M) / sizeof(T) * 4;
  constexpr bool kEarly = ITEMS * (RESIDUAL ? 8 + 3 * kWords : 4 + 2 * kWords) <= 144;

  const int64_t rows = p.batch * p.tokens;
  const int first = threadIdx.x * N;
  const int width = static_cast<int>(p.width);
  const bool has_scale = p.scale.data != nullptr, has_shift = p.shift.data != nullptr;
  const bool has_weight = p.weight.data != nullptr, has_bias = p.bias.data != nullptr;
  const bool wide = wide_affine(p);

  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Token at(p, row);
    Pack<T, N> v[ITEMS];
    Pack<M, N> scale[kEarly ? ITEMS : 1], shift[kEarly ? ITEMS : 1];
    const int64_t x_offset = at.offset(p.x) + first;
    const int64_t scale_offset = at.offset(p.scale, p.index) + first, shift_offset = at.offset(p.shift, p.index) + first;

    if constexpr (RESIDUAL) {
      const int64_t residual_offset = at.offset(p.residual) + first, gate_offset = at.offset(p.gate, p.index) + first;
      const bool has_gate = p.gate.data != nullptr;
      Pack<T, N> x[ITEMS];
      Pack<M, N> gate[kEarly ? ITEMS : 1];
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        if (first + i * kTile >= width) continue;
        v[i] = load_pack<T, N>(p.residual.data, residual_offset + i * kTile);
        x[i] = load_pack<T, N>(p.x.data, x_offset + i * kTile);
        if constexpr (kEarly) {
          if (has_gate) gate[i] = load_pack<M, N>(p.gate.data, gate_offset + i * kTile);
          if (has_scale) scale[i] = load_pack<M, N>(p.scale.data, scale_offset + i * kTile);
          if (has_shift) shift[i] = load_pack<M, N>(p.shift.data, shift_offset + i * kTile);
        }
      }
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        if (first + i * kTile >= width) continue;
        Pack<M, N>& gate_i = gate[kEarly ? i : 0];
        if constexpr (!kEarly) {
          if (has_gate) gate_i = load_pack<M, N>(p.gate.data, gate_offset + i * kTile);
        }
        float g[N];
        if (has_gate) modulation_values<T>(g, gate_i, p.gate.table, first + i * kTile);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const float gate_j = has_gate ? (at.valid ? g[j] : kNaN) : 0.0f;
          v[i].v[j] = from_float<T>(add_gated<T, ROUND>(to_float(v[i].v[j]), to_float(x[i].v[j]), has_gate, gate_j));
        }
        store_pack<T, N>(p.r, row * p.width + first + i * kTile, v[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        if (first + i * kTile >= width) continue;
        v[i] = load_pack<T, N>(p.x.data, x_offset + i * kTile);
        if constexpr (kEarly) {
          if (has_scale) scale[i] = load_pack<M, N>(p.scale.data, scale_offset + i * kTile);
          if (has_shift) shift[i] = load_pack<M, N>(p.shift.data, shift_offset + i * kTile);
        }
      }
    }

    Welford lanes[LANES] = {};
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (first + i * kTile >= width) continue;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) {
          const float element = to_float(v[i].v[lane * kGroup + j]);
          if constexpr (NORM == Norm::layer) {
            lanes[lane].add(element, 1.0f / (i * kGroup + j + 1));
          } else {
            lanes[lane].m2 = __fmaf_rn(element, element, lanes[lane].m2);
          }
        }
      }
#pragma unroll
      for (int lane = 0; lane < LANES; ++lane) lanes[lane].count = (i + 1) * kGroup;
    }
    Statistics row_statistics = reduce<NORM, LANES>(lanes, p.width, p.eps);
    if (!at.valid) row_statistics.rstd = kNaN;

#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int column = first + i * kTile;
      if (column >= width) continue;
      float weight[N], bias[N], s[N], t[N];
      if (has_weight) load_vector<T>(weight, p.weight, column);
      if (has_bias) load_vector<T>(bias, p.bias, column);
      if (has_scale) {
        const Pack<M, N> pack = kEarly ? scale[kEarly ? i : 0] : load_pack<M, N>(p.scale.data, scale_offset + i * kTile);
        modulation_values<T>(s, pack, p.scale.table, column);
      }
      if (has_shift) {
        const Pack<M, N> pack = kEarly ? shift[kEarly ? i : 0] : load_pack<M, N>(p.shift.data, shift_offset + i * kTile);
        modulation_values<T>(t, pack, p.shift.table, column);
      }
      Pack<T, N> y;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float element = to_float(v[i].v[j]);
        float n = normalize<NORM, T, ROUND>(element, row_statistics.mean, row_statistics.rstd, has_weight, has_weight ? weight[j] : 0.0f,
                                            has_bias, has_bias ? bias[j] : 0.0f, wide);
        if (has_scale) n = scaled<T, ROUND>(n, s[j]);
        if (has_shift) n = __fadd_rn(n, t[j]);
        y.v[j] = from_float<T>(n);
      }
      store_pack<T, N>(p.y, row * p.width + column, y);
    }
    __syncthreads();  // the next row's statistics go through the same shared memory
  }
}

template <class T, class M, bool RESIDUAL, Norm NORM, bool ROUND>
int launch_row_kernel(const Problem& p, void* stream) {
  constexpr int kThreads = kLanes * static_cast<int>(sizeof(T)) / 4;
  const auto launch_items = [&](auto kernel) { return launch(kernel, blocks(p.batch * p.tokens), kThreads, stream, p); };
  switch ((p.width + kTile - 1) / kTile) {
    case 1: return launch_items(&row_kernel<T, M, RESIDUAL, NORM, ROUND, 1>);
    case 2: return launch_items(&row_kernel<T, M, RESIDUAL, NORM, ROUND, 2>);
    case 3: return launch_items(&row_kernel<T, M, RESIDUAL, NORM, ROUND, 3>);
    case 4: return launch_items(&row_kernel<T, M, RESIDUAL, NORM, ROUND, 4>);
    case 5:
    case 6: return launch_items(&row_kernel<T, M, RESIDUAL, NORM, ROUND, 6>);
    case 7:
    case 8: return launch_items(&row_kernel<T, M, RESIDUAL, NORM, ROUND, 8>);
    case 9:
    case 10: return launch_items(&row_kernel<T, M, RESIDUAL, NORM, ROUND, 10>);
    case 11:
    case 12: return launch_items(&row_kernel<T, M, RESIDUAL, NORM, ROUND, 12>);
    default: return launch_items(&row_kernel<T, M, RESIDUAL, NORM, ROUND, kMaxItems>);
  }
}

}  // namespace ditnorm
