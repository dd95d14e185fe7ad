// csrc/device/tma.cuh for the emulator: boxes arrive at some time, in any order.
#pragma once

#include <cstring>

#include "device/ptx.cuh"
#include "emulator.h"

namespace fsa {

struct TensorMap {
    const unsigned char* data;
    int64_t sizes[4];    // elements of 2 bytes, innermost dimension first; 1 where there are fewer dimensions
    int64_t strides[4];  // bytes
    int box[4];          // elements
};

inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    emulator::mbarrier_arrive(barrier, bytes);
}

inline void copy_box(uint32_t shared, const TensorMap& map, int x, int y, int z, int w) {
    const int row_bytes = map.box[0] * 2, num_rows = map.box[1] * map.box[2] * map.box[3];
    const uint32_t pattern_mask = row_bytes == 128 ? 0x70 : 0x30;
    for (int row = 0; row < num_rows; ++row) {
        const int64_t at[4] = {
            0, y + row % map.box[1], z + row / map.box[1] % map.box[2], w + row / map.box[1] / map.box[2]};
        for (int column = 0; column < map.box[0]; ++column) {
            uint32_t to = shared + row * row_bytes + column * 2;
            to ^= to >> 3 & pattern_mask;
            uint16_t element = 0;
            if (x + column < map.sizes[0] && at[1] < map.sizes[1] && at[2] < map.sizes[2] && at[3] < map.sizes[3]) {
                const int64_t from = (x + column) * map.strides[0] + at[1] * map.strides[1] + at[2] * map.strides[2] +
                                     at[3] * map.strides[3];
                std::memcpy(&element, map.data + from, 2);
            }
            std::memcpy(shared_pointer(to, 2), &element, 2);
        }
    }
}

inline void tma_load_4d(uint32_t shared, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w) {
    if (shared % 128 != 0) emulator::fail("a box that does not begin at a multiple of 128 bytes");
    emulator::defer_bulk_copy([=] {  // its thread may have ended by then
        copy_box(shared, map, x, y, z, w);
        emulator::mbarrier_complete(barrier, map.box[0] * map.box[1] * map.box[2] * map.box[3] * 2);
    });
}

inline void tma_load_3d(uint32_t shared, const TensorMap& map, uint32_t barrier, int x, int y, int z) {
    tma_load_4d(shared, map, barrier, x, y, z, 0);
}

}  // namespace fsa
