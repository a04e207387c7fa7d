// Quantising what a linear layer reads, alone or behind GELU, and the way back from an int8 matrix
// product.
#include "activations.cuh"
#include "dispatch.cuh"
#include "gelu_quantize.cuh"
#include "launch.h"
#include "quantize.cuh"

namespace ditnorm {

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
