// Scores of items for 16 queries at once by the processor's matrix unit (AMX), where there is one. See codes_native.cpp.
//
// A tile holds 16 rows of 64 bytes: a step of 64 codes of 16 queries; the same 64 of the 16 items of a block, as blocks
// lie in memory; or the sums of 16 queries and 16 items.

#pragma once

#include "codes_tiles.h"

#if WIDE && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define MATRIX 1
#else
#define MATRIX 0
#endif

namespace {

#if MATRIX

constexpr int64_t ROWS = 16, TOGETHER = 4;  // queries of a tile, and blocks that are multiplied with it in turn
// Tiles have numbers that must be literals: the sums of four blocks, then queries and items.
#define ASKED 4
#define ITEMS 5

// Linux grants a process the use of tiles when it asks.
inline bool has_matrix_unit() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return granted;
}

// The shapes of this thread's tiles, while it lives.
class MatrixUnit {
 public:
  MatrixUnit() : is_there(has_matrix_unit()) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile <= ITEMS; ++tile) shapes.bytes[tile] = 64, shapes.rows[tile] = ROWS;
    if (is_there) _tile_loadconfig(&shapes);
  }
  ~MatrixUnit() {
    if (is_there) _tile_release();
  }
  MatrixUnit(const MatrixUnit&) = delete;

  const bool is_there;
};

// What at most 16 queries keep of a section's items.
class MatrixTile {
 public:
  MatrixTile(Query* const* queries, int64_t count, const Codes& codes, const uint8_t* allowed)
      : queries_(queries), codes_(codes), allowed_(allowed), steps_(int64_t(queries[0]->bytes.size()) / STEP) {
    asked_.resize(steps_ * ROWS * STEP);
    for (int64_t q = 0; q < count; ++q) {
      for (int64_t step = 0; step < steps_; ++step)
        std::memcpy(&asked_[(step * ROWS + q) * STEP], &queries[q]->bytes[step * STEP], STEP);
      offset_[q] = queries[q]->offset;
      least_[q] = queries[q]->least_scaled;
    }
    // Rows without a query find nothing.
    std::fill(least_ + count, least_ + ROWS, std::numeric_limits<float>::infinity());
  }

  __attribute__((noinline)) void score(int64_t begin, int64_t items) {
    // Two of each: while four blocks are multiplied, the sums of the four before are looked through.
    alignas(64) int32_t sums[2][TOGETHER][ROWS][LANES];
    const int64_t blocks = (items + LANES - 1) / LANES;
    int64_t block = 0, turn = 0;
    for (; block < blocks; block += TOGETHER, turn ^= 1) {
      multiply(begin + block, sums[turn]);
      if (block) look_through(sums[turn ^ 1], begin + block - TOGETHER, items - (block - TOGETHER) * LANES);
    }
    if (block) look_through(sums[turn ^ 1], begin + block - TOGETHER, items - (block - TOGETHER) * LANES);
  }

 private:
  // Sums of four blocks, beyond the section's last too: there are codes after all others, and nobody looks at them.
  void multiply(int64_t block, int32_t (*into)[ROWS][LANES]) const {
    const int64_t size = codes_.groups * 64;
    const uint8_t* at = codes_.codes + block * size;
    // The compiler does not know what tiles read.
    asm volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps_; ++step, at += ROWS * 64) {
      _tile_loadd(ASKED, &asked_[step * ROWS * STEP], STEP);
      _tile_loadd(ITEMS, at, 64);
      _tile_dpbsud(0, ASKED, ITEMS);
      _tile_loadd(ITEMS, at + size, 64);
      _tile_dpbsud(1, ASKED, ITEMS);
      _tile_loadd(ITEMS, at + 2 * size, 64);
      _tile_dpbsud(2, ASKED, ITEMS);
      _tile_loadd(ITEMS, at + 3 * size, 64);
      _tile_dpbsud(3, ASKED, ITEMS);
    }
    _tile_stored(0, into[0], 64);
    _tile_stored(1, into[1], 64);
    _tile_stored(2, into[2], 64);
    _tile_stored(3, into[3], 64);
    asm volatile("" ::: "memory");
  }

  // Keeps what reaches its query's threshold. Which queries have any is asked of all at once: a processor cannot foresee it.
  void look_through(const int32_t (*sums)[ROWS][LANES], int64_t block, int64_t items) {
    __mmask16 lanes[TOGETHER];
    __m512 scales[TOGETHER];
    for (int64_t b = 0; b < TOGETHER; ++b) {
      lanes[b] = items > b * LANES ? lanes_of(codes_, block + b, items - b * LANES, allowed_) : 0;
      scales[b] = _mm512_loadu_ps(codes_.scales + (block + b) * LANES);
    }
    const auto score = [&](int64_t q, int64_t b) {
      const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums[b][q]), _mm512_set1_epi32(offset_[q]));
      return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scales[b]);
    };
    alignas(64) __mmask16 masks[ROWS][TOGETHER];
    for (int64_t q = 0; q < ROWS; ++q) {
      const __m512 least = _mm512_set1_ps(least_[q]);
      for (int64_t b = 0; b < TOGETHER; ++b) masks[q][b] = _mm512_mask_cmp_ps_mask(lanes[b], score(q, b), least, _CMP_GE_OQ);
    }
    const __m512i first = _mm512_load_si512(masks[0]), second = _mm512_load_si512(masks[ROWS / 2]);
    uint32_t found = _mm512_test_epi64_mask(first, first) | _mm512_test_epi64_mask(second, second) << ROWS / 2;
    for (; found; found &= found - 1) {
      const int q = __builtin_ctz(found);
      __m512 scores[TOGETHER];
      for (int64_t b = 0; b < TOGETHER; ++b) scores[b] = score(q, b);
      queries_[q]->make_room(TOGETHER * LANES);
      take<TOGETHER>(*queries_[q], scores, masks[q], block, allowed_);
      least_[q] = queries_[q]->least_scaled;
    }
  }

  Query* const* queries_;
  const Codes& codes_;
  const uint8_t* allowed_;
  int64_t steps_;
  std::vector<int8_t> asked_;  // [steps][16][64]
  int32_t offset_[ROWS] = {};
  float least_[ROWS];
};

#undef ASKED
#undef ITEMS

#endif

}  // namespace
