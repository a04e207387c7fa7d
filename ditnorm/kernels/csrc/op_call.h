// What the ops' bindings share: dtypes, the codes of options, and the call of a kernel on the
// current stream of a device.
#pragma once
#include <string>

#include "device.h"
#include "problem.h"
#include "torch_abi.h"

namespace ditnorm {

using abi::check;
using abi::Tensor;
using Optional = std::optional<Tensor>;

// The codes that Python passes for the names of options: their places in NORMS, QK_NORMS, PAIRS,
// ROUNDINGS and HALVES of ditnorm/ops/options.py. (LAWS: quantize.h.) The library is refused where
// the two sides differ (ditnorm_code).
namespace norms {
enum Code : int64_t { layer, rms, fp32_layer, diffusers_rms };
}
namespace qk_norms {
enum Code : int64_t { rms, diffusers_rms };
}
namespace pairs {
enum Code : int64_t { neighbours, halves, halves_rounded };
}
namespace roundings {
enum Code : int64_t { single, eager };
}
namespace halves {
enum Code : int64_t { float16, bfloat16 };
}

inline DType float_dtype(const Tensor& t) {
  static const int32_t f32 = aoti_torch_dtype_float32(), f16 = aoti_torch_dtype_float16(), bf16 = aoti_torch_dtype_bfloat16();
  const int32_t dtype = t.dtype();
  if (dtype == bf16) return DType::bf16;
  if (dtype == f32) return DType::f32;
  check(dtype == f16, "ditnorm: unsupported dtype");
  return DType::f16;
}

// Returns 0, or kNotServed.
template <class Problem>
int call_kernel(int (*op)(const Problem&, void*), const Problem& problem, int32_t device_index) {
#ifdef DITNORM_CPU_SIM
  (void)device_index;
  const int error = op(problem, nullptr);
#else
  const abi::DeviceGuard guard(device_index);
  const int error = op(problem, abi::current_cuda_stream(device_index));
#endif
  if (error != 0 && error != kNotServed) throw std::runtime_error(std::string("ditnorm: kernel launch failed: ") + error_string(error));
  return error;
}

}  // namespace ditnorm
