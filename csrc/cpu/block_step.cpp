// Memory plan: each weight is read once from memory, and so is what is held of keys and values; all
// else is a few rows that stay in cache.
#include "block_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "few_rows.h"
#include "math.h"
#include "norm.h"
#include "parallel.h"
#include "rope.h"

namespace trivium {
namespace {

constexpr int64_t ELEMENTS_PER_TASK = 1 << 14;
constexpr int KEYS_AT_A_TIME = 4,
              VECTORS_AT_A_TIME = 4;  // enough chains of additions to keep the units busy

template <class T>
struct Add {
    template <int L>
    static TRIVIUM_INLINE void run(const T* a, const T* b, T* sum, int64_t size) {
        each_vector<L>(size, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
            store<L>(sum + j, load<L>(a + j, n) + load<L>(b + j, n), n);
        });
    }
};

// One query [size] over `length` keys and values, `stride` elements from each to the next. scores:
// memory for `length` numbers.
template <class T>
struct Attend {
    template <int L, int COUNT>
    static TRIVIUM_INLINE void score(const T* q, const T* keys, int64_t stride, int64_t size,
                                     float* scores) {
        Floats<L> total[COUNT] = {};
        each_vector<L>(size, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
            const Floats<L> v = load<L>(q + j, n);
            for (int k = 0; k < COUNT; ++k) total[k] += v * load<L>(keys + k * stride + j, n);
        });
        for (int k = 0; k < COUNT; ++k) scores[k] = sum<L>(total[k]);
    }

    // n: elements of the last vector.
    template <int L, int COUNT>
    static TRIVIUM_INLINE void mix(const float* weights, float factor, const T* values,
                                   int64_t stride, int64_t length, T* o, int64_t n) {
        Floats<L> total[COUNT] = {};
        for (int64_t s = 0; s < length; ++s)
            for (int k = 0; k < COUNT; ++k)
                total[k] +=
                    weights[s] * load<L>(values + s * stride + k * L, k + 1 < COUNT ? L : n);
        for (int k = 0; k < COUNT; ++k)
            store<L>(o + k * L, total[k] * factor, k + 1 < COUNT ? L : n);
    }

    template <int L>
    static TRIVIUM_INLINE void run(const Block& block, const T* q, const T* keys, const T* values,
                                   int64_t stride, int64_t length, float* scores, T* o) {
        int64_t s = 0;
        for (; s + KEYS_AT_A_TIME <= length; s += KEYS_AT_A_TIME)
            score<L, KEYS_AT_A_TIME>(q, keys + s * stride, stride, block.size, scores + s);
        for (; s < length; ++s) score<L, 1>(q, keys + s * stride, stride, block.size, scores + s);
        float highest = -std::numeric_limits<float>::infinity();
        for (s = 0; s < length; ++s) {
            scores[s] *= block.scale;
            if (block.softcap > 0.0f)
                scores[s] = block.softcap * std::tanh(scores[s] / block.softcap);
            highest = std::max(highest, scores[s]);
        }
        Floats<L> total = {};
        each_vector<L>(length, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
            const Floats<L> weight = first<L>(exp<L>(load<L>(scores + j, n) - highest), n);
            total += weight;
            store<L>(scores + j, weight, n);
        });
        const float factor = 1.0f / sum<L>(total);
        constexpr int WIDE = VECTORS_AT_A_TIME * L;
        int64_t j = 0;
        for (; j + WIDE <= block.size; j += WIDE)
            mix<L, VECTORS_AT_A_TIME>(scores, factor, values + j, stride, length, o + j, L);
        for (; j < block.size; j += L)
            mix<L, 1>(scores, factor, values + j, stride, length, o + j,
                      std::min<int64_t>(L, block.size - j));
    }
};

template <class T>
class Step {
  public:
    Step(const Block& block, int64_t rows, int threads)
        : block_(block), rows_(rows), threads_(threads), mean_(rows * block.heads), rstd_(mean_) {}

    void run(const BlockWeights<T>& w, const Angles& angles, const KeyValues<T>& past, const T* x,
             T* y) {
        const int64_t hidden = block_.hidden,
                      packed = (block_.heads + 2 * block_.kv_heads) * block_.size,
                      queries = block_.heads * block_.size;
        const int64_t up = block_.gated ? 2 * block_.ffn : block_.ffn;
        std::vector<T> normalized(rows_ * hidden), qkv(rows_ * packed), mixed(rows_ * queries),
            branch(rows_ * hidden), inner(rows_ * up), active(rows_ * block_.ffn);

        linear(w.qkv, norm(w.attention_norm, x, normalized.data(), rows_, hidden), qkv.data(),
               packed, hidden);
        prepare(w, angles, past, qkv.data(), packed);
        attend(past, qkv.data(), packed, mixed.data());
        linear(w.out, mixed.data(), branch.data(), hidden, queries);
        norm(w.attention_post_norm, branch.data(), branch.data(), rows_, hidden);
        add(x, branch.data(), y, rows_ * hidden);

        linear(w.up,
               norm(w.mlp_norm, block_.parallel_residual ? x : y, normalized.data(), rows_, hidden),
               inner.data(), up, hidden);
        if (block_.gated)
            gated_forward<T>(block_.activation, inner.data(), active.data(), rows_, block_.ffn,
                             threads_);
        else
            activation_forward<T>(block_.activation, inner.data(), active.data(),
                                  rows_ * block_.ffn, threads_);
        linear(w.down, active.data(), branch.data(), hidden, block_.ffn);
        norm(w.mlp_post_norm, branch.data(), branch.data(), rows_, hidden);
        add(y, branch.data(), y, rows_ * hidden);
    }

  private:
    // y, or x itself where there is no norm.
    const T* norm(const Affine<T>& a, const T* x, T* y, int64_t rows, int64_t columns) {
        if (!a.weight) return x;
        norm_forward<T>(a.bias ? NormKind::layer : NormKind::rms,
                        {x, nullptr, a.weight, a.bias, nullptr, y, mean_.data(), rstd_.data(), rows,
                         columns, block_.eps},
                        threads_);
        return y;
    }

    void linear(const Affine<T>& a, const T* x, T* y, int64_t outputs, int64_t inputs) {
        few_rows_product(x, a.weight, y, rows_, outputs, inputs, threads_);
        if (!a.bias) return;
        for (int64_t i = 0; i < rows_; ++i) add(y + i * outputs, a.bias, y + i * outputs, outputs);
    }

    void add(const T* a, const T* b, T* sum, int64_t size) { dispatch<Add<T>>(a, b, sum, size); }

    // Queries and keys normalized and rotated where they stand; keys and values also where those of
    // the tokens before are.
    void prepare(const BlockWeights<T>& w, const Angles& angles, const KeyValues<T>& past, T* qkv,
                 int64_t packed) {
        const int64_t size = block_.size, queries = block_.heads * size,
                      keys = block_.kv_heads * size;
        for (int64_t i = 0; i < rows_; ++i) {
            T* const q = qkv + i * packed;
            T* const k = q + queries;
            if (block_.norm_of_projection) {
                norm(w.q_norm, q, q, 1, queries);
                norm(w.k_norm, k, k, 1, keys);
            } else {
                norm(w.q_norm, q, q, block_.heads, size);
                norm(w.k_norm, k, k, block_.kv_heads, size);
            }
        }
        if (angles.half > 0)
            rope<T>({angles.cos, angles.sin, 0, angles.half, block_.interleaved, 1.0f},
                    {qkv, packed, packed, size}, {qkv, packed, packed, size}, rows_, 1,
                    block_.heads + block_.kv_heads, size, threads_);
        for (int64_t i = 0; i < rows_; ++i) {
            const T* const k = qkv + i * packed + queries;
            const int64_t place = (i * past.capacity + past.length) * keys;
            std::copy(k, k + keys, past.keys + place);
            std::copy(k + keys, k + 2 * keys, past.values + place);
        }
    }

    // The heads that share keys and values are one task.
    void attend(const KeyValues<T>& past, const T* qkv, int64_t packed, T* mixed) {
        const int64_t size = block_.size, stride = block_.kv_heads * size,
                      sharing = block_.heads / block_.kv_heads;
        const int64_t held = past.length + 1,
                      seen = block_.window > 0 ? std::min(block_.window, held) : held;
        const int64_t groups = rows_ * block_.kv_heads,
                      step = std::max<int64_t>(1, ELEMENTS_PER_TASK / (2 * sharing * seen * size));
        parallel_for((groups + step - 1) / step, threads_, [&](int64_t task) {
            std::vector<float> scores(seen);
            for (int64_t group = task * step; group < std::min(groups, (task + 1) * step);
                 ++group) {
                const int64_t row = group / block_.kv_heads, kv = group % block_.kv_heads;
                const int64_t from =
                    ((row * past.capacity + held - seen) * block_.kv_heads + kv) * size;
                for (int64_t head = kv * sharing; head < (kv + 1) * sharing; ++head)
                    dispatch<Attend<T>>(block_, qkv + row * packed + head * size, past.keys + from,
                                        past.values + from, stride, seen, scores.data(),
                                        mixed + (row * block_.heads + head) * size);
            }
        });
    }

    const Block& block_;
    const int64_t rows_;
    const int threads_;
    std::vector<float> mean_,
        rstd_;  // what the norms keep for a backward pass, which there is none of
};

}  // namespace

template <class T>
void block_step(const Block& block, const BlockWeights<T>& weights, const Angles& angles,
                const KeyValues<T>& past, const T* x, T* y, int64_t rows, int threads) {
    Step<T>(block, rows, threads).run(weights, angles, past, x, y);
}

template void block_step(const Block&, const BlockWeights<float>&, const Angles&,
                         const KeyValues<float>&, const float*, float*, int64_t, int);
template void block_step(const Block&, const BlockWeights<BFloat16>&, const Angles&,
                         const KeyValues<BFloat16>&, const BFloat16*, BFloat16*, int64_t, int);

}  // namespace trivium
