// Memory plan: w is read once from memory, a few of its rows at a time. For one row of x the lanes
// run along the rows and are summed at the end. For more, x is turned once so that the lanes are
// its rows: each weight meets them all at once, and nothing is summed across lanes; the rows of w
// at hand, widened to fp32, stay in the first cache while all of x passes.
#include "few_rows.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "parallel.h"

namespace trivium {
namespace {

constexpr int64_t ELEMENTS_PER_TASK = 1 << 16;
// Rows of w at a time: enough chains of additions to keep the units busy, few enough for the
// registers.
constexpr int64_t FOR_ONE = 8, FOR_MORE = 6;
constexpr int64_t LINE = 64;         // bytes of a cache line
constexpr int64_t AHEAD = 24 << 10;  // bytes ahead of the reading at which w is asked for

// The 2L numbers from p on: those at even places, and those at odd ones. bf16 is so widened in two
// instructions, where in order it takes five; a sum of products does not mind, if both factors come
// like that.
template <int L>
TRIVIUM_INLINE void pair(const BFloat16* p, Floats<L>& even, Floats<L>& odd) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
                  "the first of two numbers is the low half of their word");
    Words<L> words;
    std::memcpy(&words, p, sizeof words);
    even = (Floats<L>)(words << 16);
    odd = (Floats<L>)(words & 0xffff0000u);
}

// The numbers as fp32: where they are if they are that already, else in `memory`, pair by pair as
// above.
template <int L>
TRIVIUM_INLINE const float* widened(const float* x, float*, int64_t, int64_t) {
    return x;
}
template <int L>
TRIVIUM_INLINE const float* widened(const BFloat16* x, float* memory, int64_t rows,
                                    int64_t inputs) {
    for (int64_t i = 0; i < rows; ++i, x += inputs, memory += inputs) {
        int64_t j = 0;
        for (; j + 2 * L <= inputs; j += 2 * L) {
            Floats<L> even, odd;
            pair<L>(x + j, even, odd);
            store<L>(memory + j, even);
            store<L>(memory + j + L, odd);
        }
        each_vector<L>(inputs - j, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
            store<L>(memory + j + k, load<L>(x + j + k, n), n);
        });
    }
    return memory - rows * inputs;
}

// Asks for what lies AHEAD of `count` numbers from p on: rows are short, and the processor's own
// foresight begins anew at each of them.
template <class T>
TRIVIUM_INLINE void prefetch(const T* p, int64_t count) {
    const char* const place = reinterpret_cast<const char*>(p) + AHEAD;
    for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += LINE)
        __builtin_prefetch(place + i);
}

// The products of one row of x with COUNT rows of w, which lie one behind the other: at j,
// j * COUNT numbers of them have been read.
template <int L, int COUNT>
TRIVIUM_INLINE void one_row(const float* x, const float* w, float* y, int64_t inputs) {
    Floats<L> total[COUNT] = {};
    each_vector<L>(inputs, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        prefetch(w + j * COUNT, L * COUNT);
        const Floats<L> v = load<L>(x + j, n);
        for (int k = 0; k < COUNT; ++k) total[k] += v * load<L>(w + k * inputs + j, n);
    });
    for (int k = 0; k < COUNT; ++k) y[k] = sum<L>(total[k]);
}

template <int L, int COUNT>
TRIVIUM_INLINE void one_row(const float* x, const BFloat16* w, BFloat16* y, int64_t inputs) {
    Floats<L> total[COUNT] = {};
    int64_t j = 0;
    for (; j + 2 * L <= inputs; j += 2 * L) {
        prefetch(w + j * COUNT, 2 * L * COUNT);
        const Floats<L> first = load<L>(x + j), second = load<L>(x + j + L);
        for (int k = 0; k < COUNT; ++k) {
            Floats<L> even, odd;
            pair<L>(w + k * inputs + j, even, odd);
            total[k] += first * even;
            total[k] += second * odd;
        }
    }
    each_vector<L>(inputs - j, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const Floats<L> v = load<L>(x + j + i, n);
        for (int k = 0; k < COUNT; ++k) total[k] += v * load<L>(w + k * inputs + j + i, n);
    });
    for (int k = 0; k < COUNT; ++k) store<L>(y + k, all<L>(sum<L>(total[k])), 1);
}

// x [rows, inputs] in fp32: a single row as it is, more of them turned, `width` numbers for each
// input, zero from `rows` on.
struct Prepared {
    const float* x;
    int64_t rows, inputs, width;
};

// The products of up to V * L rows of x, from `first` on, with COUNT rows of w.
template <int L, int V, int COUNT, class T>
TRIVIUM_INLINE void lanes_of_rows(const Prepared& from, int64_t first, const float* w, T* y,
                                  int64_t outputs) {
    Floats<L> total[COUNT][V] = {};
    for (int64_t j = 0; j < from.inputs; ++j) {
        Floats<L> column[V];
        for (int i = 0; i < V; ++i) column[i] = load<L>(from.x + j * from.width + first + i * L);
        for (int k = 0; k < COUNT; ++k) {
            const float weight = w[k * from.inputs + j];
            for (int i = 0; i < V; ++i) total[k][i] += weight * column[i];
        }
    }
    T sums[COUNT][V * L];
    for (int k = 0; k < COUNT; ++k)
        for (int i = 0; i < V; ++i) store<L>(sums[k] + i * L, total[k][i]);
    for (int64_t i = 0; i < std::min<int64_t>(V * L, from.rows - first); ++i)
        for (int k = 0; k < COUNT; ++k) y[(first + i) * outputs + k] = sums[k][i];
}

template <int L, int COUNT, class T>
TRIVIUM_INLINE void more_rows(const Prepared& from, const float* w, T* y, int64_t outputs) {
    int64_t first = 0;
    for (; from.rows - first > L; first += 2 * L)
        lanes_of_rows<L, 2, COUNT>(from, first, w, y, outputs);
    if (first < from.rows) lanes_of_rows<L, 1, COUNT>(from, first, w, y, outputs);
}

// `count` of the outputs, of every row of x. `memory`: FOR_MORE * inputs numbers.
template <class T>
struct Outputs {
    template <int L>
    static TRIVIUM_INLINE void run(const Prepared& from, const T* w, T* y, float* memory,
                                   int64_t count, int64_t outputs) {
        const int64_t inputs = from.inputs;
        int64_t o = 0;
        if (from.rows == 1) {
            for (; o + FOR_ONE <= count; o += FOR_ONE)
                one_row<L, FOR_ONE>(from.x, w + o * inputs, y + o, inputs);
            for (; o < count; ++o) one_row<L, 1>(from.x, w + o * inputs, y + o, inputs);
        }
        for (; o + FOR_MORE <= count; o += FOR_MORE)
            more_rows<L, FOR_MORE>(from, widened<L>(w + o * inputs, memory, FOR_MORE, inputs),
                                   y + o, outputs);
        for (; o < count; ++o)
            more_rows<L, 1>(from, widened<L>(w + o * inputs, memory, 1, inputs), y + o, outputs);
    }
};

template <class T>
struct Prepare {
    template <int L>
    static TRIVIUM_INLINE void run(const T* x, int64_t rows, int64_t inputs, float* wide,
                                   std::vector<float>& turned, Prepared& prepared) {
        prepared = {widened<L>(x, wide, rows, inputs), rows, inputs, (rows + L - 1) / L * L};
        if (rows == 1) return;
        turned.resize(prepared.width * inputs);
        for (int64_t j = 0; j < inputs; ++j)
            for (int64_t i = 0; i < rows; ++i)
                turned[j * prepared.width + i] = prepared.x[i * inputs + j];
        prepared.x = turned.data();
    }
};

// Room for `size` widened numbers: none where they are fp32 already.
std::vector<float> room_for(const float*, int64_t) { return {}; }
std::vector<float> room_for(const BFloat16*, int64_t size) { return std::vector<float>(size); }

}  // namespace

template <class T>
void few_rows_product(const T* x, const T* w, T* y, int64_t rows, int64_t outputs, int64_t inputs,
                      int threads) {
    auto wide = room_for(x, rows * inputs);
    std::vector<float> turned;
    Prepared prepared;
    dispatch<Prepare<T>>(x, rows, inputs, wide.data(), std::ref(turned), std::ref(prepared));
    const int64_t at_a_time = rows == 1 ? FOR_ONE : FOR_MORE;
    const int64_t step = std::max(
        at_a_time, ELEMENTS_PER_TASK / std::max<int64_t>(1, inputs) / at_a_time * at_a_time);
    parallel_for((outputs + step - 1) / step, threads, [&](int64_t task) {
        const int64_t o = task * step;
        auto memory = room_for(w, FOR_MORE * inputs);
        dispatch<Outputs<T>>(prepared, w + o * inputs, y + o, memory.data(),
                             std::min(step, outputs - o), outputs);
    });
}

template void few_rows_product(const float*, const float*, float*, int64_t, int64_t, int64_t, int);
template void few_rows_product(const BFloat16*, const BFloat16*, BFloat16*, int64_t, int64_t,
                               int64_t, int);

}  // namespace trivium
