// The gradients of query and key through their rotation and norm. As in head_kernels.cuh a row of
// one token stays in registers from its one load to its one store.
#pragma once
#include "any_qk_kernel.cuh"
#include "formulas.cuh"
#include "head_kernels.cuh"
#include "mean_square_gradient.cuh"
#include "norm_gradient.cuh"

namespace ditnorm {

template <class T>
__device__ __forceinline__ const T* gradient_of(const HeadPlace& at) {
  const HeadRows& rows = at.rows;
  return static_cast<const T*>(rows.gradient) + at.batch * rows.gradient_batch_stride + at.token * rows.gradient_token_stride;
}

// The gradient of a pair, given that of its rotation. Eager autograd rounds what comes through the
// cosines and the sines of real tables, each for itself, before it adds them.
template <class T, bool ROUND>
__device__ __forceinline__ void rotate_back_pair(float& a, float& b, float cos_a, float cos_b, float sin_a, float sin_b, bool contracted) {
  if (contracted) {
    rotate_pair<true>(a, b, cos_a, cos_b, -sin_b, -sin_a);
  } else {
    const float x = a;
    a = __fadd_rn(round_to<T, ROUND>(__fmul_rn(x, cos_a)), round_to<T, ROUND>(__fmul_rn(b, sin_b)));
    b = __fsub_rn(round_to<T, ROUND>(__fmul_rn(b, cos_b)), round_to<T, ROUND>(__fmul_rn(x, sin_a)));
  }
  a = round_to<T, ROUND>(a), b = round_to<T, ROUND>(b);
}

// The gradient of N elements, given that of their rotation. ROUND: it is rounded to T, and so takes
// the place of the other in `d`, and need not be made again.
template <class T, bool ROUND, int N, bool PER_ELEMENT>
__device__ __forceinline__ void rotate_back(float (&dn)[N], Pack<T, N>& d, bool rotated, const Angles<N, PER_ELEMENT>& angles,
                                            bool contracted) {
  to_floats(dn, d);
  if (!rotated) return;
  if constexpr (!ROUND) {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      rotate_back_pair<T, false>(dn[j], dn[j + 1], angles.cos_of(j), angles.cos_of(j + 1), angles.sin_of(j), angles.sin_of(j + 1),
                                 contracted);
    }
  } else if (contracted) {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      rotate_pair<true>(dn[j], dn[j + 1], angles.cos_of(j), angles.cos_of(j + 1), -angles.sin_of(j + 1), -angles.sin_of(j));
    }
    d = from_floats<T, N>(dn);
    to_floats(dn, d);
  } else {  // as rotate_back_pair; two roundings are one instruction, and two sums with theirs another
    float cosines[N], sines[N];
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      cosines[j] = __fmul_rn(dn[j], angles.cos_of(j)), cosines[j + 1] = __fmul_rn(dn[j + 1], angles.cos_of(j + 1));
      sines[j] = __fmul_rn(dn[j + 1], angles.sin_of(j + 1)), sines[j + 1] = __fmul_rn(dn[j], -angles.sin_of(j));
    }
    const auto by_cos = from_floats<T, N>(cosines), by_sin = from_floats<T, N>(sines);
#pragma unroll
    for (int j = 0; j < N; j += 2) put(d, j, __hadd2_rn(pair(by_cos, j), pair(by_sin, j)));
    to_floats(dn, d);
  }
}

// TWICE: as HeadProblem says; else torch's RMSNorm, in the order of its gradients.
template <class T, bool ROUND, bool TWICE, int ITEMS, int HEAD>
__global__ void __launch_bounds__(kHeadThreads, (TWICE && ITEMS == 2) ? 8 : 0) head_backward_kernel(const HeadProblem p) {
  constexpr int N = 16 / sizeof(T), kStep = kHeadThreads * N;
  wait_for_previous_kernel();
  const auto at = HeadPlace::of_block(p);
  const int width = static_cast<int>(at.rows.width);
  const int first = (static_cast<int>(blockIdx.z) * kHeadThreads * ITEMS + static_cast<int>(threadIdx.x)) * N;
  const T* const x = at.source<T>() + first;
  const T* const gradient = gradient_of<T>(at) + first;
  T* const out = at.target<T>() + first;
  constexpr auto kEach = std::make_integer_sequence<int, ITEMS>{};
  const auto inside = [&](int i) { return first + i * kStep < width; };

  Pack<T, N> v[ITEMS], d[ITEMS];
  each(kEach, [&](auto i) {
    v[i] = inside(i) ? load_row<Cache::normal, T, N>(x + i * kStep) : filled<T, N>(0.0f);
    d[i] = inside(i) ? load_row<Cache::normal, T, N>(gradient + i * kStep) : filled<T, N>(0.0f);
  });
  const int column = first % HEAD;
  const bool weighted = at.rows.weight.data != nullptr, rotated = at.rotated();
  auto weight = filled<T, N>(kNoWeight);
  Angles<N> angles;
  if (weighted) weight = load_pack<T, N>(static_cast<const T*>(at.rows.weight.data) + column);
  if (rotated) angles = load_angles<N>(at.stream.rotary, at.batch, at.token, column);
  each(kEach, [&](auto i) {
    float values[N], dn[N], weights[N];
    to_floats(values, v[i]);
    rotate_back<T, ROUND>(dn, d[i], rotated, angles, at.stream.rotary.contracted);
    to_floats(weights, weight);
    if constexpr (TWICE) {
#pragma unroll
      for (int j = 0; j < N; ++j) dn[j] = round_to<T, ROUND>(__fmul_rn(dn[j], weights[j]));
      const float mean = __fmul_rn(head_sum_of_squares<HEAD, true>(values), at.rows.mean_factor);
      const float dot = head_sum_of_products<HEAD>(dn, values);
      const MeanSquareGradient of_head = mean_square_gradient(rsqrtf(__fadd_rn(mean, p.eps)), dot, HEAD);
#pragma unroll
      for (int j = 0; j < N; ++j) values[j] = of_head.template of<T, ROUND>(dn[j], values[j]);
    } else {
      const float mean = __fdiv_rn(head_sum_of_squares<HEAD, false>(values), static_cast<float>(HEAD));
      const Statistics statistics = {0.0f, rsqrtf(__fadd_rn(mean, p.eps))};
      float dots[N / kGroup];
#pragma unroll
      for (int i = 0; i < N / kGroup; ++i) {
        Welford lane = {};
#pragma unroll
        for (int j = i * kGroup; j < (i + 1) * kGroup; ++j) add_gradient<Norm::rms>(lane, dn[j], weights[j], values[j], statistics);
        dots[i] = lane.m2;
      }
      const RowGradient of_head = row_gradient(statistics, {0.0f, head_sum_of_lanes<HEAD, N>(dots), 0.0f}, HEAD, false);
#pragma unroll
      for (int j = 0; j < N; ++j) values[j] = of_head.template of<Norm::rms>(dn[j], weights[j], values[j]);
    }
    if (inside(i)) store_row<Cache::normal>(out + i * kStep, from_floats<T, N>(values));
  });
}

// LANES, and which widths and tables it serves: as across_kernel.
template <class T, bool ROUND, class TILES, int LANES>
__global__ void __launch_bounds__(kLanes / LANES, TILES::kBlocks) across_backward_kernel(const HeadProblem p) {
  constexpr int N = LANES * kGroup;
  __shared__ Exchange of_statistics, of_sums;
  wait_for_previous_kernel();
  const auto at = HeadPlace::of_block(p);
  const int width = static_cast<int>(at.rows.width), first = static_cast<int>(threadIdx.x) * N;
  const T* const x = at.source<T>() + first;
  const T* const gradient = gradient_of<T>(at) + first;
  T* const out = at.target<T>() + first;
  constexpr auto kEach = std::make_integer_sequence<int, TILES::kCount>{};
  const auto inside = [&](int i) { return i < TILES::kFull || first + i * kTile < width; };

  Pack<T, N> v[TILES::kCount], d[TILES::kCount];
  each(kEach, [&](auto i) {
    if (!inside(i)) return;
    v[i] = load_row<Cache::normal, T, N>(x + i * kTile);
    d[i] = load_row<Cache::normal, T, N>(gradient + i * kTile);
  });
  const bool rotated = at.rotated();
  // In half precision "single" always contracts, as Rotary says: there the other code isn't there.
  const bool contracted = (!ROUND && !std::is_same_v<T, float>) || at.stream.rotary.contracted;
  Angles<N, false> angles;
  if (rotated) angles = load_angles<N, false>(at.stream.rotary, at.batch, at.token, first % static_cast<int>(p.head_dim));

  Welford lanes[LANES] = {}, sums[LANES] = {};
  each(kEach, [&](auto i) {
    if (!inside(i)) return;
    float values[N];
    to_floats(values, v[i]);
    each(std::make_integer_sequence<int, N>{}, [&](auto j) { add<Norm::rms>(lanes[j / kGroup], values[j], 0.0f); });
  });
  const Welford whole = reduce<Norm::rms, Counts::equal>(lanes, of_statistics);
  const Statistics statistics = {0.0f, rsqrtf(__fadd_rn(__fdiv_rn(whole.m2, static_cast<float>(width)), p.eps))};
  const T* const weight = static_cast<const T*>(at.rows.weight.data) + first;
  each(kEach, [&](auto i) {
    if (!inside(i)) return;
    float values[N], dn[N], weights[N];
    to_floats(values, v[i]);
    rotate_back<T, ROUND>(dn, d[i], rotated, angles, contracted);
    to_floats(weights, load_pack<T, N>(weight + i * kTile));
    each(std::make_integer_sequence<int, N>{},
         [&](auto j) { add_gradient<Norm::rms>(sums[j / kGroup], dn[j], weights[j], values[j], statistics); });
  });
  const RowGradient of_row = row_gradient(statistics, reduce<Norm::rms, Counts::equal>(sums, of_sums), width, false);
  each(kEach, [&](auto i) {
    if (!inside(i)) return;
    float values[N], dn[N], weights[N];
    to_floats(values, v[i]);
    // What isn't rounded is made anew: that is cheaper than registers for all of it.
    rotate_back<T, ROUND>(dn, d[i], rotated && !ROUND, angles, contracted);
    to_floats(weights, load_pack<T, N>(weight + i * kTile));
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = of_row.template of<Norm::rms>(dn[j], weights[j], values[j]);
    store_row<Cache::normal>(out + i * kTile, from_floats<T, N>(values));
  });
}

// For everything else: as any_qk_kernel. It is there for all tables, norms and laws, which it finds
// out at run time, and each of its loops stands in the code once: it would be the largest kernel.
template <class T>
__global__ void __launch_bounds__(kLanes, 4) any_qk_backward_kernel(const HeadProblem p) {
  wait_for_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kWarps = kLanes / 32;
  const HeadStream& stream = p.streams[blockIdx.y / kParts];
  if (blockIdx.y % kParts >= stream.count) return;
  const HeadRows& rows = stream.parts[blockIdx.y % kParts];
  const Rotary& rotary = stream.rotary;
  const int64_t span = p.across ? rows.width : p.head_dim, norms = rows.width / span;
  const int64_t work = p.batch * stream.tokens * norms;
  const auto rounded = [&](float v) { return p.eager ? round_to<T>(v) : v; };
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; unit < work;
       unit += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t row = unit / norms, start = (unit - row * norms) * span;
    const int64_t batch = row / stream.tokens, token = row - batch * stream.tokens;
    const T* const x = static_cast<const T*>(rows.data) + batch * rows.batch_stride + token * rows.token_stride + start;
    const T* const d =
        static_cast<const T*>(rows.gradient) + batch * rows.gradient_batch_stride + token * rows.gradient_token_stride + start;
    T* const out = static_cast<T*>(rows.out) + batch * rows.out_batch_stride + token * rows.width + start;
    const bool rotated = token < rotary.tokens;
    const int64_t tables = batch * rotary.batch_stride + token * rotary.token_stride;
    const float* const cos = advance<float>(rotary.cos, tables);
    const float* const sin = advance<float>(rotary.sin, tables);

    const auto v = [&](int64_t j) { return to_float(x[j]); };
    const auto weight = [&](int64_t j) { return rows.weight.data == nullptr ? kNoWeight : load_element(rows.weight, j); };
    const auto unrotated = [&](int64_t j) {
      if (!rotated) return to_float(d[j]);
      const int64_t of_head = (start + j) / p.head_dim * rotary.head_stride, column = j % p.head_dim;
      const int64_t half = p.head_dim / 2, pair = rotary.halves ? column % half : column / 2;
      const int64_t first = rotary.halves ? j - column + pair : j / 2 * 2, second = first + (rotary.halves ? half : 1);
      const int64_t of_a = of_head + (rotary.per_element ? 2 * pair : pair) * rotary.step;
      const int64_t of_b = rotary.per_element ? of_a + rotary.step : of_a;
      float a = to_float(d[first]), b = to_float(d[second]);
      // Of halves upstream casts to float32 and back: what comes through cosines and sines is rounded
      // once.
      const bool contracted = rotary.contracted && !(rotary.halves && p.eager);
      if (p.eager && !rotary.halves) {
        rotate_back_pair<T, true>(a, b, cos[of_a], cos[of_b], sin[of_a], sin[of_b], contracted);
      } else {
        rotate_back_pair<T, false>(a, b, cos[of_a], cos[of_b], sin[of_a], sin[of_b], contracted);
      }
      return rounded(j == first ? a : b);
    };

    if (p.twice) {
      const auto dn = [&](int64_t j) { return rounded(__fmul_rn(unrotated(j), weight(j))); };
      const int width = static_cast<int>(span);
      const float mean = __fmul_rn(mean_order_sum_of_squares<1>(width, v), rows.mean_factor);
      const float dot = mean_order_sum<1>(width, [&](int j) { return __fmul_rn(dn(j), v(j)); });
      const MeanSquareGradient of_head = mean_square_gradient(rsqrtf(__fadd_rn(mean, p.eps)), dot, span);
#pragma unroll 1
      for (int64_t j = lane; j < span; j += 32) {
        const float direct = rounded(of_head.direct<float, false>(dn(j))), squared = rounded(of_head.squared<float, false>(v(j)));
        out[j] = from_float<T>(__fadd_rn(direct, squared));
      }
    } else {
      const float mean = __fdiv_rn(lanes_sum_of_squares<1>(span, v), static_cast<float>(span));
      const Statistics statistics = {0.0f, rsqrtf(__fadd_rn(mean, p.eps))};
      const float dot = lanes_sum<1>(span, [&](float sum, int64_t j) {
        Welford lane_sums = {0.0f, sum, 0.0f};
        add_gradient(lane_sums, unrotated(j), weight(j), v(j), statistics);
        return lane_sums.m2;
      });
      const RowGradient of_row = row_gradient(statistics, {0.0f, dot, 0.0f}, span, false);
#pragma unroll 1
      for (int64_t j = lane; j < span; j += 32) out[j] = from_float<T>(of_row.of(unrotated(j), weight(j), v(j)));
    }
  }
}

}  // namespace ditnorm
