// What lies around the cuBLAS products on a GPU: bias, ReLU and keep-mask after the forward product; the gradient of the
// ReLU and the bias reduction before the backward products; ReLU alone; softmax loss; a step of SGD; and small layers whole. Other
// products are cuBLAS's, launch geometry and buffers are backends/cupy_backend.py's.
//
// Compiled once per element type T, chosen by -DDTYPE_float32, _float64, _float16 or _bfloat16. Sums, biases and
// exponentials are computed in A, which is T or, for the 16-bit types, float. Products of 16-bit types arrive in A, to be
// rounded once with the bias, or in T, with the bias and rounded. The file includes nothing, so that NVRTC needs no header,
// and the same text is compiled by a C++ compiler and run on the CPU by the tests.
//
// Rules kept by every kernel:
// - Arrays are C-contiguous. A `_wide` kernel moves 16 bytes at a time: its pointers are 16-byte aligned and its rows hold
//   a multiple of WIDE elements; its twin without the suffix takes anything.
// - Offsets are 64 bits wide. Every sum has one order, given by the shape alone: atomics count blocks, they add nothing.
// - No `__restrict__`: y may be z, dx may be dout. So a load written behind a store stays behind it, and what is to be
//   under way together is loaded together, into an array of registers, before the first of it is used.
// - Bytes under way: a memory that gives 2.9e12 bytes/s (a device copy on an H100) after 700 ns (about 600 to 800 ns under
//   load, by published microbenchmarks; not measured here) has 2 MB under way (Little's law), 15 KB for each of 132
//   multiprocessors. The wide kernels ask for 16 bytes, 256 threads, rows loaded together and blocks that fit: 32 KB or more.
// - At least two blocks fit on a multiprocessor (the 2, 3 or 4 in the launch bounds): without a number ptxas aims at more and spills.
// - Blocks have 256 threads, warps take part in shuffles as a whole. Groups of the stacked form lie along grid y and z.

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#ifndef HOST_BUILD
#define HALF_TO_FLOAT(f, bits) asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits))
#define FLOAT_TO_HALF(bits, f) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f))
#define UNROLL _Pragma("unroll")
#define UNROLL1 _Pragma("unroll 1")
#endif

// ---- element types ------------------------------------------------------------------------------------------------

struct float16 { u16 bits; };
struct bfloat16 { u16 bits; };

#if defined(DTYPE_float32)
typedef float T;
typedef float A;
#elif defined(DTYPE_float64)
typedef double T;
typedef double A;
#elif defined(DTYPE_float16)
typedef float16 T;
typedef float A;
#elif defined(DTYPE_bfloat16)
typedef bfloat16 T;
typedef float A;
#else
#error "define DTYPE_float32, DTYPE_float64, DTYPE_float16 or DTYPE_bfloat16"
#endif

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float16 x) { float f; HALF_TO_FLOAT(f, x.bits); return f; }
__device__ inline float widen(bfloat16 x) { return __uint_as_float((u32)x.bits << 16); }

template <class To> struct Round;
template <> struct Round<float> { static __device__ inline float of(float x) { return x; } };
template <> struct Round<double> { static __device__ inline double of(double x) { return x; } };
template <> struct Round<float16> {
    static __device__ inline float16 of(float x) { float16 h; FLOAT_TO_HALF(h.bits, x); return h; }
};
template <> struct Round<bfloat16> {
    // To nearest, ties to even, in integers: cvt.rn.bf16.f32 needs sm_80 and gives the same bits. NaN stays NaN.
    static __device__ inline bfloat16 of(float x)
    {
        u32 u = __float_as_uint(x);
        bfloat16 h;
        h.bits = (u & 0x7fffffffu) > 0x7f800000u ? (u16)(u >> 16 | 0x40u) : (u16)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
        return h;
    }
};

// z as it is where it is a T already: a NaN keeps its bits, and nothing is flushed.
__device__ inline T same_or_rounded(T z) { return z; }
#if defined(DTYPE_float16) || defined(DTYPE_bfloat16)
__device__ inline T same_or_rounded(A z) { return Round<T>::of(z); }
#endif

// keep = not (z < 0), read from the bits. CuPy compiles with -ftz=true, under which `z < 0` is false for a negative
// subnormal; the integers see it. NaN of either sign and -0.0 are kept.
__device__ inline bool keeps(float z) { u32 u = __float_as_uint(z); return u <= 0x80000000u || u > 0xff800000u; }
__device__ inline bool keeps(double z)
{
    u64 u = (u64)__double_as_longlong(z);
    return u <= 0x8000000000000000ull || u > 0xfff0000000000000ull;
}
__device__ inline bool keeps(float16 z) { return z.bits <= 0x8000u || z.bits > 0xfc00u; }
__device__ inline bool keeps(bfloat16 z) { return z.bits <= 0x8000u || z.bits > 0xff80u; }

// ---- 16-byte access -----------------------------------------------------------------------------------------------

enum { WIDE = 16 / sizeof(T), BLOCK = 256, WARP = 32 };

template <class E, int V> struct alignas(V * sizeof(E) < 16 ? V * sizeof(E) : 16) Pack {
    E v[V];
    __device__ inline E get(int k) const { return v[k]; }
    __device__ inline void set(int k, E x) { v[k] = x; }
    __device__ inline void drop(int k) { v[k] = E(); }
};
// Eight 16-bit elements stay two to a register until they are used: apart they take twice the registers, and spill.
template <class E> struct alignas(16) Halves {
    u32 w[4];
    __device__ inline E get(int k) const { E x; x.bits = (u16)(w[k / 2] >> 16 * (k & 1)); return x; }
    __device__ inline void set(int k, E x) { drop(k); w[k / 2] |= (u32)x.bits << 16 * (k & 1); }
    __device__ inline void drop(int k) { w[k / 2] &= k & 1 ? 0xffffu : 0xffff0000u; }
};
template <> struct Pack<float16, 8> : Halves<float16> {};
template <> struct Pack<bfloat16, 8> : Halves<bfloat16> {};

template <int V, class E> __device__ inline Pack<E, V> load(const E* p) { return *(const Pack<E, V>*)p; }
template <int V, class E> __device__ inline void store(E* p, const Pack<E, V>& x) { *(Pack<E, V>*)p = x; }

__device__ inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// ---- forward: y = z + b, or relu(z + b) with the keep-mask --------------------------------------------------------

// The V low bits of each lane become bytes of the mask: the byte of eight neighbouring elements, on every lane that
// holds some of them.
template <int V> __device__ inline u32 mask_byte(u32 bits, u32 lane)
{
    if (V == 1) return __ballot_sync(0xffffffffu, bits) >> (lane & 24u) & 0xffu;
    const u32 lanes = 8 / V;
    bits <<= V * (lane & (lanes - 1));
    for (u32 o = 1; o < lanes; o <<= 1) bits |= __shfl_xor_sync(0xffffffffu, bits, o);
    return bits;
}

// z (groups, rows, cols) in Z, which is A, or T where z is rounded already; b (groups, cols) or null, y like z in T, mask
// (groups, rows, mask_row) bytes.
// A tile is blockDim.x * V columns by blockDim.y * TILE_ROWS rows: the two 64-bit divisions that find it are paid once,
// the bias is loaded once, and a thread loads 64 bytes of its rows together. blockDim.x * V is a multiple of 8.
enum { TILE_ROWS = 4 };

template <int V, bool RELU, class Z>
__device__ void bias_act(const Z* z, const T* b, T* y, u8* mask, i64 groups, i64 rows, i64 cols, i64 mask_row)
{
    enum { TOGETHER = V * sizeof(Z) > 16 ? TILE_ROWS / 2 : TILE_ROWS };
    const i64 col_tiles = ceil_div(cols, (i64)blockDim.x * V);
    const i64 tiles = col_tiles * ceil_div(rows, (i64)blockDim.y * TILE_ROWS);
    const u32 lane = (threadIdx.y * blockDim.x + threadIdx.x) & (WARP - 1);
    const i64 group = (i64)blockIdx.z * gridDim.y + blockIdx.y;
    if (group >= groups) return;
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const i64 col = (tile % col_tiles * blockDim.x + threadIdx.x) * V;
        const i64 first = tile / col_tiles * blockDim.y * TILE_ROWS + threadIdx.y;
        const i64 at = (group * rows + first) * cols + col, stride = blockDim.y * cols;
        A bias[V];
        UNROLL for (int k = 0; k < V; ++k) bias[k] = 0;
        if (b && col < cols) {
            const Pack<T, V> p = load<V>(b + group * cols + col);
            UNROLL for (int k = 0; k < V; ++k) bias[k] = widen(p.get(k));
        }
        UNROLL for (int half = 0; half < TILE_ROWS; half += TOGETHER) {
            Pack<Z, V> s[TOGETHER];
            UNROLL for (int r = 0; r < TOGETHER; ++r)
                if (col < cols && first + (half + r) * (i64)blockDim.y < rows) s[r] = load<V>(z + at + (half + r) * stride);
            UNROLL for (int r = 0; r < TOGETHER; ++r) {
                const i64 row = first + (half + r) * (i64)blockDim.y;
                const bool inside = row < rows && col < cols;
                u32 bits = 0;
                if (inside) {
                    Pack<T, V> t = Pack<T, V>();
                    UNROLL for (int k = 0; k < V; ++k) {
                        // Without b -0.0 stays.
                        const T v = b ? Round<T>::of(widen(s[r].get(k)) + bias[k]) : same_or_rounded(s[r].get(k));
                        const bool keep = !RELU || keeps(v);  // of the rounded z: what rounds to -0.0 is kept
                        bits |= (u32)keep << k;
                        t.set(k, keep ? v : T());
                    }
                    store<V>(y + at + (half + r) * stride, t);
                }
                if (RELU) {
                    const u32 byte = mask_byte<V>(bits, lane);
                    if (inside && (col & 7) == 0) mask[(group * rows + row) * mask_row + (col >> 3)] = (u8)byte;
                }
            }
        }
    }
}

#define BIAS_ADD(name, V)                                                                                               \
    extern "C" __global__ void __launch_bounds__(BLOCK, 4)                                                              \
    name(const A* z, const T* b, T* y, i64 groups, i64 rows, i64 cols)                                                  \
    { bias_act<V, false>(z, b, y, nullptr, groups, rows, cols, 0); }

BIAS_ADD(bias_add, 1)
BIAS_ADD(bias_add_wide, WIDE)

#define BIAS_RELU_MASK(name, V, Z)                                                                                      \
    extern "C" __global__ void __launch_bounds__(BLOCK, 4)                                                              \
    name(const Z* z, const T* b, T* y, u8* mask, i64 groups, i64 rows, i64 cols, i64 mask_row)                          \
    { bias_act<V, true>(z, b, y, mask, groups, rows, cols, mask_row); }

BIAS_RELU_MASK(bias_relu_mask, 1, A)
BIAS_RELU_MASK(bias_relu_mask_wide, WIDE, A)
// z in the result's dtype, as a product gives it that has added the bias and rounded: y may be z.
BIAS_RELU_MASK(relu_mask, 1, T)
BIAS_RELU_MASK(relu_mask_wide, WIDE, T)

// ---- what blocks leave to the last of them ----------------------------------------------------------------------------

// Not in the template itself: one for all V, and where g++ makes a section of it.
__device__ inline A* sum_memory() { __shared__ A memory[BLOCK * WIDE]; return memory; }

// Adds up acc over the `lines` threads of a column, a power of 2, in a fixed tree: the thread at (x, line) of BLOCK = width * lines
// threads has V columns. The sums end in the threads of line 0.
template <int V> __device__ inline void sum_lines(A (&acc)[V], u32 x, u32 line, u32 width, u32 lines)
{
    // [line][k][x]: neighbouring threads in neighbouring banks.
    A* const mine = sum_memory() + line * width * V + x;
    UNROLL for (int k = 0; k < V; ++k) mine[k * width] = acc[k];
    for (u32 half = lines / 2; half > 0; half /= 2) {
        __syncthreads();
        if (line < half)
            UNROLL for (int k = 0; k < V; ++k) mine[k * width] += mine[half * width * V + k * width];
    }
    UNROLL for (int k = 0; k < V; ++k) acc[k] = mine[k * width];
}

// True in every thread of the last of `blocks` blocks to come here; the counter is 0 before and after.
// What the blocks leave to the last one they store by __stcg and it loads by __ldcg: in L2, which all multiprocessors share,
// since a line of its own L1 may be older. The fence before the count puts a thread's stores ahead of it, and the barrier
// lets thread 0 count only when every thread of the block has come through its fence. The fence after the count keeps the
// loads of the last block behind it (release and acquire of the PTX memory model, by fence, relaxed atomic, fence).
__device__ inline bool last_block(u32* counter, i64 blocks)
{
    __shared__ u32 last;
    const u32 thread = threadIdx.y * blockDim.x + threadIdx.x;
    __threadfence();
    __syncthreads();
    if (thread == 0) {
        last = atomicAdd(counter, 1u) == (u32)(blocks - 1);
        if (last) *counter = 0;  // for the next launch
    }
    __syncthreads();
    __threadfence();
    return last != 0;
}

#ifdef DTYPE_float64
typedef double2 A16;
#else
typedef float4 A16;
#endif
template <int P> struct Left;  // partial sums that another block left, P at a time
template <> struct Left<1> {
    static __device__ inline Pack<A, 1> load(const A* p) { Pack<A, 1> x; x.v[0] = __ldcg(p); return x; }
};
template <> struct Left<16 / sizeof(A)> {
    typedef Pack<A, 16 / sizeof(A)> P16;
    static __device__ inline P16 load(const A* p) { const A16 x = __ldcg((const A16*)p); return *(const P16*)&x; }
};

enum { FINAL_BATCH = 8 };  // lines of partial sums that a thread loads together

// parts (blocks, cols): columns first .. first + P * width, rounded, to sums (cols,). By all BLOCK threads; width, a power of 2,
// is how many of them share a line.
template <int P> __device__ void final_sum(const A* parts, T* sums, i64 first, u32 width, i64 blocks, i64 cols)
{
    const u32 thread = threadIdx.y * blockDim.x + threadIdx.x, x = thread % width, line = thread / width, lines = BLOCK / width;
    const i64 col = first + (i64)x * P;
    A total[P];
    UNROLL for (int k = 0; k < P; ++k) total[k] = 0;
    if (col < cols)
        for (i64 block = line; block < blocks; block += lines * FINAL_BATCH) {
            Pack<A, P> part[FINAL_BATCH];
            UNROLL for (int r = 0; r < FINAL_BATCH; ++r) {
                part[r] = Pack<A, P>();
                if (block + r * lines < blocks) part[r] = Left<P>::load(parts + (block + r * lines) * cols + col);
            }
            UNROLL for (int r = 0; r < FINAL_BATCH; ++r)
                UNROLL for (int k = 0; k < P; ++k) total[k] += part[r].v[k];
        }
    sum_lines<P>(total, x, line, width, lines);
    if (line == 0 && col < cols)
        UNROLL for (int k = 0; k < P; ++k) sums[col + k] = Round<T>::of(total[k]);
}

// ---- backward: dz = keep ? dout : 0, db = sum of dz over rows ------------------------------------------------------

enum Keep { ALL, MASK, PREACT };  // what `keep` points to: nothing, mask bytes, z

// What says which of V elements are kept: mask bits, or pre-activations; loaded early, looked at later.
template <int V, Keep KEEP> struct Kept;
template <int V> struct Kept<V, ALL> {
    __device__ inline void load(const u8*, i64) {}
    __device__ inline bool operator[](int) const { return true; }
};
template <int V> struct Kept<V, MASK> {
    u32 byte, shift;
    __device__ inline void load(const u8* line, i64 col) { byte = line[col >> 3]; shift = V == 8 ? 0 : col & 7; }
    __device__ inline bool operator[](int k) const { return byte >> (shift + k) & 1u; }
};
template <int V> struct Kept<V, PREACT> {
    Pack<T, V> z;
    __device__ inline void load(const u8* line, i64 col) { z = ::load<V>((const T*)line + col); }
    __device__ inline bool operator[](int k) const { return keeps(z.get(k)); }
};

// A thread adds CHUNK rows into one sum and those sums into another, so that 10**6 rows of one sign keep five digits in
// float32: a single running sum of that length would not. It takes TURN rows at a time, ROWS of which it loads together: how many
// says nothing about the order.
enum { CHUNK = 32, TURN = 8 };

// Of ROWS rows from `at` on, `stride` elements apart, the first `count`: what is kept to dz, where wanted, and on top of chunk.
template <int V, Keep KEEP, int ROWS>
__device__ inline void select_rows(const T* dout, T* dz, i64 at, const u8* keep, i64 col, i64 stride, i64 keep_stride, int count, A (&chunk)[V])
{
    Pack<T, V> d[ROWS];
    Kept<V, KEEP> kept[ROWS];
    UNROLL for (int r = 0; r < ROWS; ++r) {
        if (r >= count) continue;
        d[r] = load<V>(dout + at + r * stride);
        kept[r].load(keep + r * keep_stride, col);
    }
    UNROLL for (int r = 0; r < ROWS; ++r) {
        if (r >= count) continue;
        UNROLL for (int k = 0; k < V; ++k) {
            if (!kept[r][k]) d[r].drop(k);
            chunk[k] += widen(d[r].get(k));
        }
        if (KEEP != ALL && dz) store<V>(dz + at + r * stride, d[r]);
    }
}

// Where the column sums go: parts (groups, blocks, cols) and a counter for each group and column tile, or straight to
// sums (groups, cols) where one block has all rows.
struct Sums { A* parts; u32* counters; T* sums; };

// dout, dz (groups, rows, cols). The `blocks` blocks of a column tile take turns at its rows, blockDim.y * TURN of them at a time, so
// that together they read memory from one end to the other and end at about the same time.
// dz may be null (db alone) or dout itself.
template <int V, Keep KEEP, int ROWS>
__device__ void select_colsum(const T* dout, const void* keep, T* dz, Sums out, i64 groups, i64 rows, i64 cols, i64 mask_row, i64 blocks)
{
    const i64 col_tiles = ceil_div(cols, (i64)blockDim.x * V);
    const i64 tile = blockIdx.x % col_tiles, block = blockIdx.x / col_tiles;
    const i64 col = (tile * blockDim.x + threadIdx.x) * V;
    const i64 keep_row = KEEP == MASK ? mask_row : KEEP == PREACT ? cols * (i64)sizeof(T) : 0;  // bytes
    const i64 stride = blockDim.y * cols, keep_stride = blockDim.y * keep_row;
    const i64 group = (i64)blockIdx.z * gridDim.y + blockIdx.y;
    if (group >= groups) return;
    A total[V], chunk[V];
    UNROLL for (int k = 0; k < V; ++k) total[k] = chunk[k] = 0;
    if (col < cols) {
        const i64 turn = (i64)blockDim.y * TURN, step = blocks * turn;
        i64 row = block * turn + threadIdx.y, at = (group * rows + row) * cols + col;
        const u8* line = (const u8*)keep + (group * rows + row) * keep_row;
        int added = 0;
        UNROLL1 for (; row + turn - blockDim.y < rows; row += step, at += step * cols, line += step * keep_row) {
            UNROLL for (int r = 0; r < TURN; r += ROWS)
                select_rows<V, KEEP, ROWS>(dout, dz, at + r * stride, line + r * keep_stride, col, stride, keep_stride, ROWS, chunk);
            if ((added += TURN) < CHUNK) continue;
            UNROLL for (int k = 0; k < V; ++k) { total[k] += chunk[k]; chunk[k] = 0; }
            added = 0;
        }
        if (row < rows) {  // the last turn, where rows end within it
            const int count = (int)ceil_div(rows - row, blockDim.y);
            UNROLL for (int r = 0; r < TURN; r += ROWS)
                select_rows<V, KEEP, ROWS>(dout, dz, at + r * stride, line + r * keep_stride, col, stride, keep_stride, count - r, chunk);
        }
        UNROLL for (int k = 0; k < V; ++k) total[k] += chunk[k];
    }
    sum_lines<V>(total, threadIdx.x, threadIdx.y, blockDim.x, blockDim.y);
    const bool mine = threadIdx.y == 0 && col < cols;
    if (blocks == 1) {
        if (mine) UNROLL for (int k = 0; k < V; ++k) out.sums[group * cols + col + k] = Round<T>::of(total[k]);
        return;
    }
    A* const parts = out.parts + group * blocks * cols;
    if (mine) UNROLL for (int k = 0; k < V; ++k) __stcg(parts + block * cols + col + k, total[k]);
    if (!last_block(out.counters + group * col_tiles + tile, blocks)) return;
    enum { P = V == 1 ? 1 : 16 / sizeof(A) };
    final_sum<P>(parts, out.sums + group * cols, tile * blockDim.x * V, blockDim.x * V / P, blocks, cols);
}

#define SELECT_COLSUM(name, V, KEEP, KeepType, ROWS, FIT)                                                               \
    extern "C" __global__ void __launch_bounds__(BLOCK, FIT)                                                            \
    name(const T* dout, const KeepType* keep, T* dz, A* parts, u32* counters, T* sums,                                  \
         i64 groups, i64 rows, i64 cols, i64 mask_row, i64 blocks)                                                      \
    { select_colsum<V, KEEP, ROWS>(dout, keep, dz, {parts, counters, sums}, groups, rows, cols, mask_row, blocks); }

// Rows loaded together, and blocks that fit without spilling: of those tried on an H100 and an H200 the quickest (docs/gpu.md).
SELECT_COLSUM(colsum, 1, ALL, u8, 8, 3)
SELECT_COLSUM(colsum_wide, WIDE, ALL, u8, 8, 2)
SELECT_COLSUM(mask_colsum, 1, MASK, u8, 8, 2)
SELECT_COLSUM(mask_colsum_wide, WIDE, MASK, u8, 8, 2)
SELECT_COLSUM(preact_colsum, 1, PREACT, T, 8, 2)
SELECT_COLSUM(preact_colsum_wide, WIDE, PREACT, T, 4, 2)

// ---- ReLU alone -----------------------------------------------------------------------------------------------------

enum { FLAT = 4 };  // pieces that a thread loads together, BLOCK apart

template <int V> __device__ void relu_flat(const T* x, const T* z, T* y, i64 size)
{
    const i64 pieces = size / V, step = (i64)gridDim.x * (BLOCK * FLAT);
    for (i64 first = (i64)blockIdx.x * (BLOCK * FLAT) + threadIdx.x; first < pieces; first += step) {
        Pack<T, V> p[FLAT], q[FLAT];
        UNROLL for (int r = 0; r < FLAT; ++r) {
            const i64 i = first + r * BLOCK;
            if (i < pieces) { p[r] = load<V>(x + i * V); q[r] = load<V>(z + i * V); }
        }
        UNROLL for (int r = 0; r < FLAT; ++r) {
            const i64 i = first + r * BLOCK;
            UNROLL for (int k = 0; k < V; ++k) if (!keeps(q[r].get(k))) p[r].drop(k);
            if (i < pieces) store<V>(y + i * V, p[r]);
        }
    }
    const i64 rest = pieces * V + (i64)blockIdx.x * BLOCK + threadIdx.x;
    if (rest < size) y[rest] = keeps(z[rest]) ? x[rest] : T();
}

extern "C" __global__ void __launch_bounds__(BLOCK, 4) relu(const T* x, T* y, i64 size) { relu_flat<1>(x, x, y, size); }
extern "C" __global__ void __launch_bounds__(BLOCK, 4) relu_wide(const T* x, T* y, i64 size) { relu_flat<WIDE>(x, x, y, size); }

extern "C" __global__ void __launch_bounds__(BLOCK, 4)
relu_backward(const T* dout, const T* z, T* dx, i64 size)
{ relu_flat<1>(dout, z, dx, size); }

extern "C" __global__ void __launch_bounds__(BLOCK, 4)
relu_backward_wide(const T* dout, const T* z, T* dx, i64 size)
{ relu_flat<WIDE>(dout, z, dx, size); }

// dout, dx (rows, cols); mask (rows, mask_row). Tiles as in bias_act.
template <int V> __device__ void mask_select(const T* dout, const u8* mask, T* dx, i64 rows, i64 cols, i64 mask_row)
{
    const i64 col_tiles = ceil_div(cols, (i64)blockDim.x * V);
    const i64 tiles = col_tiles * ceil_div(rows, (i64)blockDim.y * TILE_ROWS);
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const i64 col = (tile % col_tiles * blockDim.x + threadIdx.x) * V;
        const i64 first = tile / col_tiles * blockDim.y * TILE_ROWS + threadIdx.y;
        Pack<T, V> d[TILE_ROWS];
        Kept<V, MASK> kept[TILE_ROWS];
        UNROLL for (int r = 0; r < TILE_ROWS; ++r) {
            const i64 row = first + r * (i64)blockDim.y;
            if (row >= rows || col >= cols) continue;
            d[r] = load<V>(dout + row * cols + col);
            kept[r].load(mask + row * mask_row, col);
        }
        UNROLL for (int r = 0; r < TILE_ROWS; ++r) {
            const i64 row = first + r * (i64)blockDim.y;
            if (row >= rows || col >= cols) continue;
            UNROLL for (int k = 0; k < V; ++k) if (!kept[r][k]) d[r].drop(k);
            store<V>(dx + row * cols + col, d[r]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 4)
mask_backward(const T* dout, const u8* mask, T* dx, i64 rows, i64 cols, i64 mask_row)
{ mask_select<1>(dout, mask, dx, rows, cols, mask_row); }

extern "C" __global__ void __launch_bounds__(BLOCK, 4)
mask_backward_wide(const T* dout, const u8* mask, T* dx, i64 rows, i64 cols, i64 mask_row)
{ mask_select<WIDE>(dout, mask, dx, rows, cols, mask_row); }

// ---- a step of SGD: v = momentum v - lr (dw + decay w), w = w + v ------------------------------------------------------

// A rate as it is given, or as it stands at an address: a recorded graph reads it there at every replay.
__device__ inline A rate(const A* at, A given) { return at ? *at : given; }

// Each operation rounds by itself: a step has the bits that it has in passes over arrays, one operation a pass.
__device__ inline float times(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double times(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double plus(double a, double b) { return __dadd_rn(a, b); }

struct Rates { A lr, momentum, decay; };

// Without decay, or v: nothing is multiplied by 0, which would make NaN of inf.
template <int V>
__device__ inline void descend(const Rates& rates, bool moves, const Pack<T, V>& dw, Pack<T, V>& w, Pack<T, V>& v)
{
    UNROLL for (int k = 0; k < V; ++k) {
        const A weight = widen(w.get(k));
        A move = widen(dw.get(k));
        if (rates.decay != 0) move = plus(times(rates.decay, weight), move);
        move = times(-rates.lr, move);
        if (moves) move = plus(move, times(rates.momentum, widen(v.get(k))));
        w.set(k, Round<T>::of(plus(weight, move)));
        v.set(k, Round<T>::of(move));
    }
}

enum { STEP_PIECES = 2 };  // of three arrays, that a thread loads together, BLOCK apart

template <int V> __device__ void sgd_flat(const T* dw, T* w, T* v, const Rates& rates, i64 size)
{
    const i64 pieces = size / V, step = (i64)gridDim.x * (BLOCK * STEP_PIECES);
    for (i64 first = (i64)blockIdx.x * (BLOCK * STEP_PIECES) + threadIdx.x; first < pieces; first += step) {
        Pack<T, V> d[STEP_PIECES], p[STEP_PIECES], q[STEP_PIECES];
        UNROLL for (int r = 0; r < STEP_PIECES; ++r) {
            const i64 i = first + r * BLOCK;
            q[r] = Pack<T, V>();
            if (i < pieces) {
                d[r] = load<V>(dw + i * V);
                p[r] = load<V>(w + i * V);
                if (v) q[r] = load<V>(v + i * V);
            }
        }
        UNROLL for (int r = 0; r < STEP_PIECES; ++r) {
            const i64 i = first + r * BLOCK;
            if (i >= pieces) continue;
            descend<V>(rates, v, d[r], p[r], q[r]);
            store<V>(w + i * V, p[r]);
            if (v) store<V>(v + i * V, q[r]);
        }
    }
    const i64 rest = pieces * V + (i64)blockIdx.x * BLOCK + threadIdx.x;
    if (rest >= size) return;
    Pack<T, 1> p = load<1>(w + rest), q = Pack<T, 1>();
    if (v) q = load<1>(v + rest);
    descend<1>(rates, v, load<1>(dw + rest), p, q);
    store<1>(w + rest, p);
    if (v) store<1>(v + rest, q);
}

// dw, w, and v or null where there is no momentum: `size` elements, w and v in place.
#define SGD_STEP(name, V)                                                                                               \
    extern "C" __global__ void __launch_bounds__(BLOCK, 4)                                                              \
    name(const T* dw, T* w, T* v, const A* lr_at, const A* momentum_at, const A* decay_at, A lr, A momentum, A decay,   \
         i64 size)                                                                                                      \
    { sgd_flat<V>(dw, w, v, {rate(lr_at, lr), rate(momentum_at, momentum), rate(decay_at, decay)}, size); }

SGD_STEP(sgd_step, 1)
SGD_STEP(sgd_step_wide, WIDE)

// ---- softmax loss -----------------------------------------------------------------------------------------------------

__device__ inline A warp_max(A v)
{
    for (int o = WARP / 2; o > 0; o /= 2) { const A w = __shfl_xor_sync(0xffffffffu, v, o); v = w > v ? w : v; }
    return v;
}
__device__ inline A warp_sum(A v)
{
    for (int o = WARP / 2; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

// x, dx (n, c); y (n,); parts (warps,): the share of the mean loss that each warp's rows have; loss (1,), by the last block.
// blockDim.x is a warp, and each warp takes whole rows. Weighting each loss by 1/n before summing keeps a mean finite whose
// sum is not.
extern "C" __global__ void __launch_bounds__(BLOCK, 2)
softmax_loss(const T* x, const i64* y, T* dx, A* parts, u32* counter, T* loss, i64 n, i64 c)
{
    const i64 warp = (i64)blockIdx.x * blockDim.y + threadIdx.y, warps = (i64)gridDim.x * blockDim.y;
    const A inf = __uint_as_float(0x7f800000u), nan = __uint_as_float(0x7fc00000u);
    const A weight = 1 / (A)n;
    A share = 0;
    for (i64 row = warp; row < n; row += warps) {
        const T* const scores = x + row * c;
        const i64 label = y[row];
        const bool valid = label >= 0 && label < c;
        A top = -inf, sum = 0;
        for (i64 j = threadIdx.x; j < c; j += WARP) { const A v = widen(scores[j]); top = v > top ? v : top; }
        top = warp_max(top);
        for (i64 j = threadIdx.x; j < c; j += WARP) sum += exponential(widen(scores[j]) - top);
        sum = warp_sum(sum);
        const A inverse = 1 / sum;
        for (i64 j = threadIdx.x; j < c; j += WARP) {
            const A p = exponential(widen(scores[j]) - top) * inverse;
            dx[row * c + j] = Round<T>::of(valid ? (j == label ? p - 1 : p) * weight : nan);
        }
        share += valid ? (logarithm(sum) - (widen(scores[label]) - top)) * weight : nan;
    }
    if (threadIdx.x == 0) __stcg(parts + warp, share);
    if (last_block(counter, gridDim.x)) final_sum<1>(parts, loss, 0, 1, warps, 1);
}

// ---- small layers: products of our own ------------------------------------------------------------------------------------
//
// Where launches cost more than arithmetic, one launch does a whole forward, and one all gradients of a backward. A block
// makes one TILE x TILE tile of a product by multiply-adds. Its 256 threads are 4 groups of 64: a thread has 4 x 4 sums,
// and each group takes its quarter of every SLAB of the summed extent; the four sums of an element meet in the end, in one
// order. While a slab is multiplied the next one is on its way into registers. Shared memory bounds a multiprocessor, one block or two,
// so where there are fewer tiles than those several blocks share one: each takes `span` of the summed extent, and the last to end adds
// up what all have left, in their order. float64 is left to cuBLAS: many GPUs have few units for it.
#ifndef DTYPE_float64

enum {
    TILE = 32, SLAB = 64, SPLIT = 4, LINE = TILE + 4, PIECES = TILE * SLAB / BLOCK,
    SLABS = 2 * SLAB * LINE, PARTS = SPLIT * TILE * TILE, SHARED = SLABS > PARTS + BLOCK ? SLABS : PARTS + BLOCK,
    LEFT = TILE * TILE + TILE  // numbers that a block leaves: its sums, and those of b's columns
};

// One side of a product: `extent` rows of the result (or columns) by the summed extent, in lines of `width` elements, stored with the
// summed extent innermost (DEEP) or outermost. keep, in lines of keep_row bytes, says which elements count: others are 0.
// Small layers have fewer than 2^31 elements (cupy_small.py): within a group offsets are ints, which take half the registers.
struct Side { const T* at; const void* keep; int extent, width, keep_row; };

// Where an element of a slab lies: a warp reads 32 neighbours, or (DEEP) 8 neighbours of 4 rows, and writes them to 32 banks.
template <bool DEEP> __device__ inline u32 slab_row(u32 thread) { return DEEP ? thread / 8 : thread % TILE; }
template <bool DEEP> __device__ inline u32 slab_depth(u32 thread) { return DEEP ? thread % 8 : thread / TILE; }

// A thread's share of a slab, on its way: nothing of it is looked at before it is put, or the thread would wait for each element.
template <bool DEEP, Keep KEEP> struct Share {
    T v[PIECES];
    Kept<1, KEEP> kept[PIECES];

    // What lies before `end`.
    __device__ inline void fetch(const Side& side, int row, int depth, int end)
    {
        const int r = row + (int)slab_row<DEEP>(threadIdx.x), d = depth + (int)slab_depth<DEEP>(threadIdx.x);
        const int left = r < side.extent ? end - d : 0, line = DEEP ? r : d, col = DEEP ? d : r;
        const int step = DEEP ? 8 : 8 * side.width, keep_step = DEEP ? 0 : 8 * side.keep_row;
        const T* const at = side.at + line * side.width + col;
        const u8* const keep = (const u8*)side.keep + line * side.keep_row;
        UNROLL for (int i = 0; i < PIECES; ++i) {
            v[i] = T();
            kept[i] = Kept<1, KEEP>();
            if (8 * i >= left) continue;
            v[i] = at[i * step];
            kept[i].load(keep + i * keep_step, DEEP ? col + 8 * i : col);
        }
    }
    __device__ inline void put(A* slab) const
    {
        const u32 thread = threadIdx.x;
        UNROLL for (int i = 0; i < PIECES; ++i)
            slab[(slab_depth<DEEP>(thread) + 8 * i) * LINE + slab_row<DEEP>(thread)] = kept[i][0] ? widen(v[i]) : A();
    }
};

// The products of a kernel share it.
__device__ inline A* tile_memory() { __shared__ __align__(16) A memory[SHARED]; return memory; }

// What becomes of a product: y = a b + bias, relu'd where a mask is to be written. sums (of b's columns), where wanted, comes along.
struct Product { T* y; const T* bias; u8* mask; T* sums; int mask_row; };

// How blocks share the tiles of a product: each takes `span` of the summed extent `depth`, a multiple of SLAB. left (tiles, blocks,
// LEFT) is what they leave, counters (tiles,) count them; neither is there where a block takes all.
struct Sharing {
    A* left;
    u32* counters;
    int depth, span;
    __device__ inline int blocks() const { return (depth + span - 1) / span; }
};

// Block `unit` of those that make a b: a (rows, depth), b (depth, cols), in tiles by rows, the blocks of a tile side by side.
template <bool A_DEEP, bool B_DEEP, Keep A_KEEP, Keep B_KEEP>
__device__ void small_product(const Side& a, const Side& b, Product out, const Sharing& sharing, int unit)
{
    A* const shared = tile_memory();
    A* const as = shared;
    A* const bs = shared + SLAB * LINE;
    const u32 thread = threadIdx.x, part = thread / (BLOCK / SPLIT), ty = thread / 8 % 8, tx = thread % 8, lane = thread % WARP, warp = thread / WARP;
    const int blocks = sharing.blocks(), tile = unit / blocks, block = unit % blocks, across = (b.extent + TILE - 1) / TILE;
    const int row = tile / across * TILE, col = tile % across * TILE;
    const int begin = block * sharing.span, end = begin + sharing.span < sharing.depth ? begin + sharing.span : sharing.depth;
    if (row > 0) out.sums = nullptr;  // the first row of tiles makes them
    A acc[4][4], column = 0;
    UNROLL for (int i = 0; i < 4; ++i) UNROLL for (int j = 0; j < 4; ++j) acc[i][j] = 0;
    Share<A_DEEP, A_KEEP> an;
    Share<B_DEEP, B_KEEP> bn;
    an.fetch(a, row, begin, end);
    bn.fetch(b, col, begin, end);
    for (int depth = begin; depth < end; depth += SLAB) {
        __syncthreads();  // the slab before is done with
        an.put(as);
        bn.put(bs);
        __syncthreads();
        if (depth + SLAB < end) {
            an.fetch(a, row, depth + SLAB, end);
            bn.fetch(b, col, depth + SLAB, end);
        }
        UNROLL for (int k = 0; k < SLAB / SPLIT; ++k) {
            const u32 line = (part * (SLAB / SPLIT) + k) * LINE;
            A u[4], v[4];
            UNROLL for (int i = 0; i < 4; ++i) { u[i] = as[line + 4 * ty + i]; v[i] = bs[line + 4 * tx + i]; }
            UNROLL for (int i = 0; i < 4; ++i) UNROLL for (int j = 0; j < 4; ++j) acc[i][j] = __fmaf_rn(u[i], v[j], acc[i][j]);
        }
        if (out.sums) UNROLL for (int k = 0; k < SLAB / 8; ++k) column += bs[(warp * (SLAB / 8) + k) * LINE + lane];
    }
    __syncthreads();
    // [part][row][column], the column sums of the warps behind them.
    UNROLL for (int i = 0; i < 4; ++i) UNROLL for (int j = 0; j < 4; ++j)
        shared[(part * TILE + 4 * ty + i) * TILE + 4 * tx + j] = acc[i][j];
    A* const columns = shared + PARTS;
    columns[warp * TILE + lane] = column;
    __syncthreads();
    A sums[TILE / 8];
    UNROLL for (int i = 0; i < TILE / 8; ++i) {
        const A* const s = shared + (warp + 8 * i) * TILE + lane;
        sums[i] = (s[0] + s[TILE * TILE]) + (s[2 * TILE * TILE] + s[3 * TILE * TILE]);
    }
    column = 0;
    if (out.sums && warp == 0) for (int w = 0; w < BLOCK / WARP; ++w) column += columns[w * TILE + lane];
    if (blocks > 1) {
        A* const left = sharing.left + (i64)tile * blocks * LEFT + warp * TILE + lane;
        UNROLL for (int i = 0; i < TILE / 8; ++i) __stcg(left + block * LEFT + 8 * i * TILE, sums[i]);
        if (out.sums && warp == 0) __stcg(left + block * LEFT + TILE * TILE, column);
        if (!last_block(sharing.counters + tile, blocks)) return;
        UNROLL for (int i = 0; i < TILE / 8; ++i) sums[i] = 0;
        column = 0;
        for (int first = 0; first < blocks; first += 4) {
            A of[4][TILE / 8 + 1];
            UNROLL for (int q = 0; q < 4; ++q) {
                const A* const at = left + (first + q) * LEFT;
                UNROLL for (int i = 0; i < TILE / 8; ++i) of[q][i] = first + q < blocks ? __ldcg(at + 8 * i * TILE) : 0;
                of[q][TILE / 8] = first + q < blocks && out.sums && warp == 0 ? __ldcg(at + TILE * TILE) : 0;
            }
            UNROLL for (int q = 0; q < 4; ++q) {
                UNROLL for (int i = 0; i < TILE / 8; ++i) sums[i] += of[q][i];
                column += of[q][TILE / 8];
            }
        }
    }
    const int c = col + (int)lane;
    const A bias = out.bias && c < b.extent ? widen(out.bias[c]) : 0;
    UNROLL for (int i = 0; i < TILE / 8; ++i) {
        const int r = row + (int)warp + 8 * i;
        T t = Round<T>::of(out.bias ? sums[i] + bias : sums[i]);
        const bool inside = r < a.extent && c < b.extent, keep = !out.mask || keeps(t);
        if (!keep) t = T();
        const u32 bits = __ballot_sync(0xffffffffu, inside && keep);
        if (!inside) continue;
        out.y[r * b.extent + c] = t;
        if (out.mask && lane % 8 == 0) out.mask[r * out.mask_row + (c >> 3)] = (u8)(bits >> lane);
    }
    if (out.sums && warp == 0 && c < b.extent) out.sums[c] = Round<T>::of(column);
}

// x (groups, n, d), w (groups, d, m), b (groups, m) or null, y (groups, n, m), mask (groups, n, mask_row) or null: no ReLU.
extern "C" __global__ void __launch_bounds__(BLOCK, 2)
small_forward(const T* x, const T* w, const T* b, T* y, u8* mask, A* left, u32* counters,
              i64 groups, i64 n, i64 d, i64 m, i64 mask_row, i64 span)
{
    const i64 group = (i64)blockIdx.z * gridDim.y + blockIdx.y, tiles = ceil_div(n, TILE) * ceil_div(m, TILE);
    if (group >= groups) return;
    const Side rows = {x + group * n * d, nullptr, (int)n, (int)d, 0}, cols = {w + group * d * m, nullptr, (int)m, (int)m, 0};
    const Product out = {y + group * n * m, b ? b + group * m : nullptr, mask ? mask + group * n * mask_row : nullptr, nullptr, (int)mask_row};
    Sharing sharing = {left, counters, (int)d, (int)span};
    sharing.left += group * tiles * sharing.blocks() * LEFT;
    sharing.counters += group * tiles;
    small_product<true, false, ALL, ALL>(rows, cols, out, sharing, (int)blockIdx.x);
}

// dout (groups, n, m), of which `keep` is kept, (groups, n, mask_row) bytes or like dout;
// dx = dz w^T (groups, n, d), dw = x^T dz (groups, d, m), db = sum of dz (groups, m); dx or db may be null.
// Blocks make dw, and db on the way; then dx. span and counters are those of dw, then of dx.
template <Keep KEEP>
__device__ void small_gradients(const T* dout, const void* keep, const T* x, const T* w, T* dx, T* dw, T* db, A* left, u32* counters,
                                i64 groups, i64 n, i64 d, i64 m, i64 mask_row, i64 dw_span, i64 dx_span)
{
    const i64 group = (i64)blockIdx.z * gridDim.y + blockIdx.y;
    if (group >= groups) return;
    const T* const dz = dout + group * n * m;
    const i64 keep_row = KEEP == MASK ? mask_row : KEEP == PREACT ? m * (i64)sizeof(T) : 0;
    const u8* const kept = (const u8*)keep + group * n * keep_row;
    const i64 dw_tiles = ceil_div(d, TILE) * ceil_div(m, TILE), dx_tiles = ceil_div(n, TILE) * ceil_div(d, TILE);
    Sharing of_dw = {left, counters, (int)n, (int)dw_span}, of_dx = {left, counters, (int)m, (int)dx_span};
    const i64 dw_blocks = of_dw.blocks(), dx_blocks = of_dx.blocks();
    if (blockIdx.x < dw_tiles * dw_blocks) {
        of_dw.left += group * dw_tiles * dw_blocks * LEFT;
        of_dw.counters += group * dw_tiles;
        const Side rows = {x + group * n * d, nullptr, (int)d, (int)d, 0}, cols = {dz, kept, (int)m, (int)m, (int)keep_row};
        const Product out = {dw + group * d * m, nullptr, nullptr, db ? db + group * m : nullptr, 0};
        small_product<false, false, ALL, KEEP>(rows, cols, out, of_dw, (int)blockIdx.x);
    } else {
        const bool dw_shared = dw_blocks > 1;  // then its own come first
        of_dx.left += ((dw_shared ? groups * dw_tiles * dw_blocks : 0) + group * dx_tiles * dx_blocks) * LEFT;
        of_dx.counters += (dw_shared ? groups * dw_tiles : 0) + group * dx_tiles;
        const Side rows = {dz, kept, (int)n, (int)m, (int)keep_row}, cols = {w + group * d * m, nullptr, (int)d, (int)m, 0};
        const Product out = {dx + group * n * d, nullptr, nullptr, nullptr, 0};
        small_product<true, true, KEEP, ALL>(rows, cols, out, of_dx, (int)(blockIdx.x - dw_tiles * dw_blocks));
    }
}

#define SMALL_BACKWARD(name, KEEP, KeepType)                                                                             \
    extern "C" __global__ void __launch_bounds__(BLOCK, 2)                                                              \
    name(const T* dout, const KeepType* keep, const T* x, const T* w, T* dx, T* dw, T* db, A* left, u32* counters,      \
         i64 groups, i64 n, i64 d, i64 m, i64 mask_row, i64 dw_span, i64 dx_span)                                       \
    {                                                                                                                   \
        small_gradients<KEEP>(dout, keep, x, w, dx, dw, db, left, counters, groups, n, d, m, mask_row, dw_span, dx_span); \
    }

SMALL_BACKWARD(small_backward, ALL, u8)
SMALL_BACKWARD(mask_small_backward, MASK, u8)
SMALL_BACKWARD(preact_small_backward, PREACT, T)

#endif  // DTYPE_float64
