// Operations of transformer layers, all but attention. Sums go in a fixed order: lanes of a warp, then warps, then blocks.

// x[i] for all i below n, whatever the number of blocks.
#define EACH(i, n) for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < (n); i += (u64)gridDim.x * THREADS)

// Columns of a matrix, such as heads: rows of `stride` values, the first of them in column `at`.
struct Matrix {
    u32 stride, at;
};

// Where the i-th part of a matrix begins, of `groups` parts of `width` values in a row.
__device__ inline u64 part(const Matrix& m, u32 i, u32 groups, u32 width) {
    return (u64)(i / groups) * m.stride + m.at + i % groups * width;
}

// x += y
KERNEL(THREADS, 4) add(Out<float> x, In<float> y) {
    stream(x.n, [&](u64 i) { return Two<float>{x[i], y[i]}; }, [&](u64 i, const Two<float>& v) { x[i] = v.x + v.y; });
}

// Rows of packed values (bdia_core::packing): their number, the blocks of a row, values and bytes of a block, rows of a
// head of neighbours or 0, and the number of the packing.
struct Packed {
    u64 rows;
    u32 blocks, values, bytes, neighbours, packing;
};
enum { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

__device__ inline u32 byte_at(const In<u32>& x, u64 at) { return x[at / 4] >> 8 * (at % 4) & 0xFFu; }

__device__ inline u32 pair_at(const In<u32>& x, u64 at) { return byte_at(x, at) | byte_at(x, at + 1) << 8; }

// The value of a number of 16 bits (IEEE binary16).
__device__ inline float half_at(const In<u32>& x, u64 at) {
    u32 bits = pair_at(x, at);
    // The exponents' biases are 112 apart; a product sets small values right too, which have no leading 1.
    u32 rest = (bits & 0x7FFFu) << 13;
    u32 finite = __float_as_uint(__uint_as_float(rest) * __uint_as_float((127u + 112u) << 23));
    return __uint_as_float((bits & 0x8000u) << 16 | ((bits & 0x7C00u) == 0x7C00u ? rest | 0x7F800000u : finite));
}

// Value i of the block that begins at byte `at`.
__device__ inline float unpacked(u32 packing, const In<u32>& x, u64 at, u32 i) {
    switch (packing) {
    case F32: return __uint_as_float(pair_at(x, at) | pair_at(x, at + 2) << 16);
    case F16: return half_at(x, at);
    case BF16: return __uint_as_float(pair_at(x, at) << 16);
    case Q8_0: return MUL((float)(signed char)byte_at(x, at + 2 + i), half_at(x, at));
    }
    float d = half_at(x, at);
    if (packing < Q8_0) {
        // Low halves of 16 bytes, then high ones.
        bool minimum = packing == Q4_1 || packing == Q5_1, fifth = packing == Q5_0 || packing == Q5_1;
        u64 from = at + (minimum ? 4 : 2);
        u32 q = byte_at(x, from + (fifth ? 4 : 0) + i % 16) >> 4 * (i / 16) & 15u;
        if (fifth) q |= (byte_at(x, from + i / 8) >> i % 8 & 1u) << 4;
        if (minimum) return ADD(MUL(d, (float)q), half_at(x, at + 2));
        return MUL(d, (float)((i32)q - (fifth ? 16 : 8)));
    }
    u32 part = i / 32, l = i % 32;
    if (packing == Q6_K) {
        // Two halves of 128 values; in each, four quarters of 32, of two scales.
        u32 n = part / 4, quarter = part % 4;
        u32 low = byte_at(x, at + n * 64 + quarter % 2 * 32 + l) >> 4 * (quarter / 2) & 15u;
        u32 high = byte_at(x, at + 128 + n * 32 + l) >> 2 * quarter & 3u;
        float s = MUL(half_at(x, at + 208), (float)(signed char)byte_at(x, at + 192 + n * 8 + quarter * 2 + l / 16));
        return MUL(s, (float)((i32)(low | high << 4) - 32));
    }
    // Scale and minimum, of six bits each.
    u32 a = byte_at(x, at + 4 + part % 4), b = byte_at(x, at + 8 + part % 4), s = a & 63u, t = b & 63u;
    if (part >= 4) {
        u32 both = byte_at(x, at + 8 + part);
        s = (both & 15u) | a >> 6 << 4, t = both >> 4 | b >> 6 << 4;
    }
    u64 from = at + (packing == Q5_K ? 48 : 16);
    u32 q = byte_at(x, from + part / 2 * 32 + l) >> 4 * (part % 2) & 15u;
    if (packing == Q5_K) q |= (byte_at(x, at + 16 + l) >> part & 1u) << 4;
    return SUB(MUL(MUL(d, (float)s), (float)q), MUL(half_at(x, at + 2), (float)t));
}

// Column c of a row.
__device__ inline float packed_value(const Packed& p, const In<u32>& x, u64 row, u32 c) {
    if (p.neighbours) {
        u32 i = (u32)(row % p.neighbours), half = p.neighbours / 2;
        row = row - i + (i < half ? 2 * i : 2 * (i - half) + 1);
    }
    return unpacked(p.packing, x, (row * p.blocks + c / p.values) * p.bytes, c % p.values);
}

// y = the rows of x from `first` on
KERNEL(THREADS, 4) unpack(Packed p, u64 first, In<u32> x, Out<float> y) {
    u32 cols = p.blocks * p.values;
    EACH(i, y.n) y[i] = packed_value(p, x, first + i / cols, (u32)(i % cols));
}

// y[i] = row rows[i] of x
KERNEL(THREADS, 4) unpack_rows(Report r, Packed p, In<u32> x, In<i32> rows, Out<float> y) {
    u32 cols = p.blocks * p.values;
    EACH(i, rows.n) {
        i32 row = rows[i];
        if (row < 0 || (u64)row >= p.rows) report(r, (u32)i, TOKEN, (u32)row);
    }
    EACH(i, y.n) {
        i32 row = rows[i / cols];
        bool known = row >= 0 && (u64)row < p.rows;
        y[i] = known ? packed_value(p, x, (u64)row, (u32)(i % cols)) : 0.0f;
    }
}

// y[r, to.at + c] += scale·x[r, from.at + c] for c below width
KERNEL(THREADS, 4) add_columns(u64 values, u32 width, float scale, Matrix from, Matrix to, In<float> x, Out<float> y) {
    EACH(i, values) {
        u64 r = i / width, c = i % width, at = r * to.stride + to.at + c;
        y[at] = fmaf(scale, x[r * from.stride + from.at + c], y[at]);
    }
}

// c[rows, cols] = bias[cols], or += it
KERNEL(THREADS, 4) bias_rows(u32 accumulate, In<float> bias, Out<float> c) {
    u32 cols = (u32)bias.n;
    EACH(i, c.n) c[i] = accumulate ? c[i] + bias[i % cols] : bias[i % cols];
}

// As bf16, ties to even.
__device__ inline u32 bf16(float x) {
    u32 u = __float_as_uint(x);
    if (isnan(x)) return 0x7FC0u;
    return (u + 0x7FFFu + (u >> 16 & 1)) >> 16;
}

// y[all, words] = x[rows, cols] as bf16, two values in a word; what y has beyond the values is 0.
KERNEL(THREADS, 4) to_bf16(u32 rows, u32 all, u64 cols, u64 words, In<float> x, Out<u32> y) {
    struct Two {
        float low, high;
    };
    for (u32 r = blockIdx.y; r < all; r += gridDim.y)
        stream(
            words,
            [&](u64 i) {
                u64 c = 2 * i, at = r * cols + c;
                bool there = r < rows;
                return Two{there && c < cols ? x[at] : 0.0f, there && c + 1 < cols ? x[at + 1] : 0.0f};
            },
            [&](u64 i, Two v) { y[r * words + i] = bf16(v.low) | bf16(v.high) << 16; });
}

// y[rows, cols] = x[rows, stride], or += it
KERNEL(THREADS, 4) unpad(u32 add, u32 rows, u32 cols, u32 stride, In<float> x, Out<float> y) {
    for (u32 r = blockIdx.y; r < rows; r += gridDim.y)
        stream(
            cols, [&](u64 i) { return x[(u64)r * stride + i]; },
            [&](u64 i, float v) {
                u64 at = (u64)r * cols + i;
                y[at] = add ? y[at] + v : v;
            });
}

// Sums over rows: a block takes 32 columns and `each` rows, a warp every eighth of them. The sums of its rows go to
// parts[blockIdx.y, cols]; where there is one part, they are added to the result at once.
template <u32 N, class F>
__device__ void column_sums(u32 rows, u32 cols, u32 each, const Out<float>* sums, const Out<float>& parts, F f) {
    SHARED(float, room, N * THREADS);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    u32 from = blockIdx.y * each, to = from + each < rows ? from + each : rows;
    float total[N];
    for (u32 k = 0; k < N; k++) total[k] = 0.0f;
    if (c < cols)
        for (u32 r = from + warp; r < to; r += WARPS) f(r, c, total);
    for (u32 k = 0; k < N; k++) room[k * THREADS + threadIdx.x] = total[k];
    __syncthreads();
    if (warp != 0 || c >= cols) return;
    for (u32 k = 0; k < N; k++) {
        float sum = room[k * THREADS + lane];
        for (u32 w = 1; w < WARPS; w++) sum += room[k * THREADS + w * 32 + lane];
        if (gridDim.y == 1) sums[k][c] = sums[k][c] + sum;
        else parts[((u64)k * gridDim.y + blockIdx.y) * cols + c] = sum;
    }
}

// sum[cols] += Σ_parts parts[n, cols]
KERNEL(THREADS, 4) add_parts(u32 n, In<float> parts, Out<float> sum) {
    EACH(c, sum.n) {
        float total = 0.0f;
        for (u32 from = 0; from < n; from += 4 * AT_ONCE) {
            float v[4 * AT_ONCE];
            UNROLL
            for (u32 k = 0; k < 4 * AT_ONCE; k++) v[k] = from + k < n ? parts[(from + k) * sum.n + c] : 0.0f;
            UNROLL
            for (u32 k = 0; k < 4 * AT_ONCE; k++) total += v[k];
        }
        sum[c] = sum[c] + total;
    }
}

// sum[cols] += Σ_rows x[rows, cols]
KERNEL(THREADS, 4) sum_rows(u32 rows, u32 each, In<float> x, Out<float> sum, Out<float> parts) {
    u32 cols = (u32)sum.n;
    column_sums<1>(rows, cols, each, &sum, parts, [&](u32 r, u32 c, float* total) { total[0] += x[(u64)r * cols + c]; });
}

// y[rows, width] = (x − mean)·rstd·weight + bias, stats[rows, 2] = mean, rstd; a warp a row.
KERNEL(THREADS, 4) layer_norm(u32 rows, float eps, In<float> weight, In<float> bias, In<float> x, Out<float> y, Out<float> stats) {
    u32 lane = threadIdx.x % 32, r = blockIdx.x * WARPS + threadIdx.x / 32, width = (u32)weight.n;
    if (r >= rows) return;
    u64 row = (u64)r * width;
    float sum = 0.0f, squares = 0.0f;
    for (u32 c = lane; c < width; c += 32) sum += x[row + c];
    float mean = warp_sum(sum) / (float)width;
    for (u32 c = lane; c < width; c += 32) {
        float d = x[row + c] - mean;
        squares = fmaf(d, d, squares);
    }
    float rstd = 1.0f / sqrtf(warp_sum(squares) / (float)width + eps);
    if (lane == 0) stats[2 * (u64)r] = mean, stats[2 * (u64)r + 1] = rstd;
    for (u32 c = lane; c < width; c += 32) y[row + c] = fmaf((x[row + c] - mean) * rstd, weight[c], bias[c]);
}

// Threads that layer_norm_dx has for a row, and values that each keeps: rows of up to 1024 are read once, all of it together.
#define ROW_THREADS 128
#define ROW_WARPS (ROW_THREADS / 32)
#define KEPT 8

// With x̂ = (x − mean)·rstd and g = dy·weight: dx += rstd·(g − mean(g) − x̂·mean(g·x̂)); ROW_THREADS a row.
KERNEL(THREADS, 4) layer_norm_dx(u32 rows, In<float> weight, In<float> x, In<float> stats, In<float> dy, Out<float> dx) {
    SHARED(float, room, 2 * WARPS);
    u32 r = (blockIdx.x * THREADS + threadIdx.x) / ROW_THREADS, first = threadIdx.x % ROW_THREADS, warp = threadIdx.x / 32;
    // Threads without a row take part in the sums.
    u32 width = r < rows ? (u32)weight.n : 0;
    u64 row = (u64)r * width;
    float mean = width ? stats[2 * (u64)r] : 0.0f, rstd = width ? stats[2 * (u64)r + 1] : 0.0f;
    float g[KEPT], normal[KEPT], old[KEPT], sum_g = 0.0f, sum_gx = 0.0f;
    UNROLL
    for (u32 k = 0; k < KEPT; k++) {
        u32 c = first + k * ROW_THREADS;
        bool inside = c < width;
        g[k] = inside ? dy[row + c] : 0.0f;
        normal[k] = inside ? x[row + c] : 0.0f;
        old[k] = inside ? (float)dx[row + c] : 0.0f;
    }
    UNROLL
    for (u32 k = 0; k < KEPT; k++) {
        u32 c = first + k * ROW_THREADS;
        if (c < width) g[k] *= weight[c];
        normal[k] = (normal[k] - mean) * rstd;
        sum_g += g[k], sum_gx = fmaf(g[k], normal[k], sum_gx);
    }
    for (u32 c = first + KEPT * ROW_THREADS; c < width; c += ROW_THREADS) {
        float more = dy[row + c] * weight[c];
        sum_g += more, sum_gx = fmaf(more, (x[row + c] - mean) * rstd, sum_gx);
    }
    sum_g = warp_sum(sum_g), sum_gx = warp_sum(sum_gx);
    if (threadIdx.x % 32 == 0) room[warp] = sum_g, room[WARPS + warp] = sum_gx;
    __syncthreads();
    float mean_g = 0.0f, mean_gx = 0.0f;
    for (u32 w = warp / ROW_WARPS * ROW_WARPS, end = w + ROW_WARPS; w < end; w++) mean_g += room[w], mean_gx += room[WARPS + w];
    mean_g /= (float)width, mean_gx /= (float)width;
    UNROLL
    for (u32 k = 0; k < KEPT; k++) {
        u32 c = first + k * ROW_THREADS;
        if (c < width) dx[row + c] = old[k] + rstd * (g[k] - mean_g - normal[k] * mean_gx);
    }
    for (u32 c = first + KEPT * ROW_THREADS; c < width; c += ROW_THREADS) {
        float more = (x[row + c] - mean) * rstd;
        dx[row + c] = dx[row + c] + rstd * (dy[row + c] * weight[c] - mean_g - more * mean_gx);
    }
}

// dweight += Σ_rows dy·x̂, dbias += Σ_rows dy
KERNEL(THREADS, 4)
layer_norm_dw(u32 rows, u32 each, In<float> x, In<float> stats, In<float> dy, Out<float> dweight, Out<float> dbias, Out<float> parts) {
    u32 cols = (u32)dweight.n;
    Out<float> sums[2] = {dweight, dbias};
    column_sums<2>(rows, cols, each, sums, parts, [&](u32 r, u32 c, float* total) {
        u64 i = (u64)r * cols + c;
        float d = dy[i];
        total[0] = fmaf(d, (x[i] - stats[2 * (u64)r]) * stats[2 * (u64)r + 1], total[0]);
        total[1] += d;
    });
}

// Root-mean-square normalization of `groups` parts of every row, which are counted through all rows: y = x·rstd·(offset +
// weight), stats[part] = rstd; a warp a part. (Kernels of other crates, which may have any other name, have the plain ones.)
KERNEL(THREADS, 4)
rms_parts(u32 parts, u32 groups, float eps, float offset, Matrix from, Matrix to, In<float> weight, In<float> x, Out<float> y, Out<float> stats) {
    u32 lane = threadIdx.x % 32, i = blockIdx.x * WARPS + threadIdx.x / 32, width = (u32)weight.n;
    if (i >= parts) return;
    u64 first = part(from, i, groups, width), out = part(to, i, groups, width);
    float squares = 0.0f;
    for (u32 c = lane; c < width; c += 32) {
        float v = x[first + c];
        squares = fmaf(v, v, squares);
    }
    float rstd = 1.0f / sqrtf(warp_sum(squares) / (float)width + eps);
    if (lane == 0) stats[i] = rstd;
    for (u32 c = lane; c < width; c += 32) y[out + c] = x[first + c] * rstd * (offset + weight[c]);
}

// With x̂ = x·rstd and g = dy·(offset + weight): dx += rstd·(g − x̂·mean(g·x̂)); ROW_THREADS a part.
KERNEL(THREADS, 4)
rms_parts_dx(u32 parts, u32 groups, float offset, Matrix xs, Matrix dys, Matrix dxs, In<float> weight, In<float> x, In<float> stats,
             In<float> dy, Out<float> dx) {
    SHARED(float, room, WARPS);
    u32 i = blockIdx.x * (THREADS / ROW_THREADS) + threadIdx.x / ROW_THREADS, first = threadIdx.x % ROW_THREADS, warp = threadIdx.x / 32;
    // Threads without a part take part in the sums.
    u32 width = i < parts ? (u32)weight.n : 0;
    u64 from = part(xs, i, groups, width), back = part(dys, i, groups, width), to = part(dxs, i, groups, width);
    float rstd = width ? stats[i] : 0.0f;
    float g[KEPT], normal[KEPT], old[KEPT], sum = 0.0f;
    UNROLL
    for (u32 k = 0; k < KEPT; k++) {
        u32 c = first + k * ROW_THREADS;
        bool inside = c < width;
        g[k] = inside ? dy[back + c] : 0.0f;
        normal[k] = inside ? x[from + c] : 0.0f;
        old[k] = inside ? (float)dx[to + c] : 0.0f;
    }
    UNROLL
    for (u32 k = 0; k < KEPT; k++) {
        u32 c = first + k * ROW_THREADS;
        if (c < width) g[k] *= offset + weight[c];
        normal[k] *= rstd;
        sum = fmaf(g[k], normal[k], sum);
    }
    for (u32 c = first + KEPT * ROW_THREADS; c < width; c += ROW_THREADS)
        sum = fmaf(dy[back + c] * (offset + weight[c]), x[from + c] * rstd, sum);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) room[warp] = sum;
    __syncthreads();
    float mean = 0.0f;
    for (u32 w = warp / ROW_WARPS * ROW_WARPS, end = w + ROW_WARPS; w < end; w++) mean += room[w];
    mean /= (float)width;
    UNROLL
    for (u32 k = 0; k < KEPT; k++) {
        u32 c = first + k * ROW_THREADS;
        if (c < width) dx[to + c] = old[k] + rstd * (g[k] - normal[k] * mean);
    }
    for (u32 c = first + KEPT * ROW_THREADS; c < width; c += ROW_THREADS)
        dx[to + c] = dx[to + c] + rstd * (dy[back + c] * (offset + weight[c]) - x[from + c] * rstd * mean);
}

// dweight += Σ_parts dy·x̂
KERNEL(THREADS, 4)
rms_parts_dw(u32 parts, u32 each, u32 groups, Matrix xs, Matrix dys, In<float> x, In<float> stats, In<float> dy, Out<float> dweight,
             Out<float> sums) {
    u32 cols = (u32)dweight.n;
    column_sums<1>(parts, cols, each, &dweight, sums, [&](u32 i, u32 c, float* total) {
        total[0] = fmaf(dy[part(dys, i, groups, cols) + c], x[part(xs, i, groups, cols) + c] * stats[i], total[0]);
    });
}

// Values i and i + half of each head of a row are turned by the i-th angle of the row's position, of which table[position] has
// `half` cosines, then sines; a block a row. A row whose position is unknown stays as it is.
KERNEL(THREADS, 4)
rotate(Report r, u32 tokens, u32 heads, u32 half, u32 known, u32 back, Matrix m, In<float> table, In<i32> positions, Out<float> x) {
    u32 row = blockIdx.x, position = positions.n ? (u32)positions[row] : row % tokens;
    if (position >= known) {
        if (threadIdx.x == 0) report(r, row, TOKEN, position);
        return;
    }
    u64 first = (u64)row * m.stride + m.at, angles = (u64)position * 2 * half;
    for (u32 i = threadIdx.x; i < heads * half; i += THREADS) {
        u32 head = i / half, angle = i % half;
        u64 at = first + (u64)head * 2 * half + angle;
        float cosine = table[angles + angle], sine = table[angles + half + angle], u = x[at], v = x[at + half];
        if (back) sine = -sine;
        x[at] = fmaf(u, cosine, -(v * sine));
        x[at + half] = fmaf(v, cosine, u * sine);
    }
}

#define ROOT_2_OVER_PI 0.7978845608028654f
#define ROOT_HALF 0.7071067811865476f

// e^-|z| with z = 2·√(2/π)·(x + 0.044715·x³), of which ½·(1 + tanh(z/2)) is 1/(1 + e^-z): never infinite.
__device__ inline float tanh_tail(float x) {
    return expf(-fabsf(x * fmaf(2.0f * ROOT_2_OVER_PI * 0.044715f, x * x, 2.0f * ROOT_2_OVER_PI)));
}

// 0.5·x·(1 + t), t = tanh(√(2/π)·(x + 0.044715·x³)) or erf(x/√2)
__device__ inline float gelu_of(u32 exact, float v) {
    if (exact) return 0.5f * v * (1.0f + erff(v * ROOT_HALF));
    float e = tanh_tail(v);
    return v * (v < 0.0f ? e : 1.0f) / (1.0f + e);
}

// 0.5·(1 + t) + 0.5·x·(1 − t²)·u', or Φ(x) + x·exp(−x²/2)/√(2π)
__device__ inline float gelu_slope(u32 exact, float v) {
    if (exact) return 0.5f * (1.0f + erff(v * ROOT_HALF)) + v * (expf(-0.5f * v * v) * (0.5f * ROOT_2_OVER_PI));
    // ½·(1 − t²)·u' = 2·(e/(1 + e)²)·u'. Far out the rest is 0 and u' may be infinite; their product is 0.
    float e = tanh_tail(v), p = 1.0f / (1.0f + e), rest = e * p * p;
    if (rest != 0.0f) rest *= 2.0f * ROOT_2_OVER_PI * fmaf(0.134145f, v * v, 1.0f);
    return fmaf(v, rest, v < 0.0f ? e * p : p);
}

// y = gelu(x)
KERNEL(THREADS, 4) gelu(u32 exact, In<float> x, Out<float> y) {
    stream(y.n, [&](u64 i) { return x[i]; }, [&](u64 i, float v) { y[i] = gelu_of(exact, v); });
}

// d *= gelu'(x)
KERNEL(THREADS, 4) gelu_vjp(u32 exact, In<float> x, Out<float> d) {
    stream(d.n, [&](u64 i) { return Two<float>{x[i], d[i]}; },
           [&](u64 i, const Two<float>& both) { d[i] = both.y * gelu_slope(exact, both.x); });
}

// Functions of a gate.
enum { SILU = 0, GELU_TANH = 1, GELU_EXACT = 2 };

// x·σ(x), or gelu(x), and the derivative: of the first, σ + x·σ·(1 − σ).
__device__ inline Two<float> gate_of(u32 act, float v) {
    if (act != SILU) return {gelu_of(act == GELU_EXACT, v), gelu_slope(act == GELU_EXACT, v)};
    // e^-|x| is never infinite. Far out one of σ and 1 − σ is 0, where x may be infinite; the product is 0.
    float e = expf(-fabsf(v)), p = 1.0f / (1.0f + e), other = e * p, s = v < 0.0f ? other : p, rest = v < 0.0f ? p : other;
    float y = s == 0.0f ? s : v * s;
    return {y, rest == 0.0f ? s : fmaf(y, rest, s)};
}

// y = act(gate)·up
KERNEL(THREADS, 4) gated(u32 act, In<float> gate, In<float> up, Out<float> y) {
    stream(y.n, [&](u64 i) { return Two<float>{gate[i], up[i]}; },
           [&](u64 i, const Two<float>& v) { y[i] = gate_of(act, v.x).x * v.y; });
}

// d holds dy and becomes dy·act(gate); dgate = dy·up·act'(gate)
KERNEL(THREADS, 4) gated_vjp(u32 act, In<float> gate, In<float> up, Out<float> d, Out<float> dgate) {
    struct Three {
        float gate, up, dy;
    };
    stream(d.n, [&](u64 i) { return Three{gate[i], up[i], d[i]}; }, [&](u64 i, const Three& v) {
        Two<float> f = gate_of(act, v.gate);
        dgate[i] = v.dy * v.up * f.y;
        d[i] = v.dy * f.x;
    });
}

// x[samples, per]: 0 where the element's word is below the threshold, else x·kept; a thread takes the four elements of one
// counter.
KERNEL(THREADS, 4) dropout(u32 samples, u32 per, float kept, Streams streams, Out<float> x) {
    u32 quads = (per + 3) / 4;
    EACH(i, (u64)samples * quads) {
        u32 sample = (u32)(i / quads), q = (u32)(i % quads);
        u64 at = (u64)sample * per + 4 * q;
        float v[4];
        UNROLL
        for (u32 k = 0; k < 4; k++) v[k] = 4 * q + k < per ? (float)x[at + k] : 0.0f;
        Quad words = quad(streams, sample, q);
        UNROLL
        for (u32 k = 0; k < 4; k++)
            if (4 * q + k < per) x[at + k] = words.w[k] < streams.threshold ? 0.0f : v[k] * kept;
    }
}

// x[rows, width] = table[tokens[row]] + positions[row % length], where there are any
KERNEL(THREADS, 4)
embed(Report r, u32 length, u32 width, In<i32> tokens, In<float> table, In<float> positions, Out<float> x) {
    u32 vocab = (u32)(table.n / width);
    EACH(i, x.n) {
        u32 row = (u32)(i / width), c = (u32)(i % width);
        i32 token = tokens[row];
        float value = positions.n ? positions[(u64)(row % length) * width + c] : 0.0f;
        if ((u32)token < vocab) value += table[(u64)(u32)token * width + c];
        else if (c == 0) report(r, row, TOKEN, (u32)token);
        x[i] = value;
    }
}

// dpositions[t] += Σ_samples dx[sample, t]
KERNEL(THREADS, 4) embed_positions(u32 samples, u32 length, u32 width, In<float> dx, Out<float> dpositions) {
    u64 all = (u64)length * width;
    EACH(i, all) {
        float sum = 0.0f;
        for (u32 s = 0; s < samples; s++) sum += dx[s * all + i];
        dpositions[i] = dpositions[i] + sum;
    }
}

// dtable[token] += dx of every row with that token, in the order of rows: the block of the first such row adds them all.
KERNEL(THREADS, 4) embed_table(u32 width, In<i32> tokens, In<float> dx, Out<float> dtable) {
    // Votes on a tile of rows, and the rows that were found.
    SHARED(u32, found, STREAMED / 32);
    SHARED(u32, list, STREAMED);
    u32 rows = (u32)tokens.n, row = blockIdx.x, vocab = (u32)(dtable.n / width), lane = threadIdx.x % 32;
    i32 token = tokens[row];
    if ((u32)token >= vocab) return;
    for (u32 from = 0; from < rows; from += STREAMED) {
        i32 other[AT_ONCE];
        UNROLL
        for (u32 k = 0; k < AT_ONCE; k++) {
            u32 r = from + k * THREADS + threadIdx.x;
            other[k] = r < rows ? tokens[r] : -1;
        }
        UNROLL
        for (u32 k = 0; k < AT_ONCE; k++) {
            u32 vote = __ballot_sync(FULL, other[k] == token);
            if (lane == 0) found[k * WARPS + threadIdx.x / 32] = vote;
        }
        __syncthreads();
        UNROLL
        for (u32 k = 0; k < AT_ONCE; k++) {
            if (other[k] != token) continue;
            u32 word = k * WARPS + threadIdx.x / 32, at = __popc(found[word] & ((1u << lane) - 1));
            for (u32 w = 0; w < word; w++) at += __popc(found[w]);
            list[at] = from + word * 32 + lane;
        }
        u32 n = (u32)warp_sum((u64)__popc(found[lane]));
        __syncthreads();
        if (n == 0) continue;
        // All threads see the same list.
        if (list[0] < row) return;
        for (u32 c = threadIdx.x; c < width; c += THREADS) {
            u64 at = (u64)(u32)token * width + c;
            float sum = dtable[at];
            for (u32 first = 0; first < n; first += 2 * AT_ONCE) {
                float v[2 * AT_ONCE];
                UNROLL
                for (u32 k = 0; k < 2 * AT_ONCE; k++) v[k] = first + k < n ? dx[(u64)list[first + k] * width + c] : 0.0f;
                UNROLL
                for (u32 k = 0; k < 2 * AT_ONCE; k++) sum += v[k];
            }
            dtable[at] = sum;
        }
    }
}

// logits[rows, vocab] become (softmax − t)·scale, losses[rows] = −Σ t·log softmax with t = hard·onehot + smooth; a block a
// row. `first` is the index of row 0 in the chunk. Blocks are large and few, and the second reading goes backwards, so that
// much of it comes from the cache.
#define LOSS_WARPS 16
#define LOSS_THREADS (LOSS_WARPS * 32)
#define LOSS_AT_ONCE 8
#define LOSS_TILE (LOSS_THREADS * LOSS_AT_ONCE)

KERNEL(512, 2)
cross_entropy(Report r, u32 vocab, u32 first, float scale, float smooth, float hard, In<i32> targets, Out<float> logits, Out<float> losses) {
    SHARED(float, room, LOSS_WARPS);
    u32 row = blockIdx.x;
    u64 at = (u64)row * vocab;
    i32 target = targets[row];
    if ((u32)target >= vocab) {
        for (u32 c = threadIdx.x; c < vocab; c += LOSS_THREADS) logits[at + c] = 0.0f;
        if (threadIdx.x == 0) {
            losses[row] = 0.0f;
            if (target >= 0) report(r, first + row, TOKEN, (u32)target);
        }
        return;
    }
    float own = logits[at + (u32)target], most = -INFINITY, sum = 0.0f, rest = 0.0f;
    for (u32 from = threadIdx.x; from < vocab; from += LOSS_TILE) {
        float v[LOSS_AT_ONCE], old = most;
        UNROLL
        for (u32 k = 0; k < LOSS_AT_ONCE; k++) {
            u32 c = from + k * LOSS_THREADS;
            v[k] = c < vocab ? (float)logits[at + c] : -INFINITY;
        }
        // A NaN gets into the sum.
        UNROLL
        for (u32 k = 0; k < LOSS_AT_ONCE; k++) most = fmaxf(most, v[k]);
        // As long as all are -∞ their sum is 0.
        float base = most == -INFINITY ? 0.0f : most;
        sum *= expf(old - base);
        UNROLL
        for (u32 k = 0; k < LOSS_AT_ONCE; k++) sum += expf(v[k] - base);
        // Without smoothing an infinite logit elsewhere has no part in the loss.
        if (smooth > 0.0f) {
            UNROLL
            for (u32 k = 0; k < LOSS_AT_ONCE; k++)
                if (from + k * LOSS_THREADS < vocab) rest += smooth * (v[k] - own);
        }
    }
    float all = block_max<LOSS_WARPS>(most, room);
    sum = block_sum<float, LOSS_WARPS>(sum * expf(most - all), room);
    // Σ t = 1, so that −Σ t·log softmax = log Σ e^v − own − smooth·Σ (v − own).
    rest = block_sum<float, LOSS_WARPS>(rest, room);
    if (threadIdx.x == 0) {
        float loss = logf(sum) + (all - own) - rest;
        losses[row] = loss;
        if (!isfinite(loss)) report(r, first + row, REAL, __float_as_uint(loss));
    }
    float share = 1.0f / sum;
    for (u32 tile = (vocab + LOSS_TILE - 1) / LOSS_TILE; tile-- > 0;) {
        float v[LOSS_AT_ONCE];
        UNROLL
        for (u32 k = 0; k < LOSS_AT_ONCE; k++) {
            u32 c = tile * LOSS_TILE + k * LOSS_THREADS + threadIdx.x;
            v[k] = c < vocab ? (float)logits[at + c] : 0.0f;
        }
        UNROLL
        for (u32 k = 0; k < LOSS_AT_ONCE; k++) {
            u32 c = tile * LOSS_TILE + k * LOSS_THREADS + threadIdx.x;
            float t = c == (u32)target ? smooth + hard : smooth;
            if (c < vocab) logits[at + c] = (expf(v[k] - all) * share - t) * scale;
        }
    }
}
