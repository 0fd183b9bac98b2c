// What all kernels share. They include nothing, so that NVRTC needs no toolkit; `emulator/shim.h` gives the same names a
// meaning on the host.
//
// A kernel's operands are spans: an address and a number of values. On the device the number is used only where a kernel
// asks for it; on the host every access is checked against it, and against those of other threads.

#ifndef EMULATED
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;

// Values that no thread of the kernel writes.
template <class T> struct In {
    const T* p;
    u64 n;
    __device__ T operator[](u64 i) const { return __ldg(p + i); }
};

// Values that the kernel writes, or reads and writes.
template <class T> struct Out {
    T* p;
    u64 n;
    __device__ T& operator[](u64 i) const { return p[i]; }
};

// A kernel of at most `threads` threads a block, with registers for `blocks` blocks on a multiprocessor.
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
// Before loops over a thread's own few values, so that they stay in registers.
#define UNROLL _Pragma("unroll")
// Before loops that should stay loops, where they are found within many others: they would take seconds to compile.
#define ROLLED _Pragma("unroll 1")
#define INFINITY __int_as_float(0x7f800000)
#define SHARED(T, name, n) __shared__ T name[n]
template <class T> using Shared = T*;
#endif

#define FULL 0xffffffffu
#define LIMIT 1073741824

// Products and sums of the update are rounded one by one, whatever the compiler's flags say.
#define MUL __fmul_rn
#define ADD __fadd_rn
#define SUB __fsub_rn

// Where the first fault of a step is kept. All ones: none. Operations are numbered in their order, and the smallest
// number stays; within one operation the smallest `detail` does, which begins with the index.
struct Status {
    u32 owner, code, site_kind, frac_bits;
    u64 site, first, per, vocab, detail;
};

// What an operation says about a fault that it meets.
struct Report {
    Status* status;
    u32 seq, code, site_kind, frac_bits;
    u64 site, first, per, vocab;
};

// What the payload of a fault is.
enum { REAL = 0, GRID = 1, TOKEN = 2 };

// `index` is below 2^30. Integer minima do not depend on the order of threads.
__device__ inline void report(const Report& r, u32 index, u32 kind, u32 payload) {
    if (atomicMin(&r.status->owner, r.seq) < r.seq) return;
    // The same values from every thread of this operation.
    atomicExch(&r.status->code, r.code);
    atomicExch(&r.status->site_kind, r.site_kind);
    atomicExch(&r.status->frac_bits, r.frac_bits);
    atomicExch(&r.status->site, r.site);
    atomicExch(&r.status->first, r.first);
    atomicExch(&r.status->per, r.per);
    atomicExch(&r.status->vocab, r.vocab);
    atomicMin(&r.status->detail, (u64)index << 34 | (u64)kind << 32 | payload);
}

// Philox 4x32-10 (bdia_core::rng).
struct Quad {
    u32 w[4];
};

__device__ inline Quad philox(u64 key, u32 c0, u32 c1, u32 c2, u32 c3) {
    u32 k0 = (u32)key, k1 = (u32)(key >> 32);
    ROLLED
    for (int round = 0; round < 10; round++) {
        u64 p0 = (u64)0xD2511F53u * c0, p1 = (u64)0xCD9E8D57u * c2;
        u32 n0 = (u32)(p1 >> 32) ^ c1 ^ k0, n2 = (u32)(p0 >> 32) ^ c3 ^ k1;
        c0 = n0, c1 = (u32)p1, c2 = n2, c3 = (u32)p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return Quad{{c0, c1, c2, c3}};
}

// The random streams of a chunk's samples (bdia_core::Chunk::stream); `place` holds stack, block and draw.
struct Streams {
    u64 seed;
    u32 step, global, place, threshold;
};

__device__ inline Quad quad(const Streams& s, u32 sample, u32 quad) {
    return philox(s.seed, s.step, s.global + sample, s.place, quad);
}

// Sums and maxima over the warp, in a fixed order; every lane gets the result.
__device__ inline float warp_sum(float x) {
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(FULL, x, d);
    return x;
}

__device__ inline double warp_sum(double x) {
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(FULL, x, d);
    return x;
}

__device__ inline u64 warp_sum(u64 x) {
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(FULL, x, d);
    return x;
}

// The larger one; a NaN is the largest.
__device__ inline float larger(float a, float b) { return b > a || isnan(b) ? b : a; }

__device__ inline float warp_max(float x) {
    for (int d = 16; d > 0; d /= 2) x = larger(x, __shfl_xor_sync(FULL, x, d));
    return x;
}

// Threads of a block wherever a kernel does not say otherwise: 8 warps.
#define THREADS 256
#define WARPS 8

// The sum over a block of W warps; every thread gets it. `room` has W values and is free again afterwards.
template <class T, u32 W = WARPS> __device__ T block_sum(T x, Shared<T> room) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = room[0];
    for (u32 w = 1; w < W; w++) sum += room[w];
    __syncthreads();
    return sum;
}

template <u32 W = WARPS> __device__ float block_max(float x, Shared<float> room) {
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    float most = room[0];
    for (u32 w = 1; w < W; w++) most = larger(most, room[w]);
    __syncthreads();
    return most;
}

// Values of each operand that a thread loads before it writes the first: memory is far away, and so many are under way.
#define AT_ONCE 4
#define STREAMED (AT_ONCE * THREADS)

template <class T> struct Two {
    T x, y;
};

// finish(i, load(i)) for all i below n, whatever the number of blocks; `load` writes nothing, nor computes, so that no load
// waits for another.
template <class Load, class Finish> __device__ void stream(u64 n, Load load, Finish finish) {
    for (u64 at = (u64)blockIdx.x * STREAMED; at < n; at += (u64)gridDim.x * STREAMED) {
        u64 i = at + threadIdx.x;
        u32 left = n - at < STREAMED ? (u32)(n - at) : STREAMED;
        decltype(load(i)) v[AT_ONCE] = {};
        UNROLL
        for (u32 k = 0; k < AT_ONCE; k++)
            if (threadIdx.x + k * THREADS < left) v[k] = load(i + k * THREADS);
        UNROLL
        for (u32 k = 0; k < AT_ONCE; k++)
            if (threadIdx.x + k * THREADS < left) finish(i + k * THREADS, v[k]);
    }
}

// What another block of the same launch has written, of whose fence and count this one knows.
template <class T> __device__ T fresh(const Out<T>& x, u64 i) { return *(volatile T*)&x[i]; }

// Adds to a 64-bit number kept in two words, which need not be aligned together. Integer sums are the same in any order.
__device__ inline void accumulate(const Out<u32>& sum, u64 add) {
    u32 low = (u32)add;
    u32 old = atomicAdd(&sum[0], low);
    u32 carry = old + low < old;
    atomicAdd(&sum[1], (u32)(add >> 32) + carry);
}
