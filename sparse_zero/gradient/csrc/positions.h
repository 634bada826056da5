// The operators of the selected positions of a weight: its Pattern, and writing base + change there. Names as in
// pattern.py.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

namespace {

constexpr int64_t STRIPS_PER_THREAD = 8192;  // at least, in loops with little work for each strip

// The first and the last of strictly increasing indices bound the others
template <typename index_t>
void check_indices(const index_t* all, int64_t count, int64_t limit, const char* name) {
  if (count == 0) return;
  TORCH_CHECK(all[0] >= 0 && all[count - 1] < limit, name, " outside of the weight");
  std::atomic<bool> rise = true;
  at::parallel_for(0, count - 1, 8 * STRIPS_PER_THREAD, [&](int64_t first, int64_t last) {
    index_t falls = 0;  // as wide as the indices, so that the loop uses vectors
    for (int64_t i = first; i < last; ++i) falls |= static_cast<index_t>(all[i] >= all[i + 1]);
    if (falls) rise = false;
  });
  TORCH_CHECK(rise, name, " must be strictly increasing");
}

// Calls use(block, first, last) for each block of rows, whose strips are strip_indices[first:last]
template <typename index_t, typename Use>
void for_blocks(const at::Tensor& strip_indices, int64_t blocks, int64_t columns, const Use& use) {
  const index_t* const begin = strip_indices.const_data_ptr<index_t>();
  const index_t* const end = begin + strip_indices.numel();
  check_indices(begin, end - begin, blocks * columns, "strip indices");
  const int64_t strips_per_block = std::max<int64_t>(1, strip_indices.numel() / std::max<int64_t>(1, blocks));
  const int64_t grain = std::max<int64_t>(1, STRIPS_PER_THREAD / strips_per_block);
  at::parallel_for(0, blocks, grain, [&](int64_t first_block, int64_t last_block) {
    const index_t* index = std::lower_bound(begin, end, first_block * columns);
    for (int64_t block = first_block; block < last_block; ++block) {
      const index_t* const first = index;
      while (index != end && *index < (block + 1) * columns) ++index;
      use(block, first - begin, index - begin);
    }
  });
}

void check_strip_indices(const at::Tensor& strip_indices) {
  TORCH_CHECK(strip_indices.dim() == 1 && strip_indices.is_contiguous(),
              "strip indices must be contiguous and have one dimension");
}

// Returns the block_starts and strip_columns of a Pattern, int32 (blocks + 1,) and (n / g,), from sorted strip indices
// in a grid of blocks x columns.
std::tuple<at::Tensor, at::Tensor> pattern(const at::Tensor& strip_indices, int64_t blocks, int64_t columns) {
  check_strip_indices(strip_indices);
  TORCH_CHECK(blocks >= 0 && columns > 0 && columns <= INT32_MAX && blocks <= INT64_MAX / columns,
              "no such grid: ", blocks, " x ", columns);
  TORCH_CHECK(strip_indices.numel() <= INT32_MAX, "too many strips");
  const at::Tensor block_starts = at::empty({blocks + 1}, strip_indices.options().dtype(at::kInt));
  const at::Tensor strip_columns = at::empty({strip_indices.numel()}, block_starts.options());
  int32_t* const starts = block_starts.mutable_data_ptr<int32_t>();
  int32_t* const strips = strip_columns.mutable_data_ptr<int32_t>();
  AT_DISPATCH_INDEX_TYPES(strip_indices.scalar_type(), "pattern", [&] {
    const index_t* const all = strip_indices.const_data_ptr<index_t>();
    for_blocks<index_t>(strip_indices, blocks, columns, [=](int64_t block, int64_t first, int64_t last) {
      starts[block] = static_cast<int32_t>(first);
      for (int64_t strip = first; strip < last; ++strip)
        strips[strip] = static_cast<int32_t>(all[strip] - block * columns);
    });
  });
  starts[blocks] = static_cast<int32_t>(strip_indices.numel());
  return {block_starts, strip_columns};
}

// What is written: base + change, summed in float or double, or base
template <typename weight_t, typename change_t>
struct Sum {
  using sum_t = std::conditional_t<std::is_same_v<weight_t, double>, double, float>;
  const weight_t* before;
  const change_t* added;  // or null

  Sum(const at::Tensor& base, const at::Tensor* change)
      : before(base.const_data_ptr<weight_t>()), added(change ? change->const_data_ptr<change_t>() : nullptr) {}

  weight_t operator()(int64_t scalar) const {
    if (!added) return before[scalar];
    return static_cast<weight_t>(static_cast<sum_t>(before[scalar]) + static_cast<sum_t>(added[scalar]));
  }
};

// Calls use(values, sum): the weight's memory, and what is written there. `base` (n,) must have the dtype of `weight`,
// `change` (n,) the same dtype or float.
template <typename Use>
void with_values(const at::Tensor& weight, const at::Tensor& base, const std::optional<at::Tensor>& change, int64_t n,
                 const Use& use) {
  TORCH_CHECK(base.is_contiguous() && base.numel() == n && base.scalar_type() == weight.scalar_type(),
              "base does not fit the weight and its positions");
  const at::Tensor* const added = change ? &*change : nullptr;
  TORCH_CHECK(!added || (added->is_contiguous() && added->numel() == n), "change does not fit base");
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "write", [&] {
    scalar_t* const values = weight.mutable_data_ptr<scalar_t>();
    if (!added || added->scalar_type() == weight.scalar_type())
      use(values, Sum<scalar_t, scalar_t>(base, added));
    else
      use(values, Sum<scalar_t, float>(base, added));
  });
  weight.unsafeGetTensorImpl()->bump_version();
}

// weight[selected] = base + change; without `change`, weight[selected] = base
void write_deltas(const at::Tensor& weight, const at::Tensor& base, const std::optional<at::Tensor>& change,
                  const at::Tensor& strip_indices, int64_t columns, int64_t g) {
  check_strip_indices(strip_indices);
  TORCH_CHECK(weight.is_contiguous() && g > 0 && columns > 0 && columns <= weight.numel() &&
                  g <= weight.numel() / columns && weight.numel() % (g * columns) == 0,
              "the weight must be contiguous and consist of complete blocks");
  const int64_t count = strip_indices.numel();
  TORCH_CHECK(count <= weight.numel() / g, "more strips than the weight has");
  with_values(weight, base, change, count * g, [&](auto* values, const auto& sum) {
    AT_DISPATCH_INDEX_TYPES(strip_indices.scalar_type(), "write", [&] {
      const index_t* const all = strip_indices.const_data_ptr<index_t>();
      if (g == 1) {
        check_indices(all, count, weight.numel(), "strip indices");
        at::parallel_for(0, count, STRIPS_PER_THREAD, [=](int64_t first, int64_t last) {
          for (int64_t scalar = first; scalar < last; ++scalar) values[all[scalar]] = sum(scalar);
        });
        return;
      }
      const int64_t blocks = weight.numel() / (g * columns);
      for_blocks<index_t>(strip_indices, blocks, columns, [=](int64_t block, int64_t first, int64_t last) {
        int64_t scalar = first * g;
        for (int64_t row = block * (g - 1); row < block * (g - 1) + g; ++row)
          for (int64_t strip = first; strip < last; ++strip) values[row * columns + all[strip]] = sum(scalar++);
      });
    });
  });
}

// Calls use(scalar, position) for scalars [first, last) in drawn columns; position: in the weight. `index(scalar)` is
// the place in the inner weight, which consists of matrices of `count` columns of `below` scalars, as the weight does
// of matrices of `width` columns.
template <typename Index, typename Use>
void for_inner(const Index& index, int64_t first, int64_t last, const int64_t* columns, int64_t count, int64_t width,
               int64_t below, const Use& use) {
  // Indices rise, so that no division is needed but the first
  const int64_t line = below == 1 ? count : below, number = index(first) / line;
  int64_t begin = number * line;
  if (below == 1) {
    int64_t row = number * width;
    for (int64_t scalar = first; scalar < last; ++scalar) {
      const int64_t at = index(scalar);
      for (; at - begin >= count; begin += count) row += width;
      use(scalar, row + columns[at - begin]);
    }
    return;
  }
  int64_t column = number % count, matrix = number / count * width;
  for (int64_t scalar = first; scalar < last; ++scalar) {
    const int64_t at = index(scalar);
    for (; at - begin >= below; begin += below)
      if (++column == count) {
        column = 0;
        matrix += width;
      }
    use(scalar, (matrix + columns[column]) * below + at - begin);
  }
}

// weight[selected] = base + change at scalars in drawn columns; without `change`, weight[selected] = base.
//
// inner_indices (n,): positions in the inner weight, see `for_inner`; without them, all of these.
// columns: int64, at least `count`, of which the first `count` are used.
void write_columns(const at::Tensor& weight, const at::Tensor& base, const std::optional<at::Tensor>& change,
                   const std::optional<at::Tensor>& inner_indices, const at::Tensor& columns, int64_t count,
                   int64_t width, int64_t below) {
  TORCH_CHECK(weight.is_contiguous() && below > 0 && width > 0 && width <= weight.numel() &&
                  below <= weight.numel() / width && weight.numel() % (width * below) == 0,
              "the weight must be contiguous and consist of complete matrices");
  TORCH_CHECK(columns.dim() == 1 && columns.is_contiguous() && count > 0 && count <= columns.numel() && count <= width,
              "the columns must be contiguous and have one dimension, and there must be as many as are used");
  const int64_t* const drawn = columns.const_data_ptr<int64_t>();
  check_indices(drawn, count, width, "columns");
  const int64_t inner = weight.numel() / width * count;
  if (inner_indices) check_strip_indices(*inner_indices);
  const int64_t n = inner_indices ? inner_indices->numel() : inner;
  with_values(weight, base, change, n, [&](auto* values, const auto& sum) {
    const auto write = [&](const auto& index) {
      at::parallel_for(0, n, STRIPS_PER_THREAD, [=](int64_t first, int64_t last) {
        for_inner(index, first, last, drawn, count, width, below,
                  [=](int64_t scalar, int64_t position) { values[position] = sum(scalar); });
      });
    };
    if (!inner_indices) {
      write([](int64_t scalar) { return scalar; });
      return;
    }
    AT_DISPATCH_INDEX_TYPES(inner_indices->scalar_type(), "write", [&] {
      const index_t* const all = inner_indices->const_data_ptr<index_t>();
      check_indices(all, n, inner, "strip indices");
      write([=](int64_t scalar) { return static_cast<int64_t>(all[scalar]); });
    });
  });
}

// The entry of a list that is empty if no weight has one
std::optional<at::Tensor> entry(at::TensorList list, size_t i) {
  return list.empty() ? std::nullopt : std::optional<at::Tensor>(list[i]);
}

// write_deltas for many weights in one call; `changes` is empty to write the bases
void write_all_deltas(at::TensorList weights, at::TensorList bases, at::TensorList changes,
                      at::TensorList strip_indices, at::IntArrayRef columns, at::IntArrayRef g) {
  const size_t count = weights.size();
  TORCH_CHECK(bases.size() == count && (changes.empty() || changes.size() == count) &&
                  strip_indices.size() == count && columns.size() == count && g.size() == count,
              "the lists must have one entry for each weight");
  for (size_t i = 0; i < count; ++i)
    write_deltas(weights[i], bases[i], entry(changes, i), strip_indices[i], columns[i], g[i]);
}

// write_columns for many weights in one call; `inner_indices` is empty to write columns as a whole
void write_all_columns(at::TensorList weights, at::TensorList bases, at::TensorList changes,
                       at::TensorList inner_indices, at::TensorList columns, at::IntArrayRef counts,
                       at::IntArrayRef widths, at::IntArrayRef below) {
  const size_t count = weights.size();
  TORCH_CHECK(bases.size() == count && (changes.empty() || changes.size() == count) &&
                  (inner_indices.empty() || inner_indices.size() == count) && columns.size() == count &&
                  counts.size() == count && widths.size() == count && below.size() == count,
              "the lists must have one entry for each weight");
  for (size_t i = 0; i < count; ++i)
    write_columns(weights[i], bases[i], entry(changes, i), entry(inner_indices, i), columns[i], counts[i], widths[i],
                  below[i]);
}

}  // namespace
