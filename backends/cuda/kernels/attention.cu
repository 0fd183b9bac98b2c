// Multi-head attention by tiles. No array of queries × keys exists outside a tile: the logarithm of
// the softmax's denominator is kept for the way back, where scores are computed again.
//
// A block is 16 × 16 threads, each of which computes every 16th row and column of a tile. The idea,
// for one tile of Q queries of one head of one sample (grid: tiles, heads, samples):
//
//   forward
//     q[Q] -> shared memory, once
//     o[Q] = 0, most[Q] = -inf, sum[Q] = 0                 in registers
//     for each tile of keys that one of the queries sees:
//       k -> shared memory
//       s = scale·q·k                                      in registers; 16 threads have a row
//       now = max(most, max of s), c = exp(most - now)     shuffles within those 16
//       p = exp(s - now)
//       sum = c·sum + Σ p, o = c·o, most = now             what was gathered, by the new maximum
//       p·factor -> shared memory; v -> shared memory, over k
//       o += p·v
//     out = o/sum, lse = most + ln(sum)
//
//   backward, after delta = dout·out of every row
//     s and dp = dout·v of a tile again, p = exp(s - lse), ds = scale·p·(factor·dp - delta)
//     backward_q    a block a tile of queries, over all keys:     dq = Σ ds·k
//     backward_kv   a block a tile of keys, over all queries:     dk = Σ ds·q, dv = Σ p·factor·dout
//                   of every head of queries that reads these keys, one head after another
//
// Where the width of heads leaves no room for four tiles at a time, the way back has two: q and k for the scores, then dout and
// v over them, and then once more what the sums want.
//
// The way back has two kernels, each of which computes the scores, so that every sum belongs to one
// block and has a fixed order; a single one would add to dq from many blocks at a time.
//
// What the code adds: masks, windows, padding and packed samples (a pair that is not seen has p = 0,
// tiles before the first one and behind the last one of which something is seen are left out, a row
// that sees nothing has out = 0 and lse = -inf); dropout (factor 0 or
// 1/(1-rate), drawn again from its place); the temperature (its gradient Σ q·dq, a part from each
// block); heads narrower than their tile (the rest is 0); rows of D + 1 words in shared memory, so
// that threads that read a column meet in different banks.

enum { FULL_MASK = 0, CAUSAL = 1, OTHERS = 2 };

// With CAUSAL a query sees `window` keys, its own the last of them; where there is no window it is
// wider than the sample. `group` heads of queries read one head of keys and values.
struct Attend {
    u32 heads, kv_heads, group, head_dim, queries, keys, mask, window;
    float scale, kept;
    Streams streams;
    Matrix q, k, v, dq, dk, dv;
};

// Place of a row's head.
__device__ inline u64 place(const Attend& a, const Matrix& m, u32 row, u32 head) {
    return (u64)row * m.stride + m.at + head * a.head_dim;
}

// Keys of a sample that are not padding.
__device__ inline u32 present(const Attend& a, const In<i32>& lens, u32 sample) {
    if (lens.n == 0) return a.keys;
    i32 n = lens[sample];
    return n < 0 ? 0 : (u32)n < a.keys ? (u32)n : a.keys;
}

// No key is before the first.
__device__ inline u32 key_of(i32 start) { return start < 0 ? 0 : (u32)start; }

// The first key of a query's text, in a packed sample.
__device__ inline u32 start_of(const Attend& a, const In<i32>& starts, u32 sample, u32 query) {
    if (starts.n == 0 || query >= a.queries) return 0;
    return key_of(starts[sample * a.queries + query]);
}

// `start` is that of the query.
__device__ inline bool sees(const Attend& a, u32 query, u32 key, u32 start, u32 there) {
    return query < a.queries && key < there && key >= start && !(a.mask == CAUSAL && (key > query || key + a.window <= query)) &&
           !(a.mask == OTHERS && key == query);
}

// No one of Q queries sees a key before this one. Every warp finds it by itself.
template <u32 Q> __device__ u32 first_key(const Attend& a, const In<i32>& starts, u32 sample, u32 from) {
    u32 first = a.mask == CAUSAL && from >= a.window ? from + 1 - a.window : 0;
    if (starts.n == 0) return first;
    u32 least = FULL;
    for (u32 i = from + threadIdx.x % 32; i < from + Q && i < a.queries; i += 32) {
        u32 start = start_of(a, starts, sample, i);
        least = start < least ? start : least;
    }
    for (int d = 16; d > 0; d /= 2) {
        u32 other = __shfl_xor_sync(FULL, least, d);
        least = other < least ? other : least;
    }
    return least > first ? least : first;
}

// Queries from `first` on of which some may see one of the keys from `from` to `to`, up to the end: that of the window, and in
// a packed sample behind the last query whose text begins before `to`. Every warp finds it by itself.
__device__ inline u32 last_query(const Attend& a, const In<i32>& starts, u32 sample, u32 first, u32 to) {
    u32 end = a.mask == CAUSAL && to - 1 + a.window < a.queries ? to - 1 + a.window : a.queries;
    if (starts.n == 0) return end;
    for (u32 lane = threadIdx.x % 32; end > first; end = end > 32 ? end - 32 : 0) {
        u32 votes = __ballot_sync(FULL, lane < end && start_of(a, starts, sample, end - 1 - lane) < to);
        if (votes) return end - (__ffs((int)votes) - 1);
    }
    return end;
}

// The factor of dropout of one weight.
__device__ inline float factor_of(const Attend& a, u32 sample, u32 head, u32 query, u32 key) {
    if (a.streams.threshold == 0) return a.kept;
    u32 element = (head * a.queries + query) * a.keys + key;
    Quad words = quad(a.streams, sample, element / 4);
    u32 i = element % 4, word = i == 0 ? words.w[0] : i == 1 ? words.w[1] : i == 2 ? words.w[2] : words.w[3];
    return word < a.streams.threshold ? 0.0f : a.kept;
}

__device__ inline float scale_of(const Attend& a, const In<float>& temperature) {
    return temperature.n ? expf(temperature[0]) : a.scale;
}

// Rows `from` to `from + R` of one head of one sample, `rows` of them there, into tile[R][D + 1]; the rest is 0.
template <u32 R, u32 D>
__device__ void load(const Attend& a, const Matrix& m, const In<float>& x, u32 sample, u32 rows, u32 head, u32 from, Shared<float> tile) {
    for (u32 i = threadIdx.x; i < R * D; i += THREADS) {
        u32 r = i / D, d = i % D;
        bool there = from + r < rows && d < a.head_dim;
        tile[r * (D + 1) + d] = there ? x[place(a, m, sample * rows + from + r, head) + d] : 0.0f;
    }
}

// Over the 16 threads of a row of the tile.
__device__ inline float row_sum(float x) {
    for (int d = 8; d > 0; d /= 2) x += __shfl_xor_sync(FULL, x, d);
    return x;
}

__device__ inline float row_max(float x) {
    for (int d = 8; d > 0; d /= 2) x = larger(x, __shfl_xor_sync(FULL, x, d));
    return x;
}

// Scalar products of rows ty + 16·i of one tile and rows tx + 16·j of another.
template <u32 I, u32 J, u32 D> __device__ void products(Shared<float> x, Shared<float> y, float (&s)[I][J]) {
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    UNROLL
    for (u32 i = 0; i < I; i++)
        UNROLL
        for (u32 j = 0; j < J; j++) s[i][j] = 0.0f;
    for (u32 d = 0; d < D; d++) {
        float xs[I], ys[J];
        UNROLL
        for (u32 i = 0; i < I; i++) xs[i] = x[(ty + 16 * i) * (D + 1) + d];
        UNROLL
        for (u32 j = 0; j < J; j++) ys[j] = y[(tx + 16 * j) * (D + 1) + d];
        UNROLL
        for (u32 i = 0; i < I; i++)
            UNROLL
            for (u32 j = 0; j < J; j++) s[i][j] = fmaf(xs[i], ys[j], s[i][j]);
    }
}

// Q queries a block, KEYS keys at a time, D at least the width of a head.
template <u32 Q, u32 D, u32 KEYS = 32>
__device__ void forward(const Attend& a, const In<float>& q, const In<float>& k, const In<float>& v, const In<i32>& lens,
                        const In<i32>& starts, const In<float>& temperature, const Out<float>& out, const Out<float>& lse) {
    const u32 I = Q / 16, J = KEYS / 16, C = D / 16;
    SHARED(float, qs, Q * (D + 1));
    // Keys, then values.
    SHARED(float, kv, KEYS * (D + 1));
    SHARED(float, ps, Q * (KEYS + 1));
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16, from = blockIdx.x * Q, head = blockIdx.y, sample = blockIdx.z;
    u32 there = present(a, lens, sample), end = a.mask == CAUSAL && from + Q < there ? from + Q : there;
    u32 kv_head = head / a.group, starts_at[I];
    float scale = scale_of(a, temperature);
    float o[I][C], most[I], sum[I];
    UNROLL
    for (u32 i = 0; i < I; i++) {
        most[i] = -INFINITY, sum[i] = 0.0f, starts_at[i] = start_of(a, starts, sample, from + ty + 16 * i);
        UNROLL
        for (u32 c = 0; c < C; c++) o[i][c] = 0.0f;
    }
    load<Q, D>(a, a.q, q, sample, a.queries, head, from, qs);
    for (u32 first = first_key<Q>(a, starts, sample, from); first < end; first += KEYS) {
        __syncthreads();
        load<KEYS, D>(a, a.k, k, sample, a.keys, kv_head, first, kv);
        __syncthreads();
        float s[I][J];
        products<I, J, D>(qs, kv, s);
        UNROLL
        for (u32 i = 0; i < I; i++) {
            u32 query = from + ty + 16 * i;
            float now = -INFINITY, part = 0.0f;
            UNROLL
            for (u32 j = 0; j < J; j++) {
                s[i][j] = sees(a, query, first + tx + 16 * j, starts_at[i], there) ? scale * s[i][j] : -INFINITY;
                now = larger(now, s[i][j]);
            }
            now = larger(most[i], row_max(now));
            // What was gathered with another maximum; nothing was, where that is −∞.
            float correction = most[i] == -INFINITY ? 0.0f : expf(most[i] - now);
            UNROLL
            for (u32 j = 0; j < J; j++) {
                u32 key = first + tx + 16 * j;
                float p = 0.0f;
                if (sees(a, query, key, starts_at[i], there)) {
                    p = expf(s[i][j] - now);
                    part += p;
                    p *= factor_of(a, sample, head, query, key);
                }
                ps[(ty + 16 * i) * (KEYS + 1) + tx + 16 * j] = p;
            }
            sum[i] = sum[i] * correction + row_sum(part);
            most[i] = now;
            UNROLL
            for (u32 c = 0; c < C; c++) o[i][c] *= correction;
        }
        __syncthreads();
        load<KEYS, D>(a, a.v, v, sample, a.keys, kv_head, first, kv);
        __syncthreads();
        for (u32 key = 0; key < KEYS; key++) {
            float vs[C];
            UNROLL
            for (u32 c = 0; c < C; c++) vs[c] = kv[key * (D + 1) + tx + 16 * c];
            UNROLL
            for (u32 i = 0; i < I; i++) {
                float p = ps[(ty + 16 * i) * (KEYS + 1) + key];
                UNROLL
                for (u32 c = 0; c < C; c++) o[i][c] = fmaf(p, vs[c], o[i][c]);
            }
        }
    }
    UNROLL
    for (u32 i = 0; i < I; i++) {
        u32 query = from + ty + 16 * i;
        if (query >= a.queries) continue;
        u64 at = ((u64)(sample * a.queries + query) * a.heads + head) * a.head_dim;
        UNROLL
        for (u32 c = 0; c < C; c++) {
            u32 d = tx + 16 * c;
            if (d < a.head_dim) out[at + d] = sum[i] == 0.0f ? 0.0f : o[i][c] / sum[i];
        }
        if (tx == 0)
            lse[(u64)(sample * a.heads + head) * a.queries + query] = sum[i] == 0.0f ? -INFINITY : most[i] + logf(sum[i]);
    }
}

// delta[samples, heads, queries] = dout·out; a warp a row of a head.
KERNEL(THREADS, 4) attention_delta(Attend a, u32 samples, In<float> out, In<float> dout, Out<float> delta) {
    u32 lane = threadIdx.x % 32, i = blockIdx.x * WARPS + threadIdx.x / 32;
    if (i >= samples * a.queries * a.heads) return;
    u32 head = i % a.heads, query = i / a.heads % a.queries, sample = i / a.heads / a.queries;
    float sum = 0.0f;
    for (u32 d = lane; d < a.head_dim; d += 32) sum = fmaf(out[(u64)i * a.head_dim + d], dout[(u64)i * a.head_dim + d], sum);
    sum = warp_sum(sum);
    if (lane == 0) delta[(u64)(sample * a.heads + head) * a.queries + query] = sum;
}

// Whether the way back has room for four tiles of rows D wide at a time.
#define FOUR_TILES(D) ((D) <= 128)

// One tile of the way back, T queries by T keys: p·factor and scale·ds of this thread's pairs. `turn` puts dout and v into
// shared memory, where they are not there yet.
template <u32 T, u32 D, class F>
__device__ void tile(const Attend& a, float scale, u32 sample, u32 head, u32 first_query, u32 first_key, u32 there, const In<i32>& starts, const In<float>& lse,
                     const In<float>& delta, Shared<float> qs, Shared<float> ks, Shared<float> vs, Shared<float> dos, F turn,
                     float (&p)[T / 16][T / 16], float (&ds)[T / 16][T / 16]) {
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    products<T / 16, T / 16, D>(qs, ks, p);
    turn();
    products<T / 16, T / 16, D>(dos, vs, ds);
    UNROLL
    for (u32 i = 0; i < T / 16; i++) {
        u32 query = first_query + ty + 16 * i, start = start_of(a, starts, sample, query);
        UNROLL
        for (u32 j = 0; j < T / 16; j++) {
            u32 key = first_key + tx + 16 * j;
            if (!sees(a, query, key, start, there)) {
                p[i][j] = 0.0f, ds[i][j] = 0.0f;
                continue;
            }
            u64 row = (u64)(sample * a.heads + head) * a.queries + query;
            float weight = expf(scale * p[i][j] - lse[row]), factor = factor_of(a, sample, head, query, key);
            ds[i][j] = scale * (weight * (factor * ds[i][j] - delta[row]));
            p[i][j] = weight * factor;
        }
    }
}

// dq of T queries; slopes[samples, heads, tiles] = Σ q·dq of them, where it is asked for.
template <u32 T, u32 D>
__device__ void backward_q(const Attend& a, const In<float>& q, const In<float>& k, const In<float>& v, const In<i32>& lens,
                           const In<i32>& starts, const In<float>& temperature, const In<float>& lse, const In<float>& delta,
                           const In<float>& dout, const Out<float>& dq, const Out<float>& slopes) {
    const u32 I = T / 16, C = D / 16;
    const bool FOUR = FOUR_TILES(D);
    const u32 TILE = T * (D + 1);
    SHARED(float, tiles, (FOUR ? 4 : 2) * TILE);
    Shared<float> qs = tiles, ks = tiles + TILE, dos = FOUR ? tiles + 2 * TILE : qs, vs = FOUR ? tiles + 3 * TILE : ks;
    SHARED(float, dss, T * (T + 1));
    SHARED(float, room, WARPS);
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16, from = blockIdx.x * T, head = blockIdx.y, sample = blockIdx.z;
    u32 there = present(a, lens, sample), end = a.mask == CAUSAL && from + T < there ? from + T : there, kv_head = head / a.group;
    float scale = scale_of(a, temperature);
    Matrix whole = {a.heads * a.head_dim, 0};
    float g[I][C];
    UNROLL
    for (u32 i = 0; i < I; i++)
        UNROLL
        for (u32 c = 0; c < C; c++) g[i][c] = 0.0f;
    if (FOUR) {
        load<T, D>(a, a.q, q, sample, a.queries, head, from, qs);
        load<T, D>(a, whole, dout, sample, a.queries, head, from, dos);
    }
    for (u32 first = first_key<T>(a, starts, sample, from); first < end; first += T) {
        __syncthreads();
        if (!FOUR) load<T, D>(a, a.q, q, sample, a.queries, head, from, qs);
        load<T, D>(a, a.k, k, sample, a.keys, kv_head, first, ks);
        if (FOUR) load<T, D>(a, a.v, v, sample, a.keys, kv_head, first, vs);
        __syncthreads();
        auto turn = [&] {
            if (FOUR) return;
            __syncthreads();
            load<T, D>(a, whole, dout, sample, a.queries, head, from, dos);
            load<T, D>(a, a.v, v, sample, a.keys, kv_head, first, vs);
            __syncthreads();
        };
        float p[I][I], ds[I][I];
        tile<T, D>(a, scale, sample, head, from, first, there, starts, lse, delta, qs, ks, vs, dos, turn, p, ds);
        UNROLL
        for (u32 i = 0; i < I; i++)
            UNROLL
            for (u32 j = 0; j < I; j++) dss[(ty + 16 * i) * (T + 1) + tx + 16 * j] = ds[i][j];
        __syncthreads();
        if (!FOUR) {
            load<T, D>(a, a.k, k, sample, a.keys, kv_head, first, ks);
            __syncthreads();
        }
        for (u32 key = 0; key < T; key++) {
            UNROLL
            for (u32 i = 0; i < I; i++) {
                float x = dss[(ty + 16 * i) * (T + 1) + key];
                UNROLL
                for (u32 c = 0; c < C; c++) g[i][c] = fmaf(x, ks[key * (D + 1) + tx + 16 * c], g[i][c]);
            }
        }
    }
    __syncthreads();
    if (!FOUR && slopes.n) {
        load<T, D>(a, a.q, q, sample, a.queries, head, from, qs);
        __syncthreads();
    }
    float slope = 0.0f;
    UNROLL
    for (u32 i = 0; i < I; i++) {
        u32 query = from + ty + 16 * i;
        UNROLL
        for (u32 c = 0; c < C; c++) {
            u32 d = tx + 16 * c;
            if (query >= a.queries || d >= a.head_dim) continue;
            dq[place(a, a.dq, sample * a.queries + query, head) + d] = g[i][c];
            if (slopes.n) slope = fmaf(qs[(ty + 16 * i) * (D + 1) + d], g[i][c], slope);
        }
    }
    if (slopes.n == 0) return;
    slope = block_sum<float>(slope, room);
    if (threadIdx.x == 0) slopes[(u64)(sample * a.heads + head) * gridDim.x + blockIdx.x] = slope;
}

// dk and dv of T keys of one head of keys.
template <u32 T, u32 D>
__device__ void backward_kv(const Attend& a, const In<float>& q, const In<float>& k, const In<float>& v, const In<i32>& lens,
                            const In<i32>& starts, const In<float>& temperature, const In<float>& lse, const In<float>& delta,
                            const In<float>& dout, const Out<float>& dk, const Out<float>& dv) {
    const u32 I = T / 16, C = D / 16;
    const bool FOUR = FOUR_TILES(D);
    const u32 TILE = T * (D + 1);
    SHARED(float, tiles, (FOUR ? 4 : 2) * TILE);
    Shared<float> qs = tiles, ks = tiles + TILE, dos = FOUR ? tiles + 2 * TILE : qs, vs = FOUR ? tiles + 3 * TILE : ks;
    SHARED(float, dss, T * (T + 1));
    SHARED(float, ps, T * (T + 1));
    // What the sums of dk want: over v, where there are two tiles.
    Shared<float> queries = FOUR ? qs : ks;
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16, from = blockIdx.x * T, kv_head = blockIdx.y, sample = blockIdx.z;
    u32 there = present(a, lens, sample);
    float scale = scale_of(a, temperature);
    Matrix whole = {a.heads * a.head_dim, 0};
    float gk[I][C], gv[I][C];
    UNROLL
    for (u32 i = 0; i < I; i++)
        UNROLL
        for (u32 c = 0; c < C; c++) gk[i][c] = 0.0f, gv[i][c] = 0.0f;
    if (FOUR) {
        load<T, D>(a, a.k, k, sample, a.keys, kv_head, from, ks);
        load<T, D>(a, a.v, v, sample, a.keys, kv_head, from, vs);
    }
    // No query sees padding; causal ones see no key behind them.
    u32 start = from >= there ? a.queries : a.mask == CAUSAL ? from : 0;
    u32 end = last_query(a, starts, sample, start, from + T < there ? from + T : there);
    // One head after another, in a fixed order.
    for (u32 head = kv_head * a.group, head_end = head + a.group; head < head_end; head++) {
        for (u32 first = start; first < end; first += T) {
            __syncthreads();
            load<T, D>(a, a.q, q, sample, a.queries, head, first, qs);
            if (FOUR) load<T, D>(a, whole, dout, sample, a.queries, head, first, dos);
            if (!FOUR) load<T, D>(a, a.k, k, sample, a.keys, kv_head, from, ks);
            __syncthreads();
            auto turn = [&] {
                if (FOUR) return;
                __syncthreads();
                load<T, D>(a, whole, dout, sample, a.queries, head, first, dos);
                load<T, D>(a, a.v, v, sample, a.keys, kv_head, from, vs);
                __syncthreads();
            };
            float p[I][I], ds[I][I];
            tile<T, D>(a, scale, sample, head, first, from, there, starts, lse, delta, qs, ks, vs, dos, turn, p, ds);
            UNROLL
            for (u32 i = 0; i < I; i++) {
                UNROLL
                for (u32 j = 0; j < I; j++) {
                    u32 at = (ty + 16 * i) * (T + 1) + tx + 16 * j;
                    ps[at] = p[i][j], dss[at] = ds[i][j];
                }
            }
            if (!FOUR) {
                __syncthreads();
                load<T, D>(a, a.q, q, sample, a.queries, head, first, queries);
            }
            __syncthreads();
            for (u32 query = 0; query < T; query++) {
                UNROLL
                for (u32 i = 0; i < I; i++) {
                    float x = ps[query * (T + 1) + ty + 16 * i], y = dss[query * (T + 1) + ty + 16 * i];
                    UNROLL
                    for (u32 c = 0; c < C; c++) {
                        u32 d = tx + 16 * c;
                        gv[i][c] = fmaf(x, dos[query * (D + 1) + d], gv[i][c]);
                        gk[i][c] = fmaf(y, queries[query * (D + 1) + d], gk[i][c]);
                    }
                }
            }
        }
    }
    UNROLL
    for (u32 i = 0; i < I; i++) {
        u32 key = from + ty + 16 * i;
        UNROLL
        for (u32 c = 0; c < C; c++) {
            u32 d = tx + 16 * c;
            if (key >= a.keys || d >= a.head_dim) continue;
            dk[place(a, a.dk, sample * a.keys + key, kv_head) + d] = gk[i][c];
            dv[place(a, a.dv, sample * a.keys + key, kv_head) + d] = gv[i][c];
        }
    }
}

#define ATTENTION_PARAMETERS Attend a, In<float> q, In<float> k, In<float> v, In<i32> lens, In<i32> starts, In<float> temperature
#define BACKWARD_PARAMETERS ATTENTION_PARAMETERS, In<float> lse, In<float> delta, In<float> dout

KERNEL(THREADS, 2) attention_32(ATTENTION_PARAMETERS, Out<float> out, Out<float> lse) {
    forward<64, 32>(a, q, k, v, lens, starts, temperature, out, lse);
}
KERNEL(THREADS, 2) attention_64(ATTENTION_PARAMETERS, Out<float> out, Out<float> lse) {
    forward<64, 64>(a, q, k, v, lens, starts, temperature, out, lse);
}
KERNEL(THREADS, 2) attention_128(ATTENTION_PARAMETERS, Out<float> out, Out<float> lse) {
    forward<32, 128>(a, q, k, v, lens, starts, temperature, out, lse);
}
KERNEL(THREADS, 2) attention_256(ATTENTION_PARAMETERS, Out<float> out, Out<float> lse) {
    forward<16, 256, 16>(a, q, k, v, lens, starts, temperature, out, lse);
}
KERNEL(THREADS, 2) attention_dq_32(BACKWARD_PARAMETERS, Out<float> dq, Out<float> slopes) {
    backward_q<32, 32>(a, q, k, v, lens, starts, temperature, lse, delta, dout, dq, slopes);
}
KERNEL(THREADS, 2) attention_dq_64(BACKWARD_PARAMETERS, Out<float> dq, Out<float> slopes) {
    backward_q<32, 64>(a, q, k, v, lens, starts, temperature, lse, delta, dout, dq, slopes);
}
KERNEL(THREADS, 2) attention_dq_128(BACKWARD_PARAMETERS, Out<float> dq, Out<float> slopes) {
    backward_q<16, 128>(a, q, k, v, lens, starts, temperature, lse, delta, dout, dq, slopes);
}
KERNEL(THREADS, 2) attention_dq_256(BACKWARD_PARAMETERS, Out<float> dq, Out<float> slopes) {
    backward_q<16, 256>(a, q, k, v, lens, starts, temperature, lse, delta, dout, dq, slopes);
}
KERNEL(THREADS, 2) attention_dkv_32(BACKWARD_PARAMETERS, Out<float> dk, Out<float> dv) {
    backward_kv<32, 32>(a, q, k, v, lens, starts, temperature, lse, delta, dout, dk, dv);
}
KERNEL(THREADS, 2) attention_dkv_64(BACKWARD_PARAMETERS, Out<float> dk, Out<float> dv) {
    backward_kv<32, 64>(a, q, k, v, lens, starts, temperature, lse, delta, dout, dk, dv);
}
KERNEL(THREADS, 2) attention_dkv_128(BACKWARD_PARAMETERS, Out<float> dk, Out<float> dv) {
    backward_kv<16, 128>(a, q, k, v, lens, starts, temperature, lse, delta, dout, dk, dv);
}
KERNEL(THREADS, 2) attention_dkv_256(BACKWARD_PARAMETERS, Out<float> dk, Out<float> dv) {
    backward_kv<16, 256>(a, q, k, v, lens, starts, temperature, lse, delta, dout, dk, dv);
}

// out[1] += Σ x; one block.
KERNEL(THREADS, 1) add_total(In<float> x, Out<float> out) {
    SHARED(float, room, WARPS);
    float sum = 0.0f;
    for (u64 i = threadIdx.x; i < x.n; i += THREADS) sum += x[i];
    sum = block_sum<float>(sum, room);
    if (threadIdx.x == 0) out[0] = out[0] + sum;
}
