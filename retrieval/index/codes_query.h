// One query of a search by codes: what may be among its best, and what it asks of the items to come. See codes_native.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "codes_native.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI2__) && defined(__AVX512VL__) && !defined(RETRIEVAL_PORTABLE)
#include <immintrin.h>
#define WIDE 1
#else
#define WIDE 0
#endif

namespace {

constexpr int64_t BUFFER = 384, LARGEST_BUFFER = 1 << 15;
constexpr int64_t STEP = 64;  // codes of a query that the matrix unit takes at once

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
  std::vector<int8_t> bytes;  // and zeros up to whole steps
  int32_t offset;             // 128 · Σ bytes, which the unsigned codes add
  float scale, length;
  float margin;               // how far a score by codes may be off
  float least;                // what a score must reach, and the same in units of `scale`
  float least_scaled;
  float hoped = -std::numeric_limits<float>::infinity();  // a threshold that was guessed
  int64_t count = 0;
  std::vector<float> scores;
  std::vector<int32_t> rows;

  Query(const Codes& over, const float* asked, int64_t k_) : codes(&over), vector(asked), k(k_) {
    float largest = 0, squares = 0, off = 0;
    for (int64_t d = 0; d < over.width; ++d) largest = std::max(largest, std::fabs(asked[d]));
    scale = scale_of(largest);
    bytes.assign((over.groups * 4 + STEP - 1) / STEP * STEP, 0);
    offset = 0;
    for (int64_t d = 0; d < over.width; ++d) {
      bytes[d] = std::isfinite(asked[d]) ? int8_t(std::nearbyint(asked[d] / scale)) : 0;
      offset += 128 * bytes[d];
      float error = asked[d] - bytes[d] * scale;
      squares += asked[d] * asked[d];
      off += error * error;
    }
    // |q·x − q̂·x̂| ≤ |q| |x − x̂| + |q − q̂| |x̂|, and what float32 sums lose.
    length = std::sqrt(squares);
    margin = length * over.error + std::sqrt(off) * over.norm;
    margin += float(over.width + 16) * 0x1p-22f * length * over.norm;
    // One that is not finite finds nothing.
    require(std::isfinite(length) ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity());
    scores.resize(BUFFER + 8 * LANES);
    rows.resize(scores.size());
  }

  void require(float score) { least = score, least_scaled = score / scale; }

  // A threshold from a sample of the items: what its k-th best scores. Whether it was low enough shows in the end.
  void hope() {
    if (count >= k) hoped = kth(scores.data(), count, k, true) - 2 * margin, require(hoped);
    count = 0;
  }

  // Whether items that the threshold kept out may be among the K best.
  bool missed() const {
    if (std::isinf(hoped)) return false;
    return count < k || kth(scores.data(), count, k, false) - 2 * margin < hoped;
  }

  void begin_anew() {
    count = 0, hoped = -std::numeric_limits<float>::infinity();
    require(hoped);
  }

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

}  // namespace
