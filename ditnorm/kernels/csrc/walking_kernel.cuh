// Rows that share their modulations, quantised. A warp has a row and goes on to another, so nothing
// waits for another warp, and what all rows share is made once, in shared memory. The next row is on
// its way to shared memory while this one, in registers, is worked on.
#pragma once
#include "row_kernel.cuh"

namespace ditnorm {

// 1 + scale, and shift: in T, or with their tables in float32.
template <class T, class M, bool TABLES, class PLACE, int THREADS>
struct SharedModulations {
  using Element = std::conditional_t<TABLES, float, T>;
  static constexpr int N = PLACE::N, kStep = PLACE::kStep;
  static constexpr int kPart = 16 / sizeof(Element), kParts = N / kPart;  // of an access of a row: what is loaded at once
  static constexpr int kTogether = THREADS * kPart;                       // elements that all threads make at a time
  static constexpr int kRounds = (PLACE::kAccesses * kStep + kTogether - 1) / kTogether;
  static_assert(kTogether % kStep == 0);
  alignas(16) Element scale[kRounds * kTogether], shift[kRounds * kTogether];

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
        float factor[kPart], sum[kPart];
        add_table(factor, scales.load(column), scales.load_table(column));
        add_table(sum, shifts.load(column), shifts.load_table(column));
#pragma unroll
        for (int j = 0; j < kPart; ++j) factor[j] = __fadd_rn(1.0f, factor[j]);
        store_row<Cache::normal>(&scale[target + kOffset], from_floats<float, kPart>(factor));
        store_row<Cache::normal>(&shift[target + kOffset], from_floats<float, kPart>(sum));
      } else {
        const auto factor = modulated ? one_plus(scales.load(column)) : filled<T, kPart>(kNoWeight);
        store_row<Cache::normal>(&scale[target + kOffset], factor);
        store_row<Cache::normal>(&shift[target + kOffset], modulated ? shifts.load(column) : filled<T, kPart>(kNoShift));
      }
    });
  }

  // Access i of norm(row) * (1 + scale) + shift.
  __device__ __forceinline__ Pack<T, N> modulate(const Pack<T, N>& v, const Statistics& statistics, const PLACE& place, int i) const {
    float n[N];
    to_floats(n, v);
#pragma unroll
    for (int j = 0; j < N; ++j) n[j] = __fmul_rn(statistics.rstd, __fsub_rn(n[j], statistics.mean));
    const int thread = place.first / N;
    if constexpr (TABLES) {
      each(std::make_integer_sequence<int, kParts>{}, [&](auto part) {
        const auto factor = load_row<Cache::normal, float, kPart>(&scale[at(i, thread, part)]);
        const auto sum = load_row<Cache::normal, float, kPart>(&shift[at(i, thread, part)]);
#pragma unroll
        for (int j = 0; j < kPart; ++j) {
          float& element = n[part * kPart + j];
          element = __fadd_rn(__fmul_rn(element, factor.v[j]), sum.v[j]);
        }
      });
      return from_floats<T, N>(n);
    } else {
      const auto factor = load_row<Cache::normal, T, N>(&scale[at(i, thread, 0)]);
      const auto sum = load_row<Cache::normal, T, N>(&shift[at(i, thread, 0)]);
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
template <class T, class M, bool TABLES, class PLACE, class SHAPE>
struct WalkingMemory {
  SharedModulations<T, M, TABLES, PLACE, SHAPE::kThreads> modulations;
  alignas(16) T next[SHAPE::kRows][PLACE::kAccesses * PLACE::kStep];  // the row that each warp goes on to
};

// 16 bytes into shared memory, past the registers. Who asked for them may read them after the wait.
__device__ __forceinline__ void copy_ahead(void* target, const void* source) {
#ifdef __CUDA_ARCH__
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(source) : "memory");
#else
  __builtin_memcpy(target, source, 16);
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

template <class T, class M, Extras EXTRAS, bool ROUND, class TILES, class SHAPE>
__global__ void __launch_bounds__(SHAPE::kThreads, TILES::kBlocks) walking_kernel(const Problem p) {
  using R = Row<T, M, EXTRAS, false, ROUND, TILES, SHAPE>;
  using Place = typename R::Place;
  constexpr bool kTables = EXTRAS == Extras::tables;
  static_assert(SHAPE::kThreadsPerRow == 32 && SHAPE::kAhead == 0 && ROUND != kTables);
  auto& memory = launched_with<WalkingMemory<T, M, kTables, Place, SHAPE>>();
  __shared__ Exchange exchange;  // of rows that several warps have: unused, as the next
  __shared__ uint32_t maxima[kMaxWarps];
  const Place place(p);
  const int64_t batch = blockIdx.y;
  const unsigned tokens = static_cast<unsigned>(p.tokens), warp = threadIdx.x / 32;
  // The warps of a block that have no row of their own work on the last one too: so all of them go
  // the same way, and the compiler knows it.
  const auto own = [&](unsigned first) { return first + warp < tokens ? first + warp : tokens - 1; };
  const T* const x = static_cast<const T*>(p.x.data) + batch * p.x.batch_stride + place.first;
  T* const next = &memory.next[warp][place.first];
  const auto fetch = [&](unsigned token) {
    const T* const source = x + token * p.x.token_stride;
    place.each([&](auto i) { copy_ahead(next + i * Place::kStep, source + i * Place::kStep); });
  };
  wait_for_previous_kernel();
  unsigned first = blockIdx.x * SHAPE::kRows;
  fetch(own(first));
  memory.modulations.fill(p, batch);
  __syncthreads();
  while (first < tokens) {
    typename R::Elements v;
    wait_for_copies();
    place.each([&](auto i) { v[i] = load_row<Cache::normal, T, R::N>(next + i * Place::kStep); });
    const Token at(batch, own(first));
    const R row(p, place, at);
    typename R::Gate::Slots gate;
    typename R::Gate::TableSlots gate_table;
    typename R::ScaleShift::Slots slots;
    typename R::ScaleShift::TableSlots table_slots;
    const typename R::Modulations none{{{p.gate, at, p.index, 0}, gate, gate_table},
                                       {{p.scale, at, p.index, 0}, slots, table_slots},
                                       {{p.shift, at, p.index, 0}, slots, table_slots}};
    const Statistics statistics = row.statistics(v, none, exchange);
    keep_packed(v);
    first += gridDim.x * SHAPE::kRows;
    if (first < tokens) fetch(own(first));  // the statistics have read all of this row
    const auto make = [&](auto i) { return memory.modulations.modulate(v[i], statistics, place, i); };
    row.quantize(v, make, row.target(), maxima);
  }
}

}  // namespace ditnorm
