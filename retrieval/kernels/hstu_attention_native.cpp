// What of hstu_attention_native.h Python calls.

#include "hstu_attention_native.h"

extern "C" {

// Time buckets of all causal pairs: row after row, of each query in turn those of the keys up to itself.
void hstu_buckets(const Problem* p, uint8_t* out) {
  const std::vector<Row> rows = rows_of(*p);
  in_parallel(*p, rows, 1, [&] {
    return [&](int64_t b, int64_t) {
      const Row& row = rows[b];
      for (int64_t i = 0; i < row.length; ++i) bucket_row(*p, row.start, i, 0, out + row.pairs_before + i * (i + 1) / 2);
    };
  });
}

void hstu_forward(const Problem* p, float* out) {
  const std::vector<Row> rows = rows_of(*p);
  in_parallel(*p, rows, p->heads, [&] {
    return [&, worker = Worker(*p, rows)](int64_t b, int64_t head) mutable { worker.forward(b, head, out); };
  });
}

// dpos [longest] and dtime [BUCKETS] are null without that table.
void hstu_backward(const Problem* p, const float* dout, float* dq, float* dk, float* dv, float* dpos, float* dtime,
                   int64_t longest) {
  const std::vector<Row> rows = rows_of(*p);
  const int64_t tasks = p->rows * p->heads;
  std::vector<float> every_dpos(dpos ? tasks * longest : 0), every_dtime(dtime ? tasks * BUCKETS : 0);
  in_parallel(*p, rows, p->heads, [&] {
    return [&, worker = Worker(*p, rows)](int64_t b, int64_t head) mutable {
      const int64_t task = b * p->heads + head;
      worker.backward(b, head, dout, dq, dk, dv, dpos ? every_dpos.data() + task * longest : nullptr,
                      dtime ? every_dtime.data() + task * BUCKETS : nullptr);
    };
  });
  for (int64_t task = 0; task < tasks; ++task) {
    if (dpos)
      for (int64_t x = 0; x < rows[task / p->heads].length; ++x) dpos[x] += every_dpos[task * longest + x];
    if (dtime)
      for (int64_t x = 0; x < BUCKETS; ++x) dtime[x] += every_dtime[task * BUCKETS + x];
  }
}

}  // extern "C"
