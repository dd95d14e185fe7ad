// csrc/device/tma.cuh for the emulator: boxes arrive at once.
#pragma once

#include <cstring>

#include "device/ptx.cuh"
#include "emulator.h"

namespace fsa {

struct TensorMap {
    const unsigned char* data;
    int64_t sizes[3];    // elements of 2 bytes, innermost dimension first
    int64_t strides[3];  // bytes
    int box_columns, box_rows;
};

inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    emulator::mbarrier_arrive(barrier, bytes);
}

inline void tma_load_3d(uint32_t shared, const TensorMap& map, uint32_t barrier, int x, int y, int z) {
    const int row_bytes = map.box_columns * 2;
    if (shared % 1024 != 0) emulator::fail("a box that does not begin where the swizzle does");
    const uint32_t pattern_mask = row_bytes == 128 ? 0x70 : 0x30;
    for (int row = 0; row < map.box_rows; ++row) {
        for (int column = 0; column < map.box_columns; ++column) {
            uint32_t to = shared + row * row_bytes + column * 2;
            to ^= to >> 3 & pattern_mask;
            uint16_t element = 0;
            if (x + column < map.sizes[0] && y < map.sizes[1] && z + row < map.sizes[2]) {
                const int64_t from = (x + column) * map.strides[0] + y * map.strides[1] + (z + row) * map.strides[2];
                std::memcpy(&element, map.data + from, 2);
            }
            std::memcpy(shared_pointer(to, 2), &element, 2);
        }
    }
    emulator::mbarrier_complete(barrier, map.box_rows * row_bytes);
}

}  // namespace fsa
