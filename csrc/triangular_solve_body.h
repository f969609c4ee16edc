// The inverse of a triangle for one instruction set; see triangular_solve.h.

// inverse <- -L^-1 of a square a vector wide, zero above the diagonal, from the lower triangle of
// its first `size` rows; an identity takes the places of the others.
template <typename T>
KFAC_FAST_TARGET void invert_triangle(const T* square, int64_t stride, int64_t size, T* inverse) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  Vector rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    Vector row = {};
    row[i] = -1;
    if (i < size) {
      const T* line = square + i * stride;
#pragma GCC unroll 16
      for (int j = 0; j < i; ++j) row -= rows[j] * line[j];
      row *= 1 / line[i];
    }
    rows[i] = row;
    *reinterpret_cast<Vector*>(inverse + i * LANES) = row;
  }
}
