// Rows that share their modulations, quantised. A warp has a row and goes on to another, so nothing
// waits for another warp, and what all rows share is made once, in shared memory. The next row is on
// its way to shared memory while this one, in registers, is worked on.
#pragma once
#include "row_kernel.cuh"

namespace ditnorm {

// 1 + scale, and shift, and with a residual the gate: in T, or with their tables in float32.
template <class T, class M, bool TABLES, bool RESIDUAL, class PLACE, int THREADS>
struct SharedModulations {
  using Element = std::conditional_t<TABLES, float, T>;
  static constexpr int N = PLACE::N, kStep = PLACE::kStep;
  static constexpr int kPart = 16 / sizeof(Element), kParts = N / kPart;  // of an access of a row: what is loaded at once
  static constexpr int kTogether = THREADS * kPart;                       // elements that all threads make at a time
  static constexpr int kRounds = (PLACE::kAccesses * kStep + kTogether - 1) / kTogether;
  static_assert(kTogether % kStep == 0);
  static constexpr int kColumns = kRounds * kTogether;
  alignas(16) Element scale[kColumns], shift_and_gate[(RESIDUAL ? 2 : 1) * kColumns];

  // A part of an access of one thread is next to that of its neighbour, for the sake of the banks.
  static __device__ __forceinline__ int at(int access, int thread, int part) {
    return access * kStep + part * (kStep / kParts) + thread * kPart;
  }

  // By all threads of the block; a barrier has to follow.
  __device__ __forceinline__ void fill(const Problem& p, int64_t batch) {
    const int first = static_cast<int>(threadIdx.x) * kPart, target = at(first / kStep, first % kStep / N, first % N / kPart);
    const Token token(batch, 0);
    const ModulationRow<M, kPart> scales(p.scale, token, p.index, 0), shifts(p.shift, token, p.index, 0);
    const bool modulated = p.scale.data != nullptr;
    each(std::make_integer_sequence<int, kRounds>{}, [&](auto round) {
      constexpr int kOffset = round * kTogether;
      // Behind the row is its end once more: a branch would wait for each load.
      const int last = static_cast<int>(p.width) - kPart, column = first + kOffset < last ? first + kOffset : last;
      if constexpr (TABLES) {
        const auto sum = [&](float (&sums)[kPart], const Modulation& m, const ModulationRow<M, kPart>& row, float none) {
          if (!RESIDUAL || m.data != nullptr) {
            add_table(sums, row.load(column), row.load_table(column));
          } else {
#pragma unroll
            for (int j = 0; j < kPart; ++j) sums[j] = none;
          }
        };
        float sums[3][kPart];
        sum(sums[0], p.scale, scales, kNoScale);
        sum(sums[1], p.shift, shifts, kNoShift);
        if constexpr (RESIDUAL) sum(sums[2], p.gate, {p.gate, token, p.index, 0}, kNoGate);
#pragma unroll
        for (int j = 0; j < kPart; ++j) sums[0][j] = __fadd_rn(1.0f, sums[0][j]);
        store_row<Cache::normal>(&scale[target + kOffset], from_floats<float, kPart>(sums[0]));
        store_row<Cache::normal>(&shift_and_gate[target + kOffset], from_floats<float, kPart>(sums[1]));
        if constexpr (RESIDUAL) store_row<Cache::normal>(&shift_and_gate[kColumns + target + kOffset], from_floats<float, kPart>(sums[2]));
      } else {
        const auto factor = modulated ? one_plus(scales.load(column)) : filled<T, kPart>(kNoWeight);
        store_row<Cache::normal>(&scale[target + kOffset], factor);
        store_row<Cache::normal>(&shift_and_gate[target + kOffset], modulated ? shifts.load(column) : filled<T, kPart>(kNoShift));
      }
    });
  }

  // Access i of residual + gate * x.
  __device__ __forceinline__ Pack<T, N> add(const Pack<T, N>& residual, const Pack<T, N>& x, const PLACE& place, int i) const {
    float gates[N];
    each(std::make_integer_sequence<int, kParts>{}, [&](auto part) {
      const auto some = load_row<Cache::normal, float, kPart>(&shift_and_gate[kColumns + at(i, place.first / N, part)]);
#pragma unroll
      for (int j = 0; j < kPart; ++j) gates[part * kPart + j] = some.v[j];
    });
    return add_gated(residual, x, gates);
  }

  // Access i of norm(row) * (1 + scale) + shift.
  template <bool SPARING>
  __device__ __forceinline__ Pack<T, N> modulate(const Pack<T, N>& v, const Statistics& statistics, const PLACE& place, int i,
                                                 uint32_t two_to_16) const {
    float n[N];
    to_floats<SPARING>(n, v, two_to_16);
#pragma unroll
    for (int j = 0; j < N; ++j) n[j] = __fmul_rn(statistics.rstd, __fsub_rn(n[j], statistics.mean));
    const int thread = place.first / N;
    if constexpr (TABLES) {
      each(std::make_integer_sequence<int, kParts>{}, [&](auto part) {
        const auto factor = load_row<Cache::normal, float, kPart>(&scale[at(i, thread, part)]);
        const auto sum = load_row<Cache::normal, float, kPart>(&shift_and_gate[at(i, thread, part)]);
#pragma unroll
        for (int j = 0; j < kPart; ++j) {
          float& element = n[part * kPart + j];
          element = __fadd_rn(__fmul_rn(element, factor.v[j]), sum.v[j]);
        }
      });
      return from_floats<T, N>(n);
    } else {
      const auto factor = load_row<Cache::normal, T, N>(&scale[at(i, thread, 0)]);
      const auto sum = load_row<Cache::normal, T, N>(&shift_and_gate[at(i, thread, 0)]);
      return modulate_rounded_by(from_floats<T, N>(n), factor, sum);
    }
  }
};

// nvcc would keep what it unpacked for the statistics, in twice the registers, where that is most of
// a row.
template <class T, int N, int ACCESSES>
__device__ __forceinline__ void keep_packed(Pack<T, N> (&row)[ACCESSES]) {
#ifdef __CUDA_ARCH__
  each(std::make_integer_sequence<int, ACCESSES>{}, [&](auto i) {
#pragma unroll
    for (int j = 0; j < N; j += 2) asm("" : "+r"(*reinterpret_cast<uint32_t*>(&row[i].v[j])));
  });
#else
  (void)row;
#endif
}

// What a block has in shared memory.
template <class T, class M, bool TABLES, bool RESIDUAL, class PLACE, class SHAPE>
struct WalkingMemory {
  SharedModulations<T, M, TABLES, RESIDUAL, PLACE, SHAPE::kThreads> modulations;
  // The row that each warp goes on to; of the residual, the branch behind it.
  alignas(16) T next[SHAPE::kRows][RESIDUAL ? 2 : 1][PLACE::kAccesses * PLACE::kStep];
};

// Who has which rows of a sample, where they have a residual. `walkers` blocks run from the beginning,
// and have the first `shared` rows in turn. Multiprocessors get unequal shares of the memory's
// bandwidth, and so the rest is for blocks that start where one of these has ended: `enders`, with a
// row for each of their warps.
struct Deal {
  unsigned walkers, shared, enders;
};

// AGAIN: all is made a second time, where the largest element of all rows is known.
template <class T, class M, Extras EXTRAS, bool RESIDUAL, bool ROUND, class TILES, class SHAPE, bool AGAIN = false>
__global__ void __launch_bounds__(SHAPE::kThreads, TILES::kBlocks) walking_kernel(const Problem p, const Partials known, const Deal deal) {
  constexpr bool kTables = EXTRAS == Extras::tables;
  constexpr bool kSparing = kTables && !RESIDUAL && TILES::kCount > 3;  // where that was measured to be faster
  using R = Row<T, M, EXTRAS, false, ROUND, TILES, SHAPE, kSparing>;
  using Place = typename R::Place;
  static_assert(SHAPE::kThreadsPerRow == 32 && SHAPE::kAhead == 0 && ROUND != kTables && (kTables || !RESIDUAL));
  auto& memory = launched_with<WalkingMemory<T, M, kTables, RESIDUAL, Place, SHAPE>>();
  __shared__ Exchange exchange;  // of rows that several warps have: unused, as the next
  __shared__ uint32_t maxima[kMaxWarps];
  const Place place(p);
  const int64_t batch = RESIDUAL ? blockIdx.x : blockIdx.y;
  const unsigned warp = threadIdx.x / 32;
  const bool walks = blockIdx.y < deal.walkers;
  const unsigned stride = walks ? deal.walkers : deal.enders, step = (RESIDUAL ? stride : gridDim.x) * SHAPE::kRows;
  const unsigned tokens = RESIDUAL && walks ? deal.shared : static_cast<unsigned>(p.tokens);
  // The warps of a block that have no row of their own work on the last one too: so all of them go
  // the same way, and the compiler knows it.
  const auto own = [&](unsigned first) { return RESIDUAL ? first : first + warp < tokens ? first + warp : tokens - 1; };
  const auto rows_of = [&](const Rows& rows) { return static_cast<const T*>(rows.data) + batch * rows.batch_stride + place.first; };
  const T *const x = rows_of(p.x), *const residual = RESIDUAL ? rows_of(p.residual) : x;
  T* const next = &memory.next[warp][0][place.first];
  T* const next_branch = &memory.next[warp][RESIDUAL ? 1 : 0][place.first];
  const auto fetch = [&](unsigned token) {
    const T* const source = residual + token * (RESIDUAL ? p.residual : p.x).token_stride;
    place.each([&](auto i) { copy_ahead(next + i * Place::kStep, source + i * Place::kStep); });
    if constexpr (RESIDUAL) {
      const T* const branch = x + token * p.x.token_stride;
      place.each([&](auto i) { copy_ahead(next_branch + i * Place::kStep, branch + i * Place::kStep); });
    }
  };
  wait_for_previous_kernel();
  unsigned first = RESIDUAL ? blockIdx.y + (walks ? 0 : deal.shared - deal.walkers) + warp * stride : blockIdx.x * SHAPE::kRows;
  if (!RESIDUAL || first < tokens) fetch(own(first));
  if constexpr (AGAIN) {  // each warp's part, so often that each lane has one
    const uint32_t part = reduce_max_of_warp(largest_part(known));
    if (threadIdx.x % 32 % SHAPE::kRows == warp) maxima[threadIdx.x % 32] = part;
  }
  memory.modulations.fill(p, batch);
  __syncthreads();
  while (first < tokens) {
    typename R::Elements v;
    if constexpr (!RESIDUAL) {
      wait_for_copies();
      place.each([&](auto i) { v[i] = load_row<Cache::normal, T, R::N>(next + i * Place::kStep); });
    }
    const Token at(batch, own(first));
    const R row(p, place, at);
    if constexpr (RESIDUAL) {
      wait_for_copies();
      place.each([&](auto i) {
        v[i] = load_row<Cache::normal, T, R::N>(next + i * Place::kStep);
        v[i] = memory.modulations.add(v[i], load_row<Cache::normal, T, R::N>(next_branch + i * Place::kStep), place, i);
        store_row<Cache::normal>(static_cast<T*>(p.r) + row.target() + i * Place::kStep, v[i]);
      });
      first += step;
      keep_packed(v);
      if (first < tokens) fetch(own(first));
    }
    typename R::Gate::Slots gate;
    typename R::Gate::TableSlots gate_table;
    typename R::ScaleShift::Slots slots;
    typename R::ScaleShift::TableSlots table_slots;
    const typename R::Modulations none{{{p.gate, at, p.index, 0}, gate, gate_table},
                                       {{p.scale, at, p.index, 0}, slots, table_slots},
                                       {{p.shift, at, p.index, 0}, slots, table_slots}};
    const Statistics statistics = row.statistics(v, none, exchange);
    keep_packed(v);
    if constexpr (!RESIDUAL) {
      first += step;
      if (first < tokens) fetch(own(first));  // the statistics have read all of this row
    }
    const auto make = [&](auto i) { return memory.modulations.template modulate<kSparing>(v[i], statistics, place, i, row.two_to_16()); };
    row.template quantize<AGAIN>(v, make, row.target(), maxima);
  }
}

}  // namespace ditnorm
