// Attention on tensor cores, for precision bf16: the same as in attention.cu, with factors of all products rounded to bf16
// and sums in f32. From sm_80 on; older devices have the plain kernels.
//
// A block is four warps and takes 64 rows: queries, or keys where the gradients of keys and values are gathered. A warp
// takes 16 of them, against tiles of rows of the other side. Scores stay in the fragments that the product leaves them in,
// which are those that the next product wants; only factors go through shared memory. Sums go in a fixed order.
#if defined(EMULATED) || __CUDA_ARCH__ >= 800

#define TENSOR_THREADS 128
#define ROWS 64
// Words of a row of a tile: two values each, and four more, so that no two threads of a warp meet in a bank.
#define WIDTH(D) (D / 2 + 4)

#ifndef EMULATED
// c[16, 8] += a[16, 16]·b[16, 8], by a warp. Of lane 4·g + t: c holds rows g and g + 8, columns 2t and 2t + 1; a rows g and
// g + 8, columns 2t and 2t + 1, then the same rows, columns 2t + 8 and 2t + 9; b rows 2t and 2t + 1 of column g, then rows
// 2t + 8 and 2t + 9. (PTX ISA, mma.m16n8k16.)
__device__ inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// Two values as bf16, ties to even; the first in the lower half.
__device__ inline u32 packed(float low, float high) {
#ifdef EMULATED
    return bf16(low) | bf16(high) << 16;
#else
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}

// Rows `from` to `from + R` of one head of one sample, `rows` of them there, as bf16; the rest is 0.
template <u32 R, u32 D>
__device__ void load_bf16(const Attend& a, const Matrix& m, const In<float>& x, u32 sample, u32 rows, u32 head, u32 from,
                          Shared<u32> tile) {
    for (u32 i = threadIdx.x; i < R * (D / 2); i += TENSOR_THREADS) {
        u32 r = i / (D / 2), d = i % (D / 2) * 2;
        bool there = from + r < rows;
        u64 at = place(a, m, sample * rows + from + r, head) + d;
        float low = there && d < a.head_dim ? x[at] : 0.0f, high = there && d + 1 < a.head_dim ? x[at + 1] : 0.0f;
        tile[r * WIDTH(D) + d / 2] = packed(low, high);
    }
}

// Scalar products of the warp's rows `row` and `row + 8` of x with 8·N rows of y.
template <u32 D, u32 N> __device__ void scores(Shared<u32> x, u32 row, Shared<u32> y, float (&s)[N][4]) {
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    UNROLL
    for (u32 n = 0; n < N; n++)
        UNROLL
        for (u32 i = 0; i < 4; i++) s[n][i] = 0.0f;
    UNROLL
    for (u32 k = 0; k < D / 16; k++) {
        u32 at = row * WIDTH(D) + 8 * k + t;
        u32 a[4] = {x[at], x[at + 8 * WIDTH(D)], x[at + 4], x[at + 8 * WIDTH(D) + 4]};
        UNROLL
        for (u32 n = 0; n < N; n++) {
            u32 b = (8 * n + g) * WIDTH(D) + 8 * k + t;
            mma(s[n], a, y[b], y[b + 4]);
        }
    }
}

// Rows r and r + 1 of a column.
template <u32 D> __device__ u32 column_pair(Shared<u32> y, u32 r, u32 d) {
    return __byte_perm(y[r * WIDTH(D) + d / 2], y[(r + 1) * WIDTH(D) + d / 2], d % 2 ? 0x7632 : 0x5410);
}

// sum[16, D] += p[16, 8·N]·y[8·N, D], p rounded.
template <u32 D, u32 N> __device__ void gather(const float (&p)[N][4], Shared<u32> y, float (&sum)[D / 8][4]) {
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    UNROLL
    for (u32 k = 0; k < N / 2; k++) {
        u32 a[4] = {packed(p[2 * k][0], p[2 * k][1]), packed(p[2 * k][2], p[2 * k][3]),
                    packed(p[2 * k + 1][0], p[2 * k + 1][1]), packed(p[2 * k + 1][2], p[2 * k + 1][3])};
        UNROLL
        for (u32 n = 0; n < D / 8; n++)
            mma(sum[n], a, column_pair<D>(y, 16 * k + 2 * t, 8 * n + g), column_pair<D>(y, 16 * k + 2 * t + 8, 8 * n + g));
    }
}

// Over the four lanes that hold a row.
__device__ inline float lanes_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}

__device__ inline float lanes_max(float x) {
    x = larger(x, __shfl_xor_sync(FULL, x, 1));
    return larger(x, __shfl_xor_sync(FULL, x, 2));
}

#define TENSOR_KEYS 32

template <u32 D>
__device__ void forward_bf16(const Attend& a, const In<float>& q, const In<float>& k, const In<float>& v, const In<i32>& lens,
                             const In<float>& temperature, const Out<float>& out, const Out<float>& lse) {
    const u32 N = TENSOR_KEYS / 8;
    SHARED(u32, qs, ROWS * WIDTH(D));
    SHARED(u32, ks, TENSOR_KEYS * WIDTH(D));
    SHARED(u32, vs, TENSOR_KEYS * WIDTH(D));
    u32 t = threadIdx.x % 4, row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    u32 from = blockIdx.x * ROWS, head = blockIdx.y, sample = blockIdx.z;
    u32 there = present(a, lens, sample), end = a.mask == CAUSAL && from + ROWS < there ? from + ROWS : there;
    float scale = scale_of(a, temperature);
    float o[D / 8][4], most[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    UNROLL
    for (u32 n = 0; n < D / 8; n++)
        UNROLL
        for (u32 i = 0; i < 4; i++) o[n][i] = 0.0f;
    load_bf16<ROWS, D>(a, a.q, q, sample, a.queries, head, from, qs);
    for (u32 first = 0; first < end; first += TENSOR_KEYS) {
        __syncthreads();
        load_bf16<TENSOR_KEYS, D>(a, a.k, k, sample, a.keys, head, first, ks);
        load_bf16<TENSOR_KEYS, D>(a, a.v, v, sample, a.keys, head, first, vs);
        __syncthreads();
        float s[N][4];
        scores<D, N>(qs, row, ks, s);
        UNROLL
        for (u32 h = 0; h < 2; h++) {
            u32 query = from + row + 8 * h;
            float now = -INFINITY, part = 0.0f;
            UNROLL
            for (u32 n = 0; n < N; n++)
                UNROLL
                for (u32 e = 0; e < 2; e++) {
                    float& x = s[n][2 * h + e];
                    x = sees(a, query, first + 8 * n + 2 * t + e, there) ? scale * x : -INFINITY;
                    now = larger(now, x);
                }
            now = larger(most[h], lanes_max(now));
            // What was gathered with another maximum; nothing was, where that is −∞.
            float correction = most[h] == -INFINITY ? 0.0f : expf(most[h] - now);
            UNROLL
            for (u32 n = 0; n < N; n++)
                UNROLL
                for (u32 e = 0; e < 2; e++) {
                    u32 key = first + 8 * n + 2 * t + e;
                    float& x = s[n][2 * h + e];
                    float p = 0.0f;
                    if (sees(a, query, key, there)) {
                        p = expf(x - now);
                        part += p;
                        p *= factor_of(a, sample, head, query, key);
                    }
                    x = p;
                }
            sum[h] = sum[h] * correction + lanes_sum(part);
            most[h] = now;
            UNROLL
            for (u32 n = 0; n < D / 8; n++) o[n][2 * h] *= correction, o[n][2 * h + 1] *= correction;
        }
        gather<D, N>(s, vs, o);
    }
    UNROLL
    for (u32 h = 0; h < 2; h++) {
        u32 query = from + row + 8 * h;
        if (query >= a.queries) continue;
        u64 at = ((u64)(sample * a.queries + query) * a.heads + head) * a.head_dim;
        UNROLL
        for (u32 n = 0; n < D / 8; n++)
            UNROLL
            for (u32 e = 0; e < 2; e++) {
                u32 d = 8 * n + 2 * t + e;
                if (d < a.head_dim) out[at + d] = sum[h] == 0.0f ? 0.0f : o[n][2 * h + e] / sum[h];
            }
        if (t == 0)
            lse[(u64)(sample * a.heads + head) * a.queries + query] = sum[h] == 0.0f ? -INFINITY : most[h] + logf(sum[h]);
    }
}

// dq of 64 queries, against T keys at a time; slopes[samples, heads, tiles] = Σ q·dq of them, where it is asked for.
template <u32 D, u32 T>
__device__ void backward_q_bf16(const Attend& a, const In<float>& q, const In<float>& k, const In<float>& v, const In<i32>& lens,
                                const In<float>& temperature, const In<float>& lse, const In<float>& delta,
                                const In<float>& dout, const Out<float>& dq, const Out<float>& slopes) {
    SHARED(u32, qs, ROWS * WIDTH(D));
    SHARED(u32, dos, ROWS * WIDTH(D));
    SHARED(u32, ks, T * WIDTH(D));
    SHARED(u32, vs, T * WIDTH(D));
    SHARED(float, room, TENSOR_THREADS / 32);
    u32 t = threadIdx.x % 4, row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    u32 from = blockIdx.x * ROWS, head = blockIdx.y, sample = blockIdx.z;
    u32 there = present(a, lens, sample), end = a.mask == CAUSAL && from + ROWS < there ? from + ROWS : there;
    float scale = scale_of(a, temperature);
    Matrix whole = {a.heads * a.head_dim, 0};
    float sum[D / 8][4], logs[2], means[2];
    UNROLL
    for (u32 n = 0; n < D / 8; n++)
        UNROLL
        for (u32 i = 0; i < 4; i++) sum[n][i] = 0.0f;
    UNROLL
    for (u32 h = 0; h < 2; h++) {
        u32 query = from + row + 8 * h;
        u64 at = (u64)(sample * a.heads + head) * a.queries + query;
        logs[h] = query < a.queries ? lse[at] : 0.0f, means[h] = query < a.queries ? delta[at] : 0.0f;
    }
    load_bf16<ROWS, D>(a, a.q, q, sample, a.queries, head, from, qs);
    load_bf16<ROWS, D>(a, whole, dout, sample, a.queries, head, from, dos);
    for (u32 first = 0; first < end; first += T) {
        __syncthreads();
        load_bf16<T, D>(a, a.k, k, sample, a.keys, head, first, ks);
        load_bf16<T, D>(a, a.v, v, sample, a.keys, head, first, vs);
        __syncthreads();
        float s[T / 8][4], ds[T / 8][4];
        scores<D, T / 8>(qs, row, ks, s);
        scores<D, T / 8>(dos, row, vs, ds);
        UNROLL
        for (u32 n = 0; n < T / 8; n++)
            UNROLL
            for (u32 i = 0; i < 4; i++) {
                u32 h = i / 2, query = from + row + 8 * h, key = first + 8 * n + 2 * t + i % 2;
                float slope = 0.0f;
                if (sees(a, query, key, there)) {
                    float weight = expf(scale * s[n][i] - logs[h]), factor = factor_of(a, sample, head, query, key);
                    slope = scale * (weight * (factor * ds[n][i] - means[h]));
                }
                ds[n][i] = slope;
            }
        gather<D, T / 8>(ds, ks, sum);
    }
    __syncthreads();
    float slope = 0.0f;
    UNROLL
    for (u32 h = 0; h < 2; h++) {
        u32 query = from + row + 8 * h;
        UNROLL
        for (u32 n = 0; n < D / 8; n++)
            UNROLL
            for (u32 e = 0; e < 2; e++) {
                u32 d = 8 * n + 2 * t + e;
                if (query >= a.queries || d >= a.head_dim) continue;
                float x = sum[n][2 * h + e];
                dq[place(a, a.dq, sample * a.queries + query, head) + d] = x;
                u32 both = qs[(row + 8 * h) * WIDTH(D) + d / 2];
                slope = fmaf(__uint_as_float(e ? both & 0xFFFF0000u : both << 16), x, slope);
            }
    }
    if (slopes.n == 0) return;
    slope = warp_sum(slope);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = slope;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (u32 w = 1; w < TENSOR_THREADS / 32; w++) slope += room[w];
    slopes[(u64)(sample * a.heads + head) * gridDim.x + blockIdx.x] = slope;
}

// dk and dv of 64 keys, against T queries at a time.
template <u32 D, u32 T>
__device__ void backward_kv_bf16(const Attend& a, const In<float>& q, const In<float>& k, const In<float>& v, const In<i32>& lens,
                                 const In<float>& temperature, const In<float>& lse, const In<float>& delta,
                                 const In<float>& dout, const Out<float>& dk, const Out<float>& dv) {
    SHARED(u32, ks, ROWS * WIDTH(D));
    SHARED(u32, vs, ROWS * WIDTH(D));
    SHARED(u32, qs, T * WIDTH(D));
    SHARED(u32, dos, T * WIDTH(D));
    SHARED(float, logs, T);
    SHARED(float, means, T);
    u32 t = threadIdx.x % 4, row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    u32 from = blockIdx.x * ROWS, head = blockIdx.y, sample = blockIdx.z;
    u32 there = present(a, lens, sample);
    float scale = scale_of(a, temperature);
    Matrix whole = {a.heads * a.head_dim, 0};
    float gk[D / 8][4], gv[D / 8][4];
    UNROLL
    for (u32 n = 0; n < D / 8; n++)
        UNROLL
        for (u32 i = 0; i < 4; i++) gk[n][i] = 0.0f, gv[n][i] = 0.0f;
    load_bf16<ROWS, D>(a, a.k, k, sample, a.keys, head, from, ks);
    load_bf16<ROWS, D>(a, a.v, v, sample, a.keys, head, from, vs);
    // No query sees padding; causal ones see no key behind them.
    u32 start = from >= there ? a.queries : a.mask == CAUSAL ? from : 0;
    for (u32 first = start; first < a.queries; first += T) {
        __syncthreads();
        load_bf16<T, D>(a, a.q, q, sample, a.queries, head, first, qs);
        load_bf16<T, D>(a, whole, dout, sample, a.queries, head, first, dos);
        if (threadIdx.x < T) {
            u64 at = (u64)(sample * a.heads + head) * a.queries + first + threadIdx.x;
            bool inside = first + threadIdx.x < a.queries;
            logs[threadIdx.x] = inside ? lse[at] : 0.0f, means[threadIdx.x] = inside ? delta[at] : 0.0f;
        }
        __syncthreads();
        float p[T / 8][4], ds[T / 8][4];
        scores<D, T / 8>(ks, row, qs, p);
        scores<D, T / 8>(vs, row, dos, ds);
        UNROLL
        for (u32 n = 0; n < T / 8; n++)
            UNROLL
            for (u32 i = 0; i < 4; i++) {
                u32 at = 8 * n + 2 * t + i % 2, query = first + at, key = from + row + 8 * (i / 2);
                float weight = 0.0f, slope = 0.0f;
                if (sees(a, query, key, there)) {
                    weight = expf(scale * p[n][i] - logs[at]);
                    float factor = factor_of(a, sample, head, query, key);
                    slope = scale * (weight * (factor * ds[n][i] - means[at]));
                    weight *= factor;
                }
                p[n][i] = weight, ds[n][i] = slope;
            }
        gather<D, T / 8>(p, dos, gv);
        gather<D, T / 8>(ds, qs, gk);
    }
    UNROLL
    for (u32 h = 0; h < 2; h++) {
        u32 key = from + row + 8 * h;
        UNROLL
        for (u32 n = 0; n < D / 8; n++)
            UNROLL
            for (u32 e = 0; e < 2; e++) {
                u32 d = 8 * n + 2 * t + e;
                if (key >= a.keys || d >= a.head_dim) continue;
                dk[place(a, a.dk, sample * a.keys + key, head) + d] = gk[n][2 * h + e];
                dv[place(a, a.dv, sample * a.keys + key, head) + d] = gv[n][2 * h + e];
            }
    }
}

KERNEL(TENSOR_THREADS, 3) attention_bf16_32(ATTENTION_PARAMETERS, Out<float> out, Out<float> lse) {
    forward_bf16<32>(a, q, k, v, lens, temperature, out, lse);
}
KERNEL(TENSOR_THREADS, 3) attention_bf16_64(ATTENTION_PARAMETERS, Out<float> out, Out<float> lse) {
    forward_bf16<64>(a, q, k, v, lens, temperature, out, lse);
}
KERNEL(TENSOR_THREADS, 3) attention_bf16_128(ATTENTION_PARAMETERS, Out<float> out, Out<float> lse) {
    forward_bf16<128>(a, q, k, v, lens, temperature, out, lse);
}
KERNEL(TENSOR_THREADS, 3) attention_dq_bf16_32(BACKWARD_PARAMETERS, Out<float> dq, Out<float> slopes) {
    backward_q_bf16<32, 32>(a, q, k, v, lens, temperature, lse, delta, dout, dq, slopes);
}
KERNEL(TENSOR_THREADS, 3) attention_dq_bf16_64(BACKWARD_PARAMETERS, Out<float> dq, Out<float> slopes) {
    backward_q_bf16<64, 32>(a, q, k, v, lens, temperature, lse, delta, dout, dq, slopes);
}
KERNEL(TENSOR_THREADS, 2) attention_dq_bf16_128(BACKWARD_PARAMETERS, Out<float> dq, Out<float> slopes) {
    backward_q_bf16<128, 16>(a, q, k, v, lens, temperature, lse, delta, dout, dq, slopes);
}
KERNEL(TENSOR_THREADS, 3) attention_dkv_bf16_32(BACKWARD_PARAMETERS, Out<float> dk, Out<float> dv) {
    backward_kv_bf16<32, 32>(a, q, k, v, lens, temperature, lse, delta, dout, dk, dv);
}
KERNEL(TENSOR_THREADS, 3) attention_dkv_bf16_64(BACKWARD_PARAMETERS, Out<float> dk, Out<float> dv) {
    backward_kv_bf16<64, 32>(a, q, k, v, lens, temperature, lse, delta, dout, dk, dv);
}
KERNEL(TENSOR_THREADS, 2) attention_dkv_bf16_128(BACKWARD_PARAMETERS, Out<float> dk, Out<float> dv) {
    backward_kv_bf16<128, 16>(a, q, k, v, lens, temperature, lse, delta, dout, dk, dv);
}

#endif
