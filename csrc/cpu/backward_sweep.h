// One sweep from the last valid step to the first, then to the initial state: the skeleton of back-propagation through
// time and of the target passes.
//
// At each position a row has up to two products at hand, of what the sweep left at the position before:
//     displaced = z_{t+1} P   (P packed in `inverse`),    credit = e_{t+1} W   (W packed in `weight`)
// and a Step turns them, with what it reads itself at t, into the step's delta e_t and carried z_t:
//     Stepped step.at<last>(row_step, column, count, displaced, credit),   Vec step.initial(row_step, column, count,
//     displaced)
// At a row's last valid step the products are replaced by what comes from beyond (disp_n, credit_n). z lives in two row
// tiles of scratch memory, e in the output; a product whose rows are all zero is not computed, which changes no bit as
// long as the matrix is finite. Where all rows have come to zero and no gradient enters any more, the rest is zero.
#pragma once

#include "cpu/sweep.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

enum class Place {
  padding,  // past the row's valid steps: every output is zero
  last,     // the last valid step of the recursion, where the sweep begins
  inner,
  initial,  // before the first step
  none,     // the initial state of a row without a valid step
};

// Where a row stands: offsets of its first column in [S, T, B, H] arrays at this step and at the one the sweep comes
// from, and in [S, B, H] arrays.
struct RowStep {
  Place place;
  int64_t current, source, initial;
};

template <class T>
struct Stepped {
  Vec<T> delta, carried, displacement;  // e_t; z_t as the next product takes it; d_t, for the norms
};

// What every backward sweep reads and writes; any may be null but states and delta.
template <class T>
struct BackwardArrays {
  const T* states;       // [S, T, B, H]
  const T* grad_states;  // [S, T, B, H]
  const T* disp_n;       // [S, B, H]
  const T* credit_n;     // [S, B, H]
  T* delta;              // [S, T, B, H]
  T* disp_h0;            // [S, B, H]
  T* credit_h0;          // [S, B, H]
  T* norms;              // [S, T, B] of d_t
  T* displacement;       // [S, T, B, H] z_t
};

// Euclidean norm without overflow or underflow, and in one order of summation for every row.
template <class T>
inline T row_norm(const T* row, int64_t count) {
  T largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T size = row[i] < 0 ? -row[i] : row[i];
    if (size != size) return size;
    if (size > largest) largest = size;
  }
  if (largest == 0 || largest > Constants<T>::largest) return largest;
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += (row[i] / largest) * (row[i] / largest);
  return largest * (sizeof(T) == 4 ? static_cast<T>(__builtin_sqrtf(static_cast<float>(sum)))
                                   : static_cast<T>(__builtin_sqrt(static_cast<double>(sum))));
}

template <class T>
class BackwardSweep {
 public:
  // `inverse` (transposed: P = R') and `weight` may be null: then there is no such product.
  BackwardSweep(const RnnSizes& sizes, const T* inverse, const T* weight, const BackwardArrays<T>& arrays, int threads)
      : sizes_(sizes),
        arrays_(arrays),
        products_((inverse != nullptr) + (weight != nullptr)),
        processors_(team_processors(sizes, threads)),
        threads_(useful_threads<T>(sizes, products_, threads, processors_)),
        tile_size_(kTileRows * panel_count<T>(sizes.hidden) * kLanes<T>),
        inverse_(inverse, true, sizes),
        weight_(weight, false, sizes),
        barriers_(threads_, true),
        alive_(2 * threads_),
        scratch_(inverse == nullptr ? 0 : threads_ * (arrays.norms == nullptr ? 2 : 4) * tile_size_) {}

  // Calls visit(tile) for every tile, which is to call tile(step).
  template <class Visit>
  void run(const Visit& visit) {
#pragma omp parallel num_threads(threads_)
    {
      const FlushSubnormals flush;
      inverse_.pack();
      weight_.pack();
      for_each_tile<T>(sizes_, products_, processors_, barriers_.get(), [&](const Tile& tile, int64_t team) {
        visit([&](const auto& step) { sweep(tile, team, step); });
      });
    }
  }

 private:
  // Whether a block's z and e of the position before have a number that is not zero.
  struct Alive {
    bool z[kTileBlocks], e[kTileBlocks];
  };

  template <class Step>
  void sweep(Tile tile, int64_t team, const Step& step) const {
    const int64_t H = sizes_.hidden, stride = panel_count<T>(H) * kLanes<T>;
    const bool reverse = sizes_.reverse[tile.member] != 0;
    PanelGroups<T> groups(H, tile);
    const int64_t next = (reverse ? 1 : -1) * sizes_.batch * H;
    const T* const gradient = arrays_.grad_states == nullptr ? arrays_.states : arrays_.grad_states;
    const bool dense_inverse = Step::displaces && !inverse_.finite(tile.member);
    const bool dense_weight = weight_ && !weight_.finite(tile.member);
    const bool fades = Step::zero_stays_zero && arrays_.grad_states == nullptr && sizes_.lengths == nullptr &&
                       !dense_inverse && !dense_weight;
    T* const own = scratch_.get() + team * (arrays_.norms == nullptr ? 2 : 4) * tile_size_;
    Alive* const flags = alive_.get() + team * tile.parts * 2;
    Alive alive = {};
    int64_t steps[kTileRows];
    for (int64_t r = 0; r < tile.rows; ++r) steps[r] = valid_steps(sizes_, tile.row + r);

    for (int64_t j = 0; j <= sizes_.time; ++j) {
      const int64_t t = reverse ? j : sizes_.time - 1 - j;
      const int64_t source = reverse ? j - 1 : sizes_.time - j;
      T* const z_new = own + (j & 1) * tile_size_;
      const T* const z_old = own + (~j & 1) * tile_size_;
      T* const d_rows = own + (2 + (j & 1)) * tile_size_;
      RowStep at[kTileRows];
      const T* z_rows[kTileRows];
      const T* e_rows[kTileRows];
      for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t row = tile.row + r;
        const bool before_first = reverse ? j == steps[r] : j == sizes_.time;
        const bool valid = j < sizes_.time && t < steps[r];
        at[r].place = before_first                             ? (steps[r] == 0 ? Place::none : Place::initial)
                      : !valid                                 ? Place::padding
                      : (reverse ? t == 0 : t == steps[r] - 1) ? Place::last
                                                               : Place::inner;
        at[r].current = ((tile.member * sizes_.time + t) * sizes_.batch + row) * H;
        at[r].source = ((tile.member * sizes_.time + source) * sizes_.batch + row) * H;
        at[r].initial = (tile.member * sizes_.batch + row) * H;
        if (j == 0) continue;
        if (Step::displaces) z_rows[r] = z_old + r * stride;
        e_rows[r] = arrays_.delta + at[r].source;
      }
      Bits<T> z_bits[kTileBlocks] = {}, e_bits[kTileBlocks] = {};
      for (int64_t group = 0; group < groups.count(); ++group) {
        const int64_t panel = groups.begin(group);
        const int panels = static_cast<int>(groups.begin(group + 1) - panel);
        for (int64_t block = 0; block < tile.blocks; ++block) {
          const int64_t row = tile.block_begin(block);
          const int rows = static_cast<int>(tile.block_begin(block + 1) - row);
          const int64_t share = ceil_div(tile.rows * H, groups.count() * tile.blocks);
          const int64_t offset = at[0].current + next + (group * tile.blocks + block) * share;
          const Ahead ahead{
              {address(arrays_.states, offset), address(gradient, offset), address(arrays_.delta, offset)},
              ceil_div(share * int64_t{sizeof(T)}, H)};
          Vec<T> displaced[kMaxRows * kMaxPanels], credit[kMaxRows * kMaxPanels];
          multiply(Step::displaces && j > 0 && (alive.z[block] || dense_inverse), inverse_, tile.member, z_rows + row,
                   rows, panel, panels, ahead, displaced);
          multiply(weight_ && j > 0 && (alive.e[block] || dense_weight), weight_, tile.member, e_rows + row, rows,
                   panel, panels, ahead, credit);
          for (int64_t r = row; r < row + rows; ++r) {
            const RowStep& here = at[r];
            for (int p = 0; p < panels; ++p) {
              const int64_t column = panel_column<T>(H, panel + p), count = H - column;
              const int64_t sum = (r - row) * kMaxPanels + p;
              Stepped<T> stepped = {};
              if (__builtin_expect(here.place == Place::inner, 1)) {
                stepped = step.template at<false>(here, column, count, displaced[sum], credit[sum]);
              } else if (here.place == Place::last) {
                stepped = step.template at<true>(here, column, count, beyond(arrays_.disp_n, here, column),
                                                 beyond(arrays_.credit_n, here, column));
              } else if (here.place == Place::initial) {
                write(arrays_.disp_h0, here, column, step.initial(here, column, count, displaced[sum]));
                write(arrays_.credit_h0, here, column, credit[sum]);
              } else if (here.place == Place::none) {
                write(arrays_.disp_h0, here, column, beyond(arrays_.disp_n, here, column));
                write(arrays_.credit_h0, here, column, beyond(arrays_.credit_n, here, column));
              }
              if (j == sizes_.time) continue;
              store_part(arrays_.delta + here.current + column, stepped.delta, count);
              e_bits[block] |= (Bits<T>)stepped.delta;
              if constexpr (Step::displaces) {
                store(z_new + r * stride + column, stepped.carried);
                z_bits[block] |= (Bits<T>)stepped.carried;
                if (arrays_.displacement != nullptr)
                  store_part(arrays_.displacement + here.current + column,
                             step.handed_down(here, column, count, stepped), count);
                if (arrays_.norms != nullptr) store(d_rows + r * stride + column, stepped.displacement);
              }
            }
          }
        }
      }
      if (j == sizes_.time) break;
      Alive* const now = flags + (j & 1) * tile.parts;
      for (int64_t block = 0; block < tile.blocks; ++block) {
        now[tile.part].z[block] = any_nonzero<T>(z_bits[block]);
        now[tile.part].e[block] = any_nonzero<T>(e_bits[block]);
      }
      const bool together = tile.meet();
      if (!together && tile.part != 0) return;
      bool any_alive = false;
      for (int64_t block = 0; block < tile.blocks; ++block) {
        alive.z[block] = alive.e[block] = false;
        for (int part = 0; part < tile.parts; ++part) {
          alive.z[block] |= now[part].z[block];
          alive.e[block] |= now[part].e[block];
        }
        any_alive |= alive.z[block] || alive.e[block];
      }
      if (Step::displaces && arrays_.norms != nullptr && tile.part == 0)
        for (int64_t r = 0; r < tile.rows; ++r)
          arrays_.norms[(tile.member * sizes_.time + t) * sizes_.batch + tile.row + r] =
              row_norm(d_rows + r * stride, H);
      if (fades && !any_alive) {
        if (tile.part == 0) write_zeros(tile, j + 1);
        break;
      }
      if (!together) {
        tile = tile.alone();
        groups = PanelGroups<T>(H, tile);
      }
    }
    // The next tile of this team uses the same scratch memory.
    tile.meet();
  }

  static void multiply(bool alive, const PackedStack<T>& matrix, int64_t member, const T* const* from, int rows,
                       int64_t panel, int panels, const Ahead& ahead, Vec<T>* sums) {
    if (!alive) {
      for (int i = 0; i < rows * kMaxPanels; ++i) sums[i] = Vec<T>{};
      return;
    }
    const Piece<T> piece{matrix.depth(), from};
    find_product<T, true>(rows, panels)(&piece, 1, matrix.panel(member, panel), matrix.panel_stride(), ahead, sums);
  }

  Vec<T> beyond(const T* array, const RowStep& at, int64_t column) const {
    return array == nullptr ? Vec<T>{} : load_part(array + at.initial + column, sizes_.hidden - column);
  }

  void write(T* array, const RowStep& at, int64_t column, Vec<T> value) const {
    if (array != nullptr) store_part(array + at.initial + column, value, sizes_.hidden - column);
  }

  // The outputs of a tile from position j on.
  void write_zeros(const Tile& tile, int64_t j) const {
    const bool reverse = sizes_.reverse[tile.member] != 0;
    const auto clear = [&](T* array, int64_t row, int64_t width) {
      if (array != nullptr) std::memset(array + row * width, 0, static_cast<size_t>(tile.rows * width) * sizeof(T));
    };
    for (; j < sizes_.time; ++j) {
      const int64_t t = reverse ? j : sizes_.time - 1 - j;
      const int64_t row = (tile.member * sizes_.time + t) * sizes_.batch + tile.row;
      clear(arrays_.delta, row, sizes_.hidden);
      clear(arrays_.displacement, row, sizes_.hidden);
      clear(arrays_.norms, row, 1);
    }
    clear(arrays_.disp_h0, tile.member * sizes_.batch + tile.row, sizes_.hidden);
    clear(arrays_.credit_h0, tile.member * sizes_.batch + tile.row, sizes_.hidden);
  }

  const RnnSizes& sizes_;
  const BackwardArrays<T> arrays_;
  const int products_, processors_, threads_;
  const int64_t tile_size_;
  PackedStack<T> inverse_, weight_;
  Buffer<Barrier> barriers_;
  Buffer<Alive> alive_;
  Buffer<T> scratch_;  // a team: two tiles of z, two of d if norms are wanted
};

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
