// kaczmarz_train: one pass over samples, each of which updates the weights of all layers before the next is read
//
// Of a sample with target t of the last layer's z, from the last layer to the first, with d = t - z:
//     x' = x + move(d),  x'' = relu(x'),  c = relaxation (d - W (x'' - x)) / (||x''||^2 + 1 + damping)
//     W += c x''',  b += c,  t of the layer below = x'' where it is > 0, else min(z, 0)
// (no 1 and no b in a layer without bias; c = 0 where its denominator is 0), move(d) = W'd / M, or the same with rows
// of norm 1, or W'(WW' + reg I)^-1 d. The first layer's x is data: there x'' = x.
//
// The weights are copied to rows of whole vectors, filled up with zeros, and back at the end. The first layer is most
// of the work, and neither its target nor that of any other layer depends on its weights: its update waits until the
// next sample and is done in one sweep with that one's product, so each weight is read and written once a sample. The
// pass is one thread's, whatever the number: a sample has too little work to share, and needs the one before. Every sum
// has one order, that of vectors and then of lanes, so the same samples give the same bits in every call. Memory: a
// copy of the weights, a few rows a layer, and for the regularised inverse the largest Gram matrix.
//
// kaczmarz_step: the update of one layer for a batch, by the same equations, averaged: dW = 1/B sum_b c_b x''_b'
//
// Three products and what lies between them: x' = x + move(d) with W as it is, W (x'' - x) with W transposed, and
// c'x''. W is packed both ways (microkernel.h). Each thread takes blocks of rows through the first two, while a block's
// rows and their displacement stay in its cache, and after a barrier blocks of columns of the third, where it packs the
// rows of x'' by chunks. Every sum has one order, whatever the threads and the blocks: that of the microkernel, by
// chunks in the third product; norms that of vectors and then of lanes. Memory: W twice, c, and for each thread a block
// of rows of x'' - x and of d and a packed chunk.
#include "core/kaczmarz.h"

#include "cpu/microkernel.h"
#include "cpu/threads.h"
#include "cpu/transpose.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// A layer in memory of whole vectors, and its current values; what lies beyond the sizes is zero.
template <class T>
struct Layer {
  int64_t outputs, stride, height;  // stride: inputs, height: outputs, as whole vectors
  T *weight, *bias;                 // [outputs, stride], [height]
  T *input, *moved, *change;        // [stride] x, x'' and x'' - x; the first layer's `moved` is the sample before
  T *z, *target, *step;             // [height]; step: d, then c
};

template <class T>
inline T total(Vec<T> v) {
  T sum = v[0];
  for (int i = 1; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

template <class T>
inline T dot(const T* a, const T* b, int64_t count) {
  Vec<T> sum{};
  for (int64_t j = 0; j < count; j += kLanes<T>) sum += load(a + j) * load(b + j);
  return total<T>(sum);
}

// Of `Rows` rows: w_r += scale[r] * added, then product[r] = w_r . x; either alone, or both in one reading of w.
template <class T, int Rows, bool Add, bool Multiply>
inline void sweep_rows(T* weight, int64_t stride, const T* scale, const T* added, const T* x, T* product) {
  Vec<T> sum[Rows] = {}, factor[Rows];
  if constexpr (Add)
    for (int r = 0; r < Rows; ++r) factor[r] = Vec<T>{} + scale[r];
  for (int64_t j = 0; j < stride; j += kLanes<T>) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      T* const at = weight + r * stride + j;
      Vec<T> row = load(at);
      if constexpr (Add) {
        row += factor[r] * load(added + j);
        store(at, row);
      }
      if constexpr (Multiply) sum[r] += row * load(x + j);
    }
  }
  if constexpr (Multiply)
    for (int r = 0; r < Rows; ++r) product[r] = total<T>(sum[r]);
}

template <class T, bool Add, bool Multiply>
void sweep(const Layer<T>& layer, const T* scale, const T* added, const T* x, T* product) {
  constexpr int kRows = 4;
  int64_t k = 0;
  for (; k + kRows <= layer.outputs; k += kRows)
    sweep_rows<T, kRows, Add, Multiply>(layer.weight + k * layer.stride, layer.stride, scale + k, added, x,
                                        product + k);
  for (; k < layer.outputs; ++k)
    sweep_rows<T, 1, Add, Multiply>(layer.weight + k * layer.stride, layer.stride, scale + k, added, x, product + k);
}

// NaN stays NaN in all three: comparisons are written to let it pass.
template <class T>
inline Vec<T> relu(Vec<T> v) {
  return v < 0 ? Vec<T>{} : v;
}

template <class T>
inline Vec<T> at_most_zero(Vec<T> v) {
  return v > 0 ? Vec<T>{} : v;
}

template <class T>
inline Vec<T> relu_target(Vec<T> target, Vec<T> z) {
  return target <= 0 ? at_most_zero<T>(z) : target;
}

template <class T>
inline void add_bias(const Layer<T>& layer) {
  for (int64_t k = 0; k < layer.height; k += kLanes<T>) store(layer.z + k, load(layer.z + k) + load(layer.bias + k));
}

// The first greatest, or the first NaN.
template <class T>
inline int64_t greatest(const T* z, int64_t count) {
  int64_t best = 0;
  for (int64_t k = 0; k < count && z[best] == z[best]; ++k)
    if (z[k] > z[best] || z[k] != z[k]) best = k;
  return best;
}

template <class T>
inline void output_target(const Layer<T>& layer, KaczmarzOutput output, int64_t label, int64_t prediction) {
  for (int64_t k = 0; k < layer.height; k += kLanes<T>) {
    const Vec<T> z = load(layer.z + k);
    store(layer.target + k, output == KaczmarzOutput::clamp  ? at_most_zero<T>(z)
                            : output == KaczmarzOutput::swap ? z
                                                             : Vec<T>{});
  }
  T& wanted = layer.target[label];
  switch (output) {
    case KaczmarzOutput::clamp: wanted = layer.z[label] < 1 ? T(1) : layer.z[label]; break;
    case KaczmarzOutput::swap:
      wanted = layer.z[prediction];
      layer.target[prediction] = layer.z[label];
      break;
    case KaczmarzOutput::direct: wanted = 1; break;
  }
}

// solution = (WW' + reg I)^-1 d, by a Cholesky factor in `gram` [outputs, outputs].
template <class T>
void solve(const Layer<T>& layer, T reg, T* gram, T* solution) {
  const int64_t n = layer.outputs;
  for (int64_t i = 0; i < n; ++i) {
    T* const row = gram + i * n;
    for (int64_t j = 0; j <= i; ++j) {
      const T* const other = gram + j * n;
      T sum = dot(layer.weight + i * layer.stride, layer.weight + j * layer.stride, layer.stride) + (i == j ? reg : 0);
      for (int64_t k = 0; k < j; ++k) sum -= row[k] * other[k];
      row[j] = i == j ? __builtin_sqrt(sum) : sum / other[j];
    }
    T sum = layer.step[i];
    for (int64_t k = 0; k < i; ++k) sum -= row[k] * solution[k];
    solution[i] = sum / row[i];
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    T sum = solution[i];
    for (int64_t k = i + 1; k < n; ++k) sum -= gram[k * n + i] * solution[k];
    solution[i] = sum / gram[i * n + i];
  }
}

// Combines the rows of W into the input's displacement, layer.change = W'a.
template <class T>
void move_input(const Layer<T>& layer, const KaczmarzTrain<T>& args, T* gram, T* a) {
  const T share = T(1) / static_cast<T>(layer.outputs);
  if (args.move == KaczmarzMove::regularized) {
    solve(layer, args.reg, gram, a);
  } else {
    for (int64_t k = 0; k < layer.outputs; ++k) {
      a[k] = layer.step[k] * share;
      if (args.move == KaczmarzMove::wnorm) {
        const T* const row = layer.weight + k * layer.stride;
        const T norm = dot(row, row, layer.stride);
        a[k] = norm == 0 ? T(0) : a[k] / norm;
      }
    }
  }
  for (int64_t j = 0; j < layer.stride; j += kLanes<T>) {
    Vec<T> sum{};
    for (int64_t k = 0; k < layer.outputs; ++k) sum += load(layer.weight + k * layer.stride + j) * a[k];
    store(layer.change + j, sum);
  }
}

template <class T>
inline T step_size(const KaczmarzTrain<T>& args, int64_t layer, T norm) {
  const T divisor = norm + (args.layers[layer].bias != nullptr ? T(1) : T(0)) + args.damping;
  return divisor == 0 ? T(0) : args.relaxation / divisor;
}

// layer.step from d to c = size * (d - product), and the bias's update.
template <class T>
inline void finish_step(const Layer<T>& layer, const T* product, T size, bool biased) {
  for (int64_t k = 0; k < layer.height; k += kLanes<T>) {
    const Vec<T> c = (load(layer.step + k) - load(product + k)) * size;
    store(layer.step + k, c);
    if (biased) store(layer.bias + k, load(layer.bias + k) + c);
  }
}

// Of no numbers there may be no memory.
template <class T>
inline void copy(T* to, const T* from, int64_t count) {
  if (count > 0) std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
inline int64_t whole_vectors(int64_t count) {
  return ceil_div(count, kLanes<T>) * kLanes<T>;
}

template <class T>
void train(const KaczmarzTrain<T>& args) {
  const FlushSubnormals flush;
  const int64_t count = args.layer_count, last = count - 1;
  int64_t numbers = 0, widest = 0;
  for (int64_t l = 0; l < count; ++l) {
    const int64_t stride = whole_vectors<T>(args.layers[l].inputs), height = whole_vectors<T>(args.layers[l].outputs);
    numbers += args.layers[l].outputs * stride + 3 * stride + 4 * height;
    widest = args.layers[l].outputs > widest ? args.layers[l].outputs : widest;
  }
  const Buffer<T> memory(numbers + 2 * whole_vectors<T>(widest), true);
  const Buffer<T> gram(args.move == KaczmarzMove::regularized && count > 1 ? widest * widest : 0);
  const Buffer<Layer<T>> layers(count);
  T* free = memory.get();
  const auto take = [&](int64_t size) { return free += size, free - size; };
  for (int64_t l = 0; l < count; ++l) {
    const KaczmarzLayer<T>& from = args.layers[l];
    const int64_t stride = whole_vectors<T>(from.inputs), height = whole_vectors<T>(from.outputs);
    Layer<T>& to = layers.get()[l];
    to.outputs = from.outputs;
    to.stride = stride;
    to.height = height;
    to.weight = take(from.outputs * stride);
    to.input = take(stride);
    to.moved = take(stride);
    to.change = take(stride);
    to.bias = take(height);
    to.z = take(height);
    to.target = take(height);
    to.step = take(height);
    for (int64_t k = 0; k < from.outputs; ++k) copy(to.weight + k * stride, from.weight + k * from.inputs, from.inputs);
    if (from.bias != nullptr) copy(to.bias, from.bias, from.outputs);
  }
  T* const product = take(whole_vectors<T>(widest));
  T* const combination = take(whole_vectors<T>(widest));
  Layer<T>& first = layers.get()[0];
  const Layer<T>& top = layers.get()[last];
  const bool first_biased = args.layers[0].bias != nullptr;
  const int64_t inputs = args.layers[0].inputs;

  for (int64_t s = 0; s < args.samples; ++s) {
    T* const before = first.input;
    first.input = first.moved;
    first.moved = before;
    copy(first.input, args.input + s * inputs, inputs);
    if (s == 0)
      sweep<T, false, true>(first, first.step, before, first.input, first.z);
    else
      sweep<T, true, true>(first, first.step, before, first.input, first.z);
    add_bias(first);
    for (int64_t l = 1; l < count; ++l) {
      const Layer<T>& layer = layers.get()[l];
      const T* const below = layers.get()[l - 1].z;
      for (int64_t j = 0; j < layer.stride; j += kLanes<T>) store(layer.input + j, relu<T>(load(below + j)));
      sweep<T, false, true>(layer, layer.step, layer.moved, layer.input, layer.z);
      add_bias(layer);
    }
    const int64_t prediction = greatest(top.z, top.outputs);
    args.predictions[s] = prediction;
    output_target(top, args.output, args.labels[s], prediction);

    for (int64_t l = last; l >= 0; --l) {
      const Layer<T>& layer = layers.get()[l];
      for (int64_t k = 0; k < layer.height; k += kLanes<T>)
        store(layer.step + k, load(layer.target + k) - load(layer.z + k));
      if (l == 0) break;
      const Layer<T>& below = layers.get()[l - 1];
      move_input(layer, args, gram.get(), combination);
      for (int64_t j = 0; j < layer.stride; j += kLanes<T>) {
        const Vec<T> x = load(layer.input + j), moved = relu<T>(x + load(layer.change + j));
        store(layer.moved + j, moved);
        store(layer.change + j, moved - x);
        store(below.target + j, relu_target<T>(moved, load(below.z + j)));
      }
      sweep<T, false, true>(layer, layer.step, layer.moved, layer.change, product);
      finish_step(layer, product, step_size(args, l, dot(layer.moved, layer.moved, layer.stride)),
                  args.layers[l].bias != nullptr);
      sweep<T, true, false>(layer, layer.step, layer.moved, layer.input, product);
      // What lies beyond this layer's outputs must stay zero for the wider ones.
      std::memset(static_cast<void*>(product), 0, static_cast<size_t>(layer.height) * sizeof(T));
    }
    finish_step(first, product, step_size(args, 0, dot(first.input, first.input, first.stride)), first_biased);
  }
  if (args.samples > 0) sweep<T, true, false>(first, first.step, first.input, first.input, product);

  for (int64_t l = 0; l < count; ++l) {
    const KaczmarzLayer<T>& to = args.layers[l];
    const Layer<T>& from = layers.get()[l];
    for (int64_t k = 0; k < to.outputs; ++k) copy(to.weight + k * to.inputs, from.weight + k * from.stride, to.inputs);
    if (to.bias != nullptr) copy(to.bias, from.bias, to.outputs);
  }
}

// Panel p of W' [N, M], as pack_panel lays it out, from the rows of W.
template <class T>
void pack_transposed(const T* weight, int64_t inputs, int64_t outputs, int64_t panel, T* packed) {
  constexpr int L = kLanes<T>;
  const int64_t first = panel_column<T>(outputs, panel), columns = outputs < L ? outputs : L;
  for (int64_t k = 0; k < inputs; k += L) {
    const int64_t count = inputs - k < L ? inputs - k : L;
    Vec<T> square[L] = {};
    for (int64_t i = 0; i < columns; ++i) square[i] = load_part(weight + (first + i) * inputs + k, count);
    transpose<T>(square);
    for (int64_t i = 0; i < count; ++i) store(packed + (k + i) * L, square[i]);
  }
}

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
      pack_transposed(args_.weight, N, M, p, transposed_.get() + p * N * kLanes<T>);
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
    const int64_t N = args_.inputs, B = args_.batch, wide = max_panels(kMaxRows), groups = ceil_div(panels_, wide);
    const T* const rows = args_.moved == nullptr ? args_.input : args_.moved;
    T *const chunk = own_.get() + part * own_size_, *const sums = chunk + kRowChunk * kMaxPanels * kLanes<T>;
    for (int64_t g = part_begin(groups, threads_, part); g < part_begin(groups, threads_, part + 1); ++g) {
      const int64_t panel = part_begin(panels_, groups, g), next = part_begin(panels_, groups, g + 1);
      for (int64_t first = 0; first < B; first += kRowChunk) {
        const int64_t depth = B - first < kRowChunk ? B - first : kRowChunk;
        for (int64_t p = panel; p < next; ++p)
          pack_panel(rows + first * N, N, 1, depth, N, p, chunk + (p - panel) * kRowChunk * kLanes<T>);
        for (int64_t block = 0; block < blocks_; ++block) {
          const int64_t m = block * height_, above = args_.outputs - m;
          const int high = static_cast<int>(above < height_ ? above : height_);
          const T* const steps = steps_.get() + (block * B + first) * kMaxRows;
          const Piece<T> piece{depth, &steps};
          Vec<T> c[kMaxRows * kMaxPanels];
          find_product<T, false, kMaxRows>(high, static_cast<int>(next - panel))(&piece, 1, chunk,
                                                                                 kRowChunk * kLanes<T>, {}, c);
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
    if (args_.bias_change != nullptr)
      for (int64_t m = part_begin(args_.outputs, threads_, part); m < part_begin(args_.outputs, threads_, part + 1);
           ++m) {
        const T* const steps = steps_.get() + m / height_ * B * kMaxRows + m % height_;
        T sum = 0;
        for (int64_t b = 0; b < B; ++b) sum += steps[b * kMaxRows];
        args_.bias_change[m] = sum;
      }
  }

 private:
  // x'' of some rows, what is left of their displacement, and c.
  void move_block(int64_t row, int count, int part) const {
    const int64_t N = args_.inputs, M = args_.outputs;
    T *const changes = own_.get() + part * own_size_, *const scaled = changes + kMaxRows * N,
             *const line = scaled + kMaxRows * M;
    const T *displacement[kMaxRows], *change[kMaxRows];
    for (int r = 0; r < count; ++r) {
      displacement[r] = args_.displacement + (row + r) * M;
      change[r] = changes + r * N;
      if (args_.move != KaczmarzMove::wnorm || args_.moved == nullptr) continue;
      for (int64_t m = 0; m < M; ++m) scaled[r * M + m] = displacement[r][m] * scales_.get()[m];
      displacement[r] = scaled + r * M;
    }
    Vec<T> c[kMaxRows * kMaxPanels];
    if (args_.moved != nullptr) {
      const Piece<T> piece{M, displacement};
      const T share = T(1) / static_cast<T>(M);
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
    T sizes[kMaxRows];
    for (int r = 0; r < count; ++r) {
      const T norm = squares((args_.moved == nullptr ? args_.input : args_.moved) + (row + r) * N) +
                     (args_.bias_change == nullptr ? T(0) : T(1)) + args_.damping;
      sizes[r] = norm == 0 ? T(0) : 1 / norm * (args_.relaxation / static_cast<T>(args_.batch));
    }
    const Piece<T> piece{args_.moved == nullptr ? 0 : N, change};
    each_group(count, output_panels_, [&](Product<T> product, int64_t panel, int64_t next) {
      product(&piece, 1, transposed_.get() + panel * N * kLanes<T>, N * kLanes<T>, {}, c);
      for (int r = 0; r < count; ++r)
        for (int64_t p = panel; p < next; ++p) {
          const int64_t column = panel_column<T>(M, p), end = M - column < kLanes<T> ? M : column + kLanes<T>;
          const Vec<T> d = load_part(args_.displacement + (row + r) * M + column, M - column);
          store(line, (d - c[r * kMaxPanels + (p - panel)]) * sizes[r]);
          for (int64_t m = column; m < end; ++m)
            steps_.get()[(m / height_ * args_.batch + row + r) * kMaxRows + m % height_] = line[m - column];
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
void kaczmarz_train(const KaczmarzTrain<float>& args, int) { train(args); }
void kaczmarz_train(const KaczmarzTrain<double>& args, int) { train(args); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
