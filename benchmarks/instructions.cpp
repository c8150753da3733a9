// Runs one kernel once, in float32, for instructions.py to count its instructions and test_sanitizers.py to look for
// races:
//     kernel_driver KERNEL [THREADS S T B H]   the instruction set is the one of TPEXT_CPU_CAPABILITY
//     kernel_driver compiler                   prints the compiler's name and version
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace {

// Not powers of two: partial vectors and a remainder of rows are part of the count.
int64_t S = 1, T = 24, B = 19, H = 100;
constexpr int64_t I = 6;
int threads = 1;
bool any_sizes = false;  // not those above

// Uniform in +-scale, the same numbers on every machine.
std::vector<float> numbers(int64_t count, float scale) {
  static uint32_t state = 1;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = scale * (static_cast<float>(state >> 8) / 8388608.0f - 1.0f);
  }
  return values;
}

// Numbers that the members of a stack have in common.
constexpr float kOne = 1, kHalf = 0.5f, kSmall = 1e-3f;
tpext::MemberNumber<float> of_all(const float& value) { return {&value, 1}; }

// What is counted is this function and all that it calls; the name stands in instructions.py.
template <class Args>
__attribute__((noinline)) void run_kernel(const Args& args) {
  tpext::cpu::kernels()(args, threads);
}

// Members of a stack run forward and back by turns.
std::vector<uint8_t> directions() {
  std::vector<uint8_t> reverse(static_cast<size_t>(S));
  for (size_t s = 0; s < reverse.size(); ++s) reverse[s] = s % 2;
  return reverse;
}

// Of tanh with reg = 0.1: a training step's small displacements of the output, or targets in and beyond the range.
void act_inverse(bool small, bool displacement, std::vector<float>& output) {
  const float reg = 0.1f;
  const std::vector<float> input = numbers(B * H, 2);
  std::vector<float> target = numbers(B * H, small ? 0.01f : 1.2f);
  if (small && !displacement)
    for (size_t i = 0; i < target.size(); ++i) target[i] += std::tanh(input[i]);
  output.resize(target.size());
  tpext::ActInverse<float> args{};
  args.count = B * H;
  args.scale = 1;
  args.pull = 1;
  args.spring = reg;
  args.reach = 1 / std::sqrt(reg);
  args.half_log = std::log(4 / reg) / 2;
  args.inward = 0.75f * std::sqrt(reg);
  args.target = target.data();
  args.input = input.data();
  args.output = output.data();
  args.displacement = displacement;
  run_kernel(args);
}

constexpr tpext::NoiseCounter kCounter{1, 2, 3, 4};

// Planes of 16 x 16 behind pools of 2 x 2, or of 9 x 9 behind overlapping pools: two changes, or two probes of noise.
// Differences are mostly zero; each plane's greatest is not.
void pooled_difference(bool probe, bool even, std::vector<float>& greatest) {
  constexpr int64_t C = 7, K = 2;
  const int64_t side = even ? 16 : 9, pooled = even ? 8 : 5, planes = B * C;
  const tpext::Pool pool{even ? 2 : 3, 2, even ? 0 : 1, side, side, pooled, pooled};
  const std::vector<float> preactivation = numbers(planes * side * side, 2);
  const std::vector<float> change = numbers(K * planes * side * side, 0.1f),
                           output = numbers(planes * pooled * pooled, 2);
  std::vector<int64_t> indices(output.size());
  for (size_t i = 0; i < indices.size(); ++i) {
    const int64_t window = static_cast<int64_t>(i) % (pooled * pooled);
    indices[i] = window / pooled * 2 * side + window % pooled * 2;
  }
  std::vector<float> difference(change.size());
  if (probe) {
    tpext::ProbeDifference<float> args{};
    args.draws = K;
    args.rows = B;
    args.channels = C;
    args.pool = pool;
    args.activation = tpext::Activation::elu;
    args.alpha = 1;
    args.sigma = 0.1f;
    args.counter = kCounter;
    args.stream_stride = 2;
    args.output = output.data();
    args.indices = indices.data();
    args.difference = difference.data();
    run_kernel(args);
  } else {
    tpext::CodeDifference<float> args{};
    args.draws = K;
    args.planes = planes;
    args.pool = pool;
    args.activation = tpext::Activation::elu;
    args.alpha = 1;
    args.noisy = true;
    args.preactivation = preactivation.data();
    args.change = change.data();
    args.output = output.data();
    args.indices = indices.data();
    args.difference = difference.data();
    run_kernel(args);
  }
  greatest.assign(static_cast<size_t>(K * planes), 0.0f);
  for (size_t i = 0; i < difference.size(); ++i) {
    float& so_far = greatest[i / static_cast<size_t>(side * side)];
    so_far = std::fmax(so_far, std::fabs(difference[i]));
  }
}

// A batch through a layer that is not the first, by the published mean.
void kaczmarz_step(std::vector<float>& weight_change) {
  constexpr int64_t M = 13;
  const std::vector<float> displacement = numbers(B * M, 1), input = numbers(B * H, 1), weight = numbers(M * H, 0.15f);
  std::vector<float> bias_change(M), moved(input.size());
  weight_change.resize(weight.size());
  tpext::KaczmarzStep<float> args{};
  args.batch = B;
  args.inputs = H;
  args.outputs = M;
  args.displacement = displacement.data();
  args.input = input.data();
  args.weight = weight.data();
  args.move = tpext::KaczmarzMove::mean;
  args.rectify = true;
  args.relaxation = 1;
  args.weight_change = weight_change.data();
  args.bias_change = bias_change.data();
  args.moved = moved.data();
  run_kernel(args);
}

// A layer of a cell with gates, forward, or back by a cell's inverse with credit through time.
void gated(tpext::Cell cell, bool backward, std::vector<float>& found) {
  const bool lstm = cell == tpext::Cell::lstm;
  const int64_t gates = tpext::gate_count(cell), kept_count = tpext::kept_count(cell);
  const std::vector<uint8_t> reverse = directions();
  const std::vector<float> input = numbers(T * B * I, 1), h0 = numbers(S * B * H, 1), c0 = numbers(S * B * H, 1),
                           weight_ih = numbers(S * gates * H * I, 0.3f), weight_hh = numbers(S * gates * H * H, 0.1f),
                           bias = numbers(S * gates * H, 0.3f), grad_states = numbers(S * T * B * H, 1);
  std::vector<float> states(static_cast<size_t>(S * T * B * H)), kept(static_cast<size_t>(kept_count) * states.size()),
      h_n(h0.size()), c_n(h0.size());
  tpext::GatedScan<float> forward{};
  forward.sizes.stack = S;
  forward.sizes.time = T;
  forward.sizes.batch = B;
  forward.sizes.hidden = H;
  forward.sizes.reverse = reverse.data();
  forward.cell = cell;
  forward.input = {input.data(), I, 0, B * I, I};
  forward.weight_ih = weight_ih.data();
  forward.weight_hh = weight_hh.data();
  forward.bias_ih = forward.bias_hh = bias.data();
  forward.h0 = h0.data();
  forward.c0 = lstm ? c0.data() : nullptr;
  forward.states = states.data();
  forward.h_n = h_n.data();
  forward.c_n = lstm ? c_n.data() : nullptr;
  forward.kept = kept.data();
  if (!backward) {
    run_kernel(forward);
    found = kept;
    return;
  }
  tpext::cpu::kernels()(forward, threads);
  std::vector<float> grad_input(static_cast<size_t>(S) * input.size()), grad_weight_ih(weight_ih.size()),
      grad_bias_ih(bias.size()), grad_bias_hh(bias.size()), disp_h(h0.size()), disp_c(h0.size()), credit_h(h0.size()),
      credit_c(h0.size());
  found.resize(weight_hh.size());
  tpext::GatedLayerBackward<float> args{};
  args.sizes = forward.sizes;
  args.cell = cell;
  args.inverse = tpext::CellInverse::cell;
  args.through_time = true;
  args.gate_slope = args.candidate_slope = tpext::Slope::derivative;
  args.target_step = args.slope_reg = of_all(kOne);
  args.margin = of_all(kSmall);
  args.grad_states = grad_states.data();
  args.states = states.data();
  args.kept = kept.data();
  args.h0 = forward.h0;
  args.c0 = forward.c0;
  args.weight_hh = args.feedback = weight_hh.data();
  args.initial = {disp_h.data(), lstm ? disp_c.data() : nullptr, credit_h.data(), lstm ? credit_c.data() : nullptr};
  tpext::RnnWeightGradients<float>& sums = args.gradients.parameters;
  sums.sizes = args.sizes;
  sums.scale = args.gradients.input_scale = of_all(kOne);
  sums.states = states.data();
  sums.h0 = forward.h0;
  sums.input = forward.input;
  sums.grad_weight_ih = grad_weight_ih.data();
  sums.grad_weight_hh = found.data();
  sums.grad_bias = grad_bias_ih.data();
  sums.grad_bias_hh = grad_bias_hh.data();
  sums.blocks = tpext::delta_blocks(cell);
  args.gradients.input_feedback = weight_ih.data();
  args.gradients.grad_input = grad_input.data();
  run_kernel(args);
  for (const std::vector<float>* more : {&grad_input, &grad_weight_ih, &grad_bias_ih, &grad_bias_hh})
    found.insert(found.end(), more->begin(), more->end());
}

// Some samples through two layers; by how much they change the weights of the first is left in `change`.
void kaczmarz_train(std::vector<float>& change) {
  constexpr int64_t K = 24, N = 100, M = 13, classes = 7;
  const std::vector<float> input = numbers(K * N, 1);
  std::vector<float> first = numbers(M * N, 0.15f), first_bias = numbers(M, 0.15f);
  std::vector<float> second = numbers(classes * M, 0.15f), second_bias = numbers(classes, 0.15f);
  std::vector<int64_t> labels(K), predictions(K);
  for (size_t i = 0; i < labels.size(); ++i) labels[i] = static_cast<int64_t>(i) % classes;
  change = first;
  const tpext::KaczmarzLayer<float> layers[] = {{N, M, first.data(), first_bias.data()},
                                                {M, classes, second.data(), second_bias.data()}};
  tpext::KaczmarzTrain<float> args{};
  args.samples = K;
  args.layer_count = 2;
  args.layers = layers;
  args.input = input.data();
  args.labels = labels.data();
  args.relaxation = 1;
  args.move = tpext::KaczmarzMove::mean;
  args.output = tpext::KaczmarzOutput::clamp;
  args.predictions = predictions.data();
  run_kernel(args);
  for (size_t i = 0; i < first.size(); ++i) change[i] -= first[i];
}

int run(const std::string& kernel) {
  const std::vector<uint8_t> reverse = directions();
  const auto states_like = [](float scale) { return numbers(S * T * B * H, scale); };
  const std::vector<float> weight = numbers(S * H * H, 0.15f), inverse = numbers(S * H * H, 0.15f),
                           h0 = numbers(S * B * H, 1);
  const std::vector<float> x_proj = states_like(1), states = states_like(0.9f), grad_states = states_like(1);
  std::vector<float> large(static_cast<size_t>(S * T * B * H)), small(static_cast<size_t>(S * B * H));

  const auto set_sizes = [&](tpext::RnnSizes& sizes) {
    sizes.stack = S;
    sizes.time = T;
    sizes.batch = B;
    sizes.hidden = H;
    sizes.reverse = reverse.data();
  };
  const auto set_common = [&](auto& args) {
    set_sizes(args.sizes);
    args.nonlinearity = tpext::Nonlinearity::tanh;
    args.weight_hh = weight.data();
  };
  const std::vector<float> input = numbers(T * B * I, 1), weight_ih = numbers(S * H * I, 0.15f);
  if (kernel == "act_inverse small" || kernel == "act_inverse any" || kernel == "act_displacement") {
    act_inverse(kernel != "act_inverse any", kernel == "act_displacement", large);
  } else if (kernel == "code_difference" || kernel == "code_difference any pool" || kernel == "probe_difference") {
    pooled_difference(kernel == "probe_difference", kernel != "code_difference any pool", large);
  } else if (kernel == "counter_normal") {
    large.resize(static_cast<size_t>(B * H * H));
    run_kernel(tpext::CounterNormal<float>{B, H * H, kCounter, 1, large.data()});
  } else if (kernel.rfind("gru_", 0) == 0 || kernel.rfind("lstm_", 0) == 0) {
    const bool lstm = kernel[0] == 'l', backward = kernel.find("backward") != std::string::npos;
    gated(lstm ? tpext::Cell::lstm : tpext::Cell::gru, backward, large);
  } else if (kernel == "kaczmarz_step") {
    kaczmarz_step(large);
  } else if (kernel == "kaczmarz_train") {
    kaczmarz_train(large);
  } else if (kernel == "regularized_inverse") {
    int64_t status = 0;
    large.resize(static_cast<size_t>(H * H));
    tpext::RegularizedInverse<float> args{};
    args.batch = 1;
    args.rows = args.columns = H;
    args.reg = of_all(kOne);
    args.weight = weight.data();
    args.inverse = large.data();
    args.status = &status;
    run_kernel(args);
  } else if (kernel == "regularized_inverse batch" || kernel == "regularized_solve") {
    // Small matrices, B of them: one a lane.
    constexpr int64_t M = 15, N = 13, K = 3;
    const std::vector<float> matrices = numbers(B * M * N, 0.15f), rhs = numbers(B * K * M, 1);
    std::vector<int64_t> status(static_cast<size_t>(B));
    if (kernel == "regularized_solve") {
      large.resize(static_cast<size_t>(B * K * N));
      tpext::RegularizedSolve<float> args{};
      args.batch = B;
      args.rows = M;
      args.columns = N;
      args.count = K;
      args.reg = 1;
      args.weight = matrices.data();
      args.rhs = rhs.data();
      args.solution = large.data();
      args.status = status.data();
      run_kernel(args);
    } else {
      large.resize(static_cast<size_t>(B * M * N));
      tpext::RegularizedInverse<float> args{};
      args.batch = B;
      args.rows = M;
      args.columns = N;
      args.reg = of_all(kOne);
      args.weight = matrices.data();
      args.inverse = large.data();
      args.status = status.data();
      run_kernel(args);
    }
  } else if (kernel == "rnn_scan" || kernel == "rnn_layer") {
    tpext::RnnScan<float> args{};
    set_common(args);
    if (kernel == "rnn_scan") args.x_proj = x_proj.data();
    args.input = {input.data(), I, 0, B * I, I};
    args.weight_ih = weight_ih.data();
    args.bias = weight.data();
    args.h0 = h0.data();
    args.states = large.data();
    run_kernel(args);
  } else if (kernel == "rnn_scan_backward") {
    // A target pass with P = W and a' for the slope.
    tpext::RnnTargetScan<float> args{};
    set_common(args);
    args.correction = tpext::Correction::linearized;
    args.slope = tpext::Slope::derivative;
    args.target_step = of_all(kOne);
    args.margin = of_all(kHalf);
    args.grad_states = grad_states.data();
    args.states = states.data();
    args.inverse = weight.data();
    args.is_feedback = true;
    args.delta = large.data();
    args.disp_h0 = small.data();
    run_kernel(args);
  } else if (kernel.rfind("rnn_layer_backward ", 0) == 0) {
    const bool through_time = kernel == "rnn_layer_backward through_time";
    large.resize(weight.size());
    std::vector<float> grad_input(static_cast<size_t>(S) * input.size()), grad_weight_ih(weight_ih.size()),
        grad_bias(static_cast<size_t>(S * H)), credit_h0(small.size());
    tpext::RnnLayerBackward<float> args{};
    set_common(args.pass);
    args.pass.correction = tpext::Correction::linearized;
    args.pass.slope = through_time ? tpext::Slope::inverse : tpext::Slope::derivative;
    args.pass.through_time = through_time;
    args.pass.target_step = of_all(kOne);
    args.pass.margin = of_all(kSmall);
    args.pass.grad_states = grad_states.data();
    args.pass.states = states.data();
    args.pass.h0 = h0.data();
    args.pass.inverse = through_time ? inverse.data() : weight.data();
    args.pass.is_feedback = true;
    args.pass.disp_h0 = small.data();
    args.pass.credit_h0 = through_time ? credit_h0.data() : nullptr;
    set_sizes(args.gradients.parameters.sizes);
    args.gradients.parameters.scale = of_all(kOne);
    args.gradients.parameters.states = states.data();
    args.gradients.parameters.h0 = h0.data();
    args.gradients.parameters.input = {input.data(), I, 0, B * I, I};
    args.gradients.parameters.grad_weight_ih = grad_weight_ih.data();
    args.gradients.parameters.grad_weight_hh = large.data();
    args.gradients.parameters.grad_bias = grad_bias.data();
    args.gradients.input_feedback = weight_ih.data();
    args.gradients.input_scale = of_all(kOne);
    args.gradients.grad_input = grad_input.data();
    run_kernel(args);
    for (const std::vector<float>* more : {&grad_input, &grad_weight_ih, &grad_bias})
      large.insert(large.end(), more->begin(), more->end());
  } else if (kernel == "rnn_weight_gradients") {
    large.resize(weight.size());
    small.resize(weight_ih.size());
    std::vector<float> grad_bias(static_cast<size_t>(S * H));
    tpext::RnnWeightGradients<float> args{};
    set_sizes(args.sizes);
    args.scale = of_all(kOne);
    args.delta = grad_states.data();
    args.states = states.data();
    args.h0 = h0.data();
    args.input = {input.data(), I, 0, B * I, I};
    args.grad_weight_ih = small.data();
    args.grad_weight_hh = large.data();
    args.grad_bias = grad_bias.data();
    run_kernel(args);
  } else if (kernel.rfind("rnn_target_scan ", 0) == 0) {
    tpext::RnnTargetScan<float> args{};
    set_common(args);
    args.correction = kernel == "rnn_target_scan difference" ? tpext::Correction::difference
                      : kernel == "rnn_target_scan learned"  ? tpext::Correction::learned
                                                             : tpext::Correction::linearized;
    args.reverse_pre = x_proj.data();
    args.through_time = kernel == "rnn_target_scan through_time";
    args.target_step = of_all(kOne);
    args.margin = of_all(kSmall);
    args.grad_states = grad_states.data();
    args.states = states.data();
    args.h0 = h0.data();
    args.inverse = inverse.data();
    args.delta = large.data();
    args.disp_h0 = small.data();
    run_kernel(args);
  } else {
    std::fprintf(stderr, "kernel_driver: no kernel %s\n", kernel.c_str());
    return 2;
  }
  // A kernel that did nothing, or not all, would look fast. Of other sizes zeros, and numbers without end, may be
  // right.
  for (const float value : large)
    if (!any_sizes && (value == 0 || value != value)) {
      std::fprintf(stderr, "kernel_driver: %s left a zero or a NaN\n", kernel.c_str());
      return 1;
    }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2 && count != 7) {
    std::fputs("usage: kernel_driver KERNEL [THREADS S T B H] | compiler\n", stderr);
    return 2;
  }
  if (count == 7) {
    any_sizes = true;
    threads = std::atoi(arguments[2]);
    for (int i = 0; i < 4; ++i) *std::array{&S, &T, &B, &H}[static_cast<size_t>(i)] = std::atoll(arguments[3 + i]);
  }
  if (std::strcmp(arguments[1], "compiler") == 0) {
    std::puts(TPEXT_COMPILER);
    return 0;
  }
  try {
    return run(arguments[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernel_driver: %s\n", error.what());
    return 3;
  }
}
