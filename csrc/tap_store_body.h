// The sums of a window's cells for one instruction set; see compile_for_instruction_sets.h.

// total[c] = Σ sums[cell · distance + c] over the cells from *cell on to *last, for c < width, a
// vector's lanes at most.
template <typename T>
KFAC_FAST_TARGET void add_cells(const T* sums, const int64_t* cell, const int64_t* last,
                                int64_t distance, int64_t width, T* total) {
  using Vector = typename VectorOf<T>::type;
  if (width == KFAC_FAST_VECTOR_BYTES / static_cast<int64_t>(sizeof(T))) {
    Vector sum = {};
    for (; cell < last; ++cell) sum += load_vector<T, T>(sums + *cell * distance);
    *reinterpret_cast<Vector*>(total) = sum;
  } else {
    std::fill_n(total, width, T{0});
    for (; cell < last; ++cell) {
      for (int64_t c = 0; c < width; ++c) total[c] += sums[*cell * distance + c];
    }
  }
}
