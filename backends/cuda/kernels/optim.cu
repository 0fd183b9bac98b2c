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
