// Products of the emulated device: what `bdia-cuda` asks of libcublas, as plain loops.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <dlfcn.h>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

enum { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13 };
enum { R_32F = 0, R_16BF = 14 };
enum { COMPUTE_32F = 68, COMPUTE_32F_PEDANTIC = 69, FAST_16BF = 75, FAST_TF32 = 77 };

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

API cublasCreate_v2(void** handle) { return *handle = (void*)1, SUCCESS; }
API cublasDestroy_v2(void*) { return SUCCESS; }
API cublasSetStream_v2(void*, void*) { return SUCCESS; }
API cublasSetWorkspace_v2(void*, void* p, size_t bytes) {
    return (uintptr_t)p % 256 == 0 && allocated(p, 1, 1, 1, bytes) ? SUCCESS : INVALID_VALUE;
}
API cublasSetMathMode(void*, int) { return SUCCESS; }

// C[m, n] = op(A)·op(B) + beta·C, column-major. alpha is 1.
API cublasGemmEx(void*, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda, const void* b,
                 int b_type, int ldb, const void* beta_at, void* c, int c_type, int ldc, int compute, int) {
    if (m <= 0 || n <= 0 || k <= 0 || *(const float*)alpha != 1.0f || c_type != R_32F || a_type != b_type) return INVALID_VALUE;
    size_t size = a_type == R_16BF ? 2 : 4;
    if (!allocated(a, ta ? k : m, ta ? m : k, lda, size) || !allocated(b, tb ? n : k, tb ? k : n, ldb, size) ||
        !allocated(c, m, n, ldc, 4))
        return EXECUTION_FAILED;
    static auto count = (void (*)())driver("emulator_product");
    if (count) count();
    float beta = *(const float*)beta_at;
    // A as [k][m], so that the innermost loop runs along a column of C.
    std::vector<float> at((size_t)m * k), column(m);
    for (int l = 0; l < k; l++)
        for (int i = 0; i < m; i++)
            at[(size_t)l * m + i] = load(a, ta ? (size_t)i * lda + l : (size_t)l * lda + i, a_type, compute);
    for (int j = 0; j < n; j++) {
        column.assign(m, 0.0f);
        for (int l = 0; l < k; l++) {
            float x = load(b, tb ? (size_t)l * ldb + j : (size_t)j * ldb + l, b_type, compute);
            const float* row = &at[(size_t)l * m];
            for (int i = 0; i < m; i++) column[i] += row[i] * x;
        }
        float* out = (float*)c + (size_t)j * ldc;
        for (int i = 0; i < m; i++) out[i] = beta == 0.0f ? column[i] : column[i] + beta * out[i];
    }
    return SUCCESS;
}
