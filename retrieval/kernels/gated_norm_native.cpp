// LayerNorm(x) ⊙ u ⊙ dropout of gated_norm.py in float32, forward and backward, one pass over each row.
//
// The dropout mask is drawn again in the backward pass. Its bits are those of numpy's Philox: element (t, c) reads lane
// c mod 16 of block t·⌈C/16⌉ + ⌊c/16⌋, Philox4x64-10 of that counter under the key (seed, 0).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "native_threads.h"

extern "C" {

// Mirrored by gated_norm_native.py. `x_row`, `u_row` and `dy_row` count floats; rows are contiguous.
struct GatedNorm {
  int64_t rows, columns;
  const float *x, *u, *dy;
  int64_t x_row, u_row, dy_row;
  int64_t threads;
  uint64_t seed;
  int64_t dropped;  // elements whose 16 bits, as a signed number, are below `threshold` are dropped; 0: none are
  int64_t threshold;
  float scale, eps;
};

}  // extern "C"

namespace {

constexpr int64_t LANES = 16;   // of 16 bits in a Philox block
constexpr int64_t ROWS_PER_THREAD = 1 << 9;
constexpr int64_t PARTIAL = 16;  // sums that run beside each other, so that the compiler may use vectors

void philox(uint64_t counter, uint64_t seed, int16_t* out) {
  uint64_t c0 = counter, c1 = 0, c2 = 0, c3 = 0, k0 = seed, k1 = 0;
  for (int round = 0; round < 10; ++round) {
    const unsigned __int128 a = static_cast<unsigned __int128>(0xD2E7470EE14C6C93ull) * c0;
    const unsigned __int128 b = static_cast<unsigned __int128>(0xCA5A826395121157ull) * c2;
    c0 = static_cast<uint64_t>(b >> 64) ^ c1 ^ k0;
    c1 = static_cast<uint64_t>(b);
    c2 = static_cast<uint64_t>(a >> 64) ^ c3 ^ k1;
    c3 = static_cast<uint64_t>(a);
    k0 += 0x9E3779B97F4A7C15ull;
    k1 += 0xBB67AE8584CAA73Bull;
  }
  const uint64_t words[4] = {c0, c1, c2, c3};
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  for (int64_t lane = 0; lane < LANES; ++lane) out[lane] = static_cast<int16_t>(words[lane / 4] >> (16 * (lane % 4)));
#else
  std::memcpy(out, words, sizeof words);
#endif
}

// 1/(1 − p) where element c of row t is kept, else 0; `mask` has room for whole blocks.
void draw(const GatedNorm& g, int64_t t, float* __restrict mask) {
  const int64_t blocks = (g.columns + LANES - 1) / LANES;
  // Copies, and all of one width: choices become vector instructions instead of branches that nobody can predict.
  const int32_t threshold = static_cast<int32_t>(g.threshold);
  const float scale = g.scale;
  for (int64_t block = 0; block < blocks; ++block) {
    int16_t bits[LANES];
    philox(static_cast<uint64_t>(t * blocks + block), g.seed, bits);
    int32_t wide[LANES];
    for (int64_t lane = 0; lane < LANES; ++lane) wide[lane] = bits[lane];
    for (int64_t lane = 0; lane < LANES; ++lane) mask[block * LANES + lane] = wide[lane] >= threshold ? scale : 0.0f;
  }
}

float sum(const float* values, int64_t count) {
  float partial[PARTIAL] = {};
  int64_t c = 0;
  for (; c + PARTIAL <= count; c += PARTIAL)
    for (int64_t lane = 0; lane < PARTIAL; ++lane) partial[lane] += values[c + lane];
  for (int64_t lane = 0; c < count; ++c, ++lane) partial[lane] += values[c];
  float total = 0.0f;
  for (float part : partial) total += part;
  return total;
}

// Runs row(t, mask, scratch) for all rows; `mask` is filled where elements are dropped, all ones elsewhere.
template <class EachRow>
void for_each_row(const GatedNorm& g, EachRow each_row) {
  const int64_t threads = std::max<int64_t>(1, std::min(g.threads, g.rows / ROWS_PER_THREAD));
  on_threads(threads, [&](int64_t part) {
    std::vector<float> mask((g.columns + LANES - 1) / LANES * LANES, 1.0f), first(g.columns), second(g.columns);
    for (int64_t t = g.rows * part / threads; t < g.rows * (part + 1) / threads; ++t) {
      if (g.dropped) draw(g, t, mask.data());
      each_row(t, mask.data(), first.data(), second.data());
    }
  });
}

}  // namespace

extern "C" {

void gated_norm_forward(const GatedNorm* g, float* out, float* mean, float* rstd) {
  const int64_t C = g->columns;
  for_each_row(*g, [&](int64_t t, const float* __restrict mask, float* __restrict centred, float* __restrict squares) {
    const float *x = g->x + t * g->x_row, *u = g->u + t * g->u_row;
    float* __restrict y = out + t * C;
    const float m = sum(x, C) / C;
    for (int64_t c = 0; c < C; ++c) centred[c] = x[c] - m;
    for (int64_t c = 0; c < C; ++c) squares[c] = centred[c] * centred[c];
    const float r = 1.0f / std::sqrt(sum(squares, C) / C + g->eps);
    for (int64_t c = 0; c < C; ++c) y[c] = centred[c] * r * mask[c] * u[c];
    mean[t] = m;
    rstd[t] = r;
  });
}

void gated_norm_backward(const GatedNorm* g, const float* mean, const float* rstd, float* dx, float* du) {
  const int64_t C = g->columns;
  for_each_row(*g, [&](int64_t t, const float* __restrict mask, float* __restrict dnormed, float* __restrict product) {
    const float *x = g->x + t * g->x_row, *u = g->u + t * g->u_row, *dy = g->dy + t * g->dy_row;
    float *__restrict dx_t = dx + t * C, *__restrict du_t = du + t * C;
    const float m = mean[t], r = rstd[t];
    for (int64_t c = 0; c < C; ++c) {
      const float normed = (x[c] - m) * r, grad = dy[c] * mask[c];
      du_t[c] = normed * grad;
      dnormed[c] = grad * u[c];
      product[c] = dnormed[c] * normed;
    }
    const float average = sum(dnormed, C) / C, along = sum(product, C) / C;
    for (int64_t c = 0; c < C; ++c) dx_t[c] = r * (dnormed[c] - average - (x[c] - m) * r * along);
  });
}

}  // extern "C"
