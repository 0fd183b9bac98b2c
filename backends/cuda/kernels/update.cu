// The reversible update, with the bits of bdia_core::update. A warp takes AT_ONCE groups of 32 elements of one sample at a
// time; each group has one word of side bits per plane, which a vote writes. All tensors of a chunk are [samples, per], with
// fewer than 2^30 values.

// Keeps a fault of the host, unless there is one already.
KERNEL(32, 1) raise(Report r) { report(r, 0, REAL, 0); }

struct Shape {
    u32 samples, per;
    // Words of one plane of one sample.
    u32 groups;
    // The sign of gamma; 0 draws it from `streams`.
    i32 sign;
    // Index of the first element in the whole tensor.
    u64 at;
    Streams streams;
    // Planes `m`, or 0; |gamma|; 2^l.
    u32 m;
    float magnitude, scale;
};

__device__ inline i32 sigma_of(const Shape& s, u32 sample) {
    return s.sign ? s.sign : 1 - 2 * (i32)(quad(s.streams, sample, 0).w[0] & 1);
}

// Where an element is: its index in its sample and in the tensor, the word of its first side bit; and its sample's sign.
struct Place {
    u32 e, word;
    u64 i;
    // False for a lane beyond the sample's end.
    bool active;
    i32 sigma;
};

// finish(place, load(place)) for all elements. The lanes of a warp call `finish` together, those beyond the sample's end with
// zeros; `load` writes nothing and knows no sign. Each block has a part of its own without gaps, so that signs are drawn rarely.
template <class Load, class Finish> __device__ void each(const Shape& s, bool signs, Load load, Finish finish) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, pieces = (s.groups + AT_ONCE - 1) / AT_ONCE;
    u32 all = s.samples * pieces, part = (all + gridDim.x - 1) / gridDim.x;
    u32 from = blockIdx.x * part, to = from + part < all ? from + part : all, last = FULL;
    Place p[AT_ONCE];
    i32 sigma = 1;
    for (u32 n = from + warp; n < to; n += WARPS) {
        u32 sample = n / pieces, g = n % pieces * AT_ONCE;
        decltype(load(p[0])) v[AT_ONCE] = {};
        UNROLL
        for (u32 k = 0; k < AT_ONCE; k++) {
            u32 e = (g + k) * 32 + lane;
            p[k] = Place{e, sample * s.m * s.groups + g + k, (u64)sample * s.per + g * 32 + lane + k * 32, e < s.per, 1};
            if (p[k].active) v[k] = load(p[k]);
        }
        if (signs && sample != last) sigma = sigma_of(s, sample), last = sample;
        UNROLL
        for (u32 k = 0; k < AT_ONCE; k++) {
            p[k].sigma = sigma;
            if (g + k < s.groups) finish(p[k], v[k]);
        }
    }
}

// Operands of one element.
struct Mixed {
    i32 x;
    float cur, h;
    u32 side;
};
struct Blended {
    float x, cur, h;
};
struct Given {
    i32 x;
    float y;
};

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

__device__ inline void mix(u64* s, u32 factor) {
    u64 p = (u64)(u32)*s * factor;
    *s = (*s << 32 | *s >> 32) ^ (u32)(p ^ p >> 32);
}

__device__ inline u64 checksum(i32 x, u64 index) {
    u64 s = index * 0x9E3779B97F4A7C15ull ^ (u32)x;
    mix(&s, 0x27D4EB2Fu), mix(&s, 0x85EBCA77u), mix(&s, 0xC2B2AE3Du), mix(&s, 0x9E3779B1u);
    return s;
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
KERNEL(THREADS, 5) quantize(Shape s, Report r, In<float> y, Out<i32> x, Out<u32> sum) {
    u64 total = 0;
    each(s, false, [&](const Place& p) { return y[p.i]; }, [&](const Place& p, float value) {
        if (!p.active) return;
        i32 q;
        if (!quantized(value, s.scale, &q)) report(r, p.i, REAL, __float_as_uint(value));
        x[p.i] = q;
        total += checksum(q, s.at + p.i);
    });
    add_checksum(total, sum);
}

// y = 2^-l·X
KERNEL(THREADS, 5) dequantize(float unit, In<i32> x, Out<float> y) {
    stream(y.n, [&](u64 i) { return x[i]; }, [&](u64 i, i32 value) { y[i] = MUL(__int2float_rn(value), unit); });
}

// X += Q(h)
KERNEL(THREADS, 5) add_quantized(Shape s, Report r, Out<i32> x, In<float> h, Out<u32> sum) {
    u64 total = 0;
    each(s, false, [&](const Place& p) { return Mixed{x[p.i], 0.0f, h[p.i], 0}; }, [&](const Place& p, const Mixed& v) {
        if (!p.active) return;
        i32 q;
        if (!quantized(v.h, s.scale, &q)) report(r, p.i, REAL, __float_as_uint(v.h));
        i32 next = (i32)((u32)v.x + (u32)q);
        if (outside(next)) report(r, p.i, GRID, (u32)next);
        x[p.i] = next;
        total += checksum(next, s.at + p.i);
    });
    add_checksum(total, sum);
}

// X -= Q(h), wrapping
KERNEL(THREADS, 5) subtract_quantized(Shape s, Out<i32> x, In<float> h, Out<u32> sum) {
    u64 total = 0;
    each(s, false, [&](const Place& p) { return Mixed{x[p.i], 0.0f, h[p.i], 0}; }, [&](const Place& p, const Mixed& v) {
        if (!p.active) return;
        i32 q;
        quantized(v.h, s.scale, &q);
        i32 old = (i32)((u32)v.x - (u32)q);
        x[p.i] = old;
        total += checksum(old, s.at + p.i);
    });
    add_checksum(total, sum);
}

// x: X_{k-1} becomes X_{k+1} = σ·(X_{k-1} + s)/2^m + Q((1-γ)·x_k + (1+γ)·h_k); side[samples, m, groups] gets the low
// bits of X_{k-1}.
KERNEL(THREADS, 5) step(Shape s, Report r, Out<i32> x, In<float> cur, In<float> h, Out<u32> side, Out<u32> sum) {
    u64 total = 0;
    u32 mask = (1u << s.m) - 1;
    each(s, true, [&](const Place& p) { return Mixed{x[p.i], cur[p.i], h[p.i], 0}; }, [&](const Place& p, const Mixed& v) {
        u32 low = (u32)v.x & mask;
        if (side.n) {
            ROLLED
            for (u32 plane = 0; plane < s.m; plane++) {
                u32 bits = __ballot_sync(FULL, low >> plane & 1);
                if (p.e % 32 == 0) side[p.word + plane * s.groups] = bits;
            }
        }
        if (!p.active) return;
        float y = mix(MUL(s.magnitude, (float)p.sigma), v.cur, v.h);
        i32 q;
        if (!quantized(y, s.scale, &q)) report(r, p.i, REAL, __float_as_uint(y));
        i32 half = (i32)((u32)v.x + shift(s.m, low, p.e)) >> s.m;
        i32 next = (i32)((u32)half * (u32)p.sigma + (u32)q);
        if (outside(next)) report(r, p.i, GRID, (u32)next);
        x[p.i] = next;
        total += checksum(next, s.at + p.i);
    });
    add_checksum(total, sum);
}

// x: X_{k+1} becomes X_{k-1} = σ·2^m·(X_{k+1} − Q(...)) − s.
KERNEL(THREADS, 4) inverse(Shape s, Out<i32> x, In<float> cur, In<float> h, In<u32> side, Out<u32> sum) {
    u64 total = 0;
    auto load = [&](const Place& p) { return Mixed{x[p.i], cur[p.i], h[p.i], side[p.word]}; };
    each(s, true, load, [&](const Place& p, const Mixed& v) {
        if (!p.active) return;
        i32 q;
        quantized(mix(MUL(s.magnitude, (float)p.sigma), v.cur, v.h), s.scale, &q);
        u32 low = v.side >> p.e % 32 & 1;
        ROLLED
        for (u32 plane = 1; plane < s.m; plane++) low |= (side[p.word + plane * s.groups] >> p.e % 32 & 1) << plane;
        u32 whole = ((u32)v.x - (u32)q) * (u32)p.sigma << s.m;
        i32 old = (i32)(whole - shift(s.m, low, p.e));
        x[p.i] = old;
        total += checksum(old, s.at + p.i);
    });
    add_checksum(total, sum);
}

// x = γ·x + ((1-γ)·cur + (1+γ)·h); with γ = 0 the old x is not read.
KERNEL(THREADS, 5) blend(Shape s, Report r, Out<float> x, In<float> cur, In<float> h) {
    bool reads = s.magnitude != 0.0f;
    auto load = [&](const Place& p) { return Blended{reads ? (float)x[p.i] : 0.0f, cur[p.i], h[p.i]}; };
    each(s, true, load, [&](const Place& p, const Blended& v) {
        if (!p.active) return;
        float gamma = MUL(s.magnitude, (float)p.sigma), next = mix(gamma, v.cur, v.h);
        if (reads) next = ADD(MUL(gamma, v.x), next);
        x[p.i] = next;
        if (!isfinite(next)) report(r, p.i, REAL, __float_as_uint(next));
    });
}

// x = (x − ((1-γ)·cur + (1+γ)·h)) / γ
KERNEL(THREADS, 5) unblend(Shape s, Out<float> x, In<float> cur, In<float> h) {
    each(s, true, [&](const Place& p) { return Blended{x[p.i], cur[p.i], h[p.i]}; }, [&](const Place& p, const Blended& v) {
        if (!p.active) return;
        float gamma = MUL(s.magnitude, (float)p.sigma);
        x[p.i] = __fdiv_rn(SUB(v.x, mix(gamma, v.cur, v.h)), gamma);
    });
}

// next: G_{k+1} becomes γ·G_{k+1}; cur += (1-γ)·G_{k+1}; h = (1+γ)·G_{k+1}
KERNEL(THREADS, 5) combine(Shape s, Report r, Out<float> next, Out<float> cur, Out<float> h) {
    each(s, true, [&](const Place& p) { return Blended{next[p.i], cur[p.i], 0.0f}; }, [&](const Place& p, const Blended& v) {
        if (!p.active) return;
        float gamma = MUL(s.magnitude, (float)p.sigma);
        float sum = ADD(v.cur, MUL(SUB(1.0f, gamma), v.x)), up = MUL(ADD(1.0f, gamma), v.x);
        next[p.i] = MUL(gamma, v.x);
        cur[p.i] = sum;
        h[p.i] = up;
        float bad = isfinite(up) ? sum : up;
        if (!isfinite(bad)) report(r, p.i, REAL, __float_as_uint(bad));
    });
}

// Reports the first value that is not finite.
KERNEL(THREADS, 5) check_gradient(Report r, In<float> g) {
    stream(g.n, [&](u64 i) { return g[i]; }, [&](u64 i, float value) {
        if (!isfinite(value)) report(r, i, REAL, __float_as_uint(value));
    });
}

// Reports the first value of y that is not 2^-l·X in every bit.
KERNEL(THREADS, 5) check_input(float unit, Report r, In<i32> x, In<float> y) {
    stream(y.n, [&](u64 i) { return Given{x[i], y[i]}; }, [&](u64 i, const Given& v) {
        if (__float_as_uint(v.y) != __float_as_uint(MUL(__int2float_rn(v.x), unit))) report(r, i, REAL, 0);
    });
}

KERNEL(THREADS, 5) compare(Report r, In<u32> a, In<u32> b) {
    bool differ = false;
    for (u64 i = 0; i < a.n; i++) differ |= a[i] != b[i];
    if (differ) report(r, 0, REAL, 0);
}

// count (64 bits) += number of differing elements
KERNEL(THREADS, 5) count_differences(Shape s, In<i32> a, In<i32> b, Out<u32> count) {
    u64 total = 0;
    auto load = [&](const Place& p) { return Two<i32>{a[p.i], b[p.i]}; };
    each(s, false, load, [&](const Place&, const Two<i32>& v) { total += v.x != v.y; });
    add_checksum(total, count);
}

KERNEL(THREADS, 5) fill(Out<u32> x, u32 value) {
    stream(x.n, [&](u64) { return value; }, [&](u64 i, u32 value) { x[i] = value; });
}
