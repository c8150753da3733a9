// The kernels of one instruction set as a table of functions, and the choice of the table when the module is loaded.
#pragma once

#include "core/act_inverse.h"
#include "core/counter_normal.h"
#include "core/kaczmarz.h"
#include "core/pooled_difference.h"
#include "core/regularized_inverse.h"
#include "core/rnn.h"

namespace tpext::cpu {

struct Kernels {
  const char* capability;
  void (*act_inverse_float)(const ActInverse<float>&, int threads);
  void (*act_inverse_double)(const ActInverse<double>&, int threads);
  void (*code_difference_float)(const CodeDifference<float>&, int threads);
  void (*code_difference_double)(const CodeDifference<double>&, int threads);
  void (*counter_normal_float)(const CounterNormal<float>&, int threads);
  void (*counter_normal_double)(const CounterNormal<double>&, int threads);
  void (*kaczmarz_step_float)(const KaczmarzStep<float>&, int threads);
  void (*kaczmarz_step_double)(const KaczmarzStep<double>&, int threads);
  void (*kaczmarz_train_float)(const KaczmarzTrain<float>&);
  void (*kaczmarz_train_double)(const KaczmarzTrain<double>&);
  void (*probe_difference_float)(const ProbeDifference<float>&, int threads);
  void (*probe_difference_double)(const ProbeDifference<double>&, int threads);
  void (*regularized_inverse_float)(const RegularizedInverse<float>&, int threads);
  void (*regularized_inverse_double)(const RegularizedInverse<double>&, int threads);
  void (*regularized_solve_float)(const RegularizedSolve<float>&, int threads);
  void (*regularized_solve_double)(const RegularizedSolve<double>&, int threads);
  void (*rnn_layer_backward_float)(const RnnLayerBackward<float>&, int threads);
  void (*rnn_layer_backward_double)(const RnnLayerBackward<double>&, int threads);
  void (*rnn_scan_float)(const RnnScan<float>&, int threads);
  void (*rnn_scan_double)(const RnnScan<double>&, int threads);
  void (*rnn_target_scan_float)(const RnnTargetScan<float>&, int threads);
  void (*rnn_target_scan_double)(const RnnTargetScan<double>&, int threads);
  void (*rnn_weight_gradients_float)(const RnnWeightGradients<float>&, int threads);
  void (*rnn_weight_gradients_double)(const RnnWeightGradients<double>&, int threads);

  void operator()(const ActInverse<float>& args, int threads) const { act_inverse_float(args, threads); }
  void operator()(const ActInverse<double>& args, int threads) const { act_inverse_double(args, threads); }
  void operator()(const CodeDifference<float>& args, int threads) const { code_difference_float(args, threads); }
  void operator()(const CodeDifference<double>& args, int threads) const { code_difference_double(args, threads); }
  void operator()(const CounterNormal<float>& args, int threads) const { counter_normal_float(args, threads); }
  void operator()(const CounterNormal<double>& args, int threads) const { counter_normal_double(args, threads); }
  void operator()(const KaczmarzStep<float>& args, int threads) const { kaczmarz_step_float(args, threads); }
  void operator()(const KaczmarzStep<double>& args, int threads) const { kaczmarz_step_double(args, threads); }
  void operator()(const KaczmarzTrain<float>& args) const { kaczmarz_train_float(args); }
  void operator()(const KaczmarzTrain<double>& args) const { kaczmarz_train_double(args); }
  void operator()(const ProbeDifference<float>& args, int threads) const { probe_difference_float(args, threads); }
  void operator()(const ProbeDifference<double>& args, int threads) const { probe_difference_double(args, threads); }
  void operator()(const RegularizedInverse<float>& args, int threads) const {
    regularized_inverse_float(args, threads);
  }
  void operator()(const RegularizedInverse<double>& args, int threads) const {
    regularized_inverse_double(args, threads);
  }
  void operator()(const RegularizedSolve<float>& args, int threads) const { regularized_solve_float(args, threads); }
  void operator()(const RegularizedSolve<double>& args, int threads) const { regularized_solve_double(args, threads); }
  void operator()(const RnnLayerBackward<float>& args, int threads) const { rnn_layer_backward_float(args, threads); }
  void operator()(const RnnLayerBackward<double>& args, int threads) const { rnn_layer_backward_double(args, threads); }
  void operator()(const RnnScan<float>& args, int threads) const { rnn_scan_float(args, threads); }
  void operator()(const RnnScan<double>& args, int threads) const { rnn_scan_double(args, threads); }
  void operator()(const RnnTargetScan<float>& args, int threads) const { rnn_target_scan_float(args, threads); }
  void operator()(const RnnTargetScan<double>& args, int threads) const { rnn_target_scan_double(args, threads); }
  void operator()(const RnnWeightGradients<float>& args, int threads) const {
    rnn_weight_gradients_float(args, threads);
  }
  void operator()(const RnnWeightGradients<double>& args, int threads) const {
    rnn_weight_gradients_double(args, threads);
  }
};

// The best compiled instruction set that this processor runs, or the one that the environment variable
// TPEXT_CPU_CAPABILITY names. Throws std::runtime_error where that one is unknown, not compiled or not supported here.
const Kernels& kernels();

// Names of the compiled instruction sets, least first, with a null at the end.
const char* const* compiled_capabilities();

}  // namespace tpext::cpu
