// Tiles of the block scores for sm_90a.
#pragma once

#include "device/wgmma_tile.h"

namespace fsa {

template <typename T_, int kHeadDim_>
struct BlockScoresTraits {
    using T = T_;
    static constexpr int kHeadDim = kHeadDim_;

    // One CTA an SM. Its warpgroups have the same 64 queries and windows of their own; three more warps load, and give away
    // registers.
    static constexpr int kTileQ = 64;
    static constexpr int kLog2TileK = kHeadDim <= 128 ? 7 : 6;
    static constexpr int kTileK = 1 << kLog2TileK;  // windows of a warpgroup
    static constexpr int kWarpgroups = 3;
    static constexpr int kConsumers = 128 * kWarpgroups;
    static constexpr int kThreads = kConsumers + 128;
    static constexpr int kRegisters = 160, kLoaderRegisters = 32;
    static_assert(
        kConsumers * kRegisters + 128 * kLoaderRegisters <= kThreads * 128, "no more than the CTA starts with");
    static constexpr int kAccumulators = kTileK / 2;

    // Shared memory: the keys of a unit, queries and their normalisers of as many heads as there is room for; a table;
    // sums of a warp.
    using QueryTile = WgmmaTile<kTileQ, kHeadDim>;
    using KeyTile = WgmmaTile<kTileK, kHeadDim>;
    static constexpr int kKeyBytes = kWarpgroups * KeyTile::kBytes;
    static constexpr int kPairs = kTileK / 2;  // neighbouring windows, which a lane has
    static constexpr int kStageRows = 8;       // of queries, whose sums go through shared memory at a time
    static constexpr int kStageBytes = kStageRows * kPairs * 8;
    static constexpr int kStateBytes = 256, kWeightBytes = 128;
    static constexpr int kOtherBytes = kStateBytes + kWeightBytes + kConsumers / 32 * kStageBytes;
    static constexpr int kNormaliserBytes = kTileQ * 4;
    static constexpr int kFitting = (227 * 1024 - kOtherBytes - kKeyBytes) / (QueryTile::kBytes + kNormaliserBytes);
    static constexpr int kQueryBuffers = kFitting < 4 ? kFitting : 4;
    static constexpr int kQueriesOffset = kKeyBytes;
    static constexpr int kStagesOffset = kQueriesOffset + kQueryBuffers * QueryTile::kBytes;
    static constexpr int kWeightsOffset = kStagesOffset + kConsumers / 32 * kStageBytes;
    static constexpr int kNormalisersOffset = kWeightsOffset + kWeightBytes;
    static constexpr int kStateOffset = kNormalisersOffset + kQueryBuffers * kNormaliserBytes;
    static constexpr int kSharedBytes = kStateOffset + kStateBytes;
    static_assert(kQueryBuffers >= 2, "one head comes while one is worked on");
};

}  // namespace fsa
