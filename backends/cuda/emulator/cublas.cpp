// Products of the emulated device: what `bdia-cuda` asks of libcublasLt, as plain loops.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <dlfcn.h>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

enum { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13 };
enum { R_32F = 0, R_16BF = 14 };
enum { COMPUTE_32F = 68, FAST_16BF = 75, FAST_TF32 = 77 };

// Rounds to the nearest value with `bits` bits less of fraction, ties to even.
static float rounded(float x, int bits) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7F800000u) != 0x7F800000u) u += ((1u << (bits - 1)) - 1) + (u >> bits & 1);
    u &= ~((1u << bits) - 1);
    memcpy(&x, &u, 4);
    return x;
}

static float load(const void* p, size_t i, int type, int compute) {
    float x;
    if (type == R_16BF) {
        uint32_t u = (uint32_t)((const uint16_t*)p)[i] << 16;
        memcpy(&x, &u, 4);
        return x;
    }
    x = ((const float*)p)[i];
    return compute == FAST_16BF ? rounded(x, 16) : compute == FAST_TF32 ? rounded(x, 13) : x;
}

// A symbol of the emulated driver.
static void* driver(const char* name) {
    void* found = dlsym(RTLD_DEFAULT, name);
    if (found) return found;
    void* library = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? dlsym(library, name) : nullptr;
}

// Whether a matrix of `cols` columns lies in the emulated device's memory.
static bool allocated(const void* p, int rows, int cols, int ld, size_t size) {
    static auto ask = (bool (*)(uintptr_t, size_t))driver("emulator_allocated");
    return ask && ld >= rows && ask((uintptr_t)p, ((size_t)ld * (cols - 1) + rows) * size);
}

// The attributes that are asked for.
enum { TRANSA = 3, TRANSB = 4, EPILOGUE = 7, BIAS_POINTER = 8 };
enum { NO_EPILOGUE = 1, BIAS = 4 };
enum { MAX_WORKSPACE = 1, MIN_ALIGNMENT_A = 5, MIN_ALIGNMENT_D = 8 };

struct Product {
    int compute, transposed[2] = {0, 0}, epilogue = NO_EPILOGUE;
    const float* bias = nullptr;
};

struct Layout {
    int type;
    uint64_t rows, cols;
    int64_t ld;
};

struct Wishes {
    uint64_t workspace = 0;
    uint32_t alignments[4] = {256, 256, 256, 256};
};

// What the search found: how the operands are aligned, and how much workspace there is.
struct Algorithm {
    uint64_t workspace;
    uint32_t alignments[4];
    uint64_t rest[5];
};

struct Found {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Algorithm) == 64 && sizeof(Found) == 96, "as in the library");

API cublasLtCreate(void** handle) { return *handle = (void*)1, SUCCESS; }
API cublasLtDestroy(void*) { return SUCCESS; }
API cublasLtMatmulDescCreate(Product** product, int compute, int scale) {
    if (scale != R_32F) return INVALID_VALUE;
    return *product = new Product{compute}, SUCCESS;
}
API cublasLtMatmulDescSetAttribute(Product* product, int what, const void* value, size_t bytes) {
    switch (what) {
    case TRANSA:
    case TRANSB: return bytes == 4 ? memcpy(&product->transposed[what - TRANSA], value, 4), SUCCESS : INVALID_VALUE;
    case EPILOGUE: return bytes == 4 ? memcpy(&product->epilogue, value, 4), SUCCESS : INVALID_VALUE;
    case BIAS_POINTER: return bytes == 8 ? memcpy(&product->bias, value, 8), SUCCESS : INVALID_VALUE;
    default: return INVALID_VALUE;
    }
}
API cublasLtMatmulDescDestroy(Product* product) { return delete product, SUCCESS; }
API cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    if (!rows || !cols || ld < (int64_t)rows) return INVALID_VALUE;
    return *layout = new Layout{type, rows, cols, ld}, SUCCESS;
}
API cublasLtMatrixLayoutDestroy(Layout* layout) { return delete layout, SUCCESS; }
API cublasLtMatmulPreferenceCreate(Wishes** wishes) { return *wishes = new Wishes, SUCCESS; }
API cublasLtMatmulPreferenceSetAttribute(Wishes* wishes, int what, const void* value, size_t bytes) {
    if (what == MAX_WORKSPACE && bytes == 8) return memcpy(&wishes->workspace, value, 8), SUCCESS;
    if (what < MIN_ALIGNMENT_A || what > MIN_ALIGNMENT_D || bytes != 4) return INVALID_VALUE;
    return memcpy(&wishes->alignments[what - MIN_ALIGNMENT_A], value, 4), SUCCESS;
}
API cublasLtMatmulPreferenceDestroy(Wishes* wishes) { return delete wishes, SUCCESS; }
API cublasLtMatmulAlgoGetHeuristic(void*, Product*, Layout*, Layout*, Layout*, Layout*, Wishes* wishes, int asked, Found* found,
                                   int* count) {
    if (asked < 1) return INVALID_VALUE;
    *found = Found{};
    found->algorithm.workspace = wishes->workspace;
    memcpy(found->algorithm.alignments, wishes->alignments, sizeof wishes->alignments);
    return *count = 1, SUCCESS;
}

// D[m, n] = op(A)·op(B) + beta·C + bias, column-major; C is D, alpha is 1.
API cublasLtMatmul(void*, Product* product, const void* alpha, const void* a, Layout* la, const void* b, Layout* lb,
                   const void* beta_at, const void* c, Layout* lc, void* d, Layout* ld, const Algorithm* algorithm,
                   void* workspace, size_t bytes, void*) {
    bool ta = product->transposed[0], tb = product->transposed[1];
    int m = (int)(ta ? la->cols : la->rows), k = (int)(ta ? la->rows : la->cols), n = (int)(tb ? lb->rows : lb->cols);
    bool fits = k == (int)(tb ? lb->cols : lb->rows) && lc->rows == (uint64_t)m && lc->cols == (uint64_t)n;
    if (!fits || c != d || lc != ld || *(const float*)alpha != 1.0f || lc->type != R_32F || la->type != lb->type) return INVALID_VALUE;
    const void* operands[] = {a, b, c, d};
    for (int i = 0; i < 4; i++)
        if ((uintptr_t)operands[i] % algorithm->alignments[i]) return INVALID_VALUE;
    if (algorithm->workspace > bytes || (uintptr_t)workspace % 256 || !allocated(workspace, 1, 1, 1, bytes)) return INVALID_VALUE;
    size_t size = la->type == R_16BF ? 2 : 4;
    if (!allocated(a, la->rows, la->cols, la->ld, size) || !allocated(b, lb->rows, lb->cols, lb->ld, size) ||
        !allocated(d, m, n, lc->ld, 4) || (product->epilogue == BIAS && !allocated(product->bias, m, 1, m, 4)))
        return EXECUTION_FAILED;
    static auto count = (void (*)())driver("emulator_product");
    if (count) count();
    float beta = *(const float*)beta_at;
    int compute = product->compute;
    // A as [k][m], so that the innermost loop runs along a column of D.
    std::vector<float> at((size_t)m * k), column(m);
    for (int l = 0; l < k; l++)
        for (int i = 0; i < m; i++)
            at[(size_t)l * m + i] = load(a, ta ? (size_t)i * la->ld + l : (size_t)l * la->ld + i, la->type, compute);
    for (int j = 0; j < n; j++) {
        column.assign(m, 0.0f);
        for (int l = 0; l < k; l++) {
            float x = load(b, tb ? (size_t)l * lb->ld + j : (size_t)j * lb->ld + l, lb->type, compute);
            const float* row = &at[(size_t)l * m];
            for (int i = 0; i < m; i++) column[i] += row[i] * x;
        }
        float* out = (float*)d + (size_t)j * lc->ld;
        for (int i = 0; i < m; i++) {
            float x = beta == 0.0f ? column[i] : column[i] + beta * out[i];
            out[i] = product->epilogue == BIAS ? x + product->bias[i] : x;
        }
    }
    return SUCCESS;
}
