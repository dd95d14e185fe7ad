// Tiles of the backward main kernel for sm_90a.
#pragma once

#include "device/wgmma_tile.h"

namespace fsa {

template <typename T_, int kHeadDim_, int kTileK_>
struct BackwardMainSm90Traits {
    using T = T_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kTileK = kTileK_;
    static constexpr int kTileQ = 64;

    // One warpgroup. Two CTAs an SM leave 255 registers a thread, and each computes while the other waits.
    static constexpr int kThreads = 128;
    static constexpr int kMinCtas = 2;

    using KeyTile = WgmmaTile<kTileK, kHeadDim>;    // K (interleaved), V
    using QueryTile = WgmmaTile<kTileQ, kHeadDim>;  // Q, dO
    using ScoreTile = WgmmaTile<kTileK, kTileQ>;    // dS^T

    static constexpr int kQueryStages = 2;  // Q and dO of a tile arrive while the one before is worked on
    static constexpr int kRowStages = 4;    // rows are described three tiles ahead; a power of two

    static constexpr int kQueryStageBytes = 2 * QueryTile::kBytes;
    static constexpr int kTileBytes = 2 * KeyTile::kBytes + kQueryStages * kQueryStageBytes + ScoreTile::kBytes;
    static constexpr int kRowBytes = kTileQ * 32;  // QueryTileRows
    static constexpr int kPoisonBytes = kTileK * 4;
    static constexpr int kStateBytes = 128;  // ItemState
    static constexpr int kSharedBytes = kTileBytes + kRowStages * kRowBytes + kPoisonBytes + kStateBytes;

    // Where keys stand in the tiles of K and dS^T. A quarter-warp loads A fragments of K from four chunks of two
    // neighbouring keys: the swizzle of 128-byte rows keeps these in different banks if the rows differ in bit 2, so
    // that changes places with bit 0; 64-byte rows do as they are.
    struct PermutedKeys {
        static FSA_HOST_DEVICE constexpr int row(int key) {
            return KeyTile::kPanelColumns == 64 ? (key & ~5) | (key & 1) << 2 | (key >> 2 & 1) : key;
        }
        static FSA_HOST_DEVICE constexpr uint32_t offset(int key, int chunk) {
            return KeyTile::offset(row(key), chunk);
        }
    };

    static_assert(kTileK == 64, "keys are the rows of a warpgroup's products");
    static_assert(kHeadDim <= 128, "dK and dV take a register a column, beside 96 of scores and fragments");
    static_assert(kThreads == 2 * kTileQ, "two threads describe a row");
    static_assert(
        (kRowStages & (kRowStages - 1)) == 0 && kRowStages >= 4, "a tile's rows and the three described behind it");
    static_assert(kMinCtas * (kSharedBytes + 1024) <= 228 * 1024, "shared memory of an SM; 1 KB a CTA is the system's");
};

}  // namespace fsa
