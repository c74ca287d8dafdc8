// Tests only. Runs the project's CUDA C kernels on the CPU: one block after the other, one fiber per thread, in any
// order of the threads, with poisoned shared memory and checked barriers and warp collectives.
//
// What it cannot show: races between blocks, partial warp masks (refused), contraction to FMA, the last bit of device
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
#include <type_traits>
#include <utility>
#include <vector>

#define HOST_BUILD
#define __global__
#define __device__
#define __launch_bounds__(...)
// An own section, so that all shared variables can be poisoned before each block.
#define __shared__ static __attribute__((section("cuda_shared")))
#define UNROLL
#define UNROLL4
extern "C" char __start_cuda_shared[] __attribute__((weak)), __stop_cuda_shared[] __attribute__((weak));

struct uint3 { unsigned x, y, z; };

namespace host {

struct Fiber { ucontext_t context; uint3 thread; unsigned linear, collectives; bool done; std::vector<char> stack; };
struct Warp { uint64_t slot[2][32]; unsigned arrived, complete; };

static uint3 block_index, block_dim, grid_dim;
static Fiber *current;
static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static unsigned alive, waiting, generation;  // of __syncthreads
static bool progress;
static char failure[256];
static void (*body)(void *);
static void *arguments;

static void yield() { swapcontext(&current->context, &scheduler); }

static void fail(const char *what)
{
    snprintf(failure, sizeof failure, "%s (block %u,%u,%u thread %u,%u,%u)", what, block_index.x, block_index.y,
             block_index.z, current->thread.x, current->thread.y, current->thread.z);
    for (;;) yield();
}

static void barrier()
{
    const unsigned mine = generation;
    ++waiting;
    progress = true;
    while (generation == mine) {
        if (waiting == alive) {
            if (alive != fibers.size()) fail("__syncthreads after some threads of the block returned");
            waiting = 0;
            ++generation;
            break;
        }
        yield();
    }
    progress = true;
}

// A lane hands in its value and waits for the other 31. Two sets of slots: a fast lane may be one collective ahead.
static Warp &collective(unsigned mask, uint64_t value, unsigned &parity)
{
    const unsigned w = current->linear / 32, lane = current->linear % 32;
    if (mask != 0xffffffffu) fail("a warp collective with a partial mask");
    if (fibers.size() - w * 32 < 32) fail("a warp collective in an incomplete warp");
    for (unsigned l = 0; l < 32; ++l)
        if (fibers[w * 32 + l].done) fail("a warp collective names a lane that returned");
    Warp &warp = warps[w];
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
    current->done = true;
    --alive;
    progress = true;
    for (;;) yield();
}

static void run_block(unsigned &seed, std::vector<unsigned> &order)
{
    if (__start_cuda_shared) memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
    const unsigned n = fibers.size();
    warps.assign((n + 31) / 32, Warp{});
    alive = n;
    waiting = generation = 0;
    for (unsigned t = 0; t < n; ++t) {
        Fiber &f = fibers[t];
        f.linear = t;
        f.collectives = 0;
        f.done = false;
        f.thread = {t % block_dim.x, t / block_dim.x % block_dim.y, t / block_dim.x / block_dim.y};
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = &scheduler;
        makecontext(&f.context, entry, 0);
        order[t] = seed == 1 ? n - 1 - t : t;
    }
    while (alive && !failure[0]) {
        if (seed > 1)
            for (unsigned t = n - 1; t > 0; --t) {
                seed = seed * 1664525u + 1013904223u;
                std::swap(order[t], order[(seed >> 8) % (t + 1)]);
                if (seed < 2) seed = 2;
            }
        progress = false;
        for (unsigned k = 0; k < n && !failure[0]; ++k)
            if (!fibers[order[k]].done) { current = &fibers[order[k]]; swapcontext(&scheduler, &current->context); }
        if (!progress && alive && !failure[0])
            snprintf(failure, sizeof failure, "deadlock: the threads of block %u,%u,%u wait at different barriers",
                     block_index.x, block_index.y, block_index.z);
    }
}

// What one launch is given beside the kernel's arguments; the loader mirrors it.
struct Launch {
    unsigned grid[3], block[3];
    uint64_t first, count;  // window of blocks to run: all of them, or a few of a very large grid
    unsigned schedule;      // 0: threads ascending, 1: descending, more: shuffled by that seed
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
    fibers.resize(n);
    for (Fiber &f : fibers) f.stack.resize(64 * 1024);
    std::vector<unsigned> order(n);
    unsigned seed = launch.schedule;
    const unsigned csr = _mm_getcsr();
    if (launch.flush) _mm_setcsr(csr | 0x8040);  // flush to zero, denormals are zero
    const uint64_t all = (uint64_t)g[0] * g[1] * g[2], end = launch.first + launch.count < all ? launch.first + launch.count : all;
    for (uint64_t i = launch.first; i < end && !failure[0]; ++i) {
        const uint64_t k = launch.schedule == 1 ? end - 1 - (i - launch.first) : i;
        block_index = {(unsigned)(k % g[0]), (unsigned)(k / g[0] % g[1]), (unsigned)(k / g[0] / g[1])};
        run_block(seed, order);
    }
    _mm_setcsr(csr);
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
#define blockIdx host::block_index
#define blockDim host::block_dim
#define gridDim host::grid_dim

static inline void __syncthreads() { host::barrier(); }
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
static inline long long __double_as_longlong(double x) { return reinterpret<long long>(x); }
#define HALF_TO_FLOAT(f, bits) f = (float)reinterpret<_Float16>(bits)
#define FLOAT_TO_HALF(bits, f) bits = reinterpret<unsigned short>((_Float16)(f))

#define EXPORT(name)                                                                                                    \
    extern "C" const char *host_##name(const host::Launch *launch, void **args) { return host::call(name, *launch, args); } \
    extern "C" const char *signature_##name() { return host::signature(name); }
