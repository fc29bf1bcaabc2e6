/*
 * Runs cpu_kernel.c over random shapes, and compares it with attention written out in double precision. Linked with one
 * kernel, both compiled with its flags and sanitizers; arguments: a seed, how many shapes, the bound of the error.
 *
 * Sanitizers do not see all vector loads, so that each array ends where memory that no one may touch begins.
 */

#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined BFLOAT16 || defined FLOAT16
typedef uint16_t value_t;
#else
typedef float value_t;
#endif

#define MAX_THREADS 64
#define MAX_PRODUCTS 4e6   /* of a query with a key, so that a shape takes milliseconds */
#define QUERIES_COMPARED 6 /* of each head and image */

int ATTENTION(value_t *attended, const value_t *qkv, const value_t *padding, const value_t *table_h,
              const value_t *table_w, long images, long height, long width, long heads, long dim, long window,
              unsigned threads, void (*parallel)(void (*)(void *), void *, unsigned, unsigned));

static uint64_t state;
static unsigned granted; /* threads, of those asked for */

static uint64_t random_bits(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static long random_between(long low, long high) { return low + (long)(random_bits() % (uint64_t)(high - low + 1)); }

static double number(value_t value) {
#ifdef BFLOAT16
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
#elif defined FLOAT16
    return _cvtsh_ss(value);
#else
    return value;
#endif
}

static value_t random_value(void) {
    float value = 0;
    for (int i = 0; i < 4; i++) value += (float)(random_bits() >> 40) / (float)(1 << 24) - 0.5f;
#ifdef BFLOAT16
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (value_t)(bits >> 16);
#elif defined FLOAT16
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    return value;
#endif
}

/* An array that ends at a page without access, and starts behind one. */
typedef struct {
    value_t *values;
    char *memory;
    size_t size;
} array_t;

static array_t new_array(long count) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = (size_t)count * sizeof(value_t);
    array_t array = {.size = (bytes + page - 1) / page * page + 2 * page};
    array.memory = mmap(NULL, array.size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (array.memory == MAP_FAILED || mprotect(array.memory + page, array.size - 2 * page, PROT_READ | PROT_WRITE)) abort();
    array.values = (value_t *)(array.memory + array.size - page - bytes);
    for (long i = 0; i < count; i++) array.values[i] = random_value();
    return array;
}

typedef struct {
    void (*function)(void *);
    void *argument;
} work_t;

static void *run(void *argument) {
    work_t *work = argument;
    work->function(work->argument);
    return NULL;
}

static void parallel(void (*function)(void *), void *argument, unsigned threads, unsigned flags) {
    (void)flags, (void)threads;
    work_t work = {function, argument};
    pthread_t others[MAX_THREADS];
    for (unsigned i = 1; i < granted; i++)
        if (pthread_create(&others[i], NULL, run, &work)) abort();
    run(&work);
    for (unsigned i = 1; i < granted; i++) pthread_join(others[i], NULL);
}

typedef struct {
    long images, height, width, heads, dim, window;
    array_t qkv, padding, table_h, table_w, attended;
} case_t;

/* Vector `part` (0 query, 1 key, 2 value) of a head of the token at a row and column, or of padding beyond the page. */
static const value_t *vector(const case_t *c, long image, long row, long column, long part, long head) {
    const value_t *token = c->padding.values;
    if (row < c->height && column < c->width)
        token = c->qkv.values + ((image * c->height + row) * c->width + column) * 3 * c->heads * c->dim;
    return token + (part * c->heads + head) * c->dim;
}

static double product(const value_t *left, const value_t *right, long dim) {
    double sum = 0;
    for (long d = 0; d < dim; d++) sum += number(left[d]) * number(right[d]);
    return sum;
}

/* Adds the squared difference of one token's result from the exact one, and the exact one squared. */
static void compare(const case_t *c, long image, long row, long column, long head, double *difference, double *size) {
    long rows = c->window ? c->window : c->height, columns = c->window ? c->window : c->width;
    long top = row / rows * rows, left = column / columns * columns;
    const value_t *query = vector(c, image, row, column, 0, head);
    double *logits = malloc((size_t)(rows * columns) * sizeof *logits), largest = -INFINITY, sum = 0;
    for (long k = 0; k < rows * columns; k++) {
        long h = k / columns, w = k % columns;
        logits[k] = product(query, vector(c, image, top + h, left + w, 1, head), c->dim) / sqrt((double)c->dim) +
                    product(query, c->table_h.values + (row - top - h + rows - 1) * c->dim, c->dim) +
                    product(query, c->table_w.values + (column - left - w + columns - 1) * c->dim, c->dim);
        if (logits[k] > largest) largest = logits[k];
    }
    for (long k = 0; k < rows * columns; k++) sum += logits[k] = exp(logits[k] - largest);
    const value_t *result =
        c->attended.values + (((image * c->height + row) * c->width + column) * c->heads + head) * c->dim;
    for (long d = 0; d < c->dim; d++) {
        double exact = 0;
        for (long k = 0; k < rows * columns; k++)
            exact += logits[k] / sum * number(vector(c, image, top + k / columns, left + k % columns, 2, head)[d]);
        *difference += (number(result[d]) - exact) * (number(result[d]) - exact);
        *size += exact * exact;
    }
    free(logits);
}

static case_t random_case(void) {
    case_t c;
    do {
        c.window = random_between(0, 3) ? random_between(1, 64) : 0;
        c.images = random_between(1, 3);
        c.height = random_between(0, 4) ? random_between(1, 70) : 1;
        c.width = random_between(0, 4) ? random_between(1, 70) : 1;
        if (!random_between(0, 9)) c.width = random_between(200, 700);
        c.heads = random_between(1, 4);
        c.dim = 2 * (random_between(0, 2) ? random_between(1, 40) : random_between(1, 128));
    } while ((double)c.images * c.heads * c.height * c.width *
                 (c.window ? c.window * c.window : c.height * c.width) > MAX_PRODUCTS);
    long channels = c.heads * c.dim, tokens = c.images * c.height * c.width;
    c.qkv = new_array(tokens * 3 * channels);
    c.padding = new_array(3 * channels);
    c.attended = new_array(tokens * channels);
    c.table_h = new_array((2 * (c.window ? c.window : c.height) - 1) * c.dim);
    c.table_w = new_array((2 * (c.window ? c.window : c.width) - 1) * c.dim);
    return c;
}

int main(int count, char **arguments) {
    if (count != 4) return 2;
    state = 0x9E3779B97F4A7C15u ^ (uint64_t)atol(arguments[1]);
    double bound = atof(arguments[3]);
    for (long i = 0; i < atol(arguments[2]); i++) {
        case_t c = random_case();
        unsigned threads = (unsigned)random_between(1, random_between(0, 9) ? 4 : MAX_THREADS);
        granted = (unsigned)random_between(1, threads);
        printf("%ld x %ld x %ld, %ld heads of %ld, window %ld, %u of %u threads", c.images, c.height, c.width, c.heads,
               c.dim, c.window, granted, threads);
        fflush(stdout);
        if (ATTENTION(c.attended.values, c.qkv.values, c.padding.values, c.table_h.values, c.table_w.values, c.images,
                      c.height, c.width, c.heads, c.dim, c.window, threads, parallel))
            return 3;
        double difference = 0, size = 0;
        for (long head = 0; head < c.heads; head++)
            for (long image = 0; image < c.images; image++)
                for (int query = 0; query < QUERIES_COMPARED; query++)
                    compare(&c, image, random_between(0, c.height - 1), random_between(0, c.width - 1), head,
                            &difference, &size);
        double error = sqrt(difference / size);
        printf(": error %.1e\n", error);
        if (!(error <= bound)) return 4;
        array_t *arrays[] = {&c.qkv, &c.padding, &c.attended, &c.table_h, &c.table_w};
        for (int a = 0; a < 5; a++) munmap(arrays[a]->memory, arrays[a]->size);
    }
    return 0;
}
