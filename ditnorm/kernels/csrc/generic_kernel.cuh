// The kernel for everything that the fast ones don't serve: any width, alignment, and mix of dtypes. One block of 128 threads a row,
// element by element; a row is read twice. The statistics take the same order as in statistics.cuh (a last group may be short).
#pragma once
#include "formulas.cuh"
#include "launch.h"
#include "statistics.cuh"

namespace ditnorm {

enum class Op { norm_scale_shift, scale_residual_norm_scale_shift, scale_residual };

__device__ __forceinline__ float modulation_value(const Modulation& m, int64_t offset, int64_t column) {
  const float v = load_float(m.data, m.dtype, offset + column);
  return m.table.data == nullptr ? v : __fadd_rn(v, load_float(m.table.data, m.table.dtype, column));
}

// T: what the law rounds each intermediate to, if ROUND; the dtypes of the tensors are known at run time only.
template <Op OP, Norm NORM, class T, bool ROUND>
__global__ void __launch_bounds__(kLanes, 4) generic_kernel(const Problem p) {
  constexpr bool kResidual = OP != Op::norm_scale_shift;
  const int64_t rows = p.batch * p.tokens;
  const bool has_gate = p.gate.data != nullptr, has_scale = p.scale.data != nullptr, has_shift = p.shift.data != nullptr;
  const bool has_weight = p.weight.data != nullptr, has_bias = p.bias.data != nullptr;
  const bool wide = (has_weight && p.weight.dtype != p.x.dtype) || (has_bias && p.bias.dtype != p.x.dtype);
  const bool bias_only = NORM == Norm::layer && has_bias && !has_weight;

  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Token at(p, row);
    const int64_t x_offset = at.offset(p.x), residual_offset = at.offset(p.residual), out_offset = row * p.width;
    const int64_t gate_offset = at.offset(p.gate, p.index);
    const int64_t scale_offset = at.offset(p.scale, p.index), shift_offset = at.offset(p.shift, p.index);

    Welford lanes[1] = {};
    for (int64_t group = static_cast<int64_t>(threadIdx.x) * kGroup; group < p.width; group += kTile) {
      for (int64_t column = group; column < group + kGroup && column < p.width; ++column) {
        float v = load_float(p.x.data, p.x.dtype, x_offset + column);
        if constexpr (kResidual) {
          const float gate = !has_gate ? kNoGate : at.valid ? modulation_value(p.gate, gate_offset, column) : kNaN;
          v = add_gated<T, ROUND>(load_float(p.residual.data, p.residual.dtype, residual_offset + column), v, gate);
          v = round_to(v, p.residual.dtype);
          store_float(p.r, p.residual.dtype, out_offset + column, v);
        }
        if constexpr (NORM == Norm::layer) {
          lanes[0].count += 1.0f;
          lanes[0].add(v, __frcp_rn(lanes[0].count));
        } else {
          lanes[0].m2 = __fmaf_rn(v, v, lanes[0].m2);
        }
      }
    }
    if constexpr (OP == Op::scale_residual) continue;

    Statistics row_statistics = reduce<1>(lanes, p);
    if (!at.valid) row_statistics.rstd = kNaN;
    for (int64_t group = static_cast<int64_t>(threadIdx.x) * kGroup; group < p.width; group += kTile) {
      for (int64_t column = group; column < group + kGroup && column < p.width; ++column) {
        const float v =
            kResidual ? load_float(p.r, p.residual.dtype, out_offset + column) : load_float(p.x.data, p.x.dtype, x_offset + column);
        const float bias = has_bias ? load_float(p.bias.data, p.bias.dtype, column) : kNoBias;
        const float weight = has_weight ? load_float(p.weight.data, p.weight.dtype, column) : kNoWeight;
        const float scale = has_scale ? modulation_value(p.scale, scale_offset, column) : kNoScale;
        const float shift = has_shift ? modulation_value(p.shift, shift_offset, column) : kNoShift;
        const float n = bias_only           ? normalize_bias_only<T, ROUND>(v, row_statistics.mean, row_statistics.rstd, bias)
                        : NORM == Norm::rms ? normalize_rms<T, ROUND>(v, row_statistics.rstd, weight, bias, wide)
                                            : normalize<T, ROUND>(v, row_statistics.mean, row_statistics.rstd, weight, bias);
        const float y = modulate<T, ROUND>(n, scale, shift);
        store_float(p.y, p.x.dtype, out_offset + column, y);
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
