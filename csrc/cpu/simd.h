// Sixteen floats at a time, in GCC and Clang vector types: one source for AVX-512, AVX2 and whatever else the compiler knows.
// Everything is always_inline: the instruction set is that of the function it is inlined into (see TRIVIUM_DISPATCH).
#pragma once
#include <cstdint>
#include <cstring>

#define TRIVIUM_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define TRIVIUM_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define TRIVIUM_AVX2 __attribute__((target("avx2,fma")))
#endif

// GCC warns that a 64-byte vector is passed differently with and without AVX-512; inlined, none is ever passed.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace trivium {

constexpr int64_t LANES = 16;

typedef float Float16 __attribute__((vector_size(64)));
typedef uint32_t Word16 __attribute__((vector_size(64)));
typedef uint16_t Half16 __attribute__((vector_size(32)));

struct BFloat16 {
    uint16_t bits;
};

enum class Isa { plain, avx2, avx512 };

// The widest instruction set that this processor and its operating system support.
inline Isa isa() {
#if defined(__x86_64__)
    static const Isa found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                     __builtin_cpu_supports("avx512vl")
                                 ? Isa::avx512
                             : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2
                                                                                               : Isa::plain;
    return found;
#else
    return Isa::plain;
#endif
}

TRIVIUM_INLINE void load(Float16& v, const float* p) { std::memcpy(&v, p, sizeof v); }

TRIVIUM_INLINE void load(Float16& v, const BFloat16* p) {
    uint32_t words[LANES];
    for (int i = 0; i < LANES; ++i) words[i] = static_cast<uint32_t>(p[i].bits) << 16;
    std::memcpy(&v, words, sizeof v);
}

TRIVIUM_INLINE void store(float* p, const Float16& v) { std::memcpy(p, &v, sizeof v); }

// v rounded to bf16, to nearest even, in the high half of each word. A NaN stays one: adding to its bits could make it infinite.
TRIVIUM_INLINE Word16 bf16_words(const Float16& v) {
    const Word16 word = (Word16)v;
    const Word16 rounded = word + 0x7fffu + ((word >> 16) & 1u);
    const Word16 is_nan = (Word16)(v != v);
    return (rounded & ~is_nan) | (is_nan & 0x7fc00000u);
}

TRIVIUM_INLINE void store(BFloat16* p, const Float16& v) {
    uint32_t words[LANES];
    const Word16 w = bf16_words(v);
    std::memcpy(words, &w, sizeof words);
    // A loop, as GCC turns this one into a narrowing instruction and takes __builtin_convertvector apart element by element.
    for (int i = 0; i < LANES; ++i) p[i].bits = static_cast<uint16_t>(words[i] >> 16);
}

// v as it reads back after a store to memory of the type that `p` points to.
TRIVIUM_INLINE void round_to(const float*, Float16&) {}
TRIVIUM_INLINE void round_to(const BFloat16*, Float16& v) { v = (Float16)(bf16_words(v) & 0xffff0000u); }

TRIVIUM_INLINE float sum(const Float16& v) {
    float s[LANES];
    std::memcpy(s, &v, sizeof s);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) s[i] += s[i + width];
    return s[0];
}

// The last n < 16 elements of a row, zero beyond them: rows of any length without a scalar twin of each loop.
template <class T>
TRIVIUM_INLINE void load_tail(Float16& v, const T* p, int64_t n) {
    T buffer[LANES] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    load(v, buffer);
}

template <class T>
TRIVIUM_INLINE void store_tail(T* p, const Float16& v, int64_t n) {
    T buffer[LANES];
    store(buffer, v);
    std::memcpy(p, buffer, n * sizeof(T));
}

}  // namespace trivium
