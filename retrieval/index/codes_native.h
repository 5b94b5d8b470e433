// What the compiled search and the encoding of codes share. `codes.py` has the same structures.

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
  const float* centres;       // [D][lists], lists a multiple of 16
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
