// The ops of the library, as PyTorch calls them.
#pragma once
#include <atomic>

#include "device.h"
#include "torch_abi.h"

namespace ditnorm {

struct OpEntry {
  const char* name;
  void (*boxed)(StableIValue* stack, uint64_t, uint64_t);
  std::atomic<int64_t>* calls;
};

struct Ops {
  const OpEntry* first;
  size_t count;

  const OpEntry* begin() const { return first; }
  const OpEntry* end() const { return first + count; }
};

// Whether the kernels run on a device. Asked of the driver once.
inline bool runs_on(int32_t device) {
  constexpr int kDevices = 64;
  static std::atomic<int8_t> known[kDevices];  // 0: not asked yet, 1: no, 2: yes. Device -1 is the CPU, of a host build.
  const int place = device + 1;
  if (place < 0 || place >= kDevices) return unusable(device) == nullptr;
  int8_t answer = known[place].load(std::memory_order_relaxed);
  if (__builtin_expect(answer == 0, 0)) {
    answer = unusable(device) == nullptr ? 2 : 1;
    known[place].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}

// An op with its counter. On a device that the kernels don't run on a call goes to the op's
// overload "reference", which is PyTorch's operations (ditnorm/kernels/__init__.py).
template <auto Function>
struct BoundOp {
  static inline const char* name;
  static inline std::atomic<int64_t> calls;

  static void boxed(StableIValue* stack, uint64_t, uint64_t) {
    if (!runs_on(abi::device_index(stack[0]))) return abi::call_op("ditnorm", name, "reference", stack);
    abi::Boxed<Function>::call(stack);
    calls.fetch_add(1, std::memory_order_relaxed);
  }
};

template <auto Function>
OpEntry op(const char* name) {
  using Bound = BoundOp<Function>;
  Bound::name = name;
  return {name, &Bound::boxed, &Bound::calls};
}

// Of ops.cpp, qk_ops.cpp, activation_ops.cpp and quantize_ops.cpp.
Ops norm_site_ops();
Ops qk_ops();
Ops activation_ops();
Ops quantize_ops();

}  // namespace ditnorm
