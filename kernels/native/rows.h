/* Row by row. Included once for each ELEMENT. */

/* out = (offset + weight) * (x / sqrt(mean(x^2) + eps)); rounded: the second factor is rounded to the type first.
 * x, out: [rows, width], contiguous; weight: [width]. */
void NAMED(rms_norm)(const ELEMENT *restrict x, const ELEMENT *restrict weight, ELEMENT *restrict out, int64_t rows,
                     int64_t width, float eps, float offset, int rounded) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL_ITEMS)
    for (int64_t row = 0; row < rows; row++) {
        const ELEMENT *in = x + row * width;
        ELEMENT *to = out + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += LOAD(in[i]) * LOAD(in[i]);
        float scale = 1.0f / sqrtf(sum / (float)width + eps);
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
