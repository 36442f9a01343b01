// Cross-entropy on the CPU over one rank's columns of the logits: what the ranks must tell each
// other, then the gradient in place.
#pragma once
#include <cstdint>

#include "simd.h"

namespace trivium {

// Rows of logits, `stride` elements apart, of which `columns` are of the vocabulary and those up to
// `padded` are not. column [rows]: where the label stands, or -1 if on another rank.
template <class T>
struct Logits {
    T* logits;
    const int64_t* column;
    int64_t rows, columns, padded, stride;
};

// fp32 [rows] each: the maximum (-inf without columns); the sum over all columns but the label's of
// exp(logit - maximum); the label's logit, 0 if on another rank. With the label left out of the
// sum, a probability near 1 keeps its distance from 1 in full precision.
template <class T>
void cross_entropy_statistics(const Logits<const T>& a, float* highest, float* rest, float* target,
                              int threads);

// Over the logits: exp(logit - highest) * scale, and `target_gradient` at the label; zero in the
// padding, and in whole rows whose scale is 0.
template <class T>
void cross_entropy_gradient(const Logits<T>& a, const float* highest, const float* scale,
                            const float* target_gradient, int threads);

}  // namespace trivium
