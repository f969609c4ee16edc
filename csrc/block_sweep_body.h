// The sweep of one vector's width of pivots for one instruction set; see block_sweep.h.

// Sweeps a whole square of LANES x LANES, which is symmetric and `stride` apart from row to row.
// Returns the first pivot that is not positive and finite, or LANES; `pivots` receives those
// before.
template <typename T>
KFAC_FAST_TARGET int64_t sweep_square(T* square, int64_t stride, T* pivots) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  Vector rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) rows[i] = *reinterpret_cast<const Vector*>(square + i * stride);
#pragma GCC unroll 16
  for (int k = 0; k < LANES; ++k) {
    T line[LANES];  // scalars of it are multiplied from memory
    *reinterpret_cast<Vector*>(line) = rows[k];
    const T pivot = line[k];
    if (!(pivot > 0 && pivot <= std::numeric_limits<T>::max())) return k;
    pivots[k] = pivot;
    const T inverse = 1 / pivot;
    Vector scaled = rows[k] * inverse;
    scaled[k] = -inverse;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i == k) continue;
      rows[i][k] = 0;
      rows[i] -= scaled * line[i];
    }
    rows[k] = scaled;
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) *reinterpret_cast<Vector*>(square + i * stride) = rows[i];
  return LANES;
}
