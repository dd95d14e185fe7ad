// What the stages share and what each of them reads and writes. Every pointer carries its shape; sizes are elements.
// All tensors of a chunk cover num_heads KV heads from head_begin and num_queries query tokens from query_begin.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "device/fast_divide.h"

namespace fsa {

// Packed sequences. Bounds are clamped where they are read, so that no value of cu_seqlens leads out of a tensor.
struct Sequences {
    const int32_t* cu_seqlens_q;  // [batch + 1]
    const int32_t* cu_seqlens_k;  // [batch + 1]
    int batch;
    int total_q;
    int total_k;
};

struct Geometry {
    Sequences sequences;
    int head_begin;   // first KV head of the chunk
    int num_heads;    // KV heads of the chunk
    int query_begin;  // first query token of the chunk
    int num_queries;  // query tokens of the chunk
    int group_size;   // query heads a KV head
    int head_dim;
    int topk;
    int block_size;  // keys of a selected block
    int subs;        // sub-blocks of tile_k keys a block
    int num_blocks;  // upper bound on the KV blocks of all sequences: total_k / block_size + batch
    bool causal;
    FastDivider by_num_queries;
    FastDivider by_group_size;
    FastDivider by_topk;
    FastDivider by_subs;
};

// Chunks that are split and planned together: the heads and queries of the first one, then those behind its queries, then
// those behind its heads. All are as large, but for the last ones of heads and of queries. Buffers have a leading dimension
// of chunks, each as large as the first one's.
struct ChunkGrid {
    int head_end, query_end;  // of all chunks
    int query_chunks;         // with the same heads
    int num_chunks;
};

// [tokens, heads, head_dim] with unit stride along head_dim; rows are 16-byte aligned.
struct RowTensor {
    const void* data;
    int64_t token_stride;
    int64_t head_stride;
};

// The plan: edges (query token, slot) in CSR by cell. A cell is a (KV head of the chunk, query range, KV block), in this
// order; an edge is (query - query_begin) * topk + slot.
struct PlanView {
    const int32_t* csr_offsets;  // [num_heads * num_ranges * num_blocks + 1]
    const int32_t* csr_edges;    // [num_heads * num_queries * topk], ascending within a cell
    // [max_items]: head * num_blocks + block, whatever the range (-1 behind the last item); edge begin; edge end; sequence
    const int4* work_items;
    int32_t* next_item;  // [1], 0 when main starts, once a plan: for mains that fetch items as they go
    int max_items;
    int edges_per_item;
};

struct alignas(8) EdgesAndItems {
    int32_t edges, items;
};

struct PlanParams {
    Geometry geometry;  // of the first chunk; shapes below are of one chunk
    ChunkGrid grid;
    const int32_t* topk_idx;    // [num_kv_heads, total_q, topk]
    int num_ranges;             // runs of query tokens whose cells stand together
    int parts;                  // runs of query tokens a range is counted in
    EdgesAndItems* group_sums;  // [num_heads, num_ranges, ceil(num_blocks / kPlanGroup)], scratch: sums over cells
    // Scratch. [num_heads, num_ranges, parts, num_blocks]: edges of a cell in this part, then in the parts before it.
    int32_t* counts;
    int32_t* cell_edges;   // [num_heads, num_ranges, num_blocks], scratch
    int32_t* csr_offsets;  // as in PlanView
    int32_t* csr_edges;
    int4* work_items;
    int32_t* next_item;
    int max_items;
    int edges_per_item;
    // Fewer edges that are left of a cell are part of the item before. 1 in the backward, where a cell of n edges is
    // ceil(n / edges_per_item) pieces.
    int min_rest;
};

// A query tile: this many neighbouring query tokens of a chunk, in runs. A block that enough queries of a run select is
// shared by these: they attend to it query-outer, and main leaves no partials for it.
constexpr int kQueryTile = 64;
// There is a kernel for that, on sm_90a, for multiples of these: it takes 64 keys at a time, and partials of two heads, since
// the copy engine writes to multiples of 128 bytes, and those of one head may have 64. Of two heads a query tile is also whole
// units (forward/shared_units.cuh).
constexpr int kSharedKeys = 64, kSharedHeads = 2;

struct SharedBlocks {
    // [num_heads, num_tiles, max_blocks]: block, among those of all sequences; its sequence; queries 0 .. 31 of the tile
    // that share it, a bit each; queries 32 .. 63. Of those not in use the first 32 are there to be read.
    int4* blocks;
    int32_t* counts;            // [num_heads, num_tiles]: how many blocks are in use
    int32_t* scattered_counts;  // [num_heads, num_queries]: slots of a query in scattered_idx that are in use
    int32_t* next;              // [1], 0 when shared starts: a counter for its use
    int num_tiles;              // ceil(num_queries / kQueryTile)
    int max_blocks;
};

struct ForwardSplitParams {
    Geometry geometry;  // of the first chunk
    ChunkGrid grid;
    const int32_t* topk_idx;  // [num_kv_heads, total_q, topk]
    // Like topk_idx, written where the chunk is: the blocks of a query that are not shared, then -1.
    int32_t* scattered_idx;
    SharedBlocks shared;
    int run_queries;  // of a run: 8, 16, 32 or 64
    int min_queries;  // queries of a run that must select a block for it to be shared
};

struct ForwardMainParams {
    Geometry geometry;
    PlanView plan;
    RowTensor q;               // [total_q, num_heads, head_dim]
    RowTensor k;               // [total_k, num_kv_heads, head_dim]
    RowTensor v;               // [total_k, num_kv_heads, head_dim]
    float softmax_scale_log2;  // > 0; softmax_scale * log2(e)
    __half* o_partial;         // [num_heads, num_queries, topk, subs, group_size, head_dim], times 2^-value_exponent
    float* lse_partial;        // [num_heads, num_queries, topk, subs, group_size], log2
    int32_t* value_exponent;   // [num_heads, num_blocks, subs]
};

// What the last stage of the forward reads of the ones before it, and the results.
struct ForwardReduceParams {
    Geometry geometry;
    const int32_t* topk_idx;        // [num_kv_heads, total_q, topk]; scattered_idx where blocks are shared
    const __half* o_partial;        // as in ForwardMainParams
    const float* lse_partial;       // as in ForwardMainParams
    const int32_t* value_exponent;  // as in ForwardMainParams
    void* out;                      // [total_q, num_heads, head_dim]
    float* lse;                     // [num_heads, total_q], natural log
    int num_kv_heads;               // of the tensors, not of the chunk
};

struct ForwardSharedParams : ForwardReduceParams {
    SharedBlocks shared;
    RowTensor q, k, v;         // as in ForwardMainParams
    float softmax_scale_log2;  // > 0; softmax_scale * log2(e)
};

// Keys are compressed ones here: a window of kernel_size tokens every kernel_stride tokens.
struct BlockScoresParams {
    Sequences sequences;
    RowTensor q;       // [total_q, num_heads, head_dim]
    RowTensor k;       // [total_k, num_kv_heads, head_dim]
    const float* lse;  // [num_heads, total_q], natural log
    float* scores;     // [query_end - query_begin, num_kv_heads, scores_stride]; written up to a query's own block
    int scores_stride;
    int query_begin, query_end;  // query tokens of the chunk
    int num_kv_heads;
    int group_size;
    int head_dim;
    int block_size;
    int kernel_size;
    int kernel_stride;
    int log2_ratio;            // log2 of block_size / kernel_stride
    int span;                  // kernel_size / kernel_stride
    float softmax_scale_log2;  // > 0
    FastDivider by_kernel_stride;
    // Units of work (selection/score_units.cuh); the launcher's.
    int run_tiles, num_splits;
};

struct SelectTopkParams {
    Sequences sequences;  // of query tokens alone
    const float* scores;  // as in BlockScoresParams; not negative, NaN counts as 0
    int32_t* topk_idx;    // [num_kv_heads, total_q, topk]; written for the query tokens of the chunk
    int scores_stride;
    int query_begin, query_end;  // query tokens of the chunk
    int num_kv_heads;
    int block_size;
    int topk;
    int init_blocks, local_blocks;
};

struct BackwardPreprocessParams {
    RowTensor out;      // [total_q, num_heads, head_dim]
    RowTensor dout;     // [total_q, num_heads, head_dim]
    const float* dlse;  // [num_heads, total_q], null: zero
    float* delta;       // [num_heads, total_q]: rowsum(dout * out) - dlse
    int total_q;
    int num_heads;  // query heads
    int head_dim;
};

// Where dK and dV of a sub-block go: into dk, dv when its cell is one work item, else into a piece that reduce adds up.
struct KeyValueGradients {
    void* dk;              // [total_k, num_heads, head_dim]: input dtype, or fp32 when accumulate
    void* dv;              // as dk, same strides
    int64_t token_stride;  // elements, of dk and dv
    int64_t head_stride;
    // Piece i of cell c is row 2 * csr_offsets[c] / edges_per_item + i.
    float* dkv_pieces;  // [max_pieces, subs, 2 (dk, dv), tile_k, head_dim]
    int tile_k;
    bool accumulate;  // add to dk, dv: the queries come in several chunks
};

struct BackwardMainParams {
    Geometry geometry;
    PlanView plan;
    RowTensor q, k, v, dout;
    const float* lse;    // [num_heads, total_q], natural log
    const float* delta;  // [num_heads, total_q]
    float softmax_scale;
    float softmax_scale_log2;  // > 0
    void* dq_partial;          // [num_heads, num_queries, topk, subs, group_size, head_dim], input dtype
    KeyValueGradients gradients;
};

struct BackwardReduceParams {
    Geometry geometry;
    const int32_t* topk_idx;     // [num_kv_heads, total_q, topk]
    const int32_t* csr_offsets;  // [num_heads * num_blocks + 1]
    int edges_per_item;
    const void* dq_partial;  // as in BackwardMainParams
    void* dq;                // [total_q, num_heads, head_dim]
    int num_kv_heads;        // of dq, not of the chunk
    KeyValueGradients gradients;
};

}  // namespace fsa
