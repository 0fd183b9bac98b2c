// Attention on tensor cores, for precision bf16: the same as in attention.cu, with factors of all products rounded to bf16
// and sums in f32. From sm_80 on; older devices have the plain kernels.
//
// A kernel before the others rounds what several blocks read, and gives every head of a sample rows of D values one after
// another, so that all widths, strides and columns are read in pieces of 16 bytes. A block is four warps, each of which keeps
// 16·M rows in registers: queries, or keys where the gradients of keys and values are gathered. Rows of the other side come
// through shared memory, T at a time, the next ones while the last are multiplied. Scores stay in the fragments that the
// product leaves them in, which are those that the next product wants. Sums go in a fixed order.
#if defined(EMULATED) || __CUDA_ARCH__ >= 800

#define TENSOR_THREADS 128
#define LOG2E 1.44269504f

#ifndef EMULATED
// c[16, 8] += a[16, 16]·b[16, 8], by a warp. Of lane 4·g + t: c holds rows g and g + 8, columns 2t and 2t + 1; a rows g and
// g + 8, columns 2t and 2t + 1, then the same rows, columns 2t + 8 and 2t + 9; b rows 2t and 2t + 1 of column g, then rows
// 2t + 8 and 2t + 9. (PTX ISA, mma.m16n8k16.)
__device__ inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 × 8 values, by a warp; lane 8·j + r says where row r of the j-th is: at word (at ^ flip) + add. Lane
// 4·g + t gets of each what lies at row g, columns 2t and 2t + 1, or, transposed, at rows 2t and 2t + 1 of column g.
__device__ inline u32 row_at(Shared<u32> x, u32 at, u32 flip, u32 add) {
    // Tiles begin at multiples of 256 bytes, more than `flip` changes: so one sum serves all flips.
    return ((u32)__cvta_generic_to_shared(x + at) ^ 4 * flip) + 4 * add;
}
__device__ inline void matrices(u32 (&out)[4], Shared<u32> x, u32 at, u32 flip, u32 add) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row_at(x, at, flip, add)));
}
__device__ inline void matrices_transposed(u32 (&out)[4], Shared<u32> x, u32 at, u32 flip, u32 add) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row_at(x, at, flip, add)));
}

// N words to shared memory, or zeros, at some time before this thread's next `copied`.
template <u32 N, class T> __device__ void copy(Shared<T> to, u32 at, const In<T>& x, u64 from, bool there) {
    u32 into = (u32)__cvta_generic_to_shared(to + at);
    if constexpr (N == 4)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(into), "l"(x.p + from), "r"(there ? 16 : 0) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(into), "l"(x.p + from), "r"(there ? 4 : 0) : "memory");
}
__device__ inline void copied() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#define TILES(name, n) __shared__ __align__(256) u32 name[n]
#else
#define TILES(name, n) SHARED(u32, name, n)
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

// 2^x, good to 2 units of f32; what becomes of it is rounded to bf16.
__device__ inline float power_of_2(float x) {
#ifdef EMULATED
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// The thread's index, read once more: what follows from it is not kept in registers until then.
__device__ inline u32 thread_again() {
#ifdef EMULATED
    return threadIdx.x;
#else
    u32 thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
#endif
}

// Columns d and d + 1, even ones, of a head's row that begins at `at`, as far as there are any.
__device__ inline void store(const Attend& a, const Out<float>& x, u64 at, u32 d, float low, float high) {
    if (d >= a.head_dim) return;
#ifndef EMULATED
    if (d + 1 < a.head_dim && (u64)(x.p + at) % 8 == 0) {
        *(float2*)(x.p + at + d) = float2{low, high};
        return;
    }
#endif
    x[at + d] = low;
    if (d + 1 < a.head_dim) x[at + d + 1] = high;
}

// Keys, values, and on the way back queries and gradients of the result lie behind each other, [samples, heads, rows, D] each:
// rows and heads of one, and where the rows of a head begin, in words (of which there are less than 2^32).
enum { KEYS_OF, VALUES, QUERIES, GRADS };
__device__ inline u32 rows_of(const Attend& a, u32 part) { return part < QUERIES ? a.keys : a.queries; }
__device__ inline u32 heads_of(const Attend& a, u32 part) { return part < QUERIES ? a.kv_heads : a.heads; }

__device__ inline u32 rounded_at(const Attend& a, u32 part, u32 samples, u32 sample, u32 head, u32 words) {
    u32 before = (part < QUERIES ? part : 2) * a.keys * a.kv_heads + (part == GRADS ? a.queries * a.heads : 0);
    return (before * samples + (sample * heads_of(a, part) + head) * rows_of(a, part)) * words;
}

#define ROUNDED_EACH 4

// A block takes a piece of a head of a sample of one operand; rows have 2^log words, what they have beyond a head is 0.
KERNEL(THREADS, 4) attention_bf16_round(Attend a, u32 log, In<float> k, In<float> v, In<float> q, In<float> dout, Out<u32> rounded) {
    // Heads of keys, of values, of queries, of gradients.
    u32 of_queries = blockIdx.z - 2 * a.kv_heads, sample = blockIdx.y;
    bool kv = blockIdx.z < 2 * a.kv_heads;
    u32 part = kv ? blockIdx.z / a.kv_heads : QUERIES + of_queries / a.heads, rows = rows_of(a, part);
    u32 head = kv ? blockIdx.z % a.kv_heads : of_queries % a.heads;
    In<float> x = part == KEYS_OF ? k : part == VALUES ? v : part == QUERIES ? q : dout;
    Matrix m = part == KEYS_OF ? a.k : part == VALUES ? a.v : part == QUERIES ? a.q : Matrix{a.heads * a.head_dim, 0};
    u32 to = rounded_at(a, part, gridDim.y, sample, head, 1u << log);
    u32 first = blockIdx.x * (THREADS * ROUNDED_EACH) + threadIdx.x;
    float low[ROUNDED_EACH], high[ROUNDED_EACH];
    UNROLL
    for (u32 u = 0; u < ROUNDED_EACH; u++) {
        u32 i = first + u * THREADS, r = i >> log, d = (i - (r << log)) * 2;
        u64 at = place(a, m, sample * rows + r, head) + d;
        low[u] = r < rows && d < a.head_dim ? x[at] : 0.0f;
        high[u] = r < rows && d + 1 < a.head_dim ? x[at + 1] : 0.0f;
    }
    UNROLL
    for (u32 u = 0; u < ROUNDED_EACH; u++) {
        u32 i = first + u * THREADS;
        if (i >> log < rows) rounded[to + i] = packed(low[u], high[u]);
    }
}

// Where 16 bytes of a row lie in shared memory: moved by the row, so that those of eight rows are in different banks.
template <u32 D> __device__ u32 moved(u32 row, u32 piece) {
    return row * (D / 2) + (piece ^ (D == 32 ? row / 2 % 4 : row % 8)) * 4;
}

// Rows `from` to `from + R` of those that begin at `at`, `rows` of them there; the rest is 0.
template <u32 R, u32 D>
__device__ void fetch(const In<u32>& rounded, u32 at, u32 rows, u32 from, Shared<u32> tile) {
    UNROLL
    for (u32 u = 0; u < R * (D / 8) / TENSOR_THREADS; u++) {
        u32 i = threadIdx.x + u * TENSOR_THREADS, r = i / (D / 8), piece = i % (D / 8);
        copy<4>(tile, moved<D>(r, piece), rounded, at + (from + r) * (D / 2) + piece * 4, from + r < rows);
    }
}

// The warp's own rows, from `row` on, as factors on the left; f gives values 2w and 2w + 1 of row r as bf16.
template <u32 D, u32 M, class F> __device__ void own(u32 rows, u32 row, u32 (&x)[M][D / 16][4], F f) {
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    UNROLL
    for (u32 m = 0; m < M; m++)
        UNROLL
        for (u32 k = 0; k < D / 16; k++)
            UNROLL
            for (u32 i = 0; i < 4; i++) {
                u32 r = row + 16 * m + g + i % 2 * 8;
                x[m][k][i] = r < rows ? f(r, 8 * k + t + i / 2 * 4) : 0u;
            }
}

// The same of rows that begin at `at` and were rounded before.
template <u32 D, u32 M> __device__ void own(const In<u32>& rounded, u32 at, u32 rows, u32 row, u32 (&x)[M][D / 16][4]) {
    own<D, M>(rows, row, x, [&](u32 r, u32 w) { return rounded[at + r * (D / 2) + w]; });
}

template <u32 M, u32 N> __device__ void clear(float (&x)[M][N][4]) {
    UNROLL
    for (u32 m = 0; m < M; m++)
        UNROLL
        for (u32 n = 0; n < N; n++)
            UNROLL
            for (u32 i = 0; i < 4; i++) x[m][n][i] = 0.0f;
}

// Scalar products of the warp's rows with 8·N rows of a tile, which begin at row `first` of it.
template <u32 D, u32 M, u32 N> __device__ void scores(const u32 (&x)[M][D / 16][4], Shared<u32> y, u32 first, float (&s)[M][N][4]) {
    u32 j = threadIdx.x % 32 / 8, at = first * (D / 2) + moved<D>(threadIdx.x % 8 + j / 2 * 8, j % 2);
    clear(s);
    UNROLL
    for (u32 k = 0; k < D / 16; k++)
        UNROLL
        for (u32 n = 0; n < N; n += 2) {
            u32 b[4];
            matrices(b, y, at, 8 * k, 8 * n * (D / 2));
            UNROLL
            for (u32 m = 0; m < M; m++) mma(s[m][n], x[m][k], b[0], b[1]), mma(s[m][n + 1], x[m][k], b[2], b[3]);
        }
}

// sum[16·M, D] += p[16·M, 8·N]·y[8·N, D], p rounded; rows of y from row `first` of the tile on.
template <u32 D, u32 M, u32 N>
__device__ void gather(const float (&p)[M][N][4], Shared<u32> y, u32 first, float (&sum)[M][D / 8][4]) {
    u32 j = threadIdx.x % 32 / 8, at = first * (D / 2) + moved<D>(threadIdx.x % 8 + j % 2 * 8, j / 2);
    UNROLL
    for (u32 k = 0; k < N / 2; k++) {
        u32 a[M][4];
        UNROLL
        for (u32 m = 0; m < M; m++)
            UNROLL
            for (u32 i = 0; i < 4; i++) a[m][i] = packed(p[m][2 * k + i / 2][i % 2 * 2], p[m][2 * k + i / 2][i % 2 * 2 + 1]);
        UNROLL
        for (u32 n = 0; n < D / 8; n += 2) {
            u32 b[4];
            matrices_transposed(b, y, at, 4 * n, 16 * k * (D / 2));
            UNROLL
            for (u32 m = 0; m < M; m++) mma(sum[m][n], a[m], b[0], b[1]), mma(sum[m][n + 1], a[m], b[2], b[3]);
        }
    }
}

// Over the four lanes that hold a row.
__device__ inline float lanes_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}

__device__ inline float lanes_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL, x, 2));
}

// Whether none of some queries sees one of some keys, and whether each sees all of them. Queries behind the last one, whose rows
// are 0, count as any other: nothing becomes of them. Of packed samples it is not asked in which text a query is.
__device__ inline bool none_sees(const Attend& a, u32 query, u32 queries, u32 key, u32 keys, u32 there) {
    return query >= a.queries || key >= there || (a.mask == CAUSAL && (key >= query + queries || key + keys + a.window <= query + 1));
}

__device__ inline bool all_see(const Attend& a, const In<i32>& starts, u32 query, u32 queries, u32 key, u32 keys, u32 there) {
    return key + keys <= there && !(a.mask == CAUSAL && (key + keys - 1 > query || key + a.window < query + queries)) &&
           !(a.mask == OTHERS && key < query + queries && query < key + keys) && starts.n == 0;
}

// Which weights of Q × K dropout takes: a bit for each, 32 keys in a word. A counter's four words serve four weights.
template <u32 Q, u32 K>
__device__ void dropped(const Attend& a, u32 sample, u32 head, u32 query, u32 key, Shared<u32> bits) {
    for (u32 i = threadIdx.x; i < Q * (K / 32); i += TENSOR_THREADS) {
        u32 element = (head * a.queries + query + i / (K / 32)) * a.keys + key + i % (K / 32) * 32;
        u64 found = 0;
        ROLLED
        for (u32 j = 0; j < 9; j++) {
            Quad words = quad(a.streams, sample, element / 4 + j);
            u32 four = 0;
            UNROLL
            for (u32 w = 0; w < 4; w++) four |= (words.w[w] < a.streams.threshold ? 1u : 0u) << w;
            found |= (u64)four << 4 * j;
        }
        bits[i] = (u32)(found >> element % 4);
    }
}

// The factor of scores in the exponent of 2; above 0, so that −∞ stays what it is.
__device__ inline float exponent_scale(const Attend& a, const In<float>& temperature) {
    return larger(1e-30f, scale_of(a, temperature) * LOG2E);
}

// A lane holds, of the 16·M rows of its warp, those that are m·16 + h·8 + lane / 4.
template <u32 D, u32 M, u32 T>
__device__ void forward_bf16(const Attend& a, const In<u32>& rounded, const In<i32>& lens, const In<i32>& starts, const In<float>& temperature,
                             const In<float>& queries, const Out<float>& out, const Out<float>& lse) {
    const u32 N = T / 8, ROWS = 64 * M, TILE = T * (D / 2);
    TILES(tiles, 4 * TILE);
    SHARED(u32, drops, 2 * ROWS * (T / 32));
    u32 t = threadIdx.x % 4, own_row = threadIdx.x / 32 * (16 * M), lane_row = own_row + threadIdx.x % 32 / 4;
    u32 head = blockIdx.x, sample = blockIdx.y, samples = gridDim.y;
    // Those with the most keys begin first.
    u32 from = (gridDim.z - 1 - blockIdx.z) * ROWS;
    u32 there = present(a, lens, sample), end = a.mask == CAUSAL && from + ROWS < there ? from + ROWS : there;
    u32 kv_head = head / a.group;
    u32 keys_at = rounded_at(a, KEYS_OF, samples, sample, kv_head, D / 2), values_at = rounded_at(a, VALUES, samples, sample, kv_head, D / 2);
    float scale = exponent_scale(a, temperature);
    u32 q[M][D / 16][4];
    float o[M][D / 8][4], most[M][2], sum[M][2];
    clear(o);
    UNROLL
    for (u32 m = 0; m < M; m++)
        UNROLL
        for (u32 h = 0; h < 2; h++) most[m][h] = -INFINITY, sum[m][h] = 0.0f;
    auto fetch_next = [&](u32 first, u32 turn) {
        Shared<u32> next = tiles + turn * (2 * TILE);
        fetch<T, D>(rounded, keys_at, there, first, next);
        fetch<T, D>(rounded, values_at, there, first, next + TILE);
        if (a.streams.threshold) dropped<ROWS, T>(a, sample, head, from, first, drops + turn * (ROWS * (T / 32)));
    };
    u32 begin = first_key<ROWS>(a, starts, sample, from);
    if (begin < end) fetch_next(begin, 0);
    // No other block reads them.
    own<D, M>(a.queries, from + own_row, q, [&](u32 r, u32 w) {
        u64 at = place(a, a.q, sample * a.queries + r, head) + 2 * w;
        return packed(2 * w < a.head_dim ? queries[at] : 0.0f, 2 * w + 1 < a.head_dim ? queries[at + 1] : 0.0f);
    });
    for (u32 first = begin, turn = 0; first < end; first += T, turn ^= 1) {
        copied();
        __syncthreads();
        if (first + T < end) fetch_next(first + T, turn ^ 1);
        if (none_sees(a, from + own_row, 16 * M, first, T, there)) continue;
        Shared<u32> ks = tiles + turn * (2 * TILE), vs = ks + TILE;
        float s[M][N][4];
        scores<D, M, N>(q, ks, 0, s);
        if (!all_see(a, starts, from + own_row, 16 * M, first, T, there)) {
            UNROLL
            for (u32 m = 0; m < M; m++)
                UNROLL
                for (u32 h = 0; h < 2; h++) {
                    u32 query = from + lane_row + 16 * m + 8 * h, start = start_of(a, starts, sample, query);
                    UNROLL
                    for (u32 n = 0; n < N; n++)
                        UNROLL
                        for (u32 e = 0; e < 2; e++)
                            if (!sees(a, query, first + 8 * n + 2 * t + e, start, there)) s[m][n][2 * h + e] = -INFINITY;
                }
        }
        UNROLL
        for (u32 m = 0; m < M; m++)
            UNROLL
            for (u32 h = 0; h < 2; h++) {
                float now = most[m][h];
                UNROLL
                for (u32 n = 0; n < N; n++) now = fmaxf(now, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                now = lanes_max(now);
                // Nothing was seen yet, where that is −∞.
                float shift = now == -INFINITY ? 0.0f : scale * now, correction = power_of_2(fmaf(scale, most[m][h], -shift));
                float part = 0.0f;
                UNROLL
                for (u32 n = 0; n < N; n++)
                    UNROLL
                    for (u32 e = 0; e < 2; e++) {
                        float& x = s[m][n][2 * h + e];
                        x = power_of_2(fmaf(scale, x, -shift));
                        part += x;
                    }
                sum[m][h] = fmaf(sum[m][h], correction, part);
                most[m][h] = now;
                UNROLL
                for (u32 n = 0; n < D / 8; n++) o[m][n][2 * h] *= correction, o[m][n][2 * h + 1] *= correction;
            }
        if (a.streams.threshold) {
            UNROLL
            for (u32 m = 0; m < M; m++)
                UNROLL
                for (u32 h = 0; h < 2; h++)
                    UNROLL
                    for (u32 w = 0; w < T / 32; w++) {
                        u32 bits = drops[(turn * ROWS + lane_row + 16 * m + 8 * h) * (T / 32) + w] >> 2 * t;
                        UNROLL
                        for (u32 i = 0; i < 8; i++)
                            if (bits >> (i / 2 * 8 + i % 2) & 1) s[m][4 * w + i / 2][2 * h + i % 2] = 0.0f;
                    }
        }
        gather<D, M, N>(s, vs, 0, o);
    }
    UNROLL
    for (u32 m = 0; m < M; m++)
        UNROLL
        for (u32 h = 0; h < 2; h++) {
            u32 query = from + lane_row + 16 * m + 8 * h;
            float total = lanes_sum(sum[m][h]), factor = total == 0.0f ? 0.0f : a.kept / total;
            if (query >= a.queries) continue;
            u64 at = ((u64)(sample * a.queries + query) * a.heads + head) * a.head_dim;
            UNROLL
            for (u32 n = 0; n < D / 8; n++) store(a, out, at, 8 * n + 2 * t, factor * o[m][n][2 * h], factor * o[m][n][2 * h + 1]);
            if (t == 0)
                lse[(u64)(sample * a.heads + head) * a.queries + query] =
                    total == 0.0f ? -INFINITY : fmaf(scale * most[m][h], 1.0f / LOG2E, logf(total));
        }
}

// dq of the warps' queries, against S keys of a tile at a time, and their delta, for the kernel of keys and values after this
// one; slopes[samples, heads, tiles] = Σ q·dq of a block, where it is asked for.
template <u32 D, u32 M, u32 T, u32 S>
__device__ void backward_q_bf16(const Attend& a, const In<u32>& rounded, const In<i32>& lens, const In<i32>& starts, const In<float>& temperature,
                                const In<float>& lse, const In<float>& out, const Out<float>& delta, const Out<float>& dq,
                                const Out<float>& slopes) {
    const u32 N = S / 8, ROWS = 64 * M, TILE = T * (D / 2);
    TILES(tiles, 4 * TILE);
    SHARED(u32, drops, 2 * ROWS * (T / 32));
    SHARED(float, room, TENSOR_THREADS / 32);
    u32 t = threadIdx.x % 4, own_row = threadIdx.x / 32 * (16 * M), lane_row = own_row + threadIdx.x % 32 / 4;
    u32 head = blockIdx.x, sample = blockIdx.y, samples = gridDim.y, block = gridDim.z - 1 - blockIdx.z, from = block * ROWS;
    u32 there = present(a, lens, sample), end = a.mask == CAUSAL && from + ROWS < there ? from + ROWS : there;
    u32 kv_head = head / a.group;
    u32 keys_at = rounded_at(a, KEYS_OF, samples, sample, kv_head, D / 2), values_at = rounded_at(a, VALUES, samples, sample, kv_head, D / 2);
    float scale = exponent_scale(a, temperature);
    u32 q[M][D / 16][4], dos[M][D / 16][4];
    float sum[M][D / 8][4], logs[M][2], means[M][2];
    clear(sum);
    auto fetch_next = [&](u32 first, u32 turn) {
        Shared<u32> next = tiles + turn * (2 * TILE);
        fetch<T, D>(rounded, keys_at, there, first, next);
        fetch<T, D>(rounded, values_at, there, first, next + TILE);
        if (a.streams.threshold) dropped<ROWS, T>(a, sample, head, from, first, drops + turn * (ROWS * (T / 32)));
    };
    u32 begin = first_key<ROWS>(a, starts, sample, from);
    if (begin < end) fetch_next(begin, 0);
    own<D, M>(rounded, rounded_at(a, QUERIES, samples, sample, head, D / 2), a.queries, from + own_row, q);
    own<D, M>(rounded, rounded_at(a, GRADS, samples, sample, head, D / 2), a.queries, from + own_row, dos);
    UNROLL
    for (u32 m = 0; m < M; m++)
        UNROLL
        for (u32 h = 0; h < 2; h++) {
            u32 query = from + lane_row + 16 * m + 8 * h;
            bool inside = query < a.queries;
            u64 at = (u64)(sample * a.heads + head) * a.queries + query;
            u64 out_at = ((u64)(sample * a.queries + query) * a.heads + head) * a.head_dim;
            float mean = 0.0f;
            UNROLL
            for (u32 n = 0; n < D / 8; n++) {
                u32 d = 8 * n + 2 * t, both = dos[m][n / 2][n % 2 * 2 + h];
                if (inside && d < a.head_dim) mean = fmaf(__uint_as_float(both << 16), out[out_at + d], mean);
                if (inside && d + 1 < a.head_dim) mean = fmaf(__uint_as_float(both & 0xFFFF0000u), out[out_at + d + 1], mean);
            }
            means[m][h] = lanes_sum(mean);
            logs[m][h] = inside ? LOG2E * lse[at] : 0.0f;
            if (inside && t == 0) delta[at] = means[m][h];
        }
    for (u32 first = begin, turn = 0; first < end; first += T, turn ^= 1) {
        copied();
        __syncthreads();
        if (first + T < end) fetch_next(first + T, turn ^ 1);
        Shared<u32> ks = tiles + turn * (2 * TILE), vs = ks + TILE;
        ROLLED
        for (u32 step = 0; step < T; step += S) {
            u32 key = first + step;
            if (none_sees(a, from + own_row, 16 * M, key, S, there)) continue;
            float s[M][N][4], ds[M][N][4];
            scores<D, M, N>(q, ks, step, s);
            scores<D, M, N>(dos, vs, step, ds);
            UNROLL
            for (u32 m = 0; m < M; m++)
                UNROLL
                for (u32 n = 0; n < N; n++)
                    UNROLL
                    for (u32 i = 0; i < 4; i++) s[m][n][i] = power_of_2(fmaf(scale, s[m][n][i], -logs[m][i / 2]));
            if (!all_see(a, starts, from + own_row, 16 * M, key, S, there)) {
                UNROLL
                for (u32 m = 0; m < M; m++)
                    UNROLL
                    for (u32 h = 0; h < 2; h++) {
                        u32 query = from + lane_row + 16 * m + 8 * h, start = start_of(a, starts, sample, query);
                        UNROLL
                        for (u32 n = 0; n < N; n++)
                            UNROLL
                            for (u32 e = 0; e < 2; e++)
                                if (!sees(a, query, key + 8 * n + 2 * t + e, start, there)) s[m][n][2 * h + e] = 0.0f;
                    }
            }
            if (a.streams.threshold) {
                UNROLL
                for (u32 m = 0; m < M; m++)
                    UNROLL
                    for (u32 h = 0; h < 2; h++) {
                        u32 bits = drops[(turn * ROWS + lane_row + 16 * m + 8 * h) * (T / 32) + step / 32] >> (step % 32 + 2 * t);
                        UNROLL
                        for (u32 i = 0; i < 2 * N; i++)
                            if (bits >> (i / 2 * 8 + i % 2) & 1) ds[m][i / 2][2 * h + i % 2] = 0.0f;
                    }
            }
            UNROLL
            for (u32 m = 0; m < M; m++)
                UNROLL
                for (u32 n = 0; n < N; n++)
                    UNROLL
                    for (u32 i = 0; i < 4; i++) s[m][n][i] *= fmaf(a.kept, ds[m][n][i], -means[m][i / 2]);
            gather<D, M, N>(s, ks, step, sum);
        }
    }
    float slope = 0.0f, factor = scale * (1.0f / LOG2E);
    UNROLL
    for (u32 m = 0; m < M; m++)
        UNROLL
        for (u32 h = 0; h < 2; h++) {
            u32 query = from + lane_row + 16 * m + 8 * h;
            if (query >= a.queries) continue;
            u64 at = place(a, a.dq, sample * a.queries + query, head);
            UNROLL
            for (u32 n = 0; n < D / 8; n++) {
                float low = factor * sum[m][n][2 * h], high = factor * sum[m][n][2 * h + 1];
                store(a, dq, at, 8 * n + 2 * t, low, high);
                u32 both = q[m][n / 2][n % 2 * 2 + h];
                slope = fmaf(__uint_as_float(both << 16), low, fmaf(__uint_as_float(both & 0xFFFF0000u), high, slope));
            }
        }
    if (slopes.n == 0) return;
    slope = warp_sum(slope);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = slope;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (u32 w = 1; w < TENSOR_THREADS / 32; w++) slope += room[w];
    slopes[(u64)(sample * a.heads + head) * gridDim.z + block] = slope;
}

// dk and dv of the warps' keys, against S queries of a tile at a time, of one head that reads these keys after another.
template <u32 D, u32 M, u32 T, u32 S>
__device__ void backward_kv_bf16(const Attend& a, const In<u32>& rounded, const In<i32>& lens, const In<i32>& starts, const In<float>& temperature,
                                 const In<float>& lse, const In<float>& delta, const Out<float>& dk, const Out<float>& dv) {
    const u32 N = S / 8, ROWS = 64 * M, TILE = T * (D / 2);
    TILES(tiles, 4 * TILE);
    SHARED(u32, drops, 2 * T * (ROWS / 32));
    // Of each query the logarithm and delta, and the first key of its text.
    SHARED(float, terms, 4 * T);
    SHARED(i32, begins, 2 * T);
    // Behind the last query that sees one of the keys; not in a register, of which there are none left.
    SHARED(u32, end, 1);
    u32 t = threadIdx.x % 4, own_row = threadIdx.x / 32 * (16 * M), lane_row = own_row + threadIdx.x % 32 / 4;
    u32 kv_head = blockIdx.x, sample = blockIdx.y, samples = gridDim.y, from = blockIdx.z * ROWS;
    u32 there = present(a, lens, sample);
    float scale = exponent_scale(a, temperature);
    u32 k[M][D / 16][4], v[M][D / 16][4];
    float gk[M][D / 8][4], gv[M][D / 8][4];
    clear(gk);
    clear(gv);
    auto fetch_next = [&](u32 head, u32 first, u32 turn) {
        Shared<u32> next = tiles + turn * (2 * TILE);
        fetch<T, D>(rounded, rounded_at(a, QUERIES, samples, sample, head, D / 2), a.queries, first, next);
        fetch<T, D>(rounded, rounded_at(a, GRADS, samples, sample, head, D / 2), a.queries, first, next + TILE);
        u32 query = first + threadIdx.x % T;
        u64 at = (u64)(sample * a.heads + head) * a.queries + query;
        if (threadIdx.x < T)
            copy<1>(terms, turn * (2 * T) + threadIdx.x, lse, at, query < a.queries);
        else if (threadIdx.x < 2 * T)
            copy<1>(terms, turn * (2 * T) + threadIdx.x, delta, at, query < a.queries);
        if (starts.n && threadIdx.x < T)
            copy<1>(begins, turn * T + threadIdx.x, starts, (u64)sample * a.queries + query, query < a.queries);
        if (a.streams.threshold) dropped<T, ROWS>(a, sample, head, first, from, drops + turn * (T * (ROWS / 32)));
    };
    // No query sees padding; causal ones see no key behind them.
    u32 start = a.mask == CAUSAL ? from : 0, last = 0;
    if (from < there) last = last_query(a, starts, sample, start, from + ROWS < there ? from + ROWS : there);
    if (threadIdx.x == 0) end[0] = last;
    __syncthreads();
    // Tiles of one head after another, in a fixed order; behind the last of them the head is none.
    auto next = [&](u32& head, u32& first) {
        first += T;
        if (first < end[0]) return;
        first = start, head++;
        if (head == (kv_head + 1) * a.group) head = a.heads;
    };
    u32 head = start < last ? kv_head * a.group : a.heads;
    if (head < a.heads) fetch_next(head, start, 0);
    own<D, M>(rounded, rounded_at(a, KEYS_OF, samples, sample, kv_head, D / 2), there, from + own_row, k);
    own<D, M>(rounded, rounded_at(a, VALUES, samples, sample, kv_head, D / 2), there, from + own_row, v);
    for (u32 first = start, turn = 0; head < a.heads; next(head, first), turn ^= 1) {
        copied();
        __syncthreads();
        u32 next_head = head, next_first = first;
        next(next_head, next_first);
        if (next_head < a.heads) fetch_next(next_head, next_first, turn ^ 1);
        Shared<u32> qs = tiles + turn * (2 * TILE), dos = qs + TILE;
        Shared<float> logs = terms + turn * (2 * T), means = logs + T;
        ROLLED
        for (u32 step = 0; step < T; step += S) {
            u32 query = first + step;
            if (none_sees(a, query, S, from + own_row, 16 * M, there)) continue;
            float p[M][N][4], ds[M][N][4];
            scores<D, M, N>(k, qs, step, p);
            scores<D, M, N>(v, dos, step, ds);
            UNROLL
            for (u32 n = 0; n < N; n++)
                UNROLL
                for (u32 e = 0; e < 2; e++) {
                    float log = LOG2E * logs[step + 8 * n + 2 * t + e];
                    UNROLL
                    for (u32 m = 0; m < M; m++)
                        UNROLL
                        for (u32 i = e; i < 4; i += 2) p[m][n][i] = power_of_2(fmaf(scale, p[m][n][i], -log));
                }
            if (!all_see(a, starts, query, S, from + own_row, 16 * M, there)) {
                u32 thread = thread_again(), lane_key = from + thread / 32 * (16 * M) + thread % 32 / 4;
                UNROLL
                for (u32 n = 0; n < N; n++)
                    UNROLL
                    for (u32 e = 0; e < 2; e++) {
                        u32 at = 8 * n + thread % 4 * 2 + e, begin = starts.n ? key_of(begins[turn * T + step + at]) : 0;
                        UNROLL
                        for (u32 m = 0; m < M; m++)
                            UNROLL
                            for (u32 i = e; i < 4; i += 2)
                                if (!sees(a, query + at, lane_key + 16 * m + i / 2 * 8, begin, there)) p[m][n][i] = 0.0f;
                    }
            }
            auto drop = [&](float (&x)[M][N][4]) {
                UNROLL
                for (u32 n = 0; n < N; n++)
                    UNROLL
                    for (u32 e = 0; e < 2; e++) {
                        u32 at = turn * T + step + 8 * n + 2 * t + e, bits = drops[at * (ROWS / 32) + own_row / 32] >> lane_row % 32;
                        UNROLL
                        for (u32 m = 0; m < M; m++)
                            UNROLL
                            for (u32 h = 0; h < 2; h++)
                                if (bits >> (16 * m + 8 * h) & 1) x[m][n][2 * h + e] = 0.0f;
                    }
            };
            if (a.streams.threshold) drop(ds);
            UNROLL
            for (u32 n = 0; n < N; n++)
                UNROLL
                for (u32 e = 0; e < 2; e++) {
                    float mean = means[step + 8 * n + 2 * t + e];
                    UNROLL
                    for (u32 m = 0; m < M; m++)
                        UNROLL
                        for (u32 i = e; i < 4; i += 2) ds[m][n][i] = p[m][n][i] * fmaf(a.kept, ds[m][n][i], -mean);
                }
            if (a.streams.threshold) drop(p);
            gather<D, M, N>(p, dos, step, gv);
            gather<D, M, N>(ds, qs, step, gk);
        }
    }
    float factor = scale * (1.0f / LOG2E);
    u32 thread = thread_again();
    UNROLL
    for (u32 m = 0; m < M; m++)
        UNROLL
        for (u32 h = 0; h < 2; h++) {
            u32 key = from + thread / 32 * (16 * M) + thread % 32 / 4 + 16 * m + 8 * h;
            if (key >= a.keys) continue;
            u64 dk_at = place(a, a.dk, sample * a.keys + key, kv_head), dv_at = place(a, a.dv, sample * a.keys + key, kv_head);
            UNROLL
            for (u32 n = 0; n < D / 8; n++) {
                store(a, dk, dk_at, 8 * n + 2 * t, factor * gk[m][n][2 * h], factor * gk[m][n][2 * h + 1]);
                store(a, dv, dv_at, 8 * n + 2 * t, a.kept * gv[m][n][2 * h], a.kept * gv[m][n][2 * h + 1]);
            }
        }
}

#define TENSOR_PARAMETERS Attend a, In<u32> rounded, In<i32> lens, In<i32> starts, In<float> temperature
#define TENSOR_BACKWARD TENSOR_PARAMETERS, In<float> lse

// Rows of a block are 64·M, as `Tensor` of nn.rs has them.
KERNEL(TENSOR_THREADS, 2) attention_bf16_32(TENSOR_PARAMETERS, In<float> q, Out<float> out, Out<float> lse) {
    forward_bf16<32, 2, 64>(a, rounded, lens, starts, temperature, q, out, lse);
}
KERNEL(TENSOR_THREADS, 2) attention_bf16_64(TENSOR_PARAMETERS, In<float> q, Out<float> out, Out<float> lse) {
    forward_bf16<64, 2, 64>(a, rounded, lens, starts, temperature, q, out, lse);
}
KERNEL(TENSOR_THREADS, 2) attention_bf16_128(TENSOR_PARAMETERS, In<float> q, Out<float> out, Out<float> lse) {
    forward_bf16<128, 1, 32>(a, rounded, lens, starts, temperature, q, out, lse);
}
KERNEL(TENSOR_THREADS, 2) attention_dq_bf16_32(TENSOR_BACKWARD, In<float> out, Out<float> delta, Out<float> dq, Out<float> slopes) {
    backward_q_bf16<32, 2, 64, 32>(a, rounded, lens, starts, temperature, lse, out, delta, dq, slopes);
}
KERNEL(TENSOR_THREADS, 2) attention_dq_bf16_64(TENSOR_BACKWARD, In<float> out, Out<float> delta, Out<float> dq, Out<float> slopes) {
    backward_q_bf16<64, 2, 64, 16>(a, rounded, lens, starts, temperature, lse, out, delta, dq, slopes);
}
KERNEL(TENSOR_THREADS, 2) attention_dq_bf16_128(TENSOR_BACKWARD, In<float> out, Out<float> delta, Out<float> dq, Out<float> slopes) {
    backward_q_bf16<128, 1, 32, 16>(a, rounded, lens, starts, temperature, lse, out, delta, dq, slopes);
}
KERNEL(TENSOR_THREADS, 3) attention_dkv_bf16_32(TENSOR_BACKWARD, In<float> delta, Out<float> dk, Out<float> dv) {
    backward_kv_bf16<32, 2, 64, 16>(a, rounded, lens, starts, temperature, lse, delta, dk, dv);
}
KERNEL(TENSOR_THREADS, 2) attention_dkv_bf16_64(TENSOR_BACKWARD, In<float> delta, Out<float> dk, Out<float> dv) {
    backward_kv_bf16<64, 2, 64, 16>(a, rounded, lens, starts, temperature, lse, delta, dk, dv);
}
KERNEL(TENSOR_THREADS, 2) attention_dkv_bf16_128(TENSOR_BACKWARD, In<float> delta, Out<float> dk, Out<float> dv) {
    backward_kv_bf16<128, 1, 32, 16>(a, rounded, lens, starts, temperature, lse, delta, dk, dv);
}

#endif
