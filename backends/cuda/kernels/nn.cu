// Operations of transformer layers, all but attention. Sums go in a fixed order: lanes of a warp, then warps, then blocks.

// x[i] for all i below n, whatever the number of blocks.
#define EACH(i, n) for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < (n); i += (u64)gridDim.x * THREADS)

// Columns of a matrix, such as heads: rows of `stride` values, the first of them in column `at`.
struct Matrix {
    u32 stride, at;
};

// x += y
KERNEL(THREADS, 4) add(Out<float> x, In<float> y) {
    EACH(i, x.n) x[i] = x[i] + y[i];
}

// y[i] = the i-th of the 16-bit values in x, two in a word, the first in its low half.
KERNEL(THREADS, 4) widen(u32 f16, In<u32> x, Out<float> y) {
    EACH(i, y.n) {
        u32 bits = i % 2 ? x[i / 2] >> 16 : x[i / 2] & 0xFFFFu;
        if (!f16) {
            y[i] = __uint_as_float(bits << 16);
            continue;
        }
        // The exponents' biases are 112 apart; a product sets small values right too, which have no leading 1.
        u32 rest = (bits & 0x7FFFu) << 13;
        u32 finite = __float_as_uint(__uint_as_float(rest) * __uint_as_float((127u + 112u) << 23));
        y[i] = __uint_as_float((bits & 0x8000u) << 16 | ((bits & 0x7C00u) == 0x7C00u ? rest | 0x7F800000u : finite));
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

// y[rows, words] = x[rows, cols] as bf16, two values in a word; what a row of words has beyond its values is 0.
KERNEL(THREADS, 4) to_bf16(u32 cols, u32 words, In<float> x, Out<u32> y) {
    EACH(i, y.n) {
        u64 r = i / words, at = r * cols;
        u32 c = (u32)(i - r * words) * 2;
        y[i] = (c < cols ? bf16(x[at + c]) : 0u) | (c + 1 < cols ? bf16(x[at + c + 1]) << 16 : 0u);
    }
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
        float total = parts[c];
        for (u32 k = 1; k < n; k++) total += parts[k * sum.n + c];
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

// With x̂ = (x − mean)·rstd and g = dy·weight: dx += rstd·(g − mean(g) − x̂·mean(g·x̂)); a warp a row.
KERNEL(THREADS, 4) layer_norm_dx(u32 rows, In<float> weight, In<float> x, In<float> stats, In<float> dy, Out<float> dx) {
    u32 lane = threadIdx.x % 32, r = blockIdx.x * WARPS + threadIdx.x / 32, width = (u32)weight.n;
    if (r >= rows) return;
    u64 row = (u64)r * width;
    float mean = stats[2 * (u64)r], rstd = stats[2 * (u64)r + 1], sum_g = 0.0f, sum_gx = 0.0f;
    for (u32 c = lane; c < width; c += 32) {
        float g = dy[row + c] * weight[c];
        sum_g += g;
        sum_gx = fmaf(g, (x[row + c] - mean) * rstd, sum_gx);
    }
    float mean_g = warp_sum(sum_g) / (float)width, mean_gx = warp_sum(sum_gx) / (float)width;
    for (u32 c = lane; c < width; c += 32) {
        float normal = (x[row + c] - mean) * rstd, g = dy[row + c] * weight[c];
        dx[row + c] = dx[row + c] + rstd * (g - mean_g - normal * mean_gx);
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

#define ROOT_2_OVER_PI 0.7978845608028654f
#define ROOT_HALF 0.7071067811865476f

__device__ inline float tanh_argument(float x) { return ROOT_2_OVER_PI * (x + 0.044715f * x * x * x); }

// y = 0.5·x·(1 + t), t = tanh(√(2/π)·(x + 0.044715·x³)) or erf(x/√2)
KERNEL(THREADS, 4) gelu(u32 exact, In<float> x, Out<float> y) {
    EACH(i, y.n) {
        float v = x[i], t = exact ? erff(v * ROOT_HALF) : tanhf(tanh_argument(v));
        y[i] = 0.5f * v * (1.0f + t);
    }
}

// d *= 0.5·(1 + t) + 0.5·x·(1 − t²)·u', or Φ(x) + x·exp(−x²/2)/√(2π)
KERNEL(THREADS, 4) gelu_vjp(u32 exact, In<float> x, Out<float> d) {
    EACH(i, d.n) {
        float v = x[i], slope;
        if (exact) {
            slope = 0.5f * (1.0f + erff(v * ROOT_HALF)) + v * (expf(-0.5f * v * v) * (0.5f * ROOT_2_OVER_PI));
        } else {
            float t = tanhf(tanh_argument(v)), rest = 1.0f - t * t;
            // Far out the rest is 0 and u' may be infinite; their product is 0.
            if (rest != 0.0f) rest *= ROOT_2_OVER_PI * (1.0f + 0.134145f * v * v);
            slope = 0.5f * (1.0f + t) + 0.5f * v * rest;
        }
        d[i] = d[i] * slope;
    }
}

// x[samples, per]: 0 where the element's word is below the threshold, else x·kept; a thread takes the four elements of one
// counter.
KERNEL(THREADS, 4) dropout(u32 samples, u32 per, float kept, Streams streams, Out<float> x) {
    u32 quads = (per + 3) / 4;
    EACH(i, (u64)samples * quads) {
        u32 sample = (u32)(i / quads), q = (u32)(i % quads);
        Quad words = quad(streams, sample, q);
        for (u32 k = 0; k < 4 && 4 * q + k < per; k++) {
            u64 at = (u64)sample * per + 4 * q + k;
            x[at] = words.w[k] < streams.threshold ? 0.0f : x[at] * kept;
        }
    }
}

// x[rows, width] = table[tokens[row]] + positions[row % length]
KERNEL(THREADS, 4)
embed(Report r, u32 length, u32 width, In<i32> tokens, In<float> table, In<float> positions, Out<float> x) {
    u32 vocab = (u32)(table.n / width);
    EACH(i, x.n) {
        u32 row = (u32)(i / width), c = (u32)(i % width);
        i32 token = tokens[row];
        float value = positions[(u64)(row % length) * width + c];
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
    SHARED(u32, found, WARPS);
    u32 rows = (u32)tokens.n, row = blockIdx.x, vocab = (u32)(dtable.n / width);
    i32 token = tokens[row];
    if ((u32)token >= vocab) return;
    for (u32 from = 0; from < rows; from += THREADS) {
        u32 r = from + threadIdx.x;
        u32 vote = __ballot_sync(FULL, r < rows && tokens[r < rows ? r : 0] == token);
        if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = vote;
        __syncthreads();
        for (u32 w = 0; w < WARPS; w++) {
            for (u32 bits = found[w]; bits; bits &= bits - 1) {
                u32 other = from + w * 32 + (u32)__ffs(bits) - 1;
                // All threads see the same votes.
                if (other < row) return;
                for (u32 c = threadIdx.x; c < width; c += THREADS) {
                    u64 at = (u64)(u32)token * width + c;
                    dtable[at] = dtable[at] + dx[(u64)other * width + c];
                }
            }
        }
        __syncthreads();
    }
}

// logits[rows, vocab] become (softmax − t)·scale, losses[rows] = −Σ t·log softmax with t = hard·onehot + smooth; a block a
// row. `first` is the index of row 0 in the chunk.
KERNEL(THREADS, 4)
cross_entropy(Report r, u32 vocab, u32 first, float scale, float smooth, float hard, In<i32> targets, Out<float> logits, Out<float> losses) {
    SHARED(float, room, WARPS);
    u32 row = blockIdx.x;
    u64 at = (u64)row * vocab;
    i32 target = targets[row];
    if ((u32)target >= vocab) {
        for (u32 c = threadIdx.x; c < vocab; c += THREADS) logits[at + c] = 0.0f;
        if (threadIdx.x == 0) {
            losses[row] = 0.0f;
            if (target >= 0) report(r, first + row, TOKEN, (u32)target);
        }
        return;
    }
    float most = -INFINITY;
    for (u32 c = threadIdx.x; c < vocab; c += THREADS) most = larger(most, logits[at + c]);
    most = block_max(most, room);
    // Without smoothing an infinite logit elsewhere has no part in the loss.
    float sum = 0.0f, expected = 0.0f;
    for (u32 c = threadIdx.x; c < vocab; c += THREADS) {
        float d = logits[at + c] - most;
        sum += expf(d);
        if (smooth > 0.0f) expected += smooth * d;
    }
    float own = hard * (logits[at + (u32)target] - most);
    sum = block_sum<float>(sum, room);
    expected = own + (smooth > 0.0f ? block_sum<float>(expected, room) : 0.0f);
    if (threadIdx.x == 0) {
        float loss = logf(sum) - expected;
        losses[row] = loss;
        if (!isfinite(loss)) report(r, first + row, REAL, __float_as_uint(loss));
    }
    for (u32 c = threadIdx.x; c < vocab; c += THREADS) {
        float t = c == (u32)target ? smooth + hard : smooth;
        logits[at + c] = (expf(logits[at + c] - most) / sum - t) * scale;
    }
}
