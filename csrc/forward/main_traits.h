// Tiles of the forward main kernel.
#pragma once

namespace fsa {

template <typename T_, int kHeadDim_, int kTileK_>
struct ForwardMainTraits {
    using T = T_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kTileK = kTileK_;
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * 32;

    // Rows of a warp's tile, in m16 tiles. Two share each K and V fragment, which halves the shared-memory traffic; where scores or
    // query fragments of two would not leave room for anything else, one.
    static constexpr int kMmaRows = kHeadDim <= 128 && kTileK <= 64 ? 2 : 1;
    static constexpr int kTileQ = 16 * kMmaRows;

    // CTAs an SM, which caps the registers: 2 give 255 a thread, 3 give 168, 4 give 128.
    static constexpr int kMinCtas = kMmaRows == 1 && kHeadDim <= 128 ? 3 : 2;

    static constexpr int kTileBytes = kTileK * kHeadDim * 2;
    static constexpr int kSharedBytes = 2 * kTileBytes + kWarps * 4;  // K, V, one maximum a warp

    static_assert(kHeadDim % 32 == 0, "columns are interleaved in groups of 32");
    static_assert(kTileK % 16 == 0, "P V consumes 16 keys a step");
    static_assert(kSharedBytes <= 99 * 1024, "fits every sm80 and sm90 device");
};

}  // namespace fsa
