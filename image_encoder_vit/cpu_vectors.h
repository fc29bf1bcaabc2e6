/*
 * Vectors of 32-bit words for cpu_kernel.c: by AVX-512 where the compiler is told to use it, else by AVX2.
 *
 * A word is one float32, or two neighbouring bfloat16 where the processor multiplies such pairs. Values of lower
 * precision are spread into float32 as they are read, and rounded as they are written.
 */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__
#define LANES 16               /* words of a vector */
#define ROWS 14                /* queries of a block: with a panel's two vectors, 28 sums, of 32 registers */
typedef __m512 floats_t;
typedef __m512i words_t;
#else
#define LANES 8
#define ROWS 6                 /* 12 sums, of 16 registers */
typedef __m256 floats_t;
typedef __m256i words_t;
#endif

#if defined BFLOAT16 && defined __AVX512BF16__
#define VALUES_PER_WORD 2
#else
#define VALUES_PER_WORD 1
#endif

#if defined BFLOAT16 || defined FLOAT16
typedef uint16_t value_t;
#else
typedef float value_t;
#endif

typedef uint32_t bits_t __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t halves_t __attribute__((vector_size(LANES * sizeof(uint16_t))));

/* Sums, differences and products of vectors are written with C's own operators. */
#ifdef __AVX512F__

INLINE floats_t all(float number) { return _mm512_set1_ps(number); }
INLINE floats_t load(const float *from) { return _mm512_load_ps(from); }
INLINE floats_t load_anywhere(const float *from) { return _mm512_loadu_ps(from); }
INLINE words_t load_words(const uint32_t *from) { return _mm512_load_si512(from); }
INLINE void store(float *to, floats_t numbers) { _mm512_store_ps(to, numbers); }
INLINE void store_anywhere(float *to, floats_t numbers) { _mm512_storeu_ps(to, numbers); }
INLINE void store_words(uint32_t *to, words_t words) { _mm512_storeu_si512(to, words); }
INLINE floats_t times_plus(floats_t left, floats_t right, floats_t sum) { return _mm512_fmadd_ps(left, right, sum); }
INLINE floats_t larger(floats_t left, floats_t right) { return _mm512_max_ps(left, right); }
INLINE float largest_of(floats_t numbers) { return _mm512_reduce_max_ps(numbers); }
INLINE float sum_of(floats_t numbers) { return _mm512_reduce_add_ps(numbers); }

/* What x is above the whole number below it, and `numbers` times 2 to that whole number. */
INLINE floats_t fraction_of(floats_t x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF); }
INLINE floats_t times_power_of_2(floats_t numbers, floats_t x) { return _mm512_scalef_ps(numbers, x); }

INLINE floats_t of_float16(halves_t values) { return _mm512_cvtph_ps((__m256i)values); }
INLINE halves_t to_float16(floats_t numbers) { return (halves_t)_mm512_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT); }

#else

INLINE floats_t all(float number) { return _mm256_set1_ps(number); }
INLINE floats_t load(const float *from) { return _mm256_load_ps(from); }
INLINE floats_t load_anywhere(const float *from) { return _mm256_loadu_ps(from); }
INLINE words_t load_words(const uint32_t *from) { return _mm256_load_si256((const words_t *)from); }
INLINE void store(float *to, floats_t numbers) { _mm256_store_ps(to, numbers); }
INLINE void store_anywhere(float *to, floats_t numbers) { _mm256_storeu_ps(to, numbers); }
INLINE void store_words(uint32_t *to, words_t words) { _mm256_storeu_si256((words_t *)to, words); }
INLINE floats_t times_plus(floats_t left, floats_t right, floats_t sum) { return _mm256_fmadd_ps(left, right, sum); }
INLINE floats_t larger(floats_t left, floats_t right) { return _mm256_max_ps(left, right); }

INLINE float largest_of(floats_t numbers) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(numbers), _mm256_extractf128_ps(numbers, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

INLINE float sum_of(floats_t numbers) {
    __m128 sums = _mm256_castps256_ps128(numbers) + _mm256_extractf128_ps(numbers, 1);
    sums += _mm_movehl_ps(sums, sums);
    return sums[0] + sums[1];
}

/* For x below 128; zero where x is below -126. The larger of two is the second where one is no number. */
INLINE floats_t fraction_of(floats_t x) {
    x = larger(all(-127), x);
    return x - _mm256_floor_ps(x);
}
INLINE floats_t times_power_of_2(floats_t numbers, floats_t x) {
    bits_t exponents = (bits_t)_mm256_cvtps_epi32(_mm256_floor_ps(larger(all(-127), x)));
    return numbers * (floats_t)((exponents + 127) << 23);
}

INLINE floats_t of_float16(halves_t values) { return _mm256_cvtph_ps((__m128i)values); }
INLINE halves_t to_float16(floats_t numbers) { return (halves_t)_mm256_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT); }

#endif

INLINE halves_t load_halves(const uint16_t *from) {
    halves_t halves;
    memcpy(&halves, from, sizeof halves);
    return halves;
}

/* Halves of 16 bits as the lower halves of words. */
INLINE bits_t widened(const uint16_t *from) { return __builtin_convertvector(load_halves(from), bits_t); }

/* LANES values as float32. */
INLINE floats_t spread(const value_t *from) {
#if defined BFLOAT16
    return (floats_t)(widened(from) << 16);
#elif defined FLOAT16
    return of_float16(load_halves(from));
#else
    return load_anywhere(from);
#endif
}

/* Writes `count` numbers, at most LANES, each rounded to the nearest value, ties to even. */
INLINE void write_values(value_t *to, floats_t numbers, long count) {
#if VALUES_PER_WORD == 2
    halves_t values = (halves_t)_mm512_cvtneps_pbh(numbers);
#elif defined BFLOAT16
    /* What is no number stays so: its lower half is zero, as in the values that it came from. */
    bits_t bits = (bits_t)numbers;
    halves_t values = __builtin_convertvector((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, halves_t);
#elif defined FLOAT16
    halves_t values = to_float16(numbers);
#else
    floats_t values = numbers;
#endif
    if (count < LANES)
        memcpy(to, &values, (size_t)count * sizeof(value_t));
    else
        memcpy(to, &values, sizeof values);
}

/* The words of up to LANES * VALUES_PER_WORD values that lie together; zero beyond `count` words. */
INLINE words_t read_words(const value_t *from, long count) {
    value_t some[LANES * VALUES_PER_WORD] = {0};
    if (count < LANES) from = memcpy(some, from, (size_t)(count * VALUES_PER_WORD) * sizeof(value_t));
#if VALUES_PER_WORD == 2
    return _mm512_loadu_si512(from);
#else
    return (words_t)spread(from);
#endif
}

#if VALUES_PER_WORD == 2
/* The words of up to LANES values of one array beside as many of another; NULL is an array of zeros. */
INLINE words_t read_pairs(const value_t *lower, const value_t *upper, long count) {
    value_t some[LANES] = {0}, others[LANES] = {0};
    if (count < LANES) lower = memcpy(some, lower, (size_t)count * sizeof(value_t));
    if (count < LANES && upper) upper = memcpy(others, upper, (size_t)count * sizeof(value_t));
    return (words_t)(widened(lower) | widened(upper ? upper : others) << 16);
}
#endif

/* sum + the products of a word, with each word of a vector. */
INLINE floats_t multiply_add(floats_t sum, uint32_t word, words_t words) {
#if VALUES_PER_WORD == 2
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)word), (__m512bh)words);
#elif defined __AVX512F__
    return times_plus((floats_t)_mm512_set1_epi32((int)word), (floats_t)words, sum);
#else
    return times_plus((floats_t)_mm256_set1_epi32((int)word), (floats_t)words, sum);
#endif
}

/* Packs two vectors of numbers that follow one another, rounded where words are pairs. */
INLINE void store_as_words(uint32_t *to, floats_t first, floats_t second) {
#if VALUES_PER_WORD == 2
    store_words(to, (words_t)_mm512_cvtne2ps_pbh(second, first));
#else
    store_words(to, (words_t)first);
    store_words(to + LANES, (words_t)second);
#endif
}

/* Transposes a square of LANES x LANES words by swapping ever larger blocks across the diagonal. */
INLINE void transpose(words_t square[LANES]) {
#ifdef __AVX512F__
    const words_t lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int side = 1; side < LANES; side *= 2) {
        __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(side));
        words_t next = _mm512_add_epi32(lane, _mm512_set1_epi32(side));
        words_t upper = _mm512_mask_add_epi32(lane, odd, lane, _mm512_set1_epi32(LANES - side));
        words_t lower = _mm512_mask_add_epi32(next, odd, lane, _mm512_set1_epi32(LANES));
#pragma GCC unroll 16
        for (int row = 0; row < LANES; row++) {
            if (row & side) continue;
            words_t first = square[row], second = square[row + side];
            square[row] = _mm512_permutex2var_epi32(first, upper, second);
            square[row + side] = _mm512_permutex2var_epi32(first, lower, second);
        }
    }
#else
    words_t pairs[LANES], fours[LANES]; /* of rows, in one column or in two */
#pragma GCC unroll 4
    for (int row = 0; row < LANES; row += 2) {
        pairs[row] = _mm256_unpacklo_epi32(square[row], square[row + 1]);
        pairs[row + 1] = _mm256_unpackhi_epi32(square[row], square[row + 1]);
    }
#pragma GCC unroll 4
    for (int row = 0; row < LANES; row++) {
        int from = (row & 4) + (row & 2) / 2; /* columns 0, 1, 2, 3 of rows 0 to 3, then of rows 4 to 7 */
        fours[row] = row & 1 ? _mm256_unpackhi_epi64(pairs[from], pairs[from + 2])
                             : _mm256_unpacklo_epi64(pairs[from], pairs[from + 2]);
    }
#pragma GCC unroll 4
    for (int row = 0; row < LANES / 2; row++) {
        square[row] = _mm256_permute2x128_si256(fours[row], fours[row + 4], 0x20);
        square[row + 4] = _mm256_permute2x128_si256(fours[row], fours[row + 4], 0x31);
    }
#endif
}
