// The fast kernels: one block a row, 16-byte accesses, all of the row asked for at once and held in registers until its statistics are
// on their way, then in the thread's own slots of shared memory: a loop over registers would have to be unrolled, and the library be
// twenty times larger. They serve what models use: x and residual of one dtype T, modulations all in M (T or float32), affine in T or
// float32, tables in float32, everything 16-byte aligned, width at most kMaxItems tiles.
#pragma once
#include <utility>

#include "formulas.cuh"
#include "launch.h"
#include "statistics.cuh"

namespace ditnorm {

constexpr int kMaxItems = 12;

// f(0), f(1), ..., each inlined with its constant.
template <int... I, class F>
__device__ __forceinline__ void each(std::integer_sequence<int, I...>, F&& f) {
  (f(I), ...);
}

// Keeps the compiler from making one copy of a loop for every combination of operands that may be missing.
__device__ __forceinline__ const void* not_invariant(const void* pointer) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(pointer));
#endif
  return pointer;
}

template <class T, int N>
__device__ __forceinline__ void load_floats(float (&out)[N], const void* data, int64_t offset) {
  const auto pack = load_pack<T, N>(data, offset);
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = to_float(pack.v[j]);
}

// N elements of the affine, in T or float32 (which one is known at run time), or `missing`.
template <class T, int N>
__device__ __forceinline__ void load_vector(float (&out)[N], const Vector& vector, int64_t column, float missing) {
  const void* data = not_invariant(vector.data);
  if (data == nullptr) {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = missing;
  } else if (vector.dtype == DType::f32) {
    load_floats<float>(out, data, column);
  } else {
    load_floats<T>(out, data, column);
  }
}

// N elements of a modulation's row, its table added, or `missing`.
template <class M, int N>
__device__ __forceinline__ void load_modulation(float (&out)[N], const Modulation& m, int64_t offset, int64_t column, float missing) {
  const void *data = not_invariant(m.data), *table = not_invariant(m.table.data);
  if (data == nullptr) {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = missing;
    return;
  }
  load_floats<M>(out, data, offset + column);
  if (table != nullptr) {
    float addend[N];
    load_floats<float>(addend, table, column);
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = __fadd_rn(out[j], addend[j]);
  }
}

// Left alone (0), ptxas spills a few registers of these on sm_80 and sm_120, to reach an occupancy that it likes. On sm_90 it doesn't.
template <class T, bool RESIDUAL, int ITEMS>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kMinBlocks = 0;
#else
constexpr int kMinBlocks = std::is_same_v<T, float> || (RESIDUAL && ITEMS == kMaxItems) ? 1 : 0;
#endif

// ITEMS: the row's tiles of 512 elements, rounded up. RESIDUAL: scale_residual_norm_scale_shift.
template <class T, class M, bool RESIDUAL, bool ROUND, int ITEMS>
__global__ void __launch_bounds__(kLanes* static_cast<int>(sizeof(T)) / 4, kMinBlocks<T, RESIDUAL, ITEMS>) row_kernel(const Problem p) {
  constexpr int N = 16 / sizeof(T);  // elements of one access
  constexpr int LANES = N / kGroup;  // of ATen's lanes, that this thread is
  constexpr auto kEach = std::make_integer_sequence<int, ITEMS>{};
  __shared__ Pack<T, N> slots[ITEMS][kLanes / LANES];

  const int64_t rows = p.batch * p.tokens;
  const int first = threadIdx.x * N;
  const int width = static_cast<int>(p.width);

  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Token at(p, row);
    const int64_t x_offset = at.offset(p.x) + first, out_offset = row * p.width;
    Pack<T, N> v[ITEMS];

    if constexpr (RESIDUAL) {
      const int64_t residual_offset = at.offset(p.residual) + first, gate_offset = at.offset(p.gate, p.index);
      Pack<T, N> x[ITEMS];
      each(kEach, [&](int i) {
        if (first + i * kTile >= width) return;
        v[i] = load_pack<T, N>(p.residual.data, residual_offset + i * kTile);
        x[i] = load_pack<T, N>(p.x.data, x_offset + i * kTile);
      });
      const float poison = at.valid || p.gate.data == nullptr ? kNoGate : kNaN;
      each(kEach, [&](int i) {
        const int column = first + i * kTile;
        if (column >= width) return;
        float gate[N];
        load_modulation<M>(gate, p.gate, gate_offset, column, kNoGate);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          v[i].v[j] = from_float<T>(add_gated<T, ROUND>(to_float(v[i].v[j]), to_float(x[i].v[j]), __fmul_rn(gate[j], poison)));
        }
        store_pack<T, N>(p.r, out_offset + column, v[i]);
      });
    } else {
      each(kEach, [&](int i) {
        if (first + i * kTile < width) v[i] = load_pack<T, N>(p.x.data, x_offset + i * kTile);
      });
    }

    Welford lanes[LANES] = {};
    each(kEach, [&](int i) {
      if (first + i * kTile >= width) return;
      slots[i][threadIdx.x] = v[i];
#pragma unroll
      for (int lane = 0; lane < LANES; ++lane) {
        each(std::make_integer_sequence<int, kGroup>{}, [&](int j) {
          const float element = to_float(v[i].v[lane * kGroup + j]);
          if (p.norm == Norm::layer) {
            lanes[lane].add(element, 1.0f / (i * kGroup + j + 1));
          } else {
            lanes[lane].m2 = __fmaf_rn(element, element, lanes[lane].m2);
          }
        });
        lanes[lane].count = (i + 1) * kGroup;
      }
    });
    Statistics row_statistics = reduce<LANES>(lanes, p);
    if (!at.valid) row_statistics.rstd = kNaN;

    const int64_t scale_offset = at.offset(p.scale, p.index), shift_offset = at.offset(p.shift, p.index);
#pragma unroll 1
    for (int column = first, i = 0; column < width; column += kTile, ++i) {
      float weight[N], bias[N], scale[N], shift[N];
      load_modulation<M>(scale, p.scale, scale_offset, column, kNoScale);
      load_modulation<M>(shift, p.shift, shift_offset, column, kNoShift);
      load_vector<T>(weight, p.weight, column, kNoWeight);
      load_vector<T>(bias, p.bias, column, kNoBias);
      const Pack<T, N> row_i = slots[i][threadIdx.x];
      Pack<T, N> y;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float n = normalize<T, ROUND>(to_float(row_i.v[j]), row_statistics.mean, row_statistics.rstd, weight[j], bias[j]);
        y.v[j] = from_float<T>(modulate<T, ROUND>(n, scale[j], shift[j]));
      }
      store_pack<T, N>(p.y, out_offset + column, y);
    }
    __syncthreads();  // the next row's statistics go through the same shared memory
  }
}

template <class T, class M, bool RESIDUAL, bool ROUND>
int launch_row_kernel(const Problem& p, void* stream) {
  constexpr int kThreads = kLanes * static_cast<int>(sizeof(T)) / 4;
  const auto launch_items = [&](auto kernel) { return launch(kernel, blocks(p.batch * p.tokens), kThreads, stream, p); };
  switch ((p.width + kTile - 1) / kTile) {
    case 1: return launch_items(&row_kernel<T, M, RESIDUAL, ROUND, 1>);
    case 2: return launch_items(&row_kernel<T, M, RESIDUAL, ROUND, 2>);
    case 3: return launch_items(&row_kernel<T, M, RESIDUAL, ROUND, 3>);
    case 4: return launch_items(&row_kernel<T, M, RESIDUAL, ROUND, 4>);
    case 5:
    case 6: return launch_items(&row_kernel<T, M, RESIDUAL, ROUND, 6>);
    case 7:
    case 8: return launch_items(&row_kernel<T, M, RESIDUAL, ROUND, 8>);
    case 9:
    case 10: return launch_items(&row_kernel<T, M, RESIDUAL, ROUND, 10>);
    default: return launch_items(&row_kernel<T, M, RESIDUAL, ROUND, kMaxItems>);
  }
}

}  // namespace ditnorm
