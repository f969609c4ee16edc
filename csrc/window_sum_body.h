// Window sums in one pass over the pixels, for one instruction set; see
// compile_for_instruction_sets.h.

// Pixels along x are loaded a block at a time. Where a block is shorter than a vector, a vector
// holds the blocks of several planes, so that narrow planes waste fewer lanes.
template <typename T>
struct PixelBlock {
  static constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  static constexpr int BYTES = std::min(KFAC_FAST_VECTOR_BYTES, 32);
  static constexpr int SIZE = BYTES / sizeof(T);
  typedef T Vector __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));

  // Where plane p's sums of a block are among those of a vector of planes.
  static constexpr int64_t place(int64_t p) { return p % SIZE * LANES + p / SIZE * SIZE; }
};

// sums[cell][block] = Σ of the cell's rows, of PLANES planes and BLOCKS blocks side by side. Not
// inlined: its loop needs all registers.
template <typename In, typename T, int PLANES, int BLOCKS>
KFAC_FAST_TARGET __attribute__((noinline)) void sum_rows(const SumPlan<T>& plan,
                                                         const Channels<In>& channels,
                                                         const In* plane, T* sums) {
  using Block = PixelBlock<T>;
  using Vector = typename Block::Vector;
  constexpr int64_t distance = Block::SIZE * Block::LANES;
  for (const typename SumPlan<T>::Rows& rows : plan.rows) {
    const In* row = plane + channels.offset(rows);
    Vector total[PLANES][BLOCKS] = {};
    for (int64_t r = 0; r < rows.count; ++r, row += rows.step * channels.strides[1]) {
#pragma GCC unroll 8
      for (int p = 0; p < PLANES; ++p) {
#pragma GCC unroll 8
        for (int b = 0; b < BLOCKS; ++b) {
          const In* pixels = row + p * channels.stride + b * Block::SIZE;
          total[p][b] += load_as<Vector, T>(pixels);
        }
      }
    }
    T* target = sums + rows.cell * plan.blocks * distance;
#pragma GCC unroll 8
    for (int p = 0; p < PLANES; ++p) {
#pragma GCC unroll 8
      for (int b = 0; b < BLOCKS; ++b) {
        auto& sum = *reinterpret_cast<Vector*>(target + p * Block::LANES + b * distance);
        sum = rows.first ? total[p][b] : sum + total[p][b];
      }
    }
  }
}

// The same of one plane with pixels at any distance, or where no whole block may be read.
template <typename In, typename T>
KFAC_FAST_TARGET void sum_rows_one_by_one(const SumPlan<T>& plan, const Channels<In>& channels,
                                          const In* plane, T* sums) {
  using Block = PixelBlock<T>;
  constexpr int64_t distance = Block::SIZE * Block::LANES;
  for (const typename SumPlan<T>::Rows& rows : plan.rows) {
    T* target = sums + rows.cell * plan.blocks * distance;
    for (int64_t x = 0; x < plan.width; ++x) {
      const In* pixel = plane + channels.offset(rows) + x * channels.strides[2];
      T total = 0;
      for (int64_t r = 0; r < rows.count; ++r, pixel += rows.step * channels.strides[1])
        total += static_cast<T>(*pixel);
      T& sum = target[x / Block::SIZE * distance + x % Block::SIZE];
      sum = rows.first ? total : sum + total;
    }
  }
}

// The taps of a row of three cells; see SumPlan::is_three_by_three.
template <typename Vector>
KFAC_FAST_TARGET inline void slide(const Vector* cells, int64_t stride, Vector* taps) {
  const Vector first = cells[0], middle = cells[stride], last = cells[2 * stride];
  const Vector before = first + middle;
  taps[0] = before;
  taps[stride] = before + last;
  taps[2 * stride] = middle + last;
}

// From sums by cells to taps in one direction; both lie `stride` apart. Windows that all hold one
// cell are what lies from their first cell to it and what lies behind it: these are summed once,
// in place.
template <typename T>
KFAC_FAST_TARGET inline void sum_taps_along(const typename SumPlan<T>::Taps& taps,
                                            typename VectorOf<T>::type* cells, int64_t stride,
                                            typename VectorOf<T>::type* sums) {
  using Vector = typename VectorOf<T>::type;
  if (taps.windows.empty()) {
    for (const auto& terms : taps.terms) {
      Vector total{};
      for (const auto& term : terms) total += cells[term.cell * stride] * term.weight;
      *sums = total;
      sums += stride;
    }
    return;
  }
  for (int64_t cell = taps.middle; cell-- > 0;) cells[cell * stride] += cells[(cell + 1) * stride];
  for (int64_t cell = taps.middle + 2; cell < taps.cells; ++cell) {
    cells[cell * stride] += cells[(cell - 1) * stride];
  }
  for (const auto& window : taps.windows) {
    Vector total = cells[window.first * stride];
    if (window.last > taps.middle) total += cells[window.last * stride];
    *sums = total;
    sums += stride;
  }
}

// The same along x and then along z and y, for a vector of channels; may overwrite the cells.
template <typename T>
KFAC_FAST_TARGET inline void sum_taps(const SumPlan<T>& plan, T alpha,
                                      typename VectorOf<T>::type* cells,
                                      typename VectorOf<T>::type* along_x,
                                      typename VectorOf<T>::type* taps) {
  if (plan.is_three_by_three) {
    typename VectorOf<T>::type scaled[9];
    for (int i = 0; i < 9; ++i) scaled[i] = cells[i] * alpha;
    for (int i = 0; i < 3; ++i) slide(scaled + 3 * i, 1, along_x + 3 * i);
    for (int i = 0; i < 3; ++i) slide(along_x + i, 3, taps + i);
    return;
  }
  for (int64_t cell = 0; cell < plan.outer_cells * plan.cells; ++cell) cells[cell] *= alpha;
  for (int64_t outer = 0; outer < plan.outer_cells; ++outer) {
    sum_taps_along<T>(plan.along_x, cells + outer * plan.cells, 1, along_x + outer * plan.taps);
  }
  for (int64_t tap = 0; tap < plan.taps; ++tap) {
    sum_taps_along<T>(plan.across, along_x + tap, plan.taps, taps + tap);
  }
}

// target[channel][tap] <- beta · target + taps[tap][channel]
template <typename T>
KFAC_FAST_TARGET inline void store_taps(const typename VectorOf<T>::type* taps, int64_t count,
                                        int64_t channels, T beta, T* target) {
  using Vector = typename VectorOf<T>::type;
  using Block = PixelBlock<T>;
  const T* end = target + channels * count;
  int64_t first = 0;
  // Blocks of taps. Few taps are stored as a whole block: what comes after them is written later.
  while (first + 1 < count && (first == 0 || beta == 0 || first + Block::SIZE <= count)) {
    // The last block goes over taps of the one before.
    if (count > Block::SIZE) first = std::min(first, count - Block::SIZE);
    Vector turned[Block::SIZE];
#pragma GCC unroll 8
    for (int i = 0; i < Block::SIZE; ++i) turned[i] = taps[first + i];
    transpose_lanes<T>(turned);
    T* place = target + first;
#pragma GCC unroll 16
    for (int c = 0; c < Block::LANES; ++c, place += count) {
      if (c == channels) break;
      const T* value = reinterpret_cast<const T*>(turned) + Block::place(c);
      if (beta == 0 && end - place >= Block::SIZE) {
        *reinterpret_cast<typename Block::Vector*>(place) =
            *reinterpret_cast<const typename Block::Vector*>(value);
      } else {
        const int64_t width = std::min<int64_t>(Block::SIZE, count - first);
        for (int64_t i = 0; i < width; ++i) {
          place[i] = beta == 0 ? value[i] : value[i] + beta * place[i];
        }
      }
    }
    first += Block::SIZE;
  }
  for (; first < count; ++first) {
    const T* value = reinterpret_cast<const T*>(taps + first);
    for (int64_t c = 0; c < channels; ++c) {
      T& place = target[c * count + first];
      place = beta == 0 ? value[c] : value[c] + beta * place;
    }
  }
}

// The rows of PLANES planes or, where the input ends before a whole block does, of one.
template <typename In, typename T, int BLOCKS>
KFAC_FAST_TARGET void sum_planes_rows(const SumPlan<T>& plan, const Channels<In>& channels,
                                      const In* first, int64_t planes, T* sums) {
  using Block = PixelBlock<T>;
  constexpr int PLANES = std::min(Block::SIZE, BLOCKS <= 2 ? 8 : BLOCKS == 3 ? 2 : 1);
  for (int64_t p = 0; p < planes;) {
    const In* plane = first + p * channels.stride;
    const int64_t room = channels.end - plane - channels.reach;
    if (p + PLANES <= planes && (PLANES - 1) * channels.stride <= room) {
      sum_rows<In, T, PLANES, BLOCKS>(plan, channels, plane, sums + Block::place(p));
      p += PLANES;
    } else {
      sum_rows<In, T, 1, BLOCKS>(plan, channels, plane, sums + Block::place(p));
      ++p;
    }
  }
}

template <typename In, typename T>
KFAC_FAST_TARGET void sum_rows_of_planes(const SumPlan<T>& plan, const Channels<In>& channels,
                                         const In* first, int64_t planes, T* sums) {
  using Block = PixelBlock<T>;
  using Sum = void (*)(const SumPlan<T>&, const Channels<In>&, const In*, int64_t, T*);
  static constexpr Sum of_blocks[] = {sum_planes_rows<In, T, 1>, sum_planes_rows<In, T, 2>,
                                      sum_planes_rows<In, T, 3>, sum_planes_rows<In, T, 4>,
                                      sum_planes_rows<In, T, 5>, sum_planes_rows<In, T, 6>,
                                      sum_planes_rows<In, T, 7>, sum_planes_rows<In, T, 8>};
  int64_t whole = 0;  // planes of which whole blocks may be read
  if (channels.strides[2] == 1) {
    while (whole < planes && first + whole * channels.stride + channels.reach <= channels.end)
      ++whole;
  }
  for (int64_t b = 0, together; b < plan.blocks; b += together) {
    together = std::min<int64_t>(plan.blocks - b, std::size(of_blocks));
    of_blocks[together - 1](plan, channels, first + b * Block::SIZE, whole,
                            sums + b * Block::SIZE * Block::LANES);
  }
  for (int64_t p = whole; p < planes; ++p) {
    sum_rows_one_by_one(plan, channels, first + p * channels.stride, sums + Block::place(p));
  }
}

// The cells along x of a frame of one block for a vector of planes, from the sums of their rows.
template <typename T, int SIZE>
KFAC_FAST_TARGET inline void sum_narrow_frame(int64_t width,
                                              typename VectorOf<T>::type (&lanes)[SIZE],
                                              typename VectorOf<T>::type* cells) {
  typename VectorOf<T>::type between{};
  transpose_lanes<T>(lanes);
  cells[0] = lanes[0];
#pragma GCC unroll 8
  for (int x = 1; x < SIZE; ++x) {  // by constants, for the lanes are in registers
    if (x == width - 1) {
      cells[2] = lanes[x];
      break;
    }
    between += lanes[x];
  }
  cells[1] = between;
}

// The same from the rows of one cell, without storing their sums between. Not inlined, as sum_rows.
template <typename T>
KFAC_FAST_TARGET __attribute__((noinline)) void sum_narrow_rows(
    const typename SumPlan<T>::Rows& rows, int64_t width, const Channels<T>& channels,
    const T* plane, typename VectorOf<T>::type* cells) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  const T* row = plane + channels.offset(rows);
  Vector total[LANES] = {};
  for (int64_t r = 0; r < rows.count; ++r, row += rows.step * channels.strides[1]) {
#pragma GCC unroll 8
    for (int p = 0; p < LANES; ++p) {
      total[p] += *reinterpret_cast<const Vector*>(row + p * channels.stride);
    }
  }
  sum_narrow_frame<T, LANES>(width, total, cells);
}

// The cells along x of a frame (see SumPlan::is_framed) for a vector of planes, from the sums of
// their rows by blocks. What lies between the ends is added up before the transposition, in the
// lanes that the ends leave: then there is one, however wide the planes. Of a single block that
// would take as long as the few additions after it.
template <typename T, int SIZE, int... I>
KFAC_FAST_TARGET inline void sum_frame(const SumPlan<T>& plan,
                                       const typename VectorOf<T>::type* sums,
                                       typename VectorOf<T>::type* cells,
                                       std::integer_sequence<int, I...>) {
  using Vector = typename VectorOf<T>::type;
  using Choice = typename VectorOf<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>::type;
  constexpr int LANES = sizeof...(I);
  Vector lanes[SIZE];
  if (plan.blocks == 1) {
#pragma GCC unroll 8
    for (int i = 0; i < SIZE; ++i) lanes[i] = sums[i];
    return sum_narrow_frame<T, SIZE>(plan.width, lanes, cells);
  }
  // Of each stretch of SIZE lanes: the first two are moved to the next two, or replaced.
  constexpr Choice moved = {(I % SIZE == 2 || I % SIZE == 3 ? I - 2 : LANES)...};
  constexpr Choice with_first = {(I % SIZE == 0 ? LANES + I : I)...};
  constexpr Choice with_last = {(I % SIZE == 1 ? LANES + I : I)...};
  constexpr Choice place = {(I % SIZE)...}, stretch = {(I - I % SIZE)...};
  const int end = static_cast<int>((plan.width - 1) % SIZE);  // place of the last pixel
  const Choice behind_first = place > 0, before_last = place < end, last_pixel = stretch + end;
#pragma GCC unroll 8
  for (int i = 0; i < SIZE; ++i) {
    const Vector* block = sums + i;
    const Vector first = *block, last = block[(plan.blocks - 1) * SIZE];
    Vector between = (Vector)((Choice)last & before_last) + (Vector)((Choice)first & behind_first);
    for (int64_t b = 1; b < plan.blocks - 1; ++b) between += block[b * SIZE];
    between += __builtin_shuffle(between, Vector{}, moved);
    lanes[i] = __builtin_shuffle(__builtin_shuffle(between, first, with_first),
                                 __builtin_shuffle(last, last_pixel), with_last);
  }
  transpose_lanes<T>(lanes);
  Vector between = lanes[2] + lanes[3];
  if constexpr (SIZE == 8) between += (lanes[4] + lanes[5]) + (lanes[6] + lanes[7]);
  cells[0] = lanes[0];
  cells[1] = between;
  cells[2] = lanes[1];
}

// The cells of a vector of planes or fewer: their rows are summed along y first, a block of
// neighbouring pixels at a time, and the few sums transposed. That leaves the memory idle, so the
// next planes are asked for meanwhile. Where a plane is one block wide, a cell's rows are summed
// and transposed at once.
template <typename In, typename T>
KFAC_FAST_TARGET void sum_cells_of_planes(const SumPlan<T>& plan, const Channels<In>& channels,
                                          const In* first, int64_t planes, T* rows,
                                          typename VectorOf<T>::type* cells) {
  using Vector = typename VectorOf<T>::type;
  using Block = PixelBlock<T>;
  constexpr int LINES = 16;  // asked for at a time; 8 and 32 were slower
  constexpr int64_t LINE = 64 / sizeof(In);
  const In* next = first + planes * channels.stride;
  const In* const stop = next + planes * channels.stride;
  const auto ask_for_next = [&]() KFAC_FAST_TARGET {
    if (next >= stop) return;
#pragma GCC unroll 16
    for (int i = 0; i < LINES; ++i, next += LINE) __builtin_prefetch(next);
  };
  if constexpr (std::is_same_v<In, T> && Block::SIZE == Block::LANES && Block::SIZE >= 4) {
    const In* last = first + (planes - 1) * channels.stride;
    if (plan.is_narrow && planes == Block::LANES && channels.strides[2] == 1 &&
        last + channels.reach <= channels.end) {
      for (const auto& run : plan.rows) {
        ask_for_next();
        sum_narrow_rows<T>(run, plan.width, channels, first, cells + run.cell * plan.cells);
      }
      return;
    }
  }
  sum_rows_of_planes(plan, channels, first, planes, rows);
  Vector* lost = cells + plan.outer_cells * plan.cells;
  const auto* sums = reinterpret_cast<const Vector*>(rows);
  for (int64_t outer = 0; outer < plan.outer_cells; ++outer, sums += plan.blocks * Block::SIZE) {
    if constexpr (Block::SIZE >= 4) {
      if (plan.is_framed) {
        ask_for_next();
        sum_frame<T, Block::SIZE>(plan, sums, cells + outer * plan.cells,
                                  std::make_integer_sequence<int, Block::LANES>{});
        continue;
      }
    }
    for (const auto& square : plan.squares) {
      ask_for_next();
      const Vector* from = sums + square.block * Block::SIZE;
      Vector turned[Block::SIZE];
#pragma GCC unroll 8
      for (int i = 0; i < Block::SIZE; ++i) turned[i] = from[i];
      for (int64_t b = 1; b < square.blocks; ++b) {
        from += Block::SIZE;
#pragma GCC unroll 8
        for (int i = 0; i < Block::SIZE; ++i) turned[i] += from[i];
      }
      transpose_lanes<T>(turned);
      for (const auto& pixels : square.pixels) {
        const Vector* pixel = turned + pixels.begin;
        Vector chain = *pixel;
        for (int64_t i = 1; i < pixels.count; ++i) chain += *(pixel += pixels.step);
        const int64_t cell = outer * plan.cells + pixels.cell;
        if (pixels.first) {
          cells[cell] = chain;
          lost[cell] = Vector{};
        } else {
          add_compensated(cells[cell], lost[cell], chain);
        }
      }
    }
  }
}

// Channels that lie far apart (channels first), a vector of them at a time.
template <typename In, typename T>
KFAC_FAST_TARGET void sum_planes(const SumPlan<T>& plan, const Channels<In>& channels, T alpha,
                                 T beta, T* scratch, T* target) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  auto* cells = reinterpret_cast<Vector*>(scratch);
  auto* along_x = cells + 2 * plan.outer_cells * plan.cells;
  auto* taps = along_x + plan.outer_cells * plan.taps;
  T* rows = reinterpret_cast<T*>(taps + round_up(plan.outer_taps * plan.taps, LANES));
  const int64_t count = plan.outer_taps * plan.taps;
  for (int64_t c = 0; c < channels.count; c += LANES, target += LANES * count) {
    const In* first = channels.data + c * channels.stride;
    const int64_t planes = std::min(LANES, channels.count - c);
    sum_cells_of_planes(plan, channels, first, planes, rows, cells);
    sum_taps(plan, alpha, cells, along_x, taps);
    store_taps(taps, count, planes, beta, target);
  }
}

// The pixels of VECTORS vectors of neighbouring channels summed by cells, along x first. `chains`
// is room for the sums of some rows, which then are added to the cells: less rounding.
template <typename In, typename T, int VECTORS>
KFAC_FAST_TARGET void sum_cells_of_pixels(const SumPlan<T>& plan, const Channels<In>& channels,
                                          const In* data, typename VectorOf<T>::type* cells,
                                          typename VectorOf<T>::type* chains) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  const int64_t count = plan.outer_cells * plan.cells;
  Vector* lost = cells + VECTORS * count;
  std::fill_n(cells, 2 * VECTORS * count, Vector{});
  for (const typename SumPlan<T>::Rows& rows : plan.rows) {
    const In* row = data + channels.offset(rows);
    std::fill_n(chains, VECTORS * plan.columns.size(), Vector{});
    for (int64_t r = 0; r < rows.count; ++r, row += rows.step * channels.strides[1]) {
      Vector* chain = chains;
      for (const typename SumPlan<T>::Pixels& columns : plan.columns) {
        Vector total[VECTORS] = {};
        const In* pixel = row + columns.begin * channels.strides[2];
        for (int64_t i = 0; i < columns.count; ++i, pixel += columns.step * channels.strides[2]) {
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) total[v] += load_vector<In, T>(pixel + v * LANES);
        }
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) *chain++ += total[v];
      }
    }
    const Vector* chain = chains;
    for (const typename SumPlan<T>::Pixels& columns : plan.columns) {
      const int64_t cell = rows.cell * plan.cells + columns.cell;
      for (int v = 0; v < VECTORS; ++v) {
        add_compensated(cells[v * count + cell], lost[v * count + cell], *chain++);
      }
    }
  }
}

// The cells of fewer channels than a vector holds.
template <typename In, typename T>
KFAC_FAST_TARGET void sum_cells_of_few(const SumPlan<T>& plan, const Channels<In>& channels,
                                       const In* data, int64_t width, T* cells) {
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  T* lost = cells + plan.outer_cells * plan.cells * LANES;
  std::fill_n(cells, 2 * plan.outer_cells * plan.cells * LANES, T{0});
  for (const typename SumPlan<T>::Rows& rows : plan.rows) {
    for (const typename SumPlan<T>::Pixels& columns : plan.columns) {
      const int64_t cell = (rows.cell * plan.cells + columns.cell) * LANES;
      for (int64_t i = 0; i < width; ++i) {
        T chain = 0;
        for (int64_t r = 0; r < rows.count; ++r) {
          const In* pixel = data + channels.offset(rows) + r * rows.step * channels.strides[1] +
                            columns.begin * channels.strides[2] + i;
          T total = 0;
          for (int64_t x = 0; x < columns.count; ++x, pixel += columns.step * channels.strides[2]) {
            total += static_cast<T>(*pixel);
          }
          chain += total;
        }
        add_compensated(cells[cell + i], lost[cell + i], chain);
      }
    }
  }
}

// Neighbouring channels (channels last), some vectors of them at a time.
template <typename In, typename T>
KFAC_FAST_TARGET void sum_pixels(const SumPlan<T>& plan, const Channels<In>& channels, T alpha,
                                 T beta, T* scratch, T* target) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T), TOGETHER = channel_vectors;
  auto* cells = reinterpret_cast<Vector*>(scratch);
  auto* along_x = cells + 2 * TOGETHER * plan.outer_cells * plan.cells;
  auto* taps = along_x + plan.outer_cells * plan.taps;
  auto* chains = taps + round_up(plan.outer_taps * plan.taps, LANES);
  const int64_t count = plan.outer_taps * plan.taps;
  for (int64_t c = 0, next; c < channels.count; c = next) {
    const int64_t left = channels.count - c;
    next = c + (left >= TOGETHER * LANES ? TOGETHER * LANES : std::min(LANES, left));
    const In* data = channels.data + c;
    if (left >= TOGETHER * LANES) {
      sum_cells_of_pixels<In, T, TOGETHER>(plan, channels, data, cells, chains);
    } else if (left >= LANES) {
      sum_cells_of_pixels<In, T, 1>(plan, channels, data, cells, chains);
    } else {
      sum_cells_of_few(plan, channels, data, left, reinterpret_cast<T*>(cells));
    }
    for (int64_t first = c; first < next; first += LANES) {
      sum_taps(plan, alpha, cells + (first - c) / LANES * plan.outer_cells * plan.cells, along_x,
               taps);
      store_taps(taps, count, std::min(LANES, next - first), beta, target + first * count);
    }
  }
}
