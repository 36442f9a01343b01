// Exponential, sigmoid and the normal distribution in fp32, a few units in the last place off,
// without branches.
#pragma once
#include "simd.h"

namespace trivium {

// exp(x): 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (coefficients of the Taylor series: its
// next term is below 3e-9). Below -87.3 it is 0 and not a subnormal; above 88.4 a number of 2.4e38;
// NaN stays NaN.
template <int L>
TRIVIUM_INLINE Floats<L> exp(Floats<L> x) {
    const Floats<L> low = all<L>(-87.3f), high = all<L>(88.4f),
                    magic = all<L>(12582912.0f);  // 1.5 x 2^23: adding it rounds to an integer
    const Words<L> is_nan = (Words<L>)(x != x), vanishes = (Words<L>)(x < low);
    Floats<L> v = x < low ? low : x;
    v = v > high ? high : v;
    const Floats<L> shifted = v * 1.44269504f + magic;
    const Floats<L> n = shifted - magic;
    const Floats<L> r = (v - n * 0.693359375f) -
                        n * -2.12194440e-4f;  // ln 2 in two pieces: n times the first is exact
    Floats<L> p = all<L>(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Words<L> power =
        ((Words<L>)shifted << 23) + 0x3f800000u;  // 2^n: the low bits of `shifted` hold n
    const Floats<L> y = p * (Floats<L>)power;
    return select<L>(is_nan, x, select<L>(vanishes, Floats<L>{}, y));
}

// 1 / (1 + exp(-x))
template <int L>
TRIVIUM_INLINE Floats<L> sigmoid(Floats<L> x) {
    return 1.0f / (1.0f + exp<L>(-x));
}

// Phi(x), the share of a standard normal below x: exp(-u^2) times a rational fit with u = |x| /
// sqrt(2), good to 1.2e-7 of the smaller tail. W. J. Cody-style complementary error function with
// the Chebyshev fit of Press et al., Numerical Recipes, section 6.2.
template <int L>
TRIVIUM_INLINE Floats<L> normal_share(Floats<L> x) {
    const Floats<L> u = (x < 0.0f ? -x : x) * 0.70710678f;
    const Floats<L> t = 1.0f / (1.0f + 0.5f * u);
    Floats<L> p = all<L>(0.17087277f);
    p = p * t + -0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t + -1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t + -0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t + -1.26551223f;
    const Floats<L> tail = 0.5f * t * exp<L>(p - u * u);  // of the smaller side
    return x < 0.0f ? tail : 1.0f - tail;
}

}  // namespace trivium
