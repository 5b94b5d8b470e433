// Whole vectors of floats, and small matrix products in registers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, MOST_VECTORS = 4;
#else
constexpr int64_t LANES = 8, MOST_VECTORS = 2;
#endif
constexpr int64_t TILE_ROWS = 4;  // rows of a register tile

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

inline Vector load(const float* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof x); }
inline Vector all(float x) { return x - Vector{}; }
inline int64_t round_up(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// e^x, relative error about 1e-7; NaN stays NaN. Range reduction by powers of two, then a polynomial on ±ln(2)/2.
inline Vector exponential(Vector x) {
  x = x > 87.0f ? all(87.0f) : x;
  x = x < -87.0f ? all(-87.0f) : x;
  const Vector rounder = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  const Vector power = (x * 1.44269504088896341f + rounder) - rounder;
  const Vector r = (x - power * 0.693359375f) + power * 2.12194440054690583e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers bits = (__builtin_convertvector(power, Integers) + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// 1/x, relative error about 1e-7, for x from 1 to 1e38; a division takes three times as long.
inline Vector reciprocal(Vector x) {
#ifdef __AVX512F__
  const Vector about = __builtin_ia32_rcp14ps512_mask(x, Vector{}, 0xffff);
  return about + about * (1.0f - x * about);
#else
  return 1.0f / x;
#endif
}

inline Vector silu(Vector x) { return x * reciprocal(1.0f + exponential(-x)); }

// C[r][x] = (C[r][x] if `add`) + Σ_t A[r·a_row + t·a_step] · B[t·b_step + x], R rows of NV vectors, held in registers.
template <int R, int NV>
void tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, float* c, int64_t c_row,
          int64_t steps, bool add) {
  Vector sums[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sums[r][v] = add ? load(c + r * c_row + v * LANES) : Vector{};
  for (int64_t t = 0; t < steps; ++t) {
    Vector wide[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) wide[v] = load(b + t * b_step + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector one = all(a[r * a_row + t * a_step]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sums[r][v] += one * wide[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(c + r * c_row + v * LANES, sums[r][v]);
}

using Tile = void (*)(const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, int64_t, bool);

template <int R>
Tile tile_of(int64_t vectors) {
  switch (vectors) {
    case 1: return tile<R, 1>;
    case 2: return tile<R, 2>;
    case 3: return tile<R, 3>;
    default: return tile<R, 4>;
  }
}

// As `tile`, of any size; `width` is a whole number of vectors.
void product(int64_t rows, int64_t width, int64_t steps, const float* a, int64_t a_row, int64_t a_step, const float* b,
             int64_t b_step, float* c, int64_t c_row, bool add) {
  for (int64_t x = 0; x < width; x += MOST_VECTORS * LANES) {
    const int64_t vectors = std::min(MOST_VECTORS, (width - x) / LANES);
    int64_t r = 0;
    const Tile whole = tile_of<TILE_ROWS>(vectors), single = tile_of<1>(vectors);
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
      whole(a + r * a_row, a_row, a_step, b + x, b_step, c + r * c_row + x, c_row, steps, add);
    for (; r < rows; ++r) single(a + r * a_row, a_row, a_step, b + x, b_step, c + r * c_row + x, c_row, steps, add);
  }
}

}  // namespace
