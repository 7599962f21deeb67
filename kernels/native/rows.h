/* Row by row. Included once for each ELEMENT. */

/* out = (offset + weight) * (x / sqrt(mean(x^2) + eps)); rounded: the second factor is rounded to the type first.
 * x, out: [rows, width], contiguous; weight: [width]. residual, sum: likewise, or both null; x + residual, rounded to
 * the type, is written to sum, and its norm is computed. */
void NAMED(rms_norm)(const ELEMENT *restrict x, const ELEMENT *restrict residual, const ELEMENT *restrict weight,
                     ELEMENT *restrict sum, ELEMENT *restrict out, int64_t rows, int64_t width, float eps,
                     float offset, int rounded) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL_ITEMS)
    for (int64_t row = 0; row < rows; row++) {
        const ELEMENT *in = x + row * width;
        ELEMENT *to = out + row * width;
        if (residual) {
            const ELEMENT *more = residual + row * width;
            ELEMENT *both = sum + row * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) both[i] = STORE(LOAD(in[i]) + LOAD(more[i]));
            in = both;
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += LOAD(in[i]) * LOAD(in[i]);
        float scale = 1.0f / sqrtf(squares / (float)width + eps);
        if (rounded) {
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                to[i] = STORE((offset + LOAD(weight[i])) * LOAD(STORE(LOAD(in[i]) * scale)));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) to[i] = STORE((offset + LOAD(weight[i])) * (LOAD(in[i]) * scale));
        }
    }
}

/* Of each row the place of its largest element, the first of equal ones; -1 where an element is NaN or +inf, or none is
 * above -inf. Bits are compared, in the order of the floats: -NaN, -inf, ..., -0, 0, ..., inf, NaN.
 * x: [rows, width]; row_stride: in elements. */
void NAMED(largest)(const ELEMENT *x, int64_t row_stride, int64_t rows, int64_t width, int64_t *restrict out) {
    const BITS infinity = ORDERED(INFINITE), least = ORDERED(INFINITE | LOWEST);
#pragma omp parallel for schedule(static) if (rows > 1 && rows * width > PARALLEL_ITEMS)
    for (int64_t row = 0; row < rows; row++) {
        const BITS *in = (const BITS *)(x + row * row_stride);
        BITS highest = LOWEST, lowest = ~LOWEST;
        int64_t found = 0;
        for (int64_t start = 0; start < width; start += SEARCHED) {
            int64_t stop = start + SEARCHED < width ? start + SEARCHED : width;
            BITS high = LOWEST, low = lowest;
#pragma omp simd reduction(max : high) reduction(min : low)
            for (int64_t i = start; i < stop; i++) {
                BITS key = ORDERED(in[i]);
                high = key > high ? key : high;
                low = key < low ? key : low;
            }
            lowest = low;
            if (high > highest) {
                highest = high;
                found = start;
            }
        }
        int finite = lowest >= least && highest > least && highest < infinity;
        while (finite && ORDERED(in[found]) != highest) found++;
        out[row] = finite ? found : -1;
    }
}
