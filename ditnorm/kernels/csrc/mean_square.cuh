// Sums of squares in the order of ATen's `x.float().pow(2).mean(-1)` (Reduce.cuh), which diffusers' RMSNorm calls for the heads of query
// and key: one warp a row.
//
//   rows of 128 and more, a multiple of 4: lane l takes the groups of 4 consecutive elements l, l + 32, ..., with a sum for each place in
//   the group; shorter rows: it takes the elements l, l + L, l + 2 L, ..., L being the largest power of 2 up to the width, at most 32;
//   each lane adds its sums from left to right; lane l combines with l + L / 2, then l + L / 4, ... l + 1.
#pragma once
#include "numerics.cuh"

namespace ditnorm {

constexpr int kWarpHead = 128;  // the width of a head that one warp takes at once

// The squares of half-precision values are exact in float32, so that fusing changes no bit of theirs; of float32 values each is rounded.
__device__ __forceinline__ float add_square(float sum, float v) { return __fadd_rn(sum, __fmul_rn(v, v)); }

__device__ __forceinline__ float add_along(int thread_bit, float sum) {
  return __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, thread_bit));
}

// A head of 128 in a warp's threads of 4 elements.
__device__ __forceinline__ float warp_head_sum_of_squares(const float (&v)[4]) {
  float sum = __fmul_rn(v[0], v[0]);
#pragma unroll
  for (int j = 1; j < 4; ++j) sum = add_square(sum, v[j]);
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) sum = add_along(bit, sum);
  return sum;
}

// The same in half a warp, a thread being the lanes 2 t and 2 t + 1. After the first step it keeps one of them, its partner the other.
__device__ __forceinline__ float warp_head_sum_of_squares(const float (&v)[8]) {
  float lower = __fmul_rn(v[0], v[0]), upper = __fmul_rn(v[4], v[4]);
#pragma unroll
  for (int j = 1; j < 4; ++j) lower = add_square(lower, v[j]), upper = add_square(upper, v[j + 4]);
  const bool keeps_upper = threadIdx.x & 8;
  const float other = __shfl_xor_sync(0xffffffffu, keeps_upper ? lower : upper, 8);
  float sum = __fadd_rn(keeps_upper ? upper : lower, other);
  return add_along(8, add_along(1, add_along(2, add_along(4, sum))));
}

// A row of `width` elements v(0), v(1), ... in the lanes of a warp, all of which get the result.
template <class V>
__device__ __forceinline__ float mean_order_sum_of_squares(int width, const V& v) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float sums[4] = {};
  int lanes = 32;
  if (width >= kWarpHead && width % 4 == 0) {
    for (int group = lane * 4; group < width; group += 32 * 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] = add_square(sums[j], v(group + j));
    }
  } else {
    while (lanes > width) lanes /= 2;
    int taken = 0;
    for (int j = lane; lane < lanes && j < width; j += lanes, ++taken) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (taken % 4 == k) sums[k] = add_square(sums[k], v(j));
      }
    }
  }
  float sum = __fadd_rn(__fadd_rn(__fadd_rn(sums[0], sums[1]), sums[2]), sums[3]);
  for (int bit = 16; bit > 0; bit /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, sum, bit);
    if (bit < lanes) sum = __fadd_rn(sum, other);
  }
  return __shfl_sync(0xffffffffu, sum, 0);
}

}  // namespace ditnorm
