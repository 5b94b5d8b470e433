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

#include "codes_matrix.h"
#include "codes_native.h"
#include "codes_query.h"
#include "codes_tiles.h"
#include "native_threads.h"

namespace {

// So many queries share each reading of the codes, which comes from memory where there are millions of items.
constexpr int64_t GROUP_QUERIES = 256;
// From so many queries on, 16 are not much slower by the matrix unit.
constexpr int64_t WORTH_MATRIX = 12;
// Items at the beginning of each section that thresholds are guessed by; from how many items and queries on that is worth
// reading them twice.
constexpr int64_t SAMPLED = 32, WORTH_LOOKING_AHEAD = 8192, WORTH_LOOKING_AHEAD_FOR = 4;

// Scores a section's first items for some queries.
void section_of(Query* const* queries, int64_t count, const Codes& codes, int64_t section, int64_t items, const uint8_t* allowed) {
  const int64_t begin = codes.starts[section];
  int64_t q = 0;
#if MATRIX
  for (; has_matrix_unit() && q + WORTH_MATRIX <= count; q += ROWS)
    MatrixTile(queries + q, std::min(ROWS, count - q), codes, allowed).score(begin, items);
#endif
  for (; q + 4 <= count; q += 4) blocks_of<4, 4>(queries + q, codes, begin, items, allowed);
  for (; q < count; ++q) blocks_of<1, 8>(queries + q, codes, begin, items, allowed);
}

// Thresholds by the first items of every section, where these are few of many: most items then pass nowhere.
void look_ahead(const std::vector<Query*>& queries, const Codes& codes, int64_t part, int64_t parts) {
  int64_t items = 0, sampled = 0;
  for (int64_t section = part; section < codes.sections; section += parts) {
    items += codes.counts[section];
    sampled += std::min(SAMPLED, codes.counts[section]);
  }
  if (items < WORTH_LOOKING_AHEAD || int64_t(queries.size()) < WORTH_LOOKING_AHEAD_FOR) return;
  const int64_t k = queries[0]->k;
  // So deep in the sample lie the K best of all, three deviations allowed for.
  const double mean = double(k) * double(sampled) / double(items);
  const int64_t depth = int64_t(std::ceil(mean + 3 * std::sqrt(mean) + 1));
  if (depth > sampled / 2) return;
  for (Query* query : queries) query->k = depth;
  for (int64_t section = part; section < codes.sections; section += parts)
    section_of(queries.data(), int64_t(queries.size()), codes, section, std::min(SAMPLED, codes.counts[section]), nullptr);
  for (Query* query : queries) query->hope(), query->k = k;
}

// Candidates of some queries in every `parts`-th of all sections, from the `part`-th on.
void search_all(std::vector<Query>& queries, const Codes& codes, const Asked& asked, int64_t part, int64_t parts) {
  std::vector<Query*> all;
  for (Query& query : queries) all.push_back(&query);
  const auto score = [&] {
    for (int64_t section = part; section < codes.sections && !all.empty(); section += parts)
      section_of(all.data(), int64_t(all.size()), codes, section, codes.counts[section], asked.allowed);
  };
  if (!asked.allowed) look_ahead(all, codes, part, parts);
  score();
  all.clear();
  for (Query& query : queries)
    if (query.missed()) query.begin_anew(), all.push_back(&query);
  score();
}

// The same in those of the sections that promise a query most: by their centre, and by how far from it their items lie.
void search_lists(std::vector<Query>& queries, const Codes& codes, const Asked& asked, int64_t part, int64_t parts) {
  std::vector<float> scores;
  std::vector<int32_t> found;             // sections, query by query
  std::vector<size_t> ends;
  std::vector<int64_t> starts(codes.sections + 1, 0);
  for (Query& query : queries) {
    scores.assign(codes.lists, 0);
    for (int64_t d = 0; d <= codes.width; ++d) {
      const float* centres = codes.centres + d * codes.lists;
      const float asked = d < codes.width ? query.vector[d] : query.length;
      for (int64_t c = 0; c < codes.lists; ++c) scores[c] += asked * centres[c];
    }
    const float least = kth(scores.data(), codes.sections, asked.probes, true);
    for (int64_t section = 0; section < codes.sections; ++section)
      if (scores[section] >= least && section % parts == part) found.push_back(int32_t(section)), ++starts[section + 1];
    ends.push_back(found.size());
  }
  // Queries section by section.
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  std::vector<Query*> wanting(found.size());
  size_t at = 0;
  for (size_t q = 0; q < queries.size(); ++q)
    for (; at < ends[q]; ++at) wanting[next[found[at]]++] = &queries[q];
  for (int64_t section = part; section < codes.sections; section += parts) {
    const int64_t begin = starts[section], count = starts[section + 1] - begin;
    if (count) section_of(&wanting[begin], count, codes, section, codes.counts[section], asked.allowed);
  }
}

void search(std::vector<Query>& queries, const Codes& codes, const Asked& asked, int64_t part, int64_t parts) {
#if MATRIX
  const MatrixUnit unit;
#endif
  (codes.lists ? search_lists : search_all)(queries, codes, asked, part, parts);
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
