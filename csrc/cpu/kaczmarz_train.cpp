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
#include "cpu/kaczmarz.h"

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

// The layers in memory, and what a sample does to them.
template <class T>
class Network {
 public:
  explicit Network(const KaczmarzTrain<T>& args)
      : args_(args),
        count_(args.layer_count),
        widest_(widest(args)),
        memory_(numbers(args) + 2 * whole_vectors<T>(widest_), true),
        gram_(args.move == KaczmarzMove::regularized && count_ > 1 ? widest_ * widest_ : 0),
        layers_(count_) {
    T* free = memory_.get();
    const auto take = [&](int64_t size) { return free += size, free - size; };
    for (int64_t l = 0; l < count_; ++l) {
      const int64_t outputs = args.layers[l].outputs, stride = whole_vectors<T>(args.layers[l].inputs),
                    height = whole_vectors<T>(outputs);
      layer(l) = {.outputs = outputs,
                  .stride = stride,
                  .height = height,
                  .weight = take(outputs * stride),
                  .bias = take(height),
                  .input = take(stride),
                  .moved = take(stride),
                  .change = take(stride),
                  .z = take(height),
                  .target = take(height),
                  .step = take(height)};
      copy_rows(args.layers[l], layer(l), true);
    }
    product_ = take(whole_vectors<T>(widest_));
    combination_ = take(whole_vectors<T>(widest_));
  }

  // The z of all layers for a sample; the first layer's weights get the update of the sample before on the way. Returns
  // the class predicted.
  int64_t predict(int64_t sample) {
    Layer<T>& first = layer(0);
    T* const before = first.input;
    first.input = first.moved;
    first.moved = before;
    copy(first.input, args_.input + sample * args_.layers[0].inputs, args_.layers[0].inputs);
    if (sample == 0)
      sweep<T, false, true>(first, first.step, before, first.input, first.z);
    else
      sweep<T, true, true>(first, first.step, before, first.input, first.z);
    add_bias(first);
    for (int64_t l = 1; l < count_; ++l) {
      const Layer<T>& at = layer(l);
      const T* const below = layer(l - 1).z;
      for (int64_t j = 0; j < at.stride; j += kLanes<T>) store(at.input + j, relu<T>(load(below + j)));
      sweep<T, false, true>(at, at.step, at.moved, at.input, at.z);
      add_bias(at);
    }
    return greatest(layer(count_ - 1).z, layer(count_ - 1).outputs);
  }

  // The updates that follow from the sample's label, but that of the first layer's weights.
  void correct(int64_t label, int64_t prediction) {
    output_target(layer(count_ - 1), args_.output, label, prediction);
    for (int64_t l = count_ - 1; l > 0; --l) {
      displace(layer(l));
      correct_layer(l);
    }
    displace(layer(0));
    const T* const input = layer(0).input;
    finish_step(layer(0), product_, step_size(args_, 0, dot(input, input, layer(0).stride)), biased(0));
  }

  // After the last sample: its update of the first layer, and the weights to where they came from.
  void write_back() {
    const Layer<T>& first = layer(0);
    if (args_.samples > 0) sweep<T, true, false>(first, first.step, first.input, first.input, product_);
    for (int64_t l = 0; l < count_; ++l) copy_rows(args_.layers[l], layer(l), false);
  }

 private:
  static int64_t widest(const KaczmarzTrain<T>& args) {
    int64_t most = 0;
    for (int64_t l = 0; l < args.layer_count; ++l) most = args.layers[l].outputs > most ? args.layers[l].outputs : most;
    return most;
  }

  static int64_t numbers(const KaczmarzTrain<T>& args) {
    int64_t sum = 0;
    for (int64_t l = 0; l < args.layer_count; ++l) {
      const KaczmarzLayer<T>& at = args.layers[l];
      const int64_t stride = whole_vectors<T>(at.inputs);
      sum += at.outputs * stride + 3 * stride + 4 * whole_vectors<T>(at.outputs);
    }
    return sum;
  }

  // Between the caller's rows and those of whole vectors.
  static void copy_rows(const KaczmarzLayer<T>& outside, const Layer<T>& inside, bool inwards) {
    const auto move = [&](T* a, T* b, int64_t count) { inwards ? copy(b, a, count) : copy(a, b, count); };
    for (int64_t k = 0; k < outside.outputs; ++k)
      move(outside.weight + k * outside.inputs, inside.weight + k * inside.stride, outside.inputs);
    if (outside.bias != nullptr) move(outside.bias, inside.bias, outside.outputs);
  }

  static void displace(const Layer<T>& layer) {
    for (int64_t k = 0; k < layer.height; k += kLanes<T>)
      store(layer.step + k, load(layer.target + k) - load(layer.z + k));
  }

  // The input's target, which is that of the layer below, then the layer's own update.
  void correct_layer(int64_t l) {
    const Layer<T>&at = layer(l), &below = layer(l - 1);
    move_input(at, args_, gram_.get(), combination_);
    for (int64_t j = 0; j < at.stride; j += kLanes<T>) {
      const Vec<T> x = load(at.input + j), moved = relu<T>(x + load(at.change + j));
      store(at.moved + j, moved);
      store(at.change + j, moved - x);
      store(below.target + j, relu_target<T>(moved, load(below.z + j)));
    }
    sweep<T, false, true>(at, at.step, at.moved, at.change, product_);
    finish_step(at, product_, step_size(args_, l, dot(at.moved, at.moved, at.stride)), biased(l));
    sweep<T, true, false>(at, at.step, at.moved, at.input, product_);
    // What lies beyond this layer's outputs must stay zero for the wider ones.
    std::memset(static_cast<void*>(product_), 0, static_cast<size_t>(at.height) * sizeof(T));
  }

  Layer<T>& layer(int64_t l) const { return layers_.get()[l]; }
  bool biased(int64_t l) const { return args_.layers[l].bias != nullptr; }

  const KaczmarzTrain<T>& args_;
  const int64_t count_, widest_;
  const Buffer<T> memory_, gram_;
  const Buffer<Layer<T>> layers_;
  T *product_, *combination_;  // as long as the widest layer's outputs
};

template <class T>
void train(const KaczmarzTrain<T>& args) {
  const FlushSubnormals flush;
  Network<T> network(args);
  for (int64_t s = 0; s < args.samples; ++s) {
    args.predictions[s] = network.predict(s);
    network.correct(args.labels[s], args.predictions[s]);
  }
  network.write_back();
}

}  // namespace

void kaczmarz_train(const KaczmarzTrain<float>& args, int) { train(args); }
void kaczmarz_train(const KaczmarzTrain<double>& args, int) { train(args); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
