// 8-bit codes of vectors: see codes.py for what they are, codes_native.cpp for how they lie.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "codes_native.h"
#include "native_threads.h"

namespace {

constexpr int64_t AHEAD = 8;  // rows lie anywhere: they are fetched before they are needed

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

float sum(Floats x) {
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// Codes of one vector: `x` holds it and zeros up to whole groups of 16, `bytes` has room for as many.
void encode(const float* x, int64_t size, uint8_t* bytes, float& scale, float& error, float& norm) {
  Floats largest{}, errors{}, norms{};
  for (int64_t d = 0; d < size; d += LANES) {
    const Floats one = load(x + d), other = -one, positive = one > other ? one : other;
    largest = largest > positive ? largest : positive;
  }
  float most = 0;
  for (int64_t i = 0; i < LANES; ++i) most = std::max(most, largest[i]);
  scale = scale_of(most);
  const float codes_per_unit = 1 / scale;
  const float rounder = 0x1.8p23f;  // 1.5 · 2²³: adding it rounds to a whole number
  for (int64_t d = 0; d < size; d += LANES) {
    const Floats one = load(x + d), code = (one * codes_per_unit + rounder) - rounder, back = code * scale;
    const Bytes out = __builtin_convertvector(__builtin_convertvector(code, Integers) + 128, Bytes);
    std::memcpy(bytes + d, &out, sizeof out);
    errors += (one - back) * (one - back);
    norms += back * back;
  }
  error = std::max(error, std::sqrt(sum(errors)));
  norm = std::max(norm, std::sqrt(sum(norms)));
}

// What a range of sections comes to.
struct Part {
  int64_t begin, end, next;  // sections, and the place in the order of the first one's first item
  float error = 0, norm = 0;
};

void encode_part(const Codes& codes, const int64_t* order, int64_t total, Part& part, uint8_t* out, float* scales,
                 int32_t* rows, float* radii) {
  const int64_t size = (codes.width + LANES - 1) / LANES * LANES;
  std::vector<float> padded(size, 0.0f), centre(codes.lists ? codes.width : 0);
  std::vector<uint8_t> bytes(size);
  int64_t next = part.next;
  for (int64_t section = part.begin; section < part.end; ++section) {
    for (size_t d = 0; d < centre.size(); ++d) centre[d] = codes.centres[d * codes.lists + section];
    float farthest = 0;
    for (int64_t i = 0; i < codes.counts[section]; ++i, ++next) {
      if (order && next + AHEAD < total) fetch_ahead(codes.vectors + order[next + AHEAD] * codes.width, codes.width);
      int64_t row = order ? order[next] : next, place = codes.starts[section] * LANES + i;
      std::memcpy(padded.data(), codes.vectors + row * codes.width, codes.width * 4);
      encode(padded.data(), size, bytes.data(), scales[place], part.error, part.norm);
      uint8_t* at = out + place / LANES * codes.groups * 64 + place % LANES * 4;
      for (int64_t g = 0; g < codes.groups; ++g) std::memcpy(at + g * 64, bytes.data() + 4 * g, 4);
      if (rows) rows[place] = int32_t(row);
      float away = 0;
      for (size_t d = 0; d < centre.size(); ++d) away += (padded[d] - centre[d]) * (padded[d] - centre[d]);
      farthest = std::max(farthest, away);
    }
    if (codes.lists) radii[section] = std::sqrt(farthest);
  }
}

}  // namespace

extern "C" {

// Codes, scales and rows of the places of all sections, whose items are `order` end to end, in blocks of 16 per section;
// and how far from its centre each list reaches.
void codes_encode(Codes* codes, const int64_t* order, int64_t threads, uint8_t* out, float* scales, int32_t* rows, float* radii) {
  int64_t total = 0;
  for (int64_t section = 0; section < codes->sections; ++section) total += codes->counts[section];
  std::vector<Part> parts;
  int64_t next = 0, share = (total + threads - 1) / std::max<int64_t>(threads, 1);
  for (int64_t section = 0; section < codes->sections; ++section) {
    if (parts.empty() || next - parts.back().next >= share) parts.push_back({section, section, next});
    parts.back().end = section + 1;
    next += codes->counts[section];
  }
  on_threads(int64_t(parts.size()), [&](int64_t thread) {
    if (thread < int64_t(parts.size())) encode_part(*codes, order, total, parts[thread], out, scales, rows, radii);
  });
  codes->error = codes->norm = 0;
  for (const Part& part : parts) {
    codes->error = std::max(codes->error, part.error);
    codes->norm = std::max(codes->norm, part.norm);
  }
}

}
