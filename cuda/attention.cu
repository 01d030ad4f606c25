// Attention received by keys, without the attention map: a pass over rows for their log-sum-exp, a pass over columns for
// the sums. With log-sum-exps at hand (flash attention computes them) the second pass is all.
//
// Layout   q (B, H, Q, d), k (B, H_kv, K, d): any strides but the last, which is 1; rows start at multiples of 16 bytes.
// Launch   grid (tiles of 64 rows | keys, H, B), 128 threads: each of 4 warps owns 16 rows of the block's tile and meets
//          every tile of the other side, which is copied two deep.
// Shared   one tile of 64 and two of STREAM<T> tokens, WIDTH + padding wide: 27 KiB (16 bit, d = 64) to 66 KiB (float32, d = 128).
// Floor    exponentials: Q K H B per pass at 16 per clock and SM; products at d = 64 take about as long. Bytes are nothing.
#include "attention.cuh"

constexpr int OWN = 64;  // tokens of a block's own tile
template <class T>
constexpr int STREAM = sizeof(T) == 2 ? 64 : 32;  // tokens of a streamed tile

// lse (B, H, Q): natural log of sum over visible keys of exp(scale q . k); -inf for a row that sees nothing.
template <class T, int WIDTH, bool MASKED>
__global__ void __launch_bounds__(128, 4) row_lse(const Attention a, float* lse) {
    constexpr int NT = STREAM<T> / 8, P = PITCH<T, WIDTH>;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const i64 map = i64(blockIdx.z) * gridDim.y + blockIdx.y;  // which of the B x H attention maps
    const T *const q = a.queries<T>(blockIdx.y), *const k = a.head_keys<T>(blockIdx.y / a.group);
    const int rows = a.rows, keys = a.keys;
    const float to_log2 = a.scale * LOG2E;
    DYNAMIC_SHARED(shared);
    __shared__ int key_segment[2][STREAM<T>];
    char* const streamed = shared + OWN * P;
    const int first = blockIdx.x * OWN;
    int start = 0, stop = keys;
    if (MASKED && !a.row_positions) {
        start = max(0, first + a.first_query - a.before) / STREAM<T> * STREAM<T>;
        stop = min(keys, first + OWN + a.first_query + a.after);
    }
    auto load_keys = [&](int from, int stage) {
        load_tile<T, STREAM<T>, WIDTH>(streamed + stage * STREAM<T> * P, k, a.k_row, from, keys, 0, a.depth);
        if (MASKED)
            for (int i = threadIdx.x; i < STREAM<T>; i += blockDim.x) key_segment[stage][i] = a.key_segment(from + i);
    };
    load_tile<T, OWN, WIDTH>(shared, q, a.q_row, first, rows, 0, a.depth);
    load_keys(start, 0);
    copy_commit();

    const int row[2] = {first + 16 * warp + g, first + 16 * warp + g + 8};
    int position[2] = {0, 0}, segment[2] = {0, 0};
    if (MASKED)
        for (int i = 0; i < 2; i++)
            if (row[i] < rows) position[i] = a.position(row[i]), segment[i] = a.segment(position[i]);
    float highest[2] = {-infinity(), -infinity()}, total[2] = {0.0f, 0.0f};  // of the columns this lane sees
    for (int from = start, stage = 0; from < stop; from += STREAM<T>, stage ^= 1) {
        if (from + STREAM<T> < stop) load_keys(from + STREAM<T>, stage ^ 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        float score[1][NT][4] = {};
        multiply<T, WIDTH>(score, shared + 16 * warp * P, streamed + stage * STREAM<T> * P, T());
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float top = highest[i];
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float& s = score[0][n][2 * i + j];
                    const int c = 8 * n + 2 * t + j, key = from + c;
                    const bool seen = MASKED ? key_segment[stage][c] == segment[i] && a.near(position[i], key) : key < keys;
                    s = seen ? s * to_log2 : -infinity();
                    top = fmaxf(top, s);
                }
            const float base = top == -infinity() ? 0.0f : top;
            total[i] *= exp2f(highest[i] - base);
#pragma unroll
            for (int n = 0; n < NT; n++) total[i] += exp2f(score[0][n][2 * i] - base) + exp2f(score[0][n][2 * i + 1] - base);
            highest[i] = top;
        }
        __syncthreads();  // before the next copy overwrites what was just read
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float top = quad_max(highest[i]), base = top == -infinity() ? 0.0f : top;
        const float sum = quad_sum(total[i] * exp2f(highest[i] - base));
        if (t == 0 && row[i] < rows) lse[map * rows + row[i]] = LN2 * base + logf(sum);
    }
}

// received (B, H, K): sum over query rows of exp(scale q . k - lse); rows with lse = +inf give nothing.
template <class T, int WIDTH, bool MASKED>
__global__ void __launch_bounds__(128, 4) column_sums(const Attention a, const float* lse, float* received) {
    constexpr int NT = STREAM<T> / 8, P = PITCH<T, WIDTH>;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const i64 map = i64(blockIdx.z) * gridDim.y + blockIdx.y;  // which of the B x H attention maps
    const T *const q = a.queries<T>(blockIdx.y), *const k = a.head_keys<T>(blockIdx.y / a.group);
    const int rows = a.rows, keys = a.keys;
    const float to_log2 = a.scale * LOG2E;
    DYNAMIC_SHARED(shared);
    __shared__ float row_shift[2][STREAM<T>];
    __shared__ int row_position[2][STREAM<T>], row_segment[2][STREAM<T>];
    char* const streamed = shared + OWN * P;
    const int first = blockIdx.x * OWN;
    lse += map * rows;
    // a streamed tile of queries, with the log-sum-exps that belong to it; rows behind the last one weigh nothing
    auto load_rows = [&](int from, int stage) {
        load_tile<T, STREAM<T>, WIDTH>(streamed + stage * STREAM<T> * P, q, a.q_row, from, rows, 0, a.depth);
        for (int i = threadIdx.x; i < STREAM<T>; i += blockDim.x) {
            const bool exists = from + i < rows;
            row_shift[stage][i] = exists ? lse[from + i] * LOG2E : infinity();
            if (MASKED) {
                row_position[stage][i] = exists ? a.position(from + i) : 0;
                row_segment[stage][i] = a.segment(row_position[stage][i]);
            }
        }
    };
    load_tile<T, OWN, WIDTH>(shared, k, a.k_row, first, keys, 0, a.depth);
    int start = 0, stop = rows;
    if (MASKED && !a.row_positions) {
        start = max(0, first - a.after - a.first_query) / STREAM<T> * STREAM<T>;
        stop = min(rows, first + OWN + a.before - a.first_query);
    }
    load_rows(start, 0);
    copy_commit();

    const int key[2] = {first + 16 * warp + g, first + 16 * warp + g + 8};
    int segment[2] = {NOWHERE, NOWHERE};
    if (MASKED)
        for (int i = 0; i < 2; i++) segment[i] = a.key_segment(key[i]);
    float total[2] = {0.0f, 0.0f};  // of the queries this lane sees
    for (int from = start, stage = 0; from < stop; from += STREAM<T>, stage ^= 1) {
        if (from + STREAM<T> < stop) load_rows(from + STREAM<T>, stage ^ 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        float score[1][NT][4] = {};
        multiply<T, WIDTH>(score, shared + 16 * warp * P, streamed + stage * STREAM<T> * P, T());
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int r = 8 * n + 2 * t + j;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float p = exp2f(fmaf(score[0][n][2 * i + j], to_log2, -row_shift[stage][r]));
                    const bool seen = !MASKED || (row_segment[stage][r] == segment[i] && a.near(row_position[stage][r], key[i]));
                    total[i] += seen ? p : 0.0f;
                }
            }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float sum = quad_sum(total[i]);
        if (t == 0 && key[i] < keys) received[map * keys + key[i]] = sum;
    }
}
