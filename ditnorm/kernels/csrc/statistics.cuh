// The statistics of a row in the order of ATen's vectorised LayerNorm and RMSNorm
// (layer_norm_kernel.cu), so that the results equal eager PyTorch's bit for bit on CUDA. ATen has
// 128 lanes in 4 warps:
//
//   elements    0..3   4..7  ...  508..511 | 512..515 ...   groups of 4, to the lanes in turn;
//   lane          0      1   ...     127   |    0     ...   Welford over a lane's elements in order
//
//   in a warp   lane l with l + 16, then l + 8, l + 4,      bits 4, 3, 2, 1, 0 of the lane's number
//               l + 2, l + 1
//   the warps   0 with 2 and 1 with 3, then 0 with 1        bits 6, 5
//
// A thread stands in for one lane, for two neighbours, or for two neighbours and the two that are
// 64 further. Both sides of a pair compute the result, and no thread has to be told. The fused
// multiply-adds are those that nvcc contracts in ATen.
#pragma once
#include "lanes.h"
#include "numerics.cuh"

namespace ditnorm {

struct Statistics {
  float mean, rstd;  // mean is 0 for RMSNorm
};

// Welford's running state. For RMSNorm m2 is the plain sum of squares and mean stays 0; of a
// backward pass both are plain sums.
struct Welford {
  float mean, m2, count;
};

// In place of a norm: what is reduced is two sums.
constexpr Norm kTwoSums = static_cast<Norm>(100);

// The n-th element of a lane; `reciprocal` is 1 / n. The caller keeps count.
template <Norm NORM>
__device__ __forceinline__ void add(Welford& lane, float v, float reciprocal) {
  if constexpr (NORM == Norm::layer) {
    const float delta = __fsub_rn(v, lane.mean);
    lane.mean = __fmaf_rn(delta, reciprocal, lane.mean);
    lane.m2 = __fmaf_rn(delta, __fsub_rn(v, lane.mean), lane.m2);
  } else {
    lane.m2 = __fmaf_rn(v, v, lane.m2);
  }
}

// `lower` has the lower lane numbers. EQUAL: both have seen n elements, and n * (1 / 2n) is 0.5
// (for n = 4, 8, ..., 160 it is, in float32).
template <Norm NORM, bool EQUAL>
__device__ __forceinline__ Welford combine(const Welford& lower, const Welford& higher) {
  if constexpr (NORM == Norm::rms) return {0.0f, __fadd_rn(lower.m2, higher.m2), 0.0f};
  if constexpr (NORM == kTwoSums) return {__fadd_rn(lower.mean, higher.mean), __fadd_rn(lower.m2, higher.m2), 0.0f};
  const float total = __fadd_rn(higher.count, lower.count);
  float of_higher = 0.5f, of_lower = 0.5f;
  if constexpr (!EQUAL) {
    if (total == 0.0f) return lower;
    const float reciprocal = __frcp_rn(total);
    of_higher = __fmul_rn(higher.count, reciprocal);
    of_lower = __fmul_rn(lower.count, reciprocal);
  }
  const float delta = __fsub_rn(lower.mean, higher.mean);
  return {__fmaf_rn(higher.mean, of_higher, __fmul_rn(lower.mean, of_lower)),
          __fmaf_rn(__fmul_rn(__fmul_rn(delta, delta), higher.count), of_lower, __fadd_rn(lower.m2, higher.m2)), total};
}

// Not `condition ? a : b`, which selects an address and so drives the states out of the registers.
__device__ __forceinline__ Welford select(bool condition, const Welford& a, const Welford& b) {
  return {condition ? a.mean : b.mean, condition ? a.m2 : b.m2, condition ? a.count : b.count};
}

template <Norm NORM, bool EQUAL>
__device__ __forceinline__ Welford partner(const Welford& state, int thread_bit) {
  return {NORM != Norm::rms ? __shfl_xor_sync(0xffffffffu, state.mean, thread_bit) : 0.0f,
          __shfl_xor_sync(0xffffffffu, state.m2, thread_bit),
          NORM == Norm::layer && !EQUAL ? __shfl_xor_sync(0xffffffffu, state.count, thread_bit) : state.count};
}

template <Norm NORM, bool EQUAL>
__device__ __forceinline__ Welford combine_ordered(bool upper, const Welford& own, const Welford& other) {
  if constexpr (EQUAL) return combine<NORM, EQUAL>(own, other);  // the order doesn't matter
  return combine<NORM, EQUAL>(select(upper, other, own), select(upper, own, other));
}

// Combines a state with that of the thread whose number differs in one bit.
template <Norm NORM, bool EQUAL>
__device__ __forceinline__ void combine_along(int thread_bit, Welford& state) {
  state = combine_ordered<NORM, EQUAL>(threadIdx.x & thread_bit, state, partner<NORM, EQUAL>(state, thread_bit));
}

// The same for a thread with two states: it keeps one, its partner the other, which is half the
// work. From then on the bit of the thread's number says which of the two it was.
template <Norm NORM, bool EQUAL>
__device__ __forceinline__ Welford split_along(int thread_bit, const Welford& first, const Welford& second) {
  const bool upper = threadIdx.x & thread_bit;
  const Welford own = select(upper, second, first);
  Welford other = partner<NORM, EQUAL>(select(upper, first, second), thread_bit);
  if constexpr (EQUAL) other.count = own.count;
  return combine_ordered<NORM, EQUAL>(upper, own, other);
}

// The states of ATen's four warps, in exchange.
struct Exchange {
  float2 moments[4];
  float counts[4];

  template <bool EQUAL>
  __device__ __forceinline__ void put(int warp, const Welford& state) {
    moments[warp] = {state.mean, state.m2};
    if constexpr (!EQUAL) counts[warp] = state.count;
  }
  // `like`: has the count if all have the same
  template <bool EQUAL>
  __device__ __forceinline__ Welford get(int warp, const Welford& like) const {
    const float2 both = moments[warp];
    return {both.x, both.y, EQUAL ? like.count : counts[warp]};
  }
};

// Whether all lanes have seen the same number of elements (widths that are multiples of 512), those
// of each of ATen's warps (of 128), or neither.
enum class Counts { equal, equal_in_warps, any };

// States of a thread's lanes -> the row's, in all kLanes / LANES threads of the block.
template <Norm NORM, Counts COUNTS, int LANES>
__device__ __forceinline__ Welford reduce(Welford (&lanes)[LANES], Exchange& exchange) {
  constexpr bool EQUAL = COUNTS == Counts::equal, kEqualInGroups = COUNTS != Counts::any;
  Welford& state = lanes[0];
  const auto along = [&](int thread_bit) { combine_along<NORM, kEqualInGroups>(thread_bit, state); };
  const int warp = threadIdx.x / 32;
  if constexpr (LANES == 1) {  // thread = lane
    along(16), along(8), along(4), along(2), along(1);
    if (threadIdx.x % 32 == 0) exchange.put<EQUAL>(warp, state);
    __syncthreads();
    const auto of = [&](int other) { return exchange.get<EQUAL>(other, state); };
    return combine<NORM, EQUAL>(combine<NORM, EQUAL>(of(0), of(2)), combine<NORM, EQUAL>(of(1), of(3)));
  } else if constexpr (LANES == 4) {
    // thread, state = lane / 2 % 32, lane % 2 + lane / 64 * 2
    // Lane bit 4; lane bit 0 becomes thread bit 3.
    state = split_along<NORM, kEqualInGroups>(8, state, lanes[1]);
    const Welford other_half = split_along<NORM, kEqualInGroups>(8, lanes[2], lanes[3]);
    // Lane bit 3; lane bit 6 becomes thread bit 2.
    state = split_along<NORM, kEqualInGroups>(4, state, other_half);
    along(2), along(1), along(8);
    combine_along<NORM, EQUAL>(4, state);   // lane bit 6
    combine_along<NORM, EQUAL>(16, state);  // lane bit 5
    return state;
  } else {  // thread, state = lane / 2, lane % 2
    static_assert(LANES == 2);
    // Lane bit 4; lane bit 0 becomes thread bit 3.
    state = split_along<NORM, kEqualInGroups>(8, state, lanes[1]);
    along(4), along(2), along(1), along(8);
    if (threadIdx.x % 16 == 0) exchange.put<EQUAL>(threadIdx.x / 16, state);
    __syncthreads();
    const Welford other = exchange.get<EQUAL>(threadIdx.x / 16 ^ 2, state);
    state = combine_ordered<NORM, EQUAL>(warp == 1, state, other);  // lane bit 6
    combine_along<NORM, EQUAL>(16, state);                          // lane bit 5
    return state;
  }
}

__device__ __forceinline__ Statistics finish(const Welford& row, const Problem& p) {
  const float variance = __fdiv_rn(row.m2, static_cast<float>(p.width));
  return {row.mean, rsqrtf(__fadd_rn(variance, p.eps))};
}

}  // namespace ditnorm
