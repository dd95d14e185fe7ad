// Rows of keys or values from global to shared memory. Rows behind the sequence's end and columns behind head_dim
// become zeros: nothing that lies there can reach a product.
#pragma once

#include "device/convert.cuh"
#include "device/layout.h"
#include "device/ptx.cuh"

namespace fsa {

template <typename T>
struct TileSource {
    const T* first_row;
    int64_t row_stride;  // elements
    int num_rows;        // rows that exist
    int num_chunks;      // head_dim / 8
};

// Plain order, swizzled, asynchronous: commit and wait are the caller's.
template <typename T, int kRows, int kHeadDim, int kThreads>
__device__ __forceinline__ void load_tile_async(uint32_t tile, const TileSource<T>& source) {
    constexpr int kChunks = kHeadDim / 8;
    static_assert(kRows * kChunks % kThreads == 0, "every thread copies the same number of chunks");
    const int thread = thread_index_unhoisted();
#pragma unroll
    for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
        const int index = i * kThreads + thread, row = index / kChunks, chunk = index % kChunks;
        const bool valid = row < source.num_rows && chunk < source.num_chunks;
        const T* from = source.first_row + (valid ? row * source.row_stride + chunk * 8 : 0);
        cp_async_16(tile + SwizzledTile<kHeadDim * 2>::offset(row, chunk), from, valid);
    }
}

struct TileMagnitude {
    uint32_t packed_max;  // largest finite magnitude seen by this thread, one bit pattern a half-word
    bool nonfinite;       // this thread saw inf or NaN
};

// Interleaved words (layout.h), swizzled, inf and NaN replaced by zero: a masked key has probability 0, and 0 * NaN
// is NaN. The caller makes up for it in the rows that do see such a key; on_nonfinite(row) is called for each chunk
// that held one.
template <typename T, int kRows, int kHeadDim, int kThreads, typename OnNonfinite>
__device__ __forceinline__ TileMagnitude
load_tile_interleaved(uint32_t tile, const TileSource<T>& source, const OnNonfinite& on_nonfinite) {
    constexpr int kChunks = kHeadDim / 8, kPerThread = kRows * kChunks / kThreads;
    constexpr int kBatch = kPerThread <= 8 ? kPerThread : (kPerThread % 8 == 0 ? 8 : 6);
    static_assert(kRows * kChunks % kThreads == 0 && kPerThread % kBatch == 0, "every thread copies whole batches");
    const int thread = thread_index_unhoisted();
    TileMagnitude magnitude = {0, false};
#pragma unroll
    for (int first = 0; first < kPerThread; first += kBatch) {
        uint32_t words[kBatch][4];
        uint32_t batch_max = 0;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int index = (first + i) * kThreads + thread, row = index / kChunks, chunk = index % kChunks;
            uint4 v = make_uint4(0, 0, 0, 0);
            if (row < source.num_rows && chunk < source.num_chunks) {
                v = __ldg(reinterpret_cast<const uint4*>(source.first_row + row * source.row_stride + chunk * 8));
            }
            words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
        }
#pragma unroll
        for (int i = 0; i < kBatch * 4; ++i) batch_max = max_magnitude_bits(batch_max, words[i / 4][i % 4]);
        if (has_nonfinite<T>(batch_max)) {
            magnitude.nonfinite = true;
            batch_max = 0;
#pragma unroll
            for (int i = 0; i < kBatch * 4; ++i) {
                const uint32_t word = words[i / 4][i % 4], finite_word = zero_nonfinite<T>(word);
                if (word != finite_word) on_nonfinite(((first + i / 4) * kThreads + thread) / kChunks);
                words[i / 4][i % 4] = finite_word;
                batch_max = max_magnitude_bits(batch_max, finite_word);
            }
        }
        magnitude.packed_max = __vmaxu2(magnitude.packed_max, batch_max);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int index = (first + i) * kThreads + thread, row = index / kChunks, chunk = index % kChunks;
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                const InterleavedWord to = interleave(chunk, word);
                store_shared_4(tile + SwizzledTile<kHeadDim * 2>::offset(row, to.chunk) + to.word * 4, words[i][word]);
            }
        }
    }
    return magnitude;
}

// Adds to this lane's 8 elements of a stored row what load_tile_interleaved took out: the inf and NaN elements of the
// visible keys. Rare by nature, so it works on global memory and costs the main loop no registers.
//   chunk: the tile's 8 columns at its first row    stored: the same 8 columns of the partial, written by this lane
template <typename T, typename Stored>
__device__ __forceinline__ void add_nonfinite_keys(
    const T* chunk, int64_t row_stride, int last_visible, Stored* stored) {
#pragma unroll 1
    for (int key = 0; key <= last_visible; ++key) {
#pragma unroll 1
        for (int i = 0; i < 8; ++i) {
            const float x = static_cast<float>(chunk[key * row_stride + i]);
            if (!isfinite(x)) stored[i] = Stored(static_cast<float>(stored[i]) + x);
        }
    }
}

}  // namespace fsa
