// Tests only. Runs the project's CUDA C kernels on the CPU: one fiber per thread, in any order of the threads, one block after
// the other or some in turns, with poisoned shared memory and checked barriers and warp collectives.
//
// Between blocks memory is as weak as a GPU's may be. What __stcg stores waits with its thread until that passes a
// __threadfence, and lies in "L2" from then on, where only __ldcg looks: a plain load finds what was there before the launch.
//
// What it cannot show: other races between blocks, partial warp masks (refused), contraction to FMA, the last bit of device
// math functions, speed.
#pragma once
#include <pmmintrin.h>
#include <ucontext.h>
#include <xmmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <tuple>
#include <unordered_map>
#include <type_traits>
#include <utility>
#include <vector>

#define HOST_BUILD
#define __global__
#define __device__
#define __launch_bounds__(...)
// An own section, so that all shared variables can be poisoned before each block.
#define __shared__ static __attribute__((section("cuda_shared")))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define UNROLL
#define UNROLL1
extern "C" char __start_cuda_shared[] __attribute__((weak)), __stop_cuda_shared[] __attribute__((weak));

struct uint3 { unsigned x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };

namespace host {

using Stores = std::vector<std::pair<uintptr_t, uint32_t>>;  // words and where they go
struct Fiber { ucontext_t context; uint3 thread; unsigned linear, collectives; bool done; Stores waiting; std::vector<char> stack; };
struct Warp { uint64_t slot[2][32]; unsigned arrived, complete; };
struct Block {
    uint3 index;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned> order;
    std::vector<char> shared;  // its shared variables while another block has the section
    unsigned alive, waiting, generation;  // of __syncthreads
    unsigned slow, rest;                  // a thread (if any) that runs when no other can, and for how many turns the block sleeps first
};

static uint3 block_dim, grid_dim;
static Block *block;  // the one that runs
static Fiber *current;
static ucontext_t scheduler;
static bool progress, turns;
static char failure[256];
static void (*body)(void *);
static void *arguments;
static std::unordered_map<uintptr_t, uint32_t> level2;
static Stores late;  // stores that no fence followed

static void yield() { swapcontext(&current->context, &scheduler); }

static void fail(const char *what)
{
    snprintf(failure, sizeof failure, "%s (block %u,%u,%u thread %u,%u,%u)", what, block->index.x, block->index.y,
             block->index.z, current->thread.x, current->thread.y, current->thread.z);
    for (;;) yield();
}

static void barrier()
{
    const unsigned mine = block->generation;
    ++block->waiting;
    progress = true;
    while (block->generation == mine) {
        if (block->waiting == block->alive) {
            if (block->alive != block->fibers.size()) fail("__syncthreads after some threads of the block returned");
            block->waiting = 0;
            ++block->generation;
            break;
        }
        yield();
    }
    progress = true;
}

// Lets other threads and blocks come between, where blocks take turns.
static void pause()
{
    progress = true;
    if (turns) yield();
    progress = true;
}

static void store(uintptr_t at, const void *value, size_t size)
{
    for (size_t i = 0; i < size; i += 4) {
        uint32_t word;
        memcpy(&word, (const char *)value + i, 4);
        current->waiting.emplace_back(at + i, word);
    }
}
static void load(uintptr_t at, void *value, size_t size)
{
    for (size_t i = 0; i < size; i += 4) {
        const auto found = level2.find(at + i);
        memcpy((char *)value + i, found == level2.end() ? (const void *)(at + i) : &found->second, 4);
    }
}
static void fence()
{
    pause();
    for (const auto &[at, word] : current->waiting) level2[at] = word;
    current->waiting.clear();
}

// A lane hands in its value and waits for the other 31. Two sets of slots: a fast lane may be one collective ahead.
static Warp &collective(unsigned mask, uint64_t value, unsigned &parity)
{
    const unsigned w = current->linear / 32, lane = current->linear % 32;
    if (mask != 0xffffffffu) fail("a warp collective with a partial mask");
    if (block->fibers.size() - w * 32 < 32) fail("a warp collective in an incomplete warp");
    for (unsigned l = 0; l < 32; ++l)
        if (block->fibers[w * 32 + l].done) fail("a warp collective names a lane that returned");
    Warp &warp = block->warps[w];
    const unsigned mine = current->collectives++;
    parity = mine & 1;
    warp.slot[parity][lane] = value;
    warp.arrived |= 1u << lane;
    progress = true;
    if (warp.arrived == mask) { warp.arrived = 0; ++warp.complete; }
    while (warp.complete == mine) yield();
    progress = true;
    return warp;
}

template <class V> V shuffle(V value, unsigned mask, int source)
{
    static_assert(sizeof(V) <= 8);
    uint64_t bits = 0;
    unsigned parity;
    memcpy(&bits, &value, sizeof value);
    Warp &warp = collective(mask, bits, parity);
    memcpy(&value, &warp.slot[parity][source], sizeof value);
    return value;
}

static void entry()
{
    body(arguments);
    late.insert(late.end(), current->waiting.begin(), current->waiting.end());
    current->waiting.clear();
    current->done = true;
    --block->alive;
    progress = true;
    for (;;) yield();
}

static size_t shared_size() { return __start_cuda_shared ? __stop_cuda_shared - __start_cuda_shared : 0; }

static void start(Block &b, uint64_t k, unsigned schedule)
{
    const unsigned n = block_dim.x * block_dim.y * block_dim.z;
    b.index = {(unsigned)(k % grid_dim.x), (unsigned)(k / grid_dim.x % grid_dim.y), (unsigned)(k / grid_dim.x / grid_dim.y)};
    b.fibers.resize(n);
    b.order.resize(n);
    b.warps.assign((n + 31) / 32, Warp{});
    b.shared.assign(shared_size(), (char)0xff);
    b.alive = n;
    b.waiting = b.generation = b.rest = 0;
    for (unsigned t = 0; t < n; ++t) {
        Fiber &f = b.fibers[t];
        f.linear = t;
        f.collectives = 0;
        f.done = false;
        f.waiting.clear();
        f.thread = {t % block_dim.x, t / block_dim.x % block_dim.y, t / block_dim.x / block_dim.y};
        f.stack.resize(64 * 1024);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = &scheduler;
        makecontext(&f.context, entry, 0);
        b.order[t] = schedule == 1 ? n - 1 - t : t;
    }
}

static unsigned random(unsigned &seed, unsigned below)
{
    seed = seed * 1664525u + 1013904223u;
    const unsigned found = (seed >> 8) % below;
    if (seed < 2) seed = 2;
    return found;
}

// Lets each thread of a block run to where it waits, once. Where blocks take turns, all but the slow one; if all wait for that, the
// block goes to sleep, so that others run far ahead of the slow thread, and has it run when it wakes.
static void sweep(Block &b, unsigned &seed, bool alone)
{
    block = &b;
    if (shared_size()) memcpy(__start_cuda_shared, b.shared.data(), b.shared.size());
    if (seed > 1)
        for (unsigned t = b.order.size() - 1; t > 0; --t) std::swap(b.order[t], b.order[random(seed, t + 1)]);
    progress = false;
    const bool woken = b.rest == 1;
    b.rest = 0;
    const auto step = [](Fiber &f) { if (!f.done) { current = &f; swapcontext(&scheduler, &current->context); } };
    for (size_t k = 0; k < b.order.size() && !failure[0]; ++k)
        if (!turns || b.order[k] != b.slow || woken) step(b.fibers[b.order[k]]);
    if (turns && b.slow < b.order.size() && !progress && !woken && !failure[0]) {
        if (alone) step(b.fibers[b.slow]);
        else { b.rest = 16; progress = true; }
    }
    if (!progress && b.alive && !failure[0])
        snprintf(failure, sizeof failure, "deadlock: the threads of block %u,%u,%u wait at different barriers", b.index.x,
                 b.index.y, b.index.z);
    if (shared_size()) memcpy(b.shared.data(), __start_cuda_shared, b.shared.size());
}

// What one launch is given beside the kernel's arguments; the loader mirrors it.
struct Launch {
    unsigned grid[3], block[3];
    uint64_t first, count;  // window of blocks to run: all of them, or a few of a very large grid
    unsigned schedule;      // 0: threads and blocks ascending, 1: descending, more: both shuffled by that seed, four blocks in turns
    int flush;              // flush subnormals to zero, as CuPy's -ftz=true does
};

static const char *run(const Launch &launch, void (*kernel)(void *), void *args)
{
    const unsigned *g = launch.grid, *b = launch.block, n = b[0] * b[1] * b[2];
    if (!n || n > 1024 || b[2] > 64 || !g[0] || !g[1] || !g[2] || g[0] > 0x7fffffffu || g[1] > 65535 || g[2] > 65535)
        return "invalid launch configuration";
    grid_dim = {g[0], g[1], g[2]};
    block_dim = {b[0], b[1], b[2]};
    body = kernel;
    arguments = args;
    failure[0] = 0;
    level2.clear();
    late.clear();
    unsigned seed = launch.schedule;
    turns = seed > 1;
    const unsigned csr = _mm_getcsr();
    if (launch.flush) _mm_setcsr(csr | 0x8040);  // flush to zero, denormals are zero
    const uint64_t all = (uint64_t)g[0] * g[1] * g[2], end = launch.first + launch.count < all ? launch.first + launch.count : all;
    static std::vector<Block> blocks(4);
    std::vector<Block *> idle, running;
    for (size_t i = 0; i < (turns ? blocks.size() : 1); ++i) idle.push_back(&blocks[i]);
    // A GPU starts blocks in about their order, and ends them in any: whoever counts them must not count on neighbours.
    std::vector<uint64_t> shuffled;
    if (turns && end - launch.first <= 65536) {
        for (uint64_t i = launch.first; i < end; ++i) shuffled.push_back(i);
        for (size_t i = shuffled.size(); i > 1; --i) std::swap(shuffled[i - 1], shuffled[random(seed, (unsigned)i)]);
    }
    for (uint64_t i = launch.first; (i < end || !running.empty()) && !failure[0];) {
        while (i < end && !idle.empty()) {
            start(*idle.back(), seed == 1 ? end - 1 - (i - launch.first) : shuffled.empty() ? i : shuffled[i - launch.first], seed);
            // One block in four has a slow thread, often of the first warp, which does what one thread does for all.
            if (turns) idle.back()->slow = random(seed, 4) ? n : random(seed, random(seed, 2) || n < 32 ? n : 32);
            ++i;
            running.push_back(idle.back());
            idle.pop_back();
        }
        const unsigned chosen = turns ? random(seed, running.size()) : 0;
        if (running[chosen]->rest > 1 && running.size() > 1) {
            --running[chosen]->rest;
            continue;
        }
        if (running[chosen]->rest) running[chosen]->rest = 1;
        sweep(*running[chosen], seed, running.size() == 1);
        if (!running[chosen]->alive) {
            idle.push_back(running[chosen]);
            running.erase(running.begin() + chosen);
        }
    }
    _mm_setcsr(csr);
    for (const auto &[at, word] : level2) memcpy((void *)at, &word, 4);  // the launch has ended: everything arrives
    for (const auto &[at, word] : late) memcpy((void *)at, &word, 4);
    return failure[0] ? failure : nullptr;
}

// A letter and a size for each parameter, so that the loader can check what CuPy never checks.
template <class P> std::string code()
{
    if constexpr (std::is_pointer_v<P>) return "*" + code<std::remove_cv_t<std::remove_pointer_t<P>>>();
    else if constexpr (std::is_floating_point_v<P>) return "f" + std::to_string(sizeof(P));
    else if constexpr (std::is_integral_v<P>) return (std::is_signed_v<P> ? "i" : "u") + std::to_string(sizeof(P));
    else return "V" + std::to_string(sizeof(P));
}
template <class... P> const char *signature(void (*)(P...))
{
    static const std::string s = ((code<P>() + ",") + ...);
    return s.c_str();
}

template <class... P, size_t... I>
const char *call(void (*kernel)(P...), const Launch &launch, void **args, std::index_sequence<I...>)
{
    std::tuple<P...> values(*(P *)args[I]...);
    struct Bound { void (*kernel)(P...); std::tuple<P...> *values; } bound{kernel, &values};
    return run(launch, [](void *p) { std::apply(((Bound *)p)->kernel, *((Bound *)p)->values); }, &bound);
}
template <class... P> const char *call(void (*kernel)(P...), const Launch &launch, void **args)
{
    return call(kernel, launch, args, std::index_sequence_for<P...>{});
}

}  // namespace host

#define threadIdx (host::current->thread)
#define blockIdx host::block->index
#define blockDim host::block_dim
#define gridDim host::grid_dim

static inline void __syncthreads() { host::barrier(); }
static inline void __threadfence() { host::fence(); }
static inline unsigned atomicAdd(unsigned *p, unsigned value)
{
    host::pause();
    const unsigned before = *p;
    *p += value;
    host::pause();
    return before;
}
template <class V> static inline void __stcg(V *p, V value) { host::store((uintptr_t)p, &value, sizeof value); }
template <class V> static inline V __ldcg(const V *p)
{
    V value;
    host::load((uintptr_t)p, &value, sizeof value);
    return value;
}
static inline unsigned __ballot_sync(unsigned mask, int predicate)
{
    unsigned parity, bits = 0;
    const host::Warp &warp = host::collective(mask, predicate != 0, parity);
    for (int lane = 0; lane < 32; ++lane) bits |= (unsigned)warp.slot[parity][lane] << lane;
    return bits;
}
template <class V> static inline V __shfl_xor_sync(unsigned mask, V value, int lanes)
{
    return host::shuffle(value, mask, (host::current->linear % 32) ^ lanes);
}
template <class To, class From> static inline To reinterpret(From value)
{
    To result;
    static_assert(sizeof result == sizeof value);
    memcpy(&result, &value, sizeof result);
    return result;
}
static inline unsigned __float_as_uint(float x) { return reinterpret<unsigned>(x); }
static inline float __uint_as_float(unsigned x) { return reinterpret<float>(x); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline long long __double_as_longlong(double x) { return reinterpret<long long>(x); }
#define HALF_TO_FLOAT(f, bits) f = (float)reinterpret<_Float16>(bits)
#define FLOAT_TO_HALF(bits, f) bits = reinterpret<unsigned short>((_Float16)(f))

#define EXPORT(name)                                                                                                    \
    extern "C" const char *host_##name(const host::Launch *launch, void **args) { return host::call(name, *launch, args); } \
    extern "C" const char *signature_##name() { return host::signature(name); }
