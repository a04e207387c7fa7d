// GELU before a quantiser, of many rows, which takes more instructions than all the rest: it is looked
// up in shared memory (gelu_table.cuh), by blocks that go from row to row.
#pragma once
#include "gelu_table.cuh"
#include "launch.h"
#include "quantize.cuh"

namespace ditnorm {

// Each block has a table and a row at a time. What a thread has of the next one is on its way while
// it waits for the others. KNOWN: all rows have one scale, which is known.
template <bool KNOWN>
__global__ void __launch_bounds__(kMaxTableThreads, 2) gelu_table_quantize_kernel(const QuantizeProblem p) {
  using T = __nv_bfloat16;
  constexpr int N = 16 / sizeof(T);
  constexpr auto kEach = std::make_integer_sequence<int, kTableItems>{};
  __shared__ GeluTable table;
  __shared__ uint32_t exchange[2][kMaxWarps];
  table.fill();
  const int width = static_cast<int>(p.width), first = static_cast<int>(threadIdx.x) * N, step = static_cast<int>(blockDim.x) * N;
  const int64_t rows = p.batch * p.tokens;
  Pack<T, N> x[kTableItems], y[kTableItems];
  const auto load = [&](int64_t row) {
    const T* const source = static_cast<const T*>(p.x.data) + row * p.x.token_stride;
    // Behind the row is its end once more: no branch waits, and the largest is the same.
    each(kEach, [&](auto i) {
      const int column = first + i * step < width ? first + i * step : width - N;
      x[i] = load_row<Cache::streaming, T, N>(source + column);
    });
  };
  wait_for_previous_kernel();
  load(blockIdx.x);
  __syncthreads();
  const Law law = KNOWN ? Law::float8_tensor : p.out.law;
  const auto by_largest = [&](uint32_t bits, int turn) {
    return divide_by(scale_of<T>(float_of(reduce_max(bits, exchange[turn])), law), law);
  };
  const Divisor of_all = KNOWN ? by_largest(amax_of_all(p), 0) : Divisor{};
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
    Amax<T> amax;
    each(kEach, [&](auto i) {
      y[i] = table.of(x[i]);
      if constexpr (!KNOWN) amax.take(y[i]);
    });
    load(row + gridDim.x < rows ? row + gridDim.x : row);
    const Divisor by = KNOWN ? of_all : by_largest(amax.bits(), turn);
    if (threadIdx.x == 0 && (!KNOWN || row == 0)) p.out.scale[row] = by.scale;
    store_quantized(y, by, p.out.values + row * p.width + first, step, [&](int i) { return first + i * step < width; });
  }
}

// The same for wide rows, by a table without conflicts to speak of, for which a multiprocessor of
// compute capability 9.0 or 10.0 has room once. So a block has several rows at a time, each with
// `threads` of its threads, which wait for no others. The next row is on its way to shared memory all
// the while that this one is worked on; a thread reads what it asked for itself.
struct GeluRows {
  GeluCopies::Memory table;
  uint4 next[kTableItems][kMaxCopiesThreads];
};

template <bool KNOWN>
__global__ void __launch_bounds__(kMaxCopiesThreads, 1) gelu_copies_quantize_kernel(const QuantizeProblem p, const unsigned threads) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using T = __nv_bfloat16;
  constexpr int N = 16 / sizeof(T);
  constexpr auto kEach = std::make_integer_sequence<int, kTableItems>{};
  // In place of a row's largest |y|: there is a number that isn't finite, or all are tiny, not all 0.
  constexpr uint32_t kNotFinite = 0x7f80u << 16, kTiny = 1, kLeast = 0x0d80u << 16;  // 2**-100
  auto& memory = launched_with<GeluRows>();
  const GeluCopies table(memory.table, p.gelu ? 0x5410u : 0);
  __shared__ uint32_t exchange[2][kMaxWarps];
  table.fill();
  const WarpGroup group(threads);
  const int width = static_cast<int>(p.width), first = static_cast<int>(threadIdx.x - group.first) * N,
            step = static_cast<int>(threads) * N;
  const auto rows = static_cast<unsigned>(p.batch * p.tokens), together = blockDim.x / threads, own = group.first / threads;
  // Of a thread's accesses only the last may lie behind the row (kNarrowestCopiesRow), and reads its
  // end once more then: no branch waits, and the largest is the same.
  const bool ends_inside = first + (kTableItems - 1) * step < width;
  const int last = ends_inside ? (kTableItems - 1) * step : width - N - first;
  const auto inside = [&](int i) { return i < kTableItems - 1 || ends_inside; };
  const auto source = [&](unsigned row) { return static_cast<const T*>(p.x.data) + first + row * p.x.token_stride; };
  uint4* const next = &memory.next[0][threadIdx.x];
  const auto fetch = [&](unsigned row) {
    const T* const from = source(row);
    each(kEach, [&](auto i) { copy_ahead(next + i * blockDim.x, from + (i < kTableItems - 1 ? i * step : last)); });
  };
  wait_for_previous_kernel();
  // Whoever has no row of his own takes the last one, so that all go the same way, and stores nothing.
  const auto row_of = [&](unsigned turn) { return turn + own < rows ? turn + own : rows - 1; };
  unsigned turn = blockIdx.x * together;
  fetch(row_of(turn));
  __syncthreads();
  const Law law = KNOWN ? Law::float8_tensor : p.out.law;
  const auto divisor = [&](uint32_t largest) { return divide_by(scale_of<T>(float_of(largest), law), law); };
  constexpr unsigned kTurn = 1, kLeft = 2;  // whose places in exchange it is; rows are left for later
  unsigned state = 0;
  Divisor of_all{};
  if constexpr (KNOWN) {
    const uint32_t bits = reduce_max(amax_of_all(p), exchange[0]);
    of_all = divisor(bits);
    if (blockIdx.x == 0 && threadIdx.x == 0) p.out.scale[0] = of_all.scale;
    if (unlikely(bits >= kNotFinite || (bits < kLeast && bits != 0))) turn = rows, state = kLeft;
  }
  for (; turn < rows; state ^= kTurn) {
    const unsigned row = row_of(turn);
    const bool has_row = turn + own < rows;
    Pack<T, N> x[kTableItems], y[kTableItems];
    wait_for_copies();
    each(kEach, [&](auto i) { x[i].words[0] = next[i * blockDim.x]; });
    turn += gridDim.x * together;
    if (turn < rows) fetch(row_of(turn));
    GeluCopies::Largest largest;
    each(kEach, [&](auto i) { y[i] = table.of(x[i], largest); });
    Divisor by = of_all;
    bool later = false;
    if constexpr (!KNOWN) {
      const auto of_both = [](uint32_t halves) { return Amax<float>::larger(halves << 16, halves & 0xffff0000u); };
      uint32_t bits = of_both(largest.y);
      if (bits < kLeast && largest.x != 0) bits = kTiny;
      if (of_both(largest.x) >= kNotFinite) bits = kNotFinite;
      bits = group.reduce_max(bits, exchange[state & kTurn]);
      later = bits == kTiny || bits == kNotFinite;
      if (later) state |= kLeft;
      by = divisor(bits);
    }
    if (!has_row) break;
    if (!KNOWN && first == 0) p.out.scale[row] = later ? kNaN : by.scale;
    store_quantized(y, by, p.out.values + row * p.width + first, step, inside);
  }
  if (!unlikely((state & kLeft) != 0)) return;
  group.wait();
  for (unsigned row = blockIdx.x * together + own; row < rows; row += gridDim.x * together) {
    if (!KNOWN && p.out.scale[row] == p.out.scale[row]) continue;  // not NaN: done
    const auto part = [&](int column) { return activated<true>(load_row<Cache::normal, T, N>(source(row) + column - first)); };
    Divisor by = of_all;
    if constexpr (!KNOWN) {
      Amax<T> amax;
      for (int column = first; column < width; column += step) amax.take(part(column));
      by = divisor(group.reduce_max(amax.bits(), exchange[state & kTurn]));
    }
    for (int column = first; column < width; column += step) {
      const Pack<T, N> result[1] = {part(column)};
      store_quantized(result, by, p.out.values + row * p.width + column, 0, [](int) { return true; });
    }
    if (!KNOWN && first == 0) p.out.scale[row] = by.scale;
    state ^= kTurn;
  }
#endif
}

// Whether the table pays, and the rows lie evenly.
inline bool table_serves(const QuantizeProblem& p) {
  return p.batch * p.tokens >= kFewestTableRows && p.width >= kNarrowestTableRow && p.width <= kMaxTableThreads * kTableItems * 8 &&
         (p.batch == 1 || p.x.batch_stride == p.tokens * p.x.token_stride);
}

template <bool KNOWN>
int launch_gelu_table_kernel(const QuantizeProblem& p, void* stream) {
  const int64_t rows = p.batch * p.tokens;
  const auto threads = static_cast<unsigned>((p.width / 8 + kTableItems * 32 - 1) / (kTableItems * 32) * 32);
  const auto grid = [](int64_t wanted, int64_t resident) { return dim3(static_cast<unsigned>(std::min(wanted, resident))); };
  if (p.width >= kNarrowestCopiesRow && waits_for_previous_kernel(&gelu_copies_quantize_kernel<KNOWN>)) {
    constexpr auto kKernel = &gelu_copies_quantize_kernel<KNOWN>;
    constexpr int kBytes = sizeof(GeluRows);
    const unsigned together = kMaxCopiesThreads / threads;
    const int64_t resident = resident_blocks<kKernel>(together * threads, kBytes), wanted = (rows + together - 1) / together;
    if (resident > 0) return launch_with(kBytes, kKernel, grid(wanted, resident), together * threads, stream, p, threads);
  }
  constexpr auto kKernel = &gelu_table_quantize_kernel<KNOWN>;
  return launch(kKernel, grid(rows, resident_blocks<kKernel>(threads)), threads, stream, p);
}

}  // namespace ditnorm
