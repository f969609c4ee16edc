#pragma once
// Gram matrices of groups of one column, as of depthwise convolutions: sums of squares, and of the
// columns themselves where a bias makes each matrix 2 x 2. One pass over the rows, no products.

#include <algorithm>
#include <cstdint>

#include "gram_layout.h"
#include "parallel.h"
#include "row_source.h"
#include "row_sum.h"
#include "scratch.h"
#include "symmetric_store.h"

namespace kfac_fast {

template <typename In, typename T>
void diagonal_gram(const RowSource<In>& source, int64_t columns, const SymmetricStore<T>& store,
                   bool bias, T* out) {
  // The chunks of rows depend on the shape alone, and so does the order in which they are added.
  constexpr int64_t entries_a_chunk = 1 << 15, most_chunks = 64;
  const int64_t entries = source.rows() * columns;
  const int64_t most = std::clamp<int64_t>(source.rows() / 64, 1, most_chunks);
  const int64_t chunks = std::clamp<int64_t>(entries / entries_a_chunk, 1, most);
  const int64_t set_size = (1 + bias) * columns;
  const int64_t workers = worker_count(chunks, 5.0 * (1 + bias) * entries);
  const auto sets = make_scratch<T>(chunks * set_size);
  const auto scratch = make_scratch<T>(workers * 2 * columns);
  const InstructionSet set = instruction_set_in_use();
  const RowSum<In, T, true> squares(set, source.column_stride());
  const RowSum<In, T> sums(set, source.column_stride());
  for_each_task(chunks, workers, [&](int64_t chunk, int64_t worker) {
    const int64_t begin = chunk * source.rows() / chunks;
    const int64_t end = (chunk + 1) * source.rows() / chunks;
    T *own = &sets[chunk * set_size], *room = &scratch[worker * 2 * columns];
    squares(source, begin, end, 0, columns, own, room, room + columns);
    if (bias) sums(source, begin, end, 0, columns, own + columns, room, room + columns);
  });
  for (int64_t c = 0; c < columns; ++c) {
    T* matrix = out + c * store.edge * store.edge;
    const TileSums<T> square{&sets[c], 1, chunks, set_size};
    store(square, 1, 1, true, matrix, 0, 0);
    if (bias) store(square.at(columns, 0), 1, 1, false, matrix, 1, 0);
  }
}

}  // namespace kfac_fast
