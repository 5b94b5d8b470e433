// All layers of an HSTU encoder for the last token of each row: hstu_last.py in float32.
//
// A task is one row. Its tokens go through all layers before the next row begins, so that they stay in the cache and
// nothing is written to memory but the answer. The last layer computes keys and values of all tokens, and the rest of
// one. Weights are copied once into panels of whole vectors, each contiguous however wide the layer is.
//
// Legend: n length of a row, D width of a token, H heads, Q query/key width, V value width, W = 2·H·V + 2·H·Q.

#include <cmath>
#include <utility>

#include "hstu_attention_native.h"

extern "C" {

// Mirrored by hstu_last_native.py. All arrays are contiguous.
struct Layer {
  const float* uvqk;             // [D, W]: columns of u, v, q and k
  const float *weight, *bias;    // [D, H·V] and [D]
  const float *pos, *time;       // null: no such bias
};

struct Stack {
  int64_t rows, width, heads, query_width, value_width, layers;
  const Layer* layer;
  const int64_t* offsets;
  const float* x;                // [T, D]
  const int64_t *times, *query_times;
  const int64_t* edges;          // first second of each bucket, and an end
  int64_t threads;
  float norm, eps;               // norm 0: number of visible keys
};

}  // extern "C"

namespace {

constexpr int64_t PANEL = MOST_VECTORS * LANES;
constexpr int64_t MOST_BUCKETS = 1 << 25;  // of one row that are kept for all its layers

// A matrix [steps, columns] as panels [steps][PANEL], the last one filled up with zeros.
class Panels {
 public:
  template <class At>
  Panels(int64_t steps, int64_t columns, At at) : steps_(steps), columns_(columns) {
    values_.assign((columns + PANEL - 1) / PANEL * PANEL * steps, 0.0f);
    float* to = values_.data();
    for (int64_t x = 0; x < columns; x += PANEL)
      for (int64_t t = 0; t < steps; ++t, to += PANEL)
        for (int64_t c = x; c < std::min(x + PANEL, columns); ++c) to[c - x] = at(t, c);
  }

  int64_t wide() const { return round_up(columns_); }

  // c[r] = a[r] · this; rows of c have room for `wide()`.
  void times(const float* a, int64_t a_row, int64_t rows, float* c, int64_t c_row) const {
    for (int64_t x = 0; x < columns_; x += PANEL)
      product(rows, std::min(PANEL, round_up(columns_ - x)), steps_, a, a_row, 1, values_.data() + x * steps_, PANEL, c + x,
              c_row, false);
  }

 private:
  int64_t steps_, columns_;
  std::vector<float> values_;
};

// Some of the columns of u, v, q and k of a layer, side by side.
Panels pick(const Stack& s, const Layer& l, bool u, bool v, bool q, bool k) {
  const int64_t value = s.heads * s.value_width, query = s.heads * s.query_width, W = 2 * (value + query);
  std::vector<int64_t> columns;
  int64_t column = 0;
  for (const auto& [wanted, width] : {std::pair(u, value), {v, value}, {q, query}, {k, query}})
    for (int64_t end = column + width; column < end; ++column)
      if (wanted) columns.push_back(column);
  return Panels(s.width, columns.size(), [&](int64_t t, int64_t c) { return l.uvqk[t * W + columns[c]]; });
}

struct PackedLayer {
  const Layer* layer;
  Panels of_all, of_last;  // what is projected of all tokens, and of the last one
  Panels weight;

  PackedLayer(const Stack& s, const Layer& l, bool last)
      : layer(&l), of_all(last ? pick(s, l, false, true, false, true) : pick(s, l, true, true, true, true)),
        of_last(pick(s, l, last, false, last, false)),
        weight(s.heads * s.value_width, s.width, [&](int64_t t, int64_t c) { return l.weight[c * s.heads * s.value_width + t]; }) {}
};

// (x − mean) / √(var + eps) of one row, times `gate` where there is one.
void normalise(const float* __restrict x, int64_t count, float eps, const float* __restrict gate, float* __restrict out) {
  float sums[LANES] = {}, squares[LANES] = {};
  int64_t c = 0;
  for (; c + LANES <= count; c += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += x[c + lane];
  for (int64_t lane = 0; c < count; ++c, ++lane) sums[lane] += x[c];
  float mean = 0.0f;
  for (float part : sums) mean += part;
  mean /= static_cast<float>(count);
  for (c = 0; c < count; ++c) out[c] = x[c] - mean;
  for (c = 0; c + LANES <= count; c += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane) squares[lane] += out[c + lane] * out[c + lane];
  for (int64_t lane = 0; c < count; ++c, ++lane) squares[lane] += out[c] * out[c];
  float variance = 0.0f;
  for (float part : squares) variance += part;
  const float scale = 1.0f / std::sqrt(variance / static_cast<float>(count) + eps);
  if (gate)
    for (c = 0; c < count; ++c) out[c] *= scale * gate[c];
  else
    for (c = 0; c < count; ++c) out[c] *= scale;
}

// One row after the other; buffers grow to the longest that a thread meets.
class Runner {
 public:
  Runner(const Stack& s, const std::vector<PackedLayer>& layers)
      : s_(s), layers_(layers), D_(s.width), value_(s.heads * s.value_width), query_(s.heads * s.query_width),
        wide_D_(round_up(D_)), problem_(one_row()) {}

  Runner(const Runner&) = delete;  // its worker refers to its problem

  // out [D] is not normalised.
  void run(int64_t b, float* out) {
    open(b);
    for (int64_t l = 0; l + 1 < s_.layers; ++l) whole(layers_[l]);
    last(layers_[s_.layers - 1], out);
  }

 private:
  static float* reserve(std::vector<float>& buffer, int64_t size) {
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
  }

  Problem one_row() const {
    Problem p = {};
    p.rows = 1;
    p.heads = s_.heads;
    p.width = s_.query_width;
    p.value_width = s_.value_width;
    p.q_token = p.k_token = p.v_token = round_up(2 * (value_ + query_));
    p.q_head = p.k_head = s_.query_width;
    p.v_head = s_.value_width;
    p.edges = s_.edges;
    p.norm = s_.norm;
    p.alpha = 1.0f;
    return p;
  }

  void open(int64_t b) {
    start_ = s_.offsets[b];
    n_ = s_.offsets[b + 1] - start_;
    x_.resize(n_ * D_);
    std::copy_n(s_.x + start_ * D_, n_ * D_, x_.data());
    rows_[0].length = n_;
    problem_.times = s_.times + start_;
    problem_.query_times = s_.query_times + start_;
    problem_.window = n_;
    problem_.buckets = nullptr;
    const bool timed = std::any_of(s_.layer, s_.layer + s_.layers - 1, [](const Layer& l) { return l.time != nullptr; });
    const int64_t pairs = n_ * (n_ + 1) / 2;
    if (!timed || pairs > MOST_BUCKETS) return;
    buckets_.resize(pairs);
    for (int64_t i = 0; i < n_; ++i) bucket_row(problem_, 0, i, 0, buckets_.data() + i * (i + 1) / 2);
    problem_.buckets = buckets_.data();
  }

  // SiLU(a · panels) of some rows.
  float* project(const Panels& panels, const float* a, int64_t rows, std::vector<float>& buffer) {
    const int64_t wide = panels.wide();
    float* to = reserve(buffer, rows * wide);
    panels.times(a, D_, rows, to, wide);
    for (int64_t i = 0; i < rows * wide; i += LANES) store(to + i, silu(load(to + i)));
    return to;
  }

  const float* normed() {
    float* to = reserve(normed_, n_ * D_);
    for (int64_t i = 0; i < n_; ++i) normalise(x_.data() + i * D_, D_, s_.eps, nullptr, to + i * D_);
    return to;
  }

  // to = x + (U ⊙ LN(attended)) · W_o + b of some rows.
  void gate(const PackedLayer& l, const float* x, const float* u, int64_t u_row, const float* attended, int64_t rows,
            float* to) {
    float *gated = reserve(gated_, rows * value_), *y = reserve(y_, rows * wide_D_);
    for (int64_t i = 0; i < rows; ++i)
      normalise(attended + i * value_, value_, s_.eps, u + i * u_row, gated + i * value_);
    l.weight.times(gated, value_, rows, y, wide_D_);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < D_; ++c) to[i * D_ + c] = x[i * D_ + c] + y[i * wide_D_ + c] + l.layer->bias[c];
  }

  void whole(const PackedLayer& l) {
    const float* u = project(l.of_all, normed(), n_, projected_);
    problem_.v = u + value_;
    problem_.q = u + 2 * value_;
    problem_.k = u + 2 * value_ + query_;
    problem_.pos = l.layer->pos;
    problem_.time = l.layer->time;
    float* attended = reserve(attended_, n_ * value_);
    for (int64_t head = 0; head < s_.heads; ++head) worker_.forward(0, head, attended);
    gate(l, x_.data(), u, problem_.v_token, attended, n_, x_.data());
  }

  void last(const PackedLayer& l, float* out) {
    const float* x = normed();
    const float *v = project(l.of_all, x, n_, projected_), *u = project(l.of_last, x + (n_ - 1) * D_, 1, asked_);
    const float *k = v + value_, *q = u + value_;
    const int64_t token = l.of_all.wide();
    float *bias = reserve(bias_, n_), *weights = reserve(weights_, round_up(n_));
    std::fill_n(bias, n_, 0.0f);
    if (l.layer->pos)
      for (int64_t j = 0; j < n_; ++j) bias[j] = l.layer->pos[n_ - 1 - j];
    if (l.layer->time) {
      row_buckets_.resize(n_);
      bucket_row(problem_, 0, n_ - 1, 0, row_buckets_.data());
      for (int64_t j = 0; j < n_; ++j) bias[j] += l.layer->time[row_buckets_[j]];
    }
    float* attended = reserve(attended_, value_);
    std::fill_n(attended, value_, 0.0f);
    const float scale = 1.0f / (s_.norm > 0 ? s_.norm : static_cast<float>(n_));
    for (int64_t head = 0; head < s_.heads; ++head) {
      const float *asked = q + head * s_.query_width, *keys = k + head * s_.query_width;
      for (int64_t j = 0; j < n_; ++j) weights[j] = bias[j] + dot(asked, keys + j * token);
      for (int64_t j = 0; j < n_; j += LANES) store(weights + j, silu(load(weights + j)));
      float* __restrict to = attended + head * s_.value_width;
      for (int64_t j = 0; j < n_; ++j) {
        const float* __restrict from = v + j * token + head * s_.value_width;
        const float weight = weights[j] * scale;
        for (int64_t c = 0; c < s_.value_width; ++c) to[c] += weight * from[c];
      }
    }
    gate(l, x_.data() + (n_ - 1) * D_, u, 0, attended, 1, out);
  }

  float dot(const float* __restrict a, const float* __restrict b) const {
    float sums[LANES] = {};
    int64_t c = 0;
    for (; c + LANES <= s_.query_width; c += LANES)
      for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += a[c + lane] * b[c + lane];
    for (int64_t lane = 0; c < s_.query_width; ++c, ++lane) sums[lane] += a[c] * b[c];
    float total = 0.0f;
    for (float part : sums) total += part;
    return total;
  }

  const Stack& s_;
  const std::vector<PackedLayer>& layers_;
  const int64_t D_, value_, query_, wide_D_;
  int64_t start_ = 0, n_ = 0;
  Problem problem_;
  std::vector<Row> rows_{{0, 0, 0}};
  Worker worker_{problem_, rows_};
  std::vector<float> x_, normed_, projected_, asked_, attended_, gated_, y_, bias_, weights_;
  std::vector<uint8_t> buckets_, row_buckets_;
};

}  // namespace

extern "C" {

// out [rows, D]: each row's last token after all layers, not normalised. No row is empty.
void hstu_last(const Stack* s, float* out) {
  std::vector<PackedLayer> layers;
  layers.reserve(s->layers);
  for (int64_t l = 0; l < s->layers; ++l) layers.emplace_back(*s, s->layer[l], l + 1 == s->layers);
  Problem spread = {};
  spread.rows = s->rows;
  spread.threads = s->threads;
  spread.offsets = s->offsets;
  const std::vector<Row> rows = rows_of(spread);
  in_parallel(spread, rows, 1, [&] {
    return [&, runner = Runner(*s, layers)](int64_t b, int64_t) mutable { runner.run(b, out + b * s->width); };
  });
}

}  // extern "C"
