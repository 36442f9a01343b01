// Memory plan: every element read once and written once; the activation is computed again in
// backward.
#include "activation.h"

#include <algorithm>

#include "math.h"
#include "parallel.h"

namespace trivium {
namespace {

constexpr int64_t ELEMENTS_PER_TASK = 1 << 14;

template <int L>
struct Point {
    Floats<L> value, slope;
};

// f and its derivative at x. GELU by tanh is x * sigmoid(z) with
// z = 2 sqrt(2 / pi) (x + 0.044715 x^3), which cancels nothing.
template <ActivationKind kind, int L>
TRIVIUM_INLINE Point<L> at(Floats<L> x) {
    if (kind == ActivationKind::squared_relu) {
        const Floats<L> v = larger<L>(x, Floats<L>{});
        return {v * v, 2.0f * v};
    }
    if (kind == ActivationKind::gelu_erf) {
        const Floats<L> share = normal_share<L>(x);
        return {x * share, share + x * 0.39894228f * exp<L>(-0.5f * x * x)};
    }
    const bool silu = kind == ActivationKind::silu;
    const Floats<L> squared = x * x;
    const Floats<L> z = silu ? x : x * (1.59576912f + 0.0713548162f * squared);
    const Floats<L> s = sigmoid<L>(z);
    const Floats<L> dz = silu ? all<L>(1.0f) : 1.59576912f + 0.214064449f * squared;
    // Where the sigmoid is 0 or 1 its slope is 0, whatever x (1 - s) dz would overflow to.
    const Floats<L> bend = s * (1.0f - s);
    const Floats<L> bent = bend == 0.0f ? Floats<L>{} : x * dz * bend;
    return {x * s, s + bent};
}

template <ActivationKind kind, class T>
struct Forward {
    template <int L>
    static TRIVIUM_INLINE void run(const T* x, T* y, int64_t size) {
        each_vector<L>(size, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
            store<L>(y + j, at<kind, L>(load<L>(x + j, n)).value, n);
        });
    }
};

template <ActivationKind kind, class T>
struct Backward {
    template <int L>
    static TRIVIUM_INLINE void run(const T* dy, const T* x, T* dx, int64_t size) {
        each_vector<L>(size, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
            store<L>(dx + j, load<L>(dy + j, n) * at<kind, L>(load<L>(x + j, n)).slope, n);
        });
    }
};

template <ActivationKind kind, class T>
struct GatedForward {
    template <int L>
    static TRIVIUM_INLINE void run(const T* x, T* y, int64_t columns, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* gate = x + 2 * row * columns;
            T* out = y + row * columns;
            each_vector<L>(columns, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
                store<L>(out + j,
                         at<kind, L>(load<L>(gate + j, n)).value * load<L>(gate + columns + j, n),
                         n);
            });
        }
    }
};

template <ActivationKind kind, class T>
struct GatedBackward {
    template <int L>
    static TRIVIUM_INLINE void run(const T* dy, const T* x, T* dx, int64_t columns, int64_t begin,
                                   int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* gate = x + 2 * row * columns;
            T* dgate = dx + 2 * row * columns;
            const T* g = dy + row * columns;
            each_vector<L>(columns, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
                const Floats<L> d = load<L>(g + j, n), up = load<L>(gate + columns + j, n);
                const Point<L> point = at<kind, L>(load<L>(gate + j, n));
                store<L>(dgate + j, d * up * point.slope, n);
                store<L>(dgate + columns + j, d * point.value, n);
            });
        }
    }
};

template <template <ActivationKind, class> class Kernel, class T, class... A>
void of_kind(ActivationKind kind, const A&... a) {
    switch (kind) {
        case ActivationKind::silu: return dispatch<Kernel<ActivationKind::silu, T>>(a...);
        case ActivationKind::gelu_tanh: return dispatch<Kernel<ActivationKind::gelu_tanh, T>>(a...);
        case ActivationKind::gelu_erf: return dispatch<Kernel<ActivationKind::gelu_erf, T>>(a...);
        case ActivationKind::squared_relu:
            return dispatch<Kernel<ActivationKind::squared_relu, T>>(a...);
    }
}

// body(begin, end) over [0, size) in pieces of `step`.
template <class Body>
void in_pieces(int64_t size, int64_t step, int threads, const Body& body) {
    parallel_for((size + step - 1) / step, threads,
                 [&](int64_t task) { body(task * step, std::min(size, (task + 1) * step)); });
}

}  // namespace

template <class T>
void activation_forward(ActivationKind kind, const T* x, T* y, int64_t size, int threads) {
    in_pieces(size, ELEMENTS_PER_TASK, threads, [&](int64_t begin, int64_t end) {
        of_kind<Forward, T>(kind, x + begin, y + begin, end - begin);
    });
}

template <class T>
void activation_backward(ActivationKind kind, const T* dy, const T* x, T* dx, int64_t size,
                         int threads) {
    in_pieces(size, ELEMENTS_PER_TASK, threads, [&](int64_t begin, int64_t end) {
        of_kind<Backward, T>(kind, dy + begin, x + begin, dx + begin, end - begin);
    });
}

template <class T>
void gated_forward(ActivationKind kind, const T* x, T* y, int64_t rows, int64_t columns,
                   int threads) {
    in_pieces(rows, std::max<int64_t>(1, ELEMENTS_PER_TASK / columns), threads,
              [&](int64_t begin, int64_t end) {
                  of_kind<GatedForward, T>(kind, x, y, columns, begin, end);
              });
}

template <class T>
void gated_backward(ActivationKind kind, const T* dy, const T* x, T* dx, int64_t rows,
                    int64_t columns, int threads) {
    in_pieces(rows, std::max<int64_t>(1, ELEMENTS_PER_TASK / columns), threads,
              [&](int64_t begin, int64_t end) {
                  of_kind<GatedBackward, T>(kind, dy, x, dx, columns, begin, end);
              });
}

#define TRIVIUM_INSTANTIATE(T)                                                               \
    template void activation_forward(ActivationKind, const T*, T*, int64_t, int);            \
    template void activation_backward(ActivationKind, const T*, const T*, T*, int64_t, int); \
    template void gated_forward(ActivationKind, const T*, T*, int64_t, int64_t, int);        \
    template void gated_backward(ActivationKind, const T*, const T*, T*, int64_t, int64_t, int);
TRIVIUM_INSTANTIATE(float)
TRIVIUM_INSTANTIATE(BFloat16)

}  // namespace trivium
