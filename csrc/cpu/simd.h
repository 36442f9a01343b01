// Several floats at a time, in GCC and Clang vector types: one source for AVX-512, AVX2 and
// whatever else the compiler knows.
//
// A kernel is a struct with a static `run<L>(...)` over vectors of L lanes; dispatch<Kernel>(...)
// runs it in the widest instruction set of this processor. Everything is always_inline: the
// instruction set is that of the function it is inlined into.
#pragma once
#include <cstdint>
#include <cstring>

#define TRIVIUM_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define TRIVIUM_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define TRIVIUM_AVX2 __attribute__((target("avx2,fma")))
#endif

// GCC warns that a wide vector is passed differently with and without AVX; inlined, none is ever
// passed.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace trivium {

struct BFloat16 {
    uint16_t bits;
};

enum class Isa { plain, avx2, avx512 };

// The widest instruction set that this processor and its operating system support, or the one that
// the environment names.
Isa isa();

// L lanes: of fp32, of their bits, of the bits of a 16-bit type. Native registers alone: GCC takes
// wider vectors apart through memory.
template <int L>
struct Lanes;
#define TRIVIUM_LANES(L)                                           \
    template <>                                                    \
    struct Lanes<L> {                                              \
        typedef float Float __attribute__((vector_size(4 * L)));   \
        typedef uint32_t Word __attribute__((vector_size(4 * L))); \
        typedef uint16_t Half __attribute__((vector_size(2 * L))); \
    };
TRIVIUM_LANES(4)
TRIVIUM_LANES(8)
TRIVIUM_LANES(16)
#undef TRIVIUM_LANES

template <int L>
using Floats = typename Lanes<L>::Float;
template <int L>
using Words = typename Lanes<L>::Word;

template <int L>
TRIVIUM_INLINE Floats<L> all(float value) {
    return Floats<L>{} + value;
}

template <int L>
TRIVIUM_INLINE Floats<L> load(const float* p) {
    Floats<L> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <int L>
TRIVIUM_INLINE Floats<L> load(const BFloat16* p) {
    typename Lanes<L>::Half half;
    std::memcpy(&half, p, sizeof half);
    const Words<L> words = __builtin_convertvector(half, Words<L>) << 16;
    return (Floats<L>)words;
}

template <int L>
TRIVIUM_INLINE void store(float* p, Floats<L> v) {
    std::memcpy(p, &v, sizeof v);
}

// v rounded to bf16, to nearest even, in the high half of each word. A NaN stays one: adding to its
// bits could make it infinite.
template <int L>
TRIVIUM_INLINE Words<L> bf16_words(Floats<L> v) {
    const Words<L> word = (Words<L>)v;
    const Words<L> rounded = word + 0x7fffu + ((word >> 16) & 1u);
    const Words<L> is_nan = (Words<L>)(v != v);
    return (rounded & ~is_nan) | (is_nan & 0x7fc00000u);
}

template <int L>
TRIVIUM_INLINE void store(BFloat16* p, Floats<L> v) {
    const auto half = __builtin_convertvector(bf16_words<L>(v) >> 16, typename Lanes<L>::Half);
    std::memcpy(p, &half, sizeof half);
}

// The first n <= L elements, zero beyond them: rows of any length without a scalar twin of each
// loop.
template <int L, class T>
TRIVIUM_INLINE Floats<L> load(const T* p, int64_t n) {
    if (n == L) return load<L>(p);
    T buffer[L] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return load<L>(buffer);
}

template <int L, class T>
TRIVIUM_INLINE void store(T* p, Floats<L> v, int64_t n) {
    if (n == L) return store<L>(p, v);
    T buffer[L];
    store<L>(buffer, v);
    std::memcpy(p, buffer, n * sizeof(T));
}

// The first n lanes of v, zero beyond them.
template <int L>
TRIVIUM_INLINE Floats<L> first(Floats<L> v, int64_t n) {
    if (n == L) return v;
    float buffer[L] = {};
    std::memcpy(buffer, &v, n * sizeof(float));
    return load<L>(buffer);
}

// body(j, n) for the n elements from j on, n = L but for the last ones of `size`.
template <int L, class Body>
TRIVIUM_INLINE void each_vector(int64_t size, const Body& body) {
    int64_t j = 0;
    for (; j + L <= size; j += L) body(j, static_cast<int64_t>(L));
    if (j < size) body(j, size - j);
}

// v as it reads back after a store to memory of type T.
template <int L>
TRIVIUM_INLINE Floats<L> rounded_to(const float*, Floats<L> v) {
    return v;
}
template <int L>
TRIVIUM_INLINE Floats<L> rounded_to(const BFloat16*, Floats<L> v) {
    return (Floats<L>)(bf16_words<L>(v) & 0xffff0000u);
}

template <int L>
TRIVIUM_INLINE float sum(Floats<L> v) {
    float s[L];
    std::memcpy(s, &v, sizeof s);
    for (int width = L / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) s[i] += s[i + width];
    return s[0];
}

template <int L>
TRIVIUM_INLINE Floats<L> larger(Floats<L> a, Floats<L> b) {
    return a > b ? a : b;
}

// Takes a lane of `a` where that of `chosen` is all ones, and of `b` where it is zero: a NaN in the
// other one goes nowhere.
template <int L>
TRIVIUM_INLINE Floats<L> select(Words<L> chosen, Floats<L> a, Floats<L> b) {
    return (Floats<L>)((chosen & (Words<L>)a) | (~chosen & (Words<L>)b));
}

#if defined(__x86_64__)
template <class Kernel, class... A>
TRIVIUM_AVX512 void run_avx512(const A&... a) {
    Kernel::template run<16>(a...);
}
template <class Kernel, class... A>
TRIVIUM_AVX2 void run_avx2(const A&... a) {
    Kernel::template run<8>(a...);
}
#endif

template <class Kernel, class... A>
void dispatch(const A&... a) {
#if defined(__x86_64__)
    if (isa() == Isa::avx512) return run_avx512<Kernel>(a...);
    if (isa() == Isa::avx2) return run_avx2<Kernel>(a...);
#endif
    Kernel::template run<4>(a...);
}

}  // namespace trivium
