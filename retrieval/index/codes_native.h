// What the compiled search, the encoding of codes and the settling of answers share. `codes.py` has the same structures.

#pragma once

#include <cstdint>

constexpr int64_t LANES = 16;

struct Codes {
  int64_t width, groups;      // D, G
  int64_t sections;           // lists, or pieces of one
  const int64_t* starts;      // first block of each section, [sections + 1]
  const int64_t* counts;      // items of each section, [sections]
  const uint8_t* codes;       // [blocks][G][16][4]
  const float* scales;        // of each place, [blocks * 16]; 0 where there is no item
  const int32_t* rows;        // of each place, [blocks * 16]; null where places are rows
  const float* vectors;       // [N, D]
  float error, norm;          // largest |x − x̂| and |x̂|
  int64_t lists;              // of `centres`; 0 where every section is searched
  const float* centres;       // [D + 1][lists], lists a multiple of 16; last, what a query of length 1 gains by a list's width
};

struct Asked {
  int64_t queries, k, probes, threads;
  const float* vectors;       // [B, D]
  const uint8_t* allowed;     // packed rows, or null
  float* scores;              // [B, K]
  int64_t* rows;              // [B, K]
};

// What a code of 1 stands for. Numbers so small that their 127th part could vanish count as 0.
inline float scale_of(float largest) { return largest > 1e-30f ? largest / 127 : 1; }

// The score of an item, whoever asks: sums in one order, so that equal vectors score the same everywhere.
inline float dot(const float* a, const float* b, int64_t width) {
  float parts[LANES] = {};
  int64_t d = 0;
  for (; d + LANES <= width; d += LANES)
    for (int64_t i = 0; i < LANES; ++i) parts[i] += a[d + i] * b[d + i];
  for (int64_t i = 0; d + i < width; ++i) parts[i] += a[d + i] * b[d + i];
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

inline void fetch_ahead(const float* vector, int64_t width) {
  const char* ahead = reinterpret_cast<const char*>(vector);
  for (int64_t byte = 0; byte < width * 4; byte += 64) __builtin_prefetch(ahead + byte);
}

inline bool is_allowed(const uint8_t* allowed, int64_t row) { return allowed[row >> 3] >> (row & 7) & 1; }
