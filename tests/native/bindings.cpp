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
#include "device/wgmma_tile.h"
#include "dispatch.h"

#include "../emulator/box_copies.h"
#include "../emulator/wgmma_forms.h"

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

// What wgmma reads, for tiles of one shape.
struct WgmmaTile {
    int rows, columns, panel_columns, bytes;
    uint32_t (*offset)(int row, int chunk);
    uint64_t (*along_columns)(uint32_t tile, int step, int first_row);
    uint64_t (*along_rows)(uint32_t tile, int step, int first_panel);
};

template <int kRows, int kColumns>
WgmmaTile wgmma_tile() {
    using Tile = fsa::WgmmaTile<kRows, kColumns>;
    return {kRows, kColumns, Tile::kPanelColumns, Tile::kBytes, &Tile::offset, &Tile::along_columns, &Tile::along_rows};
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
    m.def("visible_blocks", &fsa::visible_blocks);
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
    pybind11::class_<WgmmaTile>(m, "WgmmaTile")
        .def_readonly("rows", &WgmmaTile::rows)
        .def_readonly("columns", &WgmmaTile::columns)
        .def_readonly("panel_columns", &WgmmaTile::panel_columns)
        .def_readonly("bytes", &WgmmaTile::bytes)
        .def("offset", [](const WgmmaTile& t, int row, int chunk) { return t.offset(row, chunk); })
        .def(
            "along_columns",
            [](const WgmmaTile& t, uint32_t tile, int step, int row) { return t.along_columns(tile, step, row); })
        .def("along_rows", [](const WgmmaTile& t, uint32_t tile, int step, int panel) {
            return t.along_rows(tile, step, panel);
        });
    m.attr("wgmma_tiles") = std::vector<WgmmaTile>{wgmma_tile<16, 64>(),  wgmma_tile<32, 32>(),  wgmma_tile<32, 128>(),
                                                   wgmma_tile<64, 32>(),  wgmma_tile<64, 64>(),  wgmma_tile<64, 96>(),
                                                   wgmma_tile<64, 128>(), wgmma_tile<64, 192>(), wgmma_tile<128, 64>(),
                                                   wgmma_tile<128, 96>(), wgmma_tile<128, 256>()};
    m.def("emulated_box_copies", &emulated_box_copies);
    m.def("emulated_wgmma", &emulated_wgmma);
    m.def("kernel_head_dim", &kernel_head_dim);
    m.def("kernel_forward_tile_k", &kernel_forward_tile_k);
    m.def("kernel_backward_tile_k", &kernel_backward_tile_k);
}
