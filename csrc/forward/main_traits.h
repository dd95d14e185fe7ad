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

    // Rows of a warp's tile, in m16 tiles. Two share each K and V fragment, which halves the shared-memory traffic;
    // beyond head_dim 128 the query fragments of two would not leave room for anything else in 255 registers.
    static constexpr int kMmaRows = kHeadDim <= 128 ? 2 : 1;
    static constexpr int kTileQ = 16 * kMmaRows;

    // CTAs an SM, which caps the registers: 2 give 255 a thread, 3 give 168.
    static constexpr int kMinCtas = kHeadDim <= 64 && kTileK <= 64 ? 3 : 2;

    static constexpr int kTileBytes = kTileK * kHeadDim * 2;
    static constexpr int kStateBytes = 128;
    static constexpr int kSharedBytes = 2 * kTileBytes + kStateBytes;  // K, V, what is known of the work item

    static_assert(kHeadDim % 32 == 0, "columns are interleaved in groups of 32");
    static_assert(kTileK % 16 == 0, "P V consumes 16 keys a step");
    static_assert(
        kSharedBytes <= 99 * 1024, "fits a CTA of every GPU from sm_80 on; sm_86, sm_89 and sm_120 have the least");
};

}  // namespace fsa
