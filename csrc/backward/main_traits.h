// Tiles of the backward main kernel.
#pragma once

namespace fsa {

template <typename T_, int kHeadDim_, int kTileK_>
struct BackwardMainTraits {
    using T = T_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kTileK = kTileK_;

    // Queries of a tile. Wider rows get fewer, so that K, V, Q and dO fit shared memory.
    static constexpr int kTileQ = kHeadDim <= 128 ? 64 : 32;

    // Warp (key group, half): 16 keys, and half of the queries in S and dP, half of the columns in dK and dV.
    static constexpr int kKeyWarps = kTileK / 16;
    static constexpr int kHalves = 2;
    static constexpr int kWarps = kKeyWarps * kHalves;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kColumns = kHeadDim / kHalves;  // of dK and dV, a warp

    // In dQ: 16 queries, and every kDqColumnWarps-th group of 32 columns.
    static constexpr int kDqRowWarps = kTileQ / 16;
    static constexpr int kDqColumnWarps = kWarps / kDqRowWarps;

    // 2 CTAs of 8 warps an SM (where shared memory allows, as on sm_90) leave 128 registers a thread; accumulators of
    // wide rows need up to 255.
    static constexpr int kMinCtas = kHeadDim <= 128 ? 2 : 1;

    static constexpr int kKeyTileBytes = kTileK * kHeadDim * 2;    // K, V
    static constexpr int kQueryTileBytes = kTileQ * kHeadDim * 2;  // Q, dO
    static constexpr int kProbTileBytes = kTileK * kTileQ * 2;     // P^T, dS^T
    static constexpr int kTileBytes = 2 * (kKeyTileBytes + kQueryTileBytes + kProbTileBytes);
    static constexpr int kRowBytes = kTileQ * 32;  // QueryTileRows
    static constexpr int kPoisonBytes = kTileK * 4;
    static constexpr int kStateBytes = 128 + kTileQ * 4;  // ItemState
    static constexpr int kSharedBytes = kTileBytes + 2 * kRowBytes + kPoisonBytes + kStateBytes;

    static_assert(kColumns % 16 == 0, "ldmatrix hands a warp 16 columns of dK and dV at a time");
    static_assert(kTileQ / kHalves % 16 == 0, "a warp's queries in S come in pairs of n8 tiles");
    static_assert(kWarps % kDqRowWarps == 0, "warps divide the rows of dQ evenly");
    static_assert(
        kSharedBytes <= 99 * 1024, "fits a CTA of every GPU from sm_80 on; sm_86, sm_89 and sm_120 have the least");
};

}  // namespace fsa
