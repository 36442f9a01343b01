// Every CPU kernel on memory of exactly its size, fp32 and bf16, in-place and null arguments among
// them: run under the address and undefined-behaviour sanitizers, which end the program at the
// first byte that a kernel touches and should not. The values are checked in Python; here a few
// are, so that a kernel that does nothing is seen.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/activation.h"
#include "cpu/adamw.h"
#include "cpu/block_step.h"
#include "cpu/cross_entropy.h"
#include "cpu/few_rows.h"
#include "cpu/memory.h"
#include "cpu/norm.h"
#include "cpu/rope.h"
#include "cpu/squared_norm.h"
#include "data/index.h"

using namespace trivium;

namespace {

constexpr int THREADS = 3;

void expect(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

void put(float* p, float value) { *p = value; }
void put(BFloat16* p, float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    p->bits = static_cast<uint16_t>(word >> 16);
}
float get(const float* p) { return *p; }
float get(const BFloat16* p) {
    const uint32_t word = static_cast<uint32_t>(p->bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

// Values of about 1; an exact size, so that the byte after the last one is out of bounds.
template <class T>
std::vector<T> some(int64_t size) {
    std::vector<T> v(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) put(&v[i], std::sin(static_cast<float>(3 * i + 1)));
    return v;
}

template <class T>
void norms(int64_t rows, int64_t columns) {
    const auto x = some<T>(rows * columns), branch = some<T>(rows * columns),
               weight = some<T>(columns), bias = some<T>(columns);
    auto y = some<T>(rows * columns), total = some<T>(rows * columns), dx = some<T>(rows * columns);
    std::vector<float> mean(rows), rstd(rows), dweight(columns), dbias(columns);
    for (const bool adds : {false, true}) {
        const T* const added = adds ? branch.data() : nullptr;
        T* const sum = adds ? total.data() : nullptr;
        norm_forward<T>(NormKind::rms,
                        {x.data(), added, weight.data(), nullptr, sum, y.data(), nullptr,
                         rstd.data(), rows, columns, 1e-5f},
                        THREADS);
        norm_backward<T>(NormKind::rms,
                         {y.data(), x.data(), weight.data(), nullptr, rstd.data(), added, dx.data(),
                          dweight.data(), nullptr, rows, columns},
                         THREADS);
        norm_forward<T>(NormKind::layer,
                        {x.data(), added, weight.data(), adds ? bias.data() : nullptr, sum,
                         y.data(), mean.data(), rstd.data(), rows, columns, 1e-5f},
                        THREADS);
        norm_backward<T>(NormKind::layer,
                         {y.data(), x.data(), weight.data(), mean.data(), rstd.data(), added,
                          dx.data(), dweight.data(), dbias.data(), rows, columns},
                         THREADS);
    }
    expect(rows == 0 || rstd[0] > 0.0f, "a norm kept no rstd");
}

template <class T>
void activations(int64_t rows, int64_t columns) {
    for (const auto kind : {ActivationKind::silu, ActivationKind::gelu_tanh,
                            ActivationKind::gelu_erf, ActivationKind::squared_relu}) {
        auto x = some<T>(rows * columns), packed = some<T>(2 * rows * columns),
             y = some<T>(rows * columns);
        activation_forward<T>(kind, x.data(), y.data(), rows * columns, THREADS);
        expect(rows * columns == 0 || std::fabs(get(&y[0])) < std::fabs(get(&x[0])),
               "an activation is not smaller than its input");
        activation_backward<T>(kind, y.data(), x.data(), x.data(), rows * columns, THREADS);
        gated_forward<T>(kind, packed.data(), y.data(), rows, columns, THREADS);
        gated_backward<T>(kind, y.data(), packed.data(), packed.data(), rows, columns, THREADS);
    }
}

template <class T>
void rotations(int64_t batch, int64_t tokens, int64_t heads, int64_t size, int64_t half) {
    const auto cos = some<float>(batch * tokens * half), sin = some<float>(batch * tokens * half);
    for (const bool interleaved : {false, true}) {
        auto x = some<T>(batch * tokens * heads * size), y = some<T>(batch * tokens * heads * size);
        const Heads<const T> rows{x.data(), tokens * heads * size, heads * size, size};
        const Heads<T> transposed{y.data(), heads * tokens * size, size, tokens * size},
            itself{x.data(), rows.batch, rows.token, rows.head};
        rope<T>({cos.data(), sin.data(), tokens, half, interleaved, 1.0f}, rows, transposed, batch,
                tokens, heads, size, THREADS);
        rope<T>({cos.data(), sin.data(), 0, half, interleaved, -1.0f}, rows, itself, batch, tokens,
                heads, size, THREADS);
    }
}

template <class T>
void cross_entropies(int64_t rows, int64_t columns, int64_t padded, int64_t stride) {
    auto logits = some<T>(rows * stride - (rows > 0 ? stride - padded : 0));
    std::vector<int64_t> column(rows);
    for (int64_t i = 0; i < rows; ++i)
        column[i] = columns == 0 || i % 3 == 2 ? -1 : i % 2 ? columns - 1 : 0;
    std::vector<float> highest(rows), rest(rows), target(rows), scale(rows, 0.5f),
        at_label(rows, -0.25f);
    if (rows > 1) scale[1] = 0.0f;
    cross_entropy_statistics<T>({logits.data(), column.data(), rows, columns, padded, stride},
                                highest.data(), rest.data(), target.data(), THREADS);
    expect(rows == 0 || columns == 0 || highest[0] >= target[0], "a label lies above the maximum");
    cross_entropy_gradient<T>({logits.data(), column.data(), rows, columns, padded, stride},
                              highest.data(), scale.data(), at_label.data(), THREADS);
    if (rows > 0 && columns > 0) expect(get(&logits[0]) == -0.25f, "the label has no gradient");
    if (rows > 1) expect(get(&logits[stride]) == 0.0f, "a row that does not count has a gradient");
}

template <class T>
void products(int64_t rows, int64_t outputs, int64_t inputs) {
    const auto x = some<T>(rows * inputs), w = some<T>(outputs * inputs);
    auto y = std::vector<T>(static_cast<size_t>(rows * outputs));
    few_rows_product<T>(x.data(), w.data(), y.data(), rows, outputs, inputs, THREADS);
    float last = 0.0f;
    for (int64_t j = 0; rows > 0 && j < inputs; ++j)
        last += get(&x[(rows - 1) * inputs + j]) * get(&w[(outputs - 1) * inputs + j]);
    expect(rows == 0 || std::fabs(last - get(&y.back())) <= 0.01f * inputs,
           "the last product is wrong");
}

// The last token that the cache has room for; then every norm, bias and cap, then none of them.
template <class T>
void block_steps(int64_t rows, int64_t width, int64_t past, int64_t window) {
    const int64_t heads = 4, kv_heads = 2, ffn = width + 3, half = width / 2,
                  packed = (heads + 2 * kv_heads) * width, queries = heads * width;
    const auto x = some<T>(rows * width), wide = some<T>(2 * ffn), narrow = some<T>(width),
               qkv = some<T>(packed * width), qkv_bias = some<T>(packed),
               out = some<T>(width * queries), up = some<T>(2 * ffn * width),
               down = some<T>(width * ffn), whole = some<T>(queries),
               whole_keys = some<T>(kv_heads * width);
    const auto cos = some<float>(half), sin = some<float>(half);
    auto keys = some<T>(rows * (past + 1) * kv_heads * width), values = keys;
    auto y = std::vector<T>(static_cast<size_t>(rows * width));
    const KeyValues<T> cache{keys.data(), values.data(), past + 1, past};
    const Affine<T> norm{narrow.data(), narrow.data()}, none{nullptr, nullptr};
    Block block{width, ffn,   heads, kv_heads, width, window, 0.5f,
                2.0f,  1e-5f, true,  false,    true,  false,  ActivationKind::silu};
    block_step<T>(block,
                  {norm,
                   {qkv.data(), qkv_bias.data()},
                   norm,
                   norm,
                   {out.data(), narrow.data()},
                   norm,
                   norm,
                   {up.data(), wide.data()},
                   {down.data(), narrow.data()},
                   norm},
                  {cos.data(), sin.data(), half}, cache, x.data(), y.data(), rows, THREADS);
    expect(rows == 0 || get(&y.back()) != 0.0f, "the last output was not written");
    block = {width, ffn,   heads, kv_heads, width, window, 0.5f,
             0.0f,  1e-5f, false, true,     false, true,   ActivationKind::gelu_erf};
    block_step<T>(block,
                  {none,
                   {qkv.data(), nullptr},
                   {whole.data(), nullptr},
                   {whole_keys.data(), nullptr},
                   {out.data(), nullptr},
                   none,
                   none,
                   {up.data(), nullptr},
                   {down.data(), nullptr},
                   none},
                  {nullptr, nullptr, 0}, cache, x.data(), y.data(), rows, THREADS);
    expect(rows == 0 || get(&y.back()) != 0.0f,
           "the last output of the plain block was not written");
}

template <class T>
void updates(int64_t size) {
    auto masters = some<float>(size), exp_avg = some<float>(size), exp_avg_sq = some<float>(size),
         before = masters;
    const auto grads = some<float>(size);
    auto weights = some<T>(size);
    for (auto& v : exp_avg_sq) v *= v;
    const AdamW a{0.99f, 0.1f, 0.95f, 0.05f, 1e-8f, 0.1f, 0.9f, 1.0f};
    adamw<T>(a, masters.data(), exp_avg.data(), exp_avg_sq.data(), grads.data(), weights.data(),
             size, THREADS);
    adamw<T>(a, masters.data(), exp_avg.data(), exp_avg_sq.data(), grads.data(), nullptr, size,
             THREADS);
    expect(size == 0 || masters[size - 1] != before[size - 1], "the last weight was not updated");
    expect(size == 0 || squared_norm(masters.data(), size, THREADS) > 0.0,
           "the norm of weights is zero");
}

template <class T>
void all() {
    for (const int64_t columns : {1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 100, 1000})
        for (const int64_t rows : {0, 1, 2, 5, 70}) {
            norms<T>(rows, columns);
            activations<T>(rows, columns);
            products<T>(rows, 7, columns);
            products<T>(rows, 300, columns);
            cross_entropies<T>(rows, columns, columns, columns);
            cross_entropies<T>(rows, columns, columns + 3, columns + 5);
            cross_entropies<T>(rows, 0, columns, columns);
        }
    for (const int64_t half : {1, 2, 3, 4, 8, 17, 32, 40}) {
        rotations<T>(2, 3, 5, 2 * half, half);
        rotations<T>(1, 7, 1, 2 * half + 3, half);
    }
    for (const int64_t width : {1, 7, 16, 33, 40})
        for (const int64_t rows : {1, 3})
            for (const int64_t past : {0, 1, 6, 40}) {
                block_steps<T>(rows, width, past, 0);
                block_steps<T>(rows, width, past, 5);
            }
    for (const int64_t size : {0, 1, 15, 16, 17, 2047, 2049, 70000}) updates<T>(size);
}

}  // namespace

int main() {
    all<float>();
    all<BFloat16>();
    expect(squared_norm(nullptr, 0, THREADS) == 0.0, "the norm of nothing is not zero");
    keep_freed_memory();
    all<float>();
    std::puts("done");
}
