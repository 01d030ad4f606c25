// Cosine similarities of all pairs of tokens, in tiles: written out (Gram matrix) or reduced at once (PiToMe's energy, the
// best match, the nearest other token), so that nothing of size N x N is held unless it is asked for.
//
// Layout   a (B, N, C), b (B, M, C): rows contiguous, at multiples of 16 bytes. Inverse norms (B, N) float32.
// Launch   inverse_norms: grid (ceil(N / 8), B), 256 threads, a warp per row.
//          similarity: grid (M / 128, N / 128, B), 256 threads = 4 x 2 warps of 32 x 64 elements. Symmetric modes compute the
//          upper triangle and serve both sides with it.
// Shared   two stages of two tiles of 128 rows x 128 bytes, 72 KiB; then the 128 x 128 products.
// Floor    products: N M C B / 790 T/s (16 bit, tensor cores), half in symmetric modes; float32 inputs go at float32 rate.
#include "tile.cuh"

enum Mode {
    GRAM,    // out (B, N, N) float32 if not null, and partial: the largest similarity with another token
    ENERGY,  // partial: sum of f(similarity)
    MATCH    // keys: best column, as match_key packs it
};

// What a launch reads: the fields of PAIRS in similarity.py, in that order.
struct Pairs {
    const void *a, *b;
    i64 a_batch, a_row, b_batch, b_row;  // strides in elements
    const float *a_inverse, *b_inverse;
    const unsigned char* b_valid;  // (B, M) columns that may match; null: all
    float* out;
    void* partial;  // (B, tiles, N): what the columns of every tile say, each slot written once
    int a_rows, b_rows, depth;
    float margin, alpha;  // ENERGY
    int jump;
};

constexpr int TILE = 128;

// 1 / max(|x|, tiny): a zero row is similar to nothing.
template <class T>
__global__ void __launch_bounds__(256) inverse_norms(const T* x, i64 batch, i64 row, int rows, int depth, float* inverse) {
    const int r = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (r >= rows) return;
    x += blockIdx.y * batch + r * row;
    float sum = 0.0f;
    for_each_value(x, depth, lane, 32, [&](int, float value) { sum = fmaf(value, value, sum); });
    sum = warp_sum(sum);
    if (lane == 0) inverse[i64(blockIdx.y) * rows + r] = 1.0f / fmaxf(sqrtf(sum), 1e-12f);
}

// Orders like (similarity, then lower column first) as a signed integer.
__device__ __forceinline__ i64 match_key(float similarity, int column) {
    const int bits = __float_as_int(similarity + 0.0f);  // no negative zero
    return i64(bits >= 0 ? bits : bits ^ 0x7fffffff) << 32 | (0xffffffffu - unsigned(column));
}

// What one similarity says, and how the similarities of a row combine.
template <Mode MODE>
struct Statistic;
template <>
struct Statistic<GRAM> {
    typedef float Type;
    __device__ static Type none() { return -infinity(); }
    __device__ static Type of(const Pairs&, const unsigned char*, float cosine, int row, int column) {
        return row == column ? none() : cosine;
    }
    __device__ static Type join(Type x, Type y) { return fmaxf(x, y); }
};
template <>
struct Statistic<ENERGY> {
    typedef float Type;
    __device__ static Type none() { return 0.0f; }
    __device__ static Type of(const Pairs& p, const unsigned char*, float cosine, int, int) {
        const float excess = cosine - p.margin;
        return excess > 0.0f ? (p.jump ? cosine : excess) : p.alpha * expm1f(excess);
    }
    __device__ static Type join(Type x, Type y) { return x + y; }
};
template <>
struct Statistic<MATCH> {
    typedef i64 Type;
    __device__ static Type none() { return -0x7fffffffffffffffll - 1; }
    __device__ static Type of(const Pairs&, const unsigned char* valid, float cosine, int, int column) {
        return match_key(!valid || valid[column] ? cosine : -infinity(), column);
    }
    __device__ static Type join(Type x, Type y) { return max(x, y); }
};

template <class T, Mode MODE>
__global__ void __launch_bounds__(256) similarity(const Pairs p) {
    typedef Statistic<MODE> S;
    typedef typename S::Type Value;
    constexpr bool SYMMETRIC = MODE != MATCH;
    constexpr int WIDTH = 128 / sizeof(T), P = PITCH<T, WIDTH>, STAGE = 2 * TILE * P;
    const int tile_row = blockIdx.y, tile_column = blockIdx.x, item = blockIdx.z;
    if (SYMMETRIC && tile_column < tile_row) return;
    DYNAMIC_SHARED(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp_row = warp / 2, warp_column = warp % 2;
    const T* const a = static_cast<const T*>(p.a) + item * p.a_batch;
    const T* const b = static_cast<const T*>(p.b) + item * p.b_batch;
    auto load = [&](int column, int stage) {
        char* const to = shared + stage * STAGE;
        load_tile<T, TILE, WIDTH>(to, a, p.a_row, tile_row * TILE, p.a_rows, column, p.depth);
        load_tile<T, TILE, WIDTH>(to + TILE * P, b, p.b_row, tile_column * TILE, p.b_rows, column, p.depth);
    };

    float product[2][8][4] = {};
    load(0, 0);
    copy_commit();
    for (int column = 0, stage = 0; column < p.depth; column += WIDTH, stage ^= 1) {
        if (column + WIDTH < p.depth) load(column + WIDTH, stage ^ 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const char* const from = shared + stage * STAGE;
        multiply<T, WIDTH>(product, from + 32 * warp_row * P, from + (TILE + 64 * warp_column) * P, T());
        __syncthreads();
    }

    // to where whole warps can read rows and, in symmetric modes, columns
    constexpr int ACROSS = TILE + 1;
    float* const tile = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = 32 * warp_row + 16 * m + g + i / 2 * 8, c = 64 * warp_column + 8 * n + 2 * t + i % 2;
                tile[r * ACROSS + c] = product[m][n][i];
            }
    __syncthreads();
    const float *const a_inverse = p.a_inverse + i64(item) * p.a_rows, *const b_inverse = p.b_inverse + i64(item) * p.b_rows;
    const unsigned char* const valid = p.b_valid ? p.b_valid + i64(item) * p.b_rows : nullptr;
    float* const out = p.out ? p.out + i64(item) * p.a_rows * p.b_rows : nullptr;
    Value* const partial = static_cast<Value*>(p.partial) + i64(item) * gridDim.x * p.a_rows;
    // what the tokens from `others` on say to those from `own` on; `along` and `across` are steps between them in the tile
    auto summarise = [&](int own, int others, int along, int across) {
        for (int r = warp; r < TILE && own + r < p.a_rows; r += 8) {
            const int row = own + r;
            Value value = S::none();
            for (int c = lane; c < TILE && others + c < p.b_rows; c += 32) {
                const int column = others + c;
                const float cosine = tile[r * along + c * across] * (a_inverse[row] * b_inverse[column]);
                if (MODE == GRAM && out) out[i64(row) * p.b_rows + column] = cosine;
                value = S::join(value, S::of(p, valid, cosine, row, column));
            }
            for (int step = 16; step; step /= 2) value = S::join(value, __shfl_xor_sync(ALL_LANES, value, step));
            if (lane == 0) partial[i64(others / TILE) * p.a_rows + row] = value;
        }
    };
    summarise(tile_row * TILE, tile_column * TILE, ACROSS, 1);
    if (SYMMETRIC && tile_row != tile_column) summarise(tile_column * TILE, tile_row * TILE, 1, ACROSS);
}
