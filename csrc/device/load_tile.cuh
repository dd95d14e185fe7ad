// Rows of keys or values from global to shared memory. Rows behind the sequence's end and columns behind head_dim
// become zeros: nothing that lies there can reach a product.
#pragma once

#include "device/convert.cuh"
#include "device/layout.h"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"

namespace fsa {

template <typename T>
struct TileSource {
    const T* first_row;
    int64_t row_stride;  // elements
    int num_rows;        // rows that exist
    int num_chunks;      // head_dim / 8
};

// Plain order, swizzled, asynchronous: commit and wait are the caller's. kThreads neighbours take part, the first of them a
// multiple of kThreads.
template <typename T, int kRows, int kHeadDim, int kThreads, typename Layout = SwizzledTile<kHeadDim * 2>>
__device__ __forceinline__ void load_tile_async(uint32_t tile, const TileSource<T>& source) {
    constexpr int kChunks = kHeadDim / 8, kRowsAtOnce = kThreads / kChunks;
    const int thread = thread_index_unhoisted() % kThreads;
    if constexpr (kThreads % kChunks == 0 && kRowsAtOnce % 8 == 0 && kRows % kRowsAtOnce == 0) {
        // A thread keeps its chunk, and layouts repeat every 8 rows: additions are all it takes.
        const int first_row = thread / kChunks, chunk = thread % kChunks;
        const int num_rows = chunk < source.num_chunks ? source.num_rows - first_row : 0;
        const uint32_t to = tile + Layout::offset(first_row, chunk);
        const T* from = source.first_row + first_row * source.row_stride + chunk * 8;
#pragma unroll
        for (int row = 0; row < kRows; row += kRowsAtOnce) {
            const bool valid = row < num_rows;
            cp_async_16(to + Layout::offset(row, 0), valid ? from : source.first_row, valid);
            from += kRowsAtOnce * source.row_stride;
        }
    } else {
#pragma unroll
        for (int i = 0; i < (kRows * kChunks + kThreads - 1) / kThreads; ++i) {
            const int index = i * kThreads + thread, row = index / kChunks, chunk = index % kChunks;
            if (kRows * kChunks % kThreads != 0 && row >= kRows) break;
            const bool valid = row < source.num_rows && chunk < source.num_chunks;
            const T* from = source.first_row + (valid ? row * source.row_stride + chunk * 8 : 0);
            cp_async_16(tile + Layout::offset(row, chunk), from, valid);
        }
    }
}

// Of the elements that this thread saw. A masked key has probability 0, but 0 * NaN is NaN: inf and NaN are replaced by
// zero, and the caller makes up for it in the rows that do see such a key.
struct TileMagnitude {
    uint32_t packed_max;  // largest finite magnitude, one bit pattern a half-word
    bool nonfinite;       // there were inf or NaN
};

// words[i] = words[(i + by) % 4]
__device__ __forceinline__ void rotate_words(uint32_t (&words)[4], int by) {
    const bool one = by & 1, two = by & 2;
    const uint32_t a[4] = {
        one ? words[1] : words[0], one ? words[2] : words[1], one ? words[3] : words[2], one ? words[0] : words[3]};
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = two ? a[(i + 2) % 4] : a[i];
}

// Interleaves the words (layout.h) of a tile that load_tile_async with the same parameters brought, in place, once this
// thread's copies have landed: the four lanes that exchange words copied them. on_nonfinite(row) is called for each
// chunk that held inf or NaN.
template <
    typename T, int kRows, int kHeadDim, int kThreads, typename Layout = SwizzledTile<kHeadDim * 2>,
    typename OnNonfinite>
__device__ __forceinline__ TileMagnitude interleave_tile(uint32_t tile, const OnNonfinite& on_nonfinite) {
    constexpr int kChunks = kHeadDim / 8, kPerThread = kRows * kChunks / kThreads;
    constexpr int kBatch = kPerThread % 4 == 0 ? 4 : kPerThread % 3 == 0 ? 3 : kPerThread % 2 == 0 ? 2 : 1;
    static_assert(kChunks % 4 == 0, "four lanes share a group of four chunks");
    const int thread = thread_index_unhoisted() % kThreads;
    TileMagnitude magnitude = {0, false};
#pragma unroll 1
    for (int first = 0; first < kPerThread; first += kBatch) {
        uint32_t words[kBatch][4];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int index = (first + i) * kThreads + thread, row = index / kChunks, chunk = index % kChunks;
            const uint4 v = load_shared_16(tile + Layout::offset(row, chunk));
            words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                const uint32_t finite = zero_nonfinite<T>(words[i][word]);
                if (finite != words[i][word]) {
                    magnitude.nonfinite = true;
                    on_nonfinite(row);
                }
                words[i][word] = finite;
                magnitude.packed_max = max_magnitude_bits(magnitude.packed_max, finite);
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int index = (first + i) * kThreads + thread, row = index / kChunks, chunk = index % kChunks;
            // Neighbouring groups of four chunks begin with different words: their stores meet in no bank.
            const int rotation = chunk / 4 % 4;
            rotate_words(words[i], rotation);
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                const InterleavedWord to = interleave(chunk, (word + rotation) % 4);
                store_shared_4(tile + Layout::offset(row, to.chunk) + to.word * 4, words[i][word]);
            }
        }
    }
    return magnitude;
}

// The same without interleaving: looks at the chunks that this thread copied, and replaces inf and NaN by zero.
template <typename T, int kRows, int kHeadDim, int kThreads, typename Layout>
__device__ __forceinline__ TileMagnitude zero_nonfinite_in_tile(uint32_t tile) {
    constexpr int kChunks = kHeadDim / 8, kPerThread = (kRows * kChunks + kThreads - 1) / kThreads;
    const int thread = thread_index_unhoisted() % kThreads;
    auto for_each_chunk = [&](auto&& f) {
#pragma unroll 4
        for (int i = 0; i < kPerThread; ++i) {
            const int index = i * kThreads + thread;
            if (kRows * kChunks % kThreads != 0 && index >= kRows * kChunks) break;
            f(tile + Layout::offset(index / kChunks, index % kChunks));
        }
    };
    TileMagnitude magnitude = {0, false};
    for_each_chunk([&](uint32_t address) {
        const uint4 v = load_shared_16(address);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (const uint32_t word : words) magnitude.packed_max = max_magnitude_bits(magnitude.packed_max, word);
    });
    if (!has_nonfinite<T>(magnitude.packed_max)) return magnitude;

    magnitude = {0, true};
    for_each_chunk([&](uint32_t address) {
        const uint4 v = load_shared_16(address);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            const uint32_t finite = zero_nonfinite<T>(words[word]);
            magnitude.packed_max = max_magnitude_bits(magnitude.packed_max, finite);
            if (finite != words[word]) store_shared_4(address + 4 * word, finite);
        }
    });
    return magnitude;
}

// Both at once; waits for all of this thread's copies.
template <
    typename T, int kRows, int kHeadDim, int kThreads, typename Layout = SwizzledTile<kHeadDim * 2>,
    typename OnNonfinite>
__device__ __forceinline__ TileMagnitude
load_tile_interleaved(uint32_t tile, const TileSource<T>& source, const OnNonfinite& on_nonfinite) {
    load_tile_async<T, kRows, kHeadDim, kThreads, Layout>(tile, source);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    return interleave_tile<T, kRows, kHeadDim, kThreads, Layout>(tile, on_nonfinite);
}

// Zeros for inf and NaN in this thread's share of kBytes of shared memory, of which kThreads neighbours take a share each;
// products and copies see them after the next barrier. Whether any of those stood where it matters, by offset.
template <typename T, int kBytes, int kThreads, typename Matters>
__device__ __forceinline__ bool zero_nonfinite_in_share(uint32_t memory, const Matters& matters) {
    constexpr int kPerThread = kBytes / 16 / kThreads;
    static_assert(kBytes % (16 * kThreads) == 0, "shares are equal");
    const uint32_t own = threadIdx.x % kThreads * 16;
    uint32_t sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
        const uint4 v = load_shared_16(memory + own + i * kThreads * 16);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int word = 0; word < 4; ++word) sums[word] = add_zero_times<T>(words[word], sums[word]);
    }
    if (((sums[0] | sums[1] | sums[2] | sums[3]) & 0x7fff7fffu) == 0) return false;

    bool any_matters = false;
#pragma unroll 1
    for (int i = 0; i < kPerThread * 4; ++i) {
        const uint32_t offset = own + i / 4 * kThreads * 16 + i % 4 * 4;
        const uint32_t word = load_shared_4(memory + offset), finite = zero_nonfinite<T>(word);
        if (finite == word) continue;
        store_shared_4(memory + offset, finite);
        any_matters |= matters(offset);
    }
    fence_async_proxy();
    return any_matters;
}

// Adds to this lane's 8 elements of a stored row what the functions above took out: the inf and NaN elements of the visible
// keys. Rare by nature, so it works on global memory and costs the main loop no registers.
//   chunk: the tile's 8 columns at its first row    stored: the same 8 columns of the partial, written before
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
