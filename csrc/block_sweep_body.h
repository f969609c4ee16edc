// One vector's width of pivots for one instruction set; see block_sweep.h.

// to <- from, `count` rows of one vector each. For so few bytes a call of memcpy would be slow.
template <typename T>
KFAC_FAST_TARGET void copy_vectors(const T* from, int64_t from_stride, int64_t count, T* to,
                                   int64_t to_stride) {
  using Vector = typename VectorOf<T>::type;
  for (; count > 0; --count, from += from_stride, to += to_stride) {
    *reinterpret_cast<Vector*>(to) = *reinterpret_cast<const Vector*>(from);
  }
}

// square <- -L^-1, zero above the diagonal, where square = -L L^T and only its lower triangle is
// read; `turned` <- L^T, below whose diagonal anything may stand. After the first `pivots` rows the
// square goes on as a negated identity. Returns the first pivot that is not positive and finite, or
// LANES; `turned` then has the rows before.
//
// Row k is divided by the root of its pivot and then eliminates itself from the rows below, as it
// does from the identity, whose entries take the places of those that became zero.
template <typename T>
KFAC_FAST_TARGET int64_t invert_square(T* square, int64_t stride, T* turned, int64_t pivots) {
  using Vector = typename VectorOf<T>::type;
  using Places = typename VectorOf<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  Places place{};
  Vector rows[LANES], mirrored[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    place[i] = i;
    rows[i] = mirrored[i] = -*reinterpret_cast<const Vector*>(square + i * stride);
  }
  transpose_lanes<T>(mirrored);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) rows[i] = place <= i ? rows[i] : mirrored[i];
#pragma GCC unroll 16
  for (int k = 0; k < LANES; ++k) {
    T* line = turned + k * LANES;  // scalars of it are multiplied from memory
    if (k >= pivots) {
      *reinterpret_cast<Vector*>(line) = rows[k];
      continue;
    }
    const T pivot = rows[k][k];
    if (!(pivot > 0 && pivot <= std::numeric_limits<T>::max())) return k;
    const T root = std::sqrt(pivot);
    rows[k] *= 1 / root;
    *reinterpret_cast<Vector*>(line) = rows[k];
    line[k] = root;
    rows[k][k] = 1 / root;
#pragma GCC unroll 16
    for (int i = k + 1; i < LANES; ++i) {
      rows[i][k] = 0;
      rows[i] -= rows[k] * line[i];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    *reinterpret_cast<Vector*>(square + i * stride) = place <= i ? -rows[i] : Vector{};
  }
  return LANES;
}

// v <- -L^-1 u and, if `u` is to be used further, u <- -L^-T v, by substitution: for vectors of
// columns of LANES rows that lie `stride` apart, with L^T as invert_square leaves it in `turned`.
// Rows of `u` after the first `pivots` are zero, and stay so; those of `v` are not written. Where
// `own` is among the columns, a vector of them from there on is zero, and all its rows become so
// in `v`.
template <typename T>
KFAC_FAST_TARGET void solve_square(const T* turned, T* u, T* v, int64_t stride, int64_t columns,
                                   int64_t own, int64_t pivots, bool both) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  T inverse[LANES];
  for (int k = 0; k < LANES; ++k) inverse[k] = 1 / turned[k * LANES + k];
  for (int64_t c = 0; c < columns; c += LANES) {
    if (c == own) {
      for (int k = 0; k < LANES; ++k) *reinterpret_cast<Vector*>(v + c + k * stride) = Vector{};
      continue;
    }
    Vector rows[LANES];
#pragma GCC unroll 16
    for (int k = 0; k < LANES; ++k) rows[k] = -*reinterpret_cast<const Vector*>(u + c + k * stride);
#pragma GCC unroll 16
    for (int k = 0; k < LANES; ++k) {
      if (k >= pivots) break;
      rows[k] *= inverse[k];
      *reinterpret_cast<Vector*>(v + c + k * stride) = rows[k];
#pragma GCC unroll 16
      for (int i = k + 1; i < LANES; ++i) rows[i] -= rows[k] * turned[k * LANES + i];
    }
    if (!both) continue;
#pragma GCC unroll 16
    for (int k = LANES - 1; k >= 0; --k) {
      if (k >= pivots) continue;
      rows[k] *= inverse[k];
      *reinterpret_cast<Vector*>(u + c + k * stride) = -rows[k];
#pragma GCC unroll 16
      for (int i = 0; i < k; ++i) rows[i] -= rows[k] * turned[i * LANES + k];
    }
  }
}
