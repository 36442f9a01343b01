// One more token of each of a few sequences through a whole block of a GPT on the CPU, against the
// keys and values of those before it. The same kernels as of a block op by op, with the same
// roundings; what is saved is the way from one call to the next.
#pragma once
#include <cstdint>

#include "activation.h"
#include "simd.h"

namespace trivium {

// The block's shape, and what it does between its weights.
struct Block {
    int64_t hidden, ffn;            // widths
    int64_t heads, kv_heads, size;  // of the attention; size: of a head
    int64_t window;                 // how many tokens a query sees, its own among them; 0 for all
    float scale, softcap;     // of the scores: their factor, and c where they become c tanh(score /
                              // c); 0 for no cap
    float eps;                // of the norms
    bool interleaved;         // as in Rotation
    bool norm_of_projection;  // q_norm and k_norm go over all heads together, not over each
    bool gated, parallel_residual;
    ActivationKind activation;
};

// The weights of a linear layer [outputs, inputs], with or without a bias, or of a norm: a
// LayerNorm where it has a bias, else an RMSNorm, and none where it has no weight.
template <class T>
struct Affine {
    const T* weight;
    const T* bias;
};

template <class T>
struct BlockWeights {
    Affine<T> attention_norm, qkv, q_norm, k_norm, out, attention_post_norm, mlp_norm, up, down,
        mlp_post_norm;
};

// Keys and values [rows, capacity, kv_heads, size] of `length` tokens. The new token's are written
// behind them.
template <class T>
struct KeyValues {
    T* keys;
    T* values;
    int64_t capacity, length;
};

// The new token's angles, `half` of each: see Rotation. 0 where heads are not rotated.
struct Angles {
    const float* cos;
    const float* sin;
    int64_t half;
};

// y [rows, hidden] from x [rows, hidden], a row of each sequence; they must not overlap.
template <class T>
void block_step(const Block& block, const BlockWeights<T>& weights, const Angles& angles,
                const KeyValues<T>& past, const T* x, T* y, int64_t rows, int threads);

}  // namespace trivium
