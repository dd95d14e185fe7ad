// wgmma_forms.cuh under the emulator, for tests/native/bindings.cpp.
#pragma once

#include <string>
#include <vector>

// D = A B + C of 128 rows, all row-major. dtype: "float16" or "bfloat16". a: "registers", "sum" or "outer", b: "sum" or
// "outer", by where A is and what is contiguous in shared memory. `mistake` numbers wgmma_forms::Mistake.
std::vector<float> emulated_wgmma(
    const std::string& dtype, const std::string& a_operand, const std::string& b_operand, int columns, int sum,
    const std::vector<float>& a, const std::vector<float>& b, const std::vector<float>& c, int mistake);
