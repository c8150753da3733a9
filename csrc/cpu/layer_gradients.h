// A backward sweep with the gradients that its delta gives, by tiles of time, so that delta stays in the cache:
//     [dW, dU, db] = scale * sum over t and rows of e_t' [h_{t-1}, x_t, 1],    dx_t = input_scale * e_t U  (or z_t P_U)
//
// The rows of a member are cut into groups, by the sizes alone. A group is swept through some positions, kChunk rows of
// delta in all; then these are added to the group's own sums, and their dx is written; then come the next positions. In
// the end the sums of the groups are added in their order. So an element is one sum in one order, on any number of
// threads. A thread takes a group through all of time and waits for nobody; where there are fewer groups than threads a
// team takes one: each sweeps some of its rows (or, where these are fewer, some columns of all), all meet, and each
// computes some rows of the sums. Two tiles of delta take turns, so that they meet once a tile. Memory: the packed
// matrices, every group's sums, per team two tiles of delta (and of z, where the input's gradient is of it) and two
// rows of z for each of its rows, and per thread a packed chunk of either side of the sums' product. Where rows are
// many and steps few there are no groups (group_count): delta, and z where that is wanted, stand in memory whole, and
// the gradients are products of all of it.
//
// States and inputs further back than a displacement reaches are not read.
#pragma once

#include "cpu/backward_sweep.h"
#include "cpu/weight_gradients.h"

namespace tpext::cpu::TPEXT_CAPABILITY {

void rnn_weight_gradients(const RnnWeightGradients<float>& args, int threads);
void rnn_weight_gradients(const RnnWeightGradients<double>& args, int threads);

namespace {

// [S] packed matrices [G H, I], whose products are gradients of the input.
template <class T>
class PackedInput {
 public:
  PackedInput(const T* matrix, int64_t stack, int64_t depth, int64_t inputs)
      : matrix_(matrix),
        stack_(matrix == nullptr ? 0 : stack),
        depth_(depth),
        inputs_(inputs),
        panels_(panel_count<T>(inputs)),
        packed_(stack_ * panels_ * panel_stride()) {}

  void pack() {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < stack_ * panels_; ++i)
      pack_panel(matrix_ + i / panels_ * depth_ * inputs_, inputs_, 1, depth_, inputs_, i % panels_,
                 packed_.get() + i * panel_stride());
  }

  int64_t depth() const { return depth_; }
  int64_t panels() const { return panels_; }
  int64_t panel_stride() const { return depth_ * kLanes<T>; }
  const T* panel(int64_t member, int64_t index) const {
    return packed_.get() + (member * panels_ + index) * panel_stride();
  }

 private:
  const T* matrix_;
  int64_t stack_, depth_, inputs_, panels_;
  Buffer<T> packed_;
};

// Rows of e, or of z, one after another: what the input's gradient is made of is the beginning of each.
template <class T>
struct ErrorRows {
  const T* first;
  int64_t stride;
};

// grad_input of the rows [begin, end) of an order; `from` has them from row 0 on.
template <class T>
__attribute__((noinline)) void input_gradient(const LayerGradients<T>& args, const PackedInput<T>& matrix,
                                              int64_t member, const RowOrder& order, const ErrorRows<T>& from,
                                              int64_t begin, int64_t end) {
  const RnnSizes& sizes = args.parameters.sizes;
  const int64_t I = args.parameters.input.size;
  const T scale = args.input_scale.of(member);
  for (int64_t first = begin; first < end; first += kMaxRows) {
    const int high = static_cast<int>(end - first < kMaxRows ? end - first : kMaxRows);
    const T* rows[kMaxRows];
    T* to[kMaxRows];
    for (int r = 0; r < high; ++r) {
      const int64_t k = first + r, t = order.time + order.step * (k / order.width);
      rows[r] = from.first + k * from.stride;
      to[r] = args.grad_input + ((member * sizes.time + t) * sizes.batch + order.row + k % order.width) * I;
    }
    const Piece<T> piece{matrix.depth(), rows};
    const int most = max_panels(high);
    for (int64_t panel = 0; panel < matrix.panels(); panel += most) {
      const int wide = static_cast<int>(matrix.panels() - panel < most ? matrix.panels() - panel : most);
      Vec<T> sums[kMaxRows * kMaxPanels];
      find_product<T, false>(high, wide)(&piece, 1, matrix.panel(member, panel), matrix.panel_stride(), {}, sums);
      for (int r = 0; r < high; ++r)
        for (int p = 0; p < wide; ++p) {
          const int64_t column = panel_column<T>(I, panel + p);
          store_part(to[r] + column, sums[r * kMaxPanels + p] * scale, I - column);
        }
    }
  }
}

// A tile of time has at least one position of a group, and is one chunk of the sums.
static_assert(kTileRows <= kChunk);

// How many groups the rows of a member are cut into: enough for many threads, of as many rows as weights that fit the
// second-level cache pay for, and so that all sums together take no more than a quarter of the memory of the whole
// delta (of one block: of the states). 0: there is no such cut, as the sequence is too short for so many rows.
inline int64_t group_count(const RnnSizes& sizes, int64_t columns) {
  const int64_t wanted = sizes.hidden > 256 ? 32 : sizes.batch >= 32 ? 16 : 8;
  int64_t groups = 1;
  while (groups * wanted < sizes.batch) groups *= 2;
  while (groups > 1 && sizes.batch * sizes.time < 4 * columns * groups) groups /= 2;
  return ceil_div(sizes.batch, groups) <= kTileRows ? groups : 0;
}

// How threads take the groups of a call.
struct GroupTeams {
  int64_t teams;
  int members;
  bool by_columns;
};

template <class T>
inline GroupTeams share_groups(const RnnSizes& sizes, int64_t groups, int products, int threads, int processors) {
  const int64_t all = sizes.stack * groups;
  if (all >= threads || all == 0) return {threads, 1, false};
  const int64_t most = (threads < processors ? threads : processors) / all, rows = ceil_div(sizes.batch, groups);
  const double row = step_operations(sizes, products);
  const auto worth = [&](double operations, int64_t parts) {
    double members = operations / (kTeamOperations / 2);
    if (members > static_cast<double>(most)) members = static_cast<double>(most);
    if (members > static_cast<double>(parts)) members = static_cast<double>(parts);
    return members < 2 ? 1 : static_cast<int>(members);
  };
  const int by_rows = worth(row * kChunk, sizes.batch / groups);  // the least that a group has
  const int by_columns = worth(row * static_cast<double>(rows), panel_units<T>(sizes.hidden));
  return by_columns > by_rows ? GroupTeams{all, by_columns, true} : GroupTeams{all, by_rows, false};
}

// What the threads of a call share.
template <class T>
struct LayerCall {
  LayerCall(const LayerGradients<T>& args, Backward<T>& sweep)
      : args(args),
        sweep(sweep),
        sizes(sweep.sizes),
        width(args.parameters.blocks.count * sizes.hidden),
        input(args.grad_input == nullptr ? nullptr : args.input_feedback, sizes.stack,
              args.parameters.blocks.gates * sizes.hidden, args.parameters.input.size),
        columns(sizes.stack == 0 ? 0 : WeightRows<T>(args.parameters, 0, {0, 1, 0, 1}).columns()),
        sum_stride(panel_count<T>(columns) * kLanes<T>),
        groups(group_count(sizes, columns)),
        group_rows(groups == 0 ? 0 : ceil_div(sizes.batch, groups)),
        positions(group_rows == 0 ? 0 : kChunk / group_rows),
        sums(sizes.stack * groups * width * sum_stride) {}

  bool of_displacement() const { return args.grad_input != nullptr && args.of_displacement; }
  T* sums_of(int64_t group) const { return sums.get() + group * width * sum_stride; }
  // The rows that give the input's gradient, of those of delta and of z from a row on.
  ErrorRows<T> of_input(const T* delta, const T* handed, int64_t row) const {
    if (of_displacement()) return {handed + row * sizes.hidden, sizes.hidden};
    return {delta + row * width + args.parameters.blocks.first_of_input() * sizes.hidden, width};
  }
  // What a sweep reads first that goes on at this row of [S, T, B].
  Upcoming upcoming(int64_t row, int64_t rows) const {
    const BackwardArrays<T>& arrays = sweep.arrays;
    const int64_t H = sizes.hidden, bytes = int64_t{sizeof(T)};
    const uintptr_t states = address(arrays.states, row * H);
    const uintptr_t gradient = arrays.grad_states == nullptr ? states : address(arrays.grad_states, row * H);
    if (arrays.kept == nullptr) return {{states, gradient, states}, rows * H * bytes};
    const int64_t half = rows * arrays.kept_width / 2;
    const uintptr_t kept = address(arrays.kept, row * arrays.kept_width);
    return {{kept, gradient, kept + static_cast<uintptr_t>(half * bytes)}, half * bytes};
  }

  const LayerGradients<T>& args;
  Backward<T>& sweep;
  const RnnSizes& sizes;
  const int64_t width;  // of delta
  PackedInput<T> input;
  const int64_t columns, sum_stride;
  const int64_t groups, group_rows, positions;  // of a member; most of a group; of a tile of time
  Buffer<T> sums;                               // [S, groups, width, sum_stride]
};

// Memory of a team: two tiles of delta (and of z), what the sweep carries, and what its members tell one another.
template <class T>
struct TeamMemory {
  T *delta, *handed;
  Carried<T> carried;
  Alive* turns;
  bool* faded;

  // Rows of a tile, and their numbers.
  static int64_t rows(const LayerCall<T>& call) { return call.positions * call.group_rows; }
  static int64_t tiles(const LayerCall<T>& call) {
    return 2 * rows(call) * (call.width + (call.of_displacement() ? call.sizes.hidden : 0));
  }
  static int64_t size(const LayerCall<T>& call) {
    return ceil_div(tiles(call) + call.sweep.carried_size(call.group_rows), 64) * 64;
  }
  TeamMemory(const LayerCall<T>& call, T* memory, Alive* turns, bool* faded)
      : delta(memory),
        handed(call.of_displacement() ? memory + 2 * rows(call) * call.width : nullptr),
        carried(call.sweep.carried(memory + tiles(call), call.group_rows)),
        turns(turns),
        faded(faded) {}
};

// One thread's part in a group, but for the sweep.
template <class T>
class GroupShare {
 public:
  // `team` has the group's rows and this thread's place.
  GroupShare(const LayerCall<T>& call, int64_t group, const Tile& team, bool by_columns, const TeamMemory<T>& memory,
             const ChunkSpace<T>& space)
      : call_(call),
        team_(team),
        by_columns_(by_columns),
        memory_(memory),
        space_(space),
        reverse_(call.sizes.reverse[team.member] != 0),
        sums_(call.sums_of(group)) {
    const int64_t begin = part_of(call.width, 0), end = part_of(call.width, 1);
    std::memset(sums_ + begin * call.sum_stride, 0, static_cast<size_t>((end - begin) * call.sum_stride) * sizeof(T));
  }

 protected:
  // The beginning of this thread's share of `total` items, or of the one after.
  int64_t part_of(int64_t total, int after) const { return part_begin(total, team_.parts, team_.part + after); }

  Tile rows_of_part() const {
    const int64_t first = part_of(team_.rows, 0), rows = part_of(team_.rows, 1) - first;
    return {team_.member, team_.row + first, rows, ceil_div(rows, kMaxRows), 0, 1, 0, team_.barrier};
  }

  int64_t time_of(int64_t position) const { return reverse_ ? position : call_.sizes.time - 1 - position; }

  // Takes the tile of delta (and z) that begins with this row, and has the positions from `begin` to `end`.
  __attribute__((noinline)) void take(int64_t row, int64_t begin, int64_t end) const {
    const RnnSizes& sizes = call_.sizes;
    const int64_t count = (end - begin) * team_.rows, from = part_of(call_.width, 0), to = part_of(call_.width, 1);
    const RowOrder order{time_of(begin), reverse_ ? 1 : -1, team_.row, team_.rows};
    if (call_.columns != 0 && from < to && count != 0) {
      const WeightRows<T> rows(call_.args.parameters, team_.member, order);
      // The sweep goes on from here.
      const int64_t next = (team_.member * sizes.time + time_of(end)) * sizes.batch + team_.row;
      add_chunk(rows, memory_.delta + row * call_.width, 0, count, from, to, call_.upcoming(next, team_.rows), space_,
                sums_ + from * call_.sum_stride);
    }
    if (call_.args.grad_input != nullptr)
      input_gradient(call_.args, call_.input, team_.member, order, call_.of_input(memory_.delta, memory_.handed, row),
                     part_of(count, 0), part_of(count, 1));
  }

  // What the positions from `begin` on and the initial state get where nothing is left.
  __attribute__((noinline)) void clear(int64_t begin) const {
    const RnnSizes& sizes = call_.sizes;
    const auto zero = [](T* rows, int64_t count) {
      if (rows != nullptr) std::memset(rows, 0, static_cast<size_t>(count) * sizeof(T));
    };
    const int64_t I = call_.args.parameters.input.size;
    for (int64_t j = begin + team_.part; j < sizes.time && call_.args.grad_input != nullptr; j += team_.parts)
      zero(call_.args.grad_input + ((team_.member * sizes.time + time_of(j)) * sizes.batch + team_.row) * I,
           team_.rows * I);
    const int64_t first = part_of(team_.rows, 0), count = part_of(team_.rows, 1) - first;
    const int64_t initial = (team_.member * sizes.batch + team_.row + first) * sizes.hidden;
    call_.sweep.arrays.initial.for_each([&](T* array) { zero(array + initial, count * sizes.hidden); });
  }

  const LayerCall<T>& call_;
  Tile team_;
  const bool by_columns_;
  const TeamMemory<T>& memory_;
  const ChunkSpace<T>& space_;
  const bool reverse_;
  T* const sums_;
};

template <class T, class Step>
class GroupBackward : GroupShare<T> {
 public:
  GroupBackward(const GroupShare<T>& share, const Step& step) : GroupShare<T>(share), step_(step) {}

  void run() {
    const int64_t position = team_.parts == 1 || by_columns_
                                 ? go(team_, memory_.turns, 0, false)
                                 : go(rows_of_part(), memory_.turns + 2 * team_.part, 0, false);
    if (position != kLeft && position < call_.sizes.time) go(team_, memory_.turns, position, true);
  }

 private:
  using GroupShare<T>::call_, GroupShare<T>::team_, GroupShare<T>::by_columns_, GroupShare<T>::memory_;
  using GroupShare<T>::rows_of_part, GroupShare<T>::take, GroupShare<T>::clear;
  static constexpr int64_t kLeft = -1;

  // Goes from a position to the last, or to where the team dissolves and this thread has the rest to itself.
  // Returns where that is, T at the end, or kLeft.
  int64_t go(const Tile& tile, Alive* turns, int64_t begin, bool taken_over) {
    const int64_t time = call_.sizes.time, first = tile.row - team_.row, size = TeamMemory<T>::rows(call_);
    TileSweep<T, Step> sweep(call_.sweep, step_, tile, memory_.carried.from(first), turns);
    if (taken_over) sweep.assume_alive();
    for (int64_t end;; begin = end) {
      end = begin + call_.positions < time ? begin + call_.positions : time;
      const int64_t turn = begin / call_.positions & 1;
      const auto track = [&](T* tiles, int64_t width) -> Track<T> {
        if (tiles == nullptr) return {nullptr, nullptr, 0};
        const int64_t last = (call_.positions - 1) * team_.rows;
        return {tiles + (turn * size + first) * width, tiles + ((1 - turn) * size + last + first) * width,
                team_.rows * width};
      };
      const Outcome outcome = sweep.advance(begin, end == time ? time + 1 : end, track(memory_.delta, call_.width),
                                            track(memory_.handed, call_.sizes.hidden));
      if (outcome == Outcome::left) return kLeft;
      if (by_columns_) team_ = sweep.tile();
      bool* const faded = memory_.faded + turn * team_.parts;
      faded[team_.part] = outcome == Outcome::faded;
      const bool together = team_.meet();
      if (!together && team_.part != 0) return kLeft;
      bool all_faded = true;
      for (int part = 0; part < team_.parts; ++part) all_faded = all_faded && faded[part];
      if (!together) team_ = team_.alone();
      take(turn * size, begin, end);
      if (end == time) return time;
      if (all_faded) {
        clear(end);
        return time;
      }
      if (!together) return end;
    }
  }

  const Step step_;
};

// The groups of one thread's team, and the memory for them.
template <class T>
class LayerTeams {
 public:
  LayerTeams(const LayerCall<T>& call, int max_threads)
      : call_(call),
        groups_(call.sizes.stack * call.groups),
        processors_(team_processors(groups_, max_threads)),
        threads_(useful(max_threads)),
        team_size_(TeamMemory<T>::size(call)),
        space_size_(ceil_div(ChunkSpace<T>::size(call.sizes.hidden, panel_count<T>(call.columns)), 64) * 64),
        barriers_(threads_, true),
        turns_(2 * threads_),
        faded_(2 * threads_),
        memory_(threads_ * (team_size_ + space_size_)) {}

  int threads() const { return threads_; }

  // To be called by every thread of a parallel region.
  template <class Step>
  void run(const Step& step) const {
    const RnnSizes& sizes = call_.sizes;
    const GroupTeams teams = share(thread_count());
    const int64_t team = thread_index() / teams.members;
    if (team >= teams.teams) return;
    T* const own = memory_.get() + thread_index() * space_size_;
    T* const shared = memory_.get() + threads_ * space_size_ + team * team_size_;
    const TeamMemory<T> memory(call_, shared, turns_.get() + 2 * team * teams.members,
                               faded_.get() + 2 * team * teams.members);
    const ChunkSpace<T> space(own, panel_count<T>(call_.columns));
    std::memset(space.line, 0, static_cast<size_t>(panel_count<T>(call_.columns) * kLanes<T>) * sizeof(T));
    const double work = step_operations(sizes, call_.sweep.products()) * kChunk / teams.members;
    const int pauses = 1000 + (work < 1e8 ? static_cast<int>(work / 100) : 1000000);
    // A team of several members has one group: should it dissolve, it meets no more.
    for (int64_t i = part_begin(groups_, teams.teams, team); i < part_begin(groups_, teams.teams, team + 1); ++i) {
      const int64_t row = part_begin(sizes.batch, call_.groups, i % call_.groups);
      const int64_t rows = part_begin(sizes.batch, call_.groups, i % call_.groups + 1) - row;
      const Tile tile{i / call_.groups,
                      row,
                      rows,
                      ceil_div(rows, kMaxRows),
                      thread_index() % teams.members,
                      teams.members,
                      pauses,
                      barriers_.get() + team};
      const GroupShare<T> part(call_, i, tile, teams.by_columns, memory, space);
      if (rows != 0) GroupBackward<T, Step>(part, step).run();
    }
  }

 private:
  GroupTeams share(int threads) const {
    return share_groups<T>(call_.sizes, call_.groups, call_.sweep.products(), threads, processors_);
  }
  // Threads worth waking: each gets at least 10^6 operations, some 10 microseconds.
  int useful(int max_threads) const {
    const RnnSizes& sizes = call_.sizes;
    const double row =
        step_operations(sizes, call_.sweep.products()) + 2.0 * static_cast<double>(call_.width * call_.columns);
    double most = static_cast<double>(sizes.stack * sizes.time * sizes.batch) * row / 1e6 + 1;
    const GroupTeams teams = share(max_threads);
    const double places = static_cast<double>(teams.teams * teams.members);
    most = most < places ? most : places;
    return most < 1 ? 1 : most < max_threads ? static_cast<int>(most) : max_threads;
  }

  const LayerCall<T>& call_;
  const int64_t groups_;
  const int processors_, threads_;
  const int64_t team_size_, space_size_;
  Buffer<Barrier> barriers_;
  Buffer<Alive> turns_;
  Buffer<bool> faded_;
  Buffer<T> memory_;
};

// The sums of the groups, in their order, as gradients. To be called by every thread of a parallel region.
template <class T>
void write_parameter_gradients(const LayerCall<T>& call) {
  const int64_t panels = panel_count<T>(call.columns);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < call.sizes.stack * call.width; ++i) {
    const int64_t member = i / call.width, row = i % call.width;
    const WeightRows<T> rows(call.args.parameters, member, {0, 1, 0, 1});
    T* const total = call.sums_of(member * call.groups) + row * call.sum_stride;
    for (int64_t group = 1; group < call.groups; ++group) {
      const T* const more = call.sums_of(member * call.groups + group) + row * call.sum_stride;
      for (int64_t p = 0; p < panels; ++p)
        store(total + p * kLanes<T>, load(total + p * kLanes<T>) + load(more + p * kLanes<T>));
    }
    rows.write(total, row);
  }
}

// A short sequence, by whole arrays: the sweep, then the gradients.
template <class T, class Visit>
void layer_backward_whole(LayerCall<T>& call, int max_threads, const Visit& visit) {
  const RnnSizes& sizes = call.sizes;
  const int64_t rows = sizes.time * sizes.batch, all = sizes.stack * rows;
  const Buffer<T> delta(all * call.width), handed(call.of_displacement() ? all * sizes.hidden : 0);
  sweep_whole(call.sweep, delta.get(), call.of_displacement() ? handed.get() : nullptr, max_threads, visit);
  RnnWeightGradients<T> parameters = call.args.parameters;
  parameters.delta = delta.get();
  if (call.columns != 0) rnn_weight_gradients(parameters, max_threads);
  if (call.args.grad_input == nullptr) return;
  const int64_t cuts = ceil_div(rows, kChunk), depth = call.input.depth();
  const double most =
      2e-6 * static_cast<double>(all * depth) * static_cast<double>(call.args.parameters.input.size) + 1;
  const int threads = most < max_threads ? static_cast<int>(most) : max_threads;
#pragma omp parallel num_threads(threads)
  {
    const FlushSubnormals flush;
    call.input.pack();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < sizes.stack * cuts; ++i) {
      const int64_t member = i / cuts, cut = i % cuts;
      const ErrorRows<T> from = call.of_input(delta.get(), handed.get(), member * rows);
      input_gradient(call.args, call.input, member, {0, 1, 0, sizes.batch}, from, part_begin(rows, cuts, cut),
                     part_begin(rows, cuts, cut + 1));
    }
  }
}

// Calls visit(run), which is to call run(step) with the step of the sweep.
template <class T, class Visit>
void layer_backward(const LayerGradients<T>& args, Backward<T>& sweep, int max_threads, const Visit& visit) {
  LayerCall<T> call(args, sweep);
  if (sweep.sizes.stack == 0) return;
  if (call.groups == 0) return layer_backward_whole(call, max_threads, visit);
  const LayerTeams<T> teams(call, max_threads);
#pragma omp parallel num_threads(teams.threads())
  {
    const FlushSubnormals flush;
    sweep.pack();
    call.input.pack();
    visit([&](const auto& step) { teams.run(step); });
#pragma omp barrier
    if (call.columns != 0) write_parameter_gradients(call);
  }
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
