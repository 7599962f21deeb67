/* Paged attention of a few queries over many keys. Included once for each ELEMENT.
 *
 * A page of one head is [page_size, dim], contiguous; ``page``, ``head`` and ``half`` are the elements from a page to
 * the next one, from a head to the next one, and from K to V.
 */

struct NAMED(pages) {
    ELEMENT *data;
    int64_t page, head, half, page_size, heads, dim;
};

/* Put k and v [tokens, heads, dim] at flat slots (page * page_size + place); strides from token and head to the next. */
void NAMED(write_pages)(const struct NAMED(pages) *cache, const ELEMENT *k, int64_t k_token, int64_t k_head,
                        const ELEMENT *v, int64_t v_token, int64_t v_head, const int64_t *slots, int64_t tokens) {
    size_t bytes = cache->dim * sizeof(ELEMENT);
#pragma omp parallel for schedule(static) if (tokens * cache->heads * cache->dim > PARALLEL_ITEMS)
    for (int64_t token = 0; token < tokens; token++) {
        int64_t page = slots[token] / cache->page_size, place = slots[token] % cache->page_size;
        for (int64_t head = 0; head < cache->heads; head++) {
            ELEMENT *to = cache->data + page * cache->page + head * cache->head + place * cache->dim;
            memcpy(to, k + token * k_token + head * k_head, bytes);
            memcpy(to + cache->half, v + token * v_token + head * v_head, bytes);
        }
    }
}

struct NAMED(queries) {
    const ELEMENT *data; /* [tokens, heads, dim] by the strides below; dim is contiguous */
    int64_t token, head, group;
    const int64_t *rows; /* per query: its packed token, its sequence and its position */
    const int32_t *sequences, *positions;
    int64_t count;
    const int32_t *tables; /* [sequences, table_width] page numbers */
    int64_t table_width;
    float scale, softcap; /* softcap: 0 for none */
    int64_t window;       /* 0 for none */
    const float *sinks;   /* [heads] or NULL */
};

/* Of up to SOME query heads that share keys: queries times the scale, the running softmax (Milakov and Gimelshein,
 * 1805.02867) as the largest logit, the sum of exponentials below it, and the values weighted by them. */
struct NAMED(heads) {
    vec16 query[SOME][MOST_VECTORS], sums[SOME][MOST_VECTORS];
    float largest[SOME], total[SOME];
};

/* A sink is a logit without a value. */
INLINE void NAMED(begin)(struct NAMED(heads) *state, const struct NAMED(queries) *queries, const ELEMENT *query,
                         int64_t head, int count, int vectors) {
    for (int g = 0; g < count; g++) {
        state->largest[g] = queries->sinks ? queries->sinks[head + g] : -INFINITY;
        state->total[g] = queries->sinks ? 1.0f : 0.0f;
        for (int i = 0; i < vectors; i++) {
            state->query[g][i] = LOAD_MANY(query + g * queries->head + 16 * i) * queries->scale;
            state->sums[g][i] = (vec16){0};
        }
    }
}

/* logits[g] = the queries times sixteen keys; beyond ``valid`` the last valid one is taken again. */
INLINE void NAMED(score)(const struct NAMED(heads) *state, const ELEMENT *keys, int valid, int count, int vectors,
                         vec16 *logits) {
    vec16 partial[SOME][16];
    for (int j = 0; j < 16; j++) {
        const ELEMENT *key = keys + (j < valid ? j : valid - 1) * 16 * vectors;
        vec16 wide[MOST_VECTORS];
        UNROLL for (int i = 0; i < vectors; i++) wide[i] = LOAD_MANY(key + 16 * i);
        UNROLL for (int g = 0; g < count; g++) {
            vec16 sum = state->query[g][0] * wide[0];
            UNROLL for (int i = 1; i < vectors; i++) sum += state->query[g][i] * wide[i];
            partial[g][j] = sum;
        }
    }
    UNROLL for (int g = 0; g < count; g++) logits[g] = sums_of(partial[g]);
}

/* Logits become weights below the largest so far, 0 beyond ``valid``; what was summed up is scaled to it. */
INLINE void NAMED(weigh)(struct NAMED(heads) *state, vec16 *logits, int valid, float softcap, int count, int vectors) {
    for (int g = 0; g < count; g++) {
        float weights[16], most = state->largest[g], sum = 0;
        memcpy(weights, &logits[g], sizeof weights);
        if (softcap > 0)
            for (int j = 0; j < valid; j++) weights[j] = softcap * tanhf(weights[j] / softcap);
#pragma omp simd reduction(max : most)
        for (int j = 0; j < 16; j++) most = weights[j] > most ? weights[j] : most; /* NaN shows in the sum */
        float kept = state->largest[g] == most ? 1.0f : fast_exp(state->largest[g] - most);
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < 16; j++) {
            weights[j] = j < valid ? fast_exp(weights[j] - most) : 0.0f;
            sum += weights[j];
        }
        memcpy(&logits[g], weights, sizeof weights);
        state->total[g] = state->total[g] * kept + sum;
        state->largest[g] = most;
        if (kept != 1.0f)
            UNROLL for (int i = 0; i < vectors; i++) state->sums[g][i] *= kept;
    }
}

INLINE void NAMED(add_values)(struct NAMED(heads) *state, const ELEMENT *values, const vec16 *weights, int valid,
                              int count, int vectors) {
    vec16 sums[SOME][MOST_VECTORS];
    UNROLL for (int g = 0; g < count; g++)
        UNROLL for (int i = 0; i < vectors; i++) sums[g][i] = state->sums[g][i];
    for (int j = 0; j < valid; j++) {
        const ELEMENT *value = values + j * 16 * vectors;
        UNROLL for (int i = 0; i < vectors; i++) {
            vec16 wide = LOAD_MANY(value + 16 * i);
            UNROLL for (int g = 0; g < count; g++) sums[g][i] += weights[g][j] * wide;
        }
    }
    UNROLL for (int g = 0; g < count; g++)
        UNROLL for (int i = 0; i < vectors; i++) state->sums[g][i] = sums[g][i];
}

/* Sixteen keys and values to come: pages lie far apart, so processors do not ask for the next one by themselves. */
INLINE void NAMED(ask_for)(const ELEMENT *keys, int64_t half, int vectors) {
    for (int64_t i = 0; i < 256 * vectors; i += 64 / (int64_t)sizeof(ELEMENT)) {
        __builtin_prefetch(keys + i);
        __builtin_prefetch(keys + half + i);
    }
}

/* ``count`` query heads from ``head`` on at one position: out [count, 16 * vectors]. count and vectors are constants
 * where it is called, so that sums stay in registers. */
INLINE void NAMED(attend_some)(const struct NAMED(pages) *cache, const struct NAMED(queries) *queries, int64_t query,
                               int64_t head, ELEMENT *restrict out, int count, int vectors) {
    int64_t size = cache->page_size, stop = queries->positions[query] + 1;
    int64_t first = queries->window && stop > queries->window ? stop - queries->window : 0;
    const int32_t *table = queries->tables + queries->sequences[query] * queries->table_width;
    const ELEMENT *data = cache->data + head / queries->group * cache->head;
    struct NAMED(heads) state;
    NAMED(begin)(&state, queries, queries->data + queries->rows[query] * queries->token + head * queries->head, head,
                 count, vectors);
    for (int64_t at = first; at < stop;) { /* up to sixteen keys of one page */
        int64_t in_page = size - at % size, left = stop - at < in_page ? stop - at : in_page;
        int valid = left < 16 ? (int)left : 16;
        const ELEMENT *keys = data + table[at / size] * cache->page + at % size * 16 * vectors;
        if (at + valid < stop)
            NAMED(ask_for)(data + table[(at + valid) / size] * cache->page + (at + valid) % size * 16 * vectors,
                           cache->half, vectors);
        vec16 weights[SOME];
        NAMED(score)(&state, keys, valid, count, vectors, weights);
        NAMED(weigh)(&state, weights, valid, queries->softcap, count, vectors);
        NAMED(add_values)(&state, keys + cache->half, weights, valid, count, vectors);
        at += valid;
    }
    for (int g = 0; g < count; g++) {
        float mean[16 * MOST_VECTORS];
        for (int i = 0; i < vectors; i++) state.sums[g][i] /= state.total[g];
        memcpy(mean, state.sums[g], sizeof(vec16) * vectors);
#pragma omp simd
        for (int i = 0; i < 16 * vectors; i++) out[g * 16 * vectors + i] = STORE(mean[i]);
    }
}

#define CASE(heads, width)                                                                                            \
    case 32 * heads + width:                                                                                          \
        NAMED(attend_some)(cache, queries, query, head, out, heads, width);                                           \
        break;

/* All query heads of one kv head; usual sizes are compiled for themselves. */
static void NAMED(attend_group)(const struct NAMED(pages) *cache, const struct NAMED(queries) *queries, int64_t query,
                                int64_t kv_head, ELEMENT *restrict out) {
    int vectors = (int)cache->dim / 16, most = vectors == 4 ? SOME : vectors == 8 ? 2 : 1, count;
    for (int64_t done = 0; done < queries->group; done += count, out += count * cache->dim) {
        int64_t head = kv_head * queries->group + done, left = queries->group - done;
        count = left < most ? (int)left : most;
        switch (32 * count + vectors) {
            CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(1, 8) CASE(2, 8)
            default: NAMED(attend_some)(cache, queries, query, head, out, 1, vectors);
        }
    }
}

/* out: [tokens, heads, dim], contiguous; the queries' rows of it are written. dim: a multiple of 16, at most 256. */
void NAMED(attend)(const struct NAMED(pages) *cache, const struct NAMED(queries) *queries, ELEMENT *restrict out) {
    int64_t heads = cache->heads, width = queries->group * cache->dim;
#pragma omp parallel for schedule(dynamic, 1) collapse(2) if (queries->count * heads > 1)
    for (int64_t query = 0; query < queries->count; query++)
        for (int64_t head = 0; head < heads; head++)
            NAMED(attend_group)(cache, queries, query, head, out + (queries->rows[query] * heads + head) * width);
}
#undef CASE
