// What every kernel shares: element types, asynchronous copies, tensor-core products, reductions.
//
// Two compilers read these sources. On a GPU it is NVRTC, through CuPy. In the tests it is a host compiler, behind a header
// that stands in for the CUDA language (FOVEATE_CPU is defined then, and that header defines what the #else branch does here).
// Therefore: no standard headers, DYNAMIC_SHARED instead of extern __shared__, and inline PTX only in this file.
#pragma once

#ifndef FOVEATE_CPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

// 16 bytes from global to shared memory, the last 16 - bytes of them zeros. Nothing waits for it but copy_wait.
__device__ __forceinline__ void copy16(void* shared, const void* global, int bytes) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of this thread's committed groups are under way; a barrier must follow.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// sum (16 x 8) += a (16 x 16) * b (8 x 16)^T over one warp, float32 sums of exact products.
// Lane 4 g + t holds sum at rows g, g + 8, columns 2 t, 2 t + 1.
__device__ __forceinline__ void mma16(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma16(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

typedef long long i64;
typedef unsigned long long u64;

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void from_float(float x, float& to) { to = x; }
__device__ __forceinline__ void from_float(float x, __half& to) { to = __float2half(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}
// Over the four lanes that share a row of an mma tile.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// `index`, if there is such a row of n; else the launch fails, as torch's would.
__device__ __forceinline__ i64 existing(i64 index, int n) {
    const bool exists = index >= 0 && index < n;
    if (!exists) __trap();
    return exists ? index : 0;
}

// 16 bytes of values, read at once. From a multiple of 16.
template <class T>
struct Piece {
    static constexpr int EACH = 16 / sizeof(T);
    __align__(16) T value[EACH];

    __device__ explicit Piece(const T* from) {
        *reinterpret_cast<uint4*>(value) = *reinterpret_cast<const uint4*>(from);
    }
};

// Call f(i, x[i] as float) for the i < count that fall to worker `worker` of `workers`, 16 bytes at a time. x at a multiple of 16.
template <class T, class F>
__device__ __forceinline__ void for_each_value(const T* x, int count, int worker, int workers, F f) {
    for (int i = worker * Piece<T>::EACH; i < count; i += workers * Piece<T>::EACH) {
        const Piece<T> piece(x + i);
#pragma unroll
        for (int j = 0; j < Piece<T>::EACH; j++)
            if (i + j < count) f(i + j, to_float(piece.value[j]));
    }
}

// Orders floats as unsigned integers; negative zero as zero.
__device__ __forceinline__ unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(unsigned bits) {
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// The lowest (score, index) of a block of whole warps, the lower index among equal scores; all threads get both.
// `best` is 128 words of shared memory, one half for odd turns: a call may still read the half of the turn before.
__device__ __forceinline__ int block_lowest(unsigned& score, int index, unsigned* best, int turn) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    unsigned* const scores = best + turn % 2 * 64;
    unsigned* const indices = scores + 32;
    auto lowest_of_warp = [&] {
        const unsigned low = __reduce_min_sync(ALL_LANES, score);
        index = int(__reduce_min_sync(ALL_LANES, score == low ? unsigned(index) : ~0u));
        score = low;
    };
    lowest_of_warp();
    if (lane == 0) scores[warp] = score, indices[warp] = unsigned(index);
    __syncthreads();
    score = lane < warps ? scores[lane] : ~0u;
    index = lane < warps ? int(indices[lane]) : -1;
    lowest_of_warp();
    return index;
}
