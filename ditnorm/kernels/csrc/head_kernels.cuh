// The fast kernels of QK normalisation and rotary embedding. They serve what models use: one dtype
// T of rows and weights, everything aligned. A row of one token (of query, key or value) stays in
// registers from its one load to its one store. Three of them differ in the statistics:
//
//   head_kernel       norm per head of 64, 128 or 256: a head is a part of a warp, nothing leaves it
//   any_head_kernel   norm per head of any multiple of 8 from 32 on, diffusers' RMSNorm: statistics
//                     through shared memory
//   across_kernel     norm across all heads, torch's RMSNorm: the block's reduction of
//                     statistics.cuh
#pragma once
#include "lanes.h"
#include "launch.h"
#include "mean_square.cuh"
#include "rope.cuh"
#include "statistics.cuh"
#include "unroll.cuh"

namespace ditnorm {

// Which row a block works on: blockIdx.x counts tokens of the first stream and then of the second,
// query, key and value of a token in a row, since they share its angles.
struct HeadPlace {
  const HeadStream& stream;
  const HeadRows& rows;
  int64_t batch, token;

  __device__ __forceinline__ static HeadPlace of_block(const HeadProblem& p) {
    const auto of_first = static_cast<unsigned>(p.streams[0].tokens * p.streams[0].count);
    const bool second = blockIdx.x >= of_first;
    const HeadStream& stream = p.streams[second];
    const unsigned at = second ? blockIdx.x - of_first : blockIdx.x;
    const auto count = static_cast<unsigned>(stream.count);
    const unsigned token = count == 1 ? at : count == 2 ? at / 2 : at / 3;
    return {stream, stream.parts[at - token * count], blockIdx.y, token};
  }
  template <class T>
  __device__ __forceinline__ const T* source() const {
    return static_cast<const T*>(rows.data) + batch * rows.batch_stride + token * rows.token_stride;
  }
  template <class T>
  __device__ __forceinline__ T* target() const {
    return static_cast<T*>(rows.out) + batch * rows.out_batch_stride + token * rows.width;
  }
  __device__ __forceinline__ bool rotated() const { return token < stream.rotary.tokens && !rows.copied; }
};

// x * rstd * weight with the roundings of the law. TWICE: see HeadProblem.
template <class T, bool ROUND, bool TWICE, int N>
__device__ __forceinline__ void normalize_row(float (&n)[N], float rstd, bool weighted, const Pack<T, N>& weight) {
#pragma unroll
  for (int j = 0; j < N; ++j) n[j] = __fmul_rn(rstd, n[j]);
  if constexpr (ROUND && TWICE) {
    auto rounded = from_floats<T, N>(n);
    if (weighted) {
#pragma unroll
      for (int j = 0; j < N; j += 2) put(rounded, j, __hmul2_rn(pair(rounded, j), pair(weight, j)));
    }
    to_floats(n, rounded);
  } else {
    if (weighted) {
      float w[N];
      to_floats(w, weight);
#pragma unroll
      for (int j = 0; j < N; ++j) n[j] = __fmul_rn(w[j], n[j]);
    }
    if constexpr (ROUND) to_floats(n, from_floats<T, N>(n));
  }
}

constexpr int kHeadThreads = 128;

template <class T, bool ROUND, bool TWICE, int ITEMS, int HEAD>
__global__ void __launch_bounds__(kHeadThreads) head_kernel(const HeadProblem p) {
  constexpr int N = 16 / sizeof(T), kStep = kHeadThreads * N;
  wait_for_previous_kernel();
  const auto at = HeadPlace::of_block(p);
  const int width = static_cast<int>(at.rows.width);
  const int first = (static_cast<int>(blockIdx.z) * kHeadThreads * ITEMS + static_cast<int>(threadIdx.x)) * N;
  const T* const x = at.source<T>() + first;
  T* const out = at.target<T>() + first;
  constexpr auto kEach = std::make_integer_sequence<int, ITEMS>{};
  const auto inside = [&](int i) { return first + i * kStep < width; };

  Pack<T, N> v[ITEMS];
  each(kEach, [&](auto i) { v[i] = inside(i) ? load_row<Cache::normal, T, N>(x + i * kStep) : filled<T, N>(0.0f); });
  if (!at.rows.copied) {
    const int column = first % HEAD;
    const bool weighted = at.rows.weight.data != nullptr, rotated = at.rotated();
    Pack<T, N> weight;
    Angles<N> angles;
    if (weighted) weight = load_pack<T, N>(static_cast<const T*>(at.rows.weight.data) + column);
    if (rotated) angles = load_angles<N>(at.stream.rotary, at.batch, at.token, column);
    each(kEach, [&](auto i) {
      float n[N];
      to_floats(n, v[i]);
      const float sum = head_sum_of_squares<HEAD, TWICE>(n);
      const float mean = __fmul_rn(sum, at.rows.mean_factor);  // a power of two: exact, as division is
      normalize_row<T, ROUND, TWICE>(n, rsqrtf(__fadd_rn(mean, p.eps)), weighted, weight);
      if (rotated) rotate(n, angles, at.stream.rotary.contracted);
      v[i] = from_floats<T, N>(n);
    });
  }
  each(kEach, [&](auto i) {
    if (inside(i)) store_row<Cache::normal>(out + i * kStep, v[i]);
  });
}

constexpr int kLeastHead = 32;

// A thread has the same columns of a head in each of its accesses: the threads are as many as some
// whole heads take, a few more idle.
template <class T, bool ROUND, int ITEMS>
__global__ void __launch_bounds__(kHeadThreads) any_head_kernel(const HeadProblem p) {
  constexpr int N = 16 / sizeof(T), kHeads = kHeadThreads * N * ITEMS / kLeastHead;
  __shared__ uint4 row[kHeadThreads * ITEMS + kHeads];
  __shared__ float rstds[kHeads];
  wait_for_previous_kernel();
  const auto at = HeadPlace::of_block(p);
  const int thread = static_cast<int>(threadIdx.x), head_dim = static_cast<int>(p.head_dim);
  const int of_head = head_dim / N, heads = static_cast<int>(blockDim.x) / of_head, step = heads * head_dim;  // of_head: threads
  const int start = static_cast<int>(blockIdx.z) * step * ITEMS, width = static_cast<int>(at.rows.width) - start;
  const int first = thread * N, head = thread / of_head, column = first - head * head_dim;
  const T* const x = at.source<T>() + start + first;
  T* const out = at.target<T>() + start + first;
  constexpr auto kEach = std::make_integer_sequence<int, ITEMS>{};
  const auto inside = [&](int i) { return head < heads && first + i * step < width; };

  Pack<T, N> v[ITEMS];
  each(kEach, [&](auto i) {
    if (inside(i)) v[i] = load_row<Cache::normal, T, N>(x + i * step);
  });
  if (at.rows.copied) {
    return each(kEach, [&](auto i) {
      if (inside(i)) store_row<Cache::normal>(out + i * step, v[i]);
    });
  }
  const int stride = of_head | 1;  // of the heads in shared memory: an odd number of accesses, so that they don't share banks
  each(kEach, [&](auto i) {
    if (inside(i)) *reinterpret_cast<Pack<T, N>*>(row + (head + i * heads) * stride + thread - head * of_head) = v[i];
  });
  __syncthreads();
  const int rest = width / head_dim, all = rest < heads * ITEMS ? rest : heads * ITEMS;
  const auto elements = [&](int of) { return reinterpret_cast<const T*>(row + of * stride); };
  const auto rstd = [&](float sum) { return rsqrtf(__fadd_rn(__fmul_rn(sum, at.rows.mean_factor), p.eps)); };
  if (head_dim < kGrouped) {
    for (int of = thread; of < all; of += static_cast<int>(blockDim.x)) rstds[of] = rstd(own_sum_of_squares(head_dim, elements(of)));
  } else {
    for (int some = 0; some < all; some += static_cast<int>(blockDim.x) / kTeam) {
      const int of = some + thread / kTeam;
      const float sum = team_sum_of_squares(head_dim, elements(of < all ? of : 0));
      if (of < all && thread % kTeam == 0) rstds[of] = rstd(sum);
    }
  }
  const bool weighted = at.rows.weight.data != nullptr, rotated = at.rotated();
  Pack<T, N> weight;
  Angles<N> angles;
  if (weighted) weight = load_pack<T, N>(static_cast<const T*>(at.rows.weight.data) + column);
  if (rotated) angles = load_angles<N>(at.stream.rotary, at.batch, at.token, column);
  __syncthreads();
  each(kEach, [&](auto i) {
    if (!inside(i)) return;
    float n[N];
    to_floats(n, v[i]);
    normalize_row<T, ROUND, true>(n, rstds[head + i * heads], weighted, weight);
    if (rotated) rotate(n, angles, at.stream.rotary.contracted);
    store_row<Cache::normal>(out + i * step, from_floats<T, N>(n));
  });
}

// N elements of a row, rotated against those of the same head's other half, which another thread of
// the warp has, `half` elements from here. All threads of the warp call it.
template <int N>
__device__ __forceinline__ void rotate_halves(float (&n)[N], const Pack<float, N>& cos, const Pack<float, N>& sin, int column, int half,
                                              bool contracted) {
  const bool lower = column < half;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float other = __shfl_xor_sync(0xffffffffu, n[j], half / N);
    n[j] = rotate_half(n[j], other, cos.v[j], lower ? -sin.v[j] : sin.v[j], contracted);
  }
}

// How many tiles ahead of its use a part of a table is asked for.
constexpr int kTablesAhead = 2;

// LANES: how many of ATen's lanes one thread stands in for. head_dim divides kTile, so a thread's
// columns have the same angles in every tile if the heads share them.
// HALVES: as Rotary says, with tables for each head; else neither.
template <class T, bool ROUND, class TILES, int LANES, bool HALVES = false>
__global__ void __launch_bounds__(kLanes / LANES) across_kernel(const HeadProblem p) {
  constexpr int N = LANES * kGroup;
  __shared__ Exchange exchange;
  wait_for_previous_kernel();
  const auto at = HeadPlace::of_block(p);
  const int width = static_cast<int>(at.rows.width), first = static_cast<int>(threadIdx.x) * N;
  const T* const x = at.source<T>() + first;
  T* const out = at.target<T>() + first;
  constexpr auto kEach = std::make_integer_sequence<int, TILES::kCount>{};
  const auto inside = [&](int i) { return i < TILES::kFull || first + i * kTile < width; };

  Pack<T, N> v[TILES::kCount];
  each(kEach, [&](auto i) {
    if (inside(i)) v[i] = load_row<Cache::normal, T, N>(x + i * kTile);
  });
  if (unlikely(at.rows.copied)) {
    return each(kEach, [&](auto i) {
      if (inside(i)) store_row<Cache::normal>(out + i * kTile, v[i]);
    });
  }
  const bool rotated = at.rotated();
  const Rotary& rotary = at.stream.rotary;
  const int head_dim = static_cast<int>(p.head_dim), column = first % head_dim, half = head_dim / 2;
  [[maybe_unused]] Angles<N, false> angles;
  [[maybe_unused]] Pack<float, N> cos[HALVES ? TILES::kCount : 1], sin[HALVES ? TILES::kCount : 1];
  [[maybe_unused]] const int64_t table =
      at.batch * rotary.batch_stride + at.token * rotary.token_stride + first / head_dim * rotary.head_stride + column % half;
  [[maybe_unused]] const int64_t of_tile = kTile / head_dim * rotary.head_stride;
  [[maybe_unused]] const auto load_tables = [&](auto i) {
    if constexpr (HALVES && i < TILES::kCount) {
      if (!inside(i) || !rotated) return;
      cos[i] = load_pack<float, N>(rotary.cos + table + i * of_tile);
      sin[i] = load_pack<float, N>(rotary.sin + table + i * of_tile);
    }
  };
  if constexpr (HALVES) {
    each(std::make_integer_sequence<int, kTablesAhead>{}, load_tables);
  } else {
    if (rotated) angles = load_angles<N, false>(rotary, at.batch, at.token, column);
  }

  Welford lanes[LANES] = {};
  each(kEach, [&](auto i) {
    if (!inside(i)) return;
    float values[N];
    to_floats(values, v[i]);
    each(std::make_integer_sequence<int, N>{}, [&](auto j) { add<Norm::rms>(lanes[j / kGroup], values[j], 0.0f); });
  });
  const Welford whole = reduce<Norm::rms, Counts::equal>(lanes, exchange);
  const float rstd = rsqrtf(__fadd_rn(__fdiv_rn(whole.m2, static_cast<float>(width)), p.eps));
  each(kEach, [&](auto i) {
    if constexpr (HALVES) {
      load_tables(Constant<i + kTablesAhead>{});
      float n[N] = {};
      if (inside(i)) {
        to_floats(n, v[i]);
        const auto weight = load_pack<T, N>(static_cast<const T*>(at.rows.weight.data) + first + i * kTile);
        normalize_row<T, ROUND, false>(n, rstd, true, weight);
      }
      if (rotated) rotate_halves(n, cos[i], sin[i], column, half, rotary.contracted);
      if (inside(i)) store_row<Cache::normal>(out + i * kTile, from_floats<T, N>(n));
    } else {
      if (!inside(i)) return;
      float n[N];
      to_floats(n, v[i]);
      const auto weight = load_pack<T, N>(static_cast<const T*>(at.rows.weight.data) + first + i * kTile);
      normalize_row<T, ROUND, false>(n, rstd, true, weight);
      if (rotated) rotate(n, angles, rotary.contracted);
      store_row<Cache::normal>(out + i * kTile, from_floats<T, N>(n));
    }
  });
}

}  // namespace ditnorm
