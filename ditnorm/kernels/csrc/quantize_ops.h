// The quantising ops of torch.ops.ditnorm: quantize_ops.cpp.
#pragma once
#include "torch_abi.h"

namespace ditnorm {

void register_quantize_ops(abi::Library& library);

}  // namespace ditnorm
