/* The passes around the integer products, fused: (group norm, SiLU,) quantize, pad, upsample. Layout NHWC.
 *
 * Plain C with OpenMP, built on demand by native.py. kernels.py holds the same functions in torch: the reference.
 * Written for the compiler's vectoriser: inner loops run over channels, or over all values of a row.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* e^x within 2 ulp, without branches: x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial for e^r (Cephes expf). */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } power = {.i = ((int32_t)n + 127) << 23};
    return p * power.f;
}

static inline float silu(float y) { return y / (1.0f + exponential(-y)); }

static inline uint8_t code(float y, float scale, float zero_point, float qmax) {
    float q = rintf(y / scale) + zero_point;
    return (uint8_t)(int32_t)(q < 0.0f ? 0.0f : (q > qmax ? qmax : q));
}

/* What to do with a batch of images: sizes, the channel range to read, and the frame of the output. */
typedef struct {
    int64_t batch, height, width;
    int64_t channels, stride, first;       /* channels to take, channels of x in memory, the first one taken */
    int64_t pitch;                         /* channels of the output in memory; those beyond the range hold 0 */
    int64_t top, left, bottom, right, up;  /* padding with the zero point, and the factor of nearest upsampling */
    int64_t each;                          /* 1: a scale and zero point for each image, 0: one for all */
    float qmax;
} Frame;

/* One row of pixels, of which only the channel range is quantized; a, b are the affine of the norm or NULL. */
static void quantize_row(const Frame *f, const float *x, const float *a, const float *b, int with_silu, float scale,
                         float zero_point, uint8_t *out) {
    const int64_t channels = f->channels;
    if (!a && f->stride == channels && f->pitch == channels && f->up == 1) { /* contiguous: one long loop */
        for (int64_t i = 0; i < f->width * channels; i++) out[i] = code(x[i], scale, zero_point, f->qmax);
        return;
    }
    for (int64_t w = 0; w < f->width; w++) {
        const float *pixel = x + w * f->stride + f->first;
        uint8_t *to = out + w * f->up * f->pitch;
        if (a && with_silu)
            for (int64_t c = 0; c < channels; c++)
                to[c] = code(silu(pixel[c] * a[c] + b[c]), scale, zero_point, f->qmax);
        else if (a)
            for (int64_t c = 0; c < channels; c++) to[c] = code(pixel[c] * a[c] + b[c], scale, zero_point, f->qmax);
        else
            for (int64_t c = 0; c < channels; c++) to[c] = code(pixel[c], scale, zero_point, f->qmax);
        memset(to + channels, 0, (size_t)(f->pitch - channels));
        for (int64_t copy = 1; copy < f->up; copy++) memcpy(to + copy * f->pitch, to, (size_t)f->pitch);
    }
}

/* Quantize all images; affine is [batch, 2, channels] (a, then b) or NULL. */
static void quantize_images(const Frame *f, const float *x, const float *affine, int with_silu, const float *scale,
                            const int32_t *zero_point, uint8_t *out) {
    const int64_t out_width = f->left + f->width * f->up + f->right, row = out_width * f->pitch;
    const int64_t out_height = f->top + f->height * f->up + f->bottom;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < f->batch; n++)
        for (int64_t h = 0; h < f->height; h++) {
            const float *a = affine ? affine + n * 2 * f->channels : NULL;
            uint8_t *image = out + n * out_height * row, *to = image + (f->top + h * f->up) * row;
            const int zero = zero_point[n * f->each];
            memset(to, zero, (size_t)(f->left * f->pitch));
            quantize_row(f, x + (n * f->height + h) * f->width * f->stride, a, a ? a + f->channels : NULL, with_silu,
                         scale[n * f->each], (float)zero, to + f->left * f->pitch);
            memset(to + (f->left + f->width * f->up) * f->pitch, zero, (size_t)(f->right * f->pitch));
            for (int64_t copy = 1; copy < f->up; copy++) memcpy(to + copy * row, to, (size_t)row);
            if (h == 0) memset(image, zero, (size_t)(f->top * row));
            if (h == f->height - 1)
                memset(image + (out_height - f->bottom) * row, zero, (size_t)(f->bottom * row));
        }
}

void quantize(const Frame *f, const float *x, const float *scale, const int32_t *zero_point, uint8_t *out) {
    quantize_images(f, x, NULL, 0, scale, zero_point, out);
}

/* Group norm of x (+ shift [batch, channels] or NULL) as y = a x + b for each image and channel: affine [batch, 2, C]. */
static void group_affine(const Frame *f, const float *x, const float *shift, const float *weight, const float *bias,
                         int64_t groups, float epsilon, double *sums, float *affine) {
    const int64_t channels = f->channels, size = channels / groups;
    memset(sums, 0, (size_t)(f->batch * 2 * channels) * sizeof(double));
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < f->batch; n++) {
        double *sum = sums + n * 2 * channels, *square = sum + channels;
        for (int64_t h = 0; h < f->height; h++) {
            const float *line = x + (n * f->height + h) * f->width * channels;
            for (int64_t first = 0; first < channels; first += 32) {
                float s[32] = {0}, q[32] = {0};
                const int64_t count = channels - first < 32 ? channels - first : 32;
                if (count == 32)
                    for (int64_t w = 0; w < f->width; w++)
                        for (int c = 0; c < 32; c++) {
                            float v = line[w * channels + first + c];
                            s[c] += v;
                            q[c] += v * v;
                        }
                else
                    for (int64_t w = 0; w < f->width; w++)
                        for (int64_t c = 0; c < count; c++) {
                            float v = line[w * channels + first + c];
                            s[c] += v;
                            q[c] += v * v;
                        }
                for (int64_t c = 0; c < count; c++) {
                    sum[first + c] += s[c];
                    square[first + c] += q[c];
                }
            }
        }
        const double pixels = (double)(f->height * f->width);
        float *a = affine + n * 2 * channels, *b = a + channels;
        for (int64_t g = 0; g < groups; g++) {
            double total = 0, squares = 0;
            for (int64_t c = g * size; c < (g + 1) * size; c++) {
                double d = shift ? shift[n * channels + c] : 0.0; /* sums of x + d from those of x */
                total += sum[c] + pixels * d;
                squares += square[c] + 2 * d * sum[c] + pixels * d * d;
            }
            const double mean = total / (pixels * (double)size);
            const double variance = squares / (pixels * (double)size) - mean * mean;
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
                  int64_t groups, float epsilon, int with_silu, const float *scale, const int32_t *zero_point,
                  uint8_t *out) {
    const size_t count = (size_t)(f->batch * 2 * f->channels);
    double *sums = malloc(count * sizeof(double));
    float *affine = malloc(count * sizeof(float));
    if (sums && affine) {
        group_affine(f, x, shift, weight, bias, groups, epsilon, sums, affine);
        quantize_images(f, x, affine, with_silu, scale, zero_point, out);
    }
    const int failed = !sums || !affine;
    free(sums);
    free(affine);
    return failed;
}

/* Attention over images: softmax(q k^T factor) v on codes. q, k, v, out are [batch, tokens, heads, depth]; scale and
 * zero_point hold the four quantizers (q, k, v, softmax) as [4, batch], or [4, 1] when each is 0; qmax their top codes. */
typedef struct {
    int64_t batch, tokens, heads, depth, each;
    float factor, qmax[4];
} Attention;

typedef float vec __attribute__((vector_size(64), aligned(4)));

enum { ROWS = 8, COLUMNS = 32 };

/* out [ROWS, COLUMNS] = a [ROWS, inner] b [inner, COLUMNS]; the operands are integers, the sums exact below 2^24. */
static void product(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t inner, float *out,
                    int64_t out_stride) {
    vec sum[ROWS][2] = {0};
    for (int64_t i = 0; i < inner; i++) {
        const vec low = *(const vec *)(b + i * b_stride), high = *(const vec *)(b + i * b_stride + 16);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            sum[r][0] += low * a[r * a_stride + i];
            sum[r][1] += high * a[r * a_stride + i];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        *(vec *)(out + r * out_stride) = sum[r][0];
        *(vec *)(out + r * out_stride + 16) = sum[r][1];
    }
}

/* A code less its zero point. */
static inline float level(float y, float scale, float zero_point, float qmax) {
    const float q = rintf(y / scale), low = -zero_point, high = qmax - zero_point;
    return q < low ? low : (q > high ? high : q);
}

/* Scores of some rows [tokens] -> levels of their softmax. */
static void softmax_levels(float *row, int64_t tokens, float gain, float scale, float zero_point, float qmax) {
    float most = row[0], total = 0;
    for (int64_t j = 1; j < tokens; j++) most = row[j] > most ? row[j] : most;
    for (int64_t j = 0; j < tokens; j++) row[j] = exponential((row[j] - most) * gain);
    for (int64_t j = 0; j < tokens; j++) total += row[j];
    for (int64_t j = 0; j < tokens; j++) row[j] = level(row[j] / total, scale, zero_point, qmax);
}

static int64_t rounded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* One head of one image; work holds its operands, padded with zeros. */
static void attend(const Attention *a, const float *q, const float *k, const float *v, const float s[4],
                   const float z[4], float *work, float *out) {
    const int64_t tokens = a->tokens, depth = a->depth, stride = a->heads * depth;
    const int64_t wide_tokens = rounded(tokens, COLUMNS), wide_depth = rounded(depth, COLUMNS);
    float *queries = work, *keys = queries + rounded(tokens, ROWS) * depth, *values = keys + depth * wide_tokens;
    float *scores = values + tokens * wide_depth, *result = scores + ROWS * wide_tokens;
    for (int64_t n = 0; n < tokens; n++) {
        for (int64_t c = 0; c < depth; c++) queries[n * depth + c] = level(q[n * stride + c], s[0], z[0], a->qmax[0]);
        for (int64_t c = 0; c < depth; c++) keys[c * wide_tokens + n] = level(k[n * stride + c], s[1], z[1], a->qmax[1]);
        for (int64_t c = 0; c < depth; c++) values[n * wide_depth + c] = level(v[n * stride + c], s[2], z[2], a->qmax[2]);
    }
    for (int64_t row = 0; row < tokens; row += ROWS) {
        const int64_t rows = tokens - row < ROWS ? tokens - row : ROWS;
        for (int64_t j = 0; j < wide_tokens; j += COLUMNS)
            product(queries + row * depth, depth, keys + j, wide_tokens, depth, scores + j, wide_tokens);
        for (int64_t r = 0; r < rows; r++)
            softmax_levels(scores + r * wide_tokens, tokens, s[0] * s[1] * a->factor, s[3], z[3], a->qmax[3]);
        for (int64_t c = 0; c < wide_depth; c += COLUMNS)
            product(scores, wide_tokens, values + c, wide_depth, tokens, result + c, wide_depth);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < depth; c++) out[(row + r) * stride + c] = result[r * wide_depth + c] * (s[3] * s[2]);
    }
}

/* Returns 0, or 1 without memory. */
int attention(const Attention *a, const float *q, const float *k, const float *v, const float *scale,
              const int32_t *zero_point, float *out) {
    const int64_t image = a->tokens * a->heads * a->depth, samples = a->each ? a->batch : 1;
    const int64_t wide_tokens = rounded(a->tokens, COLUMNS), wide_depth = rounded(a->depth, COLUMNS);
    const size_t size = (size_t)(rounded(a->tokens, ROWS) * a->depth + a->depth * wide_tokens + a->tokens * wide_depth +
                                 ROWS * (wide_tokens + wide_depth));
    int failed = 0;
#pragma omp parallel for collapse(2) schedule(static) reduction(| : failed)
    for (int64_t n = 0; n < a->batch; n++)
        for (int64_t head = 0; head < a->heads; head++) {
            float s[4], z[4], *work = calloc(size, sizeof(float));
            const int64_t start = n * image + head * a->depth;
            for (int i = 0; i < 4; i++) {
                s[i] = scale[i * samples + n * a->each];
                z[i] = (float)zero_point[i * samples + n * a->each];
            }
            if (work)
                attend(a, q + start, k + start, v + start, s, z, work, out + start);
            else
                failed = 1;
            free(work);
        }
    return failed;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>

/* A convolution of padded codes [batch, in_height, in_width, channels], channels a multiple of 4, with weights
 * [blocks of 32 outputs][kernel positions x channels / 4][32 outputs][4 channels]: signed bytes, or unsigned nibbles
 * (low first) of which weight_zero [outputs] is subtracted. weight_sum [outputs] are the sums of the signed weights.
 * weight_* and bias have 32 entries for each block, whatever the number of outputs is. */
typedef struct {
    int64_t batch, in_height, in_width, channels, out_height, out_width, outputs;
    int64_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width;
    int64_t nibbles, each;
    const uint8_t *weights;
    const int8_t *weight_zero;
    const int32_t *weight_sum;
    const float *weight_scale, *bias;
} Convolution;

enum { PIXELS = 8, LANES = 2 }; /* a tile: 8 pixels x 2 vectors of 16 outputs, 16 of the 32 registers */

static inline __m512i nibble_weights(const uint8_t *from, __m512i zero) {
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)from));
    const __m512i codes = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi8(15));
    return _mm512_sub_epi8(codes, zero);
}

/* The sums of one tile; at[] are the top left codes of its pixels. */
static inline __attribute__((always_inline)) void tile(const Convolution *c, const uint8_t *const at[PIXELS],
                                                       const uint8_t *weights, const __m512i zero[LANES], int nibbles,
                                                       __m512i sum[PIXELS][LANES]) {
    const int64_t line = c->in_width * c->channels, bytes = nibbles ? 32 : 64;
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 2
        for (int l = 0; l < LANES; l++) sum[p][l] = _mm512_setzero_si512();
    for (int64_t kh = 0; kh < c->kernel_height; kh++)
        for (int64_t kw = 0; kw < c->kernel_width; kw++) {
            const int64_t start = kh * c->dilation_height * line + kw * c->dilation_width * c->channels;
            for (int64_t i = start; i < start + c->channels; i += 4, weights += LANES * bytes) {
                __m512i w[LANES];
#pragma GCC unroll 2
                for (int l = 0; l < LANES; l++)
                    w[l] = nibbles ? nibble_weights(weights + l * bytes, zero[l]) : _mm512_loadu_si512(weights + l * bytes);
#pragma GCC unroll 8
                for (int p = 0; p < PIXELS; p++) {
                    int32_t four;
                    memcpy(&four, at[p] + i, 4);
                    const __m512i q = _mm512_set1_epi32(four);
#pragma GCC unroll 2
                    for (int l = 0; l < LANES; l++) sum[p][l] = _mm512_dpbusd_epi32(sum[p][l], q, w[l]);
                }
            }
        }
}

/* out [batch, out_height, out_width, outputs] = s w_s (sum - z weight_sum) + bias (+ onto, which may be out itself). */
void convolve(const Convolution *c, const uint8_t *codes, const float *scale, const int32_t *zero_point,
              const float *onto, float *out) {
    const int64_t blocks = (c->outputs + 31) / 32, pixels = c->out_height * c->out_width;
    const int64_t size = c->kernel_height * c->kernel_width * c->channels * 32 / (c->nibbles ? 2 : 1);
    const int64_t line = c->in_width * c->channels;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < c->batch; n++)
        for (int64_t block = 0; block < blocks; block++) {
            const uint8_t *image = codes + n * c->in_height * line;
            const float s = scale[n * c->each];
            const __m512i z = _mm512_set1_epi32(zero_point[n * c->each]);
            __m512i zero[LANES], correction[LANES];
            __m512 gain[LANES], bias[LANES];
            __mmask16 present[LANES];
            for (int l = 0; l < LANES; l++) {
                const int64_t first = block * 32 + l * 16, left = c->outputs - first;
                const __m512i bytes = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(c->weight_zero + first)));
                zero[l] = _mm512_shuffle_epi8(bytes, _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
                correction[l] = _mm512_mullo_epi32(z, _mm512_loadu_si512(c->weight_sum + first));
                gain[l] = _mm512_mul_ps(_mm512_set1_ps(s), _mm512_loadu_ps(c->weight_scale + first));
                bias[l] = _mm512_loadu_ps(c->bias + first);
                present[l] = left >= 16 ? 0xffff : (left > 0 ? (__mmask16)((1u << left) - 1) : 0);
            }
            for (int64_t begin = 0; begin < pixels; begin += PIXELS) {
                const uint8_t *at[PIXELS];
                for (int64_t p = 0; p < PIXELS; p++) { /* beyond the end: the last pixel again, not stored */
                    const int64_t pixel = begin + p < pixels ? begin + p : pixels - 1;
                    const int64_t h = pixel / c->out_width, w = pixel % c->out_width;
                    at[p] = image + h * c->stride_height * line + w * c->stride_width * c->channels;
                }
                __m512i sum[PIXELS][LANES];
                if (c->nibbles)
                    tile(c, at, c->weights + block * size, zero, 1, sum);
                else
                    tile(c, at, c->weights + block * size, zero, 0, sum);
#pragma GCC unroll 8
                for (int p = 0; p < PIXELS; p++) {
                    if (begin + p >= pixels) break;
                    const int64_t place = ((n * pixels) + begin + p) * c->outputs + block * 32;
#pragma GCC unroll 2
                    for (int l = 0; l < LANES; l++) {
                        const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[p][l], correction[l]));
                        __m512 y = _mm512_fmadd_ps(exact, gain[l], bias[l]);
                        if (onto) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(present[l], onto + place + l * 16));
                        _mm512_mask_storeu_ps(out + place + l * 16, present[l], y);
                    }
                }
            }
        }
}
#endif
