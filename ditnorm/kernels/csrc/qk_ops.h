#pragma once
#include "torch_abi.h"

namespace ditnorm {

void register_qk_ops(abi::Library& library);

}  // namespace ditnorm
