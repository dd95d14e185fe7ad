// Chunks that are split and planned together.
#pragma once

#include "params.h"

namespace fsa {

// Heads and queries of one chunk of several; by_num_queries stays the first one's.
__device__ __forceinline__ Geometry geometry_of_chunk(const Geometry& first, const ChunkGrid& grid, int chunk) {
    const int of_heads = chunk / grid.query_chunks, of_queries = chunk - of_heads * grid.query_chunks;
    Geometry g = first;
    g.head_begin += of_heads * first.num_heads;
    g.num_heads = min(first.num_heads, grid.head_end - g.head_begin);
    g.query_begin += of_queries * first.num_queries;
    g.num_queries = min(first.num_queries, grid.query_end - g.query_begin);
    return g;
}

}  // namespace fsa
