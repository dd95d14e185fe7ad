// A tile of 16-bit elements in shared memory as the products of wgmma.cuh read it. Host functions too: tests check
// them.
//
// Columns are cut into panels of 64 (32 where 64 does not divide them); a panel's rows of 128 (64) bytes follow one
// another, and the 16-byte chunks of a row are exchanged by the swizzle that the hardware undoes:
//
//   128-byte rows: chunk c of row r stands at chunk c ^ (r & 7)         64-byte rows: at chunk c ^ (r >> 1 & 3)
//
// Panels begin at multiples of 1024 bytes. (PTX ISA, "Strides" and "Matrix descriptor" of wgmma.)
#pragma once

#include <cstdint>

#include "device/fast_divide.h"

namespace fsa {

template <int kRows, int kColumns>
struct WgmmaTile {
    static_assert(kColumns % 32 == 0 && kRows % 16 == 0, "panels are 32 or 64 wide, products sum over 16 at a time");
    static constexpr int kNumRows = kRows;
    static constexpr int kPanelColumns = kColumns % 64 == 0 ? 64 : 32;
    static constexpr int kRowBytes = kPanelColumns * 2;
    static constexpr int kPanelBytes = kRows * kRowBytes;
    static constexpr int kBytes = kRows * kColumns * 2;
    static_assert(kPanelBytes % 1024 == 0, "panels begin where the swizzle does");

    // Chunk c of a row of a panel stands at chunk c ^ pattern(row).
    static FSA_HOST_DEVICE constexpr int pattern(int row) {
        return kPanelColumns == 64 ? row & 7 : row >> 1 & 3;
    }

    // Byte offset of chunk `chunk` (of 8 columns) of a row.
    static FSA_HOST_DEVICE constexpr uint32_t offset(int row, int chunk) {
        const int panel = chunk / (kPanelColumns / 8), in_panel = chunk % (kPanelColumns / 8);
        return static_cast<uint32_t>(panel * kPanelBytes + row * kRowBytes + ((in_panel ^ pattern(row)) << 4));
    }

    // Descriptor of the operand for step `step` of 16 along the sum, the sum running along the columns: rows
    // first_row .. of the tile are rows of A or columns of B.
    static FSA_HOST_DEVICE constexpr uint64_t along_columns(uint32_t tile, int step, int first_row = 0) {
        constexpr int kSteps = kPanelColumns / 16;
        return descriptor(
            tile, step / kSteps * kPanelBytes + step % kSteps * 32 + first_row * kRowBytes, 16, 8 * kRowBytes);
    }

    // The sum running along the rows: columns of the tile from panel `first_panel` on are rows of A or columns of B.
    static FSA_HOST_DEVICE constexpr uint64_t along_rows(uint32_t tile, int step, int first_panel = 0) {
        return descriptor(tile, first_panel * kPanelBytes + step * 16 * kRowBytes, kPanelBytes, 8 * kRowBytes);
    }

  private:
    // Only the sum in the low word depends on the offset: one addition a product.
    static FSA_HOST_DEVICE constexpr uint64_t descriptor(
        uint32_t tile, uint32_t offset, uint32_t leading, uint32_t stride) {
        constexpr uint32_t kSwizzle = kPanelColumns == 64 ? 1 : 2;
        const uint32_t low = ((tile & 0x3ffff) >> 4 | (leading >> 4) << 16) + (offset >> 4);
        const uint32_t high = stride >> 4 | kSwizzle << 30;
        return static_cast<uint64_t>(high) << 32 | low;
    }
};

}  // namespace fsa
