// Choosing among the kernels of QK normalisation and rotary embedding and of its gradients, for one
// dtype. Each has a file of its own (qk_norm_rope_bf16.cu, qk_backward_bf16.cu, ...), so that they
// compile side by side.
#pragma once
#include <algorithm>
#include <iterator>
#include <utility>

#include "any_qk_kernel.cuh"
#include "dispatch.cuh"
#include "head_kernels.cuh"
#include "qk_backward.cuh"
#include "variants.h"

namespace ditnorm {

inline bool fast_rotary(const Rotary& r) {
  if (r.cos == nullptr) return true;
  const auto aligned = [&](const float* table) {
    const auto at = reinterpret_cast<uintptr_t>(table) % 16;
    return at == 0 || (r.step == 2 && at == sizeof(float));
  };
  if (!aligned(r.cos) || !aligned(r.sin) || r.batch_stride % 4 != 0 || r.token_stride % 4 != 0) return false;
  if (r.halves) return r.step == 1 && r.head_stride % 4 == 0;
  return r.head_stride == 0 && (r.step == 1 || (r.step == 2 && !r.per_element));
}

// Whether everything is of one dtype and aligned, so that a fast kernel may serve it.
inline bool fast_heads(const HeadProblem& p) {
  if (p.head_dim % 8 != 0) return false;
  int64_t blocks = 0;
  for (const HeadStream& stream : p.streams) {
    if (!fast_rotary(stream.rotary)) return false;
    for (int64_t i = 0; i < stream.count; ++i) {
      const HeadRows& rows = stream.parts[i];
      if (!aligned16(rows.data, p.dtype, rows.batch_stride, rows.token_stride) || rows.width * bytes(p.dtype) % 16 != 0) return false;
      if (!aligned16(rows.gradient, p.dtype, rows.gradient_batch_stride, rows.gradient_token_stride)) return false;
      if (rows.weight.data != nullptr && (rows.weight.dtype != p.dtype || !aligned16(rows.weight.data, p.dtype, 0, 0))) return false;
    }
    blocks += stream.tokens * stream.count;
  }
  return blocks <= 0x7fffffff && p.batch <= 0xffff;
}

// How any_head_kernel shares out the heads of a row.
struct Split {
  int64_t items, chunks;
  unsigned threads;

  int64_t slots() const { return items * chunks * threads; }
};

inline Split split_heads(int64_t heads, int64_t threads_of_head, int64_t items) {
  const auto parts = [](int64_t all, int64_t size) { return (all + size - 1) / size; };
  const int64_t chunks = parts(heads, kHeadThreads / threads_of_head * items);
  const int64_t threads = parts(heads, chunks * items) * threads_of_head;
  return {items, chunks, static_cast<unsigned>(parts(threads, 32) * 32)};
}

// What a kernel of the norm across heads computes, and the table of those that do.
struct Across {
  static constexpr auto& kKernels = variants::kAcrossHeads;
};
struct AcrossHalves {
  static constexpr auto& kKernels = variants::kAcrossHalves;
};
struct AcrossBackward {
  static constexpr auto& kKernels = variants::kAcrossHeadsBackward;
};

// Goes through the table of WHAT. Returns kNotServed where none of its kernels serves rows of this
// width.
template <class T, bool ROUND, class WHAT>
class AcrossLaunch {
 public:
  AcrossLaunch(const HeadProblem& p, int64_t width, dim3 grid, void* stream) : p_(p), width_(width), grid_(grid), stream_(stream) {}

  int run() {
    try_all(std::make_integer_sequence<int, std::size(WHAT::kKernels)>{});
    return result_;
  }

 private:
  static constexpr const AcrossHeads& heads(int i) { return WHAT::kKernels[i]; }

  template <int... HEADS>
  void try_all(std::integer_sequence<int, HEADS...>) {
    (void)(try_widths<HEADS>(std::make_integer_sequence<int, heads(HEADS).widths.count()>{}) || ...);
  }
  template <int HEADS, int... WIDTHS>
  bool try_widths(std::integer_sequence<int, WIDTHS...>) {
    return (try_width<HEADS, WIDTHS>() || ...);
  }
  template <int HEADS, int WIDTH>
  bool try_width() {
    constexpr const AcrossHeads& kHeads = heads(HEADS);
    if constexpr (kHeads.x == dtype_of<T>) {
      using Row = Tiles<kHeads.widths.list[WIDTH].tiles, kHeads.widths.full(WIDTH), kHeads.widths.list[WIDTH].blocks>;
      if (!Row::serves(width_)) return false;
      if constexpr (std::is_same_v<WHAT, AcrossBackward>) {
        result_ = launch(&across_backward_kernel<T, ROUND, Row, kHeads.lanes>, grid_, kLanes / kHeads.lanes, stream_, p_);
      } else {
        constexpr bool kHalves = std::is_same_v<WHAT, AcrossHalves>;
        result_ = launch(&across_kernel<T, ROUND, Row, kHeads.lanes, kHalves>, grid_, kLanes / kHeads.lanes, stream_, p_);
      }
      return true;
    }
    return false;
  }

  const HeadProblem& p_;
  const int64_t width_;
  const dim3 grid_;
  void* const stream_;
  int result_ = kNotServed;
};

// Whether there are kernels of heads of HEAD elements. Gradients have fewer, as in variants.h: those
// of the heads and dtypes of models that are trained.
template <class T, bool BACKWARD, int HEAD>
constexpr bool kHasHead = (HEAD < 256 || sizeof(T) == 2) && !(BACKWARD && (HEAD == 256 || std::is_same_v<T, __half>));

// The kernel of rows that are taken ITEMS accesses at a time, with heads of HEAD elements.
template <class T, bool ROUND, bool BACKWARD, bool TWICE, int ITEMS, int HEAD>
constexpr auto head_kernel_of() {
  if constexpr (BACKWARD) {
    return &head_backward_kernel<T, ROUND, TWICE, ITEMS, HEAD>;
  } else {
    return &head_kernel<T, ROUND, TWICE, ITEMS, HEAD>;
  }
}

template <class T, bool ROUND, bool BACKWARD>
int launch_qk_law(const HeadProblem& p, void* stream) {
  int64_t blocks = 0, widest = 0, narrowest = INT64_MAX, norms = 0;
  bool per_element = false, halves = false;
  for (const HeadStream& s : p.streams) {
    blocks += s.tokens * s.count;
    per_element |= s.rotary.per_element;
    halves |= s.rotary.halves;
    for (const HeadRows *rows = s.parts, *end = rows + s.count; rows != end; ++rows) {
      widest = std::max(widest, rows->width);
      narrowest = std::min(narrowest, rows->width);
      norms = std::max(norms, p.batch * s.tokens * (p.across ? 1 : rows->width / p.head_dim));
    }
  }
  constexpr int64_t kElements = kHeadThreads * 16 / sizeof(T);  // of a block's one access
  int error = 0;
  bool served = false;
  const auto serve = [&](auto kernel, unsigned threads, int64_t chunks = 1) {
    served = true;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.batch), static_cast<unsigned>(chunks));
    error = launch(kernel, grid, threads, stream, p);
  };
  const bool fast = fast_heads(p);
  const bool torchs = p.eager && !p.twice;  // must have the order and the roundings of torch's RMSNorm
  if (fast && p.across && (torchs || !p.eager) && kTile % p.head_dim == 0 && narrowest == widest && !per_element) {
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.batch));
    int result = kNotServed;
    if (!halves) {
      result = AcrossLaunch<T, ROUND, std::conditional_t<BACKWARD, AcrossBackward, Across>>(p, widest, grid, stream).run();
    } else if constexpr (!BACKWARD) {
      if (p.head_dim <= 32 * kGroup) result = AcrossLaunch<T, ROUND, AcrossHalves>(p, widest, grid, stream).run();
    }
    if (result != kNotServed) return result;
  } else if (fast && !p.across && !halves) {
    const auto chunks = [&](int64_t items) { return (widest + kElements * items - 1) / (kElements * items); };
    const auto serve_law = [&](auto twice, auto head) {
      if (chunks(3) * 3 <= chunks(2) * 2) {
        serve(head_kernel_of<T, ROUND, BACKWARD, twice, 3, head>(), kHeadThreads, chunks(3));
      } else {
        serve(head_kernel_of<T, ROUND, BACKWARD, twice, 2, head>(), kHeadThreads, chunks(2));
      }
    };
    const auto serve_head = [&](auto head) {
      if constexpr (kHasHead<T, BACKWARD, head>) {
        if (p.head_dim != head) return;
        if constexpr (ROUND || std::is_same_v<T, float>) {
          if (torchs) return serve_law(std::false_type{}, head);
        }
        serve_law(std::true_type{}, head);
      }
    };
    serve_head(Constant<64>{}), serve_head(Constant<128>{}), serve_head(Constant<256>{});
    [[maybe_unused]] const int64_t of_head = p.head_dim * static_cast<int64_t>(sizeof(T)) / 16;  // threads
    if constexpr (!BACKWARD) {
      if (!served && !torchs && p.head_dim >= kLeastHead && of_head <= kHeadThreads) {
        const Split by4 = split_heads(widest / p.head_dim, of_head, 4), by3 = split_heads(widest / p.head_dim, of_head, 3);
        if (by4.slots() <= by3.slots()) {
          serve(&any_head_kernel<T, ROUND, 4>, by4.threads, by4.chunks);
        } else {
          serve(&any_head_kernel<T, ROUND, 3>, by3.threads, by3.chunks);
        }
      }
    }
  }
  if (served) return error;
  constexpr int kNorms = kLanes / 32;  // of a block
  dim3 grid = ditnorm::blocks((norms + kNorms - 1) / kNorms);
  grid.y = 2 * kParts;
  if constexpr (BACKWARD) {
    return launch(&any_qk_backward_kernel<T>, grid, kLanes, stream, p);
  } else {
    return launch(&any_qk_kernel<T, ROUND>, grid, kLanes, stream, p);
  }
}

template <class T, bool BACKWARD>
int launch_qk_kernels(const HeadProblem& p, void* stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (p.eager) return launch_qk_law<T, true, BACKWARD>(p, stream);
  }
  return launch_qk_law<T, false, BACKWARD>(p, stream);
}

}  // namespace ditnorm
