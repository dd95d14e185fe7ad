// Tiles of the forward shared kernel for sm_90a.
#pragma once

#include "device/wgmma_tile.h"
#include "forward/query_stage.cuh"
#include "params.h"

namespace fsa {

template <typename T_, int kHeadDim_>
struct ForwardSharedTraits {
    using T = T_;
    static constexpr int kHeadDim = kHeadDim_;

    // A load brings kSubBlocks sub-blocks, which need not be neighbours: a softmax over 128 keys costs less than two over 64.
    static constexpr int kSubBlockKeys = kSharedKeys;
    static constexpr int kSubBlocks = kHeadDim <= 128 ? 2 : 1;
    static constexpr int kTileK = kSubBlocks * kSubBlockKeys;

    // One CTA an SM. Its warpgroups share K and V and have 64 rows each; other warps, the loaders, bring Q, K and V. Three
    // warps a scheduler have 168 registers a thread, two have 255.
    static constexpr int kWarpgroups = kHeadDim <= 128 ? 2 : 1;
    static constexpr int kWarps = 4 * kWarpgroups;
    static constexpr int kLoaders = 4, kCheckers = 2;
    static constexpr int kThreads = (kWarps + kLoaders) * 32;
    static constexpr int kRows = 64 * kWarpgroups;
    static constexpr int kMmaRows = 1;  // m16 tiles a warp

    // Q is in registers while S is computed, where they suffice: the loaders give some of theirs away. At head_dim 128 S, O, P
    // and Q take 192, and products are serialised if there are fewer than 224.
    static constexpr bool kHoldsQueries = kWarpgroups == 2;
    static constexpr int kHeldQuerySteps = kHoldsQueries ? kHeadDim / 16 : 1;
    static constexpr int kRegisters = kHeadDim == 128 ? 224 : 208, kLoaderRegisters = kHeadDim == 128 ? 56 : 88;
    static_assert(
        !kHoldsQueries || kWarps * kRegisters + kLoaders * kLoaderRegisters <= (kWarps + kLoaders) * 168,
        "no more than the CTA starts with");

    // Columns of O a product: all stay in registers, kPasses times kColumns.
    static constexpr int kColumns = kHeadDim % 128 == 0 ? 128 : kHeadDim % 64 == 0 ? 64 : kHeadDim;
    static constexpr int kPasses = kHeadDim / kColumns;

    // Shared memory: rows of two units; K and V of as many loads as there is room for.
    using Tile = WgmmaTile<kTileK, kHeadDim>;        // K or V of a load
    using Box = WgmmaTile<kSubBlockKeys, kHeadDim>;  // of a sub-block: what a copy brings
    using PartialTile = WgmmaTile<kRows, kHeadDim>;  // partials of a unit's rows, where K or V of another load would be
    static_assert(PartialTile::kBytes <= Tile::kBytes);
    using Stage = forward_main::QueryStage<kHeadDim>;
    static constexpr int kStateBytes = 1024 + 128 * kRows;  // room for four buffers
    static constexpr int kMaxSharedBytes = 227 * 1024 - kStateBytes;
    static constexpr int kQueryBytes = kWarps * Stage::kBytes;
    static constexpr int kQueryBuffers = 2;
    static constexpr int kFitting = (kMaxSharedBytes - kQueryBuffers * kQueryBytes) / (2 * Tile::kBytes);
    static constexpr int kBuffers = kFitting < 4 ? kFitting : 4;
    static constexpr int kValuesOffset = kBuffers * Tile::kBytes;
    static constexpr int kQueriesOffset = 2 * kBuffers * Tile::kBytes;
    static constexpr int kStateOffset = kQueriesOffset + kQueryBuffers * kQueryBytes;
    static constexpr int kSharedBytes = kStateOffset + kStateBytes;

    static_assert(kPasses * kColumns == kHeadDim && kColumns % Tile::kPanelColumns == 0, "O is made of whole passes");
    static_assert(kBuffers >= 2, "one load comes while one is worked on");
};

}  // namespace fsa
