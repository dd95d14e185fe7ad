// The online softmax of the forward shared kernel, on registers: of a warp's 16 rows, two a lane.
#pragma once

#include <type_traits>

#include "device/convert.cuh"
#include "device/softmax.cuh"
#include "forward/query_tile.cuh"
#include "forward/shared_units.cuh"

namespace fsa {
namespace forward_shared {

using namespace forward_main;

template <typename Traits>
using Output = float[Traits::kPasses][Traits::kColumns / 2];

// Of the two rows of a lane. A lane sums its own columns; the quad adds up at the end.
struct OnlineSoftmax {
    float reference[2] = {-INFINITY, -INFINITY};  // what exponents count from, log2: near the largest score so far
    float sum[2] = {0.f, 0.f};
};

// Scores may exceed the reference by this much, log2, before O is scaled to a new one.
constexpr float kSlack = 2.f;

// log2 of what P is divided by: O sums up to 2^17 values (512 slots of 256 keys) with factors up to 2^kSlack before it is
// normalised, and those of bf16 reach 2^128.
template <typename T>
constexpr float kHeadroom = std::is_same_v<T, __half> ? 0.f : 17.f + kSlack;

// How references move.
struct Rescaling {
    bool moves;     // that of some row of the warp
    float kept[2];  // what is left of sums so far, if it does
};

// What a load of keys asks of a lane's two rows.
template <typename Traits>
struct Update : Rescaling {
    bool shares[2][Traits::kSubBlocks];  // the row's query shares the sub-block
};

// Moves the references to where the rows' scores are, log2. `largest`: of what the lane has of its rows.
__device__ __forceinline__ Rescaling move_references(OnlineSoftmax& softmax, const float (&largest)[2]) {
    Rescaling rescaling = {};
    bool moves = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) moves |= largest[i] > softmax.reference[i] + kSlack;
    rescaling.moves = __any_sync(~0u, moves);
    if (rescaling.moves) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float reference = fmaxf(softmax.reference[i], quad_max(largest[i]));
            rescaling.kept[i] = exp2_approx(softmax.reference[i] - finite_shift(reference));
            softmax.reference[i] = reference;
            softmax.sum[i] *= rescaling.kept[i];
        }
    }
    return rescaling;
}

// mask_invisible (query_tile.cuh) for every sub-block of a load. Not one function: main on sm_80 has no register to spare, and
// spills if it shares these loops.
template <typename Traits>
__device__ __forceinline__ void mask_invisible_keys(Scores<Traits>& s, const int (&last_visible)[Traits::kSubBlocks]) {
    constexpr int kKeys = Traits::kSubBlockKeys;
    const int lane = threadIdx.x % 32;
    bool any = false;
    for (const int last : last_visible) any |= last >= 0 && last < kKeys - 1;
    if (!__any_sync(~0u, any)) return;
#pragma unroll
    for (int sub = 0; sub < Traits::kSubBlocks; ++sub) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int last = __shfl_sync(~0u, last_visible[sub], 8 * i + lane / 4) - lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int x = 0; x < 2; ++x)
                    if (n * 8 + x > last) s[0][sub * (kKeys / 8) + n][2 * i + x] = -INFINITY;
        }
    }
}

// Moves the references to where the scores of a load are.
template <typename Traits>
__device__ __forceinline__ Update<Traits> update_references(
    OnlineSoftmax& softmax, const Scores<Traits>& s, const int (&last_visible)[Traits::kSubBlocks], float scale_log2) {
    constexpr int kTiles = Traits::kSubBlockKeys / 8;
    Update<Traits> update = {};
    float maximum[2] = {-INFINITY, -INFINITY};  // of the lane's own columns
#pragma unroll
    for (int sub = 0; sub < Traits::kSubBlocks; ++sub) {
        const unsigned sharing = __ballot_sync(~0u, last_visible[sub] >= 0) >> threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float largest = s[0][sub * kTiles][2 * i];
#pragma unroll
            for (int n = sub * kTiles; n < (sub + 1) * kTiles; ++n)
                largest = fmaxf(largest, fmaxf(s[0][n][2 * i], s[0][n][2 * i + 1]));
            update.shares[i][sub] = sharing >> 8 * i & 1;
            // An addition, of which the compiler makes no branch.
            maximum[i] = fmaxf(maximum[i], largest + (update.shares[i][sub] ? 0.f : -INFINITY));
        }
    }
    for (float& x : maximum) x *= scale_log2;
    static_cast<Rescaling&>(update) = move_references(softmax, maximum);
    return update;
}

// P = 2^(S - reference - kHeadroom), not normalised, which sums take up: while products are on their way, and not behind
// them, where the compiler would like to have it.
template <typename Traits>
__device__ __forceinline__ void exponentiate(
    Probs<Traits>& probs, OnlineSoftmax& softmax, const Scores<Traits>& s, const Update<Traits>& update,
    float scale_log2) {
    constexpr int kTiles = Traits::kSubBlockKeys / 8;
    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) shift[i] = finite_shift(softmax.reference[i]) + kHeadroom<typename Traits::T>;
#pragma unroll
    for (int sub = 0; sub < Traits::kSubBlocks; ++sub) {
        float sums[2][2] = {};
#pragma unroll
        for (int n = sub * kTiles; n < (sub + 1) * kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float x = exp2_approx(fmaf(s[0][n][2 * i], scale_log2, -shift[i])),
                            y = exp2_approx(fmaf(s[0][n][2 * i + 1], scale_log2, -shift[i]));
                sums[i][0] += x;
                sums[i][1] += y;
                probs[0][n][i] = computed_here(HalfType<typename Traits::T>::pack(x, y));
            }
#pragma unroll
        for (int i = 0; i < 2; ++i)
            softmax.sum[i] += computed_here(update.shares[i][sub] ? sums[i][0] + sums[i][1] : 0.f);
    }
}

// O as far as it goes counted from the new references.
template <typename Traits>
__device__ __forceinline__ void rescale(Output<Traits>& o, const Rescaling& rescaling) {
    if (!rescaling.moves) return;
#pragma unroll
    for (int pass = 0; pass < Traits::kPasses; ++pass)
#pragma unroll
        for (int x = 0; x < Traits::kColumns / 2; ++x) o[pass][x] *= rescaling.kept[x / 2 % 2];
}

// P as operand of the next product. Rows that do not share a sub-block get zeros by a choice, not by their scores: those may
// be NaN.
template <typename Traits>
__device__ __forceinline__ void choose_shared(
    Probs<Traits>& operand, const Probs<Traits>& probs, const Update<Traits>& update) {
    constexpr int kTiles = Traits::kSubBlockKeys / 8;
#pragma unroll
    for (int n = 0; n < Traits::kTileK / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) operand[0][n][i] = update.shares[i][n / kTiles] ? probs[0][n][i] : 0;
}

}  // namespace forward_shared
}  // namespace fsa
