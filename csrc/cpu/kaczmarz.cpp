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
// pass is one thread's: a sample has too little work to share, and needs the one before. Every sum has one order, that
// of vectors and then of lanes, so the same samples give the same bits in every call. Memory: a copy of the weights, a
// few rows a layer, and for the regularised inverse the largest Gram matrix.
#include "core/kaczmarz.h"

#include "cpu/microkernel.h"

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

}  // namespace

void kaczmarz_train(const KaczmarzTrain<float>& args) { train(args); }
void kaczmarz_train(const KaczmarzTrain<double>& args) { train(args); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
