// What the quantising ops ask for, in plain C++: filled by quantize_ops.cpp, passed by value to the
// kernels. Strides count elements.
#pragma once
#include <cstdint>

#include "problem.h"

namespace ditnorm {

constexpr unsigned kMaxQuantizeThreads = 512, kAmaxThreads = 256;
constexpr int64_t kMaxPartials = 1024;
constexpr unsigned kTableItems = 4, kMaxTableThreads = 576;  // see gelu_table_quantize_kernel
constexpr unsigned kMaxCopiesThreads = 1024;                 // see gelu_copies_quantize_kernel
constexpr int64_t kFewestTableRows = 1024, kNarrowestTableRow = 2048, kNarrowestCopiesRow = 4096;

// A cluster has 16 bytes for each item of its threads. As measured on an H200: with more it takes
// longer than two kernels that all multiprocessors run.
constexpr unsigned kMaxClusterThreads = 1024;
constexpr int kClusterItems = 5;

// Rows of at most 256 accesses of 16 bytes, of which a block has several where there are many: a
// block of one would move fewer bytes than its start is worth (kLeastBlockBytes in row_blocks.h).
constexpr int kNarrowItems = 8, kNarrowRows = 8;
constexpr int64_t kManyNarrowRows = 2048;

struct QuantizeProblem {
  int64_t batch, tokens, width;
  Rows x;
  Quantized out;
  bool gelu;  // of x, with its tanh approximation, before it is quantised
  // Room for partial_count numbers where one scale is for several rows, else null.
  uint32_t* partials;
  int64_t partial_count;
  // The bits of the largest |x| of each row, where they are known, or null. Those of few rows are the
  // partials themselves.
  const uint32_t* maxima;
};

// x, or GELU of it, in one piece.
struct OnePiece {
  DType dtype;
  int64_t elements;
  bool gelu;
};

// An int32 matrix product [rows, width] -> y in `dtype`.
struct ProductProblem {
  int64_t rows, width;
  const int32_t* product;
  const float *scale, *weight_scale;  // [rows], [width]
  const void* bias;                   // [width] in `dtype`, or null
  DType dtype;                        // half precision
  void* y;
};

// Whether the current GPU multiplies float8 matrices, which PyTorch asks compute capability 8.9
// for.
bool has_float8();

// As those of problem.h. A GPU before compute capability 8.9, which multiplies no float8 matrices,
// quantises to int8 only.
int quantize(const QuantizeProblem& problem, void* stream);
int quantizes_as_row(const OnePiece& x, void*);                   // kNotServed unless one kernel has it as a single row
int find_partials(const QuantizeProblem& problem, void* stream);  // of its maxima
int dequantize_product(const ProductProblem& problem, void* stream);

}  // namespace ditnorm
