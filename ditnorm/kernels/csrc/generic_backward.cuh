// The gradients of the rows of a norm site for everything that the fast kernels don't serve: as
// generic_kernel.cuh.
#pragma once
#include "generic_kernel.cuh"
#include "norm_gradient.cuh"

namespace ditnorm {

// NORMED: there was a norm. ROUND: the law rounds each intermediate to T; otherwise T is only what
// dr is rounded to before its sum.
template <bool NORMED, Norm NORM, class T, bool ROUND>
__global__ void __launch_bounds__(kLanes, 4) generic_backward_kernel(const SiteBackward b) {
  __shared__ Exchange of_statistics, of_sums;
  const Problem& p = b.site;
  const int64_t rows = p.batch * p.tokens;
  const DType dtype = p.x.dtype;

  wait_for_previous_kernel();
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t batch = p.batch == 1 ? 0 : row / p.tokens;
    const Token at(p, batch, row - batch * p.tokens);
    const int64_t x_offset = at.offset(p.x), dy_offset = at.offset(b.dy), dr_offset = at.offset(b.dr), out_offset = row * p.width;
    const int64_t scale_offset = at.offset(p.scale, p.index), gate_offset = at.offset(p.gate, p.index);
    const auto each_group = [&](auto&& f) {
      for (int64_t column = static_cast<int64_t>(threadIdx.x) * kGroup; column < p.width; column += kTile) {
        f(column, p.width - column < kGroup ? static_cast<int>(p.width - column) : kGroup);
      }
    };
    const auto load_dn = [&](float (&dn)[kGroup], int64_t column, int count) {
      float scale[kGroup];
      load_elements(dn, b.dy.data, dtype, dy_offset + column, count);
      load_group(scale, p.scale, scale_offset, column, count, kNoScale);
      if (p.scale.data == nullptr) return;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) dn[j] = round_to<T, ROUND>(__fmul_rn(dn[j], round_to<T, ROUND>(__fadd_rn(1.0f, scale[j]))));
    };

    Statistics statistics{};
    Welford sums[1] = {};
    if constexpr (NORMED) {
      Welford lanes[1] = {};
      each_group([&](int64_t column, int count) {
        float v[kGroup];
        load_elements(v, p.x.data, dtype, x_offset + column, count);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if (j >= count) break;
          lanes[0].count += 1.0f;
          add<NORM>(lanes[0], v[j], __frcp_rn(lanes[0].count));
        }
      });
      statistics = finish(reduce<NORM, Counts::any>(lanes, of_statistics), p);
      if (!at.valid) statistics.rstd = kNaN;
      each_group([&](int64_t column, int count) {
        float v[kGroup], dn[kGroup], weight[kGroup];
        load_elements(v, p.x.data, dtype, x_offset + column, count);
        load_dn(dn, column, count);
        load_group(weight, p.weight, column, count, kNoWeight);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if (j < count) add_gradient(sums[0], dn[j], weight[j], v[j], statistics);
        }
      });
      sums[0] = reduce<kTwoSums, Counts::equal>(sums, of_sums);
    }
    const RowGradient gradient = row_gradient(statistics, sums[0], p.width, p.norm == Norm::layer);
    each_group([&](int64_t column, int count) {
      float v[kGroup], dn[kGroup], weight[kGroup], dr[kGroup], gate[kGroup];
      if constexpr (NORMED) {
        load_elements(v, p.x.data, dtype, x_offset + column, count);
        load_dn(dn, column, count);
        load_group(weight, p.weight, column, count, kNoWeight);
      }
      load_elements(dr, b.dr.data == nullptr ? p.x.data : b.dr.data, dtype, b.dr.data == nullptr ? x_offset + column : dr_offset + column,
                    count);
      load_group(gate, p.gate, gate_offset, column, count, kNoGate);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j >= count) break;
        float value = dr[j];
        if constexpr (NORMED) {
          value = gradient.of(dn[j], weight[j], v[j]);
          if (b.dr.data != nullptr) value = __fadd_rn(dr[j], b.eager ? round_to(value, dtype) : value);
        }
        if (b.d_row != nullptr) store_float(b.d_row, dtype, out_offset + column + j, value);
        if (b.d_branch == nullptr) continue;
        if (b.eager) value = round_to(value, dtype);
        store_float(b.d_branch, dtype, out_offset + column + j, at.valid ? __fmul_rn(value, gate[j]) : kNaN);
      }
    });
    __syncthreads();  // the next row's statistics go through the same shared memory
  }
}

template <bool NORMED, Norm NORM>
int launch_generic_backward(const SiteBackward& b, void* stream) {
  const Problem& p = b.site;
  const auto launch_law = [&](auto kernel) { return launch(kernel, blocks(p.batch * p.tokens), kLanes, stream, b); };
  if (!p.round_each) return launch_law(&generic_backward_kernel<NORMED, NORM, float, false>);
  if (p.x.dtype == DType::f16) return launch_law(&generic_backward_kernel<NORMED, NORM, __half, true>);
  return launch_law(&generic_backward_kernel<NORMED, NORM, __nv_bfloat16, true>);
}

}  // namespace ditnorm
