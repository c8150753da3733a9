// Counter-based normal noise in vectors (core/counter_normal.h): a lane holds one group of four numbers.
//
// Words of Philox stand one in each 64-bit lane, whose upper half is ignored: a product then costs one multiplication
// and one shift. For float two such vectors, of the even groups and of the odd ones, join into one of 32-bit lanes in
// the groups' order. Words become numbers by exact integer steps: the quadrant of the angle comes of its upper bits,
// and log u of the distance of u from 1 where u is near 1, so that float and double differ by float's rounding alone.
#pragma once

#include "core/counter_normal.h"
#include "cpu/transpose.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

typedef uint64_t Words __attribute__((vector_size(TPEXT_VECTOR_BYTES)));

constexpr uint64_t kLowHalf = 0xffffffff;

// Lower half by lower half. GCC multiplies 64-bit lanes in full where it is not told; Clang sees it by itself.
inline Words multiply_low(Words a, Words b) {
#if defined(__AVX512F__) && !defined(__clang__)
  typedef long long Products __attribute__((vector_size(TPEXT_VECTOR_BYTES)));
  return (Words)__builtin_ia32_pmuludq512_mask((Bits<float>)a, (Bits<float>)b, Products{}, 0xff);
#elif defined(__AVX2__) && !defined(__clang__)
  return (Words)__builtin_ia32_pmuludq256((Bits<float>)a, (Bits<float>)b);
#elif defined(__SSE2__) && !defined(__clang__)
  return (Words)__builtin_ia32_pmuludq128((Bits<float>)a, (Bits<float>)b);
#else
  return (a & kLowHalf) * (b & kLowHalf);
#endif
}

// The keys of the rounds.
struct PhiloxKeys {
  uint64_t keys[philox::kRounds][2];

  explicit PhiloxKeys(uint64_t seed) {
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (auto& key : keys) {
      key[0] = low, key[1] = high;
      low += philox::kWeyl0, high += philox::kWeyl1;
    }
  }
};

// Polynomials are minimax fits: `sine` of sin(pi/2 t) / t and `cosine` of (cos(pi/2 t) - 1) / t^2 in t^2 on |t| <= 1/2,
// relative error of sine and cosine below 3.3e-9 and 3.9e-8 (float), 1.9e-21 and 4e-20 (double); `log` of -2 (log(1 +
// f)
// - f + f^2 / 2) / f^3 on sqrt(1/2) <= 1 + f <= sqrt(2), relative error of the logarithm below 3.3e-8.
template <class T>
struct BoxMuller;

template <>
struct BoxMuller<float> {
  static constexpr float sine[] = {1.5707963217083446823f, -0.64596346023342800708f, 0.079680032770421878155f,
                                   -0.0046016578911808581716f};
  static constexpr float cosine[] = {-1.233697737428465065f, 0.25360355767857714088f, -0.020418191908190335064f};
  static constexpr float log[] = {-0.66667773739624593494f, 0.5000265309415919783f,   -0.39927690200612883424f,
                                  0.33156319980398007558f,  -0.29816004594316926568f, 0.28523185145131648564f,
                                  -0.174223361662582038f};

  static Bits<float> negative(Bits<float> word) { return word >> 31; }
  static Vec<float> from_unsigned31(Bits<float> value) { return __builtin_convertvector(value, Vec<float>); }
  static Vec<float> from_signed(Bits<float> value) { return __builtin_convertvector(value, Vec<float>); }
  // Bit 31 of each word as a sign.
  static Bits<float> sign(Bits<float> word) { return word & (Bits<float>)(-Vec<float>{}); }

  // -2 log u; `near` is u - 1, to all its digits where u is above sqrt(1/2).
  static Vec<float> minus_two_log(Vec<float> u, Vec<float> near) {
    using C = Constants<float>;
    const Bits<float> n = ((Bits<float>)u - C::half_sqrt) >> C::mantissa;
    const Vec<float> f = n == 0 ? near : (Vec<float>)((Bits<float>)u - (n << C::mantissa)) - 1.0f;
    const Vec<float> series = (f * horner(f, log) + 1.0f) * (f * f) - f * 2.0f;
    return from_signed(n) * -1.3862943611198906f + series;
  }
};

template <>
struct BoxMuller<double> {
  static constexpr double sine[] = {1.5707963267948966192,     -0.64596409750624625216,   0.079692626246166920812,
                                    -0.0046817541353147393212, 0.00016044118472567202523, -3.598842711288921836e-6,
                                    5.691926149930545996e-8,   -6.6274308776223041982e-10};
  static constexpr double cosine[] = {-1.2337005501361698161,    0.25366950790104686641,      -0.020863480763313686702,
                                      0.00091926027420283861996, -0.000025202036852758282839, 4.7106114397331716696e-7,
                                      -6.3213947782627668496e-9};
  static constexpr int64_t two52 = 0x4330000000000000;  // of which the mantissa's bits count ones

  static Bits<double> negative(Bits<double> word) { return -(word >> 31) & int64_t{kLowHalf}; }
  static Vec<double> from_unsigned31(Bits<double> value) { return (Vec<double>)(value | two52) - 4503599627370496.0; }
  static Vec<double> from_signed(Bits<double> value) {
    constexpr int64_t top = int64_t{1} << 31;
    return (Vec<double>)(((value & int64_t{kLowHalf}) ^ top) | two52) - (4503599627370496.0 + 2147483648.0);
  }
  static Bits<double> sign(Bits<double> word) { return (word << 32) & (Bits<double>)(-Vec<double>{}); }

  static Vec<double> minus_two_log(Vec<double> u, Vec<double> near) {
    return half_log_ratio<double>(u, Vec<double>{} + 1.0, near) * -4.0;
  }
};

template <class T>
inline Vec<T> square_root(Vec<T> v) {
  alignas(TPEXT_VECTOR_BYTES) T lanes[kLanes<T>];
  store(lanes, v);
  for (T& lane : lanes) lane = sizeof(T) == 4 ? __builtin_sqrtf(lane) : __builtin_sqrt(lane);
  return load(lanes);
}

// r cos(angle) and r sin(angle) of the words of a radius and an angle.
template <class T>
[[gnu::always_inline]] inline void box_muller(Bits<T> radius_word, Bits<T> angle_word, Vec<T>& first, Vec<T>& second) {
  using C = BoxMuller<T>;
  constexpr T kUnit = T(2.3283064365386963e-10);  // 2^-32
  const Bits<T> high = C::negative(radius_word);
  const Vec<T> distance = C::from_unsigned31(radius_word ^ high);  // from 2^32 - 1 where high, else from 0
  const Vec<T> step = high != 0 ? Vec<T>{} - kUnit : Vec<T>{} + kUnit;
  const Vec<T> start = high != 0 ? Vec<T>{} + T(1) : Vec<T>{} + kUnit;
  const Vec<T> radius = square_root<T>(C::minus_two_log(distance * step + start, distance * step));

  const Vec<T> t = C::from_signed(angle_word << 2) * kUnit, square = t * t;  // quarter turns from the nearest of them
  const Vec<T> sine = horner(square, C::sine) * t, cosine = horner(square, C::cosine) * square + T(1);
  using Lane = decltype(angle_word[0] + 0);
  const Bits<T> quadrant = angle_word + Lane(0x20000000);
  const Bits<T> odd = quadrant & Lane(0x40000000);
  first = radius * (Vec<T>)((Bits<T>)(odd != 0 ? sine : cosine) ^ C::sign(quadrant + Lane(0x40000000)));
  second = radius * (Vec<T>)((Bits<T>)(odd != 0 ? cosine : sine) ^ C::sign(quadrant));
}

// The standard normal numbers of kLanes groups from `group` on, as four vectors of consecutive elements.
template <class T>
[[gnu::always_inline]] inline void normals(const PhiloxKeys& keys, uint32_t step, uint32_t stream, uint32_t row,
                                           int64_t group, Vec<T> (&out)[4]) {
  constexpr int kSets = 8 / static_cast<int>(sizeof(T)), kWide = TPEXT_VECTOR_BYTES / 8;
  const Words m0 = Words{} + philox::kMultiplier0, m1 = Words{} + philox::kMultiplier1;
  // Three words of the counter are the same for all groups, and with them two products of the first two rounds.
  const uint64_t first = uint64_t{philox::kMultiplier1} * stream;
  const uint64_t second = philox::kMultiplier0 * (((first >> 32) ^ row ^ keys.keys[0][0]) & kLowHalf);
  Words c[kSets][4];
  for (int s = 0; s < kSets; ++s) {
    Words groups;
    for (int l = 0; l < kWide; ++l) groups[l] = static_cast<uint64_t>(kSets * l + s);
    const Words p0 = multiply_low(groups + static_cast<uint64_t>(group), m0);
    const Words p1 = multiply_low((p0 >> 32) ^ (step ^ keys.keys[0][1]), m1);
    c[s][0] = (p1 >> 32) ^ (first ^ keys.keys[1][0]);
    c[s][1] = p1;
    c[s][2] = p0 ^ ((second >> 32) ^ keys.keys[1][1]);
    c[s][3] = Words{} + second;
  }
#pragma GCC unroll 10
  for (int round = 2; round < philox::kRounds; ++round)
    for (auto& w : c) {
      const Words p0 = multiply_low(w[0], m0), p1 = multiply_low(w[2], m1);
      w[0] = (p1 >> 32) ^ w[1] ^ keys.keys[round][0];
      w[1] = p1;
      w[2] = (p0 >> 32) ^ w[3] ^ keys.keys[round][1];
      w[3] = p0;
    }
  Bits<T> words[4];
  for (int i = 0; i < 4; ++i) {
    Words joined = c[0][i] & kLowHalf;
    if constexpr (kSets == 2) joined |= c[1][i] << 32;
    words[i] = (Bits<T>)joined;
  }
  Vec<T> z[4], half[4];
  box_muller<T>(words[0], words[1], z[0], z[1]);
  box_muller<T>(words[2], words[3], z[2], z[3]);
  // From one number of each group a vector to the elements in order: two perfect shuffles, as in transpose().
  constexpr int L = kLanes<T>;
  constexpr std::make_integer_sequence<int, L> lanes;
  for (int i = 0; i < 2; ++i) {
    half[2 * i] = interleave<T, 0>(z[i], z[i + 2], lanes);
    half[2 * i + 1] = interleave<T, L / 2>(z[i], z[i + 2], lanes);
  }
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = interleave<T, 0>(half[i], half[i + 2], lanes);
    out[2 * i + 1] = interleave<T, L / 2>(half[i], half[i + 2], lanes);
  }
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
