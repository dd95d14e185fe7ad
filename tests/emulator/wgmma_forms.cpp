#include "wgmma_forms.h"

#include "wgmma_forms.cuh"

#include <stdexcept>

#include "launch.h"

std::vector<float> emulated_wgmma(
    const std::string& dtype, const std::string& a_operand, const std::string& b_operand, int columns, int sum,
    const std::vector<float>& a, const std::vector<float>& b, const std::vector<float>& c, int mistake) {
    using wgmma_forms::kRows, wgmma_forms::OperandA;
    const auto size_of = [](int rows, int columns) { return static_cast<size_t>(rows) * columns; };
    if (a.size() != size_of(kRows, sum) || b.size() != size_of(sum, columns) || c.size() != size_of(kRows, columns))
        throw std::invalid_argument("matrices of the wrong size");
    std::vector<float> d;
    wgmma_forms::for_each_form([&]<typename Form>(Form) {
        const char* a_name = Form::kA == OperandA::kRegisters ? "registers" : Form::kAOuter ? "outer" : "sum";
        if (dtype != (std::is_same_v<typename Form::T, __half> ? "float16" : "bfloat16")) return;
        if (a_operand != a_name || b_operand != (Form::kBOuter ? "outer" : "sum")) return;
        if (columns != Form::kColumns || sum != Form::kSum) return;
        d.resize(c.size());
        fsa::launch(
            "multiply", wgmma_forms::multiply<Form>, {dim3(1), wgmma_forms::kWarpgroups * 128, Form::kSharedBytes},
            wgmma_forms::Params{a.data(), b.data(), c.data(), d.data(), static_cast<wgmma_forms::Mistake>(mistake)},
            nullptr);
    });
    if (d.empty()) throw std::invalid_argument("no such form");
    return d;
}
