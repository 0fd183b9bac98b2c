// The emulated device refuses what it says it refuses: kernels with one mistake each.

#include "cuda.cpp"

#include <cassert>

namespace wrong {

KERNEL(64, 1) correct(Out<float> x, Out<u32> sum) {
    SHARED(float, tile, 64);
    u32 t = threadIdx.x;
    tile[t] = x[blockIdx.x * 64 + t];
    __syncthreads();
    float y = tile[63 - t];
    u32 vote = __ballot_sync(FULL, t % 2 == 0);
    y += __shfl_xor_sync(FULL, y, 1);
    x[blockIdx.x * 64 + t] = y;
    if (t == 0) atomicAdd(&sum[0], vote);
}
KERNEL(64, 1) read_outside(In<float> x, Out<float> y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
KERNEL(64, 1) write_outside(Out<float> y) { y[threadIdx.x + 1] = 0.0f; }
KERNEL(64, 1) shared_outside(Out<float> y) {
    SHARED(float, tile, 63);
    tile[threadIdx.x] = 0.0f;
    y[threadIdx.x] = 0.0f;
}
KERNEL(64, 1) no_barrier(Out<float> y) {
    SHARED(float, tile, 64);
    tile[threadIdx.x] = 1.0f;
    y[threadIdx.x] = tile[63 - threadIdx.x];
}
// Read, then overwritten by another thread before a barrier.
KERNEL(64, 1) overwritten(Out<float> y) {
    SHARED(float, tile, 64);
    tile[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = tile[(threadIdx.x + 1) % 64];
    tile[threadIdx.x] = 2.0f;
}
// Its own word, before the thread waited for the copy.
KERNEL(64, 1) copy_under_way(In<float> x, Out<float> y) {
    SHARED(float, tile, 64);
    copy<1>(tile, threadIdx.x, x, threadIdx.x, true);
    y[threadIdx.x] = tile[threadIdx.x];
}
// Each thread waited for its own copy only.
KERNEL(64, 1) copy_without_barrier(In<float> x, Out<float> y) {
    SHARED(float, tile, 64);
    copy<1>(tile, threadIdx.x, x, threadIdx.x, true);
    copied();
    y[threadIdx.x] = tile[63 - threadIdx.x];
}
KERNEL(64, 1) copy_beside_16_bytes(In<float> x, Out<float>) {
    SHARED(float, tile, 64);
    copy<4>(tile, 0, x, threadIdx.x, true);
}
KERNEL(64, 1) one_sum(Out<float> y) { y[0] += 1.0f; }
// Barriers order the threads of a block, not blocks.
KERNEL(64, 1) blocks_meet(Out<float> y) {
    __syncthreads();
    if (threadIdx.x == blockIdx.x) y[7] = 1.0f;
}
KERNEL(64, 1) other_block_reads(Out<float> y) {
    if (threadIdx.x == 0) y[blockIdx.x] = (float)y[1 - blockIdx.x] + 1.0f;
}
KERNEL(64, 1) missed_barrier(Out<float>) {
    if (threadIdx.x < 40) __syncthreads();
}
KERNEL(64, 1) missed_vote(Out<u32> y) {
    if (threadIdx.x < 40) y[threadIdx.x] = __ballot_sync(FULL, true);
}
KERNEL(64, 1) different_votes(Out<u32> y) {
    y[threadIdx.x] = threadIdx.x % 32 < 5 ? __ballot_sync(FULL, true) : __shfl_xor_sync(FULL, 1u, 1);
}
KERNEL(64, 1) part_of_a_warp(Out<u32> y) { y[threadIdx.x] = __ballot_sync(0xFFFF, true); }
// Depends on the order of threads: not refused, but different when repeated.
KERNEL(64, 1) order(Out<u32> y) { atomicExch(&y[0], threadIdx.x); }

} // namespace wrong

struct Operand {
    uintptr_t p;
    u64 n;
};

static int failed = 0;

static void expect(const char* name, emulator::Call* (*bind)(void**), u32 blocks, std::initializer_list<Operand> operands, const char* says) {
    std::vector<Operand> kept(operands);
    std::vector<void*> args;
    for (auto& operand : kept) args.push_back(&operand);
    bool fine = emulator::launch(bind, args.data(), emulator::Dim{blocks, 1, 1}, 64);
    bool right = says ? !fine && emulator::failure.find(says) != std::string::npos : fine;
    if (!right) failed++;
    printf("%s %s: %s\n", right ? "ok  " : "FAIL", name, fine ? "accepted" : emulator::failure.c_str());
}

#define EXPECT(kernel, blocks, operands, says) \
    expect(#kernel, [](void** args) { return emulator::bind(wrong::kernel, args); }, blocks, operands, says)
#define LIST(...) std::initializer_list<Operand>({__VA_ARGS__})

int main() {
    uintptr_t a, b;
    if (cuMemAlloc_v2(&a, 4 * 128) || cuMemAlloc_v2(&b, 4 * 64)) return 2;
    const Operand x = {a, 128}, half = {a, 64}, y = {b, 64};
    for (int i = 0; i < 128; i++) ((float*)a)[i] = (float)i;
    for (int i = 0; i < 2; i++) EXPECT(correct, 2, LIST(x, y), nullptr);
    EXPECT(read_outside, 1, LIST(half, y), "index 64 of an operand of 64");
    EXPECT(write_outside, 1, LIST(y), "index 64 of an operand of 64");
    EXPECT(write_outside, 1, LIST({b, 65}), "outside every allocation");
    EXPECT(write_outside, 1, LIST({b + 4 * 65, 4}), "outside every allocation");
    EXPECT(shared_outside, 1, LIST(y), "shared values");
    for (int i = 0; i < 2; i++) EXPECT(no_barrier, 1, LIST(y), "race in shared memory");
    for (int i = 0; i < 2; i++) EXPECT(overwritten, 1, LIST(y), "race in shared memory");
    EXPECT(copy_under_way, 1, LIST(x, y), "used while it is copied");
    for (int i = 0; i < 2; i++) EXPECT(copy_without_barrier, 1, LIST(x, y), "race in shared memory");
    EXPECT(copy_beside_16_bytes, 1, LIST(x, y), "not aligned");
    for (int i = 0; i < 2; i++) EXPECT(one_sum, 1, LIST(y), "race in global memory");
    EXPECT(blocks_meet, 2, LIST(y), "race in global memory");
    EXPECT(other_block_reads, 2, LIST(y), "race in global memory");
    EXPECT(missed_barrier, 1, LIST(y), "a barrier that");
    EXPECT(missed_vote, 1, LIST(y), "a vote or shuffle that only 8");
    EXPECT(different_votes, 1, LIST(y), "different votes");
    EXPECT(part_of_a_warp, 1, LIST(y), "part of a warp");
    u32 last[2];
    for (int i = 0; i < 2; i++) {
        EXPECT(order, 1, LIST(y), nullptr);
        last[i] = *(u32*)b;
    }
    if (last[0] == last[1]) failed++, printf("FAIL the order of threads does not change\n");
    if (cuMemFree_v2(a) || cuMemFree_v2(b) || !cuMemFree_v2(b)) failed++, printf("FAIL memory\n");
    return failed != 0;
}
