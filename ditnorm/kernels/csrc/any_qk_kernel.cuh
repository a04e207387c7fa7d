// The kernel of QK normalisation and rotary embedding for everything that the fast ones don't
// serve: any width, alignment, tables and dtype of the weights. One warp a head, or a row where the
// norm goes across heads; element by element.
#pragma once
#include "lanes.h"
#include "launch.h"
#include "mean_square.cuh"
#include "rope.cuh"

namespace ditnorm {

// A sum over a row as torch's RMSNorm takes it (statistics.cuh), by one warp in place of its four;
// add(sum, j) adds element j. UNROLL: as of MeanOrder.
template <int UNROLL = kGroup, class F>
__device__ __forceinline__ float lanes_sum(int64_t width, const F& add) {
  constexpr int kWarps = kLanes / 32;
  static_assert(kWarps == 4);
  float of_warp[kWarps] = {};
#pragma unroll(UNROLL)
  for (int warp = 0; warp < kWarps; ++warp) {  // each warp's sum moves on to the place of the one before it
    float sum = 0.0f;
    for (int64_t group = (warp * 32 + threadIdx.x % 32) * kGroup; group < width; group += kTile) {
#pragma unroll(UNROLL)
      for (int64_t j = group; j < group + kGroup; ++j) {
        if (j < width) sum = add(sum, j);
      }
    }
    for (int bit = 16; bit > 0; bit /= 2) sum = add_along(bit, sum);
    of_warp[0] = of_warp[1], of_warp[1] = of_warp[2], of_warp[2] = of_warp[3], of_warp[3] = sum;
  }
  return __fadd_rn(__fadd_rn(of_warp[0], of_warp[2]), __fadd_rn(of_warp[1], of_warp[3]));
}

template <int UNROLL = kGroup, class V>
__device__ __forceinline__ float lanes_sum_of_squares(int64_t width, const V& v) {
  return lanes_sum<UNROLL>(width, [&](float sum, int64_t j) {
    const float value = v(j);
    return __fmaf_rn(value, value, sum);
  });
}

__device__ __forceinline__ float load_element(const Vector& vector, int64_t j) {
  float value[1];
  load_elements(value, vector.data, vector.dtype, j, 1);
  return value[0];
}

// ROUND: every intermediate is rounded to T.
template <class T, bool ROUND>
__global__ void __launch_bounds__(kLanes, 4) any_qk_kernel(const HeadProblem p) {
  wait_for_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kWarps = kLanes / 32;
  const HeadStream& stream = p.streams[blockIdx.y / kParts];
  if (blockIdx.y % kParts >= stream.count) return;
  const HeadRows& rows = stream.parts[blockIdx.y % kParts];
  const Rotary& rotary = stream.rotary;
  const int64_t span = p.across ? rows.width : p.head_dim, norms = rows.width / span;
  const int64_t work = p.batch * stream.tokens * norms;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; unit < work;
       unit += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t row = unit / norms, start = (unit - row * norms) * span;
    const int64_t batch = row / stream.tokens, token = row - batch * stream.tokens;
    const T* const x = static_cast<const T*>(rows.data) + batch * rows.batch_stride + token * rows.token_stride + start;
    T* const out = static_cast<T*>(rows.out) + batch * rows.out_batch_stride + token * rows.width + start;
    if (rows.copied) {
      for (int64_t j = lane; j < span; j += 32) out[j] = x[j];
      continue;
    }
    const auto v = [&](int64_t j) { return to_float(x[j]); };
    const float mean = p.twice ? __fmul_rn(mean_order_sum_of_squares(static_cast<int>(span), v), rows.mean_factor)
                               : __fdiv_rn(lanes_sum_of_squares(span, v), static_cast<float>(span));
    const float rstd = rsqrtf(__fadd_rn(mean, p.eps));
    const auto normed = [&](int64_t j) {
      float n = __fmul_rn(rstd, v(j));
      if (rows.weight.data != nullptr) {
        if (p.twice) n = round_to<T, ROUND>(n);
        n = __fmul_rn(load_element(rows.weight, j), n);
      }
      return round_to<T, ROUND>(n);
    };
    const bool rotated = token < rotary.tokens;
    const int64_t tables = batch * rotary.batch_stride + token * rotary.token_stride;
    const float* const cos = advance<float>(rotary.cos, tables);
    const float* const sin = advance<float>(rotary.sin, tables);
    if (rotated && rotary.halves) {
      const int64_t half = p.head_dim / 2;
      for (int64_t pair = lane; 2 * pair < span; pair += 32) {
        const int64_t column = pair % half, j = pair / half * p.head_dim + column;
        const int64_t at = (start + j) / p.head_dim * rotary.head_stride + column * rotary.step;
        const float a = normed(j), b = normed(j + half);
        out[j] = from_float<T>(rotate_half(a, b, cos[at], -sin[at], rotary.contracted));
        out[j + half] = from_float<T>(rotate_half(b, a, cos[at], sin[at], rotary.contracted));
      }
      continue;
    }
    for (int64_t j = 2 * lane; j < span; j += 2 * 32) {
      float a = normed(j), b = j + 1 < span ? normed(j + 1) : 0.0f;
      if (rotated) {
        const int64_t column = j % p.head_dim, of_head = (start + j) / p.head_dim * rotary.head_stride;
        const int64_t of_a = of_head + (rotary.per_element ? column : column / 2) * rotary.step;
        const int64_t of_b = rotary.per_element ? of_a + rotary.step : of_a;
        if (rotary.contracted) {
          rotate_pair<true>(a, b, cos[of_a], cos[of_b], sin[of_a], sin[of_b]);
        } else {
          rotate_pair<false>(a, b, cos[of_a], cos[of_b], sin[of_a], sin[of_b]);
        }
      }
      out[j] = from_float<T>(a);
      if (j + 1 < span) out[j + 1] = from_float<T>(b);
    }
  }
}

}  // namespace ditnorm
