// An emulated device behind the driver's interface: what `bdia-cuda` asks of libcuda, with the kernels compiled for the
// host. The image of a module is taken as given (NVRTC made it); kernels are found by name.

#include "shim.h"

#include <chrono>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace kernels {
#include "../kernels/common.cu"

#include "../kernels/update.cu"

#include "../kernels/nn.cu"

#include "../kernels/attention.cu"

#include "../kernels/tensor.cu"

#include "../kernels/optim.cu"
} // namespace kernels

#ifdef CUSTOM_KERNELS
// Those of other crates stand behind what they may use and nothing else, as NVRTC gets them.
namespace custom {
#include "../kernels/common.cu"

#include "custom.cu"
} // namespace custom
#endif

namespace emulator {

Now now;
Dim thread_index, block_index, block_dim, grid_dim;

static std::map<uintptr_t, Allocation> allocations;
static std::string failure;

const Allocation* find(uintptr_t at, size_t bytes) {
    auto next = allocations.upper_bound(at);
    if (next == allocations.begin()) return nullptr;
    const Allocation& home = std::prev(next)->second;
    return at + bytes <= home.start + home.bytes ? &home : nullptr;
}

// ---- fibers ----

enum State { READY, AT_BARRIER, IN_WARP, DONE };

struct Fiber {
    void* stack = nullptr;
#ifdef __x86_64__
    void* sp = nullptr;
#else
    ucontext_t context;
#endif
    State state = DONE;
    u32 op = 0;
};

static const size_t STACK = 256 << 10;
static std::vector<Fiber> fibers;
static Fiber scheduler;
static Fiber* current = nullptr;
static Call* call = nullptr;

#ifdef __x86_64__
// Saves the callee's registers on the stack, leaves its address in *from and goes on with `to`.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
static void go(Fiber& from, Fiber& to) { emulator_switch(&from.sp, to.sp); }
#else
static void go(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

static void yield(State state) {
    current->state = state;
    go(*current, scheduler);
}

static void entry() {
    (*call)();
    yield(DONE);
    abort();
}

static void prepare(Fiber& f) {
    if (!f.stack) {
        f.stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (f.stack == MAP_FAILED) abort();
    }
#ifdef __x86_64__
    void** top = (void**)((char*)f.stack + STACK);
    *--top = nullptr;
    *--top = (void*)entry;
    f.sp = top - 6;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
#endif
    f.state = READY;
}

static jmp_buf outside_of_launch;

void fail(const char* format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    failure = text;
    // A fiber is left as it is; its stack is used again by the next launch.
    if (current) yield(DONE);
    longjmp(outside_of_launch, 1);
}

void barrier() { yield(AT_BARRIER); }

static u64 values[64][2][32];
static u32 turn[64];

const u64* exchange(u32 op, u32 mask, u64 value) {
    u32 warp = now.thread / 32, lane = now.thread % 32;
    if (mask != ~0u) fail("a vote or shuffle of a part of a warp");
    u32 mine = turn[warp];
    values[warp][mine % 2][lane] = value;
    current->op = op;
    yield(IN_WARP);
    return values[warp][mine % 2];
}

static void run(u32 thread) {
    now.thread = thread;
    thread_index.x = thread;
    current = &fibers[thread];
    go(scheduler, *current);
    current = nullptr;
    if (!failure.empty()) longjmp(outside_of_launch, 1);
}

// All threads of a warp up to the next barrier.
static void run_warp(u32 warp, bool backwards) {
    for (;;) {
        u32 waiting = 0, op = 0;
        for (u32 i = 0; i < 32; i++) {
            u32 thread = warp * 32 + (backwards ? 31 - i : i);
            if (fibers[thread].state == READY) run(thread);
            if (fibers[thread].state == IN_WARP) {
                if (waiting++ && fibers[thread].op != op) fail("threads of a warp in different votes or shuffles");
                op = fibers[thread].op;
            }
        }
        if (waiting == 0) return;
        if (waiting < 32) fail("a vote or shuffle that only %u threads of a warp reach", waiting);
        turn[warp]++;
        for (u32 i = 0; i < 32; i++) fibers[warp * 32 + i].state = READY;
    }
}

static void run_block(u32 threads, bool backwards) {
    for (u32 t = 0; t < threads; t++) prepare(fibers[t]);
    now.phase = 0;
    for (;;) {
        u32 warps = threads / 32, done = 0;
        for (u32 w = 0; w < warps; w++) run_warp(backwards ? warps - 1 - w : w, backwards);
        for (u32 t = 0; t < threads; t++) done += fibers[t].state == DONE;
        if (done == threads) return;
        if (done) fail("a barrier that %u of %u threads do not reach", done, threads);
        now.phase++;
        for (u32 t = 0; t < threads; t++) fibers[t].state = READY;
    }
}

// Not a local variable: those are lost when a failure jumps back.
static std::unique_ptr<Call> owned;

static bool launch(Call* (*bind)(void**), void** args, Dim grid, u32 threads) {
    failure.clear();
    owned.reset();
    if (setjmp(outside_of_launch) == 0) {
        if (threads == 0 || threads % 32 || threads > 1024) fail("blocks of %u threads", threads);
        owned.reset(call = bind(args));
        now.launch++;
        grid_dim = grid, block_dim = Dim{threads, 1, 1};
        if (fibers.size() < threads) fibers.resize(threads);
        bool backwards = now.launch % 2;
        u32 blocks = grid.x * grid.y * grid.z;
        for (u32 i = 0; i < blocks; i++) {
            u32 b = backwards ? blocks - 1 - i : i;
            now.block = b;
            block_index = Dim{b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
            run_block(threads, backwards);
        }
    }
    current = nullptr;
    return failure.empty();
}

struct Kernel {
    const char* name;
    Call* (*bind)(void**);
};

#define ENTRY(name) \
    {#name, [](void** args) { return bind(kernels::name, args); }}
#define CUSTOM_ENTRY(name) {#name, [](void** args) { return bind(custom::name, args); }},

static const Kernel table[] = {
    ENTRY(raise), ENTRY(quantize), ENTRY(dequantize), ENTRY(add_quantized), ENTRY(subtract_quantized), ENTRY(step),
    ENTRY(inverse), ENTRY(blend), ENTRY(unpack), ENTRY(unpack_rows), ENTRY(add_columns),
    ENTRY(unblend), ENTRY(combine), ENTRY(check_gradient), ENTRY(check_input), ENTRY(compare), ENTRY(count_differences),
    ENTRY(fill), ENTRY(add), ENTRY(bias_rows),
    ENTRY(to_bf16), ENTRY(unpad), ENTRY(add_parts), ENTRY(sum_rows), ENTRY(layer_norm), ENTRY(layer_norm_dx), ENTRY(layer_norm_dw),
    ENTRY(rms_parts), ENTRY(rms_parts_dx), ENTRY(rms_parts_dw), ENTRY(rotate), ENTRY(gated), ENTRY(gated_vjp),
    ENTRY(gelu), ENTRY(gelu_vjp), ENTRY(dropout), ENTRY(embed), ENTRY(embed_positions), ENTRY(embed_table),
    ENTRY(cross_entropy), ENTRY(attention_32), ENTRY(attention_64), ENTRY(attention_128), ENTRY(attention_256), ENTRY(attention_delta),
    ENTRY(attention_dq_32), ENTRY(attention_dq_64), ENTRY(attention_dq_128), ENTRY(attention_dq_256), ENTRY(attention_dkv_32),
    ENTRY(attention_dkv_64), ENTRY(attention_dkv_128), ENTRY(attention_dkv_256),
    ENTRY(attention_bf16_round), ENTRY(attention_bf16_32), ENTRY(attention_bf16_64), ENTRY(attention_bf16_128), ENTRY(attention_dq_bf16_32),
    ENTRY(attention_dq_bf16_64), ENTRY(attention_dq_bf16_128), ENTRY(attention_dkv_bf16_32), ENTRY(attention_dkv_bf16_64),
    ENTRY(attention_dkv_bf16_128), ENTRY(add_total), ENTRY(squares), ENTRY(sgd),
    ENTRY(adam_w), ENTRY(set_adam_moments), ENTRY(set_adam_sums), ENTRY(set_adam_step),
    ENTRY(adam_w_8bit), ENTRY(adafactor_rows), ENTRY(adafactor_cols), ENTRY(adafactor_mean), ENTRY(adafactor_vector),
    ENTRY(adafactor_squares), ENTRY(adafactor_step),
#ifdef CUSTOM_KERNELS
#include "custom_table.inc"
#endif
};

} // namespace emulator

// ---- the driver's interface ----

using emulator::Allocation;
using emulator::Shadow;

static std::recursive_mutex lock;
static size_t used = 0;
// Memory is handed out in whole pages of 2 MiB, as a driver does it.
static const size_t PAGE = (size_t)2 << 20;
static size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// What was called, for tests that count it: kernels, products, uploads from page-locked and from other memory, copies to the
// host, waits with work before them, waits without.
enum { LAUNCHES, PRODUCTS, PINNED, PAGEABLE, DOWNLOADS, WAITS, IDLE_WAITS, KINDS };
static u64 calls[KINDS];
static bool busy = false;

extern "C" __attribute__((visibility("default"))) const u64* emulator_calls() { return calls; }

// Uploads from page-locked memory: they happen when the stream gets to them, not when they are queued, so that a program
// that uses their memory again too early is found out.
struct Upload {
    uintptr_t to;
    const void* from;
    size_t bytes;
};
static std::vector<Upload> queued;
static std::map<uintptr_t, size_t> locked;

// Something else is about to happen on the stream.
static void proceed() {
    for (const Upload& u : queued) memcpy((void*)u.to, u.from, u.bytes);
    queued.clear();
    busy = true;
}

extern "C" __attribute__((visibility("default"))) void emulator_product() {
    std::lock_guard<std::recursive_mutex> guard(lock);
    proceed();
    calls[PRODUCTS]++;
}

// Memory of the emulated device, BDIA_EMULATED_MEMORY bytes or 2 GiB.
static size_t total() {
    const char* text = getenv("BDIA_EMULATED_MEMORY");
    return text ? strtoull(text, nullptr, 10) : (size_t)2 << 30;
}

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

#define API extern "C" __attribute__((visibility("default"))) int
#define LOCK std::lock_guard<std::recursive_mutex> guard(lock)

API cuInit(unsigned) { return SUCCESS; }
API cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
API cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
API cuDeviceGet(int* device, int ordinal) { return ordinal == 0 ? (*device = 0, SUCCESS) : INVALID_DEVICE; }
API cuDeviceGetName(char* name, int len, int) { return snprintf(name, len, "emulated device"), SUCCESS; }
API cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = total(), SUCCESS; }
API cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
    case 16: return *value = 4, SUCCESS;  // multiprocessors
    case 75: return *value = 8, SUCCESS;  // compute capability
    case 76: return *value = 0, SUCCESS;
    default: return INVALID_VALUE;
    }
}
API cuDevicePrimaryCtxRetain(void** context, int) { return *context = (void*)1, SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxSetCurrent(void*) { return SUCCESS; }
API cuStreamCreate(void** stream, unsigned) { return *stream = (void*)2, SUCCESS; }
API cuStreamSynchronize(void*) {
    LOCK;
    calls[busy || !queued.empty() ? WAITS : IDLE_WAITS]++;
    proceed();
    busy = false;
    return SUCCESS;
}
// A time on the stream: everything before it happens first.
API cuEventCreate(void** event, unsigned) { return *event = new std::chrono::steady_clock::time_point, SUCCESS; }
API cuEventRecord(void* event, void*) {
    LOCK;
    proceed();
    *(std::chrono::steady_clock::time_point*)event = std::chrono::steady_clock::now();
    return SUCCESS;
}
API cuEventElapsedTime_v2(float* ms, void* start, void* end) {
    auto at = [](void* event) { return *(std::chrono::steady_clock::time_point*)event; };
    *ms = std::chrono::duration<float, std::milli>(at(end) - at(start)).count();
    return SUCCESS;
}
API cuEventDestroy_v2(void* event) { return delete (std::chrono::steady_clock::time_point*)event, SUCCESS; }
API cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    LOCK;
    *at = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!*at) return OUT_OF_MEMORY;
    locked[(uintptr_t)*at] = bytes;
    return SUCCESS;
}
API cuMemFreeHost(void* at) {
    LOCK;
    if (!locked.erase((uintptr_t)at)) return INVALID_VALUE;
    return free(at), SUCCESS;
}
API cuStreamDestroy_v2(void*) { return SUCCESS; }
API cuMemGetInfo_v2(size_t* free, size_t* all) {
    LOCK;
    *all = total(), *free = *all > used ? *all - used : 0;
    return SUCCESS;
}

API cuMemAlloc_v2(uintptr_t* at, size_t bytes) {
    LOCK;
    if (bytes == 0) return INVALID_VALUE;
    if (used > total() || pages(bytes) > total() - used) return OUT_OF_MEMORY;
    // Garbage, as on a device.
    void* p = aligned_alloc(256, (bytes + 255) / 256 * 256);
    Shadow* shadows = (Shadow*)mmap(nullptr, (bytes / 4 + 1) * sizeof(Shadow), PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!p || shadows == MAP_FAILED) return OUT_OF_MEMORY;
    memset(p, 0xA5, bytes);
    emulator::allocations[(uintptr_t)p] = Allocation{(uintptr_t)p, bytes, shadows};
    *at = (uintptr_t)p, used += pages(bytes);
    return SUCCESS;
}

API cuMemFree_v2(uintptr_t at) {
    LOCK;
    auto home = emulator::allocations.find(at);
    if (home == emulator::allocations.end()) return INVALID_VALUE;
    munmap(home->second.shadows, (home->second.bytes / 4 + 1) * sizeof(Shadow));
    used -= pages(home->second.bytes);
    emulator::allocations.erase(home);
    free((void*)at);
    return SUCCESS;
}

extern "C" __attribute__((visibility("default"))) bool emulator_allocated(uintptr_t at, size_t bytes) {
    LOCK;
    return emulator::find(at, bytes) != nullptr;
}

API cuMemsetD8Async(uintptr_t at, unsigned char value, size_t bytes, void*) {
    LOCK;
    if (!emulator::find(at, bytes)) return INVALID_VALUE;
    proceed();
    return memset((void*)at, value, bytes), SUCCESS;
}
API cuMemcpyHtoDAsync_v2(uintptr_t to, const void* from, size_t bytes, void*) {
    LOCK;
    if (!emulator::find(to, bytes)) return INVALID_VALUE;
    auto home = locked.upper_bound((uintptr_t)from);
    if (home != locked.begin()) {
        --home;
        if ((uintptr_t)from + bytes <= home->first + home->second) {
            calls[PINNED]++;
            return queued.push_back({to, from, bytes}), SUCCESS;
        }
    }
    proceed();
    calls[PAGEABLE]++;
    return memcpy((void*)to, from, bytes), SUCCESS;
}
API cuMemcpyDtoHAsync_v2(void* to, uintptr_t from, size_t bytes, void*) {
    LOCK;
    if (!emulator::find(from, bytes)) return INVALID_VALUE;
    bool before = busy || !queued.empty();
    proceed();
    busy = before;
    calls[DOWNLOADS]++;
    return memcpy(to, (void*)from, bytes), SUCCESS;
}
API cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, void*) {
    LOCK;
    if (!emulator::find(from, bytes) || !emulator::find(to, bytes)) return INVALID_VALUE;
    proceed();
    return memcpy((void*)to, (void*)from, bytes), SUCCESS;
}

API cuModuleLoadData(void** module, const void* image) { return image ? (*module = (void*)3, SUCCESS) : INVALID_VALUE; }
API cuModuleUnload(void*) { return SUCCESS; }
API cuModuleGetFunction(void** function, void*, const char* name) {
    for (const auto& kernel : emulator::table)
        if (!strcmp(kernel.name, name)) return *function = (void*)&kernel, SUCCESS;
    return NOT_FOUND;
}

API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned, void*,
                   void** args, void**) {
    LOCK;
    if (!gx || !gy || !gz || by != 1 || bz != 1) return INVALID_VALUE;
    auto kernel = (const emulator::Kernel*)function;
    proceed();
    calls[LAUNCHES]++;
    if (emulator::launch(kernel->bind, args, emulator::Dim{gx, gy, gz}, bx)) return SUCCESS;
    fprintf(stderr, "emulated device, kernel %s: %s\n", kernel->name, emulator::failure.c_str());
    return LAUNCH_FAILED;
}

API cuGetErrorName(int error, const char** name) {
    switch (error) {
    case INVALID_VALUE: return *name = "CUDA_ERROR_INVALID_VALUE", SUCCESS;
    case OUT_OF_MEMORY: return *name = "CUDA_ERROR_OUT_OF_MEMORY", SUCCESS;
    case NO_DEVICE: return *name = "CUDA_ERROR_NO_DEVICE", SUCCESS;
    case INVALID_DEVICE: return *name = "CUDA_ERROR_INVALID_DEVICE", SUCCESS;
    case NOT_FOUND: return *name = "CUDA_ERROR_NOT_FOUND", SUCCESS;
    case LAUNCH_FAILED: return *name = "CUDA_ERROR_LAUNCH_FAILED", SUCCESS;
    default: return INVALID_VALUE;
    }
}
API cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }
