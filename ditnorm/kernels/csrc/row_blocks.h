// How rows are shared out among blocks by the kernels that have one access of 16 bytes a thread,
// and that are as fast as plain copies where blocks are small and few of their threads idle.
#pragma once
#include <cstdint>
#include <initializer_list>

namespace ditnorm {

constexpr int kMostRowThreads = 256;

// On an H200 blocks that move 4.6 KB reached 88 % of the speed of light, those that move 6 KB all of
// it. That a GPU starts only so many blocks a microsecond is inferred from that, not measured.
constexpr int64_t kLeastBlockBytes = 6144;

struct RowBlocks {
  unsigned count, threads;  // of one row, of one block
};

// `arrays`: those that each element is loaded from and stored to, all of one dtype.
inline RowBlocks row_blocks(int64_t accesses, int arrays) {
  const auto count = [&](unsigned threads) { return static_cast<unsigned>((accesses + threads - 1) / threads); };
  unsigned best = kMostRowThreads;
  for (const unsigned threads : {160, 256, 192, 128}) {  // the best last
    if (threads * 16 * arrays >= kLeastBlockBytes && count(threads) * threads <= count(best) * best) best = threads;
  }
  return {count(best), best};
}

}  // namespace ditnorm
