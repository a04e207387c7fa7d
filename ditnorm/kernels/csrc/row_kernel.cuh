// The fast kernel: a row stays in registers from its one load to its one store. It serves what
// models use: x and residual of one dtype T, modulations all in M (T or float32), affine in T (or
// float32 where nothing is rounded to T), tables in float32, everything aligned; scale and shift
// both given or both missing; of the modulations given, all have a table or none has. variants.h
// lists its forms.
//
// docs/kernels-log.md tells what was measured on the way here.
#pragma once
#include "formulas.cuh"
#include "launch.h"
#include "modulation.cuh"
#include "quantize.cuh"
#include "statistics.cuh"
#include "unroll.cuh"
#include "variants.h"

namespace ditnorm {

constexpr int64_t kFewRows = 512;  // not even four a multiprocessor of an H200: nothing hides a row's waits for memory

// The columns of a row that one thread has, in accesses of N elements.
template <class T, class TILES, class SHAPE>
struct Columns {
  static constexpr int N = SHAPE::template kElements<T>;
  static constexpr int kStep = SHAPE::kThreadsPerRow * N;  // of all threads' accesses together
  static constexpr int kPerTile = kTile / kStep;           // accesses of one thread
  static constexpr int kAccesses = TILES::kCount * kPerTile;
  const int width, first;

  __device__ __forceinline__ explicit Columns(const Problem& p)
      : width(static_cast<int>(p.width)),
        first((SHAPE::kRows == 1 ? static_cast<int>(threadIdx.x) : static_cast<int>(threadIdx.x) % SHAPE::kThreadsPerRow) * N) {}

  __device__ __forceinline__ bool inside(int i) const { return i / kPerTile < TILES::kFull || first + i * kStep < width; }

  // f(i) for each access i.
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    ditnorm::each(std::make_integer_sequence<int, kAccesses>{}, [&](auto i) {
      if (inside(i)) f(i);
    });
  }
};

// What one thread does with its columns of one row, phase by phase. What the phases hand on lies in
// the kernel: nvcc keeps members of a class in registers too, but with a few more instructions.
// RESIDUAL: scale_residual_norm_scale_shift. ROUND: every intermediate is rounded to T. SPARING: of
// the integer unit, and of moves.
template <class T, class M, Extras EXTRAS, bool RESIDUAL, bool ROUND, class TILES, class SHAPE, bool SPARING = false>
class Row {
 public:
  using Place = Columns<T, TILES, SHAPE>;
  static constexpr int N = Place::N, kAccesses = Place::kAccesses;
  static constexpr bool kAffine = EXTRAS == Extras::affine, kTables = EXTRAS == Extras::tables, kAny = EXTRAS == Extras::any;

  // Access i of a modulation waits in slot i % kSlots, from the moment that access i - kAhead is
  // worked on.
  static constexpr int kAhead = SHAPE::kAhead < kAccesses ? SHAPE::kAhead : kAccesses;
  static constexpr int kSlots = kAhead < kAccesses ? kAhead + 1 : kAhead;

  using Elements = Pack<T, N>[kAccesses];
  using Branch = Pack<T, N>[RESIDUAL ? kAccesses : 1];
  using Affine = Pack<T, N>[kAffine ? kAccesses : 1];
  using Gate = AskedModulation<M, N, RESIDUAL ? kSlots : 1, RESIDUAL && kTables>;
  using ScaleShift = AskedModulation<M, N, kSlots, kTables>;
  struct Modulations {
    Gate gate;
    ScaleShift scale, shift;
  };

  // All of the row is asked for at once.
  static __device__ __forceinline__ void load(const Problem& p, const Place& place, const Token& at, Elements& v, Branch& branch) {
    const T* const x = static_cast<const T*>(p.x.data) + at.offset(p.x) + place.first;
    const T* const residual = advance<T>(p.residual.data, at.offset(p.residual) + place.first);
    place.each([&](auto i) {
      v[i] = load_row<kCache, T, N>((RESIDUAL ? residual : x) + i * kStep);
      if constexpr (RESIDUAL) branch[i] = load_row<kCache, T, N>(x + i * kStep);
    });
  }

  __device__ __forceinline__ Row(const Problem& p, const Place& place, const Token& at) : p_(p), place_(place), at_(at) {}

  // Asks for the gate, and for scale and shift in the forms that ask so early.
  __device__ __forceinline__ void ask_with_row(const Modulations& m) const {
    if constexpr (RESIDUAL) each(kFirst, [&](auto i) { ask_gate(m, i); });
    if constexpr (SHAPE::kAhead == kWithRow) each(kFirst, [&](auto i) { ask(m, i); });
    if constexpr (kAny && SHAPE::kAhead == kWithRow) prefetch_extras();
  }

  // 2**16, which ptxas doesn't know.
  __device__ __forceinline__ uint32_t two_to_16() const { return 0x10000u + none(); }

  // Where the results of this thread's first column go, in elements.
  __device__ __forceinline__ int64_t target() const { return (at_.batch * p_.tokens + at_.token) * p_.width + place_.first; }

  // residual + gate * x, rounded and stored. From here on that is the row.
  __device__ __forceinline__ void add_residual(Elements& v, const Branch& branch, const Modulations& m, int64_t target) const {
    place_.each([&](auto i) {
      ask_gate(m, i + kAhead);
      add_branch(v[i], branch[i], m, i);
      if (!at_.valid && gated_) v[i] = filled<T, N>(kNaN);
      store_row<kCache>(static_cast<T*>(p_.r) + target + i * kStep, v[i]);
    });
  }

  // Asks for the affine: the statistics hide the wait, and the registers of the two rows and of the
  // gate are free again.
  __device__ __forceinline__ void load_affine(Affine& weights, Affine& biases) const {
    place_.each([&](auto i) {
      weights[i] = load_pack<T, N>(static_cast<const T*>(p_.weight.data) + place_.first + i * kStep);
      biases[i] = filled<T, N>(kNoBias);
      if (biased_) biases[i] = load_pack<T, N>(static_cast<const T*>(p_.bias.data) + place_.first + i * kStep);
    });
  }

  // Mean and reciprocal deviation in ATen's order. Asks for scale and shift before the threads
  // exchange what they have.
  __device__ __forceinline__ Statistics statistics(const Elements& v, const Modulations& m, Exchange& exchange) const {
    return statistics_asking(
        v,
        [&] {
          if constexpr (SHAPE::kAhead != kWithRow) each(kFirst, [&](auto i) { ask(m, i); });
        },
        exchange);
  }

  // The same with any other way to ask.
  template <class ASK>
  __device__ __forceinline__ Statistics statistics_asking(const Elements& v, ASK&& ask_ahead, Exchange& exchange) const {
    Welford lanes[SHAPE::kLanesPerThread] = {}, row;
    if (unlikely(p_.norm == Norm::rms)) {
      add_up<Norm::rms>(v, lanes);
      ask_ahead();
      row = reduce<Norm::rms, Counts::equal>(lanes, exchange);
    } else {
      add_up<Norm::layer>(v, lanes);
      ask_ahead();
      if (!TILES::kExact && unlikely(place_.width % (32 * kGroup) != 0)) {
        row = reduce<Norm::layer, Counts::any>(lanes, exchange);
      } else if (!TILES::kExact && unlikely(place_.width % kTile != 0)) {
        row = reduce<Norm::layer, Counts::equal_in_warps>(lanes, exchange);
      } else {
        row = reduce<Norm::layer, Counts::equal>(lanes, exchange);
      }
    }
    Statistics statistics = finish(row, p_);
    if (!at_.valid) statistics.rstd = kNaN;
    return statistics;
  }

  // norm(row) * (1 + scale) + shift
  __device__ __forceinline__ void store(const Elements& v, const Statistics& statistics, const Modulations& m, const Affine& weights,
                                        const Affine& biases, int64_t target) const {
    place_.each([&](auto i) {
      ask(m, i + kAhead);
      const Pack<T, N> y = modulated(v[i], statistics, m, weights, biases, i);
      store_row<kCache>(static_cast<T*>(p_.y) + target + i * kStep, y);
    });
  }

  // The same, quantised.
  __device__ __forceinline__ void store_quantized(Elements& v, const Statistics& statistics, const Modulations& m, const Affine& weights,
                                                  const Affine& biases, int64_t target, uint32_t (&exchange)[kMaxWarps]) const {
    const auto make = [&](auto i) {
      ask(m, i + kAhead);
      return modulated<kAny>(v[i], statistics, m, weights, biases, i);
    };
    quantize(v, make, target, exchange);
  }

  // The row is y then, whose accesses `make` makes, and stays in registers until its largest element
  // is known. Where somebody else reads y too it is written beside its values. AGAIN: the largest of
  // all rows is known, and lies in `exchange`, a part of it for each lane.
  template <bool AGAIN = false, class MAKE>
  __device__ __forceinline__ void quantize(Elements& v, MAKE make, int64_t target, uint32_t (&exchange)[kMaxWarps]) const {
    Amax<T> amax;
    place_.each([&](auto i) {
      v[i] = make(i);
      if constexpr (!AGAIN) amax.take(v[i]);
    });
    const Law law = AGAIN ? Law::float8_tensor : p_.quantized.law;
    const uint32_t largest =
        AGAIN ? reduce_max_of_warp(exchange[threadIdx.x % 32]) : reduce_max<SHAPE::kThreadsPerRow>(amax.bits(), exchange);
    const int64_t row = at_.batch * p_.tokens + at_.token;
    if (!AGAIN && unlikely(p_.y != nullptr)) {
      place_.each([&](auto i) {
        T* const y = static_cast<T*>(p_.y) + target + i * kStep;
        if constexpr (SPARING) {
          store_row<kCache>(y, elsewhere(v[i]));
        } else {
          store_row<kCache>(y, v[i]);
        }
      });
    }
    if (!AGAIN && p_.quantized.maxima != nullptr) {
      if (place_.first == 0) p_.quantized.maxima[row] = largest;
      return;
    }
    const Divisor by = divide_by(scale_of<T>(float_of(largest), law), law);
    if (place_.first == 0 && (!AGAIN || row == 0)) p_.quantized.scale[row] = by.scale;
    const auto inside = [&](int i) { return place_.inside(i); };
    if constexpr (SPARING) {
      ditnorm::store_quantized<true>(v, by, p_.quantized.values + target, kStep, inside, two_to_16());
    } else {
      ditnorm::store_quantized(v, by, p_.quantized.values + target, kStep, inside);
    }
  }

 private:
  static constexpr int kStep = Place::kStep;
  static constexpr auto kFirst = std::make_integer_sequence<int, kAhead>{};
  static constexpr Cache kCache = RESIDUAL ? Cache::normal : Cache::streaming;

  // 0: a width is below 2**32. ptxas doesn't know.
  __device__ __forceinline__ uint32_t none() const { return static_cast<uint32_t>(p_.width >> 32); }

  // The same in other registers. What is stored 16 bytes at a time lies in neighbours, and ptxas would
  // move all of a row there for a branch that few rows take, if it saw that nothing changes.
  __device__ __forceinline__ Pack<T, N> elsewhere(Pack<T, N> v) const {
#pragma unroll
    for (int j = 0; j < N; j += 2) *reinterpret_cast<uint32_t*>(&v.v[j]) ^= none();
    return v;
  }

  __device__ __forceinline__ void ask_gate(const Modulations& m, int i) const {
    if (i < kAccesses && gated_ && place_.inside(i)) {
      m.gate.ask(i, i * kStep);
      m.gate.ask_table(i, i * kStep);
    }
  }
  __device__ __forceinline__ void ask(const Modulations& m, int i) const {
    if (i < kAccesses && modulated_ && place_.inside(i)) {
      m.scale.ask(i, i * kStep), m.shift.ask(i, i * kStep);
      m.scale.ask_table(i, i * kStep), m.shift.ask_table(i, i * kStep);
    }
  }

  // The loads of an affine and of tables stand behind branches, each of which waits for memory, and
  // with few rows nothing hides that. With many a prefetch only costs.
  __device__ __forceinline__ void prefetch_extras() const {
    if (unlikely(affine_ || tabled_) && gridDim.x * gridDim.y <= kFewRows) {
      place_.each([&](auto i) {
        const int column = place_.first + i * kStep;
        if (affine_) prefetch(p_.weight, column);
        if (affine_ && biased_) prefetch(p_.bias, column);
        if (tabled_ && gated_) prefetch(p_.gate.table, column);
        if (tabled_ && modulated_) prefetch(p_.scale.table, column), prefetch(p_.shift.table, column);
      });
    }
  }

  // v += gate * x, access i.
  __device__ __forceinline__ void add_branch(Pack<T, N>& v, const Pack<T, N>& x, const Modulations& m, int i) const {
    float values[N];
    if (!gated_) {
      v = add(v, x);
    } else if (kTables || unlikely(tabled_)) {
      m.gate.get_sum(values, i, i * kStep);
      v = add_gated(v, x, values);
    } else if constexpr (ROUND) {
      v = add_gated_rounded(v, x, m.gate.get(i));
    } else if constexpr (kContracts<T, M, ROUND>) {
      v = add_gated_contracted(v, x, m.gate.get(i));
    } else {
      to_floats(values, m.gate.get(i));
      v = add_gated(v, x, values);
    }
  }

  // This thread's elements into the statistics of its lanes.
  template <Norm NORM>
  __device__ __forceinline__ void add_up(const Elements& v, Welford (&lanes)[SHAPE::kLanesPerThread]) const {
    place_.each([&](auto i) {
      float values[N];
      if constexpr (SPARING) {
        to_floats<true>(values, v[i], two_to_16());
      } else {
        to_floats(values, v[i]);
      }
      constexpr int tile = i / Place::kPerTile, access = i % Place::kPerTile;
      each(std::make_integer_sequence<int, N>{}, [&](auto j) {
        Welford& lane = lanes[access * (N / kGroup) + j / kGroup];
        ditnorm::add<NORM>(lane, values[j], 1.0f / (tile * kGroup + j % kGroup + 1));
        lane.count = (tile + 1) * kGroup;
      });
    });
  }

  // Access i of norm(row) * (1 + scale) + shift. ALSO_PLAIN: an Extras::any kernel is given rows
  // with neither affine nor tables, whose bits are to be those of Extras::none.
  template <bool ALSO_PLAIN = false>
  __device__ __forceinline__ Pack<T, N> modulated(const Pack<T, N>& v, const Statistics& statistics, const Modulations& m,
                                                  const Affine& weights, const Affine& biases, int i) const {
    float n[N], scales[N], shifts[N];
    to_floats(n, v);
#pragma unroll
    for (int j = 0; j < N; ++j) n[j] = __fsub_rn(n[j], statistics.mean);
    Pack<T, N> y;
    if (kContracts<T, M, ROUND> && (EXTRAS == Extras::none || (ALSO_PLAIN && !affine_ && !tabled_)) && modulated_) {
      to_floats(scales, m.scale.get(i));
      to_floats(shifts, m.shift.get(i));
#pragma unroll
      for (int j = 0; j < N; ++j) n[j] = modulate_contracted(n[j], statistics.rstd, scales[j], shifts[j]);
      y = from_floats<T, N>(n);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) n[j] = __fmul_rn(statistics.rstd, n[j]);
      if (kAffine || unlikely(affine_)) apply_affine(n, weights, biases, i);
      if constexpr (ROUND) {
        y = from_floats<T, N>(n);
        if (modulated_) y = modulate_rounded(y, m.scale.get(i), m.shift.get(i));
      } else {
        if (modulated_) {
          if (kTables || unlikely(tabled_)) {
            m.scale.get_sum(scales, i, i * kStep);
            m.shift.get_sum(shifts, i, i * kStep);
          } else {
            to_floats(scales, m.scale.get(i));
            to_floats(shifts, m.shift.get(i));
          }
#pragma unroll
          for (int j = 0; j < N; ++j) n[j] = modulate<T, false>(n[j], scales[j], shifts[j]);
        }
        y = from_floats<T, N>(n);
      }
    }
    return y;
  }

  __device__ __forceinline__ void apply_affine(float (&n)[N], const Affine& weights, const Affine& biases, int i) const {
    float weight[N], bias[N];
    if constexpr (kAffine) {
      to_floats(weight, weights[i]);
      to_floats(bias, biases[i]);
    } else {
      load_vector<T>(weight, p_.weight, place_.first + i * kStep);
      if (biased_) {
        load_vector<T>(bias, p_.bias, place_.first + i * kStep);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) bias[j] = kNoBias;
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) n[j] = __fmaf_rn(weight[j], n[j], bias[j]);
  }

  const Problem& p_;
  const Place& place_;
  const Token& at_;
  const bool gated_ = RESIDUAL && p_.gate.data != nullptr, modulated_ = p_.scale.data != nullptr, biased_ = p_.bias.data != nullptr;
  const bool affine_ = kAny && p_.weight.data != nullptr;
  const bool tabled_ = kAny && (p_.scale.table.data != nullptr || (RESIDUAL && p_.gate.table.data != nullptr));
};

// QUANTIZES: y in its place.
template <class T, class M, Extras EXTRAS, bool RESIDUAL, bool ROUND, bool QUANTIZES, class TILES, class SHAPE>
__global__ void __launch_bounds__(SHAPE::kThreads, TILES::kBlocks) row_kernel(const Problem p) {
  using R = Row<T, M, EXTRAS, RESIDUAL, ROUND, TILES, SHAPE>;
  __shared__ Exchange exchange;
  const typename R::Place place(p);
  wait_for_previous_kernel();
  const Token at(p, blockIdx.y, blockIdx.x);

  typename R::Elements v;
  typename R::Branch branch;
  R::load(p, place, at, v, branch);
  const R row(p, place, at);

  typename R::Gate::Slots gate;
  typename R::Gate::TableSlots gate_table;
  typename R::ScaleShift::Slots scale, shift;
  typename R::ScaleShift::TableSlots scale_table, shift_table;
  const typename R::Modulations m{{{p.gate, at, p.index, place.first}, gate, gate_table},
                                  {{p.scale, at, p.index, place.first}, scale, scale_table},
                                  {{p.shift, at, p.index, place.first}, shift, shift_table}};
  row.ask_with_row(m);
  const int64_t target = row.target();
  if constexpr (RESIDUAL) row.add_residual(v, branch, m, target);

  typename R::Affine weights, biases;
  if constexpr (EXTRAS == Extras::affine) row.load_affine(weights, biases);
  const Statistics statistics = row.statistics(v, m, exchange);
  if constexpr (QUANTIZES) {
    __shared__ uint32_t maxima[kMaxWarps];
    row.store_quantized(v, statistics, m, weights, biases, target, maxima);
  } else {
    row.store(v, statistics, m, weights, biases, target);
  }
}

}  // namespace ditnorm
