// How the elements of a row are shared among the threads of a block.
#pragma once
#include <cstdint>

namespace ditnorm {

// ATen's norms, whose order of sums the kernels replay (statistics.cuh), have 128 lanes, which take
// groups of 4 elements in turn.
constexpr int kLanes = 128;
constexpr int kGroup = 4;
constexpr int kTile = kLanes * kGroup;  // the elements that all lanes together take at a time

// LANES: how many of ATen's lanes one thread stands in for. With 4 a row is a warp's, and no thread
// waits for another warp.
// AHEAD: how many accesses ahead of its use a modulation is asked for, or one of the two constants
// below.
// ROWS: of one block at a time, neighbours. A block of several goes on to others, and all of them
// share their modulations (walking_kernel.cuh).
template <int LANES, int AHEAD, int ROWS = 1>
struct Shape {
  static constexpr int kLanesPerThread = LANES;
  static constexpr int kRows = ROWS;
  static constexpr int kThreadsPerRow = kLanes / LANES;
  static constexpr int kThreads = ROWS * kThreadsPerRow;
  static constexpr int kAhead = AHEAD;
  template <class T>
  static constexpr int kElements = LANES * kGroup * sizeof(T) < 16 ? LANES * kGroup : 16 / sizeof(T);  // of one access
};

// All of a row's modulations are asked for together with x, or as soon as x has arrived. That saves
// a wait for memory, but they take registers, and so fewer rows are under way. (The gate, which is
// needed first, comes with x in both.)
constexpr int kWithRow = 1 << 20, kAfterRow = kWithRow + 1;

// The rows that a kernel serves: those of at most TILES tiles, of which the first FULL are full for
// certain. Where all of them are, nothing of a row is conditional. BLOCKS: how many blocks a multiprocessor shall hold at least
// (__launch_bounds__); 0 leaves that to ptxas.
template <int TILES, int FULL, int BLOCKS = 0>
struct Tiles {
  static constexpr int kCount = TILES;
  static constexpr int kFull = FULL;
  static constexpr int kBlocks = BLOCKS;
  static constexpr bool kExact = FULL == TILES;

  static bool serves(int64_t width) {
    constexpr int64_t kMost = TILES * kTile;
    return kExact ? width == kMost : width > FULL * kTile && width <= kMost;
  }
};

}  // namespace ditnorm
