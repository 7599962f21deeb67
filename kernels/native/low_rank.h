/* Low-rank updates of rows that share few factors: each (row, program) pair reads its own A and B, once, where they lie.
 * Included once for each ELEMENT.
 *
 *     y[row] += sum over the row's programs of scale * (op.scale * (x[row] A^T) B + add_out)
 *
 * in float32, rounded once. Whatever else is in the batch, and however work is split, an element of y is summed in one
 * order: program by program, rank by rank.
 */

struct NAMED(updates) {
    const ELEMENT *arena;         /* what operands are offsets into */
    const struct operands *table; /* [programs, sites of the model] */
    int64_t program;              /* operands from a program to the next */
    const int64_t *rows, *firsts; /* [count], [count + 1]: rows of x and y, and the first pair of each */
    const int64_t *programs;      /* per pair */
    const double *scales;
    int64_t count;
    int64_t threads;
    float *sums; /* [threads, most]; most: at least the group's largest out_features, and a multiple of 16 */
    int64_t most;
    float *xa; /* [ranks]: what rows that are split over threads may use */
    int64_t ranks;
};

struct NAMED(group) {
    const ELEMENT *x; /* [rows, width], contiguous but for the rows' stride */
    int64_t x_row, width, count;
    struct {
        ELEMENT *y;
        int64_t y_row, out, site; /* site: its number in the table */
    } sites[];
};

/* One row at one site. */
struct NAMED(item) {
    const ELEMENT *x;
    ELEMENT *y;
    int64_t width, out, first, stop; /* pairs */
    const struct operands *operands; /* of program 0 */
};

INLINE struct NAMED(item) NAMED(item_of)(const struct NAMED(updates) *all, const struct NAMED(group) *group,
                                         int64_t number) {
    int64_t at = number / group->count, site = number % group->count, row = all->rows[at];
    return (struct NAMED(item)){
        .x = group->x + row * group->x_row,
        .y = group->sites[site].y + row * group->sites[site].y_row,
        .width = group->width,
        .out = group->sites[site].out,
        .first = all->firsts[at],
        .stop = all->firsts[at + 1],
        .operands = all->table + group->sites[site].site,
    };
}

INLINE const struct operands *NAMED(operands_of)(const struct NAMED(updates) *all, const struct NAMED(item) *item,
                                                 int64_t pair) {
    return item->operands + all->programs[pair] * all->program;
}

/* Factors are read once and in order, faster than processors look ahead by themselves across pages. */
#define LINE (64 / (int64_t)sizeof(ELEMENT))
#define BLOCK 32 /* elements of a row between two looks ahead */

INLINE void NAMED(ask)(const ELEMENT *from, int64_t elements) {
    UNROLL for (int64_t i = 0; i < elements; i += LINE) __builtin_prefetch(from + i);
}

/* xa[j] = x . a[j], of ``count`` (a constant) neighbouring rows of A. The rows to come are asked for. */
INLINE void NAMED(dots)(const ELEMENT *restrict x, const ELEMENT *restrict a, int64_t width, int count, float *xa) {
    vec16 sums[4] = {{0}};
    int64_t i = 0;
    for (; i + BLOCK <= width; i += BLOCK) {
        vec16 low = LOAD_MANY(x + i), high = LOAD_MANY(x + i + 16);
        UNROLL for (int j = 0; j < count; j++) {
            const ELEMENT *row = a + j * width + i;
            NAMED(ask)(row + 2 * count * width, BLOCK);
            sums[j] += low * LOAD_MANY(row);
            sums[j] += high * LOAD_MANY(row + 16);
        }
    }
    UNROLL for (int j = 0; j < count; j++) {
        float rest = 0;
        for (int64_t k = i; k < width; k++) rest += LOAD(x[k]) * LOAD(a[j * width + k]);
        xa[j] = sum_of(sums[j]) + rest;
    }
}

/* sums += xa[j] * b[j], in order of j, of ``count`` (a constant) neighbouring rows of B, columns [start, stop). */
INLINE void NAMED(add_rows)(const float *xa, const ELEMENT *restrict b, int64_t out, int64_t start, int64_t stop,
                            int count, float *restrict sums) {
    int64_t i = start;
    for (; i + BLOCK <= stop; i += BLOCK) {
        vec16 low = load_many_f32(sums + i), high = load_many_f32(sums + i + 16);
        UNROLL for (int j = 0; j < count; j++) {
            const ELEMENT *row = b + j * out + i;
            NAMED(ask)(row + 2 * count * out, BLOCK);
            low += xa[j] * LOAD_MANY(row);
            high += xa[j] * LOAD_MANY(row + 16);
        }
        memcpy(sums + i, &low, sizeof low);
        memcpy(sums + i + 16, &high, sizeof high);
    }
    for (; i < stop; i++)
        for (int j = 0; j < count; j++) sums[i] += xa[j] * LOAD(b[j * out + i]);
}

static void NAMED(shrink)(const ELEMENT *x, const ELEMENT *a, int64_t width, int64_t ranks, float scale, float *xa) {
    int64_t j = 0;
    for (; j + 4 <= ranks; j += 4) NAMED(dots)(x, a + j * width, width, 4, xa + j);
    for (; j < ranks; j++) NAMED(dots)(x, a + j * width, width, 1, xa + j);
    for (j = 0; j < ranks; j++) xa[j] *= scale;
}

static void NAMED(expand)(const float *xa, const ELEMENT *b, int64_t out, int64_t start, int64_t stop, int64_t ranks,
                          float *sums) {
    int64_t j = 0;
    for (; j + 4 <= ranks; j += 4) NAMED(add_rows)(xa + j, b + j * out, out, start, stop, 4, sums);
    for (; j < ranks; j++) NAMED(add_rows)(xa + j, b + j * out, out, start, stop, 1, sums);
}

INLINE void NAMED(add_bias)(const ELEMENT *bias, float scale, int64_t start, int64_t stop, float *sums) {
    for (int64_t i = start; i < stop; i++) sums[i] += scale * LOAD(bias[i]);
}

INLINE void NAMED(add_sums)(ELEMENT *restrict y, const float *restrict sums, int64_t start, int64_t stop) {
#pragma omp simd
    for (int64_t i = start; i < stop; i++) y[i] = STORE(LOAD(y[i]) + sums[i]);
}

/* A whole item in one thread: shrink and expand by turns, so that xa stays in the nearest cache. */
static void NAMED(update)(const struct NAMED(updates) *all, const struct NAMED(item) *item, float *sums) {
    float xa[RANKS];
    int64_t width = item->width, out = item->out, touched = 0;
    memset(sums, 0, out * sizeof *sums);
    for (int64_t pair = item->first; pair < item->stop; pair++) {
        const struct operands *op = NAMED(operands_of)(all, item, pair);
        float scale = (float)(all->scales[pair] * op->scale);
        for (int64_t rank = 0; rank < op->rank; rank += RANKS) {
            int64_t ranks = op->rank - rank < RANKS ? op->rank - rank : RANKS;
            const ELEMENT *b = all->arena + op->b + rank * out;
            NAMED(ask)(b, 8 * LINE);
            NAMED(shrink)(item->x, all->arena + op->a + rank * width, width, ranks, scale, xa);
            NAMED(expand)(xa, b, out, 0, out, ranks, sums);
        }
        if (op->add_out >= 0) NAMED(add_bias)(all->arena + op->add_out, (float)all->scales[pair], 0, out, sums);
        touched |= op->rank > 0 || op->add_out >= 0;
    }
    if (touched) NAMED(add_sums)(item->y, sums, 0, out);
}

/* Items are taken in order, the longest first; the start of the next one is asked for before the present one. */
static void NAMED(update_whole)(const struct NAMED(updates) *all, const struct NAMED(group) *group, int threads) {
    int64_t items = all->count * group->count, taken = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *sums = all->sums + omp_get_thread_num() * all->most;
        int64_t now = take(&taken), next;
        for (; now < items; now = next) {
            next = take(&taken);
            if (next < items) {
                struct NAMED(item) item = NAMED(item_of)(all, group, next);
                NAMED(ask)(all->arena + NAMED(operands_of)(all, &item, item.first)->a, 8 * LINE);
            }
            struct NAMED(item) item = NAMED(item_of)(all, group, now);
            NAMED(update)(all, &item, sums);
        }
    }
}

/* One of ``parts`` of the ranks of an item's pairs, for all of its columns: xa. */
static void NAMED(shrink_part)(const struct NAMED(updates) *all, const struct NAMED(item) *item, int64_t part,
                               int64_t parts, float *xa) {
    for (int64_t pair = item->first; pair < item->stop; pair++) {
        const struct operands *op = NAMED(operands_of)(all, item, pair);
        int64_t start = op->rank * part / parts, stop = op->rank * (part + 1) / parts;
        NAMED(shrink)(item->x, all->arena + op->a + start * item->width, item->width, stop - start,
                      (float)(all->scales[pair] * op->scale), xa + start);
        xa += op->rank;
    }
}

/* One of ``parts`` of an item's columns. Parts end where blocks do, so that each column is summed as in ``update``. */
static void NAMED(expand_part)(const struct NAMED(updates) *all, const struct NAMED(item) *item, int64_t part,
                               int64_t parts, const float *xa, float *sums) {
    int64_t blocks = item->out / BLOCK, touched = 0, start = blocks * part / parts * BLOCK;
    int64_t stop = part + 1 == parts ? item->out : blocks * (part + 1) / parts * BLOCK;
    memset(sums + start, 0, (stop - start) * sizeof *sums);
    for (int64_t pair = item->first; pair < item->stop; pair++) {
        const struct operands *op = NAMED(operands_of)(all, item, pair);
        NAMED(expand)(xa, all->arena + op->b, item->out, start, stop, op->rank, sums);
        if (op->add_out >= 0)
            NAMED(add_bias)(all->arena + op->add_out, (float)all->scales[pair], start, stop, sums);
        touched |= op->rank > 0 || op->add_out >= 0;
        xa += op->rank;
    }
    if (touched) NAMED(add_sums)(item->y, sums, start, stop);
}

/* Few items: all threads work on each. Of xa, every item has ``room`` ranks. */
static void NAMED(update_split)(const struct NAMED(updates) *all, const struct NAMED(group) *group, int threads,
                                int64_t room) {
    int64_t parts = threads, items = all->count * group->count;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < items * parts; i++) {
            struct NAMED(item) item = NAMED(item_of)(all, group, i / parts);
            NAMED(shrink_part)(all, &item, i % parts, parts, all->xa + i / parts * room);
        }
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < items * parts; i++) {
            struct NAMED(item) item = NAMED(item_of)(all, group, i / parts);
            NAMED(expand_part)(all, &item, i % parts, parts, all->xa + i / parts * room,
                               all->sums + omp_get_thread_num() * all->most);
        }
    }
}

/* The elements of all factors, and the most ranks that an item has. */
static int64_t NAMED(size_of)(const struct NAMED(updates) *all, const struct NAMED(group) *group, int64_t *most) {
    int64_t elements = *most = 0;
    for (int64_t i = 0; i < all->count * group->count; i++) {
        struct NAMED(item) item = NAMED(item_of)(all, group, i);
        int64_t ranks = 0;
        for (int64_t pair = item.first; pair < item.stop; pair++) ranks += NAMED(operands_of)(all, &item, pair)->rank;
        elements += ranks * (item.width + item.out);
        *most = ranks > *most ? ranks : *most;
    }
    return elements;
}

/* All rows at all sites of a group. */
void NAMED(low_rank)(const struct NAMED(updates) *all, const struct NAMED(group) *group) {
    int64_t items = all->count * group->count, most;
    int threads = (int)all->threads;
    if (threads > 1 && items < 4 * threads) {
        int64_t elements = NAMED(size_of)(all, group, &most);
        if (elements < PARALLEL_ITEMS) {
            threads = 1;
        } else if (most * items <= all->ranks) {
            NAMED(update_split)(all, group, threads, most);
            return;
        }
    }
    NAMED(update_whole)(all, group, threads);
}
#undef LINE
#undef BLOCK
