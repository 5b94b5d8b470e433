// softmax_loss.py with shared negatives in bfloat16, on processors whose matrix unit (AMX) multiplies it.
//
// Two passes of one shape, rows X against columns Y: scores of a few rows and columns become weights in the cache, which
// sum vectors Z of the columns.
//
//     users:  X = users, Y = Z = contrasts:  running maximum and sum of each row → losses, Σ_r p_tr e_r
//     items:  X = contrasts, Y = users, Z = w_t·users, with the users' log-sum-exps known → Σ_t w_t p_tr u_t
//
// The scores are computed twice: the unit multiplies faster than a weight could be stored and transposed. Weights are
// rounded to bfloat16 for the second product; sums, exponentials and log-sum-exps are float32. Each row belongs to one
// thread: the same bits whatever the number of threads.
//
// Legend: T users, R contrasts, D width, padded to K, a whole number of steps of 32; a tile is 16 rows of 64 bytes.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "native_threads.h"

extern "C" {

// Mirrored by softmax_loss_native.py. Matrices are contiguous rows of bfloat16.
struct SoftmaxLoss {
  int64_t users, items, width;
  const uint16_t *u, *e;
  const float *positive, *bias, *weights;  // bias null: none
  const int32_t *first, *last;             // contrasts that each user leaves out
  float scale;
  int64_t gradients, threads;
};

}  // extern "C"

#ifdef __AMX_BF16__

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t TILE = 16;          // rows of a tile, and float32 columns
constexpr int64_t STEP = 32;          // bfloat16 columns of a tile
constexpr int64_t TILE_SIZE = 512;    // bfloat16 numbers of a tile
constexpr int64_t ROWS = 32;          // rows that share a loaded tile
constexpr int64_t ROW_BLOCK = 128;    // rows for which a block of columns is fetched once
constexpr int64_t COLUMN_BLOCK = 256;
constexpr int PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

struct TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure_tiles() {
  TileConfiguration configuration;
  for (int tile = 0; tile < 8; ++tile) {
    configuration.bytes[tile] = 64;
    configuration.rows[tile] = TILE;
  }
  _tile_loadconfig(&configuration);
}

float to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

uint16_t to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// e^x for x ≤ 88, 0 below −87; relative error about 1e-7. Range reduction by powers of two, then a polynomial.
inline __m512 exponential(__m512 x) {
  const __mmask16 matters = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
  x = _mm512_maskz_mov_ps(matters, x);
  const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fmadd_ps(power, _mm512_set1_ps(2.12194440054690583e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_scalef_ps(matters, p, power);
}

inline void store_weights(uint16_t* to, __m512 low, __m512 high) {
  const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
  std::memcpy(to, &both, sizeof both);
}

// A matrix [count, D] as the three operands that it can be; rows and columns beyond it are zeros.
struct Operand {
  int64_t count, padded, K;
  std::vector<uint16_t> rows;     // [padded, K]: the left factor
  std::vector<uint16_t> columns;  // its transpose as the right factor, tile after tile: 16 rows, then 32 features
  std::vector<uint16_t> sums;     // itself as the right factor: 32 rows, then 16 features

  Operand(const uint16_t* from, int64_t count_, int64_t width) : count(count_), K(round_up(width, STEP)) {
    padded = round_up(count, COLUMN_BLOCK);
    rows.assign(padded * K, 0);
    for (int64_t i = 0; i < count; ++i) std::copy_n(from + i * width, width, rows.data() + i * K);
  }

  void make_columns() {
    columns.resize(padded * K);
    const int64_t steps = K / STEP;
    for (int64_t i = 0; i < padded; ++i)
      for (int64_t c = 0; c < K; c += 2) {
        uint16_t* tile = columns.data() + (i / TILE * steps + c / STEP) * TILE_SIZE;
        std::copy_n(rows.data() + i * K + c, 2, tile + (c % STEP / 2 * TILE + i % TILE) * 2);
      }
  }

  // Each row times its weight; null: as they are.
  void make_sums(const float* weights) {
    sums.resize(padded * K);
    for (int64_t i = 0; i < padded; ++i)
      for (int64_t c = 0; c < K; ++c) {
        const uint16_t x = rows[i * K + c];
        uint16_t* tile = sums.data() + (i / STEP * (K / TILE) + c / TILE) * TILE_SIZE;
        tile[(i % STEP / 2 * TILE + c % TILE) * 2 + i % 2] =
            weights && i < count ? to_bfloat(weights[i] * to_float(x)) : x;
      }
  }
};

// scores[ROWS, COLUMN_BLOCK] = rows · columnsᵀ
void multiply(const uint16_t* rows, const uint16_t* columns, int64_t K, float* scores) {
  const int64_t steps = K / STEP;
  for (int64_t c = 0; c < COLUMN_BLOCK; c += 2 * TILE) {
    const uint16_t* right = columns + c / TILE * steps * TILE_SIZE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, rows + step * STEP, K * 2);
      _tile_loadd(5, rows + TILE * K + step * STEP, K * 2);
      _tile_loadd(6, right + step * TILE_SIZE, 64);
      _tile_loadd(7, right + (steps + step) * TILE_SIZE, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, scores + c, COLUMN_BLOCK * 4);
    _tile_stored(1, scores + c + TILE, COLUMN_BLOCK * 4);
    _tile_stored(2, scores + TILE * COLUMN_BLOCK + c, COLUMN_BLOCK * 4);
    _tile_stored(3, scores + TILE * COLUMN_BLOCK + c + TILE, COLUMN_BLOCK * 4);
  }
}

// sums[ROWS, K] += weights[ROWS, COLUMN_BLOCK] · vectors
void add_products(const uint16_t* weights, const uint16_t* vectors, int64_t K, float* sums) {
  for (int64_t c = 0; c < K; c += 2 * TILE) {
    _tile_loadd(0, sums + c, K * 4);
    _tile_loadd(1, sums + c + TILE, K * 4);
    _tile_loadd(2, sums + TILE * K + c, K * 4);
    _tile_loadd(3, sums + TILE * K + c + TILE, K * 4);
    for (int64_t step = 0; step < COLUMN_BLOCK / STEP; ++step) {
      const uint16_t* right = vectors + (step * (K / TILE) + c / TILE) * TILE_SIZE;
      _tile_loadd(4, weights + step * STEP, COLUMN_BLOCK * 2);
      _tile_loadd(5, weights + TILE * COLUMN_BLOCK + step * STEP, COLUMN_BLOCK * 2);
      _tile_loadd(6, right, 64);
      _tile_loadd(7, right + TILE_SIZE, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums + c, K * 4);
    _tile_stored(1, sums + c + TILE, K * 4);
    _tile_stored(2, sums + TILE * K + c, K * 4);
    _tile_stored(3, sums + TILE * K + c + TILE, K * 4);
  }
}

// Runs a pass over all rows of X. `weigh(row, column, scores, weights, sums)` turns one row's scores of a block of
// columns into weights; `finish(row, sums)` gets a row's sums, or null where none are wanted.
template <class Weigh, class Finish>
void pass(const Operand& x, const Operand& y, bool with_sums, int64_t threads, Weigh weigh, Finish finish) {
  const int64_t K = x.K, blocks = (x.count + ROW_BLOCK - 1) / ROW_BLOCK;
  std::atomic<int64_t> next{0};
  on_threads(std::max<int64_t>(1, std::min(threads, blocks)), [&](int64_t) {
    configure_tiles();
    std::vector<float> scores(ROWS * COLUMN_BLOCK), sums(ROW_BLOCK * K);
    std::vector<uint16_t> weights(ROWS * COLUMN_BLOCK);
    for (int64_t block = next++; block < blocks; block = next++) {
      const int64_t begin = block * ROW_BLOCK, end = std::min(begin + ROW_BLOCK, x.count);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t column = 0; column < y.padded; column += COLUMN_BLOCK)
        for (int64_t row = begin; row < end; row += ROWS) {
          float* of_rows = sums.data() + (row - begin) * K;
          multiply(x.rows.data() + row * K, y.columns.data() + column * K, K, scores.data());
          for (int64_t i = 0; i < std::min(ROWS, end - row); ++i)
            weigh(row + i, column, scores.data() + i * COLUMN_BLOCK, weights.data() + i * COLUMN_BLOCK, of_rows + i * K);
          if (with_sums) add_products(weights.data(), y.sums.data() + column * K, K, of_rows);
        }
      for (int64_t row = begin; row < end; ++row) finish(row, sums.data() + (row - begin) * K);
    }
    _tile_release();
  });
}

}  // namespace

extern "C" {

int softmax_loss_available() { return syscall(SYS_arch_prctl, PERMISSION, TILE_DATA) == 0; }

// `mean` [T, D] and `shares` [R, D] are written where gradients are wanted.
void softmax_loss_forward(const SoftmaxLoss* p, float* losses, float* mean, float* shares) {
  const float nothing = -std::numeric_limits<float>::infinity();
  Operand users(p->u, p->users, p->width), items(p->e, p->items, p->width);
  std::vector<float> bias(items.padded, nothing);  // what is padded weighs nothing
  for (int64_t r = 0; r < p->items; ++r) bias[r] = p->bias ? p->bias[r] : 0.0f;
  std::vector<float> top(p->positive, p->positive + p->users), total(p->users, 0.0f);
  const __m512 scale = _mm512_set1_ps(p->scale);
  items.make_columns();
  if (p->gradients) items.make_sums(nullptr);

  auto weigh_items = [&](int64_t t, int64_t column, float* scores, uint16_t* weights, float* sums) {
    for (int64_t r = std::max<int64_t>(p->first[t], column); r < std::min<int64_t>(p->last[t], column + COLUMN_BLOCK); ++r)
      scores[r - column] = nothing;
    __m512 highest = _mm512_set1_ps(top[t]);
    for (int64_t c = 0; c < COLUMN_BLOCK; c += TILE) {
      const __m512 s = _mm512_fmadd_ps(_mm512_loadu_ps(scores + c), scale, _mm512_loadu_ps(bias.data() + column + c));
      _mm512_storeu_ps(scores + c, s);
      highest = _mm512_max_ps(highest, s);
    }
    const float before = top[t];
    top[t] = _mm512_reduce_max_ps(highest);
    if (top[t] > before) {
      const float shrink = std::exp(before - top[t]);
      total[t] *= shrink;
      for (int64_t c = 0; c < items.K; ++c) sums[c] *= shrink;
    }
    const __m512 shift = _mm512_set1_ps(top[t]);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < COLUMN_BLOCK; c += 2 * TILE) {
      const __m512 low = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + c), shift));
      const __m512 high = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + c + TILE), shift));
      sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
      store_weights(weights + c, low, high);
    }
    total[t] += _mm512_reduce_add_ps(sum);
  };
  pass(users, items, p->gradients, p->threads, weigh_items, [&](int64_t t, const float* sums) {
    const float above = top[t] - p->positive[t], x = std::log(total[t]) + above;
    losses[t] = x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
    if (!p->gradients) return;
    const float factor = std::exp(above - losses[t]);
    for (int64_t c = 0; c < p->width; ++c) mean[t * p->width + c] = sums[c] * factor;
  });
  if (!p->gradients) return;

  users.make_columns();
  users.make_sums(p->weights);
  std::vector<float> log_sum(users.padded, 0.0f);
  std::vector<int32_t> first(users.padded, 0), last(users.padded, 0);
  for (int64_t t = 0; t < p->users; ++t) log_sum[t] = p->positive[t] + losses[t];
  std::copy_n(p->first, p->users, first.begin());
  std::copy_n(p->last, p->users, last.begin());
  auto weigh_users = [&](int64_t r, int64_t column, float* scores, uint16_t* weights, float*) {
    const __m512 of_item = _mm512_set1_ps(bias[r]);
    const __m512i item = _mm512_set1_epi32(static_cast<int32_t>(r));
    auto weight = [&](int64_t c) {
      const __m512 s = _mm512_fmadd_ps(_mm512_loadu_ps(scores + c), scale, of_item);
      const __m512 w = exponential(_mm512_sub_ps(s, _mm512_loadu_ps(log_sum.data() + column + c)));
      const __mmask16 begun = _mm512_cmple_epi32_mask(_mm512_loadu_si512(first.data() + column + c), item);
      const __mmask16 left_out = _mm512_mask_cmpgt_epi32_mask(begun, _mm512_loadu_si512(last.data() + column + c), item);
      return _mm512_maskz_mov_ps(static_cast<__mmask16>(~left_out), w);
    };
    for (int64_t c = 0; c < COLUMN_BLOCK; c += 2 * TILE) store_weights(weights + c, weight(c), weight(c + TILE));
  };
  pass(items, users, true, p->threads, weigh_users, [&](int64_t r, const float* sums) {
    std::copy_n(sums, p->width, shares + r * p->width);
  });
}

}  // extern "C"

#else

extern "C" {

int softmax_loss_available() { return 0; }

void softmax_loss_forward(const SoftmaxLoss*, float*, float*, float*) {}

}  // extern "C"

#endif
