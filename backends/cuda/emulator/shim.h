// The device's language on the host: blocks one after another, the threads of a block as fibers that run until they meet
// a barrier, a vote or a shuffle. It tells
// * reads and writes outside an operand, and operands outside an allocation;
// * two threads that touch the same word, one of them writing, with no barrier between them (in shared memory and, for
//   threads of different blocks always, in global memory);
// * barriers, votes and shuffles that not all threads reach;
// * shared memory that is read before it is written (it starts as NaN).
// Every other launch runs blocks and threads backwards, so results that depend on the order differ when repeated.
#pragma once
#define EMULATED

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

typedef uint32_t u32;
typedef unsigned long long u64;
typedef int32_t i32;

#define __device__
#define UNROLL
#define ROLLED
#define KERNEL(threads, blocks) static void

namespace emulator {

struct Dim {
    u32 x = 1, y = 1, z = 1;
};

// Who touched a word of four bytes last, in which launch and phase (phases are cut by barriers).
struct Shadow {
    u32 launch, written, wblock, wthread, wphase;
    u32 read, rblock, rthread, rphase;
    bool many_blocks, many_threads;
    // A copy into the word is under way.
    bool pending;
};

struct Allocation {
    uintptr_t start;
    size_t bytes;
    Shadow* shadows;
};

// The launch at hand.
struct Now {
    u32 launch, block, thread, phase;
};
extern Now now;
extern Dim thread_index, block_index, block_dim, grid_dim;

[[noreturn]] void fail(const char* format, ...);
const Allocation* find(uintptr_t at, size_t bytes);
void barrier();
// Gives every lane of the warp the values of all.
const u64* exchange(u32 op, u32 mask, u64 value);

inline void touch(Shadow* s, bool write, const char* where) {
    if (!s) return;
    if (s->launch != now.launch) *s = Shadow{now.launch, 0, 0, 0, 0, 0, 0, 0, 0, false, false, false};
    if (s->pending) fail("race in %s memory: a word is used while it is copied", where);
    bool other = s->written && (s->wblock != now.block || (s->wphase == now.phase && s->wthread != now.thread));
    if (other) fail("race in %s memory: threads %u and %u of blocks %u and %u", where, s->wthread, now.thread, s->wblock, now.block);
    if (write) {
        bool read = s->read && (s->many_blocks || s->rblock != now.block ||
                                (s->rphase == now.phase && (s->many_threads || s->rthread != now.thread)));
        if (read) fail("race in %s memory: thread %u of block %u writes what another reads", where, now.thread, now.block);
        s->written = 1, s->wblock = now.block, s->wthread = now.thread, s->wphase = now.phase;
    } else if (!s->read) {
        s->read = 1, s->rblock = now.block, s->rthread = now.thread, s->rphase = now.phase;
    } else if (s->rblock != now.block) {
        s->many_blocks = true;
    } else if (s->rphase != now.phase) {
        s->rphase = now.phase, s->rthread = now.thread, s->many_threads = false;
    } else if (s->rthread != now.thread) {
        s->many_threads = true;
    }
}

// A value that is read or written.
template <class T> struct Ref {
    T* p;
    Shadow* s;
    const char* where;
    operator T() const { return touch(s, false, where), *p; }
    T operator=(T x) const { return touch(s, true, where), *p = x; }
    T operator=(const Ref& x) const { return *this = (T)x; }
    T operator+=(T x) const { return *this = (T)*this + x; }
    T operator-=(T x) const { return *this = (T)*this - x; }
    T operator*=(T x) const { return *this = (T)*this * x; }
    // What atomic operations take: no other access of the kernel counts as a race with them.
    T* operator&() const { return p; }
};

template <class T> struct Span {
    T* p;
    u64 n;
    Shadow* shadows;

    void check(u64 i) const {
        if (i >= n) fail("index %llu of an operand of %llu values", i, n);
    }
    Shadow* shadow(u64 i) const { return shadows ? shadows + i * sizeof(T) / 4 : nullptr; }
};

} // namespace emulator

template <class T> struct In : emulator::Span<const T> {
    T operator[](u64 i) const {
        this->check(i);
        emulator::touch(this->shadow(i), false, "global");
        return this->p[i];
    }
};

template <class T> struct Out : emulator::Span<T> {
    emulator::Ref<T> operator[](u64 i) const {
        this->check(i);
        return {this->p + i, this->shadow(i), "global"};
    }
};

// Shared memory as the threads of a block see it.
template <class T> struct Shared {
    T* p;
    u64 n;
    emulator::Shadow* s;
    emulator::Ref<T> operator[](u64 i) const {
        if (i >= n) emulator::fail("index %llu of %llu shared values", i, n);
        return {p + i, s + i, "shared"};
    }
    Shared operator+(u64 i) const { return {p + i, n - i, s + i}; }
};

template <class T, u64 N> struct SharedArray {
    T values[N];
    emulator::Shadow shadows[N];
    u32 launch = 0, block = 0;
    Shared<T> enter() {
        if (launch != emulator::now.launch || block != emulator::now.block) {
            launch = emulator::now.launch, block = emulator::now.block;
            memset((void*)values, 0xFF, sizeof values);
            memset((void*)shadows, 0, sizeof shadows);
        }
        return {values, N, shadows};
    }
};

#define SHARED(T, name, n)                   \
    static SharedArray<T, n> name##_array;   \
    Shared<T> name = name##_array.enter()

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_dim
#define gridDim emulator::grid_dim

inline void __syncthreads() { emulator::barrier(); }

template <class T> u64 bits_of(T x) {
    u64 bits = 0;
    memcpy(&bits, &x, sizeof x);
    return bits;
}

template <class T> T of_bits(u64 bits) {
    T x;
    memcpy((void*)&x, &bits, sizeof x);
    return x;
}

template <class T> T __shfl_xor_sync(u32 mask, T x, int d) {
    u32 lane = emulator::now.thread % 32;
    return of_bits<T>(emulator::exchange(1, mask, bits_of(x))[lane ^ (u32)d]);
}

template <class T> T __shfl_sync(u32 mask, T x, int lane) {
    return of_bits<T>(emulator::exchange(2, mask, bits_of(x))[lane % 32]);
}

inline u32 __ballot_sync(u32 mask, bool vote) {
    const u64* votes = emulator::exchange(3, mask, vote);
    u32 bits = 0;
    for (int i = 0; i < 32; i++) bits |= (u32)votes[i] << i;
    return bits;
}

// mma.m16n8k16 on bf16 with f32 sums, as kernels/tensor.cu has it: the lanes put their fragments together, and each works out
// its own four values. Products are exact in f32; the device adds in an order of its own, here it is that of k.
inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    u32 as[32][4], bs[32][2];
    const u64* all = emulator::exchange(4, ~0u, (u64)a[1] << 32 | a[0]);
    for (int l = 0; l < 32; l++) as[l][0] = (u32)all[l], as[l][1] = (u32)(all[l] >> 32);
    all = emulator::exchange(5, ~0u, (u64)a[3] << 32 | a[2]);
    for (int l = 0; l < 32; l++) as[l][2] = (u32)all[l], as[l][3] = (u32)(all[l] >> 32);
    all = emulator::exchange(6, ~0u, (u64)b1 << 32 | b0);
    for (int l = 0; l < 32; l++) bs[l][0] = (u32)all[l], bs[l][1] = (u32)(all[l] >> 32);
    auto half = [](u32 both, u32 upper) { return of_bits<float>(upper ? both & 0xFFFF0000u : both << 16); };
    u32 lane = emulator::now.thread % 32;
    for (u32 i = 0; i < 4; i++) {
        u32 row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (u32 k = 0; k < 16; k++) {
            u32 of_a = as[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], of_b = bs[column * 4 + k % 8 / 2][k / 8];
            c[i] += half(of_a, k % 2) * half(of_b, k % 2);
        }
    }
}

// ldmatrix, four matrices of 8 × 8 values of 16 bits, as kernels/tensor.cu has it: the lanes say where the rows are.
inline void rows_of_lanes(u32 (&from)[32], u32 op, u32 at) {
    if (at % 4) emulator::fail("a row of a matrix at word %u, which is no multiple of 16 bytes", at);
    const u64* all = emulator::exchange(op, ~0u, at);
    for (int l = 0; l < 32; l++) from[l] = (u32)all[l];
}
inline void matrices(u32 (&out)[4], Shared<u32> x, u32 at, u32 flip, u32 add) {
    u32 lane = emulator::now.thread % 32, from[32];
    rows_of_lanes(from, 7, (at ^ flip) + add);
    for (u32 j = 0; j < 4; j++) out[j] = x[from[8 * j + lane / 4] + lane % 4];
}
inline void matrices_transposed(u32 (&out)[4], Shared<u32> x, u32 at, u32 flip, u32 add) {
    u32 lane = emulator::now.thread % 32, from[32];
    rows_of_lanes(from, 8, (at ^ flip) + add);
    auto half = [&](u32 j, u32 row, u32 column) { return (u32)x[from[8 * j + row] + column / 2] >> column % 2 * 16 & 0xFFFFu; };
    for (u32 j = 0; j < 4; j++) out[j] = half(j, lane % 4 * 2, lane / 4) | half(j, lane % 4 * 2 + 1, lane / 4) << 16;
}

namespace emulator {
// Words that a thread copies, until it waits for them; those of a launch that failed are forgotten.
struct Copies {
    u32 launch;
    std::vector<Shadow*> words;
};
inline Copies copies[1024];
} // namespace emulator

// cp.async, as kernels/tensor.cu has it. The words have their values at once, but whoever touches them before this thread
// waited is refused; the writing counts when it begins and when it ends.
template <u32 N, class T> void copy(Shared<T> to, u32 at, const In<T>& x, u64 from, bool there) {
    emulator::Copies& mine = emulator::copies[emulator::now.thread];
    if (mine.launch != emulator::now.launch) mine.launch = emulator::now.launch, mine.words.clear();
    if (at % N || (there && (uintptr_t)(x.p + from) % (4 * N))) emulator::fail("a copy of %u bytes that is not aligned", 4 * N);
    for (u32 i = 0; i < N; i++) {
        to[at + i] = there ? x[from + i] : T(0);
        to.s[at + i].pending = true;
        mine.words.push_back(to.s + at + i);
    }
}
inline void copied() {
    emulator::Copies& mine = emulator::copies[emulator::now.thread];
    if (mine.launch != emulator::now.launch) return;
    for (emulator::Shadow* s : mine.words) s->pending = false, emulator::touch(s, true, "shared");
    mine.words.clear();
}

template <class T> T atomicMin(T* p, T x) {
    T old = *p;
    if (x < old) *p = x;
    return old;
}
template <class T> T atomicExch(T* p, T x) {
    T old = *p;
    return *p = x, old;
}
template <class T> T atomicAdd(T* p, T x) {
    T old = *p;
    return *p = old + x, old;
}

inline u32 atomicInc(u32* p, u32 most) {
    u32 old = *p;
    return *p = old >= most ? 0 : old + 1, old;
}
inline void __threadfence() {}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __int2float_rn(i32 x) { return (float)x; }
inline u32 __float_as_uint(float x) { return of_bits<u32>(bits_of(x)); }
inline float __uint_as_float(u32 x) { return of_bits<float>(x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __ffs(u32 x) { return __builtin_ffs((int)x); }
using std::isfinite;
using std::isnan;

namespace emulator {

// What a kernel's parameter becomes: spans are checked against the allocations.
template <class A> A unpack(void* at) {
    static_assert(std::is_trivially_copyable<A>::value, "parameters are plain data");
    if constexpr (requires(A a) { a.shadows; a.n; }) {
        struct {
            uintptr_t p;
            u64 n;
        } raw;
        memcpy(&raw, at, sizeof raw);
        A a{};
        a.p = (decltype(a.p))raw.p, a.n = raw.n, a.shadows = nullptr;
        if (raw.n) {
            const Allocation* home = find(raw.p, raw.n * sizeof *a.p);
            if (!home) fail("an operand of %llu values outside every allocation", raw.n);
            a.shadows = home->shadows + (raw.p - home->start) / 4;
        }
        return a;
    } else {
        A a;
        memcpy((void*)&a, at, sizeof a);
        return a;
    }
}

// A kernel with its parameters, to be called by every thread.
struct Call {
    virtual void operator()() = 0;
    virtual ~Call() {}
};

template <class... A> struct CallOf : Call {
    void (*f)(A...);
    std::tuple<A...> args;
    CallOf(void (*f)(A...), std::tuple<A...> args) : f(f), args(args) {}
    void operator()() override { std::apply(f, args); }
};

template <class... A, size_t... I> Call* bind(void (*f)(A...), void** at, std::index_sequence<I...>) {
    return new CallOf<A...>(f, std::tuple<A...>{unpack<A>(at[I])...});
}

template <class... A> Call* bind(void (*f)(A...), void** at) { return bind(f, at, std::index_sequence_for<A...>{}); }

} // namespace emulator
