#include "emulator.h"

#include <csetjmp>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include <ucontext.h>

#undef threadIdx
#undef blockIdx
#undef gridDim

namespace emulator {
namespace {

constexpr int kStackBytes = 256 * 1024;

enum class State { kReady, kAtWarp, kAtCta, kEnded };

struct Copy {
    unsigned char* to;
    const void* from;  // null: zeros
    int group;
};

struct Fiber {
    State state = State::kEnded;
    jmp_buf resume_at;
    bool started = false;
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
    void* argument = nullptr;
    const char* where = nullptr;
    std::deque<Copy> copies;
    int group = 0;  // copies issued now belong to it
};

struct Cta {
    std::vector<std::unique_ptr<Fiber>> fibers;  // kept from CTA to CTA for their stacks
    std::vector<unsigned char> shared;
    int threads = 0;
    int running = 0;
    dim3 index, grid;
    bool predicate = false, barrier_result = false;
    const std::function<void()>* body = nullptr;
    jmp_buf scheduler;
    ucontext_t starter;
};

Cta cta;

Fiber& running() {
    return *cta.fibers[cta.running];
}

void yield_to_scheduler() {
    if (_setjmp(running().resume_at) == 0) _longjmp(cta.scheduler, 1);
}

void fiber_main() {
    (*cta.body)();
    running().state = State::kEnded;
    _longjmp(cta.scheduler, 1);
}

void resume(int thread) {
    cta.running = thread;
    Fiber& fiber = running();
    if (_setjmp(cta.scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.resume_at, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
}

// Runs a warp until all of its lanes wait for the CTA or have ended.
void run_warp(int warp) {
    for (bool progress = true; progress;) {
        progress = false;
        for (int thread = warp * 32; thread < warp * 32 + 32; ++thread) {
            while (cta.fibers[thread]->state == State::kReady) {
                progress = true;
                resume(thread);
            }
        }
    }
    for (int thread = warp * 32; thread < warp * 32 + 32; ++thread) {
        if (cta.fibers[thread]->state == State::kAtWarp)
            fail("lanes wait for lanes that have ended or wait for the CTA");
    }
}

void run_cta(std::mt19937& random) {
    const int warps = cta.threads / 32;
    for (int thread = 0; thread < cta.threads; ++thread) {
        Fiber& fiber = *cta.fibers[thread];
        fiber.state = State::kReady;
        fiber.started = false;
        fiber.copies.clear();
    }
    std::memset(cta.shared.data(), 0xff, cta.shared.size());  // NaN in every 16- and 32-bit type
    std::vector<int> order(warps);
    for (int i = 0; i < warps; ++i) order[i] = i;
    for (bool any_left = true; any_left;) {
        std::shuffle(order.begin(), order.end(), random);
        for (const int warp : order) run_warp(warp);
        any_left = false;
        cta.barrier_result = cta.predicate;
        cta.predicate = false;
        for (int thread = 0; thread < cta.threads; ++thread) {
            Fiber& fiber = *cta.fibers[thread];
            if (fiber.state != State::kAtCta) continue;
            fiber.state = State::kReady;
            any_left = true;
        }
    }
}

}  // namespace

void run_grid(dim3 ctas, int threads, int shared_bytes, const std::function<void()>& body) {
    if (threads % 32 != 0) fail("CTAs of whole warps only");
    static std::mt19937 random(1);
    while (static_cast<int>(cta.fibers.size()) < threads) cta.fibers.push_back(std::make_unique<Fiber>());
    // The slack lets shared memory begin at a multiple of 1024 bytes.
    cta.shared.assign(shared_bytes + 1024, 0);
    cta.threads = threads;
    cta.grid = ctas;
    cta.body = &body;
    for (unsigned z = 0; z < ctas.z; ++z)
        for (unsigned y = 0; y < ctas.y; ++y)
            for (unsigned x = 0; x < ctas.x; ++x) {
                cta.index = dim3(x, y, z);
                run_cta(random);
            }
}

ThreadIndex thread_index() {
    return {static_cast<unsigned>(cta.running)};
}

dim3 cta_index() {
    return cta.index;
}

dim3 grid_size() {
    return cta.grid;
}

unsigned char* shared_memory() {
    const uintptr_t address = reinterpret_cast<uintptr_t>(cta.shared.data());
    return reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
}

int shared_memory_bytes() {
    return static_cast<int>(cta.shared.size()) - 1024;
}

void meet_warp(const char* where, void* argument, void (*resolve)(void* const (&arguments)[32])) {
    Fiber& own = running();
    own.argument = argument;
    own.where = where;
    own.state = State::kAtWarp;
    const int first = cta.running / 32 * 32;
    void* arguments[32];
    for (int lane = 0; lane < 32; ++lane) {
        const Fiber& fiber = *cta.fibers[first + lane];
        if (fiber.state != State::kAtWarp) return yield_to_scheduler();
        if (std::strcmp(fiber.where, where) != 0) fail("lanes of a warp meet at different instructions");
        arguments[lane] = fiber.argument;
    }
    resolve(arguments);
    for (int lane = 0; lane < 32; ++lane) cta.fibers[first + lane]->state = State::kReady;
}

bool meet_cta(bool predicate) {
    cta.predicate |= predicate;
    running().state = State::kAtCta;
    yield_to_scheduler();
    return cta.barrier_result;
}

void defer_copy(unsigned char* to, const void* from) {
    running().copies.push_back({to, from, running().group});
}

void commit_copies() {
    ++running().group;
}

void wait_copies(int pending_groups) {
    Fiber& own = running();
    while (!own.copies.empty() && own.copies.front().group < own.group - pending_groups) {
        const Copy& copy = own.copies.front();
        if (copy.from != nullptr) {
            std::memcpy(copy.to, copy.from, 16);
        } else {
            std::memset(copy.to, 0, 16);
        }
        own.copies.pop_front();
    }
}

}  // namespace emulator
