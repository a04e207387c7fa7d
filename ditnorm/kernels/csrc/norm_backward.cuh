// The gradients of the rows of a norm site: of norm_scale_shift and
// scale_residual_norm_scale_shift. As in row_kernel.cuh a row stays in registers from its one load
// to its one store; statistics are computed again, which costs no memory traffic.
#pragma once
#include <iterator>

#include "dispatch.cuh"
#include "gate_gradient.cuh"
#include "known_norm_backward.cuh"
#include "norm_backward.h"
#include "norm_gradient.cuh"
#include "row_kernel.cuh"

namespace ditnorm {

// T, M, ROUND: as in row_kernel.cuh. Tables, an affine and a gate are found at run time.
template <class T, class M, bool ROUND, class TILES, class SHAPE>
__global__ void __launch_bounds__(SHAPE::kThreads, TILES::kBlocks) norm_backward_kernel(const SiteBackward b) {
  using R = Row<T, M, Extras::none, false, ROUND, TILES, SHAPE>;
  using Place = typename R::Place;
  constexpr int N = Place::N, kStep = Place::kStep;
  __shared__ Exchange of_statistics, of_sums;
  const Problem& p = b.site;
  const Place place(p);
  wait_for_previous_kernel();
  const Token at(p, blockIdx.y, blockIdx.x);
  const bool carried = b.dr.data != nullptr, scaled = p.scale.data != nullptr, affine = p.weight.data != nullptr;

  typename R::Elements v, carry;
  float dn[Place::kAccesses][N];
  {
    typename R::Elements dy;
    const T* const row = static_cast<const T*>(p.x.data) + at.offset(p.x) + place.first;
    const T* const of_y = static_cast<const T*>(b.dy.data) + at.offset(b.dy) + place.first;
    const T* const of_row = advance<T>(b.dr.data, at.offset(b.dr) + place.first);
    place.each([&](auto i) {
      v[i] = load_row<Cache::streaming, T, N>(row + i * kStep);
      dy[i] = load_row<Cache::streaming, T, N>(of_y + i * kStep);
    });
    if (carried) place.each([&](auto i) { carry[i] = load_row<Cache::streaming, T, N>(of_row + i * kStep); });
    const ModulationRow<M, N> scale(p.scale, at, p.index, place.first);
    const bool tabled = p.scale.table.data != nullptr;
    place.each([&](auto i) {
      if (!scaled) return to_floats(dn[i], dy[i]);
      const auto loaded = scale.load(i * kStep);
      if constexpr (ROUND) {
        Pack<T, N> rounded;
        const auto one = twice(from_float<T>(1.0f));
#pragma unroll
        for (int j = 0; j < N; j += 2) put(rounded, j, __hmul2_rn(pair(dy[i], j), __hadd2_rn(one, pair(loaded, j))));
        to_floats(dn[i], rounded);
      } else {
        float scales[N];
        to_floats(scales, loaded);
        if (unlikely(tabled)) add_table(scales, loaded, scale.load_table(i * kStep));
        to_floats(dn[i], dy[i]);
#pragma unroll
        for (int j = 0; j < N; ++j) dn[i][j] = __fmul_rn(dn[i][j], __fadd_rn(1.0f, scales[j]));
      }
    });
  }

  const R norm(p, place, at);
  typename R::Gate::Slots no_gate;
  typename R::Gate::TableSlots no_gate_table;
  typename R::ScaleShift::Slots no_scale, no_shift;
  typename R::ScaleShift::TableSlots no_scale_table, no_shift_table;
  const typename R::Modulations unread{{{p.gate, at, p.index, 0}, no_gate, no_gate_table},
                                       {{p.scale, at, p.index, 0}, no_scale, no_scale_table},
                                       {{p.shift, at, p.index, 0}, no_shift, no_shift_table}};
  const Statistics statistics = norm.statistics(v, unread, of_statistics);

  const auto weights = [&](float (&out)[N], int i) {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = kNoWeight;
    if (unlikely(affine)) load_vector<T>(out, p.weight, place.first + i * kStep);
  };
  Welford sums[SHAPE::kLanesPerThread] = {};
  place.each([&](auto i) {
    float values[N], weight[N];
    to_floats(values, v[i]);
    weights(weight, i);
    each(std::make_integer_sequence<int, N>{},
         [&](auto j) { add_gradient(sums[i % Place::kPerTile * (N / kGroup) + j / kGroup], dn[i][j], weight[j], values[j], statistics); });
  });
  const RowGradient gradient = row_gradient(statistics, reduce<kTwoSums, Counts::equal>(sums, of_sums), p.width, p.norm == Norm::layer);

  const int64_t target = norm.target();
  const ModulationRow<M, N> gate(p.gate, at, p.index, place.first);
  place.each([&](auto i) {
    float values[N], weight[N];
    to_floats(values, v[i]);
    weights(weight, i);
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = gradient.of(dn[i][j], weight[j], values[j]);
    if (carried) {
      float others[N];
      to_floats(others, carry[i]);
      if (b.eager) to_floats(values, from_floats<T, N>(values));
#pragma unroll
      for (int j = 0; j < N; ++j) values[j] = __fadd_rn(others[j], values[j]);
    }
    const auto d_row = from_floats<T, N>(values);
    store_row<Cache::normal>(static_cast<T*>(b.d_row) + target + i * kStep, d_row);
    if (b.d_branch != nullptr) {
      store_row<Cache::normal>(static_cast<T*>(b.d_branch) + target + i * kStep,
                               gate_gradient<T, M, ROUND>(b, gate, i * kStep, d_row, values));
    }
  });
}

// Goes through kKnownNormBackward, then through kNormBackward. Returns kNotServed where none of
// their kernels serves rows of this width.
template <class T, class M, bool ROUND>
class NormBackwardLaunch {
 public:
  NormBackwardLaunch(const SiteBackward& b, void* stream) : b_(b), stream_(stream) {}

  int run() {
    if (!known_ || !try_known(std::make_integer_sequence<int, std::size(variants::kKnownNormBackward)>{})) {
      try_all(std::make_integer_sequence<int, std::size(variants::kNormBackward)>{});
    }
    return result_;
  }

 private:
  template <int... ROWS>
  bool try_known(std::integer_sequence<int, ROWS...>) {
    return (try_known<ROWS>() || ...);
  }
  template <int ROW>
  bool try_known() {
    constexpr const KnownNormBackward& kRow = variants::kKnownNormBackward[ROW];
    if constexpr (kRow.compiled_for(dtype_of<T>, dtype_of<M>, ROUND)) {
      using Width = Tiles<kRow.tiles, kRow.tiles, kRow.blocks>;
      using Threads = Shape<kRow.lanes, kRow.ahead>;
      if (!Width::serves(p_.width) || kRow.residual != residual_ || kRow.tables != tables_) return false;
      go<Threads>(&known_norm_backward_kernel<T, ROUND, kRow.residual, kRow.tables, Width, Threads>);
      return true;
    }
    return false;
  }

  template <int... ROWS>
  void try_all(std::integer_sequence<int, ROWS...>) {
    (void)(try_widths<ROWS>(std::make_integer_sequence<int, variants::kNormBackward[ROWS].widths.count()>{}) || ...);
  }
  template <int ROW, int... WIDTHS>
  bool try_widths(std::integer_sequence<int, WIDTHS...>) {
    return (try_width<ROW, WIDTHS>() || ...);
  }
  template <int ROW, int WIDTH>
  bool try_width() {
    constexpr const NormBackward& kRow = variants::kNormBackward[ROW];
    if constexpr (kRow.x == dtype_of<T>) {
      using Width = Tiles<kRow.widths.list[WIDTH].tiles, kRow.widths.full(WIDTH), kRow.widths.list[WIDTH].blocks>;
      using Threads = Shape<kRow.lanes, kWithRow>;
      if (!Width::serves(p_.width)) return false;
      go<Threads>(&norm_backward_kernel<T, M, ROUND, Width, Threads>);
      return true;
    }
    return false;
  }

  template <class THREADS>
  void go(void (*kernel)(SiteBackward)) {
    const dim3 grid(static_cast<unsigned>(p_.tokens), static_cast<unsigned>(p_.batch));
    result_ = launch(kernel, grid, THREADS::kThreads, stream_, b_);
  }

  const SiteBackward& b_;
  void* const stream_;
  const Problem& p_ = b_.site;
  const bool residual_ = b_.dr.data != nullptr || b_.d_branch != nullptr;
  const bool tables_ = p_.scale.table.data != nullptr;
  // No weight, a table for each modulation or for none, and not the law of "eager" that rounds
  // gradients only (a norm in float32 without modulations).
  const bool known_ = p_.weight.data == nullptr && (!residual_ || tables_ == (p_.gate.table.data != nullptr)) &&
                      (ROUND || tables_ || !residual_ || !b_.eager);
  int result_ = kNotServed;
};

template <class T>
int launch_norm_backward(const SiteBackward& b, DType modulation, void* stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (modulation == DType::f32) return NormBackwardLaunch<T, float, false>(b, stream).run();
    if (b.site.round_each) return NormBackwardLaunch<T, T, true>(b, stream).run();
  }
  return NormBackwardLaunch<T, T, false>(b, stream).run();
}

}  // namespace ditnorm
