// Where the elements of a tile stand in shared memory, and where MMA fragments find them. Host functions too: tests
// check them.
//
// A tile is rows of 16-bit elements; a row is a sequence of 16-byte chunks of 8 elements (4 words of 2 elements).
#pragma once

#include <cstdint>

#include "device/fast_divide.h"

namespace fsa {

// Swizzle: chunk c of row r stands at chunk c ^ pattern(r), so that neither eight rows read at one chunk (ldmatrix)
// nor two neighbouring rows read at four chunks (a quarter-warp's 16-byte loads) meet in a bank.
//
//   row bytes % 128 == 0: pattern(r) = (r & 1) * 4 + (r >> 1 & 3)   rows start at bank 0: 3 bits choose the chunk
//   row bytes % 128 == 64: pattern(r) = r >> 1 & 3                  odd rows start at bank 16: 2 bits are enough
//
// Neighbouring chunks 2i and 2i + 1, a sector of 32 bytes, stay neighbours: a copy asks L2 for it once.
//
// Both patterns repeat every 8 rows and touch only the low 3 bits of the chunk, hence for every row and chunk:
//   offset(row + 8, chunk) = offset(row, chunk) + 8 * kRowBytes,  offset(row, chunk + 8) = offset(row, chunk) + 128.
// A lane therefore computes two or four offsets once and reaches the rest of the tile by immediates.
template <int kRowBytes>
struct SwizzledTile {
    static_assert(kRowBytes % 64 == 0, "a row must hold whole groups of four chunks, or the swizzle would leave it");
    static constexpr bool kFullPattern = kRowBytes % 128 == 0;

    static FSA_HOST_DEVICE constexpr int pattern(int row) {
        return ((row >> 1) & 3) | (kFullPattern ? (row & 1) << 2 : 0);
    }

    // Byte offset of a chunk.
    static FSA_HOST_DEVICE constexpr uint32_t offset(int row, int chunk) {
        return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ pattern(row)) << 4));
    }
};

// Interleaving: inside a group of 32 columns (4 chunks of 4 words), word w of chunk c stands as word c of chunk w: a
// 4 x 4 transpose. What an MMA fragment sees through ldmatrix, plain or transposed, is then:
//
//   B, ldmatrix.trans at chunk w: column n of the n8 tile is element 8 * (n / 2) + 2 * w + n % 2 of the group, so the
//     accumulators of tiles w = 0..3 give lane c of a quad the elements 8c .. 8c+7: one 16-byte store, no exchange
//     between lanes.
//   A, ldmatrix at chunk w: lane c of a quad receives word w of chunk c, just what it finds at w when it loads chunk c
//     of the other operand as one 16-byte vector. The sum over k runs in another order on both sides, which a product
//     does not notice.
struct InterleavedWord {
    int chunk;
    int word;
};

FSA_HOST_DEVICE constexpr InterleavedWord interleave(int chunk, int word) {
    return {(chunk & ~3) | word, chunk & 3};
}

}  // namespace fsa
