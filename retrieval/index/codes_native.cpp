// Inner products by 8-bit codes, and the K best of them by the vectors themselves. See codes.py for what is promised.
//
// Legend: B queries, N items, D width, G groups of 4 dimensions, K answers per query.
//
// Items lie in blocks of 16. A block's codes are [G][16][4] unsigned bytes (value + 128), so that one instruction
// multiplies 4 dimensions of 16 items. Every score by codes is within a known margin of the true one; what could be
// among the K best by that margin is kept, a few hundred items, and scored by its float32 vector.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "codes_native.h"
#include "native_threads.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI2__) && defined(__AVX512VL__) && !defined(RETRIEVAL_PORTABLE)
#include <immintrin.h>
#define WIDE 1
#else
#define WIDE 0
#endif

namespace {

// So many queries share each reading of the codes, which comes from memory where there are millions of items.
constexpr int64_t GROUP_QUERIES = 256, BUFFER = 384, LARGEST_BUFFER = 1 << 15;

// Floats as integers of the same order.
int32_t ordered(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

float unordered(int32_t bits) {
  bits = bits < 0 ? bits ^ 0x7fffffff : bits;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

int64_t count_from(const float* scores, int64_t count, float least) {
  int64_t found = 0, i = 0;
#if WIDE
  const __m512 limit = _mm512_set1_ps(least);
  for (; i + LANES <= count; i += LANES)
    found += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_loadu_ps(scores + i), limit, _CMP_GE_OQ));
#endif
  for (; i < count; ++i) found += scores[i] >= least;
  return found;
}

// A score that at least k of them reach, by halving; `exactly`: the greatest such, else hardly less.
float kth(const float* scores, int64_t count, int64_t k, bool exactly) {
  const float infinity = std::numeric_limits<float>::infinity();
  int64_t low = ordered(-infinity), high = ordered(infinity);
  while (high - low > 1) {
    int64_t middle = low + (high - low) / 2;
    int64_t reached = count_from(scores, count, unordered(int32_t(middle)));
    if (reached >= k) low = middle; else high = middle;
    if (!exactly && reached >= k && reached <= k + k / 16) break;
  }
  return unordered(int32_t(low));
}

struct Found {
  float score;
  int64_t row;
  bool operator<(const Found& other) const { return score != other.score ? score > other.score : row < other.row; }
};

// One query: its codes, and what may be among its best.
struct Query {
  const Codes* codes;
  const float* vector;
  int64_t k;
  std::vector<int8_t> bytes;
  int32_t offset;             // 128 · Σ bytes, which the unsigned codes add
  float scale, margin;        // margin: how far a score by codes may be off
  float least;                // what a score must reach, and the same in units of `scale`
  float least_scaled;
  int64_t count = 0;
  std::vector<float> scores;
  std::vector<int32_t> rows;

  Query(const Codes& over, const float* asked, int64_t k_) : codes(&over), vector(asked), k(k_) {
    float largest = 0, squares = 0, off = 0;
    for (int64_t d = 0; d < over.width; ++d) largest = std::max(largest, std::fabs(asked[d]));
    scale = scale_of(largest);
    bytes.assign(over.groups * 4, 0);
    offset = 0;
    for (int64_t d = 0; d < over.width; ++d) {
      bytes[d] = std::isfinite(asked[d]) ? int8_t(std::nearbyint(asked[d] / scale)) : 0;
      offset += 128 * bytes[d];
      float error = asked[d] - bytes[d] * scale;
      squares += asked[d] * asked[d];
      off += error * error;
    }
    // |q·x − q̂·x̂| ≤ |q| |x − x̂| + |q − q̂| |x̂|, and what float32 sums lose.
    float length = std::sqrt(squares);
    margin = length * over.error + std::sqrt(off) * over.norm;
    margin += float(over.width + 16) * 0x1p-22f * length * over.norm;
    // One that is not finite finds nothing.
    require(std::isfinite(length) ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity());
    scores.resize(BUFFER + 8 * LANES);
    rows.resize(scores.size());
  }

  void require(float score) { least = score, least_scaled = score / scale; }

  int64_t room() const { return int64_t(scores.size()) - count; }

  void keep_from(float score) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      scores[kept] = scores[i], rows[kept] = rows[i];
      kept += scores[i] >= score;
    }
    count = kept;
  }

  // Fewer candidates, or room for more of them.
  void compact() {
    if (count > k) {
      require(std::max(least, kth(scores.data(), count, k, false) - 2 * margin));
      keep_from(least);
    }
    if (count <= int64_t(scores.size()) / 2) return;
    if (int64_t(scores.size()) < std::max(LARGEST_BUFFER, 8 * k)) {
      scores.resize(2 * scores.size());
      rows.resize(scores.size());
    } else {
      // Too many are too much alike to be told apart by codes: keep the best by their vectors.
      std::vector<Found> best = exactly();
      count = int64_t(best.size());
      for (int64_t i = 0; i < count; ++i) scores[i] = best[i].score, rows[i] = int32_t(best[i].row);
    }
  }

  void make_room(int64_t items) {
    while (room() < items) compact();
  }

  // The K best of the candidates by their vectors: first those that are best by codes, whose K-th true score then tells,
  // by one margin where codes alone need two, which of the others must be looked at.
  std::vector<Found> exactly() const {
    std::vector<Found> best;
    best.reserve(count);
    if (count <= k) {
      score_from(-std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity(), best);
    } else {
      const float last = kth(scores.data(), count, k, false);
      score_from(last, std::numeric_limits<float>::infinity(), best);
      std::nth_element(best.begin(), best.begin() + k - 1, best.end());
      score_from(best[k - 1].score - margin, last, best);
      std::nth_element(best.begin(), best.begin() + k, best.end());
      best.resize(k);
    }
    std::sort(best.begin(), best.end());
    return best;
  }

  // Scores the candidates from one score by codes to below another.
  void score_from(float least_, float below, std::vector<Found>& into) const {
    const size_t first = into.size();
    for (int64_t i = 0; i < count; ++i) {
      if (!(scores[i] >= least_ && scores[i] < below)) continue;
      into.push_back({0, rows[i]});
      fetch_ahead(codes->vectors + int64_t(rows[i]) * codes->width, codes->width);
    }
    for (size_t i = first; i < into.size(); ++i)
      into[i].score = dot(vector, codes->vectors + into[i].row * codes->width, codes->width);
  }
};

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

template <int QUERIES, int BLOCKS>
void blocks_of(Query* const* queries, const Codes& codes, int64_t begin, int64_t items, const uint8_t* allowed) {
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

// Scores one section's items for some queries.
void section_of(Query* const* queries, int64_t count, const Codes& codes, int64_t section, const uint8_t* allowed) {
  int64_t begin = codes.starts[section], items = codes.counts[section], q = 0;
  for (; q + 4 <= count; q += 4) blocks_of<4, 4>(queries + q, codes, begin, items, allowed);
  for (; q < count; ++q) blocks_of<1, 8>(queries + q, codes, begin, items, allowed);
}

// The sections that a query searches, those of the `probes` centres nearest to it, are added to `found`.
void nearest(const Codes& codes, const float* query, int64_t probes, std::vector<float>& scores, std::vector<int32_t>& found) {
  scores.assign(codes.lists, 0);
  for (int64_t d = 0; d < codes.width; ++d) {
    const float* centres = codes.centres + d * codes.lists;
    for (int64_t c = 0; c < codes.lists; ++c) scores[c] += query[d] * centres[c];
  }
  float least = kth(scores.data(), codes.sections, probes, true);
  for (int64_t c = 0; c < codes.sections; ++c)
    if (scores[c] >= least) found.push_back(int32_t(c));
}

// Which queries search which section: those of section s are `queries[starts[s]:starts[s + 1]]`.
struct Wanted {
  std::vector<Query*> queries;
  std::vector<int64_t> starts;

  Wanted(std::vector<Query>& asking, const Codes& codes, int64_t probes) : starts(codes.sections + 1, 0) {
    std::vector<float> scores;
    std::vector<int32_t> found;
    std::vector<size_t> ends;
    for (Query& query : asking) {
      nearest(codes, query.vector, probes, scores, found);
      ends.push_back(found.size());
    }
    for (int32_t section : found) ++starts[section + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    queries.resize(found.size());
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    size_t at = 0;
    for (size_t q = 0; q < asking.size(); ++q)
      for (; at < ends[q]; ++at) queries[next[found[at]]++] = &asking[q];
  }
};

// Candidates of some queries in every `parts`-th of the sections that they search, from the `part`-th on.
void search(std::vector<Query>& queries, const Codes& codes, const Asked& asked, int64_t part, int64_t parts) {
  if (codes.lists) {
    const Wanted wanted(queries, codes, asked.probes);
    for (int64_t section = part; section < codes.sections; section += parts) {
      const int64_t begin = wanted.starts[section], count = wanted.starts[section + 1] - begin;
      if (count) section_of(&wanted.queries[begin], count, codes, section, asked.allowed);
    }
    return;
  }
  std::vector<Query*> all;
  for (Query& query : queries) all.push_back(&query);
  for (int64_t section = part; section < codes.sections; section += parts)
    section_of(all.data(), int64_t(all.size()), codes, section, asked.allowed);
}

void answer(const Query& query, const Asked& asked, int64_t b) {
  std::vector<Found> best = query.exactly();
  for (int64_t i = 0; i < asked.k; ++i) {
    bool is = i < int64_t(best.size());
    asked.scores[b * asked.k + i] = is ? best[i].score : -std::numeric_limits<float>::infinity();
    asked.rows[b * asked.k + i] = is ? best[i].row : -1;
  }
}

std::vector<Query> asked_from(const Codes& codes, const Asked& asked, int64_t begin, int64_t end) {
  std::vector<Query> queries;
  queries.reserve(end - begin);
  for (int64_t b = begin; b < end; ++b) queries.emplace_back(codes, asked.vectors + b * codes.width, asked.k);
  return queries;
}

}  // namespace

extern "C" {

void codes_search(const Codes* codes, const Asked* asked) {
  int64_t threads = std::max<int64_t>(1, asked->threads), queries = asked->queries;
  if (queries >= threads) {
    int64_t size = std::min(GROUP_QUERIES, (queries + threads - 1) / threads), groups = (queries + size - 1) / size;
    on_threads(std::min(threads, groups), [=](int64_t thread) {
      for (int64_t group = thread; group < groups; group += threads) {
        int64_t begin = group * size, end = std::min(queries, begin + size);
        std::vector<Query> mine = asked_from(*codes, *asked, begin, end);
        search(mine, *codes, *asked, 0, 1);
        for (int64_t b = begin; b < end; ++b) {
          mine[b - begin].compact();
          answer(mine[b - begin], *asked, b);
        }
      }
    });
    return;
  }
  // Fewer queries than threads: each searches its part of the items for all of them.
  std::vector<std::vector<Query>> parts(threads);
  on_threads(threads, [&](int64_t thread) {
    parts[thread] = asked_from(*codes, *asked, 0, queries);
    search(parts[thread], *codes, *asked, thread, threads);
  });
  for (int64_t b = 0; b < queries; ++b) {
    Query& first = parts[0][b];
    for (int64_t part = 1; part < threads; ++part) {
      Query& other = parts[part][b];
      other.compact();
      while (first.room() < other.count) {
        first.compact();
        if (first.room() < other.count) first.scores.resize(first.count + other.count), first.rows.resize(first.scores.size());
      }
      std::copy_n(other.scores.begin(), other.count, first.scores.begin() + first.count);
      std::copy_n(other.rows.begin(), other.count, first.rows.begin() + first.count);
      first.count += other.count;
    }
    first.compact();
    answer(first, *asked, b);
  }
}

}
