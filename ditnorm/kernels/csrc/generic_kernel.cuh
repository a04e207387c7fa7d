// The kernel for everything that the fast ones don't serve: any width, alignment, and mix of
// dtypes. One block of 128 threads a row, element by element; a row is read twice. The statistics
// take the same order as in statistics.cuh (a last group may be short).
#pragma once
#include "formulas.cuh"
#include "launch.h"
#include "statistics.cuh"
#include "token.cuh"

namespace ditnorm {

enum class Op { norm_scale_shift, scale_residual_norm_scale_shift, scale_residual };

// A group of a vector, or `missing`.
__device__ __forceinline__ void load_group(float (&out)[kGroup], const Vector& vector, int64_t column, int count, float missing) {
  if (vector.data != nullptr) return load_elements(out, vector.data, vector.dtype, column, count);
#pragma unroll
  for (float& value : out) value = missing;
}

// A group of a modulation's row with its table added, or `missing`.
__device__ __forceinline__ void load_group(float (&out)[kGroup], const Modulation& m, int64_t offset, int64_t column, int count,
                                           float missing) {
  load_group(out, Vector{m.data, m.dtype}, offset + column, count, missing);
  if (m.table.data == nullptr) return;
  float addends[kGroup];
  load_elements(addends, m.table.data, m.table.dtype, column, count);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) out[j] = __fadd_rn(out[j], addends[j]);
}

// T: what the law rounds each intermediate to, if ROUND; the dtypes of the tensors are known at run
// time only.
template <Op OP, Norm NORM, class T, bool ROUND>
__global__ void __launch_bounds__(kLanes, 4) generic_kernel(const Problem p) {
  constexpr bool kResidual = OP != Op::norm_scale_shift;
  __shared__ Exchange exchange;
  const int64_t rows = p.batch * p.tokens;
  const bool has_weight = p.weight.data != nullptr, has_bias = p.bias.data != nullptr;
  const bool wide = (has_weight && p.weight.dtype != p.x.dtype) || (has_bias && p.bias.dtype != p.x.dtype);
  const bool bias_only = NORM == Norm::layer && has_bias && !has_weight;

  wait_for_previous_kernel();
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t batch = p.batch == 1 ? 0 : row / p.tokens;
    const Token at(p, batch, row - batch * p.tokens);
    const int64_t x_offset = at.offset(p.x), residual_offset = at.offset(p.residual), out_offset = row * p.width;
    const int64_t gate_offset = at.offset(p.gate, p.index);
    const int64_t scale_offset = at.offset(p.scale, p.index), shift_offset = at.offset(p.shift, p.index);

    Welford lanes[1] = {};
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * kGroup; column < p.width; column += kTile) {
      const int count = p.width - column < kGroup ? static_cast<int>(p.width - column) : kGroup;
      float v[kGroup], residual[kGroup], gate[kGroup];
      load_elements(v, p.x.data, p.x.dtype, x_offset + column, count);
      if constexpr (kResidual) {
        load_elements(residual, p.residual.data, p.residual.dtype, residual_offset + column, count);
        load_group(gate, p.gate, gate_offset, column, count, kNoGate);
      }
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j >= count) break;
        if constexpr (kResidual) {
          v[j] = add_gated<T, ROUND>(residual[j], v[j], at.valid || p.gate.data == nullptr ? gate[j] : kNaN);
          v[j] = round_to(v[j], p.residual.dtype);
          store_float(p.r, p.residual.dtype, out_offset + column + j, v[j]);
        }
        lanes[0].count += 1.0f;
        add<NORM>(lanes[0], v[j], __frcp_rn(lanes[0].count));
      }
    }
    if constexpr (OP == Op::scale_residual) continue;

    Statistics row_statistics = finish(reduce<NORM, Counts::any>(lanes, exchange), p);
    if (!at.valid) row_statistics.rstd = kNaN;
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * kGroup; column < p.width; column += kTile) {
      const int count = p.width - column < kGroup ? static_cast<int>(p.width - column) : kGroup;
      float v[kGroup], weight[kGroup], bias[kGroup], scale[kGroup], shift[kGroup];
      if constexpr (kResidual) {
        load_elements(v, p.r, p.residual.dtype, out_offset + column, count);
      } else {
        load_elements(v, p.x.data, p.x.dtype, x_offset + column, count);
      }
      load_group(weight, p.weight, column, count, kNoWeight);
      load_group(bias, p.bias, column, count, kNoBias);
      load_group(scale, p.scale, scale_offset, column, count, kNoScale);
      load_group(shift, p.shift, shift_offset, column, count, kNoShift);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j >= count) break;
        const float n = bias_only           ? normalize_bias_only<T, ROUND>(v[j], row_statistics.mean, row_statistics.rstd, bias[j])
                        : NORM == Norm::rms ? normalize_rms<T, ROUND>(v[j], row_statistics.rstd, weight[j], bias[j], wide)
                                            : normalize<T, ROUND>(v[j], row_statistics.mean, row_statistics.rstd, weight[j], bias[j]);
        store_float(p.y, p.x.dtype, out_offset + column + j, modulate<T, ROUND>(n, scale[j], shift[j]));
      }
    }
    __syncthreads();  // the next row's statistics go through the same shared memory
  }
}

template <Op OP, Norm NORM>
int launch_generic_kernel(const Problem& p, void* stream) {
  const auto launch_law = [&](auto kernel) { return launch(kernel, blocks(p.batch * p.tokens), kLanes, stream, p); };
  if (!p.round_each) return launch_law(&generic_kernel<OP, NORM, float, false>);
  if (p.x.dtype == DType::f16) return launch_law(&generic_kernel<OP, NORM, __half, true>);
  return launch_law(&generic_kernel<OP, NORM, __nv_bfloat16, true>);
}

}  // namespace ditnorm
