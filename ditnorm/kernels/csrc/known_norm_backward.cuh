// The gradients of the rows of a norm site, as in norm_backward.cuh, where the compiler knows what
// there is: no weight, tables or none, another gradient to add or none. None of it stands behind a
// branch, so that loads are asked for long before they are needed. What isn't there isn't computed.
#pragma once
#include "norm_backward.h"
#include "norm_gradient.cuh"
#include "row_kernel.cuh"

namespace ditnorm {

// From here on the compiler knows nothing of what is in `pack`, and so keeps nothing that it has
// made of it.
template <class T, int N>
__device__ __forceinline__ void forget(Pack<T, N>& pack) {
#ifdef __CUDA_ARCH__
#pragma unroll
  for (int k = 0; k < Pack<T, N>::kBytes / 4; ++k) asm volatile("" : "+r"(reinterpret_cast<uint32_t*>(&pack)[k]));
#endif
}

// T, ROUND: as in row_kernel.cuh; modulations are in T. RESIDUAL: another gradient may be added to
// the row's, and a branch may want one. TABLES: all modulations have a table.
template <class T, bool ROUND, bool RESIDUAL, bool TABLES, class TILES, class SHAPE>
__global__ void __launch_bounds__(SHAPE::kThreads, TILES::kBlocks) known_norm_backward_kernel(const SiteBackward b) {
  using R = Row<T, T, Extras::none, false, ROUND, TILES, SHAPE>;
  using Place = typename R::Place;
  constexpr int N = Place::N, kStep = Place::kStep, kAccesses = Place::kAccesses, kAhead = R::kAhead, kSlots = R::kSlots;
  // With a third row to hold, v - mean is made again where it is needed again, and a dn that is
  // rounded stays packed.
  constexpr bool kUnpacks = RESIDUAL, kPacked = RESIDUAL && ROUND;
  static_assert(TILES::kExact && !(ROUND && TABLES));
  constexpr auto kFirst = std::make_integer_sequence<int, kAhead>{};
  __shared__ Exchange of_statistics, of_sums;
  const Problem& p = b.site;
  const Place place(p);
  wait_for_previous_kernel();
  const Token at(p, blockIdx.y, blockIdx.x);

  typename R::Elements v, dy;
  Pack<T, N> carry[RESIDUAL ? kAccesses : 1];
  const T* const row = static_cast<const T*>(p.x.data) + at.offset(p.x) + place.first;
  const T* const of_y = static_cast<const T*>(b.dy.data) + at.offset(b.dy) + place.first;
  place.each([&](auto i) {
    v[i] = load_row<Cache::streaming, T, N>(row + i * kStep);
    dy[i] = load_row<Cache::streaming, T, N>(of_y + i * kStep);
  });
  if constexpr (RESIDUAL) {
    const T* const of_row = advance<T>(b.dr.data, at.offset(b.dr) + place.first);
    place.each([&](auto i) { carry[i] = filled<T, N>(-0.0f); });  // which changes no sum
    if (b.dr.data != nullptr) place.each([&](auto i) { carry[i] = load_row<Cache::streaming, T, N>(of_row + i * kStep); });
  }

  const bool scaled = p.scale.data != nullptr, branched = RESIDUAL && b.d_branch != nullptr, gated = RESIDUAL && p.gate.data != nullptr;
  const ModulationRow<T, N> scale(p.scale, at, p.index, place.first), gate(p.gate, at, p.index, place.first);
  Pack<T, N> scales[kSlots], gates[RESIDUAL ? kSlots : 1];
  Pack<float, N> scale_tables[TABLES ? kSlots : 1], gate_tables[TABLES && RESIDUAL ? kSlots : 1];
  const auto ask = [&](const ModulationRow<T, N>& m, bool given, auto& slots, auto& tables, float missing, int i) {
    if (i >= kAccesses) return;
    slots[i % kSlots] = filled<T, N>(missing);
    if (given) slots[i % kSlots] = m.load(i * kStep);
    if constexpr (TABLES) tables[i % kSlots] = m.load_table(i * kStep);
  };
  const auto ask_scale = [&](int i) { ask(scale, scaled, scales, scale_tables, kNoScale, i); };
  const auto ask_gate = [&](int i) {
    if constexpr (RESIDUAL) ask(gate, gated, gates, gate_tables, kNoGate, i);
  };
  // A modulation with its table.
  const auto get = [&](auto& out, const auto& slots, const auto& tables, int i) {
    if constexpr (TABLES) {
      add_table(out, slots[i % kSlots], tables[i % kSlots]);
    } else {
      to_floats(out, slots[i % kSlots]);
    }
  };

  if constexpr (SHAPE::kAhead == kWithRow) each(kFirst, [&](auto i) { ask_scale(i); });
  const auto ask_ahead = [&] {
    if constexpr (SHAPE::kAhead != kWithRow) each(kFirst, [&](auto i) { ask_scale(i); });
  };
  const Statistics statistics = R(p, place, at).statistics_asking(v, ask_ahead, of_statistics);

  float dn[kPacked ? 1 : kAccesses][N], delta[kUnpacks ? 1 : kAccesses][N];
  const auto make_delta = [&](float (&delta)[N], int i) {
    if constexpr (kUnpacks) forget(v[i]);
    to_floats(delta, v[i]);
#pragma unroll
    for (int j = 0; j < N; ++j) delta[j] = __fsub_rn(delta[j], statistics.mean);
  };
  const auto make_dn = [&](float (&dn)[N], int i) {
    if constexpr (ROUND) {  // in the place of dy
      const auto one = twice(from_float<T>(1.0f));
#pragma unroll
      for (int j = 0; j < N; j += 2) put(dy[i], j, __hmul2_rn(pair(dy[i], j), __hadd2_rn(one, pair(scales[i % kSlots], j))));
      to_floats(dn, dy[i]);
    } else {
      float factors[N];
      get(factors, scales, scale_tables, i);
      to_floats(dn, dy[i]);
#pragma unroll
      for (int j = 0; j < N; ++j) dn[j] = __fmul_rn(dn[j], __fadd_rn(1.0f, factors[j]));
    }
  };
  Welford sums[SHAPE::kLanesPerThread] = {};
  place.each([&](auto i) {
    constexpr int n = kPacked ? 0 : i, d = kUnpacks ? 0 : i;
    ask_scale(i + kAhead);
    make_dn(dn[n], i);
    if constexpr (kPacked) forget(dy[i]);
    make_delta(delta[d], i);
    each(std::make_integer_sequence<int, N>{}, [&](auto j) {
      Welford& lane = sums[i % Place::kPerTile * (N / kGroup) + j / kGroup];
      add_unweighted_gradient(lane, dn[n][j], delta[d][j], statistics.rstd);
    });
  });
  if constexpr (RESIDUAL) each(kFirst, [&](auto i) { ask_gate(i); });
  Welford of_row = reduce<kTwoSums, Counts::equal>(sums, of_sums);
  if (p.norm != Norm::layer) of_row.mean = 0.0f;
  const RowGradient gradient = row_gradient(statistics, of_row, p.width, true);

  const int64_t target = (at.batch * p.tokens + at.token) * p.width + place.first;
  T* const d_row = static_cast<T*>(b.d_row) + target;
  T* const d_branch = static_cast<T*>(b.d_branch) + (branched ? target : 0);
  const auto store = [&](auto eager) {
    place.each([&](auto i) {
      constexpr int n = kPacked ? 0 : i, d = kUnpacks ? 0 : i;
      ask_gate(i + kAhead);
      if constexpr (kUnpacks) make_delta(delta[d], i);
      if constexpr (kPacked) to_floats(dn[n], dy[i]);
      float values[N];
#pragma unroll
      for (int j = 0; j < N; ++j) values[j] = gradient.of_unweighted(dn[n][j], delta[d][j]);
      if constexpr (RESIDUAL) {
        float others[N];
        to_floats(others, carry[i]);
        if constexpr (eager) to_floats(values, from_floats<T, N>(values));
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = __fadd_rn(others[j], values[j]);
      }
      const auto rounded = from_floats<T, N>(values);
      store_row<Cache::normal>(d_row + i * kStep, rounded);
      if constexpr (RESIDUAL) {
        Pack<T, N> of_branch;
        if constexpr (ROUND) {
#pragma unroll
          for (int j = 0; j < N; j += 2) put(of_branch, j, __hmul2_rn(pair(rounded, j), pair(gates[i % kSlots], j)));
        } else {
          float factors[N];
          get(factors, gates, gate_tables, i);
          if constexpr (eager) to_floats(values, rounded);
#pragma unroll
          for (int j = 0; j < N; ++j) values[j] = __fmul_rn(values[j], factors[j]);
          of_branch = from_floats<T, N>(values);
        }
        if (branched) store_row<Cache::normal>(d_branch + i * kStep, of_branch);
      }
    });
  };
  // Without tables "eager" is what rounds everything; without a residual its roundings are those of
  // the results.
  constexpr bool kOneLaw = !(RESIDUAL && TABLES);
  if constexpr (kOneLaw) {
    store(Constant<ROUND>{});
  } else if (b.eager) {
    store(Constant<true>{});
  } else {
    store(Constant<false>{});
  }
}

}  // namespace ditnorm
