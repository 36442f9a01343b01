// Activations of the feed-forward layer on the CPU, forward and backward, plain or as a gate; fp32
// arithmetic whatever the type in memory.
#pragma once
#include <cstdint>

#include "simd.h"

namespace trivium {

enum class ActivationKind { silu, gelu_tanh, gelu_erf, squared_relu };

// y = f(x), elementwise.
template <class T>
void activation_forward(ActivationKind kind, const T* x, T* y, int64_t size, int threads);
// dx = dy * f'(x); dx may be x.
template <class T>
void activation_backward(ActivationKind kind, const T* dy, const T* x, T* dx, int64_t size,
                         int threads);

// y [rows, columns] = f(gate) * up, where a row of x is gate and then up, [rows, 2 columns].
template <class T>
void gated_forward(ActivationKind kind, const T* x, T* y, int64_t rows, int64_t columns,
                   int threads);
// dx in the shape of x; dx may be x.
template <class T>
void gated_backward(ActivationKind kind, const T* dy, const T* x, T* dx, int64_t rows,
                    int64_t columns, int threads);

}  // namespace trivium
