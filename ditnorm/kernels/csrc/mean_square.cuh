// Sums of squares in the order of ATen's `x.float().pow(2).mean(-1)` (Reduce.cuh), which diffusers'
// RMSNorm calls for the heads of query and key: one warp a row.
//
//   rows of 128 and more, a multiple of 4: lane l takes the groups of 4 consecutive elements
//   l, l + 32, ..., with a sum for each place in the group;
//   shorter rows: it takes the elements l, l + L, l + 2 L, ..., L being the largest power of 2 up
//   to the width, at most 32;
//   each lane adds its sums from left to right; lane l combines with l + L / 2, then l + L / 4,
//   ... l + 1.
#pragma once
#include "numerics.cuh"

namespace ditnorm {

constexpr int kGrouped = 128;  // rows from this width on are taken in groups

// The squares of half-precision values are exact in float32, so that fusing changes no bit of
// theirs; of float32 values each is rounded.
__device__ __forceinline__ float add_square(float sum, float v) { return __fadd_rn(sum, __fmul_rn(v, v)); }

__device__ __forceinline__ float add_along(int thread_bit, float sum) {
  return __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, thread_bit));
}

// Adds the values of the thread whose number differs in one bit. Of the N sums a thread keeps the
// half that the bit of its number says, its partner the other: from then on that bit says what the
// upper half's bit of a sum's number said.
template <int N>
__device__ __forceinline__ void halve_along(int thread_bit, float* sums) {
  const bool upper = threadIdx.x & thread_bit;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float own = upper ? sums[i + N / 2] : sums[i], others = upper ? sums[i] : sums[i + N / 2];
    sums[i] = __fadd_rn(own, __shfl_xor_sync(0xffffffffu, others, thread_bit));
  }
}

// The groups' sums over their places.
__device__ __forceinline__ float sum_of_group(const float* sums) {
  return __fadd_rn(__fadd_rn(__fadd_rn(sums[0], sums[1]), sums[2]), sums[3]);
}

// A group's sum of squares as a lane of ATen's RMSNorm takes it (statistics.cuh).
__device__ __forceinline__ float lane_sum_of_squares(const float* v) {
  return __fmaf_rn(v[3], v[3], __fmaf_rn(v[2], v[2], __fmaf_rn(v[1], v[1], __fmul_rn(v[0], v[0]))));
}

// A sum over a head in the order of ATen's RMSNorm, of whose lanes HEAD / 4 have a group of 4
// elements each and the others nothing: `sums` has those of this thread's lanes. See below.
template <int HEAD, int N>
__device__ __forceinline__ float head_sum_of_lanes(float (&sums)[N / 4]) {
  static_assert(HEAD <= 128 || N == 8);
  constexpr int kLanesBit = (HEAD < 128 ? HEAD : 128) / N / 2;  // above it: another of ATen's warps
  if constexpr (N == 8) {                                       // a thread is the lanes 2 t and 2 t + 1
    halve_along<2>(kLanesBit, sums);
  } else {
    sums[0] = add_along(kLanesBit, sums[0]);
  }
#pragma unroll
  for (int bit = kLanesBit / 2; bit > 0; bit /= 2) sums[0] = add_along(bit, sums[0]);
  if constexpr (N == 8) sums[0] = add_along(kLanesBit, sums[0]);
  return HEAD > 128 ? add_along(16, sums[0]) : sums[0];
}

// The products of two heads of HEAD elements by their neighbouring threads of N elements, all of
// which get the result, in the order of this file. The order in which thread bits are combined is
// that of the lanes' bits, and which stands where follows from which elements a thread has.
template <int HEAD, int N>
__device__ __forceinline__ float head_sum_of_products(const float (&u)[N], const float (&v)[N]) {
  float sums[N];
#pragma unroll
  for (int j = 0; j < N; ++j) sums[j] = __fmul_rn(u[j], v[j]);
  const auto along = [&](int thread_bit) { sums[0] = add_along(thread_bit, sums[0]); };
  if constexpr (HEAD == 64 && N == 8) {  // thread bits 2 (a lane's second element), 1, 0; places
    halve_along<8>(4, sums), halve_along<4>(2, sums), halve_along<2>(1, sums);
    along(4), along(2), along(1);
  } else if constexpr (HEAD == 64) {
    halve_along<4>(8, sums), halve_along<2>(4, sums);
    along(2), along(1), along(8), along(4);
  } else if constexpr (HEAD == 128 && N == 8) {  // a thread is the lanes 2 t and 2 t + 1
    sums[0] = sum_of_group(sums), sums[1] = sum_of_group(sums + 4);
    halve_along<2>(8, sums);
    along(4), along(2), along(1), along(8);
  } else if constexpr (HEAD == 128) {
    sums[0] = sum_of_group(sums);
    along(16), along(8), along(4), along(2), along(1);
  } else {
    static_assert(HEAD == 256 && N == 8);  // thread bit 4 (a lane's second group), then as with 128
    halve_along<8>(16, sums);
    sums[0] = sum_of_group(sums);
    along(8), along(4), along(2), along(1), along(16);
  }
  return sums[0];
}

// The squares of a head. MEAN: in the order of this file; else in that of ATen's RMSNorm.
template <int HEAD, bool MEAN, int N>
__device__ __forceinline__ float head_sum_of_squares(const float (&v)[N]) {
  if constexpr (MEAN) {
    return head_sum_of_products<HEAD>(v, v);
  } else {
    float sums[N / 4];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) sums[i] = lane_sum_of_squares(v + i * 4);
    return head_sum_of_lanes<HEAD, N>(sums);
  }
}

// Which elements a lane takes, and how many lanes there are.
struct MeanOrder {
  int width, lanes;
  bool grouped;

  __device__ __forceinline__ explicit MeanOrder(int width) : MeanOrder(width, 32) {
    while (!grouped && lanes > width) lanes /= 2;
  }
  __device__ __forceinline__ MeanOrder(int width, int lanes) : width(width), lanes(lanes), grouped(width >= kGrouped && width % 4 == 0) {}

  // UNROLL: how many terms stand in the code; 1 where a term is long and speed matters little.
  template <int UNROLL, class F>
  __device__ __forceinline__ float of_lane(int lane, const F& term) const {
    float sums[4] = {};
    if (!grouped && lane >= lanes) return 0.0f;
    const int step = grouped ? 1 : lanes;
    for (int first = grouped ? lane * 4 : lane; first < width; first += 4 * lanes) {
#pragma unroll(UNROLL)
      for (int k = 0; k < 4; ++k) {  // each sum moves on to the place of the one before it
        const float sum = first + k * step < width ? __fadd_rn(sums[0], term(first + k * step)) : sums[0];
        sums[0] = sums[1], sums[1] = sums[2], sums[2] = sums[3], sums[3] = sum;
      }
    }
    return sum_of_group(sums);
  }
};

// Of `width` terms term(0), term(1), ... by a warp, all of whose threads get the result.
template <int UNROLL = 4, class F>
__device__ __forceinline__ float mean_order_sum(int width, const F& term) {
  const MeanOrder order(width);
  float sum = order.of_lane<UNROLL>(static_cast<int>(threadIdx.x) % 32, term);
  for (int bit = 16; bit > 0; bit /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, sum, bit);
    if (bit < order.lanes) sum = __fadd_rn(sum, other);
  }
  return __shfl_sync(0xffffffffu, sum, 0);
}

// The squares of a row of `width` elements v(0), v(1), ...
template <int UNROLL = 4, class V>
__device__ __forceinline__ float mean_order_sum_of_squares(int width, const V& v) {
  return mean_order_sum<UNROLL>(width, [&](int j) {
    const float value = v(j);
    return __fmul_rn(value, value);
  });
}

// The same by a block, where ATen has `lanes` lanes for a row, at most kMostMeanLanes: of few rows.
constexpr int kMostMeanLanes = 512;

template <int UNROLL = 4, class F>
__device__ __forceinline__ float mean_order_sum(int width, const F& term, int lanes, float (&sums)[kMostMeanLanes]) {
  const MeanOrder order(width, lanes);
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // what stood in sums has been read
  for (int lane = thread; lane < lanes; lane += threads) sums[lane] = order.of_lane<UNROLL>(lane, term);
  for (int half = lanes / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int lane = thread; lane < half; lane += threads) sums[lane] = __fadd_rn(sums[lane], sums[lane + half]);
  }
  __syncthreads();
  return sums[0];
}

template <int UNROLL = 4, class V>
__device__ __forceinline__ float mean_order_sum_of_squares(int width, const V& v, int lanes, float (&sums)[kMostMeanLanes]) {
  const auto square = [&](int j) {
    const float value = v(j);
    return __fmul_rn(value, value);
  };
  return mean_order_sum<UNROLL>(width, square, lanes, sums);
}

// The squares of N elements of a row in shared memory (of which load_pack doesn't read), added to
// sums.
template <class T, int N>
__device__ __forceinline__ void add_squares(float (&sums)[N], const T* elements) {
  float v[N];
  to_floats(v, *reinterpret_cast<const Pack<T, N>*>(elements));
#pragma unroll
  for (int j = 0; j < N; ++j) sums[j] = add_square(sums[j], v[j]);
}

// The same for a row in shared memory by one thread: widths that are multiples of 8, from 32 up to
// kGrouped.
template <class T>
__device__ __forceinline__ float own_sum_of_squares(int width, const T* row) {
  constexpr int N = 8;
  const auto of_lanes = [&](float (&sums)[N], int first) {  // N neighbouring ones
#pragma unroll
    for (int j = 0; j < N; ++j) sums[j] = 0.0f;
#pragma unroll 1
    for (int i = first; i < width; i += 32) add_squares(sums, row + i);
  };
  const auto halve = [](float* sums, const float* others, int count) {
#pragma unroll
    for (int j = 0; j < count; ++j) sums[j] = __fadd_rn(sums[j], others[j]);
  };
  float low[N], high[N], more[N];
  of_lanes(low, 0), of_lanes(more, 16), halve(low, more, N);
  of_lanes(high, 8), of_lanes(more, 24), halve(high, more, N);
  halve(low, high, N), halve(low, low + 4, 4), halve(low, low + 2, 2);
  return __fadd_rn(low[0], low[1]);
}

constexpr int kTeam = 4;

// The same by kTeam neighbouring threads, each being 8 neighbouring lanes: multiples of 8 from
// kGrouped on.
template <class T>
__device__ __forceinline__ float team_sum_of_squares(int width, const T* row) {
  constexpr int kOwn = 32 / kTeam;
  const int lane = static_cast<int>(threadIdx.x) % kTeam * kOwn;
  float sums[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; i += 2) {
    float places[kOwn] = {};  // of two lanes
#pragma unroll 1
    for (int first = (lane + i) * 4; first < width; first += 32 * 4) add_squares(places, row + first);
    sums[i] = sum_of_group(places), sums[i + 1] = sum_of_group(places + 4);
  }
  halve_along<8>(2, sums), halve_along<4>(1, sums), halve_along<2>(2, sums);
  return add_along(2, add_along(1, sums[0]));
}

}  // namespace ditnorm
