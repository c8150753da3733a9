// kaczmarz_step: the update of one layer for a batch, by kaczmarz_train's equations, averaged: with d the displacement
// of its outputs,
//     x' = x + move(d),  x'' = x', or relu(x'),  c = relaxation (d - W (x'' - x)) / (||x''||^2 + 1 + damping)
//     dW = 1/B sum_b c_b x''_b',  db = 1/B sum_b c_b
// (no 1 and no db in a layer without bias; c = 0 where its denominator is 0); x'' = x where the input is data.
//
// Three products and what lies between them: x' with W as it is, W (x'' - x) with W transposed, and c'x''. W is packed
// both ways (microkernel.h). Each thread takes blocks of rows through the first two, while a block's rows and their
// displacement stay in its cache, and after a barrier blocks of columns of the third, where it packs the rows of x'' by
// chunks. Every sum has one order, whatever the threads and the blocks: that of the microkernel, by chunks in the third
// product; norms that of vectors and then of lanes. Memory: W twice, c, and for each thread a block of rows of x'' - x
// and of d and a packed chunk.
#include "cpu/kaczmarz.h"
#include "cpu/threads.h"
#include "cpu/transpose.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Rows of x'' that the third product takes at a time.
constexpr int64_t kRowChunk = 128;

// The memory of one kaczmarz_step and its three passes.
template <class T>
class Step {
 public:
  Step(const KaczmarzStep<T>& args, int threads)
      : args_(args),
        threads_(threads),
        blocks_(ceil_div(args.outputs, kMaxRows)),
        height_(ceil_div(args.outputs, blocks_)),
        panels_(panel_count<T>(args.inputs)),
        output_panels_(panel_count<T>(args.outputs)),
        packed_(args.moved == nullptr ? 0 : panels_ * args.outputs * kLanes<T>),
        transposed_(args.moved == nullptr ? 0 : output_panels_ * args.inputs * kLanes<T>),
        scales_(args.outputs),
        steps_(blocks_ * args.batch * kMaxRows),
        own_size_(whole_vectors<T>(kMaxRows * (args.inputs + args.outputs)) +
                  (1 + kRowChunk + args.outputs) * kMaxPanels * kLanes<T>),
        own_(threads * own_size_) {}

  // Of thread `part` of the planned ones; between the three comes a barrier.
  void pack(int part) const {
    if (args_.moved == nullptr) return;
    const int64_t N = args_.inputs, M = args_.outputs;
    for (int64_t p = part_begin(panels_, threads_, part); p < part_begin(panels_, threads_, part + 1); ++p)
      pack_panel(args_.weight, N, 1, M, N, p, packed_.get() + p * M * kLanes<T>);
    for (int64_t p = part; p < output_panels_; p += threads_)
      pack_transposed(args_.weight + panel_column<T>(M, p) * N, N, M < kLanes<T> ? M : kLanes<T>, N,
                      transposed_.get() + p * N * kLanes<T>);
    if (args_.move == KaczmarzMove::wnorm)
      for (int64_t m = part_begin(M, threads_, part); m < part_begin(M, threads_, part + 1); ++m) {
        const T norm = squares(args_.weight + m * N);
        scales_.get()[m] = norm == 0 ? T(0) : 1 / norm;
      }
  }

  void move_rows(int part) const {
    const int64_t begin = part_begin(args_.batch, threads_, part), end = part_begin(args_.batch, threads_, part + 1);
    const int64_t count = ceil_div(end - begin, kMaxRows);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = begin + part_begin(end - begin, count, i);
      move_block(row, static_cast<int>(begin + part_begin(end - begin, count, i + 1) - row), part);
    }
  }

  void change_weights(int part) const {
    const int64_t groups = ceil_div(panels_, max_panels(kMaxRows)), M = args_.outputs;
    for (int64_t g = part_begin(groups, threads_, part); g < part_begin(groups, threads_, part + 1); ++g)
      change_columns(part_begin(panels_, groups, g), part_begin(panels_, groups, g + 1), part);
    if (args_.bias_change == nullptr) return;
    for (int64_t m = part_begin(M, threads_, part); m < part_begin(M, threads_, part + 1); ++m) {
      const T* const steps = steps_of(m / height_, 0) + m % height_;
      T sum = 0;
      for (int64_t b = 0; b < args_.batch; ++b) sum += steps[b * kMaxRows];
      args_.bias_change[m] = sum;
    }
  }

 private:
  // c of the rows of the batch from `row` on, by blocks of outputs: [batch, kMaxRows] each.
  T* steps_of(int64_t block, int64_t row) const { return steps_.get() + (block * args_.batch + row) * kMaxRows; }

  // The rows that c is multiplied by, and whose norms count.
  const T* rows() const { return args_.moved == nullptr ? args_.input : args_.moved; }

  // Panels [panel, next) of dW.
  void change_columns(int64_t panel, int64_t next, int part) const {
    const int64_t N = args_.inputs, B = args_.batch;
    T *const chunk = own_.get() + part * own_size_, *const sums = chunk + kRowChunk * kMaxPanels * kLanes<T>;
    for (int64_t first = 0; first < B; first += kRowChunk) {
      const int64_t depth = B - first < kRowChunk ? B - first : kRowChunk;
      for (int64_t p = panel; p < next; ++p)
        pack_panel(rows() + first * N, N, 1, depth, N, p, chunk + (p - panel) * kRowChunk * kLanes<T>);
      for (int64_t block = 0; block < blocks_; ++block) {
        const int64_t m = block * height_, above = args_.outputs - m;
        const int high = static_cast<int>(above < height_ ? above : height_);
        const T* const steps = steps_of(block, first);
        const Piece<T> piece{depth, &steps};
        Vec<T> c[kMaxRows * kMaxPanels];
        find_product<T, false, kMaxRows>(high, static_cast<int>(next - panel))(&piece, 1, chunk, kRowChunk * kLanes<T>,
                                                                               {}, c);
        for (int r = 0; r < high; ++r)
          for (int64_t p = panel; p < next; ++p) {
            const int64_t column = panel_column<T>(N, p);
            T* const sum = sums + ((m + r) * kMaxPanels + (p - panel)) * kLanes<T>;
            Vec<T> value = c[r * kMaxPanels + (p - panel)];
            if (first > 0) value += load(sum);
            if (first + depth < B)
              store(sum, value);
            else
              store_part(args_.weight_change + (m + r) * N + column, value, N - column);
          }
      }
    }
  }

  // x'' of some rows, what is left of their displacement, and c.
  void move_block(int64_t row, int count, int part) const {
    T* const changes = own_.get() + part * own_size_;
    T* const scaled = changes + kMaxRows * args_.inputs;
    if (args_.moved != nullptr) move_inputs(row, count, changes, scaled);
    leave_steps(row, count, changes, scaled + kMaxRows * args_.outputs);
  }

  // x'' and, to `changes`, x'' - x.
  void move_inputs(int64_t row, int count, T* changes, T* scaled) const {
    const int64_t N = args_.inputs, M = args_.outputs;
    const T* displacement[kMaxRows];
    for (int r = 0; r < count; ++r) {
      displacement[r] = args_.displacement + (row + r) * M;
      if (args_.move != KaczmarzMove::wnorm) continue;
      for (int64_t m = 0; m < M; ++m) scaled[r * M + m] = displacement[r][m] * scales_.get()[m];
      displacement[r] = scaled + r * M;
    }
    const Piece<T> piece{M, displacement};
    const T share = T(1) / static_cast<T>(M);
    Vec<T> c[kMaxRows * kMaxPanels];
    each_group(count, panels_, [&](Product<T> product, int64_t panel, int64_t next) {
      product(&piece, 1, packed_.get() + panel * M * kLanes<T>, M * kLanes<T>, {}, c);
      for (int r = 0; r < count; ++r)
        for (int64_t p = panel; p < next; ++p) {
          const int64_t column = panel_column<T>(N, p), at = (row + r) * N + column;
          const Vec<T> x = load_part(args_.input + at, N - column);
          Vec<T> moved = x + c[r * kMaxPanels + (p - panel)] * share;
          if (args_.rectify) moved = relu<T>(moved);
          store_part(args_.moved + at, moved, N - column);
          store_part(changes + r * N + column, moved - x, N - column);
        }
    });
  }

  // c; `line`: room for a vector.
  void leave_steps(int64_t row, int count, const T* changes, T* line) const {
    const int64_t N = args_.inputs, M = args_.outputs;
    const T* change[kMaxRows];
    T sizes[kMaxRows];
    for (int r = 0; r < count; ++r) {
      change[r] = changes + r * N;
      const T norm = squares(rows() + (row + r) * N) + (args_.bias_change == nullptr ? T(0) : T(1)) + args_.damping;
      sizes[r] = norm == 0 ? T(0) : 1 / norm * (args_.relaxation / static_cast<T>(args_.batch));
    }
    const Piece<T> piece{args_.moved == nullptr ? 0 : N, change};
    Vec<T> c[kMaxRows * kMaxPanels];
    each_group(count, output_panels_, [&](Product<T> product, int64_t panel, int64_t next) {
      product(&piece, 1, transposed_.get() + panel * N * kLanes<T>, N * kLanes<T>, {}, c);
      for (int r = 0; r < count; ++r)
        for (int64_t p = panel; p < next; ++p) {
          const int64_t column = panel_column<T>(M, p), end = M - column < kLanes<T> ? M : column + kLanes<T>;
          const Vec<T> d = load_part(args_.displacement + (row + r) * M + column, M - column);
          store(line, (d - c[r * kMaxPanels + (p - panel)]) * sizes[r]);
          for (int64_t m = column; m < end; ++m) steps_of(m / height_, row + r)[m % height_] = line[m - column];
        }
    });
  }

  // Calls visit(product, first panel, last panel + 1) for as many panels at a time as the registers hold.
  template <class Visit>
  static void each_group(int rows, int64_t panels, const Visit& visit) {
    const int64_t groups = ceil_div(panels, max_panels(rows));
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t panel = part_begin(panels, groups, g), next = part_begin(panels, groups, g + 1);
      visit(find_product<T, false>(rows, static_cast<int>(next - panel)), panel, next);
    }
  }

  // The sum of the squares of a row of N numbers.
  T squares(const T* row) const {
    Vec<T> sum{};
    int64_t j = 0;
    for (; j + kLanes<T> <= args_.inputs; j += kLanes<T>) sum += load(row + j) * load(row + j);
    if (j < args_.inputs) {
      const Vec<T> rest = load_part(row + j, args_.inputs - j);
      sum += rest * rest;
    }
    return total<T>(sum);
  }

  const KaczmarzStep<T>& args_;
  const int threads_;
  // Rows of dW by blocks of `height_`, and panels of columns of N and M.
  const int64_t blocks_, height_, panels_, output_panels_;
  const Buffer<T> packed_, transposed_, scales_;
  const Buffer<T> steps_;  // [blocks, batch, kMaxRows] c
  const int64_t own_size_;
  const Buffer<T> own_;  // of each thread
};

template <class T>
void step(const KaczmarzStep<T>& args, int max_threads) {
  const double operations = 6.0 * static_cast<double>(args.batch * args.inputs) * static_cast<double>(args.outputs);
  double most = operations / 1e6 + 1;
  if (most > static_cast<double>(args.batch)) most = static_cast<double>(args.batch);
  const int threads = most < max_threads ? static_cast<int>(most) : max_threads;
  const Step<T> step(args, threads);
#pragma omp parallel num_threads(threads)
  {
    const FlushSubnormals flush;
    // Shares of the planned number of threads, should fewer have come.
    for (int part = thread_index(); part < threads; part += thread_count()) step.pack(part);
#pragma omp barrier
    for (int part = thread_index(); part < threads; part += thread_count()) step.move_rows(part);
#pragma omp barrier
    for (int part = thread_index(); part < threads; part += thread_count()) step.change_weights(part);
  }
}

}  // namespace

void kaczmarz_step(const KaczmarzStep<float>& args, int threads) { step(args, threads); }
void kaczmarz_step(const KaczmarzStep<double>& args, int threads) { step(args, threads); }
}  // namespace tpext::cpu::TPEXT_CAPABILITY
