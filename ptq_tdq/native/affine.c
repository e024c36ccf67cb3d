/* Quantize and dequantize in one pass over memory, the gradients of both in another, and the errors of many intervals.
 *
 * Plain C with OpenMP, built on demand by library.py. ptq_tdq/affine.py and search.py have the same in torch: the same
 * bits, but for sums, which are added in an order of their own, the same for any number of threads.
 *
 * A tensor is ``groups`` runs of ``each`` values; each run has a scale of its own.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { PIECE = 4096, FEW = 1 << 15 }; /* values in a sum of its own, and for which threads do not pay */

typedef struct {
    int64_t groups, each;
    int64_t each_zero; /* whether zero points are as many as scales, or one */
    int64_t half;      /* whether values are bfloat16 */
    float qmin, qmax;
} Grid;

INLINE float get(const void *values, int64_t i, int half)
{
    if (!half)
        return ((const float *)values)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)values)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void put(void *values, int64_t i, float value, int half)
{
    if (!half) {
        ((float *)values)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16; /* to the nearest, ties to even */
    ((uint16_t *)values)[i] = value == value ? rounded : 0x7FC0;
}

/* clamp(round(u) + zero, qmin, qmax) - zero; NaN stays NaN */
INLINE float level(float u, float zero, float qmin, float qmax)
{
    float code = rintf(u) + zero;
    code = code < qmin ? qmin : code;
    code = code > qmax ? qmax : code;
    return code - zero;
}

INLINE void forward(
    Grid grid, const void *x, float scale, float zero, int64_t from, int64_t to, void *y, float *kept, int half)
{
    float qmin = grid.qmin, qmax = grid.qmax;
    if (kept)
        for (int64_t i = from; i < to; i++) {
            float u = get(x, i, half) / scale;
            kept[i] = u;
            put(y, i, level(u, zero, qmin, qmax) * scale, half);
        }
    else
        for (int64_t i = from; i < to; i++)
            put(y, i, level(get(x, i, half) / scale, zero, qmin, qmax) * scale, half);
}

INLINE float backward(
    Grid grid, const float *kept, float zero, int64_t from, int64_t to, const void *grad, void *grad_x, int half)
{
    float qmin = grid.qmin, qmax = grid.qmax, sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = from; i < to; i++) {
        float q = level(kept[i], zero, qmin, qmax), residual = q - kept[i], slope = get(grad, i, half);
        int outside = fabsf(residual) > 0.5f;
        sum += (outside ? q : residual) * slope;
        put(grad_x, i, outside ? 0 : slope, half);
    }
    return sum;
}

INLINE int64_t pieces_of(Grid grid)
{
    return (grid.each + PIECE - 1) / PIECE;
}

INLINE int64_t end_of(Grid grid, int64_t from, int64_t group)
{
    int64_t end = (group + 1) * grid.each;
    return from + PIECE < end ? from + PIECE : end;
}

/* y = scale (clamp(round(x / scale) + zero, qmin, qmax) - zero); kept, where it is wanted: x / scale */
void fake_quantize(Grid grid, const void *x, const float *scale, const float *zero, void *y, float *kept)
{
    int64_t pieces = pieces_of(grid), all = grid.groups * pieces;
#pragma omp parallel for schedule(static) if (grid.groups * grid.each > FEW)
    for (int64_t part = 0; part < all; part++) {
        int64_t group = part / pieces, from = group * grid.each + part % pieces * PIECE;
        float own = scale[group], middle = zero[grid.each_zero ? group : 0];
        if (grid.half)
            forward(grid, x, own, middle, from, end_of(grid, from, group), y, kept, 1);
        else
            forward(grid, x, own, middle, from, end_of(grid, from, group), y, kept, 0);
    }
}

/* The gradient passes where a value is inside the range; that of a scale is the sum of grad (round(u) - u) inside and
 * of grad (q - zero) outside (LSQ, equation 3). Returns 1 where there is no memory. */
int fake_quantize_gradients(
    Grid grid, const float *kept, const float *zero, const void *grad, void *grad_x, float *grad_scale)
{
    int64_t pieces = pieces_of(grid), all = grid.groups * pieces;
    float *sums = malloc(all * sizeof *sums);
    if (!sums)
        return 1;
#pragma omp parallel for schedule(static) if (grid.groups * grid.each > FEW)
    for (int64_t part = 0; part < all; part++) {
        int64_t group = part / pieces, from = group * grid.each + part % pieces * PIECE;
        float middle = zero[grid.each_zero ? group : 0];
        if (grid.half)
            sums[part] = backward(grid, kept, middle, from, end_of(grid, from, group), grad, grad_x, 1);
        else
            sums[part] = backward(grid, kept, middle, from, end_of(grid, from, group), grad, grad_x, 0);
    }
    for (int64_t group = 0; group < grid.groups; group++) {
        double sum = 0;
        for (int64_t piece = 0; piece < pieces; piece++)
            sum += sums[group * pieces + piece];
        grad_scale[group] = (float)sum;
    }
    free(sums);
    return 0;
}

typedef struct {
    int64_t intervals, groups, each;
    int64_t shared; /* whether all groups are intervals of the same values */
    float qmin, qmax;
    float power; /* more than 2 and less than 4 */
} Search;

/* u^p of u >= 0, to a few bits of float32: u^2 exp2((p - 2) log2(u)). */
INLINE float power_of(float u, float power)
{
    int32_t bits, exponent;
    float part, log, whole, z;
    memcpy(&bits, &u, sizeof bits);
    exponent = (bits - 0x3F3504F3) >> 23; /* u = 2^exponent part, part from sqrt(1/2) to sqrt(2) */
    bits -= exponent * (1 << 23);
    memcpy(&part, &bits, sizeof part);
    part = (part - 1) / (part + 1); /* log(part) = 2 artanh of this */
    z = part * part;
    log = exponent + 2.88539008f * part * (1 + z * (1 / 3.f + z * (1 / 5.f + z * (1 / 7.f))));
    log *= power - 2;
    whole = rintf(log);
    z = 0.693147181f * (log - whole); /* exp(z), from its series */
    z = 1 + z * (1 + z * (1 / 2.f + z * (1 / 6.f + z * (1 / 24.f + z * (1 / 120.f + z * (1 / 720.f))))));
    bits = ((int32_t)whole + 127) * (1 << 23);
    memcpy(&part, &bits, sizeof part);
    return u * u * (part * z);
}

INLINE float piece_error(
    Search search, const float *x, const float *counts, int64_t from, int64_t to, float scale, float zero, float unit)
{
    float qmin = search.qmin, qmax = search.qmax, power = search.power, sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = from; i < to; i++) {
        float error = power_of(fabsf(x[i] - level(x[i] / scale, zero, qmin, qmax) * scale) * unit, power);
        sum += counts ? counts[i] * error : error;
    }
    return sum;
}

/* errors[intervals, groups]: sums of counts (or of 1) times |x - x_hat|^p of each group's values, in units of its size;
 * scale and zero are as many as errors. */
void interval_errors(
    Search search,
    const float *x,
    const float *counts,
    const float *size,
    const float *scale,
    const float *zero,
    float *errors)
{
    int64_t each = search.each, all = search.groups * search.intervals;
#pragma omp parallel for schedule(static) if (all * each > FEW)
    for (int64_t part = 0; part < all; part++) {
        int64_t group = part / search.intervals, place = part % search.intervals * search.groups + group;
        const float *values = x + (search.shared ? 0 : group * each), *own = counts ? counts + group * each : NULL;
        double sum = 0;
        for (int64_t from = 0; from < each; from += PIECE) {
            int64_t to = from + PIECE < each ? from + PIECE : each;
            if (own)
                sum += piece_error(search, values, own, from, to, scale[place], zero[place], 1 / size[group]);
            else
                sum += piece_error(search, values, NULL, from, to, scale[place], zero[place], 1 / size[group]);
        }
        errors[place] = (float)sum;
    }
}
