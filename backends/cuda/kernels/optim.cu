// Optimizers (bdia_core::optim), tensor by tensor. They do nothing while a fault is set. Sums over a tensor are of double
// precision, by block and then over the blocks' partial sums in order; the number of blocks follows from the length alone.

__device__ inline bool stopped(const Status* status) { return status->owner != FULL; }

// Constants of one update; what a rule does not need is 0.
struct Rule {
    float shrink, scale, rate, keep1, take1, keep2, take2, inverse, eps;
    double correction;
};

// out[1] = Σ g², by block, and by the last block to finish over parts[blocks] in their order; a sum that is not finite is a
// fault. `finished` is 0 before and after.
KERNEL(THREADS, 4) squares(Report r, In<float> g, Out<double> parts, Out<u32> finished, Out<float> out) {
    SHARED(double, room, WARPS);
    SHARED(u32, last, 1);
    double sum = 0.0;
    stream(g.n, [&](u64 i) { return g[i]; }, [&](u64, float x) { sum = fma((double)x, (double)x, sum); });
    sum = block_sum<double>(sum, room);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = sum;
        __threadfence();
        last[0] = atomicInc(&finished[0], gridDim.x - 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last[0]) return;
    sum = 0.0;
    for (u32 i = threadIdx.x; i < gridDim.x; i += THREADS) sum += fresh(parts, i);
    sum = block_sum<double>(sum, room);
    if (threadIdx.x != 0) return;
    out[0] = (float)sum;
    if (!isfinite((float)sum)) report(r, 0, REAL, 0);
}

// Σ parts, by one block; every thread gets it.
__device__ inline double total_of(const In<double>& parts, Shared<double> room) {
    double sum = 0.0;
    for (u64 i = threadIdx.x; i < parts.n; i += THREADS) sum += parts[i];
    return block_sum<double>(sum, room);
}

// A parameter with its gradient and moments.
struct Trained {
    float p, g, m, v;
};

// θ ← θ − shrink·θ; m ← μ·m + g (where there is an m); θ ← θ − η·m
KERNEL(THREADS, 4) sgd(const Status* status, Rule u, Out<float> p, In<float> g, Out<float> m) {
    if (stopped(status)) return;
    stream(p.n, [&](u64 i) { return Trained{p[i], g[i], m.n ? (float)m[i] : 0.0f, 0.0f}; }, [&](u64 i, const Trained& t) {
        float step = u.scale * t.g;
        if (m.n) m[i] = step = u.keep1 * t.m + step;
        p[i] = t.p - u.shrink * t.p - u.rate * step;
    });
}

// m ← β1·m + (1-β1)·g, v ← β2·v + (1-β2)·g²
__device__ inline void moments(const Rule& u, u64 i, const Trained& t, const Out<float>& m, const Out<float>& v, float* first, float* second) {
    float g = u.scale * t.g;
    *first = u.keep1 * t.m + u.take1 * g;
    *second = u.keep2 * t.v + u.take2 * (g * g);
    m[i] = *first, v[i] = *second;
}

// θ ← θ − rate·m/(√(v·inverse) + ε); a zero denominator moves nothing.
KERNEL(THREADS, 4) adam_w(const Status* status, Rule u, Out<float> p, In<float> g, Out<float> m, Out<float> v) {
    if (stopped(status)) return;
    stream(p.n, [&](u64 i) { return Trained{p[i], g[i], m[i], v[i]}; }, [&](u64 i, const Trained& t) {
        float first, second, x = t.p - u.shrink * t.p;
        moments(u, i, t, m, v, &first, &second);
        float denominator = sqrtf(second * u.inverse) + u.eps;
        if (denominator > 0.0f) x -= u.rate * first / denominator;
        p[i] = x;
    });
}

__device__ inline float warp_min(float x) {
    for (int d = 16; d > 0; d /= 2) x = fminf(x, __shfl_xor_sync(FULL, x, d));
    return x;
}

__device__ inline float block_min(float x, Shared<float> room) {
    x = warp_min(x);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    float least = room[0];
    for (int w = 1; w < WARPS; w++) least = fminf(least, room[w]);
    __syncthreads();
    return least;
}

// SET-Adam, first pass: decay and moments; extremes[2, blocks] = least and largest v of each block.
KERNEL(THREADS, 4)
set_adam_moments(const Status* status, Rule u, Out<float> p, In<float> g, Out<float> m, Out<float> v, Out<float> extremes) {
    SHARED(float, room, WARPS);
    if (stopped(status)) return;
    float least = INFINITY, most = 0.0f;
    stream(p.n, [&](u64 i) { return Trained{p[i], g[i], m[i], v[i]}; }, [&](u64 i, const Trained& t) {
        float first, second;
        moments(u, i, t, m, v, &first, &second);
        p[i] = t.p - u.shrink * t.p;
        least = fminf(least, second), most = larger(most, second);
    });
    least = block_min(least, room), most = block_max(most, room);
    if (threadIdx.x == 0) extremes[blockIdx.x] = least, extremes[gridDim.x + blockIdx.x] = most;
}

// The least and the largest v of the tensor.
__device__ inline void extremes_of(const In<float>& extremes, float* least, float* most, Shared<float> room) {
    u32 blocks = (u32)(extremes.n / 2);
    *least = INFINITY, *most = 0.0f;
    for (u32 i = threadIdx.x; i < blocks; i += THREADS) {
        *least = fminf(*least, extremes[i]), *most = larger(*most, extremes[blocks + i]);
    }
    *least = block_min(*least, room), *most = block_max(*most, room);
}

// Second pass: sums[2, blocks] = Σ u and Σ u² with u = v/max v, whose squares do not underflow.
KERNEL(THREADS, 4) set_adam_sums(const Status* status, In<float> v, In<float> extremes, Out<double> sums) {
    SHARED(float, room, WARPS);
    SHARED(double, wide, WARPS);
    if (stopped(status)) return;
    float least, most;
    extremes_of(extremes, &least, &most, room);
    double sum = 0.0, squares = 0.0;
    if (most != 0.0f) {
        stream(v.n, [&](u64 i) { return v[i]; }, [&](u64, float second) {
            double x = second / most;
            sum += x, squares = fma(x, x, squares);
        });
    }
    sum = block_sum<double>(sum, wide), squares = block_sum<double>(squares, wide);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum, sums[gridDim.x + blockIdx.x] = squares;
}

// Third pass: w = √(v·factor + ε), θ ← θ − rate·m/(w − ½·min w).
KERNEL(THREADS, 4)
set_adam_step(const Status* status, Rule u, In<float> m, In<float> v, In<float> extremes, In<double> first, In<double> second, Out<float> p) {
    SHARED(float, room, WARPS);
    SHARED(double, wide, WARPS);
    if (stopped(status)) return;
    float least, most;
    extremes_of(extremes, &least, &most, room);
    double sum = total_of(first, wide), squares = total_of(second, wide);
    if (most == 0.0f) return;
    float factor = (float)(sum * sum / ((double)p.n * squares) / u.correction);
    // w grows with v, so its smallest value is that of the smallest v.
    float half = 0.5f * sqrtf(least * factor + u.eps);
    stream(p.n, [&](u64 i) { return Trained{p[i], 0.0f, m[i], v[i]}; }, [&](u64 i, const Trained& t) {
        float denominator = sqrtf(t.v * factor + u.eps) - half;
        if (denominator > 0.0f) p[i] = t.p - u.rate * t.m / denominator;
    });
}

// Values of the codes of moments (bdia_core::codes), as the host computes them: `sign` is 1 for first moments, whose codes
// are those of both signs, else 0.
__device__ inline float code_value(u32 code, u32 sign) {
    if (code == 255) return 1.0f;
    i32 at = (i32)code - (sign ? 127 : 0);
    if (at == 0) return 0.0f;
    u32 parts = sign ? 1 : 2, nth = at < 0 ? -at : at;
    if (!sign) nth++;
    double scale = 1e6;
    for (; 2 * parts <= nth; parts *= 2) scale /= 10.0;
    float x = (float)((0.1 + 0.9 * (double)(2 * (nth - parts) + 1) / (double)(2 * parts)) / scale);
    return at < 0 ? -x : x;
}

// The code whose value is nearest to x; of two, the lower one.
__device__ inline u32 nearest(Shared<float> values, float x) {
    u32 code = 0;
    for (u32 step = 128; step > 0; step /= 2) {
        float below = values[code + step - 1], above = values[code + step];
        if (0.5f * (below + above) < x) code += step;
    }
    return code;
}

// The codes of four threads in a row, as a word.
__device__ inline u32 word_of(u32 code) {
    u32 word = code << 8 * (threadIdx.x % 4);
    word |= __shfl_xor_sync(FULL, word, 1);
    return word | __shfl_xor_sync(FULL, word, 2);
}

// AdamW with moments in 8 bits: a block of values, which share their largest magnitudes, is one of threads. The step is
// taken from the new moments before they become codes.
KERNEL(THREADS, 4)
adam_w_8bit(const Status* status, Rule u, Out<float> p, In<float> g, Out<float> most_m, Out<float> most_v, Out<u32> first, Out<u32> second) {
    SHARED(float, of_m, 256);
    SHARED(float, of_v, 256);
    SHARED(float, room, WARPS);
    if (stopped(status)) return;
    of_m[threadIdx.x] = code_value(threadIdx.x, 1), of_v[threadIdx.x] = code_value(threadIdx.x, 0);
    __syncthreads();
    for (u64 block = blockIdx.x; block < most_m.n; block += gridDim.x) {
        u64 i = block * THREADS + threadIdx.x;
        bool there = i < p.n;
        float m = 0.0f, v = 0.0f, x = 0.0f;
        if (there) {
            u32 shift = 8 * (threadIdx.x % 4);
            float grad = u.scale * g[i];
            m = of_m[(u32)first[i / 4] >> shift & 255] * most_m[block];
            v = of_v[(u32)second[i / 4] >> shift & 255] * most_v[block];
            x = p[i];
            m = u.keep1 * m + u.take1 * grad;
            v = u.keep2 * v + u.take2 * (grad * grad);
        }
        // No thread writes before all have read.
        float new_m = block_max(fabsf(m), room), new_v = block_max(v, room);
        float m_part = new_m > 0.0f ? m / new_m : 0.0f, v_part = new_v > 0.0f ? v / new_v : 0.0f;
        u32 a = there ? nearest(of_m, m_part) : 0, b = there ? nearest(of_v, v_part) : 0;
        // Neither a negative first moment nor a positive second one becomes 0.
        if (m_part < 0.0f && a == 127) a--;
        if (v_part > 0.0f && b == 0) b++;
        a = word_of(a), b = word_of(b);
        if (threadIdx.x == 0) most_m[block] = new_m, most_v[block] = new_v;
        if (!there) continue;
        if (threadIdx.x % 4 == 0) first[i / 4] = a, second[i / 4] = b;
        x -= u.shrink * x;
        float denominator = sqrtf(v * u.inverse) + u.eps;
        if (denominator > 0.0f) x -= u.rate * m / denominator;
        p[i] = x;
    }
}

// Constants of one update by Adafactor.
struct Adafactor {
    float shrink, scale, keep, take;
    double eps, lr, threshold;
};

__device__ inline double square(const Adafactor& u, float g) {
    double x = u.scale * g;
    return x * x;
}

// A second moment after `mean` squares.
__device__ inline float moved(const Adafactor& u, float old, double mean) { return u.keep * old + u.take * (float)(mean + u.eps); }

// row[rows]: moments of the means of g² over each row, by a warp.
KERNEL(THREADS, 4) adafactor_rows(const Status* status, Adafactor u, In<float> g, u64 cols, Out<float> row) {
    if (stopped(status)) return;
    u64 r = (u64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (r >= row.n) return;
    double sum = 0.0;
    for (u64 j = threadIdx.x % 32; j < cols; j += 32) sum += square(u, g[r * cols + j]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) row[r] = moved(u, row[r], sum / (double)cols);
}

#define TALL 1024

// col[cols]: moments of the means of g² over each column, 32 columns by a block whose warps take turns with the rows.
KERNEL(TALL, 1) adafactor_cols(const Status* status, Adafactor u, In<float> g, u64 rows, Out<float> col) {
    SHARED(double, room, TALL);
    if (stopped(status)) return;
    u64 j = (u64)blockIdx.x * 32 + threadIdx.x % 32;
    double sum = 0.0;
    if (j < col.n)
        for (u64 r = threadIdx.x / 32; r < rows; r += TALL / 32) sum += square(u, g[r * col.n + j]);
    room[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= 32 || j >= col.n) return;
    for (u32 w = 1; w < TALL / 32; w++) sum += room[threadIdx.x + 32 * w];
    col[j] = moved(u, col[j], sum / (double)rows);
}

// mean[1] of the moments of rows, by one block.
KERNEL(THREADS, 4) adafactor_mean(const Status* status, In<float> row, Out<double> mean) {
    SHARED(double, room, WARPS);
    if (stopped(status)) return;
    double sum = 0.0;
    for (u64 i = threadIdx.x; i < row.n; i += THREADS) sum += (double)row[i];
    sum = block_sum<double>(sum, room);
    if (threadIdx.x == 0) mean[0] = sum / (double)row.n;
}

// A gradient with its second moments: those of its row and column, or its own.
struct Factored {
    float g, row, col;
};

__device__ inline Factored factored(const In<float>& g, u64 i, const In<float>& row, const In<float>& col) {
    if (col.n == 0) return Factored{g[i], row[i], 0.0f};
    // Most tensors have fewer values than 32 bits can count.
    u64 r = g.n >> 32 ? i / col.n : (u32)i / (u32)col.n;
    return Factored{g[i], row[r], col[i - r * col.n]};
}

// g/√v; of a matrix v = row·col/mean.
__device__ inline float step_of(const Adafactor& u, const Factored& t, bool matrix, float mean) {
    float g = u.scale * t.g;
    if (!matrix) return g / sqrtf(t.row);
    return g * (1.0f / sqrtf(t.row / mean) * (1.0f / sqrtf(t.col)));
}

// parts[blocks] = Σ of the squares of steps. Of a vector, after its moments: v[i], which is `row` in what follows.
KERNEL(THREADS, 4) adafactor_vector(const Status* status, Adafactor u, In<float> g, Out<float> v, Out<double> parts) {
    SHARED(double, room, WARPS);
    if (stopped(status)) return;
    double sum = 0.0;
    stream(g.n, [&](u64 i) { return Factored{g[i], v[i], 0.0f}; }, [&](u64 i, Factored t) {
        v[i] = t.row = moved(u, t.row, square(u, t.g));
        double step = step_of(u, t, false, 0.0f);
        sum = fma(step, step, sum);
    });
    sum = block_sum<double>(sum, room);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

KERNEL(THREADS, 4)
adafactor_squares(const Status* status, Adafactor u, In<float> g, In<float> row, In<float> col, In<double> mean, Out<double> parts) {
    SHARED(double, room, WARPS);
    if (stopped(status)) return;
    float middle = (float)mean[0];
    double sum = 0.0;
    stream(g.n, [&](u64 i) { return factored(g, i, row, col); }, [&](u64, const Factored& t) {
        double step = step_of(u, t, true, middle);
        sum = fma(step, step, sum);
    });
    sum = block_sum<double>(sum, room);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// θ ← θ − shrink·θ − η·step/max(1, rms/threshold)
KERNEL(THREADS, 4)
adafactor_step(const Status* status, Adafactor u, In<float> g, In<float> row, In<float> col, In<double> mean, In<double> parts, Out<float> p) {
    SHARED(double, room, WARPS);
    if (stopped(status)) return;
    double rms = sqrt(total_of(parts, room) / (double)p.n) / u.threshold;
    float rate = (float)(u.lr / (rms > 1.0 ? rms : 1.0)), middle = col.n ? (float)mean[0] : 0.0f;
    struct With {
        Factored t;
        float p;
    };
    stream(p.n, [&](u64 i) { return With{factored(g, i, row, col), p[i]}; }, [&](u64 i, const With& x) {
        p[i] = x.p - u.shrink * x.p - rate * step_of(u, x.t, col.n != 0, middle);
    });
}
