#include "emulator.h"

#include "products.h"

#include <csetjmp>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <ucontext.h>

#undef threadIdx
#undef blockIdx
#undef gridDim

namespace emulator {
namespace {

constexpr int kStackBytes = 256 * 1024;

enum class State { kReady, kAtWarp, kAtWarpgroup, kAtCta, kAtMbarrier, kEnded };

struct Copy {
    unsigned char* to;
    const void* from;  // null: zeros
    int bytes;
    int group;
};

// An mbarrier, as it lies in shared memory.
struct Mbarrier {
    uint16_t arrivals, missing;
    int16_t missing_bytes;  // in units of 16; negative: some have come before whoever expects them has arrived
    uint16_t phase;         // that has not ended

    void end_phase_if_complete() {
        if (missing > 0 || missing_bytes > 0) return;
        if (missing_bytes < 0) fail("bytes at an mbarrier that does not expect them");
        missing = arrivals;
        ++phase;
    }
};
static_assert(sizeof(Mbarrier) == 8);

struct Fiber {
    State state = State::kEnded;
    const Mbarrier* awaited = nullptr;
    uint32_t awaited_parity = 0;
    jmp_buf resume_at;
    bool started = false;
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
    void* argument = nullptr;
    std::deque<Copy> copies;
    int group = 0;  // copies issued now belong to it
    int proxy_fences = 0, proxy_fences_at_barrier = 0;
};

// Of a warp or a warpgroup.
struct Meeting {
    int arrived = 0;
    const char* where = nullptr;
};

struct SharedWrite {
    int thread;        // -1: none
    int proxy_fences;  // of that thread when it wrote
};

struct Cta {
    std::vector<std::unique_ptr<Fiber>> fibers;  // kept from CTA to CTA for their stacks
    std::vector<unsigned char> shared;
    std::vector<SharedWrite> writes;                         // one for each 16 bytes of it
    std::vector<Meeting> warp_meetings, warpgroup_meetings;  // one a warp, one a warpgroup
    std::vector<std::function<void()>> bulk_copies;          // of the copy engine, on their way
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

// Wakes the threads whose mbarrier has reached its next phase.
void wake_at_mbarriers() {
    for (int thread = 0; thread < cta.threads; ++thread) {
        Fiber& fiber = *cta.fibers[thread];
        if (fiber.state == State::kAtMbarrier && fiber.awaited->phase % 2 != fiber.awaited_parity)
            fiber.state = State::kReady;
    }
}

bool any_is(State state, int first_thread, int threads) {
    const auto first = cta.fibers.begin() + first_thread;
    return std::any_of(first, first + threads, [&](const auto& f) { return f->state == state; });
}

bool any_is(State state) {
    return any_is(state, 0, cta.threads);
}

// Runs a warp until all of its lanes wait for the warpgroup, for the CTA or for an mbarrier, or have ended; returns whether
// any ran. Lanes take their turns in an order that is drawn: atomics of one instruction come in any.
bool run_warp(int warp, std::mt19937& random) {
    bool any_ran = false;
    for (bool progress = true; progress;) {
        progress = false;
        const int first = static_cast<int>(random() % 32);
        for (int i = 0; i < 32; ++i) {
            const int thread = warp * 32 + (first ^ i);
            while (cta.fibers[thread]->state == State::kReady) {
                progress = any_ran = true;
                resume(thread);
            }
        }
        wake_at_mbarriers();  // lanes may wait for the arrivals of others
        progress |= any_is(State::kReady, warp * 32, 32);
    }
    for (int thread = warp * 32; thread < warp * 32 + 32; ++thread) {
        if (cta.fibers[thread]->state == State::kAtWarp)
            fail("lanes wait for lanes that have ended or wait for the warpgroup, the CTA or an mbarrier");
    }
    return any_ran;
}

// Runs a warp to its next barrier. Where it waits for its warpgroup, those of the others that are awake come, too: warpgroups
// are not kept in step with each other.
void run_warp_to_barrier(int warp, const std::vector<int>& awake, std::mt19937& random) {
    for (bool progress = run_warp(warp, random); progress && any_is(State::kAtWarpgroup, warp * 32, 32);) {
        progress = false;
        for (const int other : awake) {
            if (other / 4 == warp / 4) progress |= run_warp(other, random);
        }
    }
}

// One of those on their way, whichever.
void land_bulk_copy(std::mt19937& random) {
    std::swap(cta.bulk_copies[random() % cta.bulk_copies.size()], cta.bulk_copies.back());
    cta.bulk_copies.back()();
    cta.bulk_copies.pop_back();
    wake_at_mbarriers();
}

// All live threads wait, none of them at an mbarrier at which anybody will arrive.
void release_cta_barrier() {
    if (any_is(State::kAtWarpgroup))
        fail("threads wait for threads of their warpgroup that have ended or wait for the CTA");
    if (any_is(State::kAtMbarrier)) fail("threads wait for an mbarrier at which nobody will arrive");
    cta.barrier_result = cta.predicate;
    cta.predicate = false;
    for (int thread = 0; thread < cta.threads; ++thread) {
        Fiber& fiber = *cta.fibers[thread];
        fiber.proxy_fences_at_barrier = fiber.proxy_fences;
        if (fiber.state == State::kAtCta) fiber.state = State::kReady;
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
    cta.writes.assign(cta.shared.size() / 16, {-1, 0});
    cta.warp_meetings.assign(warps, {});
    cta.warpgroup_meetings.assign(warps / 4, {});
    cta.bulk_copies.clear();
    begin_products(cta.threads);
    std::vector<int> order(warps), awake;
    for (int i = 0; i < warps; ++i) order[i] = i;
    while (any_is(State::kReady)) {
        std::shuffle(order.begin(), order.end(), random);
        awake.clear();
        for (const int warp : order) {
            if (random() % 4 > 0) awake.push_back(warp);  // the others are slow
        }
        for (const int warp : awake) run_warp_to_barrier(warp, awake, random);
        wake_at_mbarriers();
        while (!cta.bulk_copies.empty() && random() % 4 == 0) land_bulk_copy(random);
        while (!any_is(State::kReady) && any_is(State::kAtMbarrier) && !cta.bulk_copies.empty()) land_bulk_copy(random);
        if (!any_is(State::kReady)) release_cta_barrier();
    }
    if (!cta.bulk_copies.empty()) fail("all threads have ended before what the copy engine brings was there");
    end_products();
}

// The running thread and `kThreads - 1` neighbours meet.
template <int kThreads>
void meet(
    State waiting, Meeting& meeting, const char* where, void* argument,
    void (*resolve)(void* const (&arguments)[kThreads])) {
    if (meeting.arrived > 0 && std::strcmp(meeting.where, where) != 0) {
        fail(
            kThreads == 32 ? "lanes of a warp meet at different instructions"
                           : "threads of a warpgroup meet at different instructions");
    }
    meeting.where = where;
    running().argument = argument;
    running().state = waiting;
    if (++meeting.arrived < kThreads) return yield_to_scheduler();
    meeting.arrived = 0;
    const int first = cta.running / kThreads * kThreads;
    void* arguments[kThreads];
    for (int i = 0; i < kThreads; ++i) arguments[i] = cta.fibers[first + i]->argument;
    resolve(arguments);
    for (int i = 0; i < kThreads; ++i) cta.fibers[first + i]->state = State::kReady;
}

// Starts anew when the seed changes, so that a test repeats its schedules whatever ran before; and goes on from launch to
// launch, so that two launches of a test, whose results must be the same bits, have different ones.
std::mt19937& drawn_schedule() {
    static std::string seed;
    static std::mt19937 random;
    if (seed != schedule_seed()) {
        seed = schedule_seed();
        random.seed(std::hash<std::string>()(seed));
    }
    return random;
}

}  // namespace

void run_grid(dim3 ctas, int threads, int shared_bytes, const std::function<void()>& body) {
    if (threads % 32 != 0) fail("CTAs of whole warps only");
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
                run_cta(drawn_schedule());
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
    meet<32>(State::kAtWarp, cta.warp_meetings[cta.running / 32], where, argument, resolve);
}

void meet_warpgroup(const char* where, void* argument, void (*resolve)(void* const (&arguments)[128])) {
    const size_t warpgroup = cta.running / 128;
    if (warpgroup >= cta.warpgroup_meetings.size()) fail("a warpgroup of fewer than four warps");
    meet<128>(State::kAtWarpgroup, cta.warpgroup_meetings[warpgroup], where, argument, resolve);
}

bool meet_cta(bool predicate) {
    cta.predicate |= predicate;
    running().state = State::kAtCta;
    yield_to_scheduler();
    return cta.barrier_result;
}

namespace {

Mbarrier& mbarrier_at(uint32_t address) {
    if (address % 8 != 0 || address + 8 > static_cast<uint32_t>(shared_memory_bytes()))
        fail("an mbarrier misaligned or out of bounds");
    return *reinterpret_cast<Mbarrier*>(shared_memory() + address);
}

}  // namespace

void mbarrier_init(uint32_t address, int arrivals) {
    mbarrier_at(address) = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0, 0};
}

void mbarrier_arrive(uint32_t address, int bytes) {
    running().proxy_fences_at_barrier = running().proxy_fences;
    Mbarrier& barrier = mbarrier_at(address);
    if (barrier.missing == 0) fail("an arrival at an mbarrier at whose phase all have arrived");
    barrier.missing_bytes = static_cast<int16_t>(barrier.missing_bytes + bytes / 16);
    --barrier.missing;
    barrier.end_phase_if_complete();
}

void mbarrier_complete(uint32_t address, int bytes) {
    Mbarrier& barrier = mbarrier_at(address);
    if (bytes % 16 != 0) fail("bytes at an mbarrier that are no multiple of 16");
    barrier.missing_bytes = static_cast<int16_t>(barrier.missing_bytes - bytes / 16);
    barrier.end_phase_if_complete();
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
    const Mbarrier& barrier = mbarrier_at(address);
    while (barrier.phase % 2 == parity) {
        running().awaited = &barrier;
        running().awaited_parity = parity;
        running().state = State::kAtMbarrier;
        yield_to_scheduler();
    }
}

void defer_bulk_copy(std::function<void()> copy) {
    cta.bulk_copies.push_back(std::move(copy));
}

void defer_copy(unsigned char* to, const void* from, int bytes) {
    running().copies.push_back({to, from, bytes, running().group});
}

void commit_copies() {
    ++running().group;
}

void wait_copies(int pending_groups) {
    Fiber& own = running();
    while (!own.copies.empty() && own.copies.front().group < own.group - pending_groups) {
        const Copy& copy = own.copies.front();
        if (copy.from != nullptr) {
            std::memcpy(copy.to, copy.from, copy.bytes);
        } else {
            std::memset(copy.to, 0, copy.bytes);
        }
        note_shared_write(static_cast<uint32_t>(copy.to - shared_memory()));
        own.copies.pop_front();
    }
}

void note_shared_write(uint32_t address) {
    cta.writes[address / 16] = {cta.running, running().proxy_fences};
}

void fence_async_proxy() {
    ++running().proxy_fences;
}

bool visible_to_async_proxy(uint32_t address) {
    const SharedWrite& write = cta.writes[address / 16];
    return write.thread < 0 || cta.fibers[write.thread]->proxy_fences_at_barrier > write.proxy_fences;
}

}  // namespace emulator
