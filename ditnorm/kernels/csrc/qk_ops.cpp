// The ops of query and key: as ops.cpp.
#include <initializer_list>
#include <iterator>

#include "op_call.h"
#include "op_table.h"

namespace ditnorm {
namespace {

// Fills a HeadProblem. Keeps the dense copies of operands whose last dim is not dense alive until
// the launch.
class HeadCall {
 public:
  HeadCall(const Tensor& query, int64_t head_dim, int64_t norm, double eps, int64_t rounding)
      : device_type_(query.device_type()), device_index_(query.device_index()) {
    check(query.dim() == 3 && head_dim >= 1, "ditnorm: query must be [B, S, H * head_dim]");
    check(norm == qk_norms::rms || norm == qk_norms::diffusers_rms, "ditnorm: norm");
    check(rounding == roundings::single || rounding == roundings::eager, "ditnorm: rounding");
    problem_.batch = query.sizes()[0];
    problem_.head_dim = head_dim;
    problem_.dtype = float_dtype(query);
    problem_.twice = norm == qk_norms::diffusers_rms;
    problem_.eager = rounding == roundings::eager;
    problem_.eps = static_cast<float>(eps);
  }

  // Adds `x` [B, S, H * d] to a stream; the first that is added gives it its tokens.
  void rows(HeadStream& stream, const Tensor& x, const Optional* weight) {
    check_device(x);
    const int64_t* sizes = x.sizes();
    check(x.dim() == 3 && sizes[0] == problem_.batch && sizes[2] >= 1 && sizes[2] % problem_.head_dim == 0, "ditnorm: shape of a stream");
    check(float_dtype(x) == problem_.dtype, "ditnorm: all streams must have the dtype of query");
    if (stream.count == 0) stream.tokens = sizes[1];
    check(sizes[1] == stream.tokens, "ditnorm: tokens of a stream");
    const Tensor& source = dense(x);
    const int64_t* strides = source.strides();
    HeadRows& rows = stream.parts[stream.count++];
    rows = {source.data(), strides[0], strides[1], sizes[2], {}, nullptr, 0, 0.0f, weight == nullptr};
    if (weight == nullptr) return;
    const bool across = *weight && (*weight)->dim() == 1 && (*weight)->sizes()[0] != problem_.head_dim;
    const int64_t span = across ? rows.width : problem_.head_dim;
    if (*weight) {
      check((*weight)->dim() == 1 && (*weight)->sizes()[0] == span, "ditnorm: shape of a weight");
      check_device(**weight);
      const Tensor& vector = dense(**weight);
      rows.weight = {vector.data(), float_dtype(vector)};
      check(!problem_.eager || rows.weight.dtype == problem_.dtype, "ditnorm: eager rounding needs weights of the dtype of query");
    }
    check(!normed_ || across == problem_.across, "ditnorm: norms per head and across heads in one call");
    problem_.across = across;
    normed_ = true;
    // As ATen's mean computes it: the number of results over that of elements, both rounded to
    // float32.
    const int64_t results = problem_.batch * stream.tokens * (rows.width / span);
    rows.mean_factor = static_cast<float>(results) / static_cast<float>(results * span);
  }

  // After the stream's rows. `cos` alone is complex.
  void rotary(HeadStream& stream, const Optional& cos, const Optional& sin, int64_t pairs = pairs::neighbours) {
    check(pairs >= pairs::neighbours && pairs <= pairs::halves_rounded, "ditnorm: pairs");
    if (!cos) return check(!sin, "ditnorm: sin without cos");
    check_device(*cos);
    const bool complex = !sin, halves = pairs != pairs::neighbours;
    const int64_t dim = cos->dim();
    check(cos->dtype() == (complex ? aoti_torch_dtype_complex64() : aoti_torch_dtype_float32()), "ditnorm: dtype of a rotary table");
    check(dim >= 2 && dim <= 4, "ditnorm: shape of a rotary table");
    const Tensor *first = &*cos, *second = nullptr;
    if (!complex) {
      check_device(*sin);
      check(sin->dtype() == cos->dtype() && sin->dim() == dim, "ditnorm: cos and sin must be alike");
      second = &*sin;
      bool alike = true;
      for (int64_t i = 0; i < dim; ++i) {
        check(sin->sizes()[i] == cos->sizes()[i], "ditnorm: cos and sin must be alike");
        alike = alike && sin->strides()[i] == cos->strides()[i];
      }
      if (!alike) first = &copy(*cos), second = &copy(*sin);
    }
    const int64_t *sizes = first->sizes(), *strides = first->strides(), width = sizes[dim - 1], head_dim = problem_.head_dim;
    check(head_dim % 2 == 0 && (width == head_dim / 2 || (!complex && width == head_dim)), "ditnorm: last dim of a rotary table");
    check(!halves || (!complex && width == head_dim / 2), "ditnorm: a rotary table of pairs of halves");
    const int64_t heads = dim == 4 ? sizes[2] : 1;
    for (int64_t i = 0; i < stream.count; ++i) {
      check(heads == 1 || stream.parts[i].width == heads * head_dim, "ditnorm: heads of a rotary table");
    }
    check(dim == 2 || sizes[0] == 1 || sizes[0] == problem_.batch, "ditnorm: batch of a rotary table");
    const int token_dim = dim == 2 ? 0 : 1, scale = complex ? 2 : 1;
    check(sizes[token_dim] <= stream.tokens, "ditnorm: tokens of a rotary table");
    const auto* values = static_cast<const float*>(first->data());
    stream.rotary = {values,
                     complex ? values + 1 : static_cast<const float*>(second->data()),
                     dim == 2 || sizes[0] == 1 ? 0 : strides[0] * scale,
                     strides[token_dim] * scale,
                     strides[dim - 1] * scale,
                     sizes[token_dim],
                     width == head_dim,
                     complex || pairs == pairs::halves || !problem_.eager,
                     halves,
                     heads == 1 ? 0 : strides[2] * scale};
  }

  // Query and key in one stream, which shares its angles, or in one each. Returns whether in one.
  bool query_and_key(const Tensor& query, const Tensor& key, const Optional& query_weight, const Optional& key_weight, const Optional& cos,
                     const Optional& sin, const Optional& key_cos, const Optional& key_sin, int64_t pairs) {
    check(key.dim() == 3, "ditnorm: key must be [B, S, H * head_dim]");
    check(cos || !key_cos, "ditnorm: key_cos without cos");
    const bool together = !key_cos && key.sizes()[1] == query.sizes()[1];
    HeadStream &of_query = stream(0), &of_key = stream(together ? 0 : 1);
    rows(of_query, query, &query_weight);
    rows(of_key, key, &key_weight);
    rotary(of_query, cos, sin, pairs);
    if (!together) rotary(of_key, key_cos ? key_cos : cos, key_cos ? key_sin : sin, pairs);
    return together;
  }

  // [B, tokens, H, d], into which `streams` write their part `i`, one after the other.
  Tensor output(std::initializer_list<HeadStream*> streams, int64_t i, const Tensor& like) {
    int64_t tokens = 0;
    const int64_t width = (*streams.begin())->parts[i].width;
    for (const HeadStream* stream : streams) {
      check(stream->parts[i].width == width, "ditnorm: both streams must have the same width");
      tokens += stream->tokens;
    }
    const int64_t sizes[] = {problem_.batch, tokens, width / problem_.head_dim, problem_.head_dim};
    Tensor out = abi::empty(4, sizes, like.dtype(), like);
    auto* target = static_cast<char*>(out.data());
    const int64_t bytes = problem_.dtype == DType::f32 ? 4 : 2;
    for (HeadStream* stream : streams) {
      stream->parts[i].out = target;
      stream->parts[i].out_batch_stride = tokens * width;
      target += stream->tokens * width * bytes;
    }
    return out;
  }

  // The gradients of what `streams` wrote into one tensor [B, tokens, H, d], one after the other:
  // of their part `i`.
  void gradient(std::initializer_list<HeadStream*> streams, int64_t i, const Tensor& t) {
    check_device(t);
    check(t.dim() == 4 && float_dtype(t) == problem_.dtype, "ditnorm: a gradient must be [B, S, H, d], of the dtype of query");
    const int64_t width = (*streams.begin())->parts[i].width, d = problem_.head_dim;
    const bool dense = (t.strides()[3] == 1 || d == 1) && (t.strides()[2] == d || width == d);
    const Tensor& source = dense ? t : copy(t);
    const int64_t *sizes = source.sizes(), *strides = source.strides(), bytes = problem_.dtype == DType::f32 ? 4 : 2;
    const auto* from = static_cast<const char*>(source.data());
    int64_t tokens = 0;
    for (HeadStream* stream : streams) {
      HeadRows& rows = stream->parts[i];
      rows.gradient = from + tokens * strides[1] * bytes;
      rows.gradient_batch_stride = strides[0];
      rows.gradient_token_stride = strides[1];
      tokens += stream->tokens;
    }
    check(sizes[0] == problem_.batch && sizes[1] == tokens && sizes[2] * d == width && sizes[3] == d, "ditnorm: shape of a gradient");
  }

  // [B, S, H * d], for the gradient of `x`, which is part `i` of a stream.
  Tensor gradient_output(HeadStream& stream, int64_t i, const Tensor& x) {
    Tensor out = abi::empty(3, x.sizes(), x.dtype(), x);
    stream.parts[i].out = out.data();
    stream.parts[i].out_batch_stride = stream.tokens * stream.parts[i].width;
    return out;
  }

  HeadStream& stream(int i) { return problem_.streams[i]; }

  void run(int (*op)(const HeadProblem&, void*) = &qk_norm_rope) const {
    if (problem_.batch * (problem_.streams[0].tokens + problem_.streams[1].tokens) == 0) return;
    call_kernel(op, problem_, device_index_);
  }

 private:
  void check_device(const Tensor& t) const {
    check(t.device_type() == device_type_ && t.device_index() == device_index_, "ditnorm: tensors on different devices");
  }

  const Tensor& dense(const Tensor& t) {
    const int64_t dim = t.dim();
    return t.sizes()[dim - 1] <= 1 || t.strides()[dim - 1] == 1 ? t : copy(t);
  }

  const Tensor& copy(const Tensor& t) {
    check(copied_ < kMaxCopies, "ditnorm: too many operands");
    return copies_[copied_++] = abi::contiguous(t);
  }

  HeadProblem problem_{};
  static constexpr int kMaxCopies = 14;
  Tensor copies_[kMaxCopies];
  int copied_ = 0;
  int32_t device_type_, device_index_;
  bool normed_ = false;
};

std::tuple<Tensor, Tensor> qk_norm_rope_op(const Tensor& query, const Tensor& key, const Optional& query_weight, const Optional& key_weight,
                                           const Optional& cos, const Optional& sin, const Optional& key_cos, const Optional& key_sin,
                                           int64_t head_dim, int64_t norm, double eps, int64_t pairs, int64_t rounding) {
  HeadCall call(query, head_dim, norm, eps, rounding);
  const bool together = call.query_and_key(query, key, query_weight, key_weight, cos, sin, key_cos, key_sin, pairs);
  HeadStream &of_query = call.stream(0), &of_key = call.stream(1);
  Tensor q = call.output({&of_query}, 0, query);
  Tensor k = together ? call.output({&of_query}, 1, query) : call.output({&of_key}, 0, query);
  call.run();
  return {std::move(q), std::move(k)};
}

std::tuple<Tensor, Tensor, Tensor> joint_qk_norm_rope_op(const Tensor& query, const Tensor& key, const Tensor& value,
                                                         const Optional& query_weight, const Optional& key_weight, const Optional& cos,
                                                         const Optional& sin, const Tensor& encoder_query, const Tensor& encoder_key,
                                                         const Tensor& encoder_value, const Optional& encoder_query_weight,
                                                         const Optional& encoder_key_weight, const Optional& encoder_cos,
                                                         const Optional& encoder_sin, int64_t head_dim, int64_t norm, double eps,
                                                         int64_t encoder_first, int64_t rounding) {
  HeadCall call(query, head_dim, norm, eps, rounding);
  HeadStream &own = call.stream(0), &encoder = call.stream(1);
  call.rows(own, query, &query_weight);
  call.rows(own, key, &key_weight);
  call.rows(own, value, nullptr);
  call.rotary(own, cos, sin);
  call.rows(encoder, encoder_query, &encoder_query_weight);
  call.rows(encoder, encoder_key, &encoder_key_weight);
  call.rows(encoder, encoder_value, nullptr);
  call.rotary(encoder, encoder_cos, encoder_sin);
  HeadStream *first = encoder_first ? &encoder : &own, *second = encoder_first ? &own : &encoder;
  Tensor q = call.output({first, second}, 0, query);
  Tensor k = call.output({first, second}, 1, query);
  Tensor v = call.output({first, second}, 2, query);
  call.run();
  return {std::move(q), std::move(k), std::move(v)};
}

std::tuple<Tensor, Tensor> qk_norm_rope_backward_op(const Tensor& d_query, const Tensor& d_key, const Tensor& query, const Tensor& key,
                                                    const Optional& query_weight, const Optional& key_weight, const Optional& cos,
                                                    const Optional& sin, const Optional& key_cos, const Optional& key_sin, int64_t head_dim,
                                                    int64_t norm, double eps, int64_t pairs, int64_t rounding) {
  HeadCall call(query, head_dim, norm, eps, rounding);
  const bool together = call.query_and_key(query, key, query_weight, key_weight, cos, sin, key_cos, key_sin, pairs);
  HeadStream &of_query = call.stream(0), &of_key = call.stream(1);
  call.gradient({&of_query}, 0, d_query);
  HeadStream& with_key = together ? of_query : of_key;
  const int64_t part = together ? 1 : 0;
  call.gradient({&with_key}, part, d_key);
  Tensor q = call.gradient_output(of_query, 0, query), k = call.gradient_output(with_key, part, key);
  call.run(&qk_norm_rope_backward);
  return {std::move(q), std::move(k)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> joint_qk_norm_rope_backward_op(
    const Tensor& d_query, const Tensor& d_key, const Tensor& query, const Tensor& key, const Optional& query_weight,
    const Optional& key_weight, const Optional& cos, const Optional& sin, const Tensor& encoder_query, const Tensor& encoder_key,
    const Optional& encoder_query_weight, const Optional& encoder_key_weight, const Optional& encoder_cos, const Optional& encoder_sin,
    int64_t head_dim, int64_t norm, double eps, int64_t encoder_first, int64_t rounding) {
  HeadCall call(query, head_dim, norm, eps, rounding);
  HeadStream &own = call.stream(0), &encoder = call.stream(1);
  call.rows(own, query, &query_weight);
  call.rows(own, key, &key_weight);
  call.rotary(own, cos, sin);
  call.rows(encoder, encoder_query, &encoder_query_weight);
  call.rows(encoder, encoder_key, &encoder_key_weight);
  call.rotary(encoder, encoder_cos, encoder_sin);
  HeadStream *first = encoder_first ? &encoder : &own, *second = encoder_first ? &own : &encoder;
  call.gradient({first, second}, 0, d_query);
  call.gradient({first, second}, 1, d_key);
  Tensor q = call.gradient_output(own, 0, query), k = call.gradient_output(own, 1, key);
  Tensor encoder_q = call.gradient_output(encoder, 0, encoder_query), encoder_k = call.gradient_output(encoder, 1, encoder_key);
  call.run(&qk_norm_rope_backward);
  return {std::move(q), std::move(k), std::move(encoder_q), std::move(encoder_k)};
}

}  // namespace

Ops qk_ops() {
  static const OpEntry kOps[] = {
      op<&qk_norm_rope_op>("qk_norm_rope"),
      op<&joint_qk_norm_rope_op>("joint_qk_norm_rope"),
      op<&qk_norm_rope_backward_op>("qk_norm_rope_backward"),
      op<&joint_qk_norm_rope_backward_op>("joint_qk_norm_rope_backward"),
  };
  return {kOps, std::size(kOps)};
}

}  // namespace ditnorm
