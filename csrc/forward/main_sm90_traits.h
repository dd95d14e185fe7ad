// Tiles of the forward main kernel for sm_90a.
#pragma once

#include "device/wgmma_tile.h"
#include "forward/query_stage.cuh"

namespace fsa {

template <typename T_, int kHeadDim_, int kTileK_>
struct ForwardMainSm90Traits {
    using T = T_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kTileK = kTileK_;

    // Warpgroups share K and V, and nothing else: a product takes 64 query rows, 16 of each of its warps, which wait for
    // no other. Together with kMinCtas: as many an SM as its shared memory and registers hold (four of them:
    // 128 registers a thread, two: 255).
    static constexpr bool kLarge = kHeadDim > 128 || kHeadDim* kTileK > 96 * 128;
    static constexpr int kMinCtas = kLarge ? 1 : 2;
    static constexpr int kWarpgroups = kLarge && kHeadDim <= 128 ? 4 : 2;
    static constexpr int kWarps = 4 * kWarpgroups;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kMmaRows = 1;  // m16 tiles a warp
    static constexpr int kTileQ = 64;   // rows a warpgroup

    // Columns of O that are in registers at a time.
    static constexpr int kColumns = kHeadDim % 64 == 0 ? 64 : 96;

    using Tile = WgmmaTile<kTileK, kHeadDim>;  // of K and of V

    using Stage = forward_main::QueryStage<kHeadDim>;
    static constexpr int kStages = 2;  // the next rows come while these are worked on

    static constexpr int kStateBytes = 256;
    static constexpr int kSharedBytes = 2 * Tile::kBytes + kWarps * kStages * Stage::kBytes + kStateBytes;

    static_assert(kHeadDim % kColumns == 0, "O is made of whole passes");
    static_assert(kColumns % Tile::kPanelColumns == 0, "a pass reads whole panels of V");
    static_assert(kMinCtas * (kSharedBytes + 1024) <= 228 * 1024, "shared memory of an SM");
};

}  // namespace fsa
