// Units of work of the block scores: a run of query tokens against the windows of some blocks, one after the other of those
// that a CTA has. The loader and the others go through the same ones.
//
// A run is kTileQ * run_tiles tokens of one sequence. Those of sequence b in the chunk begin at number
// first_run(b) = (tokens of the chunk before it) / (tokens of a run) + (sequences of the chunk before it), which no earlier
// sequence's runs reach.
#pragma once

#include "device/sequence.cuh"

namespace fsa {
namespace block_scores {

// Blocks of a tile of windows: the first one is only there for the windows that reach from it into the second.
struct TileBlocks {
    int overlap;  // 1 if windows reach over their block's end
    int shift;    // a tile has 2^shift blocks, those of the overlap too
    int blocks;

    __device__ __forceinline__ TileBlocks(const BlockScoresParams& p, int log2_tile_k)
        : overlap(p.span > 1), shift(log2_tile_k - p.log2_ratio), blocks(1 << shift) {}

    // The block, counted from the sequence's first, with which tile `tile` of a sequence begins; -1 if there is none.
    __device__ __forceinline__ int first_block(int tile) const {
        return tile * (blocks - overlap) - overlap;
    }
};

struct Unit {
    SequenceBounds bounds;
    int kv_head, split;
    int first_query, end_query;  // of the run; the same where there is no such unit
    int num_blocks;              // up to the last query's own

    __device__ __forceinline__ int num_tiles(int tile_q) const {
        return (end_query - first_query + tile_q - 1) / tile_q;
    }
};

// The runs of a chunk, and the units that they make.
template <typename Traits>
struct Runs {
    const BlockScoresParams& p;
    int tokens;          // of a run
    int first_sequence;  // with tokens in the chunk
    int num_units;

    __device__ __forceinline__ explicit Runs(const BlockScoresParams& p)
        : p(p), tokens(Traits::kTileQ * p.run_tiles), first_sequence(sequence_of_query(p.sequences, p.query_begin)) {
        const int num_sequences = sequence_of_query(p.sequences, p.query_end - 1) - first_sequence + 1;
        num_units = ((p.query_end - p.query_begin) / tokens + num_sequences) * p.num_kv_heads * p.num_splits;
    }

    // The sequence's first query token in the chunk.
    __device__ __forceinline__ int first_query(int sequence) const {
        return min(max(p.sequences.cu_seqlens_q[sequence], p.query_begin), p.query_end);
    }
    __device__ __forceinline__ int first_run(int sequence) const {
        return (first_query(sequence) - p.query_begin) / tokens + sequence - first_sequence;
    }

    __device__ __forceinline__ Unit unit(int index) const {
        Unit unit;
        unit.split = index % p.num_splits;
        unit.kv_head = index / p.num_splits % p.num_kv_heads;
        const int run = index / p.num_splits / p.num_kv_heads;
        const int sequence = last_not_after(p.sequences.batch, run, [&](int i) { return first_run(i); });
        const int run_of_sequence = run - first_run(sequence);
        unit.bounds = sequence_bounds(p.sequences, sequence);
        const int end = min(unit.bounds.query_begin + unit.bounds.num_queries, p.query_end);
        unit.first_query = first_query(sequence) + run_of_sequence * tokens;
        unit.end_query = min(unit.first_query + tokens, end);
        unit.num_blocks = (unit.end_query - 1 - unit.bounds.query_begin) / p.block_size + 1;
        const TileBlocks tiles(p, Traits::kLog2TileK);
        const int first_block = tiles.first_block(unit.split * Traits::kWarpgroups) + tiles.overlap;
        // Tokens before the first sequence are in none.
        if (run_of_sequence < 0 || unit.first_query >= unit.end_query || first_block >= unit.num_blocks)
            unit.end_query = unit.first_query;
        return unit;
    }
};

// Calls f(unit) for the units of this CTA: one of every gridDim.x of them, each time the one behind. Units that reach beyond
// what their queries see lie gridDim.x apart often enough for some CTAs to get all of them otherwise.
template <typename Traits, typename F>
__device__ __forceinline__ void for_each_unit(const BlockScoresParams& p, const F& f) {
    const Runs<Traits> runs(p);
    const int ctas = static_cast<int>(gridDim.x);
    int own = static_cast<int>(blockIdx.x);
    for (int first = 0; first < runs.num_units; first += ctas) {
        if (first + own < runs.num_units) {
            const Unit unit = runs.unit(first + own);
            if (unit.first_query < unit.end_query) f(unit);
        }
        own = own + 1 < ctas ? own + 1 : 0;
    }
}

// The window that a warpgroup's tile begins with, counted from the sequence's first; negative for the one before that.
template <typename Traits>
__device__ __forceinline__ int first_window(const BlockScoresParams& p, const Unit& unit, int warpgroup) {
    const TileBlocks tiles(p, Traits::kLog2TileK);
    return tiles.first_block(unit.split * Traits::kWarpgroups + warpgroup) * (1 << p.log2_ratio);
}

}  // namespace block_scores
}  // namespace fsa
