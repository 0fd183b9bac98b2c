// RMS normalization. The backend's kernels/common.cu stands before this text: In, Out, KERNEL,
// THREADS, WARPS, warp_sum. Sums go in a fixed order.

// y[rows, width] = x·rstd·w; a warp a row.
KERNEL(THREADS, 4) rms_norm(float eps, In<float> w, In<float> x, Out<float> y, Out<float> rstd) {
    u64 row = (u64)blockIdx.x * WARPS + threadIdx.x / 32, width = w.n;
    if (row >= rstd.n) return;
    u32 lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (u64 c = lane; c < width; c += 32) {
        float v = x[row * width + c];
        sum = fmaf(v, v, sum);
    }
    float r = 1.0f / sqrtf(warp_sum(sum) / (float)width + eps);
    if (lane == 0) rstd[row] = r;
    for (u64 c = lane; c < width; c += 32) y[row * width + c] = x[row * width + c] * r * w[c];
}

// dx[rows, width] += rstd·(g − x·rstd²·mean(g·x)), g = dy·w; a warp a row.
KERNEL(THREADS, 4) rms_norm_dx(In<float> w, In<float> x, In<float> rstd, In<float> dy, Out<float> dx) {
    u64 row = (u64)blockIdx.x * WARPS + threadIdx.x / 32, width = w.n;
    if (row >= rstd.n) return;
    u32 lane = threadIdx.x % 32;
    float sum = 0.0f, r = rstd[row];
    for (u64 c = lane; c < width; c += 32) {
        u64 i = row * width + c;
        sum = fmaf(dy[i] * w[c], x[i], sum);
    }
    float mean = warp_sum(sum) / (float)width;
    for (u64 c = lane; c < width; c += 32) {
        u64 i = row * width + c;
        dx[i] = dx[i] + r * (dy[i] * w[c] - x[i] * r * r * mean);
    }
}

// dw[width] += Σ_rows dy·x·rstd; a thread a column, its rows in order.
KERNEL(THREADS, 4) rms_norm_dw(In<float> x, In<float> rstd, In<float> dy, Out<float> dw) {
    u64 c = (u64)blockIdx.x * THREADS + threadIdx.x, width = dw.n;
    if (c >= width) return;
    float sum = 0.0f;
    for (u64 row = 0; row < rstd.n; row++) {
        u64 i = row * width + c;
        sum = fmaf(dy[i] * x[i], rstd[row], sum);
    }
    dw[c] = dw[c] + sum;
}
