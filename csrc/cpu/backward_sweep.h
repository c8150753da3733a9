// The sweep from the last valid step to the first, then to the initial state, of a tile of rows: the skeleton of the
// target passes and of back-propagation through time.
//
// At each position a row has up to two products at hand, of what the sweep left at the position before:
//     displaced = z_{t+1} P   (P packed in `inverse`),    credit = e_{t+1} W   (W packed in `weight`)
// and, of a cell in which state is handed on unit by unit, what was left for that (`direct`, `direct_credit`). A Step
// turns them, with what it reads itself at t, into the step's delta e_t, of kDelta blocks of H columns, the carried
// z_t, of kCarried blocks, or none where z = -e, and what is handed on:
//     Stepped step.at<last>(row_step, column, count, incoming),   Incoming step.initial(row_step, column, count,
//     incoming)
// where the step is step.of(member), which knows the numbers of the tile's member. At a row's last valid step the
// incoming is what comes from beyond. z lives in two row tiles of scratch memory, what is handed on in one more, each
// panel at a place of its own; e goes where a Track says, through all of [S, T, B, D H] or round in a little memory
// that someone else reads meanwhile (layer_gradients.h). A product whose rows are all zero is not computed, which
// changes no bit as long as the matrix is finite. Where all rows of a tile have come to zero and no gradient enters any
// more, the rest is zero, and its states are not read. A NaN there would bring a row back to life that no later state
// of the row told of; whether it does depends on the other rows of the tile, and these, by whole arrays, on the number
// of threads. No forward pass leaves such states; only of what is kept beside them a GRU's `a`, a sum without bounds,
// may be infinite where all states are finite, and the step's delta is NaN then. Behind a faded displacement nothing is
// promised of any of this.
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

// Where a row stands: offsets of its first column in [S, T, B, H] arrays at this step, at the one the sweep comes from
// and at the one it goes to, and in [S, B, H] arrays; whether it goes to the initial state.
struct RowStep {
  Place place;
  bool first;
  int64_t current, source, before, initial;
};

// What reaches a step of the displacement and of the credit; what reaches a row's initial state; what comes from beyond
// its last valid step.
template <class T>
struct Incoming {
  Vec<T> displaced = Vec<T>{}, credit = Vec<T>{}, direct = Vec<T>{}, direct_credit = Vec<T>{};
};

template <class T, int Delta = 1, int Carried = 1>
struct Stepped {
  Vec<T> delta[Delta], carried[Carried == 0 ? 1 : Carried];  // e_t; z_t as the next product takes it
  Vec<T> displacement = Vec<T>{};                            // d_t, for the norms
  Vec<T> direct = Vec<T>{}, direct_credit = Vec<T>{};        // what is handed on
};

// [S, B, H] arrays of Incoming, any of which may be null.
template <class T>
struct IncomingArrays {
  T *displaced, *credit, *direct, *direct_credit;

  // Calls visit(array) for those that are there.
  template <class Visit>
  void for_each(const Visit& visit) const {
    T* const arrays[] = {displaced, credit, direct, direct_credit};
    for (T* const array : arrays)
      if (array != nullptr) visit(array);
  }
};

// What every backward sweep reads, and what it leaves at its end; any may be null but states.
template <class T>
struct BackwardArrays {
  const T* states;  // [S, T, B, H]
  const T* kept;    // [S, T, B, kept_width], what else a step reads
  int64_t kept_width;
  const T* grad_states;  // [S, T, B, H]
  IncomingArrays<const T> beyond;
  IncomingArrays<T> initial;
  T* norms;  // [S, T, B] of d_t
};

// What the rows of a tile carry from position to position.
template <class T>
struct Carried {
  T* z;       // two planes of `plane` numbers, for the norms four, rows `stride` apart
  T* direct;  // one, rows `direct_stride` apart
  int64_t plane, stride, direct_stride;

  Carried from(int64_t row) const {
    return {z + row * stride, direct + row * direct_stride, plane, stride, direct_stride};
  }
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
      : sizes(sizes),
        arrays(arrays),
        inverse(feedback, transposed, sizes),
        weight(weight_matrix, false, sizes),
        gates_(1),
        planes_(arrays.norms == nullptr ? 2 : 4),
        directs_(0) {}
  // Of gates: P and W are [S, G H, H]; for a Step of so many carried blocks.
  Backward(const RnnSizes& sizes, const T* feedback, const T* weight_matrix, const DeltaBlocks& blocks, int carried,
           const BackwardArrays<T>& arrays)
      : sizes(sizes),
        arrays(arrays),
        inverse(feedback, sizes, blocks),
        weight(weight_matrix, sizes, blocks),
        gates_(blocks.gates),
        planes_(carried == 0 ? 0 : 2),
        directs_(weight_matrix == nullptr ? 1 : 2) {}

  void pack() {
    inverse.pack();
    weight.pack();
  }
  int products() const { return gates_ * (weight ? 2 : 1); }
  // Numbers that so many rows carry, and where they stand in a memory of that size.
  int64_t carried_size(int64_t rows) const { return rows * (planes_ * stride() + direct_stride()); }
  Carried<T> carried(T* memory, int64_t rows) const {
    return {memory, memory + rows * planes_ * stride(), rows * stride(), stride(), direct_stride()};
  }

  const RnnSizes& sizes;
  const BackwardArrays<T> arrays;
  PackedStack<T> inverse, weight;

 private:
  int64_t stride() const { return panel_count<T>(gates_ * sizes.hidden) * kLanes<T>; }
  int64_t direct_stride() const { return directs_ * panel_count<T>(sizes.hidden) * kLanes<T>; }

  const int gates_, planes_, directs_;
};

// Whether a block's z and e of the position before, and what it handed on, have a number that is not zero.
struct Alive {
  bool z[kTileBlocks], e[kTileBlocks], direct[kTileBlocks];
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
  // `carried` is that of the tile's rows.
  TileSweep(const Backward<T>& call, const Step& step, const Tile& tile, const Carried<T>& carried, AliveTurns turns)
      : call_(call), step_(step.of(tile.member)), tile_(tile), carried_(carried), turns_(turns) {
    dense_inverse_ = !call.inverse.finite(tile.member);
    dense_weight_ = call.weight && !call.weight.finite(tile.member);
    fades_ = Step::zero_stays_zero && call.arrays.grad_states == nullptr && call.sizes.lengths == nullptr &&
             !dense_inverse_ && !dense_weight_;
    for (int64_t r = 0; r < tile.rows; ++r) steps_[r] = valid_steps(call.sizes, tile.row + r);
  }

  // Goes on with the tile where another thread has been, of which nothing is known.
  void assume_alive() {
    for (int64_t block = 0; block < kTileBlocks; ++block)
      alive_.z[block] = alive_.e[block] = alive_.direct[block] = true;
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
      Found found[kTileBlocks] = {};
      for (int64_t group = 0; group < groups.count(); ++group)
        for (int64_t block = 0; block < tile_.blocks; ++block) cross(rows, groups, group, block, found[block]);
      if (j == time) break;
      Alive& now = turns_[(j & 1) * tile_.parts + tile_.part];
      for (int64_t block = 0; block < tile_.blocks; ++block) {
        now.e[block] = any_nonzero<T>(found[block].e);
        now.z[block] = Step::kCarried == 0 ? now.e[block] : any_nonzero<T>(found[block].z);
        now.direct[block] = Step::kDirect && any_nonzero<T>(found[block].direct);
      }
      const bool together = tile_.meet();
      if (!together && tile_.part != 0) return Outcome::left;
      faded_ = !gather(turns_ + (j & 1) * tile_.parts) && fades_;
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

  // Bits of what a block left, joined by "or".
  struct Found {
    Bits<T> z, e, direct;
  };

  int64_t time_of(int64_t position) const {
    return call_.sizes.reverse[tile_.member] != 0 ? position : call_.sizes.time - 1 - position;
  }

  Rows place(int64_t j, const T* source, T* delta, T* handed) const {
    const RnnSizes& sizes = call_.sizes;
    const int64_t H = sizes.hidden, t = time_of(j);
    const bool reverse = sizes.reverse[tile_.member] != 0;
    Rows rows;
    rows.position = j;
    rows.z_new = carried_.z + (j & 1) * carried_.plane;
    rows.d_new = carried_.z + (2 + (j & 1)) * carried_.plane;
    rows.delta = delta;
    rows.handed = handed;
    const T* const z_old = carried_.z + (~j & 1) * carried_.plane;
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
      at.before = ((tile_.member * sizes.time + time_of(j + 1)) * sizes.batch + row) * H;
      at.initial = (tile_.member * sizes.batch + row) * H;
      at.first = reverse ? t + 1 >= steps_[r] : t == 0;
      if (j == 0) continue;
      rows.e[r] = source + r * Step::kDelta * H;
      rows.z[r] = Step::kCarried == 0 ? rows.e[r] : z_old + r * carried_.stride;
    }
    return rows;
  }

  // Takes a block of rows and a group of panels over to the position.
  void cross(const Rows& rows, const PanelGroups<T>& groups, int64_t group, int64_t block, Found& found) const {
    const RnnSizes& sizes = call_.sizes;
    const int64_t H = sizes.hidden, j = rows.position;
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
        T* const direct = carried_.direct + r * carried_.direct_stride + (panel + p) * kLanes<T>;
        Incoming<T> incoming = {displaced[sum], credit[sum]};
        if constexpr (Step::kDirect) {
          if (here.place == Place::inner || here.place == Place::initial) {
            incoming.direct = load(direct);
            if (call_.weight) incoming.direct_credit = load(direct + carried_.direct_stride / 2);
          }
        }
        typename Step::Made made = {};
        if (__builtin_expect(here.place == Place::inner, 1)) {
          made = step_.template at<false>(here, column, count, incoming);
        } else if (here.place == Place::last) {
          made = step_.template at<true>(here, column, count, beyond(here, column));
        } else if (here.place == Place::initial) {
          write(here, column, step_.initial(here, column, count, incoming));
        } else if (here.place == Place::none) {
          write(here, column, beyond(here, column));
        }
        if (j == sizes.time) continue;
        for (int i = 0; i < Step::kDelta; ++i) {
          store_part(rows.delta + (r * Step::kDelta + i) * H + column, made.delta[i], count);
          found.e |= (Bits<T>)made.delta[i];
        }
        for (int i = 0; i < Step::kCarried; ++i) {
          store_part(rows.z_new + r * carried_.stride + i * H + column, made.carried[i], count);
          found.z |= (Bits<T>)made.carried[i];
        }
        if constexpr (Step::kDirect) {
          store(direct, made.direct);
          if (call_.weight) store(direct + carried_.direct_stride / 2, made.direct_credit);
          found.direct |= (Bits<T>)made.direct | (Bits<T>)made.direct_credit;
        }
        if constexpr (Step::kHandsDown) {
          if (rows.handed != nullptr)
            store_part(rows.handed + r * H + column, step_.handed_down(here, column, count, made), count);
          if (call_.arrays.norms != nullptr) store(rows.d_new + r * carried_.stride + column, made.displacement);
        }
      }
    }
  }

  // What is read at the next position, a share of it for each product.
  Ahead next(const Rows& rows, int64_t products, int64_t product) const {
    const RnnSizes& sizes = call_.sizes;
    const BackwardArrays<T>& arrays = call_.arrays;
    const int64_t H = sizes.hidden,
                  row = rows.at[0].current / H + (sizes.reverse[tile_.member] != 0 ? 1 : -1) * sizes.batch;
    const T* const gradient = arrays.grad_states == nullptr ? arrays.states : arrays.grad_states;
    // Of what is kept the halves side by side.
    const int64_t numbers = tile_.rows * (arrays.kept == nullptr ? H : ceil_div(arrays.kept_width, 2));
    const int64_t share = ceil_div(numbers, products), from = product * share;
    const uintptr_t read = arrays.kept == nullptr ? address(arrays.states, row * H + from)
                                                  : address(arrays.kept, row * arrays.kept_width + from);
    return {{read, address(gradient, row * H + from),
             arrays.kept == nullptr ? read : address(arrays.kept, row * arrays.kept_width + numbers + from)},
            ceil_div(share * int64_t{sizeof(T)}, call_.inverse.depth())};
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
      alive_.z[block] = alive_.e[block] = alive_.direct[block] = false;
      for (int part = 0; part < tile_.parts; ++part) {
        alive_.z[block] |= now[part].z[block];
        alive_.e[block] |= now[part].e[block];
        alive_.direct[block] |= now[part].direct[block];
      }
      any |= alive_.z[block] || alive_.e[block] || alive_.direct[block];
    }
    return any;
  }

  Incoming<T> beyond(const RowStep& at, int64_t column) const {
    const IncomingArrays<const T>& arrays = call_.arrays.beyond;
    const auto read = [&](const T* array) {
      return array == nullptr ? Vec<T>{} : load_part(array + at.initial + column, call_.sizes.hidden - column);
    };
    return {read(arrays.displaced), read(arrays.credit), read(arrays.direct), read(arrays.direct_credit)};
  }

  void write(const RowStep& at, int64_t column, const Incoming<T>& values) const {
    const IncomingArrays<T>& arrays = call_.arrays.initial;
    const auto put = [&](T* array, Vec<T> value) {
      if (array != nullptr) store_part(array + at.initial + column, value, call_.sizes.hidden - column);
    };
    put(arrays.displaced, values.displaced);
    put(arrays.credit, values.credit);
    put(arrays.direct, values.direct);
    put(arrays.direct_credit, values.direct_credit);
  }

  void write_norms(int64_t j) const {
    const T* const rows = carried_.z + (2 + (j & 1)) * carried_.plane;
    T* const to = call_.arrays.norms + (tile_.member * call_.sizes.time + time_of(j)) * call_.sizes.batch + tile_.row;
    for (int64_t r = 0; r < tile_.rows; ++r) to[r] = row_norm(rows + r * carried_.stride, call_.sizes.hidden);
  }

  // The outputs of the positions from j to `end`, where nothing is left; the tracks begin at `begin`.
  void clear(int64_t begin, int64_t j, int64_t end, const Track<T>& delta, const Track<T>& handed) const {
    const RnnSizes& sizes = call_.sizes;
    const auto zero = [&](T* rows, int64_t width) {
      if (rows != nullptr) std::memset(rows, 0, static_cast<size_t>(tile_.rows * width) * sizeof(T));
    };
    for (; j < end && j < sizes.time; ++j) {
      zero(delta.at(j - begin), Step::kDelta * sizes.hidden);
      zero(handed.at(j - begin), sizes.hidden);
      if (call_.arrays.norms != nullptr)
        zero(call_.arrays.norms + (tile_.member * sizes.time + time_of(j)) * sizes.batch + tile_.row, 1);
    }
    if (end <= sizes.time) return;
    const int64_t initial = (tile_.member * sizes.batch + tile_.row) * sizes.hidden;
    call_.arrays.initial.for_each([&](T* array) { zero(array + initial, sizes.hidden); });
  }

  const Backward<T>& call_;
  const Step step_;
  Tile tile_;
  const Carried<T> carried_;
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
  const int64_t size = call.carried_size(kTileRows);
  const Buffer<T> carried(threads * size);
#pragma omp parallel num_threads(threads)
  {
    const FlushSubnormals flush;
    call.pack();
    for_each_tile<T>(sizes, call.products(), processors, barriers.get(), [&](const Tile& tile, int64_t team) {
      visit([&](const auto& step) {
        using Step = std::decay_t<decltype(step)>;
        const bool reverse = sizes.reverse[tile.member] != 0;
        const int64_t last = tile.member * sizes.time + (reverse ? 0 : sizes.time - 1);
        const int64_t first = sizes.time == 0 ? 0 : last * sizes.batch + tile.row;
        const auto track = [&](T* rows, int64_t width) -> Track<T> {
          if (rows == nullptr) return {nullptr, nullptr, 0};
          return {rows + first * width, nullptr, (reverse ? 1 : -1) * sizes.batch * width};
        };
        TileSweep<T, Step> sweep(call, step, tile, call.carried(carried.get() + team * size, kTileRows),
                                 turns.get() + team * tile.parts * 2);
        const Outcome outcome = sweep.advance(0, sizes.time + 1, track(delta, Step::kDelta * sizes.hidden),
                                              track(displacement, sizes.hidden));
        // The next tile of this team uses the same scratch memory.
        if (outcome != Outcome::left) sweep.tile().meet();
      });
    });
  }
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
