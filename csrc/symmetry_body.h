// The comparison of a square with its mirror image for one instruction set; see
// compile_for_instruction_sets.h.

// Whether any entry [r][c] of a square, a vector wide, is further from [c][r] of the mirrored one
// than the product of their scales.
template <typename T>
KFAC_FAST_TARGET bool square_differs(const T* square, const T* mirrored, int64_t stride,
                                     const T* row_scales, const T* column_scales) {
  using Vector = typename VectorOf<T>::type;
  using Mask = typename VectorOf<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  constexpr T largest = std::numeric_limits<T>::max();
  const Vector columns = load_vector<T, T>(column_scales);
  Vector turned[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) turned[i] = load_vector<T, T>(mirrored + i * stride);
  transpose_lanes<T>(turned);
  Mask differ{};
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    const Vector difference = load_vector<T, T>(square + i * stride) - turned[i];
    const Vector distance = difference < 0 ? -difference : difference;
    differ |= (distance > columns * row_scales[i]) & (distance <= largest);
  }
  bool any = false;
  for (int i = 0; i < LANES; ++i) any |= differ[i] != 0;
  return any;
}
