// Plain streaming kernels: the speed of light of a cell is the fastest of them that reads and
// writes as much. Each reads READS streams and writes WRITES streams of equal size in 16-byte
// accesses, and does nothing but an exclusive or in between.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kMaxReads = 8;
constexpr int kMaxWrites = 4;

struct Streams {
  const uint4* in[kMaxReads];
  uint4* out[kMaxWrites];
  int64_t words;  // of 16 bytes, in each stream
};

enum class Load { kPlain, kReadOnly, kStreaming };
enum class Store { kPlain, kStreaming };

template <Load LOAD>
__device__ __forceinline__ uint4 load(const uint4* p) {
  if constexpr (LOAD == Load::kReadOnly) return __ldg(p);
  if constexpr (LOAD == Load::kStreaming) return __ldcs(p);
  return *p;
}

template <Store STORE>
__device__ __forceinline__ void store(uint4* p, uint4 v) {
  if constexpr (STORE == Store::kStreaming) {
    __stcs(p, v);
  } else {
    *p = v;
  }
}

template <int READS, int WRITES, int UNROLL, Load LOAD, Store STORE>
__device__ __forceinline__ void move(const Streams& s, int64_t first) {
  uint4 v[UNROLL][READS];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int64_t i = first + u * blockDim.x;
    if (i < s.words) {
#pragma unroll
      for (int r = 0; r < READS; ++r) v[u][r] = load<LOAD>(s.in[r] + i);
    }
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int64_t i = first + u * blockDim.x;
    if (i < s.words) {
      uint4 mixed = v[u][0];
#pragma unroll
      for (int r = 1; r < READS; ++r) {
        mixed.x ^= v[u][r].x;
        mixed.y ^= v[u][r].y;
        mixed.z ^= v[u][r].z;
        mixed.w ^= v[u][r].w;
      }
#pragma unroll
      for (int w = 0; w < WRITES; ++w) store<STORE>(s.out[w] + i, mixed);
    }
  }
}

template <int READS, int WRITES, int UNROLL, Load LOAD, Store STORE, bool PERSISTENT>
__global__ void stream_kernel(const __grid_constant__ Streams s) {
  const int64_t tile = static_cast<int64_t>(blockDim.x) * UNROLL;
  if constexpr (PERSISTENT) {
    for (int64_t t = blockIdx.x; t * tile < s.words; t += gridDim.x) {
      move<READS, WRITES, UNROLL, LOAD, STORE>(s, t * tile + threadIdx.x);
    }
  } else {
    move<READS, WRITES, UNROLL, LOAD, STORE>(s, blockIdx.x * tile + threadIdx.x);
  }
}

template <int READS, int WRITES, int UNROLL, Load LOAD, Store STORE, bool PERSISTENT = false>
cudaError_t launch(const Streams& s, int threads, cudaStream_t stream) {
  auto kernel = stream_kernel<READS, WRITES, UNROLL, LOAD, STORE, PERSISTENT>;
  const int64_t tile = static_cast<int64_t>(threads) * UNROLL;
  int64_t ctas = (s.words + tile - 1) / tile;
  if (PERSISTENT) {
    int device, processors, resident;
    if (cudaError_t e = cudaGetDevice(&device)) return e;
    if (cudaError_t e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return e;
    if (cudaError_t e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0)) return e;
    ctas = ctas < processors * resident ? ctas : processors * resident;
  }
  kernel<<<static_cast<unsigned>(ctas), threads, 0, stream>>>(s);
  return cudaGetLastError();
}

struct Variant {
  const char* name;
  int kind;
  int threads;
};

// The grids that won or came near in trials of some 40: small CTAs, one access a thread; unrolling
// gains below 50 MB.
constexpr Variant kVariants[] = {
    {"1 access, plain loads, 128 threads", 0, 128},    {"1 access, plain loads, 256 threads", 0, 256},
    {"1 access, plain loads, 512 threads", 0, 512},    {"1 access, __ldg, 128 threads", 1, 128},
    {"1 access, __ldg, 256 threads", 1, 256},          {"1 access, __ldcs, 128 threads", 2, 128},
    {"1 access, __ldcs, 256 threads", 2, 256},         {"1 access, plain stores, 256 threads", 3, 256},
    {"2 accesses, plain loads, 128 threads", 4, 128},  {"2 accesses, plain loads, 256 threads", 4, 256},
    {"2 accesses, __ldcs, 128 threads", 5, 128},       {"4 accesses, plain loads, 128 threads", 6, 128},
    {"4 accesses, plain stores, 128 threads", 7, 128}, {"persistent, 2 accesses, 256 threads", 8, 256},
    {"persistent, 4 accesses, 256 threads", 9, 256},
};

template <int READS, int WRITES>
cudaError_t launch_kind(int kind, const Streams& s, int threads, cudaStream_t stream) {
  switch (kind) {
    case 0: return launch<READS, WRITES, 1, Load::kPlain, Store::kStreaming>(s, threads, stream);
    case 1: return launch<READS, WRITES, 1, Load::kReadOnly, Store::kStreaming>(s, threads, stream);
    case 2: return launch<READS, WRITES, 1, Load::kStreaming, Store::kStreaming>(s, threads, stream);
    case 3: return launch<READS, WRITES, 1, Load::kPlain, Store::kPlain>(s, threads, stream);
    case 4: return launch<READS, WRITES, 2, Load::kPlain, Store::kStreaming>(s, threads, stream);
    case 5: return launch<READS, WRITES, 2, Load::kStreaming, Store::kStreaming>(s, threads, stream);
    case 6: return launch<READS, WRITES, 4, Load::kPlain, Store::kStreaming>(s, threads, stream);
    case 7: return launch<READS, WRITES, 4, Load::kPlain, Store::kPlain>(s, threads, stream);
    case 8: return launch<READS, WRITES, 2, Load::kPlain, Store::kStreaming, true>(s, threads, stream);
    case 9: return launch<READS, WRITES, 4, Load::kPlain, Store::kStreaming, true>(s, threads, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

extern "C" {

int stream_variants() { return sizeof(kVariants) / sizeof(kVariants[0]); }

const char* stream_variant_name(int variant) { return kVariants[variant].name; }

// Launches one variant; a mix of reads and writes that no cell has is cudaErrorInvalidValue.
int stream_launch(int variant, int reads, int writes, const void* const* in, void* const* out, int64_t words, void* stream) {
  Streams s{};
  for (int i = 0; i < reads; ++i) s.in[i] = static_cast<const uint4*>(in[i]);
  for (int i = 0; i < writes; ++i) s.out[i] = static_cast<uint4*>(out[i]);
  s.words = words;
  const auto [name, kind, threads] = kVariants[variant];
  const auto on = static_cast<cudaStream_t>(stream);
  switch (reads * 10 + writes) {
    case 11: return launch_kind<1, 1>(kind, s, threads, on);
    case 21: return launch_kind<2, 1>(kind, s, threads, on);
    case 22: return launch_kind<2, 2>(kind, s, threads, on);
    case 31: return launch_kind<3, 1>(kind, s, threads, on);
    case 32: return launch_kind<3, 2>(kind, s, threads, on);
    case 41: return launch_kind<4, 1>(kind, s, threads, on);
    case 42: return launch_kind<4, 2>(kind, s, threads, on);
    case 43: return launch_kind<4, 3>(kind, s, threads, on);
    case 51: return launch_kind<5, 1>(kind, s, threads, on);
    case 52: return launch_kind<5, 2>(kind, s, threads, on);
    case 74: return launch_kind<7, 4>(kind, s, threads, on);
    case 82: return launch_kind<8, 2>(kind, s, threads, on);
    default: return cudaErrorInvalidValue;
  }
}

const char* stream_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // extern "C"
