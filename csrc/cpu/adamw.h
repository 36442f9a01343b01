// AdamW on the CPU over flat buffers: one pass, each array read and written once.
#pragma once
#include <cstdint>

#include "simd.h"

namespace trivium {

struct AdamW {
    float lr_decay;  // 1 - lr * weight_decay
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float eps;
    float step_size;        // lr / (1 - beta1^t)
    float root_correction;  // sqrt(1 - beta2^t)
    float grad_scale;
};

// Loshchilov and Hutter 2019. `weights`, unless null, gets masters rounded to T.
template <class T>
void adamw(const AdamW& a, float* masters, float* exp_avg, float* exp_avg_sq, const float* grads,
           T* weights, int64_t size, int threads);

}  // namespace trivium
