// A call at a norm site: its tensors checked and read into a Problem, and the launch.
#pragma once
#include <algorithm>

#include "op_call.h"

namespace ditnorm {

inline DType index_dtype(const Tensor& t) {
  const int32_t dtype = t.dtype();
  if (dtype == aoti_torch_dtype_int64()) return DType::i64;
  if (dtype == aoti_torch_dtype_int32()) return DType::i32;
  if (dtype == aoti_torch_dtype_int16()) return DType::i16;
  if (dtype == aoti_torch_dtype_int8()) return DType::i8;
  check(dtype == aoti_torch_dtype_uint8() || dtype == aoti_torch_dtype_bool(), "ditnorm: unsupported dtype of index");
  return DType::u8;
}

// Fills a Problem. Keeps the dense copies of operands whose last dim is not dense alive until the
// launch.
class Call {
 public:
  explicit Call(const Tensor& x) : device_type_(x.device_type()), device_index_(x.device_index()) {
    const int64_t dim = x.dim();
    check(dim == 2 || dim == 3, "ditnorm: x must be [B, S, D] or [S, D]");
    const int64_t* sizes = x.sizes();
    problem.batch = dim == 3 ? sizes[0] : 1;
    problem.tokens = sizes[dim - 2];
    problem.width = sizes[dim - 1];
    check(problem.width >= 1, "ditnorm: x must have a last dim");
    problem.x = rows(x);
  }

  void residual(const Tensor& x, const Tensor& t) {
    const int64_t dim = x.dim();
    check(t.dim() == dim && std::equal(t.sizes(), t.sizes() + dim, x.sizes()), "ditnorm: residual must have the shape of x");
    problem.residual = rows(t);
  }

  void index(const Optional& t) {
    if (!t) return;
    check_device(*t);
    const int64_t dim = t->dim();
    const int64_t *sizes = t->sizes(), *strides = t->strides();
    const bool shared = dim == 1 || (dim == 2 && sizes[0] == 1);
    check((shared || (dim == 2 && sizes[0] == problem.batch)) && sizes[dim - 1] == problem.tokens, "ditnorm: shape of index");
    // An empty tensor may have no data, and then selects nothing.
    problem.index = {t->data(), index_dtype(*t), shared ? 0 : strides[0], strides[dim - 1], /*rows=*/-1};
    indexed_ = true;
  }

  // After index().
  void modulation(Modulation& m, const Optional& t, const Optional& table) {
    if (!t) return check(!table, "ditnorm: a table without its modulation");
    const Tensor& source = dense(*t);
    m.data = source.data();
    m.dtype = float_dtype(source);
    any_table_ |= table.has_value();
    any_float32_ |= m.dtype == DType::f32 || table;
    if (!any_modulation_) law_ = m.dtype;
    mixed_ |= m.dtype != law_;
    any_modulation_ = true;
    vector(m.table, table);

    const int64_t dim = source.dim();
    const int64_t *sizes = source.sizes(), *strides = source.strides();
    check(dim >= 1 && sizes[dim - 1] == problem.width, "ditnorm: last dim of a modulation");
    const auto batch_stride = [&] {
      check(sizes[0] == problem.batch || sizes[0] == 1, "ditnorm: batch of a modulation");
      return sizes[0] == 1 ? 0 : strides[0];
    };
    if (indexed_) {
      check(dim == 2 || dim == 3, "ditnorm: rows of an indexed modulation");
      const int64_t count = sizes[dim - 2];
      check(count >= 1 && (problem.index.rows == -1 || problem.index.rows == count), "ditnorm: number of rows of an indexed modulation");
      problem.index.rows = count;
      m.row_stride = strides[dim - 2];
      m.batch_stride = dim == 3 ? batch_stride() : 0;
    } else if (dim == 2) {
      m.batch_stride = batch_stride();
    } else if (dim == 3) {
      m.batch_stride = batch_stride();
      check(sizes[1] == problem.tokens || sizes[1] == 1, "ditnorm: tokens of a modulation");
      m.row_stride = sizes[1] == 1 ? 0 : strides[1];
    } else if (dim == 4) {
      m.batch_stride = batch_stride();
      check(sizes[2] == 1 && sizes[1] >= 1 && problem.tokens % sizes[1] == 0, "ditnorm: frames of a modulation");
      m.row_stride = sizes[1] == 1 ? 0 : strides[1];
      m.tokens_per_row = problem.tokens / sizes[1];
    } else {
      check(dim == 1, "ditnorm: dims of a modulation");
    }
  }

  void affine(const Optional& weight, const Optional& bias) {
    vector(problem.weight, weight);
    vector(problem.bias, bias);
  }

  void norm(int64_t norm, double eps) {
    check(norm >= norms::layer && norm <= norms::diffusers_rms, "ditnorm: norm");
    problem.norm = norm == norms::rms             ? Norm::rms
                   : norm == norms::diffusers_rms ? Norm::diffusers_rms
                                                  : Norm::layer;  // the kernels' statistics are float32 in any case
    const int64_t rows = problem.batch * problem.tokens;
    problem.mean_factor = static_cast<float>(rows) / static_cast<float>(rows * problem.width);
    problem.eps = static_cast<float>(eps);
    fp32_norm_ = norm == norms::fp32_layer;
  }

  // A gradient of the shape and dtype of x.
  void gradient(Rows& gradient, const Tensor& t, const Tensor& x) {
    check_device(t);
    const int64_t dim = x.dim();
    check(t.dim() == dim && std::equal(t.sizes(), t.sizes() + dim, x.sizes()), "ditnorm: a gradient must have the shape of its tensor");
    gradient = rows(t);
    check(gradient.dtype == problem.x.dtype, "ditnorm: a gradient must have the dtype of its tensor");
  }

  // Of diffusers' RMSNorm: x is normed before it is added to the residual.
  void norm_x(const Optional& weight) {
    vector(problem.x_weight, weight);
    problem.norms_x = true;
  }

  // After everything else. See law_dtype of ditnorm/ops/.
  void rounding(int64_t rounding) {
    check(!indexed_ || any_modulation_, "ditnorm: index without a modulation");
    check(rounding == roundings::single || rounding == roundings::eager, "ditnorm: rounding");
    if (rounding == roundings::single) return;
    const DType t = problem.x.dtype;
    check(problem.residual.data == nullptr || problem.residual.dtype == t, "ditnorm: eager rounding needs residual and x of one dtype");
    if (problem.norm == Norm::diffusers_rms) {  // every operation is one of T's
      for (const Vector* vector : {&problem.weight, &problem.bias, &problem.x_weight}) {
        check(vector->data == nullptr || vector->dtype == t, "ditnorm: eager rounding needs weights of the dtype of x");
      }
      check(!any_table_, "ditnorm: eager rounding takes no tables with diffusers' RMSNorm");
    } else if (any_float32_ || (!any_modulation_ && fp32_norm_)) {
      return;
    }
    check(!any_modulation_ || (law_ == t && !mixed_), "ditnorm: eager rounding needs modulations of the dtype of x, or float32");
    problem.round_each = t != DType::f32;
  }

  // The problem of a backward pass, what it writes not yet in it.
  SiteBackward backward(int64_t rounding) const {
    SiteBackward backward{};
    backward.site = problem;
    backward.eager = rounding == roundings::eager;
    return backward;
  }
  void run_backward(int (*op)(const SiteBackward&, void*), const SiteBackward& backward) const {
    if (problem.batch * problem.tokens == 0) return;
    call_kernel(op, backward, device_index_);
  }

  // False where no kernel serves the problem.
  bool try_run(int (*op)(const Problem&, void*)) const {
    return problem.batch * problem.tokens == 0 || call_kernel(op, problem, device_index_) != kNotServed;
  }

  void run(int (*op)(const Problem&, void*)) const {
    if (problem.batch * problem.tokens == 0) return;
    call_kernel(op, problem, device_index_);
  }

  Problem problem{};

 private:
  void check_device(const Tensor& t) const {
    check(t.device_type() == device_type_ && t.device_index() == device_index_, "ditnorm: tensors on different devices");
  }

  const Tensor& dense(const Tensor& t) {
    check_device(t);
    const int64_t dim = t.dim();
    if (dim == 0 || t.sizes()[dim - 1] <= 1 || t.strides()[dim - 1] == 1) return t;
    check(copied_ < kMaxCopies, "ditnorm: too many operands");
    return copies_[copied_++] = abi::contiguous(t);
  }

  Rows rows(const Tensor& t) {
    const Tensor& source = dense(t);
    const int64_t dim = source.dim();
    const int64_t* strides = source.strides();
    return {source.data(), float_dtype(source), dim == 3 ? strides[0] : 0, strides[dim - 2]};
  }

  void vector(Vector& vector, const Optional& t) {
    if (!t) return;
    check(t->dim() == 1 && t->sizes()[0] == problem.width, "ditnorm: weight, bias and tables must be [D]");
    const Tensor& source = dense(*t);
    vector = {source.data(), float_dtype(source)};
  }

  static constexpr int kMaxCopies = 10;
  Tensor copies_[kMaxCopies];
  int copied_ = 0;
  int32_t device_type_, device_index_;
  bool indexed_ = false, any_modulation_ = false, any_float32_ = false, any_table_ = false, mixed_ = false, fp32_norm_ = false;
  DType law_ = DType::f32;
};

}  // namespace ditnorm
