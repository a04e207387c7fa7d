// How a row is shared among threads, and which kernels there are. The choices are measurements: docs/kernels.md.
#pragma once
#include <cstddef>

#include "problem.h"

namespace ditnorm {

// Of ATen's norms, which the kernels replay (statistics.cuh): 128 lanes take groups of 4 elements.
constexpr int kLanes = 128;
constexpr int kGroup = 4;
constexpr int kTile = kLanes * kGroup;  // the elements that all lanes together take at a time

// What a kernel serves beside modulations: nothing; the norm's affine in the dtype of x; tables for all modulations; or any of these, and
// an affine in float32, which it finds out at run time.
enum class Extras { none, affine, tables, any };

// LANES: of ATen's, that one thread is. AHEAD: how many accesses ahead of its use a modulation is asked for.
template <int LANES, int AHEAD>
struct Shape {
  static constexpr int kLanesPerThread = LANES;
  static constexpr int kThreads = kLanes / LANES;
  static constexpr int kAhead = AHEAD;
  template <class T>
  static constexpr int kElements = LANES * kGroup * sizeof(T) < 16 ? LANES * kGroup : 16 / sizeof(T);  // of one access
};

// AHEAD: all of a row's modulations, together with x or as soon as x has arrived: one wait for memory less, but they take registers and so
// fewer rows are under way. (The gate, which is needed first, comes with x in both.)
constexpr int kWithRow = 1 << 20, kAfterRow = kWithRow + 1;

// The tiles that a row is rounded up to. Each number is a set of kernels.
constexpr int kItems[] = {2, 3, 4, 6, 8, 10, 12};
constexpr int kMaxItems = 12;

// The largest number of tiles that a smaller kernel serves: so many are full for certain.
constexpr int full_tiles(int items) {
  int full = 0;
  for (int smaller : kItems) {
    if (smaller < items) full = smaller;
  }
  return full;
}
template <int ITEMS>
constexpr int kFullTiles = full_tiles(ITEMS);

// Narrow rows are mostly reduction and bookkeeping, of which two lanes a thread have less; wide ones wait for memory, with more threads.
constexpr bool narrow(int items) { return items <= 4; }
constexpr int lanes_per_thread(size_t element_size, int items) { return element_size == 2 && narrow(items) ? 2 : 1; }

constexpr int64_t kFewRows = 512;  // not even four a multiprocessor of an H200: nothing hides a row's waits for memory

// Half-precision modulations, alone or with an affine, stay behind the row in the memory's queues, and the reduction hides the wait for
// them. float16 with "single" rounding, most of which is conversions, was slower with that.
constexpr int half_ahead(bool fp16, Extras extras, bool round) { return fp16 && extras == Extras::none && !round ? kWithRow : kAfterRow; }

// Beside an affine without the residual, where many rows share their modulations: these come from L1, and all at once they take registers
// that more rows under way are worth. Rows of 2 tiles are too short to gain.
constexpr int64_t kManyRows = 2048;
constexpr bool shared_pays(bool residual, int items) { return !residual && items > 2; }
constexpr int kSharedAhead = 1;

// Half-precision modulations with tables, which take twice the registers. Without the residual only few rows have kernels for them.
constexpr int tables_ahead(bool residual, int items) { return !residual ? kAfterRow : narrow(items) ? 2 : 5; }

struct Ahead {
  int few_rows, many_rows;
};

// All others.
constexpr Ahead ahead(size_t element_size, size_t modulation_size, bool residual, int items) {
  if (element_size == 4) return {1, 1};                               // no registers for more
  if (modulation_size == 2 && residual) return {kWithRow, kWithRow};  // next to the two rows' registers these don't matter
  if (residual) return {kWithRow, 2};
  const int many_rows = narrow(items) ? 0 : 1;
  return {modulation_size == 2 ? many_rows : kWithRow, many_rows};
}

// For __launch_bounds__. Left alone (0), ptxas spills a register or two in these kernels to reach an occupancy that it likes.
constexpr int min_blocks(size_t element_size, size_t modulation_size, Extras extras, bool residual, int items, int ahead) {
  const bool half_modulations = modulation_size == 2;
  if (extras == Extras::tables) return ahead == kAfterRow ? 2 : items == 8 ? 3 : 0;
  if (extras == Extras::none && residual && items == 12 && ahead == kAfterRow) return 4;
  if (extras != Extras::any || residual || ahead > 1) return 0;
  if (element_size == 2 && items == 10) return half_modulations ? 8 : 7;
  if (half_modulations && items <= 3) return 16;
  return 0;
}

}  // namespace ditnorm
