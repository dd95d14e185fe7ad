// box_copies.cuh under the emulator, for tests/native/bindings.cpp.
#pragma once

#include <cstdint>
#include <vector>

// A [128, 64] matrix of 16-bit elements, two a word, by way of boxes of 16 rows. `mistake` numbers box_copies::Mistake.
std::vector<uint32_t> emulated_box_copies(const std::vector<uint32_t>& matrix, int mistake);
