// Enough of the CUDA language for a host compiler to run the .cu files of foveate.cuda, for their numbers and their barriers.
//
// Every thread of a block is a fiber: a stack of its own, switched to by hand. A fiber runs until it waits for its block or
// its warp; lanes of a warp are in no way in step, so a missing barrier shows in the results. Blocks run one after the other.
// Shared memory holds NaN when a block starts, asynchronous copies move nothing before they are waited for, and a barrier
// that some thread never reaches ends the launch with an error. Of races, speed and rounding of the fast intrinsics it knows
// nothing. x86-64 only.
#pragma once
#ifndef __x86_64__
#error "the fibers of cuda_on_cpu.h are written for x86-64"
#endif

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <tuple>
#include <utility>

#define FOVEATE_CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static
#define DYNAMIC_SHARED(name) char* const name = cuda_on_cpu::shared
#define threadIdx (cuda_on_cpu::current->thread)
#define blockIdx cuda_on_cpu::block
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid

struct dim3 {
    unsigned x, y, z;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

template <class To, class From>
To cuda_on_cpu_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __int_as_float(int x) { return cuda_on_cpu_cast<float>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu_cast<unsigned>(x); }
typedef short cuda_on_cpu_shorts __attribute__((vector_size(16)));
typedef float cuda_on_cpu_floats __attribute__((vector_size(16)));
inline float __half2float(__half x) { return __builtin_ia32_vcvtph2ps(cuda_on_cpu_shorts{short(x.bits)})[0]; }
inline __half __float2half(float x) {  // round to nearest even
    return {uint16_t(__builtin_ia32_vcvtps2ph(cuda_on_cpu_floats{x}, 0)[0])};
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {  // round to nearest even
    const unsigned bits = __float_as_uint(x);
    return {uint16_t(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}

namespace cuda_on_cpu {

constexpr int MOST_THREADS = 1024, STACK = 128 << 10, MOST_COPIES = 256;

struct Copy {
    char* to;
    const char* from;
    int bytes, group;
};
struct Fiber {
    dim3 thread;
    void* stack_pointer;
    char* stack;
    Copy copies[MOST_COPIES];
    int n_copies, groups;  // copies under way, groups committed so far
    int exchange;          // warp exchanges so far
    bool done;
};
struct Barrier {
    int living, arrived;
    int waiting[MOST_THREADS];
};
struct Warp {
    Barrier barrier;
    uint64_t slot[2][32];                     // what lanes hand each other, by parity of the exchange
    float a[2][16][16], b[2][8][16];          // tiles of a tensor-core product
};

dim3 block, block_size, grid;
char* shared;
Fiber fibers[MOST_THREADS];
Fiber* current;
Warp warps[MOST_THREADS / 32];
Barrier whole;
int ready[MOST_THREADS], ready_from, ready_count;  // a ring of fibers that can run
void* main_stack;
const char* failure;
void (*body)(void*);
void* body_args;

extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
cuda_on_cpu_switch:
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
)");

inline int index_of(const Fiber* fiber) { return int(fiber - fibers); }
inline Warp& warp() { return warps[current->thread.x / 32]; }
inline int lane() { return current->thread.x % 32; }

inline void push_ready(int fiber) { ready[(ready_from + ready_count++) % MOST_THREADS] = fiber; }

// To the next fiber that can run, or back to the launch when there is none.
inline void leave() {
    void** save = &current->stack_pointer;
    if (!ready_count) return cuda_on_cpu_switch(save, main_stack);
    current = &fibers[ready[ready_from]];
    ready_from = (ready_from + 1) % MOST_THREADS;
    ready_count--;
    cuda_on_cpu_switch(save, current->stack_pointer);
}

inline void release(Barrier& barrier) {
    for (int i = 0; i < barrier.arrived; i++) push_ready(barrier.waiting[i]);
    barrier.arrived = 0;
}

inline void wait(Barrier& barrier) {
    barrier.waiting[barrier.arrived++] = index_of(current);
    if (barrier.arrived == barrier.living) release(barrier);
    leave();
}

inline void run_fiber() {
    body(body_args);
    current->done = true;
    for (Barrier* barrier : {&warp().barrier, &whole})
        if (--barrier->living && barrier->arrived == barrier->living) release(*barrier);
    leave();
}

// Every other block starts with its last thread: blocks that should agree and do not have a race.
inline void run_block(int threads, int shared_bytes, bool reverse) {
    memset(shared, 0xff, shared_bytes);
    whole.living = threads, whole.arrived = 0;
    for (int w = 0; w * 32 < threads; w++) warps[w].barrier.living = 32, warps[w].barrier.arrived = 0;
    ready_from = ready_count = 0;
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = fibers[reverse ? threads - 1 - i : i];
        fiber.thread = {unsigned(index_of(&fiber)), 0, 0};
        fiber.n_copies = fiber.groups = fiber.exchange = 0, fiber.done = false;
        if (!fiber.stack) fiber.stack = static_cast<char*>(aligned_alloc(64, STACK));
        void** top = reinterpret_cast<void**>(fiber.stack + STACK) - 1;  // so that run_fiber starts on an aligned stack
        *--top = reinterpret_cast<void*>(run_fiber);
        fiber.stack_pointer = top - 6;  // the saved registers, whatever they hold
        push_ready(index_of(&fiber));
    }
    current = &fibers[ready[0]];
    ready_from = 1, ready_count--;
    cuda_on_cpu_switch(&main_stack, current->stack_pointer);
    for (int i = 0; i < threads; i++)
        if (!fibers[i].done) failure = "some threads wait at a barrier that others never reach";
}

template <class T>
T read(void* const* args, const size_t* sizes, int i) {
    T value{};
    if (sizes[i] == sizeof(T))
        memcpy(&value, args[i], sizeof value);
    else
        failure = "an argument has another size than the kernel's parameter";
    return value;
}

template <class... P>
struct Bound {
    void (*kernel)(P...);
    std::tuple<P...> args;
    static void run(void* self) { std::apply(static_cast<Bound*>(self)->kernel, static_cast<Bound*>(self)->args); }
};

template <class... P, size_t... I>
Bound<P...> bind(void (*kernel)(P...), void* const* args, const size_t* sizes, std::index_sequence<I...>) {
    return {kernel, std::tuple<P...>{read<P>(args, sizes, I)...}};
}

// What went wrong, or null.
template <class... P>
const char* launch(void (*kernel)(P...), const unsigned* blocks, unsigned threads, unsigned shared_bytes,
                   void* const* args, const size_t* sizes, int n_args) {
    failure = nullptr;
    if (n_args != sizeof...(P)) return "the kernel takes another number of arguments";
    Bound<P...> bound = bind(kernel, args, sizes, std::index_sequence_for<P...>());
    if (threads % 32 || threads > MOST_THREADS) failure = "a block must have whole warps and at most 1024 threads";
    body = Bound<P...>::run, body_args = &bound;
    grid = {blocks[0], blocks[1], blocks[2]}, block_size = {threads, 1, 1};
    shared = static_cast<char*>(aligned_alloc(128, (shared_bytes + 127) / 128 * 128 + 128));
    for (block.z = 0; block.z < grid.z; block.z++)
        for (block.y = 0; block.y < grid.y; block.y++)
            for (block.x = 0; block.x < grid.x && !failure; block.x++)
                run_block(threads, shared_bytes, (block.x + block.y + block.z) % 2);
    free(shared);
    return failure;
}

inline void finish_copies(int groups_left) {
    Fiber& f = *current;
    int kept = 0;
    for (int i = 0; i < f.n_copies; i++) {
        const Copy& copy = f.copies[i];
        if (copy.group < f.groups - groups_left) {
            memcpy(copy.to, copy.from, copy.bytes);
            memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
        } else {
            f.copies[kept++] = copy;
        }
    }
    f.n_copies = kept;
}

// Hand `value` to the other lanes; then all of them are in warp().slot[parity].
template <class T>
int exchange(T value) {
    static_assert(sizeof(T) <= 8, "one slot");
    const int parity = current->exchange++ % 2;  // so that a fast lane cannot overwrite what a slow one still reads
    memcpy(&warp().slot[parity][lane()], &value, sizeof value);
    wait(warp().barrier);
    return parity;
}
template <class T>
T slot(int parity, int lane) {
    T value;
    memcpy(&value, &warp().slot[parity][lane], sizeof value);
    return value;
}
template <class T, class F>
T reduce(T value, F combine) {
    const int parity = exchange(value);
    T result = slot<T>(parity, 0);
    for (int i = 1; i < 32; i++) result = combine(result, slot<T>(parity, i));
    return result;
}

inline float widen(unsigned pair, int half, __half) { return __half2float({uint16_t(pair >> 16 * half)}); }
inline float widen(unsigned pair, int half, __nv_bfloat16) { return __bfloat162float({uint16_t(pair >> 16 * half)}); }

}  // namespace cuda_on_cpu

// Entry point of a library that holds one kernel.
#define CUDA_ON_CPU_KERNEL(...)                                                                                         \
    extern "C" const char* launch(const unsigned* blocks, unsigned threads, unsigned shared_bytes, void* const* args,   \
                                  const size_t* sizes, int n_args) {                                                    \
        return cuda_on_cpu::launch(&__VA_ARGS__, blocks, threads, shared_bytes, args, sizes, n_args);                   \
    }

inline void __trap() { cuda_on_cpu::failure = "the kernel gave up: __trap()"; }
inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::whole); }
inline void __syncwarp(unsigned = ~0u) { cuda_on_cpu::wait(cuda_on_cpu::warp().barrier); }

template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return cuda_on_cpu::slot<T>(cuda_on_cpu::exchange(value), from % 32);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int with) {
    return cuda_on_cpu::slot<T>(cuda_on_cpu::exchange(value), cuda_on_cpu::lane() ^ with);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
    const int parity = cuda_on_cpu::exchange(value), lane = cuda_on_cpu::lane();
    return cuda_on_cpu::slot<T>(parity, lane < by ? lane : lane - by);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    const int parity = cuda_on_cpu::exchange(predicate);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) bits |= unsigned(cuda_on_cpu::slot<int>(parity, i) != 0) << i;
    return bits;
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
    return cuda_on_cpu::reduce(value, [](unsigned a, unsigned b) { return b < a ? b : a; });
}
inline int __reduce_add_sync(unsigned, int value) {
    return cuda_on_cpu::reduce(value, [](int a, int b) { return a + b; });
}

inline void copy16(void* to, const void* from, int bytes) {
    cuda_on_cpu::Fiber& f = *cuda_on_cpu::current;
    if ((uintptr_t(to) | uintptr_t(from)) % 16) cuda_on_cpu::failure = "an asynchronous copy is not aligned to 16 bytes";
    if (f.n_copies == cuda_on_cpu::MOST_COPIES) {
        cuda_on_cpu::failure = "too many asynchronous copies under way; raise MOST_COPIES";
        return;
    }
    f.copies[f.n_copies++] = {static_cast<char*>(to), static_cast<const char*>(from), bytes, f.groups};
}
inline void copy_commit() { cuda_on_cpu::current->groups++; }
template <int PENDING>
void copy_wait() {
    cuda_on_cpu::finish_copies(PENDING);
}

template <class T>
void mma16(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], T) {
    using namespace cuda_on_cpu;
    const int g = lane() / 4, t = lane() % 4, parity = current->exchange++ % 2;
    auto& tile_a = warp().a[parity];
    auto& tile_b = warp().b[parity];
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 4; i++) tile_a[g + i % 2 * 8][i / 2 * 8 + 2 * t + half] = widen(a[i], half, T());
        for (int i = 0; i < 2; i++) tile_b[g][i * 8 + 2 * t + half] = widen(b[i], half, T());
    }
    wait(warp().barrier);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) sum[i] += tile_a[g + i / 2 * 8][k] * tile_b[2 * t + i % 2][k];
}
