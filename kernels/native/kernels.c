/* Fused CPU kernels, for bvec16 and float32. Sums are float32 throughout.
 *
 * Every function has a plain twin in torch operations, and a test that holds both together. Nothing is checked here:
 * callers pass shapes that fit. Threads are OpenMP's, the very pool that torch uses.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define SOME 4          /* query heads that share one pass over keys */
#define MOST_VECTORS 16 /* of sixteen elements in a head */
#define RANKS 64        /* of a program that are shrunk before they are expanded */
#define PARALLEL_ITEMS 32768 /* elements below which one thread is faster than waking the others */
#define SEARCHED 1024   /* elements of a row that are looked through again for the place of the largest */

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float load_bf16(uint16_t value) { return as_float((uint32_t)value << 16); }

/* To the nearest, ties to even; NaN stays NaN. */
static inline uint16_t store_bf16(float value) {
    uint32_t bits = as_bits(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value == value ? (uint16_t)rounded : 0x7fc0;
}

static inline float load_f32(float value) { return value; }
static inline float store_f32(float value) { return value; }

/* A float's bits as a signed integer that is ordered as the floats are; its own inverse. */
#define ORDERED(bits) ((BITS)((bits) ^ (((bits) >> (8 * sizeof(BITS) - 1)) & ~LOWEST)))
typedef int16_t __attribute__((may_alias)) bits_bf16;
typedef int32_t __attribute__((may_alias)) bits_f32;

/* Sixteen neighbours, unaligned. Compilers split them where registers are smaller. */
typedef float vec16 __attribute__((vector_size(64)));
typedef uint32_t uint32x16 __attribute__((vector_size(64)));
typedef uint16_t uint16x16 __attribute__((vector_size(32)));

static inline vec16 load_many_bf16(const uint16_t *from) {
    uint16x16 raw;
    memcpy(&raw, from, sizeof raw);
    return (vec16)(__builtin_convertvector(raw, uint32x16) << 16);
}

static inline vec16 load_many_f32(const float *from) {
    vec16 values;
    memcpy(&values, from, sizeof values);
    return values;
}

static inline vec16 neighbours(vec16 a, vec16 b) { /* sums of pairs of a, then of b */
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* Element j of the result: the sum over vector j. */
static inline vec16 sums_of(vec16 *vectors) {
    UNROLL for (int i = 0; i < 8; i++) vectors[i] = neighbours(vectors[2 * i], vectors[2 * i + 1]);
    UNROLL for (int i = 0; i < 4; i++) vectors[i] = neighbours(vectors[2 * i], vectors[2 * i + 1]);
    UNROLL for (int i = 0; i < 2; i++) vectors[i] = neighbours(vectors[2 * i], vectors[2 * i + 1]);
    return neighbours(vectors[0], vectors[1]);
}

/* Always in one order. */
static inline float sum_of(vec16 values) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) values[i] += values[i + half];
    return values[0];
}

/* exp to 2 units in the last place on [-87, 88], clamped outside; NaN stays NaN. Cephes' expf. */
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = floorf(x * 1.44269504f + 0.5f);
    float f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    int32_t power = (int32_t)(n == n ? n : 0.0f);
    return p * as_float((uint32_t)(power + 127) << 23);
}

/* What a program does at a site: kernels/tables.py. Offsets in elements; add_out -1 for none. Of
   vectors, which are done before, only the room is known here. */
struct operands {
    int64_t a, b, add_out, rank;
    double scale;
    int64_t gain, sine, group, gain_in;
};

static inline int64_t take(int64_t *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

#define PASTE_(name, type) name##_##type
#define PASTE(name, type) PASTE_(name, type)
#define NAMED(name) PASTE(name, TYPE)
#define LOAD NAMED(load)
#define STORE NAMED(store)
#define LOAD_MANY NAMED(load_many)
#define BITS NAMED(bits)
#define LOWEST ((BITS)((BITS)1 << (8 * sizeof(BITS) - 1)))

#define TYPE bf16
#define ELEMENT uint16_t
#define INFINITE ((BITS)0x7f80)
#include "attention.h"
#include "low_rank.h"
#include "rows.h"
#undef TYPE
#undef ELEMENT
#undef INFINITE

#define TYPE f32
#define ELEMENT float
#define INFINITE ((BITS)0x7f800000)
#include "attention.h"
#include "low_rank.h"
#include "rows.h"
