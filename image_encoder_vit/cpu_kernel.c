/*
 * Attention with decomposed relative positions for CPUs with AVX-512 or AVX2, in inference: the logits of a few queries
 * and keys at a time, so that they stay in the cache ("FlashAttention", arXiv 2205.14135), with the bias made beside
 * them and never whole. Windows are read where they lie in the page.
 *
 * hatch_build.py compiles this file for each kind of vectors and each precision, with ATTENTION as the name of what it
 * gives, and BFLOAT16 or FLOAT16 defined for those. Products are summed in float32 in all of them. cpu_kernel.py calls
 * it; attention.py has the same in plain PyTorch.
 *
 * Everything that enters a product is packed into words of 32 bits, one float32 or two neighbouring bfloat16, so that
 * one routine, `multiply`, serves every precision, the logits, the values and the relative positions.
 */

#include "cpu_vectors.h"

#include <stdatomic.h>
#include <stdlib.h>

#define PANEL (2 * LANES)      /* columns of a packed matrix that lie together */
#define KEYS_PER_TILE 256      /* their keys and values stay in the second-level cache */
#define QUERIES_PER_TASK 504   /* at most; 36 or 84 blocks, over which packing a tile of keys is spread */
#define TILE_STRIDE (KEYS_PER_TILE + LANES) /* rows of a power of two would compete for the same lines of the cache */
#define INTERFACE 3            /* of ATTENTION below: cpu_kernel.py calls no other */
#define NO_KEY (-__builtin_inff()) /* the logit beyond the last key, whose weight is zero */
#define LOWEST (-__FLT_MAX__)  /* the maximum before any key; finite, since infinities subtracted give no number */
#define LOG2_E 1.44269504f
#define VECTOR_BYTES 64        /* at most */

/* A call, which all threads share. Grids are in patches. */
typedef struct {
    const value_t *qkv;        /* (images, height, width, 3, heads, dim) */
    const value_t *padding;    /* (3, heads, dim), what windows hold beyond the page; unused without windows */
    value_t *attended;         /* (images, height, width, heads, dim) */
    uint32_t *table_h, *table_w; /* packed by pack_table */
    long height, width, heads, dim;
    long rows, columns;        /* of a region, which is a window or the page: attention stays within it */
    long regions_down, regions_across;
    long queries_per_task, tasks_per_region, tasks;
    char *scratch;             /* one part for each thread */
    size_t scratch_size;       /* of a part */
    atomic_long next_task, next_scratch;
} call_t;

/* Where a thread keeps what a task needs; each part is aligned to a vector. */
typedef struct {
    uint32_t *queries;         /* (blocks, words, ROWS) */
    float *bias_h, *bias_w;    /* (blocks, ROWS, length + slack): the bias by key row and by key column */
    float *output;             /* (blocks, ROWS, dims): the weighted values so far */
    float *maxima;             /* (blocks, ROWS): the largest logit so far */
    float *sums;               /* (blocks, ROWS, LANES): of the weights so far, lane by lane */
    uint32_t *keys, *values;   /* a tile, packed in panels */
    float *logits;             /* (ROWS, TILE_STRIDE) */
    uint32_t *weights;         /* the same, exponentiated and packed */
    float *products;           /* (ROWS, columns of the panels): what queries have in common with a table */
} scratch_t;

INLINE long at_most(long limit, long number) { return number < limit ? number : limit; }
INLINE long ceil_div(long number, long by) { return (number + by - 1) / by; }
INLINE long round_up(long number, long to) { return ceil_div(number, to) * to; }

/* How many words the vectors of a token have, and how many columns its panels. */
INLINE long words_of(const call_t *call) { return call->dim / VALUES_PER_WORD; }
INLINE long dims_of(const call_t *call) { return round_up(call->dim, PANEL); }
/* Biases are read by whole vectors from any key on. */
INLINE long bias_stride(long length) { return round_up(length, LANES) + LANES; }

/*
 * result = keep * result + factor * left . panel, where result is (ROWS, PANEL), left (ROWS, steps) with any strides in
 * words, panel (steps, PANEL). `keep` has a factor for each row, NULL is 1.
 */
INLINE void multiply(float *result, long stride, const float *keep, float factor, const uint32_t *left,
                     long row_stride, long step_stride, const uint32_t *panel, long steps) {
    floats_t low[ROWS], high[ROWS];
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; row++) low[row] = high[row] = all(0);
    for (long step = 0; step < steps; step++, left += step_stride, panel += PANEL) {
        words_t first = load_words(panel), second = load_words(panel + LANES);
#pragma GCC unroll 14
        for (int row = 0; row < ROWS; row++) {
            low[row] = multiply_add(low[row], left[row * row_stride], first);
            high[row] = multiply_add(high[row], left[row * row_stride], second);
        }
    }
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; row++) {
        float *to = result + row * stride;
        floats_t old_low = load(to), old_high = load(to + LANES);
        if (keep) {
            old_low *= keep[row];
            old_high *= keep[row];
        }
        store(to, times_plus(low[row], all(factor), old_low));
        store(to + LANES, times_plus(high[row], all(factor), old_high));
    }
}

/* 2^x by the polynomial that is closest to it between two whole numbers: to 1e-7, for bfloat16 to 8e-5. */
INLINE floats_t exp2_of(floats_t x) {
    floats_t rest = fraction_of(x);
#ifdef BFLOAT16
    floats_t sum = times_plus(all(0.0780235112f), rest, all(0.226067831f));
    sum = times_plus(sum, rest, all(0.695833691f));
    sum = times_plus(sum, rest, all(0.999925156f));
#else
    floats_t sum = times_plus(all(0.00187757056f), rest, all(0.00898935963f));
    sum = times_plus(sum, rest, all(0.0558262962f));
    sum = times_plus(sum, rest, all(0.240153627f));
    sum = times_plus(sum, rest, all(0.693153071f));
    sum = times_plus(sum, rest, all(0.999999925f));
#endif
    return times_power_of_2(sum, x);
}

/* Packs the words of up to LANES vectors as columns: to[word][vector]. Columns without a vector are zero. */
INLINE void pack_columns(uint32_t *to, long stride, const value_t *const *vectors, long count, long words) {
    for (long first = 0; first < words; first += LANES) {
        long steps = at_most(LANES, words - first);
        words_t square[LANES];
#pragma GCC unroll 16
        for (int row = 0; row < LANES; row++)
            square[row] = row < count ? read_words(vectors[row] + first * VALUES_PER_WORD, steps) : (words_t)all(0);
        transpose(square);
#pragma GCC unroll 16
        for (int step = 0; step < LANES; step++)
            if (step < steps) store_words(to + (first + step) * stride, square[step]);
    }
}

/* Packs up to PANEL vectors as the columns of a panel (words, PANEL), to be multiplied by queries. */
INLINE void pack_panel(uint32_t *to, const value_t *const *vectors, long count, long words) {
    pack_columns(to, PANEL, vectors, count, words);
    pack_columns(to + LANES, PANEL, vectors + LANES, count - LANES, words);
}

/* Packs a tile's values into panels of dims, (dims / PANEL, words of keys, PANEL); columns beyond `dim` stay. */
INLINE void pack_values(uint32_t *to, const value_t *const *vectors, long count, long dim) {
    for (long first = 0; first < dim; first += LANES) {
        long dims = at_most(LANES, dim - first);
        uint32_t *at = to + first / PANEL * (KEYS_PER_TILE / VALUES_PER_WORD * PANEL) + first % PANEL;
        for (long key = 0; key < count; key += VALUES_PER_WORD, at += PANEL) {
#if VALUES_PER_WORD == 2
            const value_t *next = key + 1 < count ? vectors[key + 1] + first : NULL;
            store_words(at, read_pairs(vectors[key] + first, next, dims));
#else
            store_words(at, read_words(vectors[key] + first, dims));
#endif
        }
    }
}

INLINE long table_panels(long length) { return ceil_div(2 * length - 1, PANEL); }

/*
 * Packs a table of relative positions (2 * length - 1, dim) in panels, backwards: so a query's products with its keys,
 * whose offsets fall as the keys rise, follow one another.
 */
static void pack_table(uint32_t *to, const value_t *table, long length, const call_t *call) {
    long offsets = 2 * length - 1;
    for (long first = 0; first < offsets; first += PANEL, to += PANEL * words_of(call)) {
        const value_t *vectors[PANEL];
        long count = at_most(PANEL, offsets - first);
        for (long i = 0; i < count; i++) vectors[i] = table + (offsets - 1 - first - i) * call->dim;
        pack_panel(to, vectors, count, words_of(call));
    }
}

/* The bias along one axis of a block of queries at `positions` of it: bias[query][key], key < length. */
static void relative_bias(float *bias, const long *positions, long length, const uint32_t *queries,
                          const uint32_t *table, float *products, long words) {
    long lowest = positions[0], highest = positions[0];
    for (int i = 1; i < ROWS; i++) {
        if (positions[i] < lowest) lowest = positions[i];
        if (positions[i] > highest) highest = positions[i];
    }
    /* The query at position p and key k meet in column length - 1 - p + k of the table. */
    long first = (length - 1 - highest) / PANEL, last = (2 * length - 2 - lowest) / PANEL;
    long columns = (last - first + 1) * PANEL;
    memset(products, 0, (size_t)(ROWS * columns) * sizeof(float));
    for (long panel = first; panel <= last; panel++)
        multiply(products + (panel - first) * PANEL, columns, NULL, 1, queries, 1, ROWS, table + panel * PANEL * words,
                 words);
    for (int i = 0; i < ROWS; i++)
        memcpy(bias + i * bias_stride(length), products + i * columns + length - 1 - positions[i] - first * PANEL,
               (size_t)length * sizeof(float));
}

/* The token at a row and column of the page, or what stands for it beyond. */
INLINE const value_t *token(const call_t *call, long image, long row, long column) {
    if (row >= call->height || column >= call->width) return call->padding;
    return call->qkv + ((image * call->height + row) * call->width + column) * 3 * call->heads * call->dim;
}

/* Writes the bias of a block on the keys of a tile that starts at `row` and `column` of the region. */
INLINE void write_bias(float *logits, const float *bias_h, const float *bias_w, long stride_h, long stride_w,
                       long row, long column, long columns, long keys) {
    for (int i = 0; i < ROWS; i++, logits += TILE_STRIDE, bias_h += stride_h, bias_w += stride_w) {
        long done = 0, run;
        for (long r = row, c = column; done < keys; done += run, r++, c = 0) {
            run = at_most(columns - c, keys - done);
            floats_t of_row = all(bias_h[r]);
            /* The last vector of a run sticks out of it: the next run, or the end of the tile, writes over that. */
            for (long j = 0; j < run; j += LANES)
                store_anywhere(logits + done + j, of_row + load_anywhere(bias_w + c + j));
        }
        for (long j = keys; j < round_up(keys, PANEL); j++) logits[j] = NO_KEY;
    }
}

/*
 * Turns the logits of a block into weights relative to the largest logit so far, and updates that and the sums. `keep`
 * (LANES) is what earlier weights are to be multiplied by.
 */
INLINE void softmax(uint32_t *weights, float *keep, float *maxima, float *sums, const float *logits, long keys) {
    float before[LANES] = {0}, largest[LANES] = {0};
    for (int i = 0; i < ROWS; i++) {
        floats_t lanes = load(logits + i * TILE_STRIDE);
        for (long j = LANES; j < keys; j += LANES) lanes = larger(lanes, load(logits + i * TILE_STRIDE + j));
        largest[i] = largest_of(lanes);
    }
    /* All rows in one vector. */
    memcpy(before, maxima, ROWS * sizeof(float));
    floats_t now = larger(load_anywhere(before), load_anywhere(largest));
    store_anywhere(largest, now);
    memcpy(maxima, largest, ROWS * sizeof(float));
    store_anywhere(keep, exp2_of((load_anywhere(before) - now) * LOG2_E));
    for (int i = 0; i < ROWS; i++, logits += TILE_STRIDE, weights += TILE_STRIDE, sums += LANES) {
        floats_t top = all(largest[i]), sum = load(sums) * keep[i];
        for (long j = 0; j < keys; j += PANEL) {
            /* The difference first: it is exact where it matters, however large the logits are. */
            floats_t first = exp2_of((load(logits + j) - top) * LOG2_E);
            floats_t second = exp2_of((load(logits + j + LANES) - top) * LOG2_E);
            sum += first + second;
            store_as_words(weights + j / VALUES_PER_WORD, first, second);
        }
        store(sums, sum);
    }
}

/* Attends from some queries of one head in one region to all keys of the region. */
static void run_task(const call_t *call, const scratch_t *scratch, long task) {
    long part = task % call->tasks_per_region;
    long head = task / call->tasks_per_region % call->heads;
    long region = task / call->tasks_per_region / call->heads;
    long left = region % call->regions_across * call->columns;
    long top = region / call->regions_across % call->regions_down * call->rows;
    long image = region / call->regions_across / call->regions_down;

    /* Queries are real tokens only; keys are those of the whole region. */
    long real_columns = at_most(call->columns, call->width - left);
    long real_tokens = at_most(call->rows, call->height - top) * real_columns;
    long first_query = part * call->queries_per_task;
    long queries = at_most(call->queries_per_task, real_tokens - first_query);
    long keys = call->rows * call->columns, words = words_of(call), dims = dims_of(call);
    long stride_h = bias_stride(call->rows), stride_w = bias_stride(call->columns);
    if (queries <= 0) return; /* the region ended before */
    long blocks = ceil_div(queries, ROWS);

    for (long block = 0; block < blocks; block++) {
        long rows[ROWS], columns[ROWS];
        const value_t *vectors[LANES];
        for (int i = 0; i < ROWS; i++) {
            long query = at_most(real_tokens - 1, first_query + block * ROWS + i);
            rows[i] = query / real_columns;
            columns[i] = query % real_columns;
            vectors[i] = token(call, image, top + rows[i], left + columns[i]) + head * call->dim;
        }
        uint32_t *packed = scratch->queries + block * ROWS * words;
        pack_columns(packed, ROWS, vectors, ROWS, words);
        relative_bias(scratch->bias_h + block * ROWS * stride_h, rows, call->rows, packed, call->table_h,
                      scratch->products, words);
        relative_bias(scratch->bias_w + block * ROWS * stride_w, columns, call->columns, packed, call->table_w,
                      scratch->products, words);
        for (int i = 0; i < ROWS; i++) scratch->maxima[block * ROWS + i] = LOWEST;
    }
    memset(scratch->output, 0, (size_t)(blocks * ROWS * dims) * sizeof(float));
    memset(scratch->sums, 0, (size_t)(blocks * ROWS * LANES) * sizeof(float));
    memset(scratch->values, 0, (size_t)(KEYS_PER_TILE / VALUES_PER_WORD * dims) * sizeof(uint32_t));

    float scale = 1 / __builtin_sqrtf((float)call->dim);
    for (long first = 0; first < keys; first += KEYS_PER_TILE) {
        long tile = at_most(KEYS_PER_TILE, keys - first);
        const value_t *key_vectors[KEYS_PER_TILE], *value_vectors[KEYS_PER_TILE];
        for (long i = 0; i < tile; i++) {
            long row = (first + i) / call->columns, column = (first + i) % call->columns;
            const value_t *query = token(call, image, top + row, left + column) + head * call->dim;
            key_vectors[i] = query + call->heads * call->dim;
            value_vectors[i] = query + 2 * call->heads * call->dim;
        }
        for (long key = 0; key < tile; key += PANEL)
            pack_panel(scratch->keys + key * words, key_vectors + key, at_most(PANEL, tile - key), words);
        pack_values(scratch->values, value_vectors, tile, call->dim);

        for (long block = 0; block < blocks; block++) {
            long query = block * ROWS;
            float keep[LANES];
            write_bias(scratch->logits, scratch->bias_h + query * stride_h, scratch->bias_w + query * stride_w,
                       stride_h, stride_w, first / call->columns, first % call->columns, call->columns, tile);
            for (long key = 0; key < tile; key += PANEL)
                multiply(scratch->logits + key, TILE_STRIDE, NULL, scale, scratch->queries + query * words, 1, ROWS,
                         scratch->keys + key * words, words);
            softmax(scratch->weights, keep, scratch->maxima + query, scratch->sums + query * LANES, scratch->logits,
                    round_up(tile, PANEL));
            for (long dim = 0; dim < dims; dim += PANEL)
                multiply(scratch->output + query * dims + dim, dims, keep, 1, scratch->weights, TILE_STRIDE, 1,
                         scratch->values + dim * (KEYS_PER_TILE / VALUES_PER_WORD), ceil_div(tile, VALUES_PER_WORD));
        }
    }

    for (long i = 0; i < queries; i++) {
        long row = top + (first_query + i) / real_columns, column = left + (first_query + i) % real_columns;
        long at = (image * call->height + row) * call->width + column;
        value_t *to = call->attended + (at * call->heads + head) * call->dim;
        float share = 1 / sum_of(load(scratch->sums + i * LANES));
        for (long d = 0; d < call->dim; d += LANES)
            write_values(to + d, load(scratch->output + i * dims + d) * share, at_most(LANES, call->dim - d));
    }
}

/* Lays a thread's scratch memory out from the address `memory` on, and returns its size in bytes. */
static size_t lay_out(scratch_t *scratch, uintptr_t memory, const call_t *call) {
    long queries = call->queries_per_task, words = words_of(call), dims = dims_of(call);
    long longest = call->rows > call->columns ? call->rows : call->columns;
    uintptr_t at = memory;
#define PART(pointer, count) \
    pointer = (void *)at;    \
    at += (uintptr_t)round_up((count) * (long)sizeof(*pointer), VECTOR_BYTES)
    PART(scratch->queries, queries * words + LANES); /* the last column is packed by a whole vector */
    PART(scratch->bias_h, queries * bias_stride(call->rows));
    PART(scratch->bias_w, queries * bias_stride(call->columns));
    PART(scratch->output, queries * dims);
    PART(scratch->maxima, queries);
    PART(scratch->sums, queries * LANES);
    PART(scratch->keys, KEYS_PER_TILE * words);
    PART(scratch->values, KEYS_PER_TILE / VALUES_PER_WORD * dims);
    PART(scratch->logits, ROWS * TILE_STRIDE);
    PART(scratch->weights, ROWS * TILE_STRIDE);
    PART(scratch->products, ROWS * table_panels(longest) * PANEL);
#undef PART
    return at - memory;
}

static void run_tasks(void *argument) {
    call_t *call = argument;
    scratch_t scratch;
    size_t part = (size_t)atomic_fetch_add(&call->next_scratch, 1);
    lay_out(&scratch, (uintptr_t)call->scratch + part * call->scratch_size, call);
    for (long task; (task = atomic_fetch_add(&call->next_task, 1)) < call->tasks;) run_task(call, &scratch, task);
}

__attribute__((weak)) const int image_encoder_vit_interface = INTERFACE; /* of all that are linked together */

/*
 * Computes `attended` from `qkv`; all arrays as in call_t, contiguous, the tables (2 * length - 1, dim) for the side of
 * a window, or those of the page where `window` is 0. `dim` is even. `parallel` is GOMP_parallel of the OpenMP library
 * whose threads PyTorch uses: threads of our own would compete with those. Returns -1 where memory is short, else 0.
 */
int ATTENTION(value_t *attended, const value_t *qkv, const value_t *padding, const value_t *table_h,
              const value_t *table_w, long images, long height, long width, long heads, long dim, long window,
              unsigned threads, void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    call_t call = {.qkv = qkv, .padding = padding, .attended = attended};
    call.height = height, call.width = width, call.heads = heads, call.dim = dim;
    call.rows = window ? window : height;
    call.columns = window ? window : width;
    call.regions_down = ceil_div(height, call.rows);
    call.regions_across = ceil_div(width, call.columns);
    long tokens = call.rows * call.columns;
    call.tasks_per_region = ceil_div(tokens, QUERIES_PER_TASK);
    call.queries_per_task = round_up(ceil_div(tokens, call.tasks_per_region), ROWS);
    call.tasks = images * call.regions_down * call.regions_across * heads * call.tasks_per_region;

    scratch_t unused;
    size_t table_h_size = (size_t)(table_panels(call.rows) * PANEL * words_of(&call)) * sizeof(uint32_t);
    size_t table_w_size = (size_t)(table_panels(call.columns) * PANEL * words_of(&call)) * sizeof(uint32_t);
    call.scratch_size = lay_out(&unused, 0, &call);
    char *memory = aligned_alloc(VECTOR_BYTES, table_h_size + table_w_size + threads * call.scratch_size);
    if (!memory) return -1;
    call.table_h = (uint32_t *)memory;
    call.table_w = (uint32_t *)(memory + table_h_size);
    call.scratch = memory + table_h_size + table_w_size;
    pack_table(call.table_h, table_h, call.rows, &call);
    pack_table(call.table_w, table_w, call.columns, &call);
    parallel(run_tasks, &call, threads, 0);
    free(memory);
    return 0;
}
