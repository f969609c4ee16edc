#pragma once
// Sums of rows, or of their squares, column by column.

#include <algorithm>
#include <cstdint>

#include "row_source.h"
#include "tile_product.h"

namespace kfac_fast {

// The functions of one instruction set.
template <typename In, typename T>
struct RowSumFunctions {
  // total[c] += Σ_r row r at column c, with rows side by side or columns apart.
  void (*add_rows)(const In* rows, int64_t stride, int64_t count, int64_t columns, T* total);
  void (*add_columns)(const In* rows, int64_t stride, int64_t column_stride, int64_t count,
                      int64_t columns, T* total);
  // total += chain, chain <- 0
  void (*end_chain)(T* chain, int64_t columns, T* total, T* lost);
};

#define KFAC_FAST_BODY "row_sum_body.h"
#include "compile_for_instruction_sets.h"

template <typename In, typename T, bool squared>
const RowSumFunctions<In, T>& row_sum_functions(InstructionSet set) {
  return KFAC_FAST_FORM(set, row_sum_functions<In, T, squared>);
}

// Compiled once, in row_sum.cpp; those of squares where they are used.
extern template const RowSumFunctions<float, float>& row_sum_functions<float, float, false>(
    InstructionSet set);
extern template const RowSumFunctions<double, double>& row_sum_functions<double, double, false>(
    InstructionSet set);
extern template const RowSumFunctions<BFloat16, float>& row_sum_functions<BFloat16, float, false>(
    InstructionSet set);
extern template const RowSumFunctions<Half, float>& row_sum_functions<Half, float, false>(
    InstructionSet set);

template <typename In, typename T, bool squared = false>
class RowSum {
 public:
  RowSum(InstructionSet set, int64_t column_stride)
      : functions_(row_sum_functions<In, T, squared>(set)), column_stride_(column_stride) {}

  // total[c] = Σ_r row r at column first + c, of the rows [begin, end) that count. Few rows are
  // summed plainly, those of many in `chain`; their sums are added with what the last addition
  // rounded off (Kahan), in `lost`.
  void operator()(const RowSource<In>& source, int64_t begin, int64_t end, int64_t first,
                  int64_t columns, T* total, T* chain, T* lost) const {
    std::fill_n(total, columns, T{0});
    if (end - begin <= rows_a_chain_) return add_chain(source, begin, end, first, columns, total);
    std::fill_n(lost, columns, T{0});
    std::fill_n(chain, columns, T{0});
    for (int64_t next; begin < end; begin = next) {
      next = std::min(begin + rows_a_chain_, end);
      add_chain(source, begin, next, first, columns, chain);
      end_chain(chain, columns, total, lost);
    }
  }

  // Rows whose sum is a chain; that of more is added to a total with what the last one rounded off.
  int64_t rows_a_chain() const { return rows_a_chain_; }

  void end_chain(T* chain, int64_t columns, T* total, T* lost) const {
    functions_.end_chain(chain, columns, total, lost);
  }

  void add(const In* rows, int64_t stride, int64_t count, int64_t columns, T* total) const {
    if (column_stride_ == 1) {
      functions_.add_rows(rows, stride, count, columns, total);
    } else {
      functions_.add_columns(rows, stride, column_stride_, count, columns, total);
    }
  }

 private:
  void add_chain(const RowSource<In>& source, int64_t begin, int64_t end, int64_t first,
                 int64_t columns, T* chain) const {
    source.for_each_stretch(begin, end, [&](const In* rows, int64_t stride, int64_t count) {
      add(rows + first * column_stride_, stride, count, columns, chain);
    });
  }

  const RowSumFunctions<In, T>& functions_;
  const int64_t column_stride_;
  // Of every four rows, or where columns are apart of several rows side by side or of a part of
  // those that are not, the sum is one term of a chain.
  const int64_t rows_a_chain_ = column_stride_ == 1 ? 64 : 1024;
};

}  // namespace kfac_fast
