// Answers from what was fetched for them: see settle.py, whose reference does the same one query at a time.
//
// Legend: B queries of a group, M of them that are asked for now, N items of the index, A added items, D width.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "codes_native.h"

struct Table {
  int64_t count, width;                // N, D
  const float *vectors, *added;        // [N, D], [A, D]
  const int64_t* tie_rank;             // [N + A]
};

struct Fetched {
  int64_t width, complete;             // candidates per query; whether nothing else could be fetched
  const int64_t* rows;                 // [M, width], best first, -1 past the last
  const float* scores;                 // [M, width]
};

struct Round {
  int64_t count, is_true;              // M; whether the scores are those of `dot`
  const int64_t* members;              // [M], places in what is [B]
  const float* queries;                // [B, D]
  const int64_t *wanted, *from_index;  // [B]
  const int64_t *starts, *excluded;    // [B + 1], [X]; null where nothing is excluded
  const uint8_t* allowed;              // packed rows of the index; null where all that were fetched are
  Fetched index, added;
  int64_t columns;                     // answers of a query, at most
  int64_t* rows;                       // [B, columns]: answers
  float* scores;                       // [B, columns]
  uint8_t* settled;                    // [M]
};

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float ROUNDING = 1e-6f;  // of other scores than those of `dot`, times the query's length

struct Candidate {
  float score;
  int64_t row;
};

// A few rows, to be asked for others: open addressing, at most half full.
class Rows {
 public:
  void fill(const int64_t* rows, int64_t count) {
    bits_ = 1;
    while (count && (int64_t(1) << bits_) < 2 * count) ++bits_;
    places_.assign(count ? size_t(1) << bits_ : 0, -1);
    for (int64_t i = 0; i < count; ++i) places_[place(rows[i])] = rows[i];
  }

  bool holds(int64_t row) const { return !places_.empty() && places_[place(row)] == row; }

 private:
  // Where a row is, or would be.
  size_t place(int64_t row) const {
    size_t at = uint64_t(row) * 0x9e3779b97f4a7c15u >> (64 - bits_), mask = places_.size() - 1;
    while (places_[at] != -1 && places_[at] != row) at = (at + 1) & mask;
    return at;
  }

  int bits_ = 1;
  std::vector<int64_t> places_;
};

class Settler {
 public:
  Settler(const Table& table, const Round& round) : table_(table), round_(round) {}

  // Writes the answers of the m-th member if what was fetched determines them; whether it does.
  bool settle(int64_t m) {
    const int64_t b = round_.members[m], wanted = round_.wanted[b];
    const float* query = round_.queries + b * table_.width;
    if (round_.excluded) excluded_.fill(round_.excluded + round_.starts[b], round_.starts[b + 1] - round_.starts[b]);
    kept_.clear();
    float cut = keep(round_.index, m, 0, round_.allowed);
    const int64_t of_index = int64_t(kept_.size());
    cut = std::max(cut, keep(round_.added, m, table_.count, nullptr));
    if (of_index < round_.from_index[b] || int64_t(kept_.size()) < wanted) return false;
    // What was not fetched must score worse than the last answer.
    if (cut > -INFINITE && !(last_of(wanted) > cut + margin(query))) return false;
    if (!round_.is_true) score(query);
    const auto better = [this](const Candidate& a, const Candidate& b) {
      return a.score != b.score ? a.score > b.score : table_.tie_rank[a.row] < table_.tie_rank[b.row];
    };
    if (!std::is_sorted(kept_.begin(), kept_.end(), better)) {
      std::nth_element(kept_.begin(), kept_.begin() + wanted - 1, kept_.end(), better);
      std::sort(kept_.begin(), kept_.begin() + wanted, better);
    }
    for (int64_t i = 0; i < wanted; ++i) {
      round_.rows[b * round_.columns + i] = kept_[i].row;
      round_.scores[b * round_.columns + i] = kept_[i].score;
    }
    return true;
  }

 private:
  // Keeps what was fetched and is eligible; the score that nothing beyond it exceeds.
  float keep(const Fetched& fetched, int64_t m, int64_t first, const uint8_t* allowed) {
    const int64_t* rows = fetched.rows + m * fetched.width;
    const float* scores = fetched.scores + m * fetched.width;
    for (int64_t f = 0; f < fetched.width && rows[f] >= 0; ++f) {
      const int64_t row = rows[f] + first;
      if (allowed && !is_allowed(allowed, row)) continue;
      if (round_.excluded && excluded_.holds(row)) continue;
      kept_.push_back({scores[f], row});
    }
    const bool more = fetched.width && !fetched.complete && rows[fetched.width - 1] >= 0;
    return more ? scores[fetched.width - 1] : -INFINITE;
  }

  // Score, as fetched, of the worst of the best `wanted`.
  float last_of(int64_t wanted) {
    if (round_.added.width) {
      const auto better = [](const Candidate& a, const Candidate& b) { return a.score > b.score; };
      std::nth_element(kept_.begin(), kept_.begin() + wanted - 1, kept_.end(), better);
    }
    return kept_[wanted - 1].score;
  }

  float margin(const float* query) const {
    return round_.is_true ? 0 : ROUNDING * std::sqrt(dot(query, query, table_.width));
  }

  void score(const float* query) {
    for (const Candidate& one : kept_) fetch_ahead(vector(one.row), table_.width);
    for (Candidate& one : kept_) one.score = dot(query, vector(one.row), table_.width);
  }

  const float* vector(int64_t row) const {
    return row < table_.count ? table_.vectors + row * table_.width : table_.added + (row - table_.count) * table_.width;
  }

  const Table& table_;
  const Round& round_;
  Rows excluded_;
  std::vector<Candidate> kept_;
};

}  // namespace

extern "C" {

void settle(const Table* table, const Round* round) {
  Settler settler(*table, *round);
  for (int64_t m = 0; m < round->count; ++m) round->settled[m] = settler.settle(m);
}

}
