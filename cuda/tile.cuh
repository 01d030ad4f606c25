// Products of tiles in shared memory: a piece of A B^T, where A and B hold their rows (tokens) with the depth contiguous.
//
// Whatever the element type, lane 4 g + t of a warp owns the same elements of its piece: rows 16 m + g and 16 m + g + 8,
// columns 8 n + 2 t and 8 n + 2 t + 1, as sum[m][n][0..3]. So what follows a product is written once.
#pragma once
#include "common.cuh"

// Bytes from one row of a tile to the next. 16 more than the row: lanes that read one column then hit different banks.
template <class T, int WIDTH>
constexpr int PITCH = WIDTH * int(sizeof(T)) + 16;

// Start copying rows row .. row + ROWS - 1 and columns column .. column + WIDTH - 1 of `source` (rows x depth, `stride`
// elements apart) into `tile`; zeros outside. Rows must start at multiples of 16 bytes.
template <class T, int ROWS, int WIDTH>
__device__ void load_tile(char* tile, const T* source, i64 stride, int row, int rows, int column, int depth) {
    constexpr int EACH = 16 / sizeof(T), PIECES = WIDTH / EACH;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += blockDim.x) {
        const int r = i / PIECES, c = i % PIECES * EACH;
        const int left = row + r < rows ? min(max(depth - column - c, 0), EACH) : 0;
        const T* from = left ? source + (row + r) * stride + column + c : source;
        copy16(tile + r * PITCH<T, WIDTH> + c * sizeof(T), from, left * int(sizeof(T)));
    }
}

template <class T>
__device__ __forceinline__ unsigned pair_at(const char* tile, int pitch, int row, int column) {
    return *reinterpret_cast<const unsigned*>(tile + row * pitch + column * int(sizeof(T)));
}

// sum += (16 MT rows at a) * (8 NT rows at b)^T for one warp. 16-bit types: tensor cores.
template <class T, int WIDTH, int MT, int NT>
__device__ __forceinline__ void multiply(float (&sum)[MT][NT][4], const char* a, const char* b, T) {
    constexpr int P = PITCH<T, WIDTH>;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < WIDTH; k += 16) {
        unsigned from_a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            from_a[m][0] = pair_at<T>(a, P, 16 * m + g, k + 2 * t);
            from_a[m][1] = pair_at<T>(a, P, 16 * m + g + 8, k + 2 * t);
            from_a[m][2] = pair_at<T>(a, P, 16 * m + g, k + 2 * t + 8);
            from_a[m][3] = pair_at<T>(a, P, 16 * m + g + 8, k + 2 * t + 8);
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const unsigned from_b[2] = {pair_at<T>(b, P, 8 * n + g, k + 2 * t), pair_at<T>(b, P, 8 * n + g, k + 2 * t + 8)};
#pragma unroll
            for (int m = 0; m < MT; m++) mma16(sum[m][n], from_a[m], from_b, T());
        }
    }
}

// The same for float32, without tensor cores: TF32 would keep 10 bits of the inputs.
template <class T, int WIDTH, int MT, int NT>
__device__ __forceinline__ void multiply(float (&sum)[MT][NT][4], const char* a, const char* b, float) {
    constexpr int P = PITCH<float, WIDTH>;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 2
    for (int k = 0; k < WIDTH; k += 4) {
        float4 row[MT][2];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                row[m][i] = *reinterpret_cast<const float4*>(a + (16 * m + g + 8 * i) * P + k * 4);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float4 column = *reinterpret_cast<const float4*>(b + (8 * n + 2 * t + j) * P + k * 4);
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float& s = sum[m][n][2 * i + j];
                        s = fmaf(row[m][i].x, column.x, s);
                        s = fmaf(row[m][i].y, column.y, s);
                        s = fmaf(row[m][i].z, column.z, s);
                        s = fmaf(row[m][i].w, column.w, s);
                    }
            }
    }
}
