// The statistics of a row in the order of ATen's vectorised LayerNorm and RMSNorm (layer_norm_kernel.cu), so that the results equal
// eager PyTorch's bit for bit on CUDA:
//
//   128 lanes; lane l takes the groups of 4 consecutive elements l, l + 128, l + 256, ... and runs Welford over them in order;
//   in each warp of 32 lanes, lane l combines with l + 16, then l + 8, + 4, + 2, + 1; at last warps 0 and 1 with 2 and 3, and 0 with 1.
//
// A 16-byte load of a half-precision type holds two groups, so there a thread is two neighbouring lanes and the row takes 64 threads;
// in float32 a thread is one lane and the row takes 128. The fused multiply-adds are those that nvcc contracts in ATen.
#pragma once
#include "numerics.cuh"

namespace ditnorm {

constexpr int kLanes = 128;
constexpr int kGroup = 4;
constexpr int kTile = kLanes * kGroup;  // the elements that all lanes together take at a time

struct Statistics {
  float mean, rstd;  // mean is 0 for RMSNorm
};

// Welford's running state. For RMSNorm m2 is the plain sum of squares and mean stays 0.
struct Welford {
  float mean, m2, count;

  // The (count + 1)-th element; `reciprocal` is 1 / (count + 1). The caller keeps count.
  __device__ __forceinline__ void add(float v, float reciprocal) {
    const float delta = __fsub_rn(v, mean);
    mean = __fmaf_rn(delta, reciprocal, mean);
    m2 = __fmaf_rn(delta, __fsub_rn(v, mean), m2);
  }

  __device__ __forceinline__ void combine(const Welford& other) {
    const float total = __fadd_rn(other.count, count);
    if (total == 0.0f) return;
    const float reciprocal = __frcp_rn(total);
    const float others = __fmul_rn(other.count, reciprocal), own = __fmul_rn(count, reciprocal);
    const float delta = __fsub_rn(mean, other.mean);
    mean = __fmaf_rn(other.mean, others, __fmul_rn(mean, own));
    m2 = __fmaf_rn(__fmul_rn(__fmul_rn(delta, delta), other.count), own, __fadd_rn(m2, other.m2));
    count = total;
  }
};

__device__ __forceinline__ Welford shuffle_down(const Welford& state, int offset, int width) {
  return {__shfl_down_sync(0xffffffffu, state.mean, offset, width), __shfl_down_sync(0xffffffffu, state.m2, offset, width),
          __shfl_down_sync(0xffffffffu, state.count, offset, width)};
}

__device__ __forceinline__ void combine(Norm norm, Welford& a, const Welford& b) {
  if (norm == Norm::layer) {
    a.combine(b);
  } else {
    a.m2 = __fadd_rn(a.m2, b.m2);
  }
}

// Called by all kLanes / LANES threads of a block, with the states of thread t's lanes LANES * t, ...; returns the row's statistics to all.
template <int LANES>
__device__ __forceinline__ Statistics reduce(Welford (&lanes)[LANES], const Problem& p) {
  constexpr int kThreadsPerWarp = 32 / LANES;  // of ATen's warps
  __shared__ Welford warps[4];
#pragma unroll
  for (int offset = kThreadsPerWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < LANES; ++i) combine(p.norm, lanes[i], shuffle_down(lanes[i], offset, kThreadsPerWarp));
  }
  if constexpr (LANES == 2) combine(p.norm, lanes[0], lanes[1]);
  if (threadIdx.x % kThreadsPerWarp == 0) warps[threadIdx.x / kThreadsPerWarp] = lanes[0];
  __syncthreads();
  Welford row = warps[0], odd = warps[1];
  combine(p.norm, row, warps[2]);
  combine(p.norm, odd, warps[3]);
  combine(p.norm, row, odd);
  const float variance = __fdiv_rn(row.m2, static_cast<float>(p.width));
  return {row.mean, rsqrtf(__fadd_rn(variance, p.eps))};
}

}  // namespace ditnorm
