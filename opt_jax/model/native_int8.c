// Products of float32 rows with int8 matrices [N, K], for XLA on a CPU. `native_int8.py` builds this file and calls it.
//
// They are those of `_in_digits` in `int8.py`, bit by bit: each row is rounded to integers of two int8 digits,
// 256 * first + second, and the sums are those of integers. Weights are read once, as they lie in memory.
//
// Work is split into chunks, of rows of x and of rows of the matrix. The caller and threads of XLA's pool take one after
// the other. A thread that comes late finds none left, so nobody waits for a thread that has not begun.

#include <immintrin.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#define INLINE static inline __attribute__((always_inline))
#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

enum { BLOCK = 32, LANES = 64, SPINS = 200 };  // rows of x in a block; bytes of a vector; pauses before a yield
static const float LARGEST = 1.0f / (127 * 256 + 127), TINY = 1.17549435e-38f;

// Rows of x as digits: rows 2t and 2t + 1 of `digits` are the first and second digits of row t, padded with zeros.
typedef struct {
  int8_t *digits;
  float steps[BLOCK];
  int32_t sums[2 * BLOCK];  // of the digits of each row, times 128
} Rounded;

typedef struct {
  const float *x;   // [T, K]
  const int8_t *w;  // [N, K]
  float *out;       // [T, N]
  int64_t t, k, n, padded;               // padded: K, rounded up to LANES
  Rounded shared;                        // of all rows, if they are one block; otherwise each chunk rounds its block
  int64_t blocks, parts;                 // a chunk is a block of x with a part of the matrix
  _Atomic int64_t next, left, users;     // chunks not taken, chunks not finished, threads that may still look
  _Atomic int failed;
} Job;

// Products --------------------------------------------------------------------------------------------------------------

VNNI INLINE __m512 load(const float *x, int64_t k, int64_t size) {
  return _mm512_maskz_loadu_ps(k + 16 <= size ? 0xffff : k < size ? (1u << (size - k)) - 1 : 0, x + k);
}

// Rounds rows t to `end`, as `_in_digits`. What is not finite becomes 0 there, and its step is not finite.
VNNI static void round_rows(const Job *job, int64_t t, int64_t end, Rounded *rounded) {
  for (int64_t i = 0; t < end; t++, i++) {
    const float *x = job->x + t * job->k;
    int8_t *first = rounded->digits + 2 * i * job->padded, *second = first + job->padded;
    __m512i bits = _mm512_setzero_si512(), sums[2] = {bits, bits};
    for (int64_t k = 0; k < job->k; k += 16)  // bits of floats that are not negative have the order of the floats
      bits = _mm512_max_epi32(
          bits, _mm512_and_si512(_mm512_castps_si512(load(x, k, job->k)), _mm512_set1_epi32(INT32_MAX)));
    int32_t largest = _mm512_reduce_max_epi32(bits);
    float step;
    memcpy(&step, &largest, sizeof step);
    step *= LARGEST;
    step = step < TINY ? TINY : step;
    for (int64_t k = 0; k < job->padded; k += 16) {
      __m512 value = _mm512_mul_ps(load(x, k, job->k), _mm512_set1_ps(1 / step));
      __m512i integer = _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(value, value, _CMP_ORD_Q), value);
      __m512i digit = _mm512_srai_epi32(_mm512_add_epi32(integer, _mm512_set1_epi32(128)), 8);
      __m512i rest = _mm512_sub_epi32(integer, _mm512_slli_epi32(digit, 8));
      _mm_store_si128((__m128i *)(first + k), _mm512_cvtepi32_epi8(digit));
      _mm_store_si128((__m128i *)(second + k), _mm512_cvtepi32_epi8(rest));
      sums[0] = _mm512_add_epi32(sums[0], digit), sums[1] = _mm512_add_epi32(sums[1], rest);
    }
    rounded->steps[i] = step;
    for (int j = 0; j < 2; j++) rounded->sums[2 * i + j] = 128 * _mm512_reduce_add_epi32(sums[j]);
  }
}

// Adds to 16 vectors of sums the products at columns `at` to `at` + LANES of the matrix, but only those of `mask`.
// The instruction multiplies bytes without and with a sign, so 128 is added to the weights.
VNNI INLINE void add_products(
    __m512i *s, const int8_t *const *w, const int8_t *digits, int64_t padded, int64_t at, __mmask64 mask, const int rows) {
  const int columns = 8 / rows;
  __m512i x[4];
#pragma GCC unroll 4
  for (int r = 0; r < 2 * rows; r++) x[r] = _mm512_load_si512(digits + (2 * (r % rows) + r / rows) * padded + at);
#pragma GCC unroll 8
  for (int c = 0; c < columns; c++) {
    __m512i weights = mask == ~0ull ? _mm512_loadu_si512(w[c] + at) : _mm512_maskz_loadu_epi8(mask, w[c] + at);
    weights = _mm512_xor_si512(weights, _mm512_set1_epi8(-128));
#pragma GCC unroll 4
    for (int r = 0; r < 2 * rows; r++)  // for the intrinsic, gcc 12 keeps two copies of the sums
      __asm__("vpdpbusd %2, %1, %0" : "+v"(s[r * columns + c]) : "v"(weights), "v"(x[r]));
  }
}

// 16 sums: of first digits in lanes 0 to 7, of second ones in lanes 8 to 15; of one row of x with 8 rows of the matrix,
// or of two with 4.
VNNI INLINE __m512i sums_of(const int8_t *const *w, const int8_t *digits, int64_t k, int64_t padded, const int rows) {
  int64_t at = 0;
  __m512i s[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) s[i] = _mm512_setzero_si512();
  for (; at + LANES <= k; at += LANES) {
    if (rows == 1)  // the next 8 rows
      for (int c = 0; c < 8; c++) _mm_prefetch((const char *)w[c] + at + 8 * k, _MM_HINT_T0);
    add_products(s, w, digits, padded, at, ~0ull, rows);
  }
  if (at < k) add_products(s, w, digits, padded, at, (1ull << (k - at)) - 1, rows);
#define HALVE(i, low, high) s[i] = _mm512_add_epi32(low(s[2 * i], s[2 * i + 1]), high(s[2 * i], s[2 * i + 1]))
#define EVEN(a, b) _mm512_shuffle_i32x4(a, b, 0x88)
#define ODD(a, b) _mm512_shuffle_i32x4(a, b, 0xdd)
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) HALVE(i, _mm512_unpacklo_epi32, _mm512_unpackhi_epi32);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) HALVE(i, _mm512_unpacklo_epi64, _mm512_unpackhi_epi64);
  HALVE(0, EVEN, ODD), HALVE(1, EVEN, ODD), HALVE(0, EVEN, ODD);
  return s[0];
}

// One or two rows of x, from row i of a block, with 8 rows of the matrix. out: 8 values for each of these rows of x.
VNNI INLINE void multiply_tile(
    const Job *job, const int8_t *const *w, const Rounded *rounded, int64_t i, float *const *out, const int rows) {
  const int32_t *a = rounded->sums + 2 * i, *b = a + 2 * (rows - 1);
  const __m512i too_much =
      _mm512_setr_epi32(a[0], a[0], a[0], a[0], b[0], b[0], b[0], b[0], a[1], a[1], a[1], a[1], b[1], b[1], b[1], b[1]);
  const __m256 step = _mm256_setr_m128(_mm_set1_ps(rounded->steps[i]), _mm_set1_ps(rounded->steps[i + rows - 1]));
#pragma GCC unroll 2
  for (int c = 0; c < 8; c += 8 / rows) {
    __m512i sums = sums_of(w + c, rounded->digits + 2 * i * job->padded, job->k, job->padded, rows);
    sums = _mm512_sub_epi32(sums, too_much);
    __m256 first = _mm256_cvtepi32_ps(_mm512_castsi512_si256(sums));
    __m256 second = _mm256_cvtepi32_ps(_mm512_extracti64x4_epi64(sums, 1));
    __m256 y = _mm256_mul_ps(_mm256_add_ps(_mm256_mul_ps(first, _mm256_set1_ps(256)), second), step);
    _mm_storeu_ps(out[0] + c, _mm256_castps256_ps128(y));
    _mm_storeu_ps(rows == 1 ? out[0] + 4 : out[1] + c, _mm256_extractf128_ps(y, 1));
  }
}

VNNI static void multiply(const Job *job, int64_t t, int64_t end, int64_t n, int64_t end_n, const Rounded *rounded) {
  for (; n < end_n; n += 8) {
    const int8_t *w[8];
    for (int c = 0; c < 8; c++) w[c] = job->w + (n + c < end_n ? n + c : end_n - 1) * job->k;
    for (int64_t i = 0; t + i < end; i += 2) {
      float buffer[2][8], *target = job->out + (t + i) * job->n + n;
      int fits = n + 8 <= end_n, rows = t + i + 1 < end ? 2 : 1;
      float *out[2] = {fits ? target : buffer[0], fits ? target + job->n : buffer[1]};
      if (rows == 2) multiply_tile(job, w, rounded, i, out, 2);
      else multiply_tile(job, w, rounded, i, out, 1);
      for (int r = 0; r < rows && !fits; r++) memcpy(target + r * job->n, buffer[r], (end_n - n) * sizeof(float));
    }
  }
}

// Threads ---------------------------------------------------------------------------------------------------------------

static int8_t *digits_of(const Job *job, int64_t rows) { return aligned_alloc(LANES, 2 * rows * job->padded); }

static void run_chunk(Job *job, int64_t chunk) {
  int64_t block = chunk / job->parts, part = chunk % job->parts, groups = (job->n + 7) / 8;
  int64_t t = job->t * block / job->blocks, end = job->t * (block + 1) / job->blocks;
  int64_t n = groups * part / job->parts * 8, end_n = groups * (part + 1) / job->parts * 8;
  Rounded local, *rounded = job->blocks == 1 ? &job->shared : &local;
  if (rounded == &local) {
    if ((local.digits = digits_of(job, end - t)) == NULL) {
      job->failed = 1;
      return;
    }
    round_rows(job, t, end, &local);
  }
  multiply(job, t, end, n, end_n < job->n ? end_n : job->n, rounded);
  if (rounded == &local) free(local.digits);
}

static void leave(Job *job) {
  if (atomic_fetch_sub(&job->users, 1) > 1) return;
  free(job->shared.digits);
  free(job);
}

static void help(void *data) {
  Job *job = data;
  for (int64_t chunk; (chunk = atomic_fetch_add(&job->next, 1)) < job->blocks * job->parts;) {
    run_chunk(job, chunk);
    atomic_fetch_sub(&job->left, 1);
  }
  leave(job);
}

// Whether there was an error. It is destroyed.
static int failed(const XLA_FFI_CallFrame *frame, XLA_FFI_Error *error) {
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
  if (error != NULL) frame->api->XLA_FFI_Error_Destroy(&args);
  return error != NULL;
}

static void run(Job *job, const XLA_FFI_CallFrame *frame, int64_t threads) {
  int64_t chunks = job->blocks * job->parts;
  atomic_init(&job->left, chunks);
  atomic_init(&job->users, 2);  // `help` in this thread, and who called
  XLA_FFI_ThreadPool_Schedule_Args task = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, frame->ctx, help, job};
  for (int64_t i = 1; i < threads && i < chunks; i++) {
    atomic_fetch_add(&job->users, 1);
    if (failed(frame, frame->api->XLA_FFI_ThreadPool_Schedule(&task))) leave(job);
  }
  help(job);
  for (int spins = 0; atomic_load(&job->left) > 0;) {
    if (++spins < SPINS) _mm_pause();
    else sched_yield();  // the thread with the last chunk may be waiting for this core
  }
}

// The call from XLA -----------------------------------------------------------------------------------------------------

static XLA_FFI_Error *error(const XLA_FFI_CallFrame *frame, XLA_FFI_Error_Code code, const char *message) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message, code};
  return frame->api->XLA_FFI_Error_Create(&args);
}

XLA_FFI_Error *opt_jax_int8_product(XLA_FFI_CallFrame *frame) {
  if (frame->extension_start != NULL && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)frame->extension_start)->metadata;
    metadata->api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    return NULL;
  }
  const XLA_FFI_Buffer *x = frame->args.args[0], *w = frame->args.args[1], *out = frame->rets.rets[0];
  if (x->dtype != XLA_FFI_DataType_F32 || w->dtype != XLA_FFI_DataType_S8 || out->dtype != XLA_FFI_DataType_F32 ||
      x->rank != 2 || w->rank != 2 || x->dims[1] != w->dims[1])
    return error(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "int8 product: not float32 [T, K] and int8 [N, K]");
  if (x->dims[0] == 0 || w->dims[0] == 0) return NULL;

  Job *job = calloc(1, sizeof *job);
  if (job == NULL) return error(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "int8 product: out of memory");
  job->x = x->data, job->w = w->data, job->out = out->data;
  job->t = x->dims[0], job->k = x->dims[1], job->n = w->dims[0];
  job->padded = (job->k + LANES - 1) / LANES * LANES;
  int64_t number = 1;
  XLA_FFI_ThreadPool_NumThreads_Args pool = {
      XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, frame->ctx, &number};
  if (failed(frame, frame->api->XLA_FFI_ThreadPool_NumThreads(&pool))) number = 1;
  job->blocks = (job->t + BLOCK - 1) / BLOCK;
  int64_t parts = 8 * number / job->blocks, most_parts = job->n / 32;
  parts = parts < most_parts ? parts : most_parts;
  job->parts = parts > 1 ? parts : 1;
  if (job->blocks > 1) {
    run(job, frame, number);
  } else if ((job->shared.digits = digits_of(job, job->t)) != NULL) {
    round_rows(job, 0, job->t, &job->shared);
    run(job, frame, number);
  } else {
    job->failed = 1;
    job->users = 1;
  }
  int without_memory = job->failed;
  leave(job);
  return without_memory ? error(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "int8 product: out of memory") : NULL;
}

// Whether this processor can run it.
int opt_jax_int8_supported(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
