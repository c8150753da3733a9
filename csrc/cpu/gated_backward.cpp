// gated_layer_backward: the target pass of a GRU or an LSTM from the last step to the first, and all gradients.
//     d_{t-1} = -target_step g_{t-1} + direct(d_t) + m_t P        m_t the moves that d_t asks of the gates
//     k_{t-1} = -d_{t-1} [+ direct(k_t) + e_t W]  through time    e_t the errors that the credit k_t gives them
// with m, e and what is handed on unit by unit in core/gates.h. Back-propagation is P = W, target_step 1, all slopes
// derivatives, credit local: d is minus its gradient.
//
// Layouts stand in core/gated.h, the split of the work in sweep.h, backward_sweep.h and layer_gradients.h. A step is
// one product of depth G H of the tile's rows (local credit) or two (through time), with all elementwise work in the
// epilogue: what the forward pass kept is read once. Where slopes are derivatives and credit is local, m = -e of the
// state's blocks, and e alone is carried.
#include "core/gates.h"
#include "cpu/activations.h"
#include "cpu/layer_gradients.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Of a rule by the chain rule, with P of choice; or of any. By the chain rule the moves m of a displacement d are minus
// the errors e of the credit k = -d, so that errors alone are computed and carried, and what is carried changes its
// sign.
template <class T, class Cell, bool Chain>
struct GatedStep {
  static constexpr bool zero_stays_zero = true, kDirect = true, kHandsDown = false;
  static constexpr int kDelta = Cell::kBlocks, kCarried = Chain ? 0 : Cell::kGates;
  using Made = Stepped<T, kDelta, kCarried>;

  const GatedLayerBackward<T>& args;
  T target_step = 0;  // of one member, as the rule
  GateRule<T> rule = {};

  GatedStep of(int64_t member) const {
    return {args, args.target_step.of(member),
            GateRule<T>{args.inverse, args.gate_slope, args.candidate_slope, args.margin.of(member),
                        args.slope_reg.of(member)}};
  }

  template <bool Last>
  Made at(const RowStep& at, int64_t column, int64_t count, const Incoming<T>& incoming) const {
    const int64_t H = args.sizes.hidden;
    Vec<T> kept[Cell::kKept];
    for (int i = 0; i < Cell::kKept; ++i)
      kept[i] = load_part(args.kept + at.current * Cell::kKept + i * H + column, count);
    // before the first step there is no place in kept or states to point at
    const T* const start = Cell::kHasCell ? args.c0 : args.h0;
    const T* const before = at.first         ? start + at.initial
                            : Cell::kHasCell ? args.kept + at.before * Cell::kKept + (Cell::kKept - 1) * H
                                             : args.states + at.before;
    const Vec<T> state = load_part(before + column, count);
    OfStates<Vec<T>> d = Cell::join(Chain && !Last ? -incoming.displaced : incoming.displaced, incoming.direct);
    if (args.grad_states != nullptr) d.h -= load_part(args.grad_states + at.current + column, count) * target_step;
    OfStates<Vec<T>> k = Cell::join(incoming.credit, incoming.direct_credit);
    k = {k.h - d.h, k.c - d.c};
    const auto errors = Cell::errors(k, kept, state);
    Made made = {};
    for (int i = 0; i < kDelta; ++i) made.delta[i] = errors.of_blocks[i];
    if constexpr (Chain) {
      made.direct = -errors.direct;
    } else {
      const auto moves = Cell::moves(rule, d, kept, state);
      for (int i = 0; i < kCarried; ++i) made.carried[i] = moves.of_blocks[i];
      made.direct = moves.direct;
      made.direct_credit = errors.direct;
    }
    return made;
  }

  Incoming<T> initial(const RowStep&, int64_t, int64_t, const Incoming<T>& incoming) const {
    const auto d = Cell::join(Chain ? -incoming.displaced : incoming.displaced, incoming.direct);
    const auto k = Cell::join(incoming.credit, incoming.direct_credit);
    return {d.h, k.h, d.c, k.c};
  }
};

template <class T>
IncomingArrays<T> incoming_of(const GatedStates<T>& states, bool through_time) {
  return {states.disp_h, through_time ? states.credit_h : nullptr, states.disp_c,
          through_time ? states.credit_c : nullptr};
}

template <class T, class Cell, bool Chain>
void backward(const GatedLayerBackward<T>& args, int threads) {
  using Step = GatedStep<T, Cell, Chain>;
  const BackwardArrays<T> arrays = {.states = args.states,
                                    .kept = args.kept,
                                    .kept_width = Cell::kKept * args.sizes.hidden,
                                    .grad_states = args.grad_states,
                                    .beyond = incoming_of(args.beyond, args.through_time),
                                    .initial = incoming_of(args.initial, args.through_time),
                                    .norms = nullptr};
  Backward<T> call(args.sizes, args.feedback, args.through_time ? args.weight_hh : nullptr, delta_blocks(args.cell),
                   Step::kCarried, arrays);
  layer_backward(args.gradients, call, threads, [&](const auto& run) { run(Step{args}); });
}

template <class T, class Cell>
void backward(const GatedLayerBackward<T>& args, int threads) {
  const bool chain = args.inverse == CellInverse::branch && !args.through_time &&
                     args.gate_slope == Slope::derivative && args.candidate_slope == Slope::derivative;
  return chain ? backward<T, Cell, true>(args, threads) : backward<T, Cell, false>(args, threads);
}

template <class T>
void backward(const GatedLayerBackward<T>& args, int threads) {
  switch (args.cell) {
    case Cell::gru: return backward<T, Gru<VectorMath<T>>>(args, threads);
    case Cell::lstm: return backward<T, Lstm<VectorMath<T>>>(args, threads);
  }
}

}  // namespace

void gated_layer_backward(const GatedLayerBackward<float>& args, int threads) { backward(args, threads); }
void gated_layer_backward(const GatedLayerBackward<double>& args, int threads) { backward(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
