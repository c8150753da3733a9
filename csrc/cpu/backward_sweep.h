// The sweep from the last valid step to the first, then to the initial state, of a tile of rows: the skeleton of the
// target passes and of back-propagation through time.
//
// At each position a row has up to two products at hand, of what the sweep left at the position before:
//     displaced = z_{t+1} P   (P packed in `inverse`),    credit = e_{t+1} W   (W packed in `weight`)
// and a Step turns them, with what it reads itself at t, into the step's delta e_t and carried z_t:
//     Stepped step.at<last>(row_step, column, count, displaced, credit),   Vec step.initial(row_step, column, count,
//     displaced)
// where the step is step.of(member), which knows the numbers of the tile's member.
// At a row's last valid step the products are replaced by what comes from beyond (disp_n, credit_n). z lives in two row
// tiles of scratch memory; e goes where a Track says, through all of [S, T, B, H] or round in a little memory that
// someone else reads meanwhile (layer_gradients.h). A product whose rows are all zero is not computed, which changes no
// bit as long as the matrix is finite. Where all rows have come to zero and no gradient enters any more, the rest is
// zero.
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

// What every backward sweep reads, and what it leaves at its end; any may be null but states.
template <class T>
struct BackwardArrays {
  const T* states;       // [S, T, B, H]
  const T* grad_states;  // [S, T, B, H]
  const T* disp_n;       // [S, B, H]
  const T* credit_n;     // [S, B, H]
  T* disp_h0;            // [S, B, H]
  T* credit_h0;          // [S, B, H]
  T* norms;              // [S, T, B] of d_t
};

// Where a tile's rows of some positions go: they follow one another, and from position to position it is `step`.
template <class T>
struct Track {
  T* first;         // the tile's first row at the first of the positions; null: not wanted
  const T* before;  // the same at the position before that, if there is one
  int64_t step;

  T* at(int64_t index) const { return first == nullptr ? nullptr : first + index * step; }
  const T* source(int64_t index) const { return index == 0 ? before : at(index - 1); }
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

// What all tiles of a call share.
template <class T>
struct Backward {
  // `feedback` is P, or if `transposed` R = P'; `weight_matrix` may be null: then no credit comes back.
  Backward(const RnnSizes& sizes, const T* feedback, bool transposed, const T* weight_matrix,
           const BackwardArrays<T>& arrays)
      : sizes(sizes), arrays(arrays), inverse(feedback, transposed, sizes), weight(weight_matrix, false, sizes) {}

  void pack() {
    inverse.pack();
    weight.pack();
  }
  int products() const { return weight ? 2 : 1; }
  // A row of the scratch memory, and how many of them each row of a tile needs.
  int64_t stride() const { return panel_count<T>(sizes.hidden) * kLanes<T>; }
  int64_t scratch_rows() const { return arrays.norms == nullptr ? 2 : 4; }

  const RnnSizes& sizes;
  const BackwardArrays<T> arrays;
  PackedStack<T> inverse, weight;
};

// Whether a block's z and e of the position before have a number that is not zero.
struct Alive {
  bool z[kTileBlocks], e[kTileBlocks];
};

// Whether a block of a tile is worth a product, at a position and at the one before.
using AliveTurns = Alive*;  // [2][parts of the team]

enum class Outcome {
  alive,
  faded,  // all rows are zero from here on
  left,   // the team has dissolved, and this thread is not its first
};

// A tile on its way from the last position to the first.
template <class T, class Step>
class TileSweep {
 public:
  // `scratch` has call.scratch_rows() planes of `plane` numbers, in each of which the tile's rows begin at `scratch`.
  TileSweep(const Backward<T>& call, const Step& step, const Tile& tile, T* scratch, int64_t plane, AliveTurns turns)
      : call_(call), step_(step.of(tile.member)), tile_(tile), scratch_(scratch), plane_(plane), turns_(turns) {
    dense_inverse_ = !call.inverse.finite(tile.member);
    dense_weight_ = call.weight && !call.weight.finite(tile.member);
    fades_ = Step::zero_stays_zero && call.arrays.grad_states == nullptr && call.sizes.lengths == nullptr &&
             !dense_inverse_ && !dense_weight_;
    for (int64_t r = 0; r < tile.rows; ++r) steps_[r] = valid_steps(call.sizes, tile.row + r);
  }

  // Goes on with the tile where another thread has been, of which nothing is known.
  void assume_alive() {
    for (int64_t block = 0; block < kTileBlocks; ++block) alive_.z[block] = alive_.e[block] = true;
  }

  // Takes the positions from `begin` to `end` (T: the initial state) and writes e, and z as it is handed down.
  Outcome advance(int64_t begin, int64_t end, const Track<T>& delta, const Track<T>& handed) {
    const int64_t H = call_.sizes.hidden, time = call_.sizes.time;
    PanelGroups<T> groups(H, tile_);
    for (int64_t j = begin; j < end; ++j) {
      if (faded_) {
        if (tile_.part == 0) clear(begin, j, end, delta, handed);
        break;
      }
      const Rows rows = place(j, delta.source(j - begin), delta.at(j - begin), handed.at(j - begin));
      Bits<T> z_bits[kTileBlocks] = {}, e_bits[kTileBlocks] = {};
      for (int64_t group = 0; group < groups.count(); ++group)
        for (int64_t block = 0; block < tile_.blocks; ++block)
          cross(rows, groups, group, block, z_bits[block], e_bits[block]);
      if (j == time) break;
      Alive* const now = turns_ + (j & 1) * tile_.parts;
      for (int64_t block = 0; block < tile_.blocks; ++block) {
        now[tile_.part].z[block] = any_nonzero<T>(z_bits[block]);
        now[tile_.part].e[block] = any_nonzero<T>(e_bits[block]);
      }
      const bool together = tile_.meet();
      if (!together && tile_.part != 0) return Outcome::left;
      faded_ = !gather(now) && fades_;
      if (call_.arrays.norms != nullptr && tile_.part == 0) write_norms(j);
      if (!together) {
        tile_ = tile_.alone();
        groups = PanelGroups<T>(H, tile_);
      }
    }
    return faded_ ? Outcome::faded : Outcome::alive;
  }

  const Tile& tile() const { return tile_; }

 private:
  // The tile at a position.
  struct Rows {
    int64_t position;
    RowStep at[kTileRows];
    const T* z[kTileRows];
    const T* e[kTileRows];
    T *z_new, *d_new, *delta, *handed;
  };

  int64_t time_of(int64_t position) const {
    return call_.sizes.reverse[tile_.member] != 0 ? position : call_.sizes.time - 1 - position;
  }

  Rows place(int64_t j, const T* source, T* delta, T* handed) const {
    const RnnSizes& sizes = call_.sizes;
    const int64_t H = sizes.hidden, stride = call_.stride(), t = time_of(j);
    const bool reverse = sizes.reverse[tile_.member] != 0;
    Rows rows;
    rows.position = j;
    rows.z_new = scratch_ + (j & 1) * plane_;
    rows.d_new = scratch_ + (2 + (j & 1)) * plane_;
    rows.delta = delta;
    rows.handed = handed;
    const T* const z_old = scratch_ + (~j & 1) * plane_;
    for (int64_t r = 0; r < tile_.rows; ++r) {
      const int64_t row = tile_.row + r;
      const bool before_first = reverse ? j == steps_[r] : j == sizes.time;
      const bool valid = j < sizes.time && t < steps_[r];
      RowStep& at = rows.at[r];
      at.place = before_first                              ? (steps_[r] == 0 ? Place::none : Place::initial)
                 : !valid                                  ? Place::padding
                 : (reverse ? t == 0 : t == steps_[r] - 1) ? Place::last
                                                           : Place::inner;
      at.current = ((tile_.member * sizes.time + t) * sizes.batch + row) * H;
      at.source = ((tile_.member * sizes.time + time_of(j - 1)) * sizes.batch + row) * H;
      at.initial = (tile_.member * sizes.batch + row) * H;
      if (j == 0) continue;
      rows.z[r] = z_old + r * stride;
      rows.e[r] = source + r * H;
    }
    return rows;
  }

  // Takes a block of rows and a group of panels over to the position.
  void cross(const Rows& rows, const PanelGroups<T>& groups, int64_t group, int64_t block, Bits<T>& z_bits,
             Bits<T>& e_bits) const {
    const RnnSizes& sizes = call_.sizes;
    const BackwardArrays<T>& arrays = call_.arrays;
    const int64_t H = sizes.hidden, stride = call_.stride(), j = rows.position;
    const int64_t panel = groups.begin(group);
    const int panels = static_cast<int>(groups.begin(group + 1) - panel);
    const int64_t row = tile_.block_begin(block);
    const int high = static_cast<int>(tile_.block_begin(block + 1) - row);
    const Ahead ahead = next(rows, groups.count() * tile_.blocks, group * tile_.blocks + block);
    Vec<T> displaced[kMaxRows * kMaxPanels], credit[kMaxRows * kMaxPanels];
    multiply(j > 0 && (alive_.z[block] || dense_inverse_), call_.inverse, rows.z + row, high, panel, panels, ahead,
             displaced);
    multiply(call_.weight && j > 0 && (alive_.e[block] || dense_weight_), call_.weight, rows.e + row, high, panel,
             panels, ahead, credit);
    for (int64_t r = row; r < row + high; ++r) {
      const RowStep& here = rows.at[r];
      for (int p = 0; p < panels; ++p) {
        const int64_t column = panel_column<T>(H, panel + p), count = H - column;
        const int64_t sum = (r - row) * kMaxPanels + p;
        Stepped<T> stepped = {};
        if (__builtin_expect(here.place == Place::inner, 1)) {
          stepped = step_.template at<false>(here, column, count, displaced[sum], credit[sum]);
        } else if (here.place == Place::last) {
          stepped = step_.template at<true>(here, column, count, beyond(arrays.disp_n, here, column),
                                            beyond(arrays.credit_n, here, column));
        } else if (here.place == Place::initial) {
          write(arrays.disp_h0, here, column, step_.initial(here, column, count, displaced[sum]));
          write(arrays.credit_h0, here, column, credit[sum]);
        } else if (here.place == Place::none) {
          write(arrays.disp_h0, here, column, beyond(arrays.disp_n, here, column));
          write(arrays.credit_h0, here, column, beyond(arrays.credit_n, here, column));
        }
        if (j == sizes.time) continue;
        store_part(rows.delta + r * H + column, stepped.delta, count);
        store(rows.z_new + r * stride + column, stepped.carried);
        e_bits |= (Bits<T>)stepped.delta;
        z_bits |= (Bits<T>)stepped.carried;
        if (rows.handed != nullptr)
          store_part(rows.handed + r * H + column, step_.handed_down(here, column, count, stepped), count);
        if (arrays.norms != nullptr) store(rows.d_new + r * stride + column, stepped.displacement);
      }
    }
  }

  // What is read at the next position, a share of it for each product.
  Ahead next(const Rows& rows, int64_t products, int64_t product) const {
    const RnnSizes& sizes = call_.sizes;
    const int64_t share = ceil_div(tile_.rows * sizes.hidden, products);
    const int64_t step = (sizes.reverse[tile_.member] != 0 ? 1 : -1) * sizes.batch * sizes.hidden;
    const int64_t offset = rows.at[0].current + step + product * share;
    const T* const gradient = call_.arrays.grad_states == nullptr ? call_.arrays.states : call_.arrays.grad_states;
    return {{address(call_.arrays.states, offset), address(gradient, offset), address(call_.arrays.states, offset)},
            ceil_div(share * int64_t{sizeof(T)}, sizes.hidden)};
  }

  void multiply(bool alive, const PackedStack<T>& matrix, const T* const* from, int rows, int64_t panel, int panels,
                const Ahead& ahead, Vec<T>* sums) const {
    if (!alive) {
      for (int i = 0; i < rows * kMaxPanels; ++i) sums[i] = Vec<T>{};
      return;
    }
    const Piece<T> piece{matrix.depth(), from};
    find_product<T, true>(rows, panels)(&piece, 1, matrix.panel(tile_.member, panel), matrix.panel_stride(), ahead,
                                        sums);
  }

  // What the parts of the team found. Returns whether there is anything.
  bool gather(const Alive* now) {
    bool any = false;
    for (int64_t block = 0; block < tile_.blocks; ++block) {
      alive_.z[block] = alive_.e[block] = false;
      for (int part = 0; part < tile_.parts; ++part) {
        alive_.z[block] |= now[part].z[block];
        alive_.e[block] |= now[part].e[block];
      }
      any |= alive_.z[block] || alive_.e[block];
    }
    return any;
  }

  Vec<T> beyond(const T* array, const RowStep& at, int64_t column) const {
    return array == nullptr ? Vec<T>{} : load_part(array + at.initial + column, call_.sizes.hidden - column);
  }

  void write(T* array, const RowStep& at, int64_t column, Vec<T> value) const {
    if (array != nullptr) store_part(array + at.initial + column, value, call_.sizes.hidden - column);
  }

  void write_norms(int64_t j) const {
    const T* const rows = scratch_ + (2 + (j & 1)) * plane_;
    T* const to = call_.arrays.norms + (tile_.member * call_.sizes.time + time_of(j)) * call_.sizes.batch + tile_.row;
    for (int64_t r = 0; r < tile_.rows; ++r) to[r] = row_norm(rows + r * call_.stride(), call_.sizes.hidden);
  }

  // The outputs of the positions from j to `end`, where nothing is left; the tracks begin at `begin`.
  void clear(int64_t begin, int64_t j, int64_t end, const Track<T>& delta, const Track<T>& handed) const {
    const RnnSizes& sizes = call_.sizes;
    const auto zero = [&](T* rows, int64_t width) {
      if (rows != nullptr) std::memset(rows, 0, static_cast<size_t>(tile_.rows * width) * sizeof(T));
    };
    for (; j < end && j < sizes.time; ++j) {
      zero(delta.at(j - begin), sizes.hidden);
      zero(handed.at(j - begin), sizes.hidden);
      if (call_.arrays.norms != nullptr)
        zero(call_.arrays.norms + (tile_.member * sizes.time + time_of(j)) * sizes.batch + tile_.row, 1);
    }
    if (end <= sizes.time) return;
    const int64_t initial = (tile_.member * sizes.batch + tile_.row) * sizes.hidden;
    if (call_.arrays.disp_h0 != nullptr) zero(call_.arrays.disp_h0 + initial, sizes.hidden);
    if (call_.arrays.credit_h0 != nullptr) zero(call_.arrays.credit_h0 + initial, sizes.hidden);
  }

  const Backward<T>& call_;
  const Step step_;
  Tile tile_;
  T* const scratch_;
  const int64_t plane_;
  const AliveTurns turns_;
  bool dense_inverse_, dense_weight_, fades_, faded_ = false;
  Alive alive_ = {};
  int64_t steps_[kTileRows];
};

// Sweeps over all tiles, with what they leave in whole arrays [S, T, B, H]; `displacement` may be null. Calls
// visit(sweep) for every tile, which is to call sweep(step).
template <class T, class Visit>
void sweep_whole(Backward<T>& call, T* delta, T* displacement, int max_threads, const Visit& visit) {
  const RnnSizes& sizes = call.sizes;
  const int processors = team_processors(sizes.stack * sizes.batch, max_threads);
  const int threads = useful_threads<T>(sizes, call.products(), max_threads, processors);
  const Buffer<Barrier> barriers(threads, true);
  const Buffer<Alive> turns(2 * threads);
  const int64_t plane = kTileRows * call.stride();
  const Buffer<T> scratch(threads * call.scratch_rows() * plane);
#pragma omp parallel num_threads(threads)
  {
    const FlushSubnormals flush;
    call.pack();
    for_each_tile<T>(sizes, call.products(), processors, barriers.get(), [&](const Tile& tile, int64_t team) {
      visit([&](const auto& step) {
        const bool reverse = sizes.reverse[tile.member] != 0;
        const int64_t row_size = sizes.hidden, step_size = (reverse ? 1 : -1) * sizes.batch * row_size;
        const int64_t last = tile.member * sizes.time + (reverse ? 0 : sizes.time - 1);
        const int64_t first = sizes.time == 0 ? 0 : (last * sizes.batch + tile.row) * row_size;
        TileSweep<T, std::decay_t<decltype(step)>> sweep(call, step, tile,
                                                         scratch.get() + team * call.scratch_rows() * plane, plane,
                                                         turns.get() + team * tile.parts * 2);
        const Track<T> handed{displacement == nullptr ? nullptr : displacement + first, nullptr, step_size};
        const Outcome outcome = sweep.advance(0, sizes.time + 1, {delta + first, nullptr, step_size}, handed);
        // The next tile of this team uses the same scratch memory.
        if (outcome != Outcome::left) sweep.tile().meet();
      });
    });
  }
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
