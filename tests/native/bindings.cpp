// Functions of csrc/ that a kernel calls and a host can call too, for tests/test_native.py. Calls only, no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

using std::max;  // nvcc declares these globally
using std::min;

#include "device/fast_divide.h"
#include "device/layout.h"
#include "device/sequence.cuh"
#include "dispatch.h"

namespace {

struct PackedSequences {
    std::vector<int32_t> cu_seqlens_q, cu_seqlens_k;
    int total_q, total_k;

    fsa::Sequences view() const {
        return {cu_seqlens_q.data(), cu_seqlens_k.data(), static_cast<int>(cu_seqlens_q.size()) - 1, total_q, total_k};
    }
};

std::tuple<int, int, int, int> sequence_bounds(const PackedSequences& s, int sequence) {
    const fsa::SequenceBounds b = fsa::sequence_bounds(s.view(), sequence);
    return {b.query_begin, b.num_queries, b.key_begin, b.num_keys};
}

template <int kRowBytes>
uint32_t tile_offset(int row, int chunk) {
    return fsa::SwizzledTile<kRowBytes>::offset(row, chunk);
}

int kernel_head_dim(int head_dim) {
    int width = 0;
    fsa::dispatch_head_dim(head_dim, [&](auto constant) { width = constant; });
    return width;
}

// The kernel's tile_k where one is built for this head_dim.
int kernel_forward_tile_k(int head_dim, int tile_k) {
    int built = 0;
    fsa::dispatch_head_dim(head_dim, [&](auto width) {
        fsa::dispatch_forward_tile_k<decltype(width)::value>(tile_k, [&](auto constant) { built = constant; });
    });
    return built;
}

int kernel_backward_tile_k(int head_dim, int tile_k) {
    int built = 0;
    fsa::dispatch_head_dim(head_dim, [&](auto width) {
        fsa::dispatch_backward_tile_k<decltype(width)::value>(tile_k, [&](auto constant) { built = constant; });
    });
    return built;
}

}  // namespace

PYBIND11_MODULE(fsa_native_tests, m) {
    pybind11::class_<PackedSequences>(m, "Sequences")
        .def(
            pybind11::init<std::vector<int32_t>, std::vector<int32_t>, int, int>(), pybind11::arg("cu_seqlens_q"),
            pybind11::arg("cu_seqlens_k"), pybind11::arg("total_q"), pybind11::arg("total_k"))
        .def("bounds", &sequence_bounds)
        .def(
            "first_block",
            [](const PackedSequences& s, int b, int size) { return fsa::first_block(s.view(), b, size); })
        .def("of_query", [](const PackedSequences& s, int query) { return fsa::sequence_of_query(s.view(), query); })
        .def(
            "of_block", [](const PackedSequences& s, int block,
                           int block_size) { return fsa::sequence_of_block(s.view(), block, block_size); })
        .def("last_visible_key", [](const PackedSequences& s, int sequence, int query, bool causal) {
            return fsa::last_visible_key(fsa::sequence_bounds(s.view(), sequence), query, causal);
        });
    m.def("slot_attends", &fsa::slot_attends);
    m.def("quotient", [](uint32_t n, uint32_t divisor) { return fsa::FastDivider(divisor).quotient(n); });
    m.def("interleave", [](int chunk, int word) {
        const fsa::InterleavedWord to = fsa::interleave(chunk, word);
        return std::make_pair(to.chunk, to.word);
    });
    m.attr("tile_offset") = pybind11::dict();
    const auto add_tile = [&]<int kHeadDim>(fsa::Constant<kHeadDim>) {
        m.attr("tile_offset")[pybind11::int_(kHeadDim)] = pybind11::cpp_function(&tile_offset<kHeadDim * 2>);
    };
    add_tile(fsa::Constant<64>());
    add_tile(fsa::Constant<96>());
    add_tile(fsa::Constant<128>());
    add_tile(fsa::Constant<192>());
    add_tile(fsa::Constant<256>());
    m.def("kernel_head_dim", &kernel_head_dim);
    m.def("kernel_forward_tile_k", &kernel_forward_tile_k);
    m.def("kernel_backward_tile_k", &kernel_backward_tile_k);
}
