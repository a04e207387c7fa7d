// What Python calls through ctypes: ditnorm/kernels/__init__.py.
#include <cstring>
#include <memory>

#include "op_call.h"
#include "op_table.h"
#include "quantize.h"

namespace {

using namespace ditnorm;

#ifdef DITNORM_CPU_SIM
constexpr const char* kDispatchKey = "CPU";
#else
constexpr const char* kDispatchKey = "CUDA";
#endif

#ifndef DITNORM_ARCHITECTURES
#define DITNORM_ARCHITECTURES ""
#endif

struct Code {
  const char *option, *name;
  int64_t code;
};

constexpr Code kCodes[] = {
    {"norm", "layer", norms::layer},
    {"norm", "rms", norms::rms},
    {"norm", "fp32_layer", norms::fp32_layer},
    {"norm", "diffusers_rms", norms::diffusers_rms},
    {"qk_norm", "rms", qk_norms::rms},
    {"qk_norm", "diffusers_rms", qk_norms::diffusers_rms},
    {"pairs", "neighbours", pairs::neighbours},
    {"pairs", "halves", pairs::halves},
    {"pairs", "halves, rounded", pairs::halves_rounded},
    {"rounding", "single", roundings::single},
    {"rounding", "eager", roundings::eager},
    {"half", "float16", halves::float16},
    {"half", "bfloat16", halves::bfloat16},
    {"law", "float8-row", static_cast<int64_t>(Law::float8_row)},
    {"law", "float8-tensor", static_cast<int64_t>(Law::float8_tensor)},
    {"law", "int8-row", static_cast<int64_t>(Law::int8_row)},
    {"law", "float8-row-bfl", static_cast<int64_t>(Law::float8_row_bfl)},
};

bool equal(const char* a, const char* b) { return std::strcmp(a, b) == 0; }

}  // namespace

extern "C" {
#define DITNORM_EXPORT __attribute__((visibility("default")))

// "CUDA", or "CPU" for a host build.
DITNORM_EXPORT const char* ditnorm_dispatch_key() { return kDispatchKey; }

// The compute capabilities that there is machine code for, "80,90"; empty for a host build.
DITNORM_EXPORT const char* ditnorm_architectures() { return DITNORM_ARCHITECTURES; }

// Null, or why the kernels don't run on a device.
DITNORM_EXPORT const char* ditnorm_unusable(int device) { return unusable(device); }

// Puts the ops over those registered in Python, for the life of the process. 0: success.
DITNORM_EXPORT int ditnorm_register() try {
  auto library = std::make_unique<abi::Library>("ditnorm", kDispatchKey);
  for (const Ops& ops : {norm_site_ops(), qk_ops(), activation_ops(), quantize_ops()}) {
    for (const OpEntry& op : ops) library->impl(op.name, op.boxed);
  }
  library.release();
  return 0;
} catch (const std::exception&) {
  return 1;
}

// How often an op has been called; -1 for an op that the library doesn't have.
DITNORM_EXPORT int64_t ditnorm_calls(const char* name) {
  for (const Ops& ops : {norm_site_ops(), qk_ops(), activation_ops(), quantize_ops()}) {
    for (const OpEntry& op : ops) {
      if (equal(op.name, name)) return op.calls->load(std::memory_order_relaxed);
    }
  }
  return -1;
}

// The number that stands for a name of an option (norm, qk_norm, pairs, rounding, half, law); -1 for one
// that the library doesn't know.
DITNORM_EXPORT int64_t ditnorm_code(const char* option, const char* name) {
  for (const Code& code : kCodes) {
    if (equal(code.option, option) && equal(code.name, name)) return code.code;
  }
  return -1;
}
}
