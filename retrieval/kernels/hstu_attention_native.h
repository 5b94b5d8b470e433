// HSTU attention of jagged rows, forward and backward: the causal (and windowed) case of hstu_attention.py in float32.
//
// A task is one row and one head. It walks over blocks of queries; scores of a block live in the cache, keys after its
// last query are never touched. Keys and values are laid out transposed, so that every inner loop runs along keys (or
// along features, for sums over keys) in whole vectors. Table gradients are summed per task and then over the tasks in
// a fixed order: the same bits whatever the number of threads.
//
// Legend: n length of a row, D query/key width, V value width, X keys of a block rounded up to whole vectors.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "native_threads.h"
#include "native_vectors.h"

extern "C" {

// Mirrored by hstu_attention_native.py. Strides count floats; the last dimension of q, k, v is contiguous.
struct Problem {
  int64_t rows, heads, width, value_width;
  const int64_t* offsets;
  const float *q, *k, *v;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  const float *pos, *time;  // null: no such bias
  const uint8_t* buckets;   // of all causal pairs, as hstu_buckets writes them; null: not kept
  const int64_t *times, *query_times;
  const int64_t* edges;  // first second of each bucket, and an end
  int64_t window, threads;
  float norm, alpha;  // norm 0: number of visible keys
};

}  // extern "C"

namespace {

constexpr int64_t BLOCK = 16;       // queries of a block
constexpr int64_t BUCKETS = 129;    // time_bucket.NUM_TIME_BUCKETS
constexpr int64_t INTERLEAVED = 4;  // copies of the time table's gradient, see scatter_time
constexpr int64_t PAIRS_PER_THREAD = 1 << 17;

void bucket_row(const Problem& p, int64_t start, int64_t i, int64_t low, uint8_t* out) {
  // Times are sorted as a rule, so the bucket of the key before is the place to start from.
  int64_t bucket = 0;
  const int64_t now = p.query_times[start + i];
  for (int64_t j = i; j >= low; --j) {
    int64_t delta = static_cast<int64_t>(static_cast<uint64_t>(now) - static_cast<uint64_t>(p.times[start + j]));
    if (delta < 0) delta = static_cast<int64_t>(-static_cast<uint64_t>(delta));
    if (delta < 0) delta = 0;  // −2^63, as in time_bucket
    while (bucket < BUCKETS - 1 && delta >= p.edges[bucket + 1]) ++bucket;
    while (delta < p.edges[bucket]) --bucket;
    out[j] = static_cast<uint8_t>(bucket);
  }
}

struct Row {
  int64_t start, length, pairs_before;
};

std::vector<Row> rows_of(const Problem& p) {
  std::vector<Row> rows(p.rows);
  int64_t pairs = 0;
  for (int64_t b = 0; b < p.rows; ++b) {
    const int64_t length = p.offsets[b + 1] - p.offsets[b];
    rows[b] = {p.offsets[b], length, pairs};
    pairs += length * (length + 1) / 2;
  }
  return rows;
}

// Runs work(task) on some threads, the longest rows first; task = row · per_row + part.
template <class MakeWorker>
void in_parallel(const Problem& p, const std::vector<Row>& rows, int64_t per_row, MakeWorker make_worker) {
  std::vector<int64_t> order(rows.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rows[a].length > rows[b].length; });
  const int64_t tasks = static_cast<int64_t>(rows.size()) * per_row;
  const int64_t pairs = rows.empty() ? 0 : rows.back().pairs_before + rows.back().length * (rows.back().length + 1) / 2;
  const int64_t threads = std::min({p.threads, tasks, 1 + pairs * per_row / PAIRS_PER_THREAD});
  std::atomic<int64_t> next{0};
  on_threads(threads, [&](int64_t) {
    auto worker = make_worker();
    for (int64_t t = next++; t < tasks; t = next++) worker(order[t / per_row], t % per_row);
  });
}

// One row and head, laid out for the products; grows to the longest row that a thread meets.
class Worker {
 public:
  Worker(const Problem& p, const std::vector<Row>& rows) : p_(p), rows_(rows) {
    wide_D_ = round_up(p.width);
    wide_V_ = round_up(p.value_width);
  }

  void forward(int64_t b, int64_t head, float* out) {
    open(b, head);
    by_token(values(head), p_.v_token, p_.value_width, wide_V_, values_);
    for (int64_t first = 0; first < n_; first += BLOCK) {
      const int64_t end = std::min(first + BLOCK, n_);
      scores(first, end);
      for (int64_t i = first; i < end; ++i) {
        float* s = scores_.data() + (i - first) * X_;
        for (int64_t x = low_; x < X_; x += LANES) store(s + x, silu(load(s + x)));
        mask(s, i);
      }
      sum_over_keys(first, end, scores_.data(), values_.data(), wide_V_);
      for (int64_t i = first; i < end; ++i) {
        float* to = out + ((start_ + i) * p_.heads + head) * p_.value_width;
        const float* from = sums_.data() + (i - first) * wide_V_;
        const float scale = scale_of(i);
        for (int64_t c = 0; c < p_.value_width; ++c) to[c] = from[c] * scale;
      }
    }
  }

  // `tables` receives this task's gradient of the position table [longest] and of the time table [BUCKETS], zero before.
  void backward(int64_t b, int64_t head, const float* dout, float* dq, float* dk, float* dv, float* dpos, float* dtime) {
    open(b, head);
    by_token(key_, p_.k_token, p_.width, wide_D_, keys_);
    by_feature(values(head), p_.v_token, p_.value_width, values_T_);
    const int64_t D = p_.width, V = p_.value_width;
    dkeys_.assign(D * wide_n_, 0.0f);
    dvalues_.assign(V * wide_n_, 0.0f);
    reserve(dout_, BLOCK * V);
    if (dpos) dpos_reversed_.assign(n_ + 2 * BLOCK + LANES, 0.0f);
    dtime_.assign(INTERLEAVED * BUCKETS, 0.0f);
    for (int64_t first = 0; first < n_; first += BLOCK) {
      const int64_t end = std::min(first + BLOCK, n_), queries = end - first;
      scores(first, end);
      for (int64_t i = first; i < end; ++i) {
        const float* from = dout + ((start_ + i) * p_.heads + head) * V;
        const float scale = scale_of(i);
        for (int64_t c = 0; c < V; ++c) dout_[(i - first) * V + c] = from[c] * scale;
      }
      reserve(dscores_, BLOCK * X_);
      product(queries, X_ - low_, V, dout_.data(), V, 1, values_T_.data() + low_, wide_n_, dscores_.data() + low_, X_,
              false);
      for (int64_t i = first; i < end; ++i) {
        float *s = scores_.data() + (i - first) * X_, *ds = dscores_.data() + (i - first) * X_;
        for (int64_t x = low_; x < X_; x += LANES) {
          const Vector score = load(s + x);
          const Vector sigmoid = 1.0f / (1.0f + exponential(-score));
          const Vector silu = score * sigmoid;
          store(s + x, silu);
          store(ds + x, load(ds + x) * (sigmoid + silu * (1.0f - sigmoid)));
        }
        mask(s, i);
        mask(ds, i);
        if (dpos) {
          float* along = dpos_reversed_.data() + (n_ - 1 - i);
          for (int64_t x = low_; x < X_; x += LANES) store(along + x, load(along + x) + load(ds + x));
        }
        if (dtime) scatter_time(i, ds, buckets_of(first, i));
      }
      product(V, X_ - low_, queries, dout_.data(), 1, V, scores_.data() + low_, X_, dvalues_.data() + low_, wide_n_, true);
      product(D, X_ - low_, queries, queries_.data(), 1, D, dscores_.data() + low_, X_, dkeys_.data() + low_, wide_n_,
              true);
      sum_over_keys(first, end, dscores_.data(), keys_.data(), wide_D_);
      for (int64_t i = first; i < end; ++i) {
        float* to = dq + ((start_ + i) * p_.heads + head) * D;
        const float* from = sums_.data() + (i - first) * wide_D_;
        for (int64_t c = 0; c < D; ++c) to[c] = from[c] * p_.alpha;
      }
    }
    for (int64_t j = 0; j < n_; ++j) {
      float *to_k = dk + ((start_ + j) * p_.heads + head) * D, *to_v = dv + ((start_ + j) * p_.heads + head) * V;
      for (int64_t c = 0; c < D; ++c) to_k[c] = dkeys_[c * wide_n_ + j];
      for (int64_t c = 0; c < V; ++c) to_v[c] = dvalues_[c * wide_n_ + j];
    }
    if (dpos)
      for (int64_t distance = 0; distance < n_; ++distance) dpos[distance] = dpos_reversed_[n_ - 1 - distance];
    if (dtime)
      for (int64_t copy = 0; copy < INTERLEAVED; ++copy)
        for (int64_t bucket = 0; bucket < BUCKETS; ++bucket) dtime[bucket] += dtime_[copy * BUCKETS + bucket];
  }

 private:
  static void reserve(std::vector<float>& buffer, int64_t size) {
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  }

  void open(int64_t b, int64_t head) {
    const Row& row = rows_[b];
    start_ = row.start;
    n_ = row.length;
    wide_n_ = round_up(n_);
    kept_ = p_.buckets ? p_.buckets + row.pairs_before : nullptr;
    key_ = p_.k + start_ * p_.k_token + head * p_.k_head;
    by_feature(key_, p_.k_token, p_.width, keys_T_);
    query_ = p_.q + start_ * p_.q_token + head * p_.q_head;
    if (p_.pos) {
      // Read along keys, a query's distances fall: reversed, they are one contiguous piece.
      pos_reversed_.assign(n_ + 2 * BLOCK + LANES, 0.0f);
      for (int64_t distance = 0; distance < n_; ++distance) pos_reversed_[n_ - 1 - distance] = p_.pos[distance];
    }
  }

  const float* values(int64_t head) const { return p_.v + start_ * p_.v_token + head * p_.v_head; }

  void by_token(const float* from, int64_t token, int64_t width, int64_t wide, std::vector<float>& to) const {
    to.assign(n_ * wide, 0.0f);
    for (int64_t j = 0; j < n_; ++j) std::copy_n(from + j * token, width, to.data() + j * wide);
  }

  void by_feature(const float* from, int64_t token, int64_t width, std::vector<float>& to) const {
    to.assign(width * wide_n_, 0.0f);
    for (int64_t c = 0; c < width; ++c)
      for (int64_t j = 0; j < n_; ++j) to[c * wide_n_ + j] = from[j * token + c];
  }

  int64_t lowest(int64_t i) const { return std::max<int64_t>(0, i - p_.window + 1); }

  float scale_of(int64_t i) const {
    return 1.0f / (p_.norm > 0 ? p_.norm : static_cast<float>(i + 1 - lowest(i)));
  }

  const uint8_t* buckets_of(int64_t first, int64_t i) const {
    return kept_ ? kept_ + i * (i + 1) / 2 : row_buckets_.data() + (i - first) * n_;
  }

  // α·q·k + bias of a block of queries, from the first key that any of them sees to the last; sets low_ and X_.
  void scores(int64_t first, int64_t end) {
    const int64_t D = p_.width;
    low_ = lowest(first) / LANES * LANES;
    X_ = round_up(end);
    reserve(scores_, BLOCK * X_);
    reserve(queries_, BLOCK * D);
    if (p_.time && !kept_ && static_cast<int64_t>(row_buckets_.size()) < BLOCK * n_) row_buckets_.resize(BLOCK * n_);
    for (int64_t i = first; i < end; ++i) {
      for (int64_t c = 0; c < D; ++c) queries_[(i - first) * D + c] = query_[i * p_.q_token + c] * p_.alpha;
      float* s = scores_.data() + (i - first) * X_;
      if (p_.pos)
        std::memcpy(s + low_, pos_reversed_.data() + (n_ - 1 - i) + low_, (X_ - low_) * sizeof(float));
      else
        std::fill(s + low_, s + X_, 0.0f);
      if (!p_.time) continue;
      if (!kept_) bucket_row(p_, start_, i, lowest(i), row_buckets_.data() + (i - first) * n_);
      add_time_bias(s, buckets_of(first, i), lowest(i), i + 1);
    }
    product(end - first, X_ - low_, D, queries_.data(), D, 1, keys_T_.data() + low_, wide_n_, scores_.data() + low_, X_,
            true);
  }

  void add_time_bias(float* __restrict s, const uint8_t* __restrict bucket, int64_t low, int64_t end) const {
    const float* __restrict table = p_.time;
    for (int64_t j = low; j < end; ++j) s[j] += table[bucket[j]];
  }

  // Zero what query i does not see.
  void mask(float* s, int64_t i) const {
    std::fill(s + low_, s + lowest(i), 0.0f);
    std::fill(s + i + 1, s + X_, 0.0f);
  }

  // sums_[i][c] = Σ_j weights[i][j] · by_token[j][c]; masked weights are zero.
  void sum_over_keys(int64_t first, int64_t end, const float* weights, const float* by_token, int64_t wide) {
    reserve(sums_, BLOCK * wide);
    product(end - first, wide, end - low_, weights + low_, X_, 1, by_token + low_ * wide, wide, sums_.data(), wide, false);
  }

  void scatter_time(int64_t i, const float* ds, const uint8_t* bucket) {
    // Neighbours share buckets: sums of their own let the processor add them without waiting for each other.
    int64_t j = lowest(i);
    for (; j + INTERLEAVED <= i + 1; j += INTERLEAVED)
      for (int64_t copy = 0; copy < INTERLEAVED; ++copy) dtime_[copy * BUCKETS + bucket[j + copy]] += ds[j + copy];
    for (; j <= i; ++j) dtime_[bucket[j]] += ds[j];
  }

  const Problem& p_;
  const std::vector<Row>& rows_;
  int64_t wide_D_, wide_V_;
  int64_t start_ = 0, n_ = 0, wide_n_ = 0, low_ = 0, X_ = 0;
  const uint8_t* kept_ = nullptr;
  const float *query_ = nullptr, *key_ = nullptr;
  std::vector<float> keys_, keys_T_, values_, values_T_, queries_, pos_reversed_, scores_, sums_;
  std::vector<float> dout_, dscores_, dkeys_, dvalues_, dpos_reversed_, dtime_;
  std::vector<uint8_t> row_buckets_;
};

}  // namespace
