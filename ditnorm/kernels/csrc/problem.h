// What one call of an op asks for, in plain C++: filled by site_call.h and qk_ops.cpp, passed by
// value to the kernels. Strides count elements.
#pragma once
#include <cstdint>

namespace ditnorm {

enum class DType : int32_t { f32, f16, bf16, i64, i32, i16, i8, u8 };  // u8 also reads bool

enum class Norm : int32_t { layer, rms, diffusers_rms };

struct Rows {  // [batch, tokens, width], last dim dense
  const void* data;
  DType dtype;
  int64_t batch_stride, token_stride;
};

struct Vector {  // [width], dense; data is null where not given
  const void* data;
  DType dtype;
};

struct Modulation {  // rows of `width`, last dim dense; data is null where not given
  const void* data;
  DType dtype;
  int64_t batch_stride, row_stride;
  int64_t tokens_per_row = 1;  // without an index, token s reads row s / tokens_per_row
  Vector table;                // added in float32
};

struct Index {  // [batch, tokens]; token s reads row index[s] of each modulation; data is null where not given
  const void* data;
  DType dtype;
  int64_t batch_stride, token_stride;
  int64_t rows;
};

// The widest rows that a warp holds between two of its norms.
constexpr int64_t kMostMeanWidth = 4096;

constexpr int kNotServed = -1;  // in place of a cudaError_t: no fast kernel serves the problem

// How a linear layer with quantised weights is handed what it reads. In the order of LAWS in
// ditnorm/ops/quantization.py.
enum class Law : int32_t { float8_row, float8_tensor, int8_row, float8_row_bfl };
constexpr int64_t kLaws = 4;

struct Quantized {
  Law law;
  uint8_t* values;  // [rows, width]; null where nothing is quantised
  float* scale;     // [rows], or one where the law has one for all rows
  // [rows], the bits of the largest |y| of each, where the law has one scale for all rows: then the
  // norm's kernel writes these, and y, for another to quantise.
  uint32_t* maxima;
};

// The largest |y| of all rows is that of these, as bits.
struct Partials {
  const uint32_t* data;
  int64_t count;
};

struct Problem {
  int64_t batch, tokens, width;
  Rows x, residual;  // residual.data is null in norm_scale_shift
  Modulation gate, scale, shift;
  Vector weight, bias;
  Index index;
  void* y;  // [batch, tokens, width] contiguous, dtype of x
  void* r;  // the same, dtype of residual
  Norm norm;
  float eps;
  // rounding="eager" with a half-precision law: every intermediate is rounded to the dtype of x.
  // False: float32 throughout.
  bool round_each;
  Quantized quantized;  // y in its place
  // Of Norm::diffusers_rms: x itself may be normed too, with a weight of its own, before it is added
  // to the residual. Without a y nothing else is.
  bool norms_x;
  Vector x_weight;
  float mean_factor;  // 1 / width, as ATen computes it
};

// A norm whose y is made for the second time, where its scale is known.
struct AgainProblem {
  Problem norm;
  Partials known;  // data is null where it is only asked whether there is a kernel
};

// The gradients of a norm site's rows, given those of its results. All rows are of one dtype.
struct SiteBackward {
  // x: the rows that were normed (r, where a residual was added), or dr where there was no norm.
  // shift tells the law; bias, y and r aren't read.
  Problem site;
  Rows dy, dr;     // of y, and of x as it left the site; data is null where there is none
  void* d_row;     // of x: contiguous, as d_branch
  void* d_branch;  // of what the gate multiplied; null where nothing was gated
  bool eager;      // gradients are rounded to the rows' dtype where eager autograd hands them on
  bool parted;     // of Norm::diffusers_rms: d_row and d_branch take what comes through the two uses of x
};

// Where the tokens of one head are rotated by position. The tables are float32.
struct Rotary {
  const float *cos, *sin;  // null where nothing is rotated
  int64_t batch_stride, token_stride, step;
  int64_t tokens;       // the leading ones are rotated
  bool per_element;     // a value for each element of a head, else for each pair
  bool contracted;      // products and sums fuse: as ATen multiplies complex numbers, and always in rounding="single"
  bool halves;          // the pairs are of the two halves of a head, else of neighbours
  int64_t head_stride;  // 0: the heads share the tables
};

// One of query, key and value: [batch, tokens, width], last dim dense -> out, [batch, tokens,
// width] with dense tokens.
struct HeadRows {
  const void* data;
  int64_t batch_stride, token_stride, width;
  Vector weight;
  void* out;
  int64_t out_batch_stride;
  float mean_factor;  // 1 / head_dim, as ATen computes it for diffusers' RMSNorm
  bool copied;        // neither normed nor rotated
  // Of a backward pass: the gradient of what was written, as data; `out` takes that of data.
  const void* gradient;
  int64_t gradient_batch_stride, gradient_token_stride;
};

constexpr int kParts = 3;

// What shares its tokens and rotary tables.
struct HeadStream {
  HeadRows parts[kParts];
  int64_t count, tokens;
  Rotary rotary;
};

// RMSNorm per head or across heads, and the rotary embedding, of one or two streams.
struct HeadProblem {
  int64_t batch, head_dim;
  DType dtype;
  bool across;  // one norm over all heads
  bool twice;   // diffusers' RMSNorm: its mean, and rounding="eager" rounds before the multiplication by the weight
  bool eager;
  float eps;
  HeadStream streams[2];  // the second may have no tokens
};

// Each returns a cudaError_t. `stream` is a cudaStream_t.
int qk_norm_rope(const HeadProblem& problem, void* stream);
int qk_norm_rope_backward(const HeadProblem& problem, void* stream);
int norm_scale_shift(const Problem& problem, void* stream);
int scale_residual_norm_scale_shift(const Problem& problem, void* stream);
int scale_residual(const Problem& problem, void* stream);
int norm_backward(const SiteBackward& problem, void* stream);
int scale_residual_backward(const SiteBackward& problem, void* stream);
// The norm sites of Norm::diffusers_rms.
int mean_norm(const Problem& problem, void* stream);
int mean_norm_backward(const SiteBackward& problem, void* stream);
// With y quantised. kNotServed where there is no kernel that does both.
int norm_scale_shift_quantize(const Problem& problem, void* stream);
int norm_scale_shift_quantize_again(const AgainProblem& problem, void* stream);
int scale_residual_norm_scale_shift_quantize(const Problem& problem, void* stream);

}  // namespace ditnorm
