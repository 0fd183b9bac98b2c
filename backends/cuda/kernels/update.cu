// The reversible update, with the bits of bdia_core::update. A warp takes 32 elements of one sample at a time: one word
// of side bits per plane, which a vote writes. All tensors of a chunk are [samples, per], with fewer than 2^30 values.

struct Shape {
    u32 samples, per;
    // Words of one plane of one sample.
    u32 groups;
    // Index of the first element in the whole tensor.
    u32 at;
    // Streams of the sign of gamma; `sign` 0 draws it, else it is the sign.
    Streams streams;
    i32 sign;
    // Planes `m`, or 0; |gamma|; 2^l and 2^-l.
    u32 m;
    float magnitude, scale, unit;
};

__device__ inline i32 sigma_of(const Shape& s, u32 sample) {
    return s.sign ? s.sign : 1 - 2 * (i32)(quad(s.streams, sample, 0).w[0] & 1);
}

// f(sample, element, index, active, sigma) for all elements. The lanes of a warp call it together, those beyond the
// sample's end with active = false. Each block has a part of its own without gaps, so that signs are drawn rarely.
template <class F> __device__ void each(const Shape& s, bool signs, F f) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 all = s.samples * s.groups, part = (all + gridDim.x - 1) / gridDim.x;
    u32 from = blockIdx.x * part, to = from + part < all ? from + part : all, last = FULL;
    i32 sigma = 1;
    for (u32 g = from + warp; g < to; g += WARPS) {
        u32 sample = g / s.groups, e = g % s.groups * 32 + lane;
        if (signs && sample != last) sigma = sigma_of(s, sample), last = sample;
        f(sample, e, sample * s.per + e, e < s.per, sigma);
    }
}

__device__ inline bool quantized(float y, float scale, i32* q) {
    float r = rintf(MUL(y, scale));
    bool within = fabsf(r) <= (float)LIMIT;
    *q = within ? (i32)r : 0;
    return within;
}

// (1-γ)·x + (1+γ)·h
__device__ inline float mix(float gamma, float x, float h) {
    return ADD(MUL(SUB(1.0f, gamma), x), MUL(ADD(1.0f, gamma), h));
}

// s of X + s, a multiple of 2^m, from the low bits r of X.
__device__ inline u32 shift(u32 m, u32 r, u32 element) {
    if (m == 1) return r;
    u32 half = 1u << (m - 1);
    bool down = r < half || (r == half && element % 2 == 0);
    return down ? 0u - r : (1u << m) - r;
}

__device__ inline u64 checksum(i32 x, u32 index) {
    u32 w = index * 0x9E3779B1u;
    return (u64)(u32)x * ((w ^ w >> 15) | 1u);
}

// Wrapping: |X| as a number without sign.
__device__ inline bool outside(i32 x) { return (x < 0 ? 0u - (u32)x : (u32)x) > (u32)LIMIT; }

// One addition to the sum per block.
__device__ inline void add_checksum(u64 total, const Out<u32>& sum) {
    SHARED(u64, room, WARPS);
    if (sum.n == 0) return;
    total = block_sum<u64>(total, room);
    if (threadIdx.x == 0) accumulate(sum, total);
}

// X = Q(y)
KERNEL(THREADS, 6) quantize(Shape s, Report r, In<float> y, Out<i32> x, Out<u32> sum) {
    u64 total = 0;
    each(s, false, [&](u32, u32, u32 i, bool active, i32) {
        if (!active) return;
        float value = y[i];
        i32 q;
        if (!quantized(value, s.scale, &q)) report(r, i, REAL, __float_as_uint(value));
        x[i] = q;
        total += checksum(q, s.at + i);
    });
    add_checksum(total, sum);
}

// y = 2^-l·X
KERNEL(THREADS, 6) dequantize(Shape s, In<i32> x, Out<float> y) {
    each(s, false, [&](u32, u32, u32 i, bool active, i32) {
        if (active) y[i] = MUL(__int2float_rn(x[i]), s.unit);
    });
}

// X += Q(h)
KERNEL(THREADS, 6) add_quantized(Shape s, Report r, Out<i32> x, In<float> h, Out<u32> sum) {
    u64 total = 0;
    each(s, false, [&](u32, u32, u32 i, bool active, i32) {
        if (!active) return;
        float value = h[i];
        i32 q;
        if (!quantized(value, s.scale, &q)) report(r, i, REAL, __float_as_uint(value));
        i32 next = (i32)((u32)x[i] + (u32)q);
        if (outside(next)) report(r, i, GRID, (u32)next);
        x[i] = next;
        total += checksum(next, s.at + i);
    });
    add_checksum(total, sum);
}

// X -= Q(h), wrapping
KERNEL(THREADS, 6) subtract_quantized(Shape s, Out<i32> x, In<float> h, Out<u32> sum) {
    u64 total = 0;
    each(s, false, [&](u32, u32, u32 i, bool active, i32) {
        if (!active) return;
        i32 q;
        quantized(h[i], s.scale, &q);
        i32 old = (i32)((u32)x[i] - (u32)q);
        x[i] = old;
        total += checksum(old, s.at + i);
    });
    add_checksum(total, sum);
}

// x: X_{k-1} becomes X_{k+1} = σ·(X_{k-1} + s)/2^m + Q((1-γ)·x_k + (1+γ)·h_k); side[samples, m, groups] gets the low
// bits of X_{k-1}.
KERNEL(THREADS, 6) step(Shape s, Report r, Out<i32> x, In<float> cur, In<float> h, Out<u32> side, Out<u32> sum) {
    u64 total = 0;
    u32 mask = (1u << s.m) - 1;
    each(s, true, [&](u32 sample, u32 e, u32 i, bool active, i32 sigma) {
        i32 old = active ? (i32)x[i] : 0;
        u32 low = (u32)old & mask;
        if (side.n) {
            u32 word = sample * s.m * s.groups + e / 32;
            for (u32 plane = 0; plane < s.m; plane++) {
                u32 bits = __ballot_sync(FULL, low >> plane & 1);
                if (e % 32 == 0) side[word + plane * s.groups] = bits;
            }
        }
        if (!active) return;
        float y = mix(MUL(s.magnitude, (float)sigma), cur[i], h[i]);
        i32 q;
        if (!quantized(y, s.scale, &q)) report(r, i, REAL, __float_as_uint(y));
        i32 half = (i32)((u32)old + shift(s.m, low, e)) >> s.m;
        i32 next = (i32)((u32)half * (u32)sigma + (u32)q);
        if (outside(next)) report(r, i, GRID, (u32)next);
        x[i] = next;
        total += checksum(next, s.at + i);
    });
    add_checksum(total, sum);
}

// x: X_{k+1} becomes X_{k-1} = σ·2^m·(X_{k+1} − Q(...)) − s.
KERNEL(THREADS, 6) inverse(Shape s, Out<i32> x, In<float> cur, In<float> h, In<u32> side, Out<u32> sum) {
    u64 total = 0;
    each(s, true, [&](u32 sample, u32 e, u32 i, bool active, i32 sigma) {
        if (!active) return;
        i32 q;
        quantized(mix(MUL(s.magnitude, (float)sigma), cur[i], h[i]), s.scale, &q);
        u32 word = sample * s.m * s.groups + e / 32;
        u32 low = 0;
        for (u32 plane = 0; plane < s.m; plane++) low |= (side[word + plane * s.groups] >> e % 32 & 1) << plane;
        u32 whole = ((u32)x[i] - (u32)q) * (u32)sigma << s.m;
        i32 old = (i32)(whole - shift(s.m, low, e));
        x[i] = old;
        total += checksum(old, s.at + i);
    });
    add_checksum(total, sum);
}

// x = γ·x + ((1-γ)·cur + (1+γ)·h); with γ = 0 the old x is not read.
KERNEL(THREADS, 6) blend(Shape s, Report r, Out<float> x, In<float> cur, In<float> h) {
    each(s, true, [&](u32, u32, u32 i, bool active, i32 sigma) {
        if (!active) return;
        float gamma = MUL(s.magnitude, (float)sigma), next = mix(gamma, cur[i], h[i]);
        if (s.magnitude != 0.0f) next = ADD(MUL(gamma, x[i]), next);
        x[i] = next;
        if (!isfinite(next)) report(r, i, REAL, __float_as_uint(next));
    });
}

// x = (x − ((1-γ)·cur + (1+γ)·h)) / γ
KERNEL(THREADS, 6) unblend(Shape s, Out<float> x, In<float> cur, In<float> h) {
    each(s, true, [&](u32, u32, u32 i, bool active, i32 sigma) {
        if (!active) return;
        float gamma = MUL(s.magnitude, (float)sigma);
        x[i] = __fdiv_rn(SUB(x[i], mix(gamma, cur[i], h[i])), gamma);
    });
}

// next: G_{k+1} becomes γ·G_{k+1}; cur += (1-γ)·G_{k+1}; h = (1+γ)·G_{k+1}
KERNEL(THREADS, 6) combine(Shape s, Out<float> next, Out<float> cur, Out<float> h) {
    each(s, true, [&](u32, u32, u32 i, bool active, i32 sigma) {
        if (!active) return;
        float gamma = MUL(s.magnitude, (float)sigma), g = next[i];
        next[i] = MUL(gamma, g);
        cur[i] = ADD(cur[i], MUL(SUB(1.0f, gamma), g));
        h[i] = MUL(ADD(1.0f, gamma), g);
    });
}

KERNEL(THREADS, 6) compare(Report r, In<u32> a, In<u32> b) {
    bool differ = false;
    for (u64 i = 0; i < a.n; i++) differ |= a[i] != b[i];
    if (differ) report(r, 0, REAL, 0);
}

// count (64 bits) += number of differing elements
KERNEL(THREADS, 6) count_differences(Shape s, In<i32> a, In<i32> b, Out<u32> count) {
    u64 total = 0;
    each(s, false, [&](u32, u32, u32 i, bool active, i32) { total += active && a[i] != b[i]; });
    add_checksum(total, count);
}

KERNEL(THREADS, 6) fill(Out<u32> x, u32 value) {
    for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < x.n; i += (u64)gridDim.x * THREADS) x[i] = value;
}
