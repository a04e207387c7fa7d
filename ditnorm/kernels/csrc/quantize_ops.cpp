// The quantising ops: as ops.cpp.
#include "quantize_ops.h"

#include <algorithm>
#include <iterator>

#include "op_table.h"

namespace ditnorm {

namespace {

// Whether the rows of x are one row in memory.
bool in_one_piece(const Tensor& x) {
  const int64_t dim = x.dim(), *sizes = x.sizes(), *strides = x.strides();
  int64_t elements = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    if (sizes[i] != 1 && strides[i] != elements) return false;
    elements *= sizes[i];
  }
  return reinterpret_cast<uintptr_t>(x.data()) % 16 == 0;
}

// Whether all rows, which have one scale, are quantised as a single one: in one kernel instead of
// two. A norm finds the largest of each row in its own.
bool as_one_row(const Tensor& x, Behind behind, int64_t elements) {
  if (behind == Behind::norm || (behind != Behind::activation && !in_one_piece(x))) return false;
  return call_kernel(&quantizes_as_row, OnePiece{float_dtype(x), elements, behind == Behind::gelu}, x.device_index()) != kNotServed;
}

// How many numbers have the largest of those maxima of rows among them.
int64_t partials_of_maxima(int64_t rows) {
  return rows <= kMaxPartials ? rows : std::min((rows + kAmaxThreads - 1) / kAmaxThreads, kMaxPartials);
}

}  // namespace

QuantizedOutput::QuantizedOutput(const Tensor& x, int64_t law, Behind behind, int64_t beside) {
  check(law >= 0 && law < kLaws, "ditnorm: law");
  const int64_t dim = x.dim();
  check(dim == 2 || dim == 3, "ditnorm: x must be [B, S, D] or [S, D]");
  const int64_t* sizes = x.sizes();
  const int64_t rows = dim == 3 ? sizes[0] * sizes[1] : sizes[0], width = beside + sizes[dim - 1];
  check(width >= 1, "ditnorm: x must have a last dim");
  out.law = static_cast<Law>(law);
  const bool int8 = out.law == Law::int8_row, per_row = out.law != Law::float8_tensor;
  check(per_row || rows > 0, "ditnorm: the largest value of nothing");
  const int64_t values_sizes[] = {rows, width}, scale_sizes[] = {per_row ? rows : 1, 1};
  values = abi::empty(2, values_sizes, int8 ? aoti_torch_dtype_int8() : aoti_torch_dtype_float8_e4m3fn(), x);
  if (per_row || as_one_row(x, behind, rows * width)) {
    scale = abi::empty(2, scale_sizes, aoti_torch_dtype_float32(), x);
  } else {
    // In one piece of memory with what is needed to find it: the host has more to do for each piece
    // than for these few bytes.
    partial_count = std::min(rows, kMaxPartials);
    const bool many = behind == Behind::norm && rows > kMaxPartials;
    const int64_t count = 1 + partial_count + (many ? rows : 0);
    const Tensor all = abi::empty(1, &count, aoti_torch_dtype_float32(), x);
    scale = abi::first_element(all);
    partials = static_cast<uint32_t*>(all.data()) + 1;
    if (behind == Behind::norm) out.maxima = many ? partials + partial_count : partials;
  }
  out.values = static_cast<uint8_t*>(values.data());
  out.scale = static_cast<float*>(scale.data());
}

Partials find_largest(const QuantizedOutput& output, const Tensor& x) {
  QuantizeProblem problem{};
  problem.batch = 1;
  problem.tokens = output.values.sizes()[0];
  problem.partials = output.partials;
  problem.partial_count = partials_of_maxima(problem.tokens);
  problem.maxima = output.out.maxima;
  call_kernel(&find_partials, problem, x.device_index());
  return {problem.partials, problem.partial_count};
}

void quantize_into(const QuantizedOutput& output, const Tensor& x, bool gelu, bool maxima) {
  const int64_t dim = x.dim(), width = x.sizes()[dim - 1];
  const Tensor copy = width == 1 || x.strides()[dim - 1] == 1 ? Tensor() : abi::contiguous(x);
  const Tensor& source = copy.handle() == nullptr ? x : copy;
  const int64_t *sizes = source.sizes(), *strides = source.strides();
  QuantizeProblem problem{};
  problem.batch = dim == 3 ? sizes[0] : 1;
  problem.tokens = sizes[dim - 2];
  problem.width = width;
  problem.x = {source.data(), float_dtype(x), dim == 3 ? strides[0] : 0, strides[dim - 2]};
  problem.out = output.out;
  problem.gelu = gelu;
  const int64_t rows = problem.batch * problem.tokens;
  if (rows == 0) return;
  if (output.out.law == Law::float8_tensor && output.partials == nullptr) {
    problem.batch = problem.tokens = 1;
    problem.width = rows * width;
  }
  problem.partials = output.partials;
  problem.partial_count = maxima ? partials_of_maxima(rows) : output.partial_count;
  problem.maxima = maxima ? output.out.maxima : nullptr;
  call_kernel(&quantize, problem, x.device_index());
}

namespace {

std::tuple<Tensor, Tensor> quantize_op(const Tensor& x, int64_t law) {
  QuantizedOutput output(x, law, Behind::nothing);
  quantize_into(output, x, false);
  return {std::move(output.values), std::move(output.scale)};
}

Tensor dequantize_product_op(const Tensor& product, const Tensor& scale, const Tensor& weight_scale, const Optional& bias, int64_t dtype) {
  const int32_t float32 = aoti_torch_dtype_float32(),
                out = dtype == halves::bfloat16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float16();
  check(dtype == halves::float16 || dtype == halves::bfloat16, "ditnorm: dtype");
  check(product.dim() == 2 && product.dtype() == aoti_torch_dtype_int32(), "ditnorm: product must be int32 [rows, N]");
  const int64_t rows = product.sizes()[0], width = product.sizes()[1];
  const int32_t device_type = product.device_type(), device_index = product.device_index();
  const auto fits = [&](const Tensor& t, int64_t count, int32_t dtype) {
    const int64_t *sizes = t.sizes(), *strides = t.strides();
    int64_t elements = 1;
    for (int64_t i = t.dim() - 1; i >= 0; --i) {
      check(sizes[i] == 1 || strides[i] == elements, "ditnorm: operands of a product must be contiguous");
      elements *= sizes[i];
    }
    check(t.device_type() == device_type && t.device_index() == device_index, "ditnorm: tensors on different devices");
    return elements == count && t.dtype() == dtype && reinterpret_cast<uintptr_t>(t.data()) % 16 == 0;
  };
  check(fits(product, rows * width, product.dtype()) && width % 4 == 0 && rows <= 0x7fffff, "ditnorm: shape of product");
  check(fits(scale, rows, float32) && fits(weight_scale, width, float32), "ditnorm: scale or weight_scale");
  check(!bias || fits(*bias, width, out), "ditnorm: bias");
  const int64_t sizes[] = {rows, width};
  Tensor y = abi::empty(2, sizes, out, product);
  const ProductProblem problem{rows,
                               width,
                               static_cast<const int32_t*>(product.data()),
                               static_cast<const float*>(scale.data()),
                               static_cast<const float*>(weight_scale.data()),
                               bias ? bias->data() : nullptr,
                               dtype == halves::bfloat16 ? DType::bf16 : DType::f16,
                               y.data()};
  if (rows > 0 && width > 0) call_kernel(&dequantize_product, problem, device_index);
  return y;
}

}  // namespace

Ops quantize_ops() {
  static const OpEntry kOps[] = {
      op<&quantize_op>("quantize"),
      op<&dequantize_product_op>("dequantize_product"),
  };
  return {kOps, std::size(kOps)};
}

}  // namespace ditnorm
