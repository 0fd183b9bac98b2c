// Optimizers (bdia_core::optim), tensor by tensor. They do nothing while a fault is set. Sums over a tensor are of double
// precision, by block and then over the blocks' partial sums in order; the number of blocks follows from the length alone.

__device__ inline bool stopped(const Status* status) { return status->owner != FULL; }

// Constants of one update; what a rule does not need is 0.
struct Rule {
    float shrink, scale, rate, keep1, take1, keep2, take2, inverse, eps;
    double correction;
};

// parts[blocks] = Σ g²
KERNEL(THREADS, 4) squares(In<float> g, Out<double> parts) {
    SHARED(double, room, WARPS);
    double sum = 0.0;
    EACH(i, g.n) {
        double x = g[i];
        sum += x * x;
    }
    sum = block_sum<double>(sum, room);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// Σ parts, by one block; every thread gets it.
__device__ inline double total_of(const In<double>& parts, Shared<double> room) {
    double sum = 0.0;
    for (u64 i = threadIdx.x; i < parts.n; i += THREADS) sum += parts[i];
    return block_sum<double>(sum, room);
}

// out[1] = Σ parts; a sum that is not finite is a fault.
KERNEL(THREADS, 1) squares_total(Report r, In<double> parts, Out<float> out) {
    SHARED(double, room, WARPS);
    float sum = (float)total_of(parts, room);
    if (threadIdx.x != 0) return;
    out[0] = sum;
    if (!isfinite(sum)) report(r, 0, REAL, 0);
}

// θ ← θ − shrink·θ; m ← μ·m + g (where there is an m); θ ← θ − η·m
KERNEL(THREADS, 4) sgd(const Status* status, Rule u, Out<float> p, In<float> g, Out<float> m) {
    if (stopped(status)) return;
    EACH(i, p.n) {
        float x = p[i], step = u.scale * g[i];
        if (m.n) m[i] = step = u.keep1 * m[i] + step;
        x -= u.shrink * x;
        p[i] = x - u.rate * step;
    }
}

// m ← β1·m + (1-β1)·g, v ← β2·v + (1-β2)·g²
__device__ inline void moments(const Rule& u, u64 i, float g, const Out<float>& m, const Out<float>& v, float* first, float* second) {
    g *= u.scale;
    *first = u.keep1 * m[i] + u.take1 * g;
    *second = u.keep2 * v[i] + u.take2 * (g * g);
    m[i] = *first, v[i] = *second;
}

// θ ← θ − rate·m/(√(v·inverse) + ε); a zero denominator moves nothing.
KERNEL(THREADS, 4) adam_w(const Status* status, Rule u, Out<float> p, In<float> g, Out<float> m, Out<float> v) {
    if (stopped(status)) return;
    EACH(i, p.n) {
        float first, second, x = p[i];
        moments(u, i, g[i], m, v, &first, &second);
        float denominator = sqrtf(second * u.inverse) + u.eps;
        x -= u.shrink * x;
        if (denominator > 0.0f) x -= u.rate * first / denominator;
        p[i] = x;
    }
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
    EACH(i, p.n) {
        float first, second, x = p[i];
        moments(u, i, g[i], m, v, &first, &second);
        p[i] = x - u.shrink * x;
        least = fminf(least, second), most = larger(most, second);
    }
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
        EACH(i, v.n) {
            double x = v[i] / most;
            sum += x, squares += x * x;
        }
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
    EACH(i, p.n) {
        float denominator = sqrtf(v[i] * factor + u.eps) - half;
        if (denominator > 0.0f) p[i] = p[i] - u.rate * m[i] / denominator;
    }
}
