// CPU operators for the selected positions of a weight. This file has the sampled gradient, with names and shapes as in
// sampled.py; positions.h has the others.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "positions.h"

namespace {

#ifdef __AVX512F__
constexpr int64_t VECTOR_BYTES = 64;
constexpr int ROWS = 4;  // rows of a strip that are computed together, so that their sums fit into registers
#else
constexpr int64_t VECTOR_BYTES = 32;  // the compiler splits vectors that are wider than those of the CPU
constexpr int ROWS = 1;
#endif
constexpr int64_t QUAD = 4;  // columns that are summed together
constexpr int64_t TILE = 16;  // tokens are transposed in tiles of this size, a multiple of any vector's lanes
constexpr int64_t CHUNK_ROWS = 256;  // rows that are transposed at a time
constexpr int64_t MAX_TOKENS = 1 << 30;
constexpr int64_t MAX_PARTS = 1 << 16;  // groups of tokens, or threads

template <typename scalar_t, int64_t lanes>
struct Vector {
  typedef scalar_t type __attribute__((vector_size(lanes * sizeof(scalar_t)), aligned(sizeof(scalar_t)), may_alias));
};

template <typename scalar_t>
struct Lanes {
  static constexpr int64_t count = VECTOR_BYTES / sizeof(scalar_t);
  using vector = typename Vector<scalar_t, count>::type;
  using index = std::conditional_t<sizeof(scalar_t) == 4, int32_t, int64_t>;
};

// Interleaves groups of `step` lanes of a and b: of each pair of groups the first ones, that is a0 b0 a2 b2 ... for
// step 1, or the second ones, a1 b1 a3 b3 ...
template <int64_t step, bool second, typename scalar_t, int64_t... lane>
inline auto interleaved(typename Lanes<scalar_t>::vector a, typename Lanes<scalar_t>::vector b,
                        std::integer_sequence<int64_t, lane...>) {
  constexpr int64_t count = Lanes<scalar_t>::count, shift = second ? step : 0;
#ifdef __clang__
  return __builtin_shufflevector(a, b, ((lane & step) ? count + lane - step + shift : lane + shift)...);
#else
  using index = typename Lanes<scalar_t>::index;
  typedef index mask __attribute__((vector_size(VECTOR_BYTES)));
  return __builtin_shuffle(
      a, b, mask{static_cast<index>((lane & step) ? count + lane - step + shift : lane + shift)...});
#endif
}

template <int64_t step, bool second, typename scalar_t>
inline auto interleaved(typename Lanes<scalar_t>::vector a, typename Lanes<scalar_t>::vector b) {
  return interleaved<step, second, scalar_t>(a, b, std::make_integer_sequence<int64_t, Lanes<scalar_t>::count>());
}

// Transposes a square of as many vectors as a vector has lanes
template <typename scalar_t, int64_t step = 1>
inline void transpose(typename Lanes<scalar_t>::vector* square) {
  if constexpr (step < Lanes<scalar_t>::count) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < Lanes<scalar_t>::count; ++i) {
      if (i & step) continue;
      const auto a = square[i], b = square[i + step];
      square[i] = interleaved<step, false, scalar_t>(a, b);
      square[i + step] = interleaved<step, true, scalar_t>(a, b);
    }
    transpose<scalar_t, step * 2>(square);
  }
}

int64_t rounded_up(int64_t tokens) { return (tokens + TILE - 1) / TILE * TILE; }

// transposed[(feature - first) * width + token] = x_NX[start + token][feature], with zeros from `tokens` to `width`
template <typename sum_t, typename scalar_t>
void copy_transposed(const at::Tensor& x_NX, int64_t start, int64_t tokens, int64_t first, int64_t last,
                     sum_t* transposed) {
  constexpr int64_t COUNT = Lanes<sum_t>::count;
  using Line = typename Lanes<sum_t>::vector;
  const int64_t by_token = x_NX.stride(0), by_feature = x_NX.stride(1), width = rounded_up(tokens);
  const scalar_t* x = x_NX.const_data_ptr<scalar_t>() + start * by_token;
  const auto transpose_square = [=](int64_t token, int64_t feature) {
    const int64_t some_tokens = std::min(COUNT, tokens - token), some_features = std::min(COUNT, last - feature);
    const scalar_t* source = x + token * by_token + feature * by_feature;
    sum_t* target = transposed + (feature - first) * width + token;
    if (some_tokens == COUNT && some_features == COUNT && by_feature == 1) {
      Line square[COUNT];
      for (int64_t t = 0; t < COUNT; ++t) {
        sum_t line[COUNT];
        for (int64_t f = 0; f < COUNT; ++f) line[f] = static_cast<sum_t>(source[t * by_token + f]);
        square[t] = *reinterpret_cast<const Line*>(line);
      }
      transpose<sum_t>(square);
      for (int64_t f = 0; f < COUNT; ++f) *reinterpret_cast<Line*>(target + f * width) = square[f];
      return;
    }
    for (int64_t f = 0; f < some_features; ++f)
      for (int64_t t = 0; t < COUNT; ++t)
        target[f * width + t] =
            t < some_tokens ? static_cast<sum_t>(source[t * by_token + f * by_feature]) : sum_t(0);
  };
  for (int64_t token = 0; token < width; token += COUNT)
    for (int64_t feature = first; feature < last; feature += COUNT) transpose_square(token, feature);
}

template <typename sum_t>
void copy_transposed(const at::Tensor& x_NX, int64_t start, int64_t tokens, int64_t first, int64_t last,
                     sum_t* transposed) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x_NX.scalar_type(), "sampled_product", [&] {
    copy_transposed<sum_t, scalar_t>(x_NX, start, tokens, first, last, transposed);
  });
}

// sums[i * stride + j] += dot product of rows[i] and columns[j] over `width` tokens, for `some` of QUAD columns
template <typename sum_t, int SOME_ROWS>
inline void add_dots(const sum_t* rows, const sum_t* const* columns, int64_t some, int64_t width, sum_t* sums,
                     int64_t stride) {
  constexpr int64_t COUNT = Lanes<sum_t>::count;
  using Line = typename Lanes<sum_t>::vector;
  using Quad = typename Vector<sum_t, QUAD>::type;
  Line totals[SOME_ROWS][QUAD] = {};
  for (int64_t token = 0; token < width; token += COUNT) {
    Line column[QUAD];
    for (int j = 0; j < QUAD; ++j) column[j] = *reinterpret_cast<const Line*>(columns[j] + token);
    for (int i = 0; i < SOME_ROWS; ++i) {
      const Line row = *reinterpret_cast<const Line*>(rows + i * width + token);
      for (int j = 0; j < QUAD; ++j) totals[i][j] += row * column[j];
    }
  }
  // Sum over the lanes of four columns together: one by one this would take longer than the products
  for (int i = 0; i < SOME_ROWS; ++i) {
    const Line* const each = totals[i];
    const Line first = interleaved<1, false, sum_t>(each[0], each[1]) + interleaved<1, true, sum_t>(each[0], each[1]);
    const Line last = interleaved<1, false, sum_t>(each[2], each[3]) + interleaved<1, true, sum_t>(each[2], each[3]);
    const Line both = interleaved<2, false, sum_t>(first, last) + interleaved<2, true, sum_t>(first, last);
    sum_t lanes[COUNT];
    *reinterpret_cast<Line*>(lanes) = both;
    Quad sum = *reinterpret_cast<const Quad*>(lanes);
    for (int64_t lane = QUAD; lane < COUNT; lane += QUAD) sum += *reinterpret_cast<const Quad*>(lanes + lane);
    sum_t* const target = sums + i * stride;
    if (some == QUAD) {
      *reinterpret_cast<Quad*>(target) += sum;
      continue;
    }
    for (int64_t j = 0; j < some; ++j) target[j] += sum[j];
  }
}

// The dot products of a block's strips for SOME_ROWS of its rows
template <typename sum_t, int SOME_ROWS>
void add_strips(const sum_t* rows, const sum_t* columns, const int32_t* strips, int64_t count, int64_t width,
                sum_t* sums) {
  for (int64_t strip = 0; strip < count; strip += QUAD) {
    const int64_t some = std::min<int64_t>(QUAD, count - strip);
    const sum_t* chosen[QUAD];
    for (int64_t j = 0; j < QUAD; ++j) chosen[j] = columns + strips[strip + std::min(j, some - 1)] * width;
    add_dots<sum_t, SOME_ROWS>(rows, chosen, some, width, sums + strip, count);
  }
}

// The dot products of a block's strips for all of its g rows: sums is (g, count)
template <typename sum_t>
void add_block(const sum_t* rows, const sum_t* columns, const int32_t* strips, int64_t count, int64_t width, int64_t g,
               sum_t* sums) {
  int64_t row = 0;
  for (; row + ROWS <= g; row += ROWS)
    add_strips<sum_t, ROWS>(rows + row * width, columns, strips, count, width, sums + row * count);
  for (; row < g; ++row)
    add_strips<sum_t, 1>(rows + row * width, columns, strips, count, width, sums + row * count);
}

// Whether all indices are in [low, high)
template <typename index_t>
bool are_between(const index_t* indices, int64_t count, int64_t low, int64_t high) {
  index_t least = std::numeric_limits<index_t>::max(), most = std::numeric_limits<index_t>::min();
  for (int64_t i = 0; i < count; ++i) {
    least = std::min(least, indices[i]);
    most = std::max(most, indices[i]);
  }
  return count == 0 || (least >= low && most < high);
}

// Returns rows_NR^T @ columns_NC at the positions of a Pattern: (n,) of `dtype`, float or double.
//
// The tokens are divided into groups with separate sums, and each group into chunks of `tokens` tokens, a multiple of
// TILE. A thread transposes the columns of a chunk, which then stay in its core's cache, and some rows at a time. The
// order of the sums depends on `tokens` and `groups` only, not on the number of threads, which is at most `threads`.
at::Tensor sampled_product(const at::Tensor& rows_NR, const at::Tensor& columns_NC, const at::Tensor& block_starts,
                           const at::Tensor& strip_columns, int64_t g, int64_t tokens, int64_t groups, int64_t threads,
                           at::ScalarType dtype) {
  TORCH_CHECK(rows_NR.dim() == 2 && columns_NC.dim() == 2 && block_starts.dim() == 1 && strip_columns.dim() == 1,
              "rows and columns must be matrices, and the pattern must have one dimension");
  const int64_t N = rows_NR.size(0), R = rows_NR.size(1), C = columns_NC.size(1), n = strip_columns.numel() * g;
  const int64_t blocks = block_starts.numel() - 1;
  TORCH_CHECK(columns_NC.size(0) == N && blocks > 0 && g > 0 && R % g == 0 && R / g == blocks,
              "rows, columns and pattern do not fit together");
  TORCH_CHECK(N > 0 && tokens > 0 && tokens % TILE == 0, "nothing to sum");
  TORCH_CHECK(N <= MAX_TOKENS && R <= INT32_MAX && C <= INT32_MAX, "too large: products of these sizes would overflow");
  TORCH_CHECK(groups > 0 && groups <= MAX_PARTS && threads > 0 && threads <= MAX_PARTS, "too many groups or threads");
  TORCH_CHECK(rows_NR.is_floating_point() && columns_NC.is_floating_point(), "rows and columns must be real numbers");
  TORCH_CHECK(block_starts.is_contiguous() && strip_columns.is_contiguous(), "the pattern must be contiguous");
  const int32_t* const starts = block_starts.const_data_ptr<int32_t>();
  const int32_t* const strips = strip_columns.const_data_ptr<int32_t>();
  TORCH_CHECK(starts[0] == 0 && starts[blocks] == strip_columns.numel() && std::is_sorted(starts, starts + blocks + 1),
              "block_starts does not fit strip_columns");
  TORCH_CHECK(are_between(strips, strip_columns.numel(), 0, C), "strip columns outside of the weight");

  const int64_t tokens_per_group = rounded_up((N + groups - 1) / groups), width = std::min(tokens, tokens_per_group);
  const int64_t parts = std::max<int64_t>(1, threads / groups), blocks_per_part = (blocks + parts - 1) / parts;
  const int64_t blocks_per_chunk = std::max<int64_t>(1, CHUNK_ROWS / g);
  const int64_t room = (C + blocks_per_chunk * g) * width, tasks = groups * parts;
  const at::Tensor sums = at::zeros({groups, n}, rows_NR.options().dtype(dtype));
  const at::Tensor result = groups == 1 ? sums[0] : at::empty({n}, sums.options());
  const at::Tensor transposed = at::empty({std::min(threads, tasks), room}, sums.options());

  AT_DISPATCH_FLOATING_TYPES(dtype, "sampled_product", [&] {
    using sum_t = scalar_t;
    sum_t* const all_sums = sums.mutable_data_ptr<sum_t>();
    sum_t* const all_transposed = transposed.mutable_data_ptr<sum_t>();
    at::parallel_for(0, tasks, (tasks + threads - 1) / threads, [&](int64_t first_task, int64_t last_task) {
      sum_t* const columns = all_transposed + at::get_thread_num() * room;
      sum_t* const rows = columns + C * width;
      for (int64_t task = first_task; task < last_task; ++task) {
        const int64_t group = task / parts, end = std::min(N, (group + 1) * tokens_per_group);
        const int64_t first = task % parts * blocks_per_part, last = std::min(blocks, first + blocks_per_part);
        if (first >= last) continue;
        for (int64_t start = group * tokens_per_group; start < end; start += width) {
          const int64_t some = std::min(width, end - start), length = rounded_up(some);
          copy_transposed(columns_NC, start, some, 0, C, columns);
          for (int64_t block = first; block < last; ++block) {
            const int64_t inside = (block - first) % blocks_per_chunk;
            if (inside == 0)
              copy_transposed(rows_NR, start, some, block * g, std::min(block + blocks_per_chunk, last) * g, rows);
            const int64_t strip = starts[block], count = starts[block + 1] - strip;
            add_block(rows + inside * g * length, columns, strips + strip, count, length, g,
                      all_sums + group * n + strip * g);
          }
        }
      }
    });
    if (groups == 1) return;
    // The order of torch's own sum depends on the number of threads
    sum_t* const results = result.mutable_data_ptr<sum_t>();
    at::parallel_for(0, n, 16384, [&](int64_t first, int64_t last) {
      std::copy(all_sums + first, all_sums + last, results + first);
      for (int64_t group = 1; group < groups; ++group)
        for (int64_t i = first; i < last; ++i) results[i] += all_sums[group * n + i];
    });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY(sparse_zero, library) {
  library.def("pattern(Tensor strip_indices, int blocks, int columns) -> (Tensor, Tensor)");
  library.def(
      "write_deltas(Tensor(a!) weight, Tensor base, Tensor? change, Tensor strip_indices, int columns, "
      "int granularity) -> ()");
  library.def(
      "write_all_deltas(Tensor(a!)[] weights, Tensor[] bases, Tensor[] changes, Tensor[] strip_indices, int[] columns, "
      "int[] granularities) -> ()");
  library.def(
      "write_all_columns(Tensor(a!)[] weights, Tensor[] bases, Tensor[] changes, Tensor[] inner_indices, "
      "Tensor[] columns, int[] counts, int[] widths, int[] below) -> ()");
  library.def(
      "sampled_product(Tensor rows, Tensor columns, Tensor block_starts, Tensor strip_columns, int granularity, "
      "int tokens, int groups, int threads, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(sparse_zero, CPU, library) {
  library.impl("pattern", &pattern);
  library.impl("write_deltas", &write_deltas);
  library.impl("write_all_deltas", &write_all_deltas);
  library.impl("write_all_columns", &write_all_columns);
  library.impl("sampled_product", &sampled_product);
}
