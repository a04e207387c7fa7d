// r = residual + gate * x, a row a block, 16 bytes an access.
#include "dispatch.cuh"
#include "generic_kernel.cuh"
#include "row_kernel.cuh"

namespace ditnorm {

template <class T, class M, bool ROUND>
__global__ void __launch_bounds__(kLanes) residual_row_kernel(const Problem p) {
  constexpr int N = 16 / sizeof(T);
  const int64_t rows = p.batch * p.tokens;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Token at(p, row);
    const int64_t x_offset = at.offset(p.x), residual_offset = at.offset(p.residual), gate_offset = at.offset(p.gate, p.index);
    const float poison = at.valid || p.gate.data == nullptr ? kNoGate : kNaN;
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < p.width; column += kLanes * N) {
      auto v = load_pack<T, N>(p.residual.data, residual_offset + column);
      const auto x = load_pack<T, N>(p.x.data, x_offset + column);
      float gate[N];
      load_modulation<M>(gate, p.gate, gate_offset, column, kNoGate);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        v.v[j] = from_float<T>(add_gated<T, ROUND>(to_float(v.v[j]), to_float(x.v[j]), __fmul_rn(gate[j], poison)));
      }
      store_pack<T, N>(p.r, row * p.width + column, v);
    }
  }
}

template <class T>
int launch_residual_row_kernel(const Problem& p, DType modulation, void* stream) {
  const unsigned grid = blocks(p.batch * p.tokens);
  if constexpr (!std::is_same_v<T, float>) {
    if (modulation == DType::f32) return launch(&residual_row_kernel<T, float, false>, grid, kLanes, stream, p);
    if (p.round_each) return launch(&residual_row_kernel<T, T, true>, grid, kLanes, stream, p);
  }
  return launch(&residual_row_kernel<T, T, false>, grid, kLanes, stream, p);
}

int scale_residual(const Problem& p, void* stream) {
  const DType modulation = fast_modulation_dtype(p);
  if (modulation == DType::u8) return launch_generic_kernel<Op::scale_residual, Norm::layer>(p, stream);
  switch (p.x.dtype) {
    case DType::f32: return launch_residual_row_kernel<float>(p, modulation, stream);
    case DType::f16: return launch_residual_row_kernel<__half>(p, modulation, stream);
    default: return launch_residual_row_kernel<__nv_bfloat16>(p, modulation, stream);
  }
}

const char* error_string(int error) {
#ifdef __CUDACC__
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
  return error == 0 ? "no error" : "the simulator failed";
#endif
}

const char* unusable() {
#ifdef __CUDACC__
  cudaFuncAttributes attributes;  // fails for a driver older than the toolkit, and for a GPU that no embedded code fits
  const cudaError_t error = cudaFuncGetAttributes(&attributes, &residual_row_kernel<float, float, false>);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clear it: PyTorch's next check would report it as its own
  return cudaGetErrorString(error);
#else
  return nullptr;
#endif
}

}  // namespace ditnorm
