/* The passes around the integer products, fused: (norm, activation, rotation,) quantize, pad, upsample. Layout NHWC.
 *
 * Plain C with OpenMP, built on demand by native.py. kernels.py holds the same functions in torch: the reference.
 * Written for the compiler's vectoriser: inner loops run over channels, or over all values of a row.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

/* A float and its bits: compilers make one instruction of the lesser of two integers, several of that of two floats. */
typedef union {
    float f;
    uint32_t bits;
} Number;

/* e^x within 2 ulp, without branches, x in [-87, 87]: x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial for e^r
 * (Cephes expf). The shift rounds x / ln 2 to n, with which the bits of the sum end. */
static inline float raised(float x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23 */
    const Number sum = {x * 1.44269504088896341f + shift};
    const float n = sum.f - shift, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    Number y = {p * r * r + r + 1.0f};
    y.bits += sum.bits << 23;
    return y.f;
}

/* e^x, as if x were in [-87, 87]. */
static inline float exponential(float x) {
    const uint32_t most = 0x42ae0000; /* 87 */
    Number y = {x};
    const uint32_t sign = y.bits & 0x80000000u, size = y.bits & 0x7fffffffu;
    y.bits = sign | (size < most ? size : most);
    return raised(y.f);
}

/* The same of x up to 0. */
static inline float falling(float x) {
    const uint32_t least = 0xc2ae0000; /* -87 */
    Number y = {x};
    y.bits = y.bits < least ? y.bits : least;
    return raised(y.f);
}

enum { NONE, SILU, GELU, GELU_TANH, GELU_SIGMOID }; /* as in ACTIVATIONS of kernels.py */

/* y times the logistic function of u: SiLU where u is y. */
static inline float gated(float y, float u) { return y / (1.0f + exponential(-u)); }

/* y times the normal distribution function (Abramowitz and Stegun 7.1.26, error 1e-7). */
static inline float gelu(float y) {
    const float z = fabsf(y) * 0.70710678118654752f, t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float beyond = 0.5f * p * t * exponential(-z * z);
    return y * (y < 0.0f ? beyond : 1.0f - beyond);
}

static inline __attribute__((always_inline)) float activated(float y, int64_t kind) {
    return kind == SILU        ? gated(y, y)
           : kind == GELU      ? gelu(y)
           : kind == GELU_TANH ? gated(y, y * (1.59576912160573f + 0.0713548162726f * y * y))
                               : gated(y, 1.702f * y);
}

/* y [channels] = activation(x), or x times the activation of the gate [channels]. */
static inline __attribute__((always_inline)) void activate_as(int64_t kind, const float *x, const float *gate,
                                                              int64_t channels, float *restrict y) {
    if (gate)
        for (int64_t c = 0; c < channels; c++) y[c] = x[c] * activated(gate[c], kind);
    else
        for (int64_t c = 0; c < channels; c++) y[c] = activated(x[c], kind);
}

static void activate(int64_t kind, const float *x, const float *gate, int64_t channels, float *y) {
    if (kind == SILU) activate_as(SILU, x, gate, channels, y);
    if (kind == GELU) activate_as(GELU, x, gate, channels, y);
    if (kind == GELU_TANH) activate_as(GELU_TANH, x, gate, channels, y);
    if (kind == GELU_SIGMOID) activate_as(GELU_SIGMOID, x, gate, channels, y);
}

static inline uint8_t code(float y, float scale, float zero_point, float qmax) {
    const float q = rintf(y / scale) + zero_point;
    const int32_t whole = (int32_t)(q > qmax ? qmax : q); /* of what is far below 0 the least that there is */
    return (uint8_t)(whole < 0 ? 0 : whole);
}

#if defined(__AVX512F__)
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));
typedef int32_t lanes __attribute__((vector_size(LANES * sizeof(int32_t))));

/* A vector with its values exchanged, each with that of the lane whose number differs in the bit. */
#if defined(__AVX512F__)
#define OTHER(bit) 0 ^ bit, 1 ^ bit, 2 ^ bit, 3 ^ bit, 4 ^ bit, 5 ^ bit, 6 ^ bit, 7 ^ bit, \
    8 ^ bit, 9 ^ bit, 10 ^ bit, 11 ^ bit, 12 ^ bit, 13 ^ bit, 14 ^ bit, 15 ^ bit
#else
#define OTHER(bit) 0 ^ bit, 1 ^ bit, 2 ^ bit, 3 ^ bit, 4 ^ bit, 5 ^ bit, 6 ^ bit, 7 ^ bit
#endif
#if defined(__clang__)
#define EXCHANGED(y, bit) __builtin_shufflevector(y, y, OTHER(bit))
#else
#define EXCHANGED(y, bit) __builtin_shuffle(y, (lanes){OTHER(bit)})
#endif

static inline float sum_of(vec v) {
#if defined(__AVX512F__)
    v += EXCHANGED(v, 8);
#endif
    v += EXCHANGED(v, 4);
    v += EXCHANGED(v, 2);
    v += EXCHANGED(v, 1);
    return v[0];
}

/* a > b ? a : b, which compilers make many instructions of. */
static inline vec greater(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    const lanes more = a > b;
    return (vec)((more & (lanes)a) | (~more & (lanes)b));
#endif
}

static inline float greatest(vec v) {
#if defined(__AVX512F__)
    v = greater(EXCHANGED(v, 8), v);
#endif
    v = greater(EXCHANGED(v, 4), v);
    v = greater(EXCHANGED(v, 2), v);
    v = greater(EXCHANGED(v, 1), v);
    return v[0];
}

enum { RUN = LANES }; /* vectors that are transformed in registers */

/* The Hadamard transform of `count` vectors of y. */
static inline __attribute__((always_inline)) void transform_run(float *y, int count) {
    vec run[RUN], sign[4];
    for (int s = 0; s < 4; s++)
        for (int i = 0; i < LANES; i++) sign[s][i] = i >> s & 1 ? -1.0f : 1.0f;
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) {
        vec v = *(const vec *)(y + i * LANES);
        v = EXCHANGED(v, 1) + v * sign[0];
        v = EXCHANGED(v, 2) + v * sign[1];
        v = EXCHANGED(v, 4) + v * sign[2];
#if defined(__AVX512F__)
        v = EXCHANGED(v, 8) + v * sign[3];
#endif
        run[i] = v;
    }
#pragma GCC unroll 4
    for (int width = 1; width < count; width *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < count; i++)
            if (!(i & width)) {
                const vec low = run[i], high = run[i + width];
                run[i] = low + high;
                run[i + width] = low - high;
            }
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) *(vec *)(y + i * LANES) = run[i];
}

static void transform_runs(float *y, int64_t channels, int count) {
    for (int64_t start = 0; start < channels; start += count * LANES) {
        if (count == 1) transform_run(y + start, 1);
        if (count == 2) transform_run(y + start, 2);
        if (count == 4) transform_run(y + start, 4);
        if (count == 8) transform_run(y + start, 8);
        if (count == 16) transform_run(y + start, RUN);
    }
}

/* The Hadamard transform of each run of `block` values of y [channels]. */
static void hadamard(float *y, int64_t channels, int64_t block) {
    int64_t width = block % LANES ? 1 : block < RUN * LANES ? block : RUN * LANES;
    if (width > 1) transform_runs(y, channels, (int)(width / LANES));
    for (; width < block; width *= 2)
        for (int64_t start = 0; start < channels; start += 2 * width)
            for (int64_t i = start; i < start + width; i++) {
                const float low = y[i], high = y[i + width];
                y[i] = low + high;
                y[i + width] = low - high;
            }
}

/* y [channels] times diag(signs), then (I - 2/blocks 11^T) (x) Hadamard / sqrt(block): rotated() of rotate.py. */
static void rotate_row(float *y, const float *signs, int64_t channels) {
    enum { STRIP = 64 };
    const int64_t block = channels & -channels, blocks = channels / (block ? block : 1);
    const float share = 2.0f / (float)blocks, gain = 1.0f / sqrtf((float)block);
    for (int64_t i = 0; i < channels; i++) y[i] *= signs[i] * gain;
    hadamard(y, channels, block);
    for (int64_t first = 0; blocks > 1 && first < block; first += STRIP) {
        const int64_t last = first + STRIP < block ? first + STRIP : block;
        float sums[STRIP] = {0};
        for (int64_t start = 0; start < channels; start += block)
            for (int64_t i = first; i < last; i++) sums[i - first] += y[start + i] * share;
        for (int64_t start = 0; start < channels; start += block)
            for (int64_t i = first; i < last; i++) y[start + i] -= sums[i - first];
    }
}

void rotate(const float *x, const float *signs, int64_t rows, int64_t channels, float *out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float *y = out + row * channels;
        memcpy(y, x + row * channels, (size_t)channels * sizeof(float));
        rotate_row(y, signs, channels);
    }
}

/* What to do with a batch of images: sizes, the channel range to read, and the frame of the output. */
typedef struct {
    int64_t batch, height, width;
    int64_t channels, stride, first;       /* channels to take, channels of x in memory, the first one taken */
    int64_t pitch;                         /* channels of the output in memory; those beyond the range hold 0 */
    int64_t top, left, bottom, right, up;  /* padding with the zero point, and the factor of nearest upsampling */
    int64_t each;                          /* 1: a scale and zero point for each image, 0: one for all */
    int64_t activation, is_gated;          /* of as many channels, after which those of the gate are in x */
    const float *signs;                    /* of the rotation, or NULL */
    float qmax;
} Frame;

/* y [channels] = what is quantized of one pixel: normed (a, b), activated, rotated, or times a gain (a alone). */
static void prepare(const Frame *f, const float *pixel, const float *a, const float *b, float *y) {
    const int64_t channels = f->channels;
    if (b)
        for (int64_t c = 0; c < channels; c++) y[c] = pixel[c] * a[c] + b[c];
    if (f->activation)
        activate(f->activation, b ? y : pixel, f->is_gated ? pixel + channels : NULL, channels, y);
    else if (!b)
        memcpy(y, pixel, (size_t)channels * sizeof(float));
    if (f->signs) rotate_row(y, f->signs, channels);
    if (a && !b)
        for (int64_t c = 0; c < channels; c++) y[c] *= a[c];
}

/* memset, which takes its time for nothing too. */
static inline void fill(uint8_t *to, int value, int64_t bytes) {
    if (bytes) memset(to, value, (size_t)bytes);
}

/* One row of pixels, of which only the channel range is quantized; a, b are the affine of the norm, a alone a gain. */
static void quantize_row(const Frame *f, const float *x, const float *a, const float *b, float scale, float zero_point,
                         float *work, uint8_t *out) {
    const int64_t channels = f->channels; /* bytes of out might be those of f: what loops need of it is read before */
    const float qmax = f->qmax;
    const int with_silu = f->activation == SILU && b, prepared = f->signs || (f->activation && !with_silu);
    if (!a && !prepared && f->up == 1 && f->stride == channels && f->pitch == channels) { /* all pixels at once */
        const int64_t values = f->width * channels;
        for (int64_t i = 0; i < values; i++) out[i] = code(x[i], scale, zero_point, qmax);
        return;
    }
    for (int64_t w = 0; w < f->width; w++) {
        const float *pixel = x + w * f->stride + f->first;
        uint8_t *to = out + w * f->up * f->pitch;
        if (prepared) prepare(f, pixel, a, b, work);
        if (prepared)
            for (int64_t c = 0; c < channels; c++) to[c] = code(work[c], scale, zero_point, qmax);
        else if (with_silu)
            for (int64_t c = 0; c < channels; c++) {
                const float y = pixel[c] * a[c] + b[c];
                to[c] = code(gated(y, y), scale, zero_point, qmax);
            }
        else if (b)
            for (int64_t c = 0; c < channels; c++) to[c] = code(pixel[c] * a[c] + b[c], scale, zero_point, qmax);
        else if (a)
            for (int64_t c = 0; c < channels; c++) to[c] = code(pixel[c] * a[c], scale, zero_point, qmax);
        else
            for (int64_t c = 0; c < channels; c++) to[c] = code(pixel[c], scale, zero_point, qmax);
        fill(to + channels, 0, f->pitch - channels);
        for (int64_t copy = 1; copy < f->up; copy++) memcpy(to + copy * f->pitch, to, (size_t)f->pitch);
    }
}

/* Quantize all images; affine is [batch, 2, channels] (a, then b) or NULL, gain [channels] or NULL. Returns 0, or 1
 * without memory. */
static int quantize_images(const Frame *f, const float *x, const float *affine, const float *gain, const float *scale,
                           const int32_t *zero_point, uint8_t *out) {
    const int64_t out_width = f->left + f->width * f->up + f->right, row = out_width * f->pitch;
    const int64_t out_height = f->top + f->height * f->up + f->bottom;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *work = malloc((size_t)f->channels * sizeof(float));
        failed = !work;
#pragma omp for collapse(2) schedule(static)
        for (int64_t n = 0; n < f->batch; n++)
            for (int64_t h = 0; h < f->height; h++) {
                if (!work) continue;
                const float *a = affine ? affine + n * 2 * f->channels : gain;
                uint8_t *image = out + n * out_height * row, *to = image + (f->top + h * f->up) * row;
                const int zero = zero_point[n * f->each];
                fill(to, zero, f->left * f->pitch);
                quantize_row(f, x + (n * f->height + h) * f->width * f->stride, a, affine ? a + f->channels : NULL,
                             scale[n * f->each], (float)zero, work, to + f->left * f->pitch);
                fill(to + (f->left + f->width * f->up) * f->pitch, zero, f->right * f->pitch);
                for (int64_t copy = 1; copy < f->up; copy++) memcpy(to + copy * row, to, (size_t)row);
                if (h == 0) fill(image, zero, f->top * row);
                if (h == f->height - 1) fill(image + (out_height - f->bottom) * row, zero, f->bottom * row);
            }
        free(work);
    }
    return failed;
}

int quantize(const Frame *f, const float *x, const float *gain, const float *scale, const int32_t *zero_point,
             uint8_t *out) {
    return quantize_images(f, x, NULL, gain, scale, zero_point, out);
}

/* Group norm of x (+ shift [batch, channels] or NULL) as y = a x + b for each image and channel: affine [batch, 2, C]. */
static void group_affine(const Frame *f, const float *x, const float *shift, const float *weight, const float *bias,
                         int64_t groups, float epsilon, double *sums, float *affine) {
    const int64_t channels = f->channels, size = channels / groups, pixels = f->height * f->width;
    memset(sums, 0, (size_t)(f->batch * 2 * channels) * sizeof(double));
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < f->batch; n++) {
        double *sum = sums + n * 2 * channels, *square = sum + channels;
        const float *image = x + n * pixels * channels;
        for (int64_t begin = 0; begin < pixels; begin += 64) { /* whose sums are float32 */
            const int64_t end = begin + 64 < pixels ? begin + 64 : pixels;
            for (int64_t first = 0; first < channels; first += 32) {
                float s[32] = {0}, q[32] = {0};
                const int64_t count = channels - first < 32 ? channels - first : 32;
                if (count == 32)
                    for (int64_t p = begin; p < end; p++)
                        for (int c = 0; c < 32; c++) {
                            float v = image[p * channels + first + c];
                            s[c] += v;
                            q[c] += v * v;
                        }
                else
                    for (int64_t p = begin; p < end; p++)
                        for (int64_t c = 0; c < count; c++) {
                            float v = image[p * channels + first + c];
                            s[c] += v;
                            q[c] += v * v;
                        }
                for (int64_t c = 0; c < count; c++) {
                    sum[first + c] += s[c];
                    square[first + c] += q[c];
                }
            }
        }
        float *a = affine + n * 2 * channels, *b = a + channels;
        for (int64_t g = 0; g < groups; g++) {
            double total = 0, squares = 0;
            for (int64_t c = g * size; c < (g + 1) * size; c++) {
                double d = shift ? shift[n * channels + c] : 0.0; /* sums of x + d from those of x */
                total += sum[c] + (double)pixels * d;
                squares += square[c] + 2 * d * sum[c] + (double)pixels * d * d;
            }
            const double count = (double)(pixels * size), mean = total / count;
            const double variance = squares / count - mean * mean;
            const double inverse = 1.0 / sqrt((variance > 0 ? variance : 0) + epsilon);
            for (int64_t c = g * size; c < (g + 1) * size; c++) {
                const double d = shift ? shift[n * channels + c] : 0.0, gain = weight[c] * inverse;
                a[c] = (float)gain;
                b[c] = (float)((d - mean) * gain + bias[c]);
            }
        }
    }
}

/* Returns 0, or 1 without memory. */
int norm_quantize(const Frame *f, const float *x, const float *shift, const float *weight, const float *bias,
                  int64_t groups, float epsilon, const float *scale, const int32_t *zero_point, uint8_t *out) {
    const size_t count = (size_t)(f->batch * 2 * f->channels);
    double *sums = malloc(count * sizeof(double));
    float *affine = malloc(count * sizeof(float));
    int failed = !sums || !affine;
    if (!failed) {
        group_affine(f, x, shift, weight, bias, groups, epsilon, sums, affine);
        failed = quantize_images(f, x, affine, NULL, scale, zero_point, out);
    }
    free(sums);
    free(affine);
    return failed;
}

/* sums [rows] of x [rows, channels] times codes [channels], each of which becomes a float once for all rows: 1 or 4. */
static inline __attribute__((always_inline)) void dots(const float *x, const int8_t *codes, int64_t channels, int rows,
                                                       float *sums) {
    const int apart = 4 / rows; /* vectors of a row that are added up each for itself: four chains of sums in all */
    vec part[4] = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= channels; i += 4 * LANES) {
        float weights[4 * LANES];
        for (int l = 0; l < 4 * LANES; l++) weights[l] = codes[i + l];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const vec values = *(const vec *)(x + r * channels + i + k * LANES);
                part[r * apart + k % apart] += values * *(const vec *)(weights + k * LANES);
            }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        vec all = part[r * apart];
        for (int k = 1; k < apart; k++) all += part[r * apart + k];
        sums[r] = sum_of(all);
        for (int64_t j = i; j < channels; j++) sums[r] += x[r * channels + j] * (float)codes[j];
    }
}

/* out [rows, outputs] = (x [rows, channels] times codes [outputs, channels]) scale + bias (or NULL). */
void weight_only(const float *x, const int8_t *codes, const float *scale, const float *bias, int64_t rows,
                 int64_t channels, int64_t outputs, float *out) {
#pragma omp parallel for schedule(static)
    for (int64_t o = 0; o < outputs; o++) {
        const int8_t *of_output = codes + o * channels;
        for (int64_t row = 0, some; row < rows; row += some) {
            float sums[4];
            some = rows - row < 4 ? 1 : 4;
            if (some == 4)
                dots(x + row * channels, of_output, channels, 4, sums);
            else
                dots(x + row * channels, of_output, channels, 1, sums);
            for (int64_t r = 0; r < some; r++)
                out[(row + r) * outputs + o] = sums[r] * scale[o] + (bias ? bias[o] : 0.0f);
        }
    }
}

/* A convolution of padded codes [batch, in_height, in_width, channels], channels a multiple of 4, with weights
 * [blocks of outputs][kernel positions x channels / group][BLOCK outputs][group channels]: signed bytes, or unsigned
 * nibbles (low first) of which weight_zero [outputs] is subtracted. weight_sum [outputs] are the sums of the signed
 * weights. weight_* and bias have BLOCK entries for each block, whatever the number of outputs is. BLOCK and the group
 * are what suits the processor; block_outputs and group_channels tell the caller. Scale and zero point are one for all
 * (each = 0), those of an image (1) or those of an output pixel (2). */
typedef struct {
    int64_t batch, in_height, in_width, channels, out_height, out_width, outputs;
    int64_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width;
    int64_t nibbles, each;
    const uint8_t *weights;
    const int8_t *weight_zero;
    const int32_t *weight_sum;
    const float *weight_scale, *bias;
} Convolution;

/* One block of weights, of nibbles or of bytes, and one image. Codes have 16 bits where the processor WIDENs them for
 * weights of 8 bits. Nibbles become bytes, less their zero points, before the products where it UNPACKs them, or where
 * MANY pixels share that: units that multiply may be those that unpack (Intel), or others (AMD). */
typedef struct {
    const void *codes, *weights;
    const int8_t *weight_zero;
    int64_t nibbles;
} Operands;

enum { MANY = 128 };

/* Where the codes of a kernel position begin, counted from those of the first position. */
static inline int64_t offset(const Convolution *c, int64_t kh, int64_t kw) {
    return (kh * c->dilation_height * c->in_width + kw * c->dilation_width) * c->channels;
}

/* tile, once for each kind of processor: the sums of a block, of which so many outputs are wanted, at PIXELS pixels,
 * whose codes begin at[pixel]; what codes beside weights of 8 bits are kept in there. corrected_tile, for weights of 8
 * bits: sum + more[pixel] - less[output] as floats, the pixels `step` apart. */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define INSTRUCTIONS "AVX512-VNNI"

enum { PIXELS = 8, BLOCK = 32, NIBBLE_GROUP = 4, BYTE_GROUP = 4, UNPACK = 0, WIDEN = 0 };
typedef uint8_t Wide;

static inline __m512i nibble_weights(const uint8_t *from, __m512i zero) {
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)from));
    const __m512i codes = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi8(15));
    return _mm512_sub_epi8(codes, zero);
}

/* The zero points of 16 outputs, each beside its 4 channels. */
static inline __m512i nibble_zeros(const int8_t *weight_zero) {
    const __m512i first = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)weight_zero));
    return _mm512_shuffle_epi8(first, _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
}

/* Nibbles of one block -> size bytes, less the zero points. */
#define UNPACKED
static void unpack(const uint8_t *from, const int8_t *weight_zero, int64_t size, int8_t *to) {
    const __m512i low = nibble_zeros(weight_zero), high = nibble_zeros(weight_zero + 16);
    for (const int8_t *end = to + size; to < end; to += 128, from += 64) {
        _mm512_storeu_si512(to, nibble_weights(from, low));
        _mm512_storeu_si512(to + 64, nibble_weights(from + 32, high));
    }
}

/* 8 pixels x 1 or 2 vectors of 16 outputs: 16 of the 32 registers. */
static inline __attribute__((always_inline)) void vnni_sums(const Convolution *c, const Operands *o, int nibbles,
                                                            int vectors, const int64_t at[PIXELS],
                                                            __m512i sum[PIXELS][2]) {
    const uint8_t *weights = o->weights, *from[PIXELS];
    const int64_t bytes = nibbles ? 32 : 64;
    __m512i zero[2];
#pragma GCC unroll 2
    for (int l = 0; l < vectors; l++) zero[l] = nibble_zeros(o->weight_zero + l * 16);
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; p++) {
        from[p] = (const uint8_t *)o->codes + at[p];
        sum[p][0] = sum[p][1] = _mm512_setzero_si512();
    }
    for (int64_t kh = 0; kh < c->kernel_height; kh++)
        for (int64_t kw = 0; kw < c->kernel_width; kw++) {
            const int64_t start = offset(c, kh, kw);
            for (int64_t i = start; i < start + c->channels; i += 4, weights += 2 * bytes) {
                __m512i w[2];
#pragma GCC unroll 2
                for (int l = 0; l < vectors; l++)
                    w[l] = nibbles ? nibble_weights(weights + l * bytes, zero[l]) : _mm512_loadu_si512(weights + l * bytes);
#pragma GCC unroll 8
                for (int p = 0; p < PIXELS; p++) {
                    int32_t four;
                    memcpy(&four, from[p] + i, 4);
                    const __m512i q = _mm512_set1_epi32(four);
#pragma GCC unroll 2
                    for (int l = 0; l < vectors; l++) sum[p][l] = _mm512_dpbusd_epi32(sum[p][l], q, w[l]);
                }
            }
        }
}

static inline __attribute__((always_inline)) void vnni_tile(const Convolution *c, const Operands *o, int nibbles,
                                                            int vectors, const int64_t at[PIXELS],
                                                            int32_t out[PIXELS][BLOCK]) {
    __m512i sum[PIXELS][2];
    vnni_sums(c, o, nibbles, vectors, at, sum);
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 2
        for (int l = 0; l < vectors; l++) _mm512_storeu_si512(out[p] + l * 16, sum[p][l]);
}

static void tile(const Convolution *c, const Operands *o, int64_t outputs, const int64_t at[PIXELS],
                 int32_t out[PIXELS][BLOCK]) {
    if (o->nibbles)
        outputs <= 16 ? vnni_tile(c, o, 1, 1, at, out) : vnni_tile(c, o, 1, 2, at, out);
    else
        outputs <= 16 ? vnni_tile(c, o, 0, 1, at, out) : vnni_tile(c, o, 0, 2, at, out);
}

static inline __attribute__((always_inline)) void vnni_corrected(const Convolution *c, const Operands *o, int vectors,
                                                                 const int64_t at[PIXELS], const uint32_t more[PIXELS],
                                                                 const uint32_t less[BLOCK], int64_t step, float *out) {
    __m512i sum[PIXELS][2];
    vnni_sums(c, o, 0, vectors, at, sum);
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 2
        for (int l = 0; l < vectors; l++) {
            const __m512i apart = _mm512_sub_epi32(sum[p][l], _mm512_loadu_si512(less + l * 16));
            const __m512i all = _mm512_add_epi32(apart, _mm512_set1_epi32((int32_t)more[p]));
            _mm512_storeu_ps(out + p * step + l * 16, _mm512_cvtepi32_ps(all));
        }
}

#define CORRECTED
static void corrected_tile(const Convolution *c, const Operands *o, int64_t outputs, const int64_t at[PIXELS],
                           const uint32_t more[PIXELS], const uint32_t less[BLOCK], int64_t step, float *out) {
    outputs <= 16 ? vnni_corrected(c, o, 1, at, more, less, step, out)
                  : vnni_corrected(c, o, 2, at, more, less, step, out);
}

#elif defined(__AVX2__)
#define INSTRUCTIONS "AVX2"

enum { PIXELS = 6, BLOCK = 16, NIBBLE_GROUP = 4, BYTE_GROUP = 2, UNPACK = 1, WIDEN = 1 };
typedef uint16_t Wide;

/* 8 outputs, 4 channels times groups (at most 4): |w| <= 15, so 8 products, two at a time, add up exactly in 16 bits. */
static inline __attribute__((always_inline)) void narrow_step(const uint8_t *const from[PIXELS], int64_t i,
                                                              const int8_t *weights, int groups, __m256i sum[PIXELS]) {
    __m256i w[4];
#pragma GCC unroll 4
    for (int g = 0; g < groups; g++) w[g] = _mm256_loadu_si256((const __m256i *)(weights + g * 4 * BLOCK));
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; p++) {
        __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) {
            int32_t four;
            memcpy(&four, from[p] + i + 4 * g, 4);
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(_mm256_set1_epi32(four), w[g]));
        }
        sum[p] = _mm256_add_epi32(sum[p], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
}

/* Weights of 4 bits: 6 sums of 8 outputs and 4 vectors of weights, in 16 registers. */
static void narrow_tile(const Convolution *c, const Operands *o, const int64_t at[PIXELS], int32_t out[PIXELS][BLOCK]) {
    const uint8_t *from[PIXELS];
    for (int p = 0; p < PIXELS; p++) from[p] = (const uint8_t *)o->codes + at[p];
    for (int half = 0; half < BLOCK; half += 8) {
        const int8_t *weights = (const int8_t *)o->weights + half * 4;
        __m256i sum[PIXELS];
#pragma GCC unroll 8
        for (int p = 0; p < PIXELS; p++) sum[p] = _mm256_setzero_si256();
        for (int64_t kh = 0; kh < c->kernel_height; kh++)
            for (int64_t kw = 0; kw < c->kernel_width; kw++) {
                int64_t i = offset(c, kh, kw);
                const int64_t end = i + c->channels;
                for (; i + 16 <= end; i += 16, weights += 16 * BLOCK) narrow_step(from, i, weights, 4, sum);
                for (; i < end; i += 4, weights += 4 * BLOCK) narrow_step(from, i, weights, 1, sum);
            }
#pragma GCC unroll 8
        for (int p = 0; p < PIXELS; p++) _mm256_storeu_si256((__m256i *)(out[p] + half), sum[p]);
    }
}

/* Weights of 8 bits: 6 x 2 sums of 8 outputs; the products are of 16 bits, since pairs of 8 bits would not fit there. */
static void wide_tile(const Convolution *c, const Operands *o, const int64_t at[PIXELS], int32_t out[PIXELS][BLOCK]) {
    const int8_t *weights = o->weights;
    const uint16_t *from[PIXELS];
    __m256i sum[PIXELS][2];
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; p++) {
        from[p] = (const uint16_t *)o->codes + at[p];
        sum[p][0] = sum[p][1] = _mm256_setzero_si256();
    }
    for (int64_t kh = 0; kh < c->kernel_height; kh++)
        for (int64_t kw = 0; kw < c->kernel_width; kw++) {
            const int64_t start = offset(c, kh, kw);
            for (int64_t i = start; i < start + c->channels; i += 2, weights += 2 * BLOCK) {
                const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)weights));
                const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(weights + BLOCK)));
#pragma GCC unroll 8
                for (int p = 0; p < PIXELS; p++) {
                    int32_t two;
                    memcpy(&two, from[p] + i, 4);
                    const __m256i q = _mm256_set1_epi32(two);
                    sum[p][0] = _mm256_add_epi32(sum[p][0], _mm256_madd_epi16(q, low));
                    sum[p][1] = _mm256_add_epi32(sum[p][1], _mm256_madd_epi16(q, high));
                }
            }
        }
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 2
        for (int l = 0; l < 2; l++) _mm256_storeu_si256((__m256i *)(out[p] + l * 8), sum[p][l]);
}

static void tile(const Convolution *c, const Operands *o, int64_t outputs, const int64_t at[PIXELS],
                 int32_t out[PIXELS][BLOCK]) {
    (c->nibbles ? narrow_tile : wide_tile)(c, o, at, out);
}

#else
#define INSTRUCTIONS "portable"

enum { PIXELS = 4, BLOCK = 16, NIBBLE_GROUP = 1, BYTE_GROUP = 1, UNPACK = 1, WIDEN = 0 };
typedef uint8_t Wide;

static void tile(const Convolution *c, const Operands *o, int64_t outputs, const int64_t at[PIXELS],
                 int32_t out[PIXELS][BLOCK]) {
    const int8_t *weights = o->weights;
    const uint8_t *codes = o->codes;
    memset(out, 0, sizeof(int32_t) * PIXELS * BLOCK);
    for (int64_t kh = 0; kh < c->kernel_height; kh++)
        for (int64_t kw = 0; kw < c->kernel_width; kw++) {
            const int64_t start = offset(c, kh, kw);
            for (int64_t i = start; i < start + c->channels; i++, weights += BLOCK)
                for (int p = 0; p < PIXELS; p++)
                    for (int l = 0; l < BLOCK; l++) out[p][l] += codes[at[p] + i] * weights[l];
        }
}
#endif

#ifndef CORRECTED
static void corrected_tile(const Convolution *c, const Operands *o, int64_t outputs, const int64_t at[PIXELS],
                           const uint32_t more[PIXELS], const uint32_t less[BLOCK], int64_t step, float *out) {
    int32_t sum[PIXELS][BLOCK];
    tile(c, o, outputs, at, sum);
    for (int p = 0; p < PIXELS; p++)
        for (int l = 0; l < BLOCK; l++) out[p * step + l] = (float)(int32_t)((uint32_t)sum[p][l] + more[p] - less[l]);
}
#endif

const char *instructions(void) { return INSTRUCTIONS; }

int64_t block_outputs(void) { return BLOCK; }

int64_t group_channels(int64_t nibbles) { return nibbles ? NIBBLE_GROUP : BYTE_GROUP; }

/* Attention: softmax(q k^T factor + mask) v on codes. q [batch, queries, heads, depth], k [batch, keys, key_heads, depth],
 * v [batch, keys, key_heads, value_depth], out as q with value_depth; heads are a multiple of key_heads (grouped queries).
 * scale and zero_point hold the four quantizers (q, k, v, softmax) as [4, batch], or [4, 1] when each is 0; qmax their
 * top codes. The steps lead through the mask, 0 where it is alike; a row of it has all keys. */
typedef struct {
    int64_t batch, queries, keys, heads, key_heads, depth, value_depth, each;
    int64_t mask_batch, mask_head, mask_row;
    float factor, qmax[4];
} Attention;

enum { CODES = 4, SUMMANDS = 1 << 15 }; /* what the inner sizes of products are multiples of; 32 bits hold so many */

static int64_t rounded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* The right operand of a product: codes less 128 as weights for tile, and of each output the sum of its codes. */
typedef struct {
    int64_t inner, outputs, present; /* outputs in whole blocks, and how many of them are there */
    int8_t *weights; /* [outputs / BLOCK][inner / BYTE_GROUP][BLOCK][BYTE_GROUP] */
    int32_t *sums;
} Packed;

static void wide_codes(const float *restrict x, int64_t count, float scale, float zero_point, float qmax,
                       Wide *restrict out) {
    for (int64_t i = 0; i < count; i++) out[i] = code(x[i], scale, zero_point, qmax);
}

static void byte_codes(const float *restrict x, int64_t count, float scale, float zero_point, float qmax,
                       uint8_t *restrict out) {
    for (int64_t i = 0; i < count; i++) out[i] = code(x[i], scale, zero_point, qmax);
}

/* One output's codes, `inner` of them, 128 beyond its own. */
static void pack_output(const Packed *p, int64_t output, const uint8_t *restrict codes, int64_t count) {
    const int64_t inner = p->inner;
    int8_t *to = p->weights + (output / BLOCK * inner / BYTE_GROUP * BLOCK + output % BLOCK) * BYTE_GROUP;
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += codes[i];
    p->sums[output] = sum;
    for (int64_t i = 0; i < inner; i += BYTE_GROUP, to += BLOCK * BYTE_GROUP)
        for (int j = 0; j < BYTE_GROUP; j++) to[j] = (int8_t)(codes[i + j] ^ 128);
}

/* One group of all outputs' codes [BYTE_GROUP, outputs], of which `count` rows are there; 128 stands for none. */
static void pack_group(const Packed *p, int64_t group, const uint8_t *restrict codes, int64_t count) {
    const int64_t outputs = p->outputs, step = p->inner * BLOCK;
    int32_t *restrict sums = p->sums;
    for (int64_t j = 0; j < count; j++)
        for (int64_t l = 0; l < outputs; l++) sums[l] += codes[j * outputs + l];
    for (int64_t block = 0; block < outputs; block += BLOCK) {
        int8_t *restrict to = p->weights + block / BLOCK * step + group * BLOCK * BYTE_GROUP;
        for (int l = 0; l < BLOCK; l++)
            for (int j = 0; j < BYTE_GROUP; j++) to[l * BYTE_GROUP + j] = (int8_t)(codes[j * outputs + block + l] ^ 128);
    }
}

/* What tiles take: the codes a [PIXELS, inner], and a block of b, from `first` on. */
static inline Operands operands(const Wide *a, const Packed *b, int64_t block, int64_t first, int64_t at[PIXELS]) {
    static const int8_t no_zero[BLOCK];
    for (int p = 0; p < PIXELS; p++) at[p] = p * b->inner + first;
    return (Operands){a, b->weights + block * b->inner + first * BLOCK, no_zero};
}

/* As product, of any length. */
static void long_product(const Wide *a, int32_t za, const Packed *b, const int64_t of_row[PIXELS], float *out) {
    int32_t sum[PIXELS][BLOCK];
    int64_t total[PIXELS][BLOCK], at[PIXELS];
    for (int64_t block = 0; block < b->outputs; block += BLOCK) {
        memset(total, 0, sizeof total);
        for (int64_t first = 0; first < b->inner; first += SUMMANDS) {
            const int64_t left = b->inner - first;
            const Convolution c = {.kernel_height = 1, .kernel_width = 1, .channels = left < SUMMANDS ? left : SUMMANDS};
            const Operands o = operands(a, b, block, first, at);
            tile(&c, &o, BLOCK, at, sum);
            for (int p = 0; p < PIXELS; p++)
                for (int l = 0; l < BLOCK; l++) total[p][l] += sum[p][l];
        }
        for (int p = 0; p < PIXELS; p++)
            for (int l = 0; l < BLOCK; l++)
                out[p * b->outputs + block + l] = (float)(total[p][l] + of_row[p] - (int64_t)za * b->sums[block + l]);
    }
}

/* out [PIXELS, outputs] = sums of (a - za)(b - zb) over `count` codes; a [PIXELS, inner] holds zeros beyond them. */
static void product(const Wide *a, int32_t za, const Packed *b, int32_t zb, int64_t count, float *out) {
    const Convolution c = {.kernel_height = 1, .kernel_width = 1, .channels = b->inner};
    uint32_t more[PIXELS], less[BLOCK]; /* which may exceed 32 bits where what they correct does not */
    int64_t of_row[PIXELS], at[PIXELS];
    for (int p = 0; p < PIXELS; p++) {
        uint32_t codes = 0;
        for (int64_t i = 0; i < count; i++) codes += a[p * b->inner + i];
        of_row[p] = (int64_t)(128 - zb) * codes + count * za * zb;
        more[p] = (uint32_t)of_row[p];
    }
    if (b->inner > SUMMANDS) {
        long_product(a, za, b, of_row, out);
        return;
    }
    for (int64_t block = 0; block < b->outputs; block += BLOCK) {
        const Operands o = operands(a, b, block, 0, at);
        for (int l = 0; l < BLOCK; l++) less[l] = (uint32_t)za * (uint32_t)b->sums[block + l];
        corrected_tile(&c, &o, b->present - block, at, more, less, b->outputs, out + block);
    }
}

/* The greatest of the scores [keys], which become what the softmax is of where a gain above 0 is not all. */
static float greatest_score(float *row, const float *mask, int64_t keys, float gain) {
    if (mask)
        for (int64_t j = 0; j < keys; j++) row[j] = row[j] * gain + mask[j];
    else if (gain < 0)
        for (int64_t j = 0; j < keys; j++) row[j] *= gain;
    const int64_t vectors = keys / LANES * LANES;
    float most = row[0];
    vec part = {0};
    part += most;
    for (int64_t j = 0; j < vectors; j += LANES) part = greater(*(const vec *)(row + j), part);
    most = greatest(part);
    for (int64_t j = vectors; j < keys; j++) most = row[j] > most ? row[j] : most;
    return most;
}

static float sum_of_row(const float *row, int64_t keys) {
    vec part = {0};
    int64_t j = 0;
    for (; j + LANES <= keys; j += LANES) part += *(const vec *)(row + j);
    float total = sum_of(part);
    for (; j < keys; j++) total += row[j];
    return total;
}

/* Scores [rows, keys], `pitch` apart -> codes of their softmax, `step` apart; mask is NULL or added, its rows `mask_row`
 * apart. One thing after the other for all rows, so that none waits for its own sums. */
static void softmax_codes(float *restrict scores, int64_t rows, int64_t keys, int64_t pitch, const float *mask,
                          int64_t mask_row, float gain, float scale, float zero_point, float qmax, int64_t step,
                          Wide *restrict out) {
    const float left = mask || gain < 0 ? 1.0f : gain;
    float most[PIXELS], total[PIXELS];
    for (int64_t r = 0; r < rows; r++)
        most[r] = greatest_score(scores + r * pitch, mask ? mask + r * mask_row : NULL, keys, gain);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; most[r] > -INFINITY && j < keys; j++)
            scores[r * pitch + j] = falling((scores[r * pitch + j] - most[r]) * left);
    for (int64_t r = 0; r < rows; r++) total[r] = sum_of_row(scores + r * pitch, keys);
    for (int64_t r = 0; r < rows; r++)
        if (most[r] == -INFINITY) /* a row that may look at nothing gives zeros */
            for (int64_t j = 0; j < keys; j++) out[r * step + j] = (Wide)zero_point;
        else
            for (int64_t j = 0; j < keys; j++)
                out[r * step + j] = code(scores[r * pitch + j], total[r] * scale, zero_point, qmax);
}

/* What one head of one sample needs: bytes, of which each part begins at a line of the cache. */
typedef struct {
    Wide *queries, *probabilities;
    Packed keys, values;
    float *scores, *result;
    uint8_t *line;
    size_t size;
} Head;

/* The next part of the memory, or NULL while its size is only counted. */
static void *take(char *memory, size_t *used, int64_t bytes) {
    char *part = memory ? memory + *used : NULL;
    *used += (size_t)rounded(bytes, 64);
    return part;
}

static Head head_of(const Attention *a, char *memory) {
    Head h = {.keys = {.inner = rounded(a->depth, CODES), .outputs = rounded(a->keys, BLOCK), .present = a->keys},
              .values = {.inner = rounded(a->keys, CODES), .outputs = rounded(a->value_depth, BLOCK), .present = a->value_depth}};
    const int64_t line = h.keys.inner, lines = BYTE_GROUP * h.values.outputs, word = sizeof(int32_t);
    h.queries = take(memory, &h.size, rounded(a->queries, PIXELS) * h.keys.inner * (int64_t)sizeof(Wide));
    h.probabilities = take(memory, &h.size, PIXELS * h.values.inner * (int64_t)sizeof(Wide));
    h.keys.weights = take(memory, &h.size, h.keys.outputs * h.keys.inner);
    h.values.weights = take(memory, &h.size, h.values.outputs * h.values.inner);
    h.keys.sums = take(memory, &h.size, h.keys.outputs * word);
    h.values.sums = take(memory, &h.size, h.values.outputs * word);
    h.scores = take(memory, &h.size, PIXELS * h.keys.outputs * word);
    h.result = take(memory, &h.size, PIXELS * h.values.outputs * word);
    h.line = take(memory, &h.size, line > lines ? line : lines);
    return h;
}

/* One head of one sample, in memory of zeros. */
static void attend(const Attention *a, const Head *h, const float *q, const float *k, const float *v, const float *mask,
                   const float s[4], const int32_t z[4], float *out) {
    const int64_t depth = a->depth, values_depth = a->value_depth, keys = a->keys;
    const int64_t q_step = a->heads * depth, k_step = a->key_heads * depth, v_step = a->key_heads * values_depth;
    for (int64_t n = 0; n < a->queries; n++)
        wide_codes(q + n * q_step, depth, s[0], (float)z[0], a->qmax[0], h->queries + n * h->keys.inner);
    memset(h->line, 128, (size_t)h->keys.inner);
    for (int64_t n = 0; n < keys; n++) {
        byte_codes(k + n * k_step, depth, s[1], (float)z[1], a->qmax[1], h->line);
        pack_output(&h->keys, n, h->line, depth);
    }
    memset(h->line, 128, (size_t)(BYTE_GROUP * h->values.outputs));
    for (int64_t n = 0; n < keys; n += BYTE_GROUP) {
        const int64_t rows = keys - n < BYTE_GROUP ? keys - n : BYTE_GROUP;
        for (int64_t j = 0; j < rows; j++)
            byte_codes(v + (n + j) * v_step, values_depth, s[2], (float)z[2], a->qmax[2], h->line + j * h->values.outputs);
        fill(h->line + rows * h->values.outputs, 128, (BYTE_GROUP - rows) * h->values.outputs);
        pack_group(&h->values, n / BYTE_GROUP, h->line, rows);
    }
    for (int64_t row = 0; row < a->queries; row += PIXELS) {
        const int64_t rows = a->queries - row < PIXELS ? a->queries - row : PIXELS;
        product(h->queries + row * h->keys.inner, z[0], &h->keys, z[1], depth, h->scores);
        softmax_codes(h->scores, rows, keys, h->keys.outputs, mask ? mask + row * a->mask_row : NULL, a->mask_row,
                      s[0] * s[1] * a->factor, s[3], (float)z[3], a->qmax[3], h->values.inner, h->probabilities);
        product(h->probabilities, z[3], &h->values, z[2], keys, h->result);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < values_depth; c++)
                out[(row + r) * a->heads * values_depth + c] = h->result[r * h->values.outputs + c] * (s[3] * s[2]);
    }
}

/* Returns 0, or 1 without memory. */
int attention(const Attention *a, const float *q, const float *k, const float *v, const float *mask, const float *scale,
              const int32_t *zero_point, float *out) {
    const int64_t samples = a->each ? a->batch : 1, group = a->heads / a->key_heads;
    const size_t size = head_of(a, NULL).size;
    int failed = 0;
#pragma omp parallel for collapse(2) schedule(static) reduction(| : failed)
    for (int64_t n = 0; n < a->batch; n++)
        for (int64_t head = 0; head < a->heads; head++) {
            float s[4];
            int32_t z[4];
            const int64_t key_head = n * a->keys * a->key_heads + head / group; /* of k and v, in heads */
            const int64_t query_head = n * a->queries * a->heads + head;        /* of q and out */
            char *memory = calloc(size, 1);
            const Head h = head_of(a, memory);
            for (int i = 0; i < 4; i++) {
                s[i] = scale[i * samples + n * a->each];
                z[i] = zero_point[i * samples + n * a->each];
            }
            if (memory)
                attend(a, &h, q + query_head * a->depth, k + key_head * a->depth, v + key_head * a->value_depth,
                       mask ? mask + n * a->mask_batch + head * a->mask_head : NULL, s, z,
                       out + query_head * a->value_depth);
            else
                failed = 1;
            free(memory);
        }
    return failed;
}

#ifndef UNPACKED
/* Nibbles of one block -> size bytes, less the zero points. */
static void unpack(const uint8_t *from, const int8_t *weight_zero, int64_t size, int8_t *to) {
    enum { ROW = BLOCK * NIBBLE_GROUP };
    int8_t zero[ROW];
    for (int i = 0; i < ROW; i++) zero[i] = weight_zero[i / NIBBLE_GROUP];
    for (const int8_t *end = to + size; to < end; to += ROW, from += ROW / 2)
        for (int i = 0; i < ROW / 2; i++) {
            to[2 * i] = (int8_t)((from[i] & 15) - zero[2 * i]);
            to[2 * i + 1] = (int8_t)((from[i] >> 4) - zero[2 * i + 1]);
        }
}
#endif

static void widen(const uint8_t *restrict from, int64_t size, uint16_t *restrict to) {
    for (int64_t i = 0; i < size; i++) to[i] = from[i];
}

/* What products are added to, or NULL; they are multiplied by gate [rows, outputs] first, if that is there: its rows are
 * those of `span` pixels each, and `step` apart. */
typedef struct {
    const float *onto, *gate;
    int64_t span, step;
} Sum;

/* out [outputs] = (gain (sum - correction) + bias) (gate) (+ onto, which may be out itself). */
static inline __attribute__((always_inline)) void finish(int64_t outputs, const int32_t *sum, const int32_t *correction,
                                                         const float *gain, const float *bias, const float *gate,
                                                         const float *onto, float *out) {
    if (gate && onto)
#pragma GCC ivdep
        for (int64_t l = 0; l < outputs; l++)
            out[l] = ((float)(sum[l] - correction[l]) * gain[l] + bias[l]) * gate[l] + onto[l];
    else if (onto)
#pragma GCC ivdep
        for (int64_t l = 0; l < outputs; l++) out[l] = (float)(sum[l] - correction[l]) * gain[l] + bias[l] + onto[l];
    else
#pragma GCC ivdep
        for (int64_t l = 0; l < outputs; l++) out[l] = (float)(sum[l] - correction[l]) * gain[l] + bias[l];
}

/* What the sums of one block are corrected by and multiplied with. */
static inline void affine_of(const Convolution *c, int64_t first, float scale, int32_t zero_point, int32_t *correction,
                             float *gain) {
    for (int l = 0; l < BLOCK; l++) {
        correction[l] = zero_point * c->weight_sum[first + l];
        gain[l] = scale * c->weight_scale[first + l];
    }
}

/* The outputs of one block for image n. */
static void convolve_block(const Convolution *c, const Operands *o, int64_t n, int64_t first, const float *scale,
                           const int32_t *zero_point, const Sum *s, float *out) {
    const int64_t pixels = c->out_height * c->out_width, line = c->in_width * c->channels;
    const int64_t outputs = c->outputs - first < BLOCK ? c->outputs - first : BLOCK;
    const int64_t image = c->each == 2 ? n * pixels : n * c->each;
    const float *bias = c->bias + first, *gate = s->gate ? s->gate + n * pixels / s->span * s->step + first : NULL;
    int64_t left = s->gate ? s->span - n * pixels % s->span : 0; /* pixels with this gate */
    int32_t correction[BLOCK], sum[PIXELS][BLOCK];
    float gain[BLOCK];
    affine_of(c, first, scale[image], zero_point[image], correction, gain);
    for (int64_t begin = 0, h = 0, w = 0; begin < pixels; begin += PIXELS) {
        int64_t at[PIXELS];
        for (int64_t p = 0; p < PIXELS; p++) {
            at[p] = h * c->stride_height * line + w * c->stride_width * c->channels;
            if (begin + p + 1 < pixels && ++w == c->out_width) w = 0, h++; /* beyond the end: the last pixel, not stored */
        }
        tile(c, o, outputs, at, sum);
        for (int64_t p = 0; p < PIXELS && begin + p < pixels; p++) {
            const int64_t place = (n * pixels + begin + p) * c->outputs + first;
            const float *there = s->onto ? s->onto + place : NULL;
            if (c->each == 2)
                affine_of(c, first, scale[image + begin + p], zero_point[image + begin + p], correction, gain);
            if (outputs == BLOCK)
                finish(BLOCK, sum[p], correction, gain, bias, gate, there, out + place);
            else
                finish(outputs, sum[p], correction, gain, bias, gate, there, out + place);
            if (gate && --left == 0) gate += s->step, left = s->span;
        }
    }
}

/* out [batch, out_height, out_width, outputs] = s w_s (sum - z weight_sum) + bias, summed as `s` says. Returns 0, or 1
 * without memory. */
static int convolve_onto(const Convolution *c, const uint8_t *codes, const float *scale, const int32_t *zero_point,
                         const Sum *s, float *out) {
    const int64_t blocks = (c->outputs + BLOCK - 1) / BLOCK, image = c->in_height * c->in_width * c->channels;
    const int64_t size = c->kernel_height * c->kernel_width * c->channels * BLOCK;
    const int shared = UNPACK || c->batch * c->out_height * c->out_width >= MANY;
    const int unpacks = c->nibbles && shared, widens = WIDEN && !c->nibbles;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        void *work = malloc((size_t)(unpacks ? size : (widens ? image * 2 : 1)));
        int64_t present = -1; /* the block or the image in work: it changes in the outer of two loops */
        failed = !work;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < c->batch * blocks; i++) {
            if (!work) continue;
            const int64_t n = unpacks ? i % c->batch : i / blocks, block = unpacks ? i / c->batch : i % blocks;
            const int64_t first = block * BLOCK;
            const uint8_t *from = codes + n * image, *weights = c->weights + block * size / (c->nibbles ? 2 : 1);
            Operands o = {from, weights, c->weight_zero + first, c->nibbles && !unpacks};
            if (unpacks) {
                if (present != block) unpack(weights, o.weight_zero, size, work);
                present = block;
                o.weights = work;
            } else if (widens) {
                if (present != n) widen(from, image, work);
                present = n;
                o.codes = work;
            }
            convolve_block(c, &o, n, first, scale, zero_point, s, out);
        }
        free(work);
    }
    return failed;
}

/* The same added to onto, which may be out itself, or NULL. */
int convolve(const Convolution *c, const uint8_t *codes, const float *scale, const int32_t *zero_point,
             const float *onto, float *out) {
    const Sum s = {.onto = onto};
    return convolve_onto(c, codes, scale, zero_point, &s, out);
}

/* What belongs to a layer: the norm before it (or NULL, then gain [channels] or NULL), and its products. */
typedef struct {
    const float *weight, *bias, *gain;
    int64_t groups, codes; /* bytes of the padded codes */
    float epsilon;
} Layer;

static int layer_onto(const Layer *l, const Frame *f, const Convolution *c, const float *x, const float *shift,
                      const float *scale, const int32_t *zero_point, const Sum *s, float *out) {
    uint8_t *codes = malloc((size_t)l->codes);
    int failed = !codes;
    if (!failed && l->weight)
        failed = norm_quantize(f, x, shift, l->weight, l->bias, l->groups, l->epsilon, scale, zero_point, codes);
    else if (!failed)
        failed = quantize(f, x, l->gain, scale, zero_point, codes);
    failed = failed || convolve_onto(c, codes, scale, zero_point, s, out);
    free(codes);
    return failed;
}

/* x (+ shift) -> (norm,) quantize -> convolve (+ onto, which may be out itself). Returns 0, or 1 without memory. */
int layer(const Layer *l, const Frame *f, const Convolution *c, const float *x, const float *shift, const float *scale,
          const int32_t *zero_point, const float *onto, float *out) {
    const Sum s = {.onto = onto};
    return layer_onto(l, f, c, x, shift, scale, zero_point, &s, out);
}

/* The norm of each token: of x [samples, tokens, channels] less its mean (where it is centered) over the root of its mean
 * square; then weight and bias [channels], 1 + scale and shift [samples, channels] (each may be NULL; samples of the last
 * two are `step` apart), and the rotation where signs are given. */
typedef struct {
    int64_t samples, tokens, channels, centered, step;
    const float *weight, *bias, *signs;
    float epsilon;
} TokenNorm;

/* The norm's affine for one sample: a, b [channels]. */
static void token_affine(const TokenNorm *n, const float *scale, const float *shift, float *restrict a,
                         float *restrict b) {
    for (int64_t c = 0; c < n->channels; c++) {
        const float gain = scale ? 1.0f + scale[c] : 1.0f;
        a[c] = n->weight ? n->weight[c] * gain : gain;
        b[c] = (n->bias ? n->bias[c] * gain : 0.0f) + (shift ? shift[c] : 0.0f);
    }
}

/* The mean of (x - mean)^power, power being 1 or 2. */
static inline __attribute__((always_inline)) float moment(const float *x, int64_t count, float mean, int power) {
    vec sums = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const vec d = *(const vec *)(x + i) - mean;
        sums += power == 2 ? d * d : d;
    }
    float sum = sum_of(sums);
    for (; i < count; i++) sum += power == 2 ? (x[i] - mean) * (x[i] - mean) : x[i] - mean;
    return sum / (float)count;
}

static void normalize_token(const TokenNorm *n, const float *x, const float *a, const float *b, float *restrict y) {
    const float mean = n->centered ? moment(x, n->channels, 0, 1) : 0;
    const float inverse = 1.0f / sqrtf(moment(x, n->channels, mean, 2) + n->epsilon);
    for (int64_t c = 0; c < n->channels; c++) y[c] = (x[c] - mean) * inverse * a[c] + b[c];
    if (n->signs) rotate_row(y, n->signs, n->channels);
}

/* Returns 0, or 1 without memory. */
static int normalize(const TokenNorm *n, const float *x, const float *scale, const float *shift, float *out) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *a = malloc((size_t)(2 * n->channels) * sizeof(float)), *b = a + n->channels;
        int64_t present = -1; /* the sample whose affine that is */
        failed = !a;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n->samples * n->tokens; row++) {
            const int64_t sample = row / n->tokens, at = sample * n->step;
            if (!a) continue;
            if (present != sample) token_affine(n, scale ? scale + at : NULL, shift ? shift + at : NULL, a, b);
            present = sample;
            normalize_token(n, x + row * n->channels, a, b, out + row * n->channels);
        }
        free(a);
    }
    return failed;
}

/* A linear with weights of integers, behind a SiLU or not. */
typedef struct {
    const int8_t *codes;
    const float *scale, *bias;
    int64_t rows, channels, outputs, silu;
} Weights;

/* Of x [rows, channels], added to onto [rows, outputs] or NULL. Returns 0, or 1 without memory. */
static int weigh(const Weights *w, const float *x, const float *onto, float *out) {
    const int64_t count = w->rows * w->channels;
    float *work = w->silu ? malloc((size_t)count * sizeof(float)) : NULL;
    if (w->silu && !work) return 1;
    if (work) activate(SILU, x, NULL, count, work);
    weight_only(work ? work : x, w->codes, w->scale, w->bias, w->rows, w->channels, w->outputs, out);
    for (int64_t i = 0; onto && i < w->rows * w->outputs; i++) out[i] += onto[i];
    free(work);
    return 0;
}

/* A plan is passes over tokens or pixels, one after the other. What they read and write has a place: bytes from one of the call's
 * pointers, which are scratch (made here), the scales and zero points of all quantizers, then what the caller gives. */
enum { SCRATCH, SCALES, ZERO_POINTS, NOWHERE = -1 };
enum { NORMALIZE, LAYER, ATTEND, WEIGH };

typedef struct {
    int64_t pointer, offset;
} Place;

/* from: x, scale and shift of a TokenNorm; x, onto, gate and shift of a layer; q, k, v and the mask of an Attention; x and
 * onto of Weights. */
typedef struct {
    int64_t kind, interval; /* of its quantizer, or the first of them: values from the call's */
    int64_t span, step;     /* of a gate, as in Sum */
    const void *what, *frame, *convolution; /* TokenNorm, Layer, Attention or Weights; of a layer */
    Place from[4], to;
} Pass;

static inline void *at(char *const *given, Place p) {
    return p.pointer == NOWHERE ? NULL : given[p.pointer] + p.offset;
}

static int pass(const Pass *p, char *const *given) {
    const float *from[4], *scale = (const float *)given[SCALES] + p->interval;
    const int32_t *zero_point = (const int32_t *)given[ZERO_POINTS] + p->interval;
    float *to = at(given, p->to);
    for (int i = 0; i < 4; i++) from[i] = at(given, p->from[i]);
    if (p->kind == NORMALIZE) return normalize(p->what, from[0], from[1], from[2], to);
    if (p->kind == ATTEND) return attention(p->what, from[0], from[1], from[2], from[3], scale, zero_point, to);
    if (p->kind == WEIGH) return weigh(p->what, from[0], from[1], to);
    const Sum s = {from[1], from[2], p->span, p->step};
    return layer_onto(p->what, p->frame, p->convolution, from[0], from[3], scale, zero_point, &s, to);
}

/* Goes through a plan with so many bytes of scratch. Returns 0, or 1 without memory. */
int go(const Pass *passes, int64_t count, int64_t scratch, char **given) {
    char *own = malloc((size_t)(scratch ? scratch : 1));
    int failed = !own;
    given[SCRATCH] = own;
    for (int64_t i = 0; i < count && !failed; i++) failed = pass(passes + i, given);
    free(own);
    return failed;
}
