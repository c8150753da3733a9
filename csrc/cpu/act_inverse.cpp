// act_inverse:       x = argmin_x (a(x) - y)^2 + reg (x - c)^2, elementwise, a = tanh or sigmoid
// act_displacement:  u = x - c for y = a(c) + d, with the precision of u rather than of x
//
// The global minimiser, by the argument in tpext/ops/act_inverse.py: of y >= tanh c and its mirror image, the cost
// has at most one minimum on either side of a point, the fold, and each has a bracket in closed form. The zero of half
// the descent in a bracket is found by Halley's steps, or the bracket's middle where such a step leaves it or is not
// below half of the step before: at worst as slow as bisection. A lane that has converged keeps its number while those
// beside it go on, so that an element depends on nothing else. Vectors without an element left of its fold have one
// bracket.
//
// A displacement up to kMostSmall is found for itself. Let t = tanh c and s = 1 - t^2, t1 and s1 the same at c + u, and
// r = d - (t1 - t) what is left of d. Half the descent, D(u) = r s1 - reg u, is zero only between 0 and the preimage
// of t + d, where r, u and d have one sign, and -D' = reg + s1^2 + 2 t1 r s1 there. Outward, d t >= 0, the last term
// is not negative. Inward |t1| <= |t| and s1 >= s until t1 changes its sign, and then the same holds; before, with |d
// t| <= 3/4 sqrt(reg) or 3/8 s, the last term is 3/4 of the others at most. Then -D' >= (reg + s1^2) / 4, and D has
// one zero, the minimiser. With t1 - t = s sinh u / k and s1 = s / k^2, k = cosh(c + u) / cosh c = cosh u + t sinh u,
// it is the zero of k^3 D = s (d k - s sinh u) - reg u k^3, whose terms are all relative to u. Newton's steps on it
// start from Halley's at u = 0, which errs by some u^3: small displacements take one step more, greater ones a few. At
// the zero s1 r = reg u, so |D''| <= 6 (reg + s1^2), and a step of length e ends within |D'' / 2 D'| + 3 |t1| <= 15
// times e^2 of it: one with 32 e^2 <= eps |u| is the last. Lanes that are left over take the search, and if that ends
// within kMostSmall, steps from there: what they settle at close by has all its digits. Where they do not settle,
// minima merge, or (float32, g below 1e-6) t + d has lost too much of d.
//
// Threads take contiguous parts, whole vectors; the last vector is filled with zeros. No memory but the arrays.
#include "core/act_inverse.h"

#include "cpu/microkernel.h"
#include "cpu/threads.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Far more than the longest bracket has halvings; it ends the search of an infinite target or input.
constexpr int kMostSteps = 128;
// Fewer elements than this are not worth a second thread.
constexpr int64_t kGrain = 1024;
// Newton's steps that a lane may take, and up to which displacement; few need the fourth.
constexpr int kMostNewtonSteps = 4;
constexpr double kMostSmall = 0.375;
// Stands for zero under a logarithm.
template <class T>
constexpr T kLeast = sizeof(T) == 4 ? T(1e-30) : T(1e-300);

// Of (sinh u - u) / u^3 and (cosh u - 1) / u^2 in u^2, by Taylor: what is left out is below rounding up to kMostSmall.
template <class T>
struct Series;

template <>
struct Series<float> {
  static constexpr float sinh[] = {1 / 6.0f, 1 / 120.0f, 1 / 5040.0f};
  static constexpr float cosh[] = {1 / 2.0f, 1 / 24.0f, 1 / 720.0f};
};

template <>
struct Series<double> {
  static constexpr double sinh[] = {1 / 6.0, 1 / 120.0, 1 / 5040.0, 1 / 362880.0, 1 / 39916800.0, 1 / 6227020800.0};
  static constexpr double cosh[] = {1 / 2.0, 1 / 24.0, 1 / 720.0, 1 / 40320.0, 1 / 3628800.0, 1 / 479001600.0};
};

template <class T>
constexpr T kEps = sizeof(T) == 4 ? T(1.1920929e-7) : T(2.220446049250313e-16);

template <class T>
inline Vec<T> magnitude(Vec<T> v) {
  return (Vec<T>)((Bits<T>)v & ~(Bits<T>)(-Vec<T>{}));
}

template <class T>
inline Vec<T> lesser(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

template <class T>
inline Vec<T> greater(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// t = tanh x, s = 1 - t^2, the latter with all its digits where it is small: of e = e^(-2|x|) both are quotients.
template <class T>
inline void tanh_and_slope(Vec<T> x, Vec<T>& t, Vec<T>& s) {
  using C = Constants<T>;
  const Bits<T> sign = (Bits<T>)x & (Bits<T>)(-Vec<T>{});
  // 2^n must be a normal number.
  const Vec<T> y = lesser<T>(magnitude<T>(x) * T(2), Vec<T>{} + T(sizeof(T) == 4 ? 80 : 700));
  const Vec<T> shifted = C::round - y * T(1.4426950408889634);
  const Vec<T> n = shifted - C::round;
  const Vec<T> r = (-y - n * C::ln2_high) - n * C::ln2_low;
  const Vec<T> p = (r * r) * horner(r, C::expm1) + r;
  const Vec<T> scale = power_of_two<T>((Unsigned<T>)shifted);
  const Vec<T> e = p * scale + scale;
  const Vec<T> share = T(1) / (e + T(1));
  t = (Vec<T>)((Bits<T>)(-(p * scale + (scale - T(1))) * share) | sign);
  s = e * share * share * T(4);
}

// The zero, left of the fold or right of it, at which the descent falls.
template <class T, bool kLeft>
inline Vec<T> falling_zero(const ActInverse<T>& args, Vec<T> y, Vec<T> c, Vec<T> low, Vec<T> high, Vec<T> x,
                           Bits<T> done) {
  constexpr T eps = kEps<T>;
  Vec<T> before = (high - low) * T(2);
  for (int step = 0; step < kMostSteps; ++step) {
    Vec<T> t, s;
    tanh_and_slope<T>(x, t, s);
    const Vec<T> gap = y - t, pull = s * args.pull;
    const Vec<T> descent = pull * gap - (x - c) * args.spring;
    const Vec<T> slope = -pull * (t * gap * T(2) + s) - args.spring;
    const Vec<T> curvature = pull * (gap * (t * t * T(4) - s * T(2)) + t * s * T(6));
    const Bits<T> is_left = kLeft ? (descent > 0) & ~(slope > 0) : (descent > 0) | (slope > 0);
    low = is_left ? x : low;
    high = is_left ? high : x;
    const Vec<T> newton = descent / slope;
    const Vec<T> halley = newton / (newton * (curvature / slope) * T(0.5) - T(1));
    const Bits<T> usable = (slope < 0) & (x + halley >= low) & (x + halley <= high) &
                           (magnitude<T>(halley) <= magnitude<T>(before) * T(0.5));
    const Vec<T> move = usable ? halley : (low - x) * T(0.5) + (high - x) * T(0.5);
    const Vec<T> next = x + move;
    // Halley's step vanishes where the slope does, too; Newton's does not. A descent that is rounding ends the search.
    const Vec<T> terms = pull * (magnitude<T>(y) + magnitude<T>(t)) + (magnitude<T>(x) + magnitude<T>(c)) * args.spring;
    const Bits<T> found =
        ((slope < 0) & (magnitude<T>(newton) <= magnitude<T>(x) * (2 * eps))) | (magnitude<T>(descent) <= terms * eps);
    x = done | (found & ~usable) ? x : next;
    done |= found | (~usable & (magnitude<T>(move) <= magnitude<T>(next) * (2 * eps)));
    before = move;
    if (!any_nonzero<T>(~done)) break;
  }
  return x;
}

// Of (tanh x - y)^2 + g (x - c)^2; some number in the lanes that are not wanted.
template <class T>
inline Vec<T> minimizer(const ActInverse<T>& args, Vec<T> y, Vec<T> c, Bits<T> wanted) {
  const Vec<T> tanh_c = tanh<T>(c);
  const Bits<T> mirrored = ~(y >= tanh_c);
  y = mirrored ? -y : y;
  c = mirrored ? -c : c;
  const Vec<T> start = mirrored ? -tanh_c : tanh_c;

  // The fold, by Newton's steps that rise to the first root of a cubic in r = 1 + tanh.
  const Vec<T> above = greater<T>(y + T(1), Vec<T>{} + kLeast<T>);
  Vec<T> r{};
  for (int step = 0; step < 5; ++step) {
    const Vec<T> value = ((r * T(-12) + (above * T(6) + T(30))) * r - (above * T(12) + T(16))) * r + above * T(4);
    const Vec<T> slope = (r * T(-36) + (above * T(12) + T(60))) * r - (above * T(12) + T(16));
    r = r - value / slope;
  }
  const Vec<T> fold = greater<T>(c, half_log_ratio<T>(greater<T>(r, Vec<T>{} + kLeast<T>), T(2) - r, r * T(2) - T(2)));

  const Vec<T> one = Vec<T>{} + T(1);
  Vec<T> last = greater<T>(c + T(1), half_log_ratio<T>(above, one, y) + args.half_log);
  last = y < 1 ? lesser<T>(last, half_log_ratio<T>(above, T(1) - y, y + y)) : last;
  last = greater<T>(lesser<T>(last, c + (y - start) * args.reach), c);

  // From the input itself where it is an end: near it a small displacement of the target leaves the minimiser.
  const Bits<T> two = fold > c;
  const Vec<T> high = greater<T>(last, fold);
  const Vec<T> right = falling_zero<T, false>(args, y, c, fold, high, two ? (fold + high) * T(0.5) : fold, ~wanted);
  Vec<T> x = right;
  if (any_nonzero<T>(two & wanted)) {
    const Vec<T> end = lesser<T>(lesser<T>(c + T(0.875), fold), last);
    const Vec<T> left = falling_zero<T, true>(args, y, c, c, end, c, ~(two & wanted));
    Vec<T> left_t, right_t, unused;
    tanh_and_slope<T>(left, left_t, unused);
    tanh_and_slope<T>(right, right_t, unused);
    // By how much the left one costs more, as differences, which keep their digits.
    const Vec<T> gain = (right_t - left_t) * (y * T(2) - right_t - left_t) * args.pull -
                        (right - left) * (right + left - c * T(2)) * args.spring;
    x = ~(gain >= 0) & two ? left : right;
  }
  return mirrored ? -x : x;
}

template <class T>
inline Vec<T> inverse(const ActInverse<T>& args, Vec<T> target, Vec<T> input) {
  const Bits<T> numbers = (target == target) & (input == input);
  const Vec<T> y = target * args.scale - (args.scale - T(1)), c = input * (T(1) / args.scale);
  return numbers ? minimizer<T>(args, y, c, numbers) * args.scale : target + input;
}

// Newton's steps from u to a zero at which the descent falls; the lanes that came to one.
template <class T>
inline Bits<T> refine(const ActInverse<T>& args, Vec<T> d, Vec<T> t, Vec<T> s, Vec<T>& u, Bits<T> going) {
  const Vec<T> pull = s * args.pull;
  Bits<T> settled{};
  for (int step = 0; step < kMostNewtonSteps; ++step) {
    const Vec<T> square = u * u;
    const Vec<T> sinh = square * u * horner(square, Series<T>::sinh) + u;
    const Vec<T> cosh = square * horner(square, Series<T>::cosh) + T(1);
    const Vec<T> k = t * sinh + cosh, slope = t * cosh + sinh;
    const Vec<T> weight = k * k * args.spring;
    const Vec<T> value = pull * (d * k - s * sinh) - weight * k * u;
    const Vec<T> fall = pull * (s * cosh - d * slope) + weight * (slope * u * T(3) + k);
    const Vec<T> move = value / fall;
    u = going ? u + move : u;
    const Bits<T> last = going & (fall > 0) & (move * move * T(32) <= magnitude<T>(u) * kEps<T>);
    settled |= last;
    going &= ~last;
    if (!any_nonzero<T>(going)) break;
  }
  return settled & (magnitude<T>(u) <= T(kMostSmall));
}

template <class T>
inline Vec<T> displacement(const ActInverse<T>& args, Vec<T> target, Vec<T> input) {
  const Vec<T> d = target * args.scale, c = input * (T(1) / args.scale);
  Vec<T> t, s;
  tanh_and_slope<T>(c, t, s);
  const Vec<T> pull = s * args.pull, value = pull * d;
  const Vec<T> fall = pull * s + (args.spring - value * t), half_bend = value * T(0.5) - t * (args.spring * T(3));
  Vec<T> u = value * fall / (fall * fall - value * half_bend);
  const Bits<T> numbers = (d == d) & (c == c);
  const Bits<T> one_zero = d * t >= -greater<T>(s * T(0.375), Vec<T>{} + args.inward);
  const Bits<T> found = refine<T>(args, d, t, s, u, numbers & one_zero & (magnitude<T>(u) <= T(kMostSmall)));
  if (any_nonzero<T>(~found)) {
    const Bits<T> wanted = numbers & ~found;
    const Vec<T> far = minimizer<T>(args, t + d, c, wanted) - c;
    Vec<T> near = far;
    const Bits<T> refined = refine<T>(args, d, t, s, near, wanted & (magnitude<T>(far) <= T(kMostSmall)));
    const Vec<T> searched = refined & (magnitude<T>(near - far) <= T(1) / 64) ? near : far;
    // Rounding may move a search's result past the input.
    const Vec<T> zero{}, outside = d > 0 ? greater<T>(searched, zero) : lesser<T>(searched, zero);
    u = found ? u : wanted ? (d == 0 ? zero : outside) : target + input;
  }
  return u * args.scale;
}

template <class T>
void invert(const ActInverse<T>& args, int max_threads) {
  const int64_t vectors = ceil_div(args.count, kLanes<T>), most = args.count / kGrain + 1;
  const int threads = most < max_threads ? static_cast<int>(most) : max_threads;
#pragma omp parallel num_threads(threads)
  {
    const FlushSubnormals flush;
    const int64_t thread = thread_index(), team = thread_count();
    for (int64_t v = part_begin(vectors, team, thread); v < part_begin(vectors, team, thread + 1); ++v) {
      const int64_t at = v * kLanes<T>, count = args.count - at;
      const Vec<T> target = load_part(args.target + at, count), input = load_part(args.input + at, count);
      store_part(args.output + at,
                 args.displacement ? displacement<T>(args, target, input) : inverse<T>(args, target, input), count);
    }
  }
}

}  // namespace

void act_inverse(const ActInverse<float>& args, int threads) { invert(args, threads); }
void act_inverse(const ActInverse<double>& args, int threads) { invert(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
