// The fast kernel: a row stays in registers from its one load to its one store. It serves what models use: x and residual of one dtype
// T, modulations all in M (T or float32), affine in T (or float32 where nothing is rounded to T), tables in float32, everything aligned,
// width at most kMaxItems tiles; scale and shift both given or both missing; of the modulations given, all have a table or none has.
// docs/kernels.md tells what was measured on the way here.
#pragma once
#include "formulas.cuh"
#include "launch.h"
#include "shapes.h"
#include "statistics.cuh"
#include "unroll.cuh"

namespace ditnorm {

// Half-precision modulations in float32 arithmetic: without tables that is rounding="single", and multiplications and additions may fuse.
template <class T, class M, bool ROUND>
constexpr bool kContracts = !ROUND && std::is_same_v<T, M> && !std::is_same_v<T, float>;

// The row of a modulation that one token reads, from a thread's first column on.
template <class M, int N>
struct ModulationRow {
  const M* row;
  const float* table;

  __device__ __forceinline__ ModulationRow(const Modulation& m, const Token& at, const Index& index, int first)
      : row(advance<M>(m.data, at.offset<uint32_t>(m, index) + first)), table(advance<float>(m.table.data, first)) {}

  __device__ __forceinline__ Pack<M, N> load(int offset) const { return load_pack<M, N>(row + offset); }

  __device__ __forceinline__ Pack<float, N> load_table(int offset) const { return load_pack<float, N>(table + offset); }
};

template <class M, int N>
__device__ __forceinline__ void add_table(float (&sums)[N], const Pack<M, N>& modulation, const Pack<float, N>& table) {
  to_floats(sums, modulation);
#pragma unroll
  for (int j = 0; j < N; ++j) sums[j] = __fadd_rn(sums[j], table.v[j]);
}

// N elements of the affine, in T or float32 (which one is known at run time).
template <class T, int N>
__device__ __forceinline__ void load_vector(float (&out)[N], const Vector& vector, int column) {
  if (vector.dtype == DType::f32) {
    to_floats(out, load_pack<float, N>(static_cast<const float*>(vector.data) + column));
  } else {
    to_floats(out, load_pack<T, N>(static_cast<const T*>(vector.data) + column));
  }
}

__device__ __forceinline__ void prefetch(const Vector& vector, int column) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L1 [%0];" ::"l"(static_cast<const char*>(vector.data) + column * (vector.dtype == DType::f32 ? 4 : 2)));
#endif
}

// RESIDUAL: scale_residual_norm_scale_shift. ROUND: every intermediate is rounded to T.
template <class T, class M, Extras EXTRAS, bool RESIDUAL, bool ROUND, int ITEMS, class SHAPE>
__global__ void __launch_bounds__(SHAPE::kThreads, min_blocks(sizeof(T), sizeof(M), EXTRAS, RESIDUAL, ITEMS, SHAPE::kAhead))
    row_kernel(const Problem p) {
  constexpr int kLanesHere = SHAPE::kLanesPerThread;
  constexpr int N = SHAPE::template kElements<T>;  // of one access
  constexpr int kStep = SHAPE::kThreads * N;       // of all threads' accesses together
  constexpr int kPerTile = kTile / kStep;          // accesses of one thread
  constexpr int kAccesses = ITEMS * kPerTile;
  constexpr auto kEach = std::make_integer_sequence<int, kAccesses>{};
  constexpr Cache kCache = RESIDUAL ? Cache::normal : Cache::streaming;
  __shared__ Exchange exchange;

  const int width = static_cast<int>(p.width);
  const int first = static_cast<int>(threadIdx.x) * N;
  const auto inside = [&](int i) { return i / kPerTile < kFullTiles<ITEMS> || first + i * kStep < width; };
  wait_for_previous_kernel();
  const Token at(p, blockIdx.y, blockIdx.x);

  // All of the row is asked for at once.
  Pack<T, N> v[kAccesses], branch[RESIDUAL ? kAccesses : 1];
  const T* const x = static_cast<const T*>(p.x.data) + at.offset(p.x) + first;
  const T* const residual = advance<T>(p.residual.data, at.offset(p.residual) + first);
  each(kEach, [&](auto i) {
    if (!inside(i)) return;
    v[i] = load_row<kCache, T, N>((RESIDUAL ? residual : x) + i * kStep);
    if constexpr (RESIDUAL) branch[i] = load_row<kCache, T, N>(x + i * kStep);
  });

  const bool gated = RESIDUAL && p.gate.data != nullptr, modulated = p.scale.data != nullptr, biased = p.bias.data != nullptr;
  const bool affine = EXTRAS == Extras::any && p.weight.data != nullptr;
  const bool tabled = EXTRAS == Extras::any && (p.scale.table.data != nullptr || (RESIDUAL && p.gate.table.data != nullptr));
  const ModulationRow<M, N> gate(p.gate, at, p.index, first), scale(p.scale, at, p.index, first), shift(p.shift, at, p.index, first);
  // Access i of a modulation waits in slot i % kSlots, from the moment that access i - kAhead is worked on.
  constexpr int kAhead = SHAPE::kAhead < kAccesses ? SHAPE::kAhead : kAccesses, kSlots = kAhead < kAccesses ? kAhead + 1 : kAhead;
  constexpr int kTableSlots = EXTRAS == Extras::tables ? kSlots : 1;
  constexpr auto kFirst = std::make_integer_sequence<int, kAhead>{};
  Pack<M, N> gates[RESIDUAL ? kSlots : 1], scales[kSlots], shifts[kSlots];
  Pack<float, N> gate_tables[RESIDUAL ? kTableSlots : 1], scale_tables[kTableSlots], shift_tables[kTableSlots];
  const auto ask_gate = [&](auto i) {
    if (i < kAccesses && gated && inside(i)) {
      gates[i % kSlots] = gate.load(i * kStep);
      if constexpr (EXTRAS == Extras::tables) gate_tables[i % kSlots] = gate.load_table(i * kStep);
    }
  };
  const auto ask = [&](auto i) {
    if (i < kAccesses && modulated && inside(i)) {
      scales[i % kSlots] = scale.load(i * kStep), shifts[i % kSlots] = shift.load(i * kStep);
      if constexpr (EXTRAS == Extras::tables) {
        scale_tables[i % kSlots] = scale.load_table(i * kStep), shift_tables[i % kSlots] = shift.load_table(i * kStep);
      }
    }
  };
  if constexpr (RESIDUAL) each(kFirst, ask_gate);
  if constexpr (SHAPE::kAhead == kWithRow) each(kFirst, ask);

  // Their loads stand behind branches, each of which waits for memory, and with few rows nothing hides that. With many it only costs.
  if constexpr (EXTRAS == Extras::any && SHAPE::kAhead == kWithRow) {
    if (unlikely(affine || tabled) && gridDim.x * gridDim.y <= kFewRows) {
      each(kEach, [&](auto i) {
        if (!inside(i)) return;
        const int column = first + i * kStep;
        if (affine) prefetch(p.weight, column);
        if (affine && biased) prefetch(p.bias, column);
        if (tabled && gated) prefetch(p.gate.table, column);
        if (tabled && modulated) prefetch(p.scale.table, column), prefetch(p.shift.table, column);
      });
    }
  }

  const int64_t out = (at.batch * p.tokens + at.token) * p.width + first;
  if constexpr (RESIDUAL) {
    each(kEach, [&](auto i) {
      if (!inside(i)) return;
      ask_gate(Constant<i + kAhead>{});
      const auto& loaded = gates[i % kSlots];
      float gate_values[N];
      if (!gated) {
        v[i] = add(v[i], branch[i]);
      } else if (EXTRAS == Extras::tables || unlikely(tabled)) {
        add_table(gate_values, loaded, EXTRAS == Extras::tables ? gate_tables[i % kTableSlots] : gate.load_table(i * kStep));
        v[i] = add_gated(v[i], branch[i], gate_values);
      } else if constexpr (ROUND) {
        v[i] = add_gated_rounded(v[i], branch[i], loaded);
      } else if constexpr (kContracts<T, M, ROUND>) {
        v[i] = add_gated_contracted(v[i], branch[i], loaded);
      } else {
        to_floats(gate_values, loaded);
        v[i] = add_gated(v[i], branch[i], gate_values);
      }
      if (!at.valid && gated) v[i] = filled<T, N>(kNaN);
      store_row<kCache>(static_cast<T*>(p.r) + out + i * kStep, v[i]);
    });
  }

  // The statistics hide the wait for these, and the registers of the two rows and of the gate are free again.
  Pack<T, N> weights[EXTRAS == Extras::affine ? kAccesses : 1], biases[EXTRAS == Extras::affine ? kAccesses : 1];
  if constexpr (EXTRAS == Extras::affine) {
    each(kEach, [&](auto i) {
      if (!inside(i)) return;
      weights[i] = load_pack<T, N>(static_cast<const T*>(p.weight.data) + first + i * kStep);
      biases[i] = filled<T, N>(kNoBias);
      if (biased) biases[i] = load_pack<T, N>(static_cast<const T*>(p.bias.data) + first + i * kStep);
    });
  }

  Welford lanes[kLanesHere] = {};
  const auto visit_all = [&](auto visit) {
    each(kEach, [&](auto i) {
      if (!inside(i)) return;
      float values[N];
      to_floats(values, v[i]);
      constexpr int tile = i / kPerTile, access = i % kPerTile;
      each(std::make_integer_sequence<int, N>{}, [&](auto j) {
        Welford& lane = lanes[access * (N / kGroup) + j / kGroup];
        visit(lane, values[j], 1.0f / (tile * kGroup + j % kGroup + 1));
        lane.count = (tile + 1) * kGroup;
      });
    });
    if constexpr (SHAPE::kAhead != kWithRow) each(kFirst, ask);
  };
  Welford row;
  if (unlikely(p.norm == Norm::rms)) {
    visit_all([](Welford& lane, float value, float reciprocal) { add<Norm::rms>(lane, value, reciprocal); });
    row = reduce<Norm::rms, Counts::equal>(lanes, exchange);
  } else {
    visit_all([](Welford& lane, float value, float reciprocal) { add<Norm::layer>(lane, value, reciprocal); });
    if (unlikely(width % (32 * kGroup) != 0)) {
      row = reduce<Norm::layer, Counts::any>(lanes, exchange);
    } else if (unlikely(width % kTile != 0)) {
      row = reduce<Norm::layer, Counts::equal_in_warps>(lanes, exchange);
    } else {
      row = reduce<Norm::layer, Counts::equal>(lanes, exchange);
    }
  }
  Statistics statistics = finish(row, p);
  if (!at.valid) statistics.rstd = kNaN;

  each(kEach, [&](auto i) {
    if (!inside(i)) return;
    ask(Constant<i + kAhead>{});
    const auto &loaded_scale = scales[i % kSlots], &loaded_shift = shifts[i % kSlots];
    float n[N], scale_values[N], shift_values[N];
    to_floats(n, v[i]);
#pragma unroll
    for (int j = 0; j < N; ++j) n[j] = __fsub_rn(n[j], statistics.mean);

    Pack<T, N> y;
    if (kContracts<T, M, ROUND> && EXTRAS == Extras::none && modulated) {
      to_floats(scale_values, loaded_scale);
      to_floats(shift_values, loaded_shift);
#pragma unroll
      for (int j = 0; j < N; ++j) n[j] = modulate_contracted(n[j], statistics.rstd, scale_values[j], shift_values[j]);
      y = from_floats<T, N>(n);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) n[j] = __fmul_rn(statistics.rstd, n[j]);
      float weight[N], bias[N];
      if constexpr (EXTRAS == Extras::affine) {
        to_floats(weight, weights[i]);
        to_floats(bias, biases[i]);
      } else if (unlikely(affine)) {
        load_vector<T>(weight, p.weight, first + i * kStep);
        if (biased) {
          load_vector<T>(bias, p.bias, first + i * kStep);
        } else {
#pragma unroll
          for (int j = 0; j < N; ++j) bias[j] = kNoBias;
        }
      }
      if (EXTRAS == Extras::affine || unlikely(affine)) {
#pragma unroll
        for (int j = 0; j < N; ++j) n[j] = __fmaf_rn(weight[j], n[j], bias[j]);
      }
      if constexpr (ROUND) {
        y = from_floats<T, N>(n);
        if (modulated) y = modulate_rounded(y, loaded_scale, loaded_shift);
      } else {
        if (modulated) {
          if (EXTRAS == Extras::tables || unlikely(tabled)) {
            add_table(scale_values, loaded_scale, EXTRAS == Extras::tables ? scale_tables[i % kTableSlots] : scale.load_table(i * kStep));
            add_table(shift_values, loaded_shift, EXTRAS == Extras::tables ? shift_tables[i % kTableSlots] : shift.load_table(i * kStep));
          } else {
            to_floats(scale_values, loaded_scale);
            to_floats(shift_values, loaded_shift);
          }
#pragma unroll
          for (int j = 0; j < N; ++j) n[j] = modulate<T, false>(n[j], scale_values[j], shift_values[j]);
        }
        y = from_floats<T, N>(n);
      }
    }
    store_row<kCache>(static_cast<T*>(p.y) + out + i * kStep, y);
  });
}

}  // namespace ditnorm
