// Memory plan: every rotated element read once and written once; in place, the dims that are not
// rotated are not touched.
#include "rope.h"

#include <algorithm>

#include "parallel.h"

namespace trivium {
namespace {

constexpr int64_t ELEMENTS_PER_TASK = 1 << 14;

template <class T>
struct RotateHalves {
    template <int L>
    static TRIVIUM_INLINE void run(const float* cos, const float* sin, float direction, const T* x,
                                   T* y, int64_t half) {
        each_vector<L>(half, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
            const Floats<L> c = load<L>(cos + j, n), s = load<L>(sin + j, n) * direction;
            const Floats<L> a = load<L>(x + j, n), b = load<L>(x + half + j, n);
            store<L>(y + j, a * c - b * s, n);
            store<L>(y + half + j, b * c + a * s, n);
        });
    }
};

// Neighbours in memory: the few families that rotate them do not pay for shuffles in every other.
template <class T>
struct RotatePairs {
    template <int L>
    static TRIVIUM_INLINE void run(const float* cos, const float* sin, float direction, const T* x,
                                   T* y, int64_t half) {
        for (int64_t start = 0; start < half; start += L / 2) {
            const int64_t n = std::min<int64_t>(L / 2, half - start);
            float pairs[L];
            store<L>(pairs, load<L>(x + 2 * start, 2 * n));
            for (int64_t j = 0; j < n; ++j) {
                const float c = cos[start + j], s = sin[start + j] * direction;
                const float a = pairs[2 * j], b = pairs[2 * j + 1];
                pairs[2 * j] = a * c - b * s;
                pairs[2 * j + 1] = b * c + a * s;
            }
            store<L>(y + 2 * start, load<L>(pairs), 2 * n);
        }
    }
};

template <class T>
struct Tokens {
    template <int L>
    static TRIVIUM_INLINE void run(const Rotation r, const Heads<const T> x, const Heads<T> y,
                                   int64_t tokens, int64_t heads, int64_t size, int64_t begin,
                                   int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / tokens, t = row % tokens, angles = (b * r.batch + t) * r.half;
            for (int64_t head = 0; head < heads; ++head) {
                const T* from = x.base + b * x.batch + t * x.token + head * x.head;
                T* to = y.base + b * y.batch + t * y.token + head * y.head;
                if (r.interleaved)
                    RotatePairs<T>::template run<L>(r.cos + angles, r.sin + angles, r.direction,
                                                    from, to, r.half);
                else
                    RotateHalves<T>::template run<L>(r.cos + angles, r.sin + angles, r.direction,
                                                     from, to, r.half);
                if (to != from)
                    std::memcpy(to + 2 * r.half, from + 2 * r.half,
                                (size - 2 * r.half) * sizeof(T));
            }
        }
    }
};

}  // namespace

template <class T>
void rope(const Rotation& rotation, const Heads<const T>& x, const Heads<T>& y, int64_t batch,
          int64_t tokens, int64_t heads, int64_t size, int threads) {
    const int64_t rows = batch * tokens,
                  step =
                      std::max<int64_t>(1, ELEMENTS_PER_TASK / std::max<int64_t>(1, heads * size));
    parallel_for((rows + step - 1) / step, threads, [&](int64_t task) {
        dispatch<Tokens<T>>(rotation, x, y, tokens, heads, size, task * step,
                            std::min(rows, (task + 1) * step));
    });
}

template void rope(const Rotation&, const Heads<const float>&, const Heads<float>&, int64_t,
                   int64_t, int64_t, int64_t, int);
template void rope(const Rotation&, const Heads<const BFloat16>&, const Heads<BFloat16>&, int64_t,
                   int64_t, int64_t, int64_t, int);

}  // namespace trivium
