// Quantising what a linear layer reads, alone or behind GELU, and the way back from an int8 matrix
// product.
#include "activations.cuh"
#include "dispatch.cuh"
#include "gelu_table.cuh"
#include "launch.h"
#include "quantize.cuh"

namespace ditnorm {

// The largest |x| of all rows where the law has one scale: what the blocks of amax_kernel found, or a
// norm of few rows. Each thread has a part of it.
__device__ __forceinline__ uint32_t amax_of_all(const QuantizeProblem& p) {
  uint32_t bits = 0;
  for (unsigned i = threadIdx.x; i < static_cast<unsigned>(p.partial_count); i += blockDim.x) {
    bits = Amax<float>::larger(bits, p.partials[i]);
  }
  return bits;
}

// A row stays in registers: those of a block, or where a block has several ROWS of a warp, which
// waits for nobody. Left alone, ptxas spills one of the widest rows' for an occupancy that it likes.
template <class T, bool GELU, int ITEMS, int ROWS = 1>
__global__ void __launch_bounds__(ROWS > 1 ? ROWS * 32 : kMaxQuantizeThreads, ROWS == 1 && ITEMS == 8 ? 1 : 0)
    quantize_kernel(const QuantizeProblem p) {
  constexpr int N = 16 / sizeof(T);
  __shared__ uint32_t exchange[kMaxWarps];
  constexpr auto kEach = std::make_integer_sequence<int, ITEMS>{};
  constexpr bool kWarps = ROWS > 1;
  const unsigned threads = kWarps ? 32 : blockDim.x, thread = kWarps ? threadIdx.x % 32 : threadIdx.x;
  const int width = static_cast<int>(p.width), first = static_cast<int>(thread) * N, step = static_cast<int>(threads) * N;
  const auto inside = [&](int i) { return first + i * step < width; };
  wait_for_previous_kernel();
  const int64_t token = kWarps ? static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.x / 32 : blockIdx.x;
  if (kWarps && token >= p.tokens) return;
  const int64_t batch = blockIdx.y, row = batch * p.tokens + token;
  const T* const x = static_cast<const T*>(p.x.data) + batch * p.x.batch_stride + token * p.x.token_stride + first;
  Pack<T, N> v[ITEMS];
  each(kEach, [&](auto i) {
    if (inside(i)) v[i] = load_row<Cache::streaming, T, N>(x + i * step);
  });
  const bool known = !kWarps && p.partials != nullptr;
  uint32_t bits = known ? amax_of_all(p) : 0;
  Amax<T> amax;
  each(kEach, [&](auto i) {
    if (!inside(i)) return;
    v[i] = activated<GELU>(v[i]);
    amax.take(v[i]);
  });
  if (!known) bits = amax.bits();
  const uint32_t largest = reduce_max<kWarps ? 32 : 0>(bits, exchange);
  const Divisor by = divide_by(scale_of<T>(float_of(largest), p.out.law), p.out.law);
  if (thread == 0 && (!known || row == 0)) p.out.scale[row] = by.scale;
  store_quantized(v, by, p.out.values + row * p.width + first, step, inside);
}

// One wide row by one scale: each block of a cluster has a part of it.
__global__ void __launch_bounds__(kMaxClusterThreads) cluster_quantize_kernel(const QuantizeProblem p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using T = __nv_bfloat16;
  constexpr int N = 16 / sizeof(T);
  constexpr auto kEach = std::make_integer_sequence<int, kClusterItems>{};
  __shared__ uint32_t exchange[kMaxWarps], found[kClusterBlocks];
  const Cluster cluster;
  const int width = static_cast<int>(p.width), first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * N,
            step = static_cast<int>(kClusterBlocks * blockDim.x) * N;
  const auto inside = [&](int i) { return first + i * step < width; };
  const T* const x = static_cast<const T*>(p.x.data) + first;
  Pack<T, N> v[kClusterItems];
  wait_for_previous_kernel();
  each(kEach, [&](auto i) {
    if (inside(i)) v[i] = load_row<Cache::streaming, T, N>(x + i * step);
  });
  Amax<T> amax;
  each(kEach, [&](auto i) {
    if (inside(i)) amax.take(v[i]);
  });
  constexpr Law kLaw = Law::float8_tensor;
  const Divisor by = divide_by(scale_of<T>(float_of(cluster.reduce_max(amax.bits(), exchange, found)), kLaw), kLaw);
  if (first == 0) *p.out.scale = by.scale;
  store_quantized(v, by, p.out.values + first, step, inside);
#endif
}

// Many rows of GELU, which takes more instructions than all the rest: each block has a table of its
// results, and goes from row to row. What a thread has of the next one is on its way while it waits
// for the others. KNOWN: all rows have one scale, which is known.
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

// The largest |x| of the rows of each block, or of what GELU makes of them.
template <class T, bool GELU>
__global__ void __launch_bounds__(kAmaxThreads) amax_kernel(const QuantizeProblem p) {
  constexpr int N = 16 / sizeof(T);
  __shared__ uint32_t exchange[2][kMaxWarps];
  wait_for_previous_kernel();
  const auto amax_of = [&](auto change) {
    Amax<T> amax;
    for (int64_t row = blockIdx.x; row < p.batch * p.tokens; row += gridDim.x) {
      const int64_t batch = row / p.tokens;
      const T* const x = static_cast<const T*>(p.x.data) + batch * p.x.batch_stride + (row - batch * p.tokens) * p.x.token_stride;
      for (int64_t column = threadIdx.x * N; column < p.width; column += kAmaxThreads * N) {
        amax.take(change(load_row<Cache::normal, T, N>(x + column)));
      }
    }
    return amax;
  };
  const Amax<T> amax = amax_of([](const Pack<T, N>& x) { return x; });
  uint32_t bits;
  if constexpr (GELU) {
    // GELU grows from here on, past all that smaller numbers have: the largest of them is enough.
    constexpr float kGrows = 0.5f;
    const float most = amax.most();
    bits = reduce_max(most < kGrows ? 0 : bits_of(most) & 0x7fffffffu, exchange[0]);
    if (bits != 0 && bits <= bits_of(INFINITY)) {
      bits = bits_of(round_to<T>(gelu(float_of(bits))));
    } else {
      bits = reduce_max(amax_of([](const Pack<T, N>& x) { return activated<true>(x); }).bits(), exchange[1]);
    }
  } else {
    bits = reduce_max(amax.bits(), exchange[0]);
  }
  if (threadIdx.x == 0) p.partials[blockIdx.x] = bits;
}

// The same where that of each row is known.
__global__ void __launch_bounds__(kAmaxThreads) maxima_kernel(const QuantizeProblem p) {
  __shared__ uint32_t exchange[kMaxWarps];
  wait_for_previous_kernel();
  uint32_t bits = 0;
  for (int64_t row = blockIdx.x * kAmaxThreads + threadIdx.x; row < p.batch * p.tokens; row += gridDim.x * kAmaxThreads) {
    bits = Amax<float>::larger(bits, p.maxima[row]);
  }
  bits = reduce_max(bits, exchange);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = bits;
}

// Any width, alignment and dtype: element by element, a row is read twice.
template <bool GELU>
__device__ __forceinline__ float element(const QuantizeProblem& p, int64_t offset) {
  float v[1];
  load_elements(v, p.x.data, p.x.dtype, offset, 1);
  return GELU ? round_to(gelu(v[0]), p.x.dtype) : v[0];
}

__device__ __forceinline__ float scale_of(float amax, Law law, DType dtype) {
  switch (dtype) {
    case DType::f32: return scale_of<float>(amax, law);
    case DType::f16: return scale_of<__half>(amax, law);
    default: return scale_of<__nv_bfloat16>(amax, law);
  }
}

// `find`: whether this is the pass that finds the largest |x| of all rows, for a law that isn't per
// row.
template <bool GELU>
__global__ void __launch_bounds__(kAmaxThreads) any_quantize_kernel(const QuantizeProblem p, const bool find) {
  __shared__ uint32_t exchange[2][kMaxWarps];
  wait_for_previous_kernel();
  uint32_t largest = find || p.partials == nullptr ? 0 : amax_of_all(p);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.batch * p.tokens; row += gridDim.x, turn ^= 1) {
    const int64_t batch = row / p.tokens, x = batch * p.x.batch_stride + (row - batch * p.tokens) * p.x.token_stride;
    uint32_t bits = largest;
    if (find || p.partials == nullptr) {
      for (int64_t column = threadIdx.x; column < p.width; column += kAmaxThreads) {
        bits = Amax<float>::larger(bits, bits_of(element<GELU>(p, x + column)) & 0x7fffffffu);
      }
    }
    if (find) {
      largest = bits;
      continue;
    }
    const Divisor by = divide_by(scale_of(float_of(reduce_max(bits, exchange[turn])), p.out.law, p.x.dtype), p.out.law);
    if (threadIdx.x == 0 && (p.partials == nullptr || row == 0)) p.out.scale[row] = by.scale;
    for (int64_t column = threadIdx.x; column < p.width; column += kAmaxThreads) {
      const float v = element<GELU>(p, x + column);
      p.out.values[row * p.width + column] =
          static_cast<uint8_t>(p.out.law == Law::int8_row ? to_int8(v, by.reciprocal) : to_e4m3(__fdiv_rn(v, by.scale)));
    }
  }
  if (!find) return;
  largest = reduce_max(largest, exchange[0]);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = largest;
}

int find_partials(const QuantizeProblem& p, void* stream) {
  if (p.maxima == p.partials) return 0;
  return launch(&maxima_kernel, dim3(static_cast<unsigned>(p.partial_count)), kAmaxThreads, stream, p);
}

// Whether the table pays, and the rows lie evenly.
bool table_serves(const QuantizeProblem& p) {
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

// Of the widest row that a block has. Of models' rows, those with GELU have at most 16384 elements,
// and float16 is as rare.
template <class T, bool GELU>
constexpr bool kWidest = !GELU && std::is_same_v<T, __nv_bfloat16>;
constexpr int64_t most_accesses(bool widest) { return kMaxQuantizeThreads * (widest ? 8 : 4); }

// Whether a row by one scale takes a cluster less time than a block, or than two kernels all its
// blocks.
bool cluster_serves(int64_t accesses) {
  constexpr int64_t kLeast = kMaxQuantizeThreads * 4, kMost = kClusterBlocks * kMaxClusterThreads * kClusterItems;
  return accesses > kLeast && accesses <= kMost && runs_as_cluster<&cluster_quantize_kernel>(kMaxClusterThreads);
}

int launch_cluster_kernel(const QuantizeProblem& p, void* stream) {
  constexpr unsigned kElements = kClusterBlocks * kClusterItems * 32 * 8;  // of a warp of each block
  const auto threads = (static_cast<unsigned>(p.width) + kElements - 1) / kElements * 32;
  return launch_as(0, true, &cluster_quantize_kernel, dim3(kClusterBlocks), threads, stream, p);
}

template <class T, bool GELU>
int launch_quantize_kernel(const QuantizeProblem& p, void* stream) {
  constexpr int N = 16 / sizeof(T);
  constexpr bool kTable = GELU && std::is_same_v<T, __nv_bfloat16>;
  const int64_t accesses = p.width / N;
  if constexpr (kWidest<T, GELU>) {
    if (p.batch * p.tokens == 1 && p.out.law == Law::float8_tensor && cluster_serves(accesses)) return launch_cluster_kernel(p, stream);
  }
  if (accesses > most_accesses(kWidest<T, GELU>) && !(kTable && table_serves(p))) return kNotServed;
  if (p.partials != nullptr && p.partials != p.maxima) {
    const auto kernel = p.maxima != nullptr ? &maxima_kernel : &amax_kernel<T, GELU>;
    const int error = launch(kernel, dim3(static_cast<unsigned>(p.partial_count)), kAmaxThreads, stream, p);
    if (error != 0) return error;
  }
  if constexpr (kTable) {
    if (table_serves(p))
      return p.partials != nullptr ? launch_gelu_table_kernel<true>(p, stream) : launch_gelu_table_kernel<false>(p, stream);
  }
  if constexpr (!GELU) {
    if (p.partials == nullptr && accesses <= kNarrowItems * 32 && p.batch * p.tokens > kManyNarrowRows) {
      const dim3 grid(static_cast<unsigned>((p.tokens + kNarrowRows - 1) / kNarrowRows), static_cast<unsigned>(p.batch));
      return launch(&quantize_kernel<T, GELU, kNarrowItems, kNarrowRows>, grid, kNarrowRows * 32, stream, p);
    }
  }
  const dim3 grid(static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.batch));
  const auto go = [&](auto items) {
    const auto threads = static_cast<unsigned>((accesses + items * 32 - 1) / (items * 32) * 32);
    return launch(&quantize_kernel<T, GELU, items>, grid, threads, stream, p);
  };
  if (accesses <= 256) return go(Constant<1>{});
  if (accesses <= 768) return go(Constant<2>{});
  if constexpr (kWidest<T, GELU>) {
    if (accesses > most_accesses(false)) return go(Constant<8>{});
  }
  return go(Constant<4>{});
}

template <bool GELU>
int launch_any_quantize_kernel(const QuantizeProblem& p, void* stream) {
  if (p.partials != nullptr) {
    const dim3 grid(static_cast<unsigned>(p.partial_count));
    const int error = launch(&any_quantize_kernel<GELU>, grid, kAmaxThreads, stream, p, true);
    if (error != 0) return error;
  }
  return launch(&any_quantize_kernel<GELU>, blocks(p.batch * p.tokens), kAmaxThreads, stream, p, false);
}

template <bool GELU>
int quantize_after(const QuantizeProblem& p, void* stream) {
  const bool fits = p.tokens <= 0x7fffffff && p.batch <= 0xffff && p.width * bytes(p.x.dtype) % 16 == 0 &&
                    aligned16(p.x.data, p.x.dtype, p.x.batch_stride, p.x.token_stride);
  int result = kNotServed;
  if (fits && p.x.dtype == DType::bf16) result = launch_quantize_kernel<__nv_bfloat16, GELU>(p, stream);
  if (fits && p.x.dtype == DType::f16) result = launch_quantize_kernel<__half, GELU>(p, stream);
  return result == kNotServed ? launch_any_quantize_kernel<GELU>(p, stream) : result;
}

// Whether the current GPU multiplies float8 matrices.
#ifdef __CUDACC__
bool has_float8() {
  constexpr int kDevices = 64;
  static std::atomic<int8_t> known[kDevices];  // 0: not asked yet, 1: no, 2: yes
  int device, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  int8_t answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    answer = major * 10 + minor >= 89 ? 2 : 1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}
#else
bool has_float8() { return true; }
#endif

int quantize(const QuantizeProblem& p, void* stream) {
  if (p.out.law != Law::int8_row && !has_float8()) return cudaErrorNotSupported;
  return p.gelu ? quantize_after<true>(p, stream) : quantize_after<false>(p, stream);
}

int quantizes_as_row(const OnePiece& x, void*) {
  const int64_t accesses = x.elements / 8;
  const bool widest = x.dtype == DType::bf16 && !x.gelu;
  if (x.dtype == DType::f32 || x.elements % 8 != 0) return kNotServed;
  return accesses <= most_accesses(widest) || (widest && cluster_serves(accesses)) ? 0 : kNotServed;
}

constexpr int kProductThreads = 256;

// int32 [rows, width] -> T. One thread has 4 columns.
template <class T>
__global__ void __launch_bounds__(kProductThreads) dequantize_kernel(const ProductProblem p, const unsigned parts) {
  const int64_t row = blockIdx.x / parts;
  const int64_t column = (static_cast<int64_t>(blockIdx.x - row * parts) * kProductThreads + threadIdx.x) * 4;
  if (column >= p.width) return;
  wait_for_previous_kernel();
  const int4 product = __ldcs(reinterpret_cast<const int4*>(p.product + row * p.width + column));
  const int sums[4] = {product.x, product.y, product.z, product.w};
  const float scale = __ldg(p.scale + row);
  float y[4], weight_scale[4], bias[4];
  to_floats(weight_scale, load_pack<float, 4>(p.weight_scale + column));
  if (p.bias != nullptr) to_floats(bias, load_pack<T, 4>(static_cast<const T*>(p.bias) + column));
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    y[j] = __fmul_rn(round_to<T>(__fmul_rn(__int2float_rn(sums[j]), scale)), weight_scale[j]);
    if (p.bias != nullptr) y[j] = __fadd_rn(y[j], bias[j]);
  }
  store_row<Cache::normal>(static_cast<T*>(p.y) + row * p.width + column, from_floats<T, 4>(y));
}

int dequantize_product(const ProductProblem& p, void* stream) {
  const auto parts = static_cast<unsigned>((p.width + kProductThreads * 4 - 1) / (kProductThreads * 4));
  const dim3 grid(static_cast<unsigned>(p.rows) * parts);
  if (p.dtype == DType::bf16) return launch(&dequantize_kernel<__nv_bfloat16>, grid, kProductThreads, stream, p, parts);
  return launch(&dequantize_kernel<__half>, grid, kProductThreads, stream, p, parts);
}

}  // namespace ditnorm
