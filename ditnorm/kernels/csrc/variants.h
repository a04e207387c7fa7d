// Which kernels there are that hold a whole row, and which problems each serves, in two tables: the
// norm sites (norm_scale_shift and scale_residual_norm_scale_shift) and the norm across heads of
// query and key.
//
// The first row of a table that serves a problem runs it; where none does, the generic kernel runs.
// All rows give the same bits. They are there for speed, as measured: docs/kernels-log.md. A new
// kernel is a new row, above those that it is to take problems from.
#pragma once
#include "lanes.h"
#include "problem.h"

namespace ditnorm {

// What a kernel serves beside modulations: nothing; the norm's affine in the dtype of x; tables for
// all modulations; or any of these, and an affine in float32, which it finds out at run time.
enum class Extras { none, affine, tables, any };

enum class ModulationDType { of_x, f32 };           // a kernel for modulations in the dtype of x, or in float32
enum class Intermediates { exact, rounded, both };  // in float32 throughout; rounded to the dtype of x; a kernel for each
enum class Sharing { any, shared };                 // shared: all tokens of a sample have one modulation, and there are many rows
constexpr int64_t kManyRows = 2048;

// Rows of at most `tiles` tiles. `blocks`: see Tiles.
struct Width {
  int tiles, blocks;
  constexpr Width(int tiles = 0, int blocks = 0) : tiles(tiles), blocks(blocks) {}
};

constexpr int kExactly = -1;  // in place of Widths::above: a row goes to the kernel whose tiles it fills

// A kernel for each width, narrowest first. A row of more than `above` tiles goes to the first that
// it fits into.
struct Widths {
  int above;
  Width list[7];

  constexpr int count() const {
    int count = 0;
    for (const Width& width : list) count += width.tiles != 0;
    return count;
  }
  // The tiles that are full in every row that goes to a width.
  constexpr int full(int width) const { return above == kExactly ? list[width].tiles : width == 0 ? above : list[width - 1].tiles; }
};

struct NormSite {
  bool residual;  // scale_residual_norm_scale_shift
  DType x;
  ModulationDType modulation;
  Intermediates intermediates;
  Extras extras;
  Sharing sharing;
  int lanes, ahead;  // see Shape
  Widths widths;
  int rows = 1;  // see Shape

  constexpr bool compiled_for(bool residual, DType x, DType modulation, bool rounded) const {
    return residual == this->residual && x == this->x && (modulation == x) == (this->modulation == ModulationDType::of_x) &&
           (intermediates == Intermediates::both || rounded == (intermediates == Intermediates::rounded));
  }
  constexpr bool serves(Extras wanted, bool shared) const {
    return (extras == wanted || extras == Extras::any) && (sharing == Sharing::any || shared);
  }
};

struct NormBackward {
  DType x;
  int lanes;
  Widths widths;
};

// Rows of `tiles` full tiles without a weight, with modulations in the dtype of x. Without tables
// there is a kernel for each law.
struct KnownNormBackward {
  bool residual, tables;
  DType x;
  int lanes, ahead;   // see Shape
  int tiles, blocks;  // see Tiles

  constexpr bool compiled_for(DType x, DType modulation, bool rounded) const {
    return x == this->x && modulation == x && !(tables && rounded);
  }
};

struct AcrossHeads {
  DType x;
  int lanes;
  Widths widths;
};

namespace variants {

constexpr bool kNorm = false, kResidualNorm = true;
constexpr auto bf16 = DType::bf16, f16 = DType::f16, f32 = DType::f32;
constexpr auto of_x = ModulationDType::of_x, in_f32 = ModulationDType::f32;
constexpr auto exact = Intermediates::exact, rounded = Intermediates::rounded, both = Intermediates::both;
constexpr auto none = Extras::none, affine = Extras::affine, tables = Extras::tables, any = Extras::any;
constexpr auto all = Sharing::any, shared = Sharing::shared;

// bfloat16 is what models run in: kernels for every width. float16 and float32 have fewer, and a
// row there may take a wider kernel than it needs. Narrow rows are mostly reduction and
// bookkeeping, of which a thread with two lanes has less; wide ones wait for memory, which more
// threads hide. Half-precision modulations stay behind the row in the memory's queues, and the
// reduction hides the wait for them; float16 with "single" rounding, most of which is conversions,
// was slower with that. `blocks` stands where ptxas, left alone, spills a register or two to reach
// an occupancy that it likes.
//
// clang-format off
constexpr NormSite kNormSites[] = {
  // op           x     modulation intermediates extras  sharing lanes ahead   above tiles {blocks}
  {kNorm,         bf16, of_x,      both,         none,   all,    2, kAfterRow, 0, {2, 3, 4}},
  {kNorm,         bf16, of_x,      both,         none,   all,    1, kAfterRow, 4, {6, 8, 10, 12}},
  {kNorm,         bf16, of_x,      both,         affine, shared, 1, 1,         4, {6}},
  {kNorm,         bf16, of_x,      both,         affine, all,    2, kAfterRow, 0, {2, 4}},
  {kNorm,         bf16, of_x,      both,         affine, all,    1, kAfterRow, 4, {6, 8, 12}},
  {kNorm,         bf16, of_x,      exact,        any,    all,    2, 0,         0, {{2, 16}, {3, 16}, 4}},
  {kNorm,         bf16, of_x,      exact,        any,    all,    1, 1,         4, {6, 8, {10, 8}, 12}},
  {kNorm,         bf16, in_f32,    exact,        any,    all,    2, 0,         0, {2, 3, 4}},
  {kNorm,         bf16, in_f32,    exact,        any,    all,    1, 1,         4, {6, 8, {10, 7}, 12}},

  {kNorm,         f16,  of_x,      rounded,      none,   all,    2, kAfterRow, 0, {4}},
  {kNorm,         f16,  of_x,      rounded,      none,   all,    1, kAfterRow, 4, {6, 10, 12}},
  {kNorm,         f16,  of_x,      exact,        none,   all,    2, kWithRow,  0, {4}},
  {kNorm,         f16,  of_x,      exact,        none,   all,    1, kWithRow,  4, {6, 10, 12}},
  {kNorm,         f16,  of_x,      rounded,      affine, all,    1, kAfterRow, 0, {6, 12}},
  {kNorm,         f16,  of_x,      exact,        any,    all,    1, 1,         0, {6, 12}},
  {kNorm,         f16,  in_f32,    exact,        any,    all,    1, 1,         0, {6, 12}},

  {kNorm,         f32,  of_x,      exact,        any,    all,    1, 1,         0, {4, 6, 12}},

  {kResidualNorm, bf16, of_x,      both,         none,   all,    2, kAfterRow, 0, {2, 3, 4}},
  {kResidualNorm, bf16, of_x,      both,         none,   all,    1, kAfterRow, 4, {6, 8, 10, {12, 4}}},
  {kResidualNorm, bf16, of_x,      both,         affine, all,    2, kAfterRow, 0, {2, 4}},
  {kResidualNorm, bf16, of_x,      both,         affine, all,    1, kAfterRow, 4, {6, 8, 12}},
  {kResidualNorm, bf16, of_x,      exact,        tables, all,    1, 2,         0, {2, 3, 4}},
  {kResidualNorm, bf16, of_x,      exact,        tables, all,    1, 5,         4, {6, {8, 3}, 10}},
  {kResidualNorm, bf16, of_x,      exact,        any,    all,    2, kWithRow,  0, {3}},
  {kResidualNorm, bf16, of_x,      exact,        any,    all,    1, kWithRow,  3, {6, 10, 12}},
  {kResidualNorm, bf16, in_f32,    exact,        any,    all,    2, 2,         0, {2, 3, 4}},
  {kResidualNorm, bf16, in_f32,    exact,        any,    all,    1, 2,         4, {6, 8, 10, 12}},

  {kResidualNorm, f16,  of_x,      rounded,      none,   all,    2, kAfterRow, 0, {4}},
  {kResidualNorm, f16,  of_x,      rounded,      none,   all,    1, kAfterRow, 4, {6, 10, {12, 4}}},
  {kResidualNorm, f16,  of_x,      exact,        none,   all,    2, kWithRow,  0, {4}},
  {kResidualNorm, f16,  of_x,      exact,        none,   all,    1, kWithRow,  4, {6, 10, 12}},
  {kResidualNorm, f16,  of_x,      rounded,      affine, all,    1, kAfterRow, 0, {6, 12}},
  {kResidualNorm, f16,  of_x,      exact,        any,    all,    1, kWithRow,  0, {{6, 4}, 12}},
  {kResidualNorm, f16,  in_f32,    exact,        any,    all,    1, 2,         0, {6, 12}},

  {kResidualNorm, f32,  of_x,      exact,        any,    all,    1, 1,         0, {4, 6, 12}},
};

// With y quantised: what models with quantised weights run in. What no row serves is quantised by a
// kernel of its own. With a byte an element to write, and more to compute, these wait for
// instructions, not for memory. A warp for each row has fewest: what is done once for a row is done
// by one. Several of them make a block that goes from row to row (walking_kernel.cuh). Where the
// width is known there are no branches, over which instructions don't move.
constexpr NormSite kQuantizedNormSites[] = {
  // op           x     modulation intermediates extras  sharing lanes ahead   above tiles {blocks} rows
  {kNorm,         bf16, of_x,      rounded,      none,   shared, 4, 0,         kExactly, {{3, 3}, {6, 2}}, 8},
  {kNorm,         bf16, of_x,      rounded,      none,   shared, 4, 0,         0, {4, {6, 5}},    4},
  {kNorm,         bf16, of_x,      rounded,      none,   all,    2, kAfterRow, 0, {4}},
  {kNorm,         bf16, of_x,      rounded,      none,   all,    1, kAfterRow, 4, {6, 8, 10}},
  {kNorm,         bf16, of_x,      exact,        tables, shared, 4, 0,         kExactly, {{3, 4}, {6, 2}}, 8},
  {kNorm,         bf16, of_x,      exact,        tables, shared, 4, 0,         kExactly, {10},             12},
  {kNorm,         bf16, of_x,      exact,        any,    all,    2, 0,         0, {{3, 16}}},
  {kNorm,         bf16, of_x,      exact,        any,    all,    1, 1,         3, {{6, 8}, 10}},

  {kResidualNorm, bf16, of_x,      rounded,      none,   all,    2, kAfterRow, 0, {4}},
  {kResidualNorm, bf16, of_x,      rounded,      none,   all,    1, kAfterRow, 4, {6, 8, 10}},
  {kResidualNorm, bf16, of_x,      exact,        tables, shared, 4, 0,         kExactly, {{3, 2}},         8},
  {kResidualNorm, bf16, of_x,      exact,        tables, shared, 4, 0,         kExactly, {6},              12},
  {kResidualNorm, bf16, of_x,      exact,        tables, all,    4, 1,         kExactly, {3}},
  {kResidualNorm, bf16, of_x,      exact,        tables, all,    2, 1,         kExactly, {6}},
  {kResidualNorm, bf16, of_x,      exact,        tables, all,    1, 5,         kExactly, {10}},
  {kResidualNorm, bf16, of_x,      exact,        any,    all,    2, kWithRow,  0, {3}},
  {kResidualNorm, bf16, of_x,      exact,        any,    all,    1, kWithRow,  3, {6, 10}},
};

// Those of them that are made a second time, where one scale is for all rows: a kernel each, so only
// the widths of large models have one.
constexpr NormSite kNormSitesAgain[] = {
  // op           x     modulation intermediates extras  sharing lanes ahead   above tiles {blocks} rows
  {kNorm,         bf16, of_x,      rounded,      none,   shared, 4, 0,         kExactly, {{6, 1}},         12},
  {kNorm,         bf16, of_x,      exact,        tables, shared, 4, 0,         kExactly, {10},             12},
};

// The gradients of the rows of a norm site, for each dtype of the modulations and each law. Of
// float16, in which nobody trains, gradients go through the generic kernels.
constexpr NormBackward kNormBackward[] = {
  // x   lanes above tiles
  {bf16, 2,    0, {3, 4}},
  {bf16, 1,    4, {6, {8, 4}, 10, 12}},
  {f32,  1,    0, {6, 12}},
};

// Those of models that are trained: 1536 in Stable Diffusion 3.5 Medium, 3072 in FLUX.1, HunyuanVideo
// and Qwen-Image, 1536 and 5120 with tables in Wan (known_norm_backward.cuh). kNormBackward serves
// them too, but its kernels find out at run time what there is and take up to a quarter longer.
constexpr KnownNormBackward kKnownNormBackward[] = {
  // op           tables x     lanes ahead     tiles blocks
  {kNorm,         false, bf16, 2,    kWithRow, 3,    0},
  {kNorm,         false, bf16, 1,    kWithRow, 6,    0},
  {kNorm,         true,  bf16, 2,    0,        3,    14},
  {kNorm,         true,  bf16, 1,    2,        10,   4},
  {kResidualNorm, false, bf16, 2,    1,        3,    12},
  {kResidualNorm, false, bf16, 1,    kWithRow, 6,    0},
  {kResidualNorm, true,  bf16, 1,    2,        10,   0},
};

constexpr AcrossHeads kAcrossHeads[] = {
  // x   lanes above tiles
  {bf16, 2,    0, {2, 3, 4}},
  {bf16, 1,    4, {6, 8, 10, 12}},
  {f16,  2,    0, {4}},
  {f16,  1,    4, {6, 10, 12}},
  {f32,  1,    0, {2, 3, 6, 12}},
};

// With a rotary embedding of the halves of a head and tables for each, of which a row reads twice its
// own bytes: what LTX-2 has.
constexpr AcrossHeads kAcrossHalves[] = {
  // x   lanes above tiles
  {bf16, 1,    0, {4, 8}},
  {f16,  1,    0, {8}},
  {f32,  1,    0, {8}},
};

// Its gradients. The widths of Wan have kernels without branches; any other takes a wider kernel
// than it may need.
constexpr AcrossHeads kAcrossHeadsBackward[] = {
  // x   lanes above tiles
  {bf16, 2,    kExactly, {{3, 14}}},
  {bf16, 1,    kExactly, {6, 10}},
  {bf16, 1,    0, {12}},
  {f32,  1,    0, {6, 12}},
};
// clang-format on

}  // namespace variants

}  // namespace ditnorm
