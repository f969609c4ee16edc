#pragma once
// Sums of rows, or of their squares, column by column.

#include <algorithm>
#include <cstdint>

#include "row_source.h"
#include "tile_product.h"

namespace kfac_fast {

#define KFAC_FAST_BODY "row_sum_body.h"
#include "compile_for_instruction_sets.h"

template <typename In, typename T, bool squared = false>
class RowSum {
 public:
  RowSum(InstructionSet set, int64_t column_stride) : column_stride_(column_stride) {
    rows_ = portable::add_rows<In, T, squared>;
    columns_ = portable::add_columns<In, T, squared>;
    end_chain_ = portable::end_chain<T>;
#if defined(__x86_64__)
    if (set == InstructionSet::avx512) {
      rows_ = avx512::add_rows<In, T, squared>, columns_ = avx512::add_columns<In, T, squared>;
      end_chain_ = avx512::end_chain<T>;
    } else if (set == InstructionSet::avx2) {
      rows_ = avx2::add_rows<In, T, squared>, columns_ = avx2::add_columns<In, T, squared>;
      end_chain_ = avx2::end_chain<T>;
    }
#endif
  }

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
      end_chain_(chain, columns, total, lost);
    }
  }

  // Rows whose sum is a chain; that of more is added to a total with what the last one rounded off.
  int64_t rows_a_chain() const { return rows_a_chain_; }

  void end_chain(T* chain, int64_t columns, T* total, T* lost) const {
    end_chain_(chain, columns, total, lost);
  }

  void add(const In* rows, int64_t stride, int64_t count, int64_t columns, T* total) const {
    if (column_stride_ == 1) {
      rows_(rows, stride, count, columns, total);
    } else {
      columns_(rows, stride, column_stride_, count, columns, total);
    }
  }

 private:
  void add_chain(const RowSource<In>& source, int64_t begin, int64_t end, int64_t first,
                 int64_t columns, T* chain) const {
    source.for_each_stretch(begin, end, [&](const In* rows, int64_t stride, int64_t count) {
      add(rows + first * column_stride_, stride, count, columns, chain);
    });
  }

  const int64_t column_stride_;
  // Of every four rows, or of a vector of rows where columns are apart, the sum is one term of a
  // chain.
  const int64_t rows_a_chain_ = column_stride_ == 1 ? 64 : 1024;
  void (*rows_)(const In*, int64_t, int64_t, int64_t, T*);
  void (*columns_)(const In*, int64_t, int64_t, int64_t, int64_t, T*);
  void (*end_chain_)(T*, int64_t, T*, T*);
};

}  // namespace kfac_fast
