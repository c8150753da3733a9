// What the kernels of the Kaczmarz updates need to know: sizes, numbers and pointers.
#pragma once

#include <cstdint>

namespace tpext {

// How a layer's input moves for the displacement of its output: the rows' mean, the same with rows of norm 1, or the
// regularised inverse.
enum class KaczmarzMove { mean, wnorm, regularized };

// What the last layer's output is to be: raised and lowered to one and zero, its greatest value and that of the label
// exchanged, or the label's indicator itself.
enum class KaczmarzOutput { clamp, swap, direct };

template <class T>
struct KaczmarzLayer {
  int64_t inputs;
  int64_t outputs;
  T* weight;  // [outputs, inputs], in place
  T* bias;    // [outputs], in place; null: none
};

// A layer's update for a batch, and the target of its input.
template <class T>
struct KaczmarzStep {
  int64_t batch;  // this and the other sizes at least 1
  int64_t inputs;
  int64_t outputs;
  const T* displacement;  // [batch, outputs]
  const T* input;         // [batch, inputs]
  const T* weight;        // [outputs, inputs]
  KaczmarzMove move;      // mean or wnorm
  bool rectify;           // a feasible input has no negative number
  T relaxation;
  T damping;
  T* weight_change;  // [outputs, inputs]
  T* bias_change;    // [outputs]; null: the layer has no bias
  T* moved;          // [batch, inputs]; null: the input is data, and stays
};

// y_0 = x, y_l = relu(z_l), z_l = W_l y_(l-1) + b_l; the class predicted is that of the greatest z of the last layer.
template <class T>
struct KaczmarzTrain {
  int64_t samples;
  int64_t layer_count;             // at least 1
  const KaczmarzLayer<T>* layers;  // [layer_count], the outputs of one are the inputs of the next
  const T* input;                  // [samples, layers[0].inputs]
  const int64_t* labels;           // [samples], a place in the last layer's outputs
  T relaxation;
  T damping;
  T reg;  // of KaczmarzMove::regularized
  KaczmarzMove move;
  KaczmarzOutput output;
  int64_t* predictions;  // [samples], each before its sample's update
};

}  // namespace tpext
