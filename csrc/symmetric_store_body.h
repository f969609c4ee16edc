// The store of a tile and its mirror image for one instruction set; see
// compile_for_instruction_sets.h.

// Stores a whole cache line, or a part that divides it, past the caches.
template <typename T>
KFAC_FAST_TARGET inline void store_past_caches(T* target, typename VectorOf<T>::type value) {
#if !defined(__x86_64__)
  *reinterpret_cast<typename VectorOf<T>::type*>(target) = value;
#elif KFAC_FAST_VECTOR_BYTES == 64
  __builtin_ia32_movntps512(reinterpret_cast<float*>(target),
                            reinterpret_cast<VectorOf<float>::type>(value));
#elif KFAC_FAST_VECTOR_BYTES == 32
  __builtin_ia32_movntps256(reinterpret_cast<float*>(target),
                            reinterpret_cast<VectorOf<float>::type>(value));
#else
  __builtin_ia32_movntps(reinterpret_cast<float*>(target),
                         reinterpret_cast<VectorOf<float>::type>(value));
#endif
}

// One row: values[c] = target[c] <- beta · target[c] + alpha · sum[c].
template <typename T>
KFAC_FAST_TARGET inline void store_row(const TileSums<T>& sums, int64_t width, T alpha, T beta,
                                       T* target, T* values, bool past_caches) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) {
    const T* sum = sums.data + c;
    Vector value = *reinterpret_cast<const Vector*>(sum);
    for (int64_t part = 1; part < sums.parts; ++part) {
      value += *reinterpret_cast<const Vector*>(sum + part * sums.distance);
    }
    value *= alpha;
    auto* place = reinterpret_cast<Vector*>(target + c);
    if (beta != 0) value += *place * beta;
    if (past_caches) {
      store_past_caches(target + c, value);
    } else {
      *place = value;
    }
    *reinterpret_cast<Vector*>(values + c) = value;
  }
  for (; c < width; ++c) {
    T value = sums.data[c];
    for (int64_t part = 1; part < sums.parts; ++part) value += sums.data[part * sums.distance + c];
    value *= alpha;
    if (beta != 0) value += beta * target[c];
    target[c] = values[c] = value;
  }
}

// See SymmetricStore.
template <typename T>
KFAC_FAST_TARGET void store_symmetric(const TileSums<T>& sums, int64_t rows, int64_t columns,
                                      bool diagonal, T alpha, T beta, T* target, T* mirror,
                                      int64_t edge, bool past_caches) {
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  constexpr int64_t HEIGHT = 32;  // the mirror image is written by pairs of cache lines
  T values[HEIGHT][max_tile_edge];
  T square[LANES][LANES];
  for (int64_t top = 0; top < rows; top += HEIGHT) {
    const int64_t count = std::min(HEIGHT, rows - top);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t width = diagonal ? std::min(columns, top + r + 1) : columns;
      store_row(sums.at(top + r, 0), width, alpha, beta, target + (top + r) * edge, values[r],
                past_caches);
    }
    const int64_t left = diagonal ? std::min(top, columns) : columns;  // of the diagonal
    T* image = mirror + top;
    int64_t c = 0;
    for (; c + LANES <= left; c += LANES) {
      for (int64_t r = 0; r < count; r += LANES) {
        T* place = image + c * edge + r;
        if (r + LANES <= count && !past_caches) {
          store_transposed(values[r] + c, max_tile_edge, LANES, place, edge);
        } else if (r + LANES <= count) {
          store_transposed(values[r] + c, max_tile_edge, LANES, square[0], LANES);
          for (int64_t i = 0; i < LANES; ++i) {
            store_past_caches(place + i * edge, load_vector<T, T>(square[i]));
          }
        } else {
          store_transposed(values[r] + c, max_tile_edge, LANES, square[0], LANES);
          for (int64_t i = 0; i < LANES; ++i) std::copy_n(square[i], count - r, place + i * edge);
        }
      }
    }
    for (; c < std::min(columns, diagonal ? top + count : columns); ++c) {
      const int64_t first = diagonal ? std::max(c - top, int64_t{0}) : 0;
      for (int64_t r = first; r < count; ++r) image[c * edge + r] = values[r][c];
    }
  }
#if defined(__x86_64__)
  if (past_caches) __builtin_ia32_sfence();  // before this thread says that it is done
#endif
}
