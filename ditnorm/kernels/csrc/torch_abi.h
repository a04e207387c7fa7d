// The part of PyTorch's stable C ABI that ditnorm uses, declared by hand: building needs no
// PyTorch, and one binary runs with every PyTorch >= 2.10. Upstream's declarations are in
// torch/csrc/inductor/aoti_torch/c/shim.h, which PyTorch keeps compatible for at least two years
// ("LibTorch Stable ABI"). tests/test_build.py compiles this file after that header, so a mismatch
// is a compile error.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

extern "C" {
struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
struct TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct DeviceGuardOpaque;
using DeviceGuardHandle = DeviceGuardOpaque*;
using AOTITorchError = int32_t;  // 0: success
using StableIValue = uint64_t;

int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_complex64();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int16();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_bool();
int32_t aoti_torch_dtype_float8_e4m3fn();

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** ret);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* ret);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** ret);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** ret);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* ret);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* ret);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* ret);
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type,
                                        int32_t device_index, AtenTensorHandle* ret);
AOTITorchError aoti_torch__reinterpret_tensor(AtenTensorHandle self, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                              int64_t storage_offset, AtenTensorHandle* ret);
AOTITorchError aoti_torch_copy_(AtenTensorHandle self, AtenTensorHandle src, int32_t non_blocking);

AOTITorchError aoti_torch_get_current_device_index(int32_t* ret);
AOTITorchError aoti_torch_create_device_guard(int32_t device_index, DeviceGuardHandle* ret);
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard);
// Defined in libtorch_cuda.so, so absent from a CPU-only PyTorch: weak, and null there.
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret);

AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line, TorchLibraryHandle* ret);
AOTITorchError aoti_torch_library_impl(TorchLibraryHandle self, const char* name, void (*fn)(StableIValue*, uint64_t, uint64_t));
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle self);
AOTITorchError aoti_torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack);
}

namespace ditnorm::abi {

// PyTorch turns a std::exception into a Python RuntimeError; the stable ABI has no other kind.
inline void check(bool ok, const char* message) {
  if (__builtin_expect(!ok, 0)) throw std::runtime_error(message);
}

#define DITNORM_ABI(call) ::ditnorm::abi::check((call) == 0, "ditnorm: call into PyTorch failed: " #call)

// Owns one reference to a PyTorch tensor.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle handle() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  void* data() const { return get<void*>(aoti_torch_get_data_ptr); }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  const int64_t* sizes() const { return get<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return get<int64_t*>(aoti_torch_get_strides); }
  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); }
  int32_t device_type() const { return get<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }

 private:
  template <class T>
  T get(AOTITorchError (*getter)(AtenTensorHandle, T*)) const {
    T value;
    check(getter(handle_, &value) == 0, "ditnorm: cannot read a tensor's properties");
    return value;
  }

  AtenTensorHandle handle_ = nullptr;
};

// An uninitialised contiguous tensor of shape sizes[0..dim), with the device of `like`. At most 8
// dimensions.
inline Tensor empty(int64_t dim, const int64_t* sizes, int32_t dtype, const Tensor& like) {
  int64_t strides[8];
  check(dim <= 8, "ditnorm: too many dimensions");
  for (int64_t i = dim - 1, stride = 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  DITNORM_ABI(aoti_torch_empty_strided(dim, sizes, strides, dtype, like.device_type(), like.device_index(), &handle));
  return Tensor(handle);
}

// The first element of a tensor as a matrix [1, 1], in the same memory.
inline Tensor first_element(const Tensor& source) {
  const int64_t ones[] = {1, 1};
  AtenTensorHandle handle;
  DITNORM_ABI(aoti_torch__reinterpret_tensor(source.handle(), 2, ones, ones, 0, &handle));
  return Tensor(handle);
}

// A fresh contiguous copy, made on the current stream of the tensor's device.
inline Tensor contiguous(const Tensor& source) {
  Tensor copy = empty(source.dim(), source.sizes(), source.dtype(), source);
  DITNORM_ABI(aoti_torch_copy_(copy.handle(), source.handle(), /*non_blocking=*/1));
  return copy;
}

// Makes a CUDA device the current one for a scope. Costs one query when it already is.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device_index) {
    int32_t current;
    DITNORM_ABI(aoti_torch_get_current_device_index(&current));
    if (current != device_index) DITNORM_ABI(aoti_torch_create_device_guard(device_index, &guard_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (guard_) aoti_torch_delete_device_guard(guard_);
  }

 private:
  DeviceGuardHandle guard_ = nullptr;
};

// PyTorch's current CUDA stream on a device, as a cudaStream_t.
inline void* current_cuda_stream(int32_t device_index) {
  check(aoti_torch_get_current_cuda_stream != nullptr, "ditnorm: this PyTorch has no CUDA");
  void* stream = nullptr;
  DITNORM_ABI(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

// The device of a tensor on PyTorch's argument stack, whose reference stays there.
inline int32_t device_index(StableIValue tensor) {
  int32_t index;
  DITNORM_ABI(aoti_torch_get_device_index(reinterpret_cast<AtenTensorHandle>(tensor), &index));
  return index;
}

// Calls an op with the arguments on the stack, in whose place its results come.
inline void call_op(const char* ns, const char* name, const char* overload, StableIValue* stack) {
  const std::string qualified = std::string(ns) + "::" + name;
  DITNORM_ABI(aoti_torch_call_dispatcher(qualified.c_str(), overload, stack));
}

// Unboxing. The callee owns what lies on PyTorch's argument stack: tensor references, and the heap
// cell of a present optional argument.
template <class T>
struct Unbox;
template <>
struct Unbox<int64_t> {
  static int64_t take(StableIValue value) { return static_cast<int64_t>(value); }
};
template <>
struct Unbox<double> {
  static double take(StableIValue value) {
    double result;
    std::memcpy(&result, &value, sizeof result);
    return result;
  }
};
template <>
struct Unbox<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(reinterpret_cast<AtenTensorHandle>(value)); }
};
template <>
struct Unbox<std::optional<Tensor>> {
  static std::optional<Tensor> take(StableIValue value) {
    auto* cell = reinterpret_cast<StableIValue*>(value);
    if (cell == nullptr) return std::nullopt;
    std::optional<Tensor> result = Unbox<Tensor>::take(*cell);
    delete cell;
    return result;
  }
};

// The boxed form of an op implementation, `Tensor f(args...)` or `std::tuple<Tensor, ...>
// f(args...)`.
template <auto Function>
struct Boxed;
template <class Result, class... Args, Result (*Function)(Args...)>
struct Boxed<Function> {
  static void call(StableIValue* stack) { call(stack, std::index_sequence_for<Args...>{}); }

 private:
  template <size_t... I>
  static void call(StableIValue* stack, std::index_sequence<I...>) {
    std::tuple<std::decay_t<Args>...> args{Unbox<std::decay_t<Args>>::take(stack[I])...};
    store(stack, std::apply(Function, args));
  }
  static void store(StableIValue* stack, Tensor result) { *stack = reinterpret_cast<StableIValue>(result.release()); }
  template <class... T>
  static void store(StableIValue* stack, std::tuple<T...> results) {
    std::apply([&](auto&... result) { (store(stack++, std::move(result)), ...); }, results);
  }
};

// Registers implementations of a namespace's ops for one dispatch key, for as long as it lives.
class Library {
 public:
  Library(const char* ns, const char* dispatch_key) {
    DITNORM_ABI(aoti_torch_library_init_impl(ns, dispatch_key, __FILE__, __LINE__, &library_));
  }
  Library(const Library&) = delete;
  ~Library() { aoti_torch_delete_library_object(library_); }

  void impl(const char* op, void (*boxed)(StableIValue*, uint64_t, uint64_t)) { DITNORM_ABI(aoti_torch_library_impl(library_, op, boxed)); }

 private:
  TorchLibraryHandle library_ = nullptr;
};

}  // namespace ditnorm::abi
