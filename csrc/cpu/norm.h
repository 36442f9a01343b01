// RMSNorm and LayerNorm on the CPU over raw pointers: rows of `columns` elements, fp32 arithmetic
// whatever the type in memory.
#pragma once
#include <cstdint>

#include "simd.h"

namespace trivium {

enum class NormKind { rms, layer };

// y = weight * T(x * rstd) with rstd = 1 / sqrt(mean(x^2) + eps), or y = (x - mean) * rstd * weight
// + bias. Where `branch` is given, x is x + branch rounded to T, and kept in `sum`. mean (of layer
// alone) and rstd, fp32 [rows], are kept for the backward.
template <class T>
struct NormForward {
    const T* x;
    const T* branch;  // may be null
    const T* weight;
    const T* bias;  // may be null
    T* sum;         // null exactly where branch is
    T* y;
    float* mean;  // null for rms
    float* rstd;
    int64_t rows, columns;
    float eps;
};

// dx, and dweight and dbias (fp32 [columns]), from dy and the x that was normalised. Where `dsum`
// is given, the gradient that reaches x past the norm, it is added to dx. The sums over rows are
// cut into the same blocks whatever the number of threads: equal bits on any machine of one
// instruction set.
template <class T>
struct NormBackward {
    const T* dy;
    const T* x;
    const T* weight;
    const float* mean;  // null for rms
    const float* rstd;
    const T* dsum;  // may be null
    T* dx;
    float* dweight;
    float* dbias;  // may be null
    int64_t rows, columns;
};

template <class T>
void norm_forward(NormKind kind, const NormForward<T>& a, int threads);
template <class T>
void norm_backward(NormKind kind, const NormBackward<T>& a, int threads);

}  // namespace trivium
