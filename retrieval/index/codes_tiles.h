// Scores of blocks of 16 items for several queries at once, by the widest instructions that there are. See codes_native.cpp.

#pragma once

#include "codes_query.h"

namespace {

#if WIDE

// Keeps the scores of `masks`; apart, so that what seldom happens takes no registers from what always does.
template <int BLOCKS>
__attribute__((noinline)) void take(
    Query& query, const __m512* scores, const __mmask16* masks, int64_t block, const uint8_t* allowed) {
  const Codes& codes = *query.codes;
  const __m512 scale = _mm512_set1_ps(query.scale);
  for (int b = 0; b < BLOCKS; ++b, ++block) {
    __mmask16 mask = masks[b];
    if (!mask) continue;
    __m512i places = _mm512_add_epi32(_mm512_set1_epi32(int(block * LANES)),
                                      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    if (codes.rows) {
      places = _mm512_loadu_si512(codes.rows + block * LANES);
      if (allowed) {
        alignas(64) int32_t rows[LANES];
        _mm512_store_si512(rows, places);
        for (uint32_t left = mask; left; left &= left - 1) {
          int lane = __builtin_ctz(left);
          if (!is_allowed(allowed, rows[lane])) mask &= ~(1u << lane);
        }
      }
    }
    // There is room for all 16, and a whole store is quicker than one of some lanes.
    _mm512_storeu_ps(query.scores.data() + query.count, _mm512_maskz_compress_ps(mask, _mm512_mul_ps(scores[b], scale)));
    _mm512_storeu_si512(query.rows.data() + query.count, _mm512_maskz_compress_epi32(mask, places));
    query.count += __builtin_popcount(mask);
  }
}

// Which lanes of a block hold items that may be answered, as far as that can be told without their rows.
inline __mmask16 lanes_of(const Codes& codes, int64_t block, int64_t items, const uint8_t* allowed) {
  uint32_t mask = items >= LANES ? 0xffffu : (1u << items) - 1;
  if (allowed && !codes.rows) {
    uint16_t bits = allowed[block * 2];
    if (items > 8) bits = uint16_t(bits | allowed[block * 2 + 1] << 8);
    mask &= bits;
  }
  return __mmask16(mask);
}

// sum + Σ of four products in each lane, x unsigned. By hand: GCC 12 moves and spills the sums of the intrinsic.
inline void add_products(__m512i& sum, __m512i x, __m512i y) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y)); }

// The loops over a tile must be unrolled early, or its sums live in memory.
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < count; ++i)

template <int QUERIES, int BLOCKS>
inline void tile(Query* const* queries, const Codes& codes, int64_t block, int64_t items, const uint8_t* allowed) {
  __mmask16 lanes[BLOCKS];
  uint32_t any = 0;
  EACH(b, BLOCKS) any |= lanes[b] = lanes_of(codes, block + b, items - b * LANES, allowed);
  if (!any) return;
  __m512i sums[QUERIES][BLOCKS];
  EACH(q, QUERIES) EACH(b, BLOCKS) sums[q][b] = _mm512_set1_epi32(-queries[q]->offset);
  const int64_t bytes = codes.groups * 64;
  const uint8_t* at = codes.codes + block * bytes;
  const int8_t* asked[QUERIES];
  EACH(q, QUERIES) asked[q] = queries[q]->bytes.data();
  for (int64_t g = 0; g < codes.groups; ++g) {
    __m512i x[BLOCKS];
    EACH(b, BLOCKS) x[b] = _mm512_loadu_si512(at + b * bytes + g * 64);
    EACH(q, QUERIES) {
      int32_t four;
      std::memcpy(&four, asked[q] + 4 * g, 4);
      __m512i y = _mm512_set1_epi32(four);
      EACH(b, BLOCKS) add_products(sums[q][b], x[b], y);
    }
  }
  EACH(q, QUERIES) {
    const __m512 least = _mm512_set1_ps(queries[q]->least_scaled);
    __m512 scores[BLOCKS];
    __mmask16 masks[BLOCKS], found = 0;
    EACH(b, BLOCKS) {
      scores[b] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[q][b]), _mm512_loadu_ps(codes.scales + (block + b) * LANES));
      masks[b] = _mm512_mask_cmp_ps_mask(lanes[b], scores[b], least, _CMP_GE_OQ);
      found = _kor_mask16(found, masks[b]);
    }
    if (found) take<BLOCKS>(*queries[q], scores, masks, block, allowed);
  }
}

#else

template <int QUERIES, int BLOCKS>
inline void tile(Query* const* queries, const Codes& codes, int64_t block, int64_t items, const uint8_t* allowed) {
  for (int b = 0; b < BLOCKS; ++b, ++block, items -= LANES) {
    const uint8_t* at = codes.codes + block * codes.groups * 64;
    for (int q = 0; q < QUERIES; ++q) {
      Query& query = *queries[q];
      int32_t sums[LANES];
      for (int64_t i = 0; i < LANES; ++i) sums[i] = -query.offset;
      for (int64_t g = 0; g < codes.groups; ++g)
        for (int64_t i = 0; i < LANES; ++i)
          for (int64_t d = 0; d < 4; ++d) sums[i] += int32_t(at[g * 64 + i * 4 + d]) * query.bytes[4 * g + d];
      for (int64_t i = 0; i < std::min(items, LANES); ++i) {
        float score = float(sums[i]) * codes.scales[block * LANES + i];
        if (!(score >= query.least_scaled)) continue;
        int32_t row = codes.rows ? codes.rows[block * LANES + i] : int32_t(block * LANES + i);
        if (allowed && !is_allowed(allowed, row)) continue;
        query.scores[query.count] = score * query.scale;
        query.rows[query.count++] = row;
      }
    }
  }
}

#endif

// Apart, like all that loops over items: inlined beside each other, they take each other's registers.
template <int QUERIES, int BLOCKS>
__attribute__((noinline)) void blocks_of(Query* const* queries, const Codes& codes, int64_t begin, int64_t items, const uint8_t* allowed) {
  int64_t block = 0, blocks = (items + LANES - 1) / LANES;
  for (; block + BLOCKS <= blocks; block += BLOCKS) {
    for (int q = 0; q < QUERIES; ++q) queries[q]->make_room(BLOCKS * LANES);
    tile<QUERIES, BLOCKS>(queries, codes, begin + block, items - block * LANES, allowed);
  }
  for (; block < blocks; ++block) {
    for (int q = 0; q < QUERIES; ++q) queries[q]->make_room(LANES);
    tile<QUERIES, 1>(queries, codes, begin + block, items - block * LANES, allowed);
  }
}

}  // namespace
