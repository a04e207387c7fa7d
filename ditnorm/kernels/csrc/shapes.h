// How a row is shared among threads, and which kernels there are. The choices are measurements: docs/kernels.md.
#pragma once
#include <cstddef>

#include "problem.h"

namespace ditnorm {

// Of ATen's norms, which the kernels replay (statistics.cuh): 128 lanes take groups of 4 elements.
constexpr int kLanes = 128;
constexpr int kGroup = 4;
constexpr int kTile = kLanes * kGroup;  // the elements that all lanes together take at a time

// LANES: of ATen's, that one thread is. AHEAD: how many accesses ahead of its use a modulation is asked for.
template <int LANES, int AHEAD>
struct Shape {
  static constexpr int kLanesPerThread = LANES;
  static constexpr int kThreads = kLanes / LANES;
  static constexpr int kAhead = AHEAD;
  template <class T>
  static constexpr int kElements = LANES * kGroup * sizeof(T) < 16 ? LANES * kGroup : 16 / sizeof(T);  // of one access
};

// AHEAD: together with the row. One wait for memory less, but the modulations take registers and so fewer rows are under way.
constexpr int kWholeRow = 1 << 20;

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

struct Ahead {
  int few_rows, many_rows;
};

constexpr Ahead ahead(size_t element_size, size_t modulation_size, bool residual, int items) {
  if (element_size == 4) return {1, 1};                                 // no registers for more
  if (modulation_size == 2 && residual) return {kWholeRow, kWholeRow};  // next to the two rows' registers these don't matter
  if (residual) return {kWholeRow, 2};
  if (narrow(items)) return {kWholeRow, 0};
  return {kWholeRow, 1};
}

// For __launch_bounds__. Left alone (0), ptxas spills a register or two in these kernels to reach an occupancy that it likes.
constexpr int min_blocks(bool fp16, size_t element_size, size_t modulation_size, bool residual, bool round, int items, int ahead) {
  if (residual || ahead > 1) return 0;
  if (round && items == 10) return 8;
  if (round && items == 6 && fp16) return 9;
  if (!round && items == 10 && modulation_size > element_size) return 7;
  if (!round && items <= 3 && modulation_size == 2) return 16;
  return 0;
}

}  // namespace ditnorm
