// What lies around the cuBLAS products on a GPU: bias, ReLU and keep-mask after the forward product; the gradient of the
// ReLU and the bias reduction before the backward products; ReLU alone; softmax loss. Products are cuBLAS's, launch
// geometry and buffers are backends/cupy_backend.py's.
//
// Compiled once per element type T, chosen by -DDTYPE_float32, _float64, _float16 or _bfloat16. Sums, biases and
// exponentials are computed in A, which is T or, for the 16-bit types, float. Products of 16-bit types arrive in A, to be
// rounded once with the bias, or in T, with the bias and rounded. The file includes nothing, so that NVRTC needs no header, and the same text is compiled
// by a C++ compiler and run on the CPU by the tests.
//
// Rules kept by every kernel:
// - Arrays are C-contiguous. A `_wide` kernel moves 16 bytes at a time: its pointers are 16-byte aligned and its rows hold
//   a multiple of WIDE elements; its twin without the suffix takes anything.
// - Offsets are 64 bits wide. No atomics: every sum has one order, given by the shape alone.
// - No `__restrict__`: y may be z, dx may be dout.
// - Two blocks fit on a multiprocessor (the 2 in the launch bounds): without a number ptxas aims at more and spills.
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
#define UNROLL4 _Pragma("unroll 4")
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

template <class E, int V> struct alignas(V * sizeof(E) < 16 ? V * sizeof(E) : 16) Pack { E v[V]; };

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
// the bias is loaded once, and four loads are under way at a time. blockDim.x * V is a multiple of 8.
enum { TILE_ROWS = 4 };

template <int V, bool RELU, class Z>
__device__ void bias_act(const Z* z, const T* b, T* y, u8* mask, i64 groups, i64 rows, i64 cols, i64 mask_row)
{
    const i64 col_tiles = ceil_div(cols, (i64)blockDim.x * V);
    const i64 tiles = col_tiles * ceil_div(rows, (i64)blockDim.y * TILE_ROWS);
    const u32 lane = (threadIdx.y * blockDim.x + threadIdx.x) & (WARP - 1);
    const i64 group = (i64)blockIdx.z * gridDim.y + blockIdx.y;
    if (group >= groups) return;
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const i64 col = (tile % col_tiles * blockDim.x + threadIdx.x) * V;
        const i64 first = tile / col_tiles * blockDim.y * TILE_ROWS + threadIdx.y;
        A bias[V];
        UNROLL for (int k = 0; k < V; ++k) bias[k] = 0;
        if (b && col < cols) {
            const Pack<T, V> p = load<V>(b + group * cols + col);
            UNROLL for (int k = 0; k < V; ++k) bias[k] = widen(p.v[k]);
        }
        UNROLL for (int r = 0; r < TILE_ROWS; ++r) {
            const i64 row = first + (i64)r * blockDim.y;
            const bool inside = row < rows && col < cols;
            const i64 at = (group * rows + row) * cols + col;
            u32 bits = 0;
            if (inside) {
                const Pack<Z, V> s = load<V>(z + at);
                Pack<T, V> t;
                UNROLL for (int k = 0; k < V; ++k) {
                    const A v = b ? widen(s.v[k]) + bias[k] : widen(s.v[k]);  // no b: -0.0 stays
                    t.v[k] = Round<T>::of(v);
                    const bool keep = !RELU || keeps(t.v[k]);  // of the rounded z: what rounds to -0.0 is kept
                    bits |= (u32)keep << k;
                    if (!keep) t.v[k] = T();
                }
                store<V>(y + at, t);
            }
            if (RELU) {
                const u32 byte = mask_byte<V>(bits, lane);
                if (inside && (col & 7) == 0) mask[(group * rows + row) * mask_row + (col >> 3)] = (u8)byte;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
bias_add(const A* z, const T* b, T* y, i64 groups, i64 rows, i64 cols)
{ bias_act<1, false>(z, b, y, nullptr, groups, rows, cols, 0); }

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
bias_add_wide(const A* z, const T* b, T* y, i64 groups, i64 rows, i64 cols)
{ bias_act<WIDE, false>(z, b, y, nullptr, groups, rows, cols, 0); }

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
bias_relu_mask(const A* z, const T* b, T* y, u8* mask, i64 groups, i64 rows, i64 cols, i64 mask_row)
{ bias_act<1, true>(z, b, y, mask, groups, rows, cols, mask_row); }

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
bias_relu_mask_wide(const A* z, const T* b, T* y, u8* mask, i64 groups, i64 rows, i64 cols, i64 mask_row)
{ bias_act<WIDE, true>(z, b, y, mask, groups, rows, cols, mask_row); }

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
relu_mask(const T* z, const T* b, T* y, u8* mask, i64 groups, i64 rows, i64 cols, i64 mask_row)
{ bias_act<1, true>(z, b, y, mask, groups, rows, cols, mask_row); }

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
relu_mask_wide(const T* z, const T* b, T* y, u8* mask, i64 groups, i64 rows, i64 cols, i64 mask_row)
{ bias_act<WIDE, true>(z, b, y, mask, groups, rows, cols, mask_row); }

// ---- backward: dz = keep ? dout : 0, db = sum of dz over rows ------------------------------------------------------

enum Keep { ALL, MASK, PREACT };  // what `keep` points to: nothing, mask bytes, z

// The keep-bits of V elements that start at column col: `line` points to that row's mask bytes or pre-activations.
template <int V, Keep KEEP> __device__ inline u32 keep_bits(const u8* line, i64 col)
{
    if (KEEP == MASK) return (u32)line[col >> 3] >> (col & 7);
    u32 bits = 0;
    if (KEEP == PREACT) {
        const Pack<T, V> z = load<V>((const T*)line + col);
        UNROLL for (int k = 0; k < V; ++k) bits |= (u32)keeps(z.v[k]) << k;
    }
    return bits;
}

// Adds up acc over threadIdx.y in a fixed tree; the sums end in the threads with threadIdx.y == 0. blockDim.y is a power of 2.
template <int V> __device__ inline void sum_over_y(A (&acc)[V])
{
    __shared__ A sums[BLOCK * V];  // [threadIdx.y][k][threadIdx.x]: neighbouring threads in neighbouring banks
    const u32 line = blockDim.x * V;
    A* const mine = sums + threadIdx.y * line + threadIdx.x;
    UNROLL for (int k = 0; k < V; ++k) mine[k * blockDim.x] = acc[k];
    for (u32 half = blockDim.y / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half)
            UNROLL for (int k = 0; k < V; ++k) mine[k * blockDim.x] += mine[half * line + k * blockDim.x];
    }
    UNROLL for (int k = 0; k < V; ++k) acc[k] = mine[k * blockDim.x];
}

// A thread adds CHUNK rows into one sum and those sums into another, so that 10**6 rows of one sign keep five digits in
// float32: a single running sum of that length would not.
enum { CHUNK = 32 };

// dout, dz (groups, rows, cols); parts (groups, blocks, cols): block i of a column tile sums rows i * span .. (i + 1) * span.
// dz may be null (db alone) or dout itself.
template <int V, Keep KEEP>
__device__ void select_colsum(const T* dout, const void* keep, T* dz, A* parts, i64 groups, i64 rows, i64 cols,
                              i64 mask_row, i64 span)
{
    const i64 col_tiles = ceil_div(cols, (i64)blockDim.x * V), blocks = ceil_div(rows, span);
    const i64 col = (blockIdx.x % col_tiles * blockDim.x + threadIdx.x) * V;
    const i64 block = blockIdx.x / col_tiles;
    const i64 first = block * span + threadIdx.y, end = (block + 1) * span < rows ? (block + 1) * span : rows;
    const i64 keep_row = KEEP == MASK ? mask_row : KEEP == PREACT ? cols * (i64)sizeof(T) : 0;  // bytes
    const i64 stride = blockDim.y * cols, keep_stride = blockDim.y * keep_row;
    const i64 group = (i64)blockIdx.z * gridDim.y + blockIdx.y;
    if (group >= groups) return;
    A total[V];
    UNROLL for (int k = 0; k < V; ++k) total[k] = 0;
    if (col < cols) {
        i64 at = (group * rows + first) * cols + col;
        const u8* line = (const u8*)keep + (group * rows + first) * keep_row;
        for (i64 left = ceil_div(end - first, blockDim.y); left > 0; left -= CHUNK) {
            const int length = left < CHUNK ? (int)left : CHUNK;
            A chunk[V];
            UNROLL for (int k = 0; k < V; ++k) chunk[k] = 0;
            UNROLL4 for (int i = 0; i < length; ++i) {
                Pack<T, V> d = load<V>(dout + at);
                if (KEEP != ALL) {
                    const u32 bits = keep_bits<V, KEEP>(line, col);
                    UNROLL for (int k = 0; k < V; ++k) if (!(bits >> k & 1u)) d.v[k] = T();
                    if (dz) store<V>(dz + at, d);
                }
                UNROLL for (int k = 0; k < V; ++k) chunk[k] += widen(d.v[k]);
                at += stride;
                line += keep_stride;
            }
            UNROLL for (int k = 0; k < V; ++k) total[k] += chunk[k];
        }
    }
    sum_over_y<V>(total);
    if (threadIdx.y == 0 && col < cols)
        UNROLL for (int k = 0; k < V; ++k) parts[(group * blocks + block) * cols + col + k] = total[k];
}


#define SELECT_COLSUM(name, V, KEEP, KeepType)                                                                          \
    extern "C" __global__ void __launch_bounds__(BLOCK, 2) name(const T* dout, const KeepType* keep, T* dz, A* parts,      \
                                                             i64 groups, i64 rows, i64 cols, i64 mask_row, i64 span)    \
    { select_colsum<V, KEEP>(dout, keep, dz, parts, groups, rows, cols, mask_row, span); }

SELECT_COLSUM(colsum, 1, ALL, u8)
SELECT_COLSUM(colsum_wide, WIDE, ALL, u8)
SELECT_COLSUM(mask_colsum, 1, MASK, u8)
SELECT_COLSUM(mask_colsum_wide, WIDE, MASK, u8)
SELECT_COLSUM(preact_colsum, 1, PREACT, T)
SELECT_COLSUM(preact_colsum_wide, WIDE, PREACT, T)

// parts (groups, blocks, cols) in A -> sums (groups, cols) in T.
extern "C" __global__ void __launch_bounds__(BLOCK, 2)
colsum_final(const A* parts, T* sums, i64 groups, i64 blocks, i64 cols)
{
    const i64 col = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const i64 group = (i64)blockIdx.z * gridDim.y + blockIdx.y;
    if (group >= groups) return;
    A total[1] = {0};
    if (col < cols)
        UNROLL4 for (i64 block = threadIdx.y; block < blocks; block += blockDim.y)
            total[0] += parts[(group * blocks + block) * cols + col];
    sum_over_y<1>(total);
    if (threadIdx.y == 0 && col < cols) sums[group * cols + col] = Round<T>::of(total[0]);
}

// ---- ReLU alone -----------------------------------------------------------------------------------------------------

template <int V> __device__ void relu_flat(const T* x, const T* z, T* y, i64 size)
{
    const i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x, threads = (i64)gridDim.x * blockDim.x;
    for (i64 i = thread; i < size / V; i += threads) {
        Pack<T, V> p = load<V>(x + i * V);
        const Pack<T, V> q = load<V>(z + i * V);
        UNROLL for (int k = 0; k < V; ++k) if (!keeps(q.v[k])) p.v[k] = T();
        store<V>(y + i * V, p);
    }
    const i64 rest = size / V * V + thread;
    if (rest < size) y[rest] = keeps(z[rest]) ? x[rest] : T();
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2) relu(const T* x, T* y, i64 size) { relu_flat<1>(x, x, y, size); }
extern "C" __global__ void __launch_bounds__(BLOCK, 2) relu_wide(const T* x, T* y, i64 size) { relu_flat<WIDE>(x, x, y, size); }

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
relu_backward(const T* dout, const T* z, T* dx, i64 size)
{ relu_flat<1>(dout, z, dx, size); }

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
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
        UNROLL for (int r = 0; r < TILE_ROWS; ++r) {
            const i64 row = first + (i64)r * blockDim.y;
            if (row >= rows || col >= cols) continue;
            Pack<T, V> d = load<V>(dout + row * cols + col);
            const u32 bits = keep_bits<V, MASK>(mask + row * mask_row, col);
            UNROLL for (int k = 0; k < V; ++k) if (!(bits >> k & 1u)) d.v[k] = T();
            store<V>(dx + row * cols + col, d);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
mask_backward(const T* dout, const u8* mask, T* dx, i64 rows, i64 cols, i64 mask_row)
{ mask_select<1>(dout, mask, dx, rows, cols, mask_row); }

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
mask_backward_wide(const T* dout, const u8* mask, T* dx, i64 rows, i64 cols, i64 mask_row)
{ mask_select<WIDE>(dout, mask, dx, rows, cols, mask_row); }

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

// x, dx (n, c); y (n,); parts (warps,): the share of the mean loss that each warp's rows have. blockDim.x is a warp, and
// each warp takes whole rows. Weighting each loss by 1/n before summing keeps a mean finite whose sum is not.
extern "C" __global__ void __launch_bounds__(BLOCK, 2)
softmax_loss(const T* x, const i64* y, T* dx, A* parts, i64 n, i64 c)
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
    if (threadIdx.x == 0) parts[warp] = share;
}
