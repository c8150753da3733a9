// The mathematics of a step of the gated cells, for every backend.
//
// Math is the backend's: a number V, its element T, tanh(V) and sigmoid(V), and rounded_product(V, V), which no sum is
// fused with: one of two that are added, so that their sum has the same bits wherever it is compiled.
// core/activations.h says more of V.
#pragma once

#include "core/gated.h"

namespace tpext {

// How moves come of a displacement: of one member of the stack.
template <class T>
struct GateRule {
  CellInverse inverse;
  Slope gate, candidate;
  T margin, slope_reg;
};

// m, or e, by blocks of delta, and what is handed on to the state before.
template <class V, int Blocks>
struct Moves {
  V of_blocks[Blocks];
  V direct;
};

// Displacements, or credits, of the two states; of c in an LSTM only.
template <class V>
struct OfStates {
  V h, c;
};

template <class Math>
struct Slopes {
  using V = typename Math::V;
  using T = typename Math::T;

  TPEXT_HOST_DEVICE static V of_sigmoid(V s) { return s * (1 - s); }
  TPEXT_HOST_DEVICE static V of_tanh(V t) { return 1 - t * t; }

  // d times the slope of a gate, of the value s = sigmoid(u) or t = tanh(u).
  TPEXT_HOST_DEVICE static V times_gate(const GateRule<T>& rule, V d, V s) {
    if (rule.gate == Slope::one) return d;
    if (rule.gate == Slope::derivative) return d * of_sigmoid(s);
    return over(d, of_sigmoid(clamp(s, rule.margin, 1 - rule.margin)), rule.slope_reg);
  }
  TPEXT_HOST_DEVICE static V times_candidate(const GateRule<T>& rule, V d, V t) {
    if (rule.candidate == Slope::one) return d;
    if (rule.candidate == Slope::derivative) return d * of_tanh(t);
    return over(d, of_tanh(clamp(t, rule.margin - 1, 1 - rule.margin)), rule.slope_reg);
  }

 private:
  TPEXT_HOST_DEVICE static V over(V d, V slope, T reg) {
    return reg == 0 ? d / slope : d * slope / (slope * slope + reg);
  }
  TPEXT_HOST_DEVICE static V clamp(V v, T least, T most) {
    v = v > most ? V{} + most : v;
    return v < least ? V{} + least : v;
  }
};

// r = s(x_r + W_r h), z = s(x_z + W_z h), a = W_n h + b_hn, n = tanh(x_n + r a), h' = (1 - z) n + z h
template <class Math>
struct Gru {
  using V = typename Math::V;
  using T = typename Math::T;
  static constexpr int kGates = gate_count(Cell::gru), kKept = kept_count(Cell::gru), kBlocks = 4;
  static constexpr bool kHasCell = false;

  struct Kept {
    V values[kKept];  // r, z, n, a
    V state;          // h'
  };

  // Sums of the input and of the state before, by gates.
  TPEXT_HOST_DEVICE static Kept step(const V* input, const V* state, V before) {
    const V r = Math::sigmoid(input[0] + state[0]), z = Math::sigmoid(input[1] + state[1]), a = state[2];
    const V n = Math::tanh(r * a + input[2]);
    return {{r, z, n, a}, z * (before - n) + n};
  }

  // What comes by a product and by z alone, together.
  TPEXT_HOST_DEVICE static OfStates<V> join(V sum, V direct) { return {sum + direct, direct}; }

  // m of (a, r, z).
  TPEXT_HOST_DEVICE static Moves<V, kGates> moves(const GateRule<T>& rule, const OfStates<V>& d, const V* kept,
                                                  V before) {
    const V r = kept[0], z = kept[1], n = kept[2], a = kept[3], opened = 1 - z;
    if (rule.inverse == CellInverse::cell) {
      const V of_n = opened * Slopes<Math>::of_tanh(n);
      const V c_a = of_n * r, c_r = of_n * a * Slopes<Math>::of_sigmoid(r),
              c_z = (before - n) * Slopes<Math>::of_sigmoid(z);
      V squares = z * z + rule.slope_reg;
      squares = c_a * c_a + squares;
      squares = c_r * c_r + squares;
      squares = c_z * c_z + squares;
      const V q = d.h / squares;
      return {{c_a * q, c_r * q, c_z * q}, z * q};
    }
    const V moved = Slopes<Math>::times_candidate(rule, d.h * opened, n);
    return {{moved * r, Slopes<Math>::times_gate(rule, moved * a, r),
             Slopes<Math>::times_gate(rule, d.h * (before - n), z)},
            z * d.h};
  }

  // e of (a, r, z) for the state and (r, z, n) for the input.
  TPEXT_HOST_DEVICE static Moves<V, kBlocks> errors(const OfStates<V>& k, const V* kept, V before) {
    const V r = kept[0], z = kept[1], n = kept[2], a = kept[3];
    const V of_n = k.h * (1 - z) * Slopes<Math>::of_tanh(n);
    return {{of_n * r, of_n * a * Slopes<Math>::of_sigmoid(r), k.h * (before - n) * Slopes<Math>::of_sigmoid(z), of_n},
            z * k.h};
  }
};

// i, f, o = s(.), g = tanh(.), c' = f c + i g, h' = o tanh(c')
template <class Math>
struct Lstm {
  using V = typename Math::V;
  using T = typename Math::T;
  static constexpr int kGates = gate_count(Cell::lstm), kKept = kept_count(Cell::lstm), kBlocks = 4;
  static constexpr bool kHasCell = true;

  struct Kept {
    V values[kKept];  // i, f, g, o, c'
    V state;          // h'
  };

  TPEXT_HOST_DEVICE static Kept step(const V* sums, V before) {
    const V i = Math::sigmoid(sums[0]), f = Math::sigmoid(sums[1]), g = Math::tanh(sums[2]), o = Math::sigmoid(sums[3]);
    const V c = f * before + Math::rounded_product(i, g), h = o * Math::tanh(c);
    return {{i, f, g, o, c}, h};
  }

  // What comes by a product reaches h, what comes by f alone reaches c.
  TPEXT_HOST_DEVICE static OfStates<V> join(V sum, V direct) { return {sum, direct}; }

  TPEXT_HOST_DEVICE static Moves<V, kGates> moves(const GateRule<T>& rule, const OfStates<V>& d, const V* kept,
                                                  V before) {
    const V i = kept[0], f = kept[1], g = kept[2], o = kept[3], seen = Math::tanh(kept[4]);
    if (rule.inverse == CellInverse::cell) {
      // Of c' by i, f, g and c: C; of h': u C, and w by o. The normal equations are
      //     [u^2 CC + w^2 + reg,  u CC;  u CC,  CC + reg] [x; y] = [d_h; d_c]
      const V c_i = g * Slopes<Math>::of_sigmoid(i), c_f = before * Slopes<Math>::of_sigmoid(f),
              c_g = i * Slopes<Math>::of_tanh(g);
      const V u = o * Slopes<Math>::of_tanh(seen), w = seen * Slopes<Math>::of_sigmoid(o);
      V squares = f * f;
      squares = c_i * c_i + squares;
      squares = c_f * c_f + squares;
      squares = c_g * c_g + squares;
      const V of_o = w * w + rule.slope_reg, of_c = squares + rule.slope_reg, mixed = u * squares;
      const V determinant = of_o * of_c + Math::rounded_product(u * mixed, rule.slope_reg + V{});
      const V x = (of_c * d.h - Math::rounded_product(mixed, d.c)) / determinant;
      // u x + y, in which the large terms have gone
      const V moved = (u * rule.slope_reg * d.h + Math::rounded_product(of_o, d.c)) / determinant;
      return {{c_i * moved, c_f * moved, c_g * moved, w * x}, f * moved};
    }
    const V moved = Slopes<Math>::times_candidate(rule, d.h * o, seen) + d.c;
    return {{Slopes<Math>::times_gate(rule, moved * g, i), Slopes<Math>::times_gate(rule, moved * before, f),
             Slopes<Math>::times_candidate(rule, moved * i, g), Slopes<Math>::times_gate(rule, d.h * seen, o)},
            f * moved};
  }

  TPEXT_HOST_DEVICE static Moves<V, kBlocks> errors(const OfStates<V>& k, const V* kept, V before) {
    constexpr GateRule<T> chain = {CellInverse::branch, Slope::derivative, Slope::derivative, T(0), T(0)};
    return moves(chain, k, kept, before);
  }
};

}  // namespace tpext
