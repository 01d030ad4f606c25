// Attention that a few query rows pay to all keys (the class token, an instruction): keys are read once, by many blocks.
//
// Layout   as in attention.cu. The rows of all query heads that share a key head are one list, so that they share its keys.
// Launch   row_scores: grid (tiles of 128 keys, H_kv x lists of 8 NT rows, B), 128 threads: each of 4 warps owns 32 keys.
//          key_means: grid (tiles of 64 keys, B), 256 threads: four to a key.
// Shared   row_scores: a tile of 128 keys and one of 8 NT rows, 20 KiB (16 bit, d = 64) to 85 KiB (float32, d = 128).
//          key_means: one float for every head and row.
// Floor    bytes: the keys, and 8 bytes of scores for every head, row and key.
#include "attention.cuh"

constexpr int KEYS = 128;  // of a block of row_scores

// What a tile of keys says to a row: the highest score and the sum of 2^(score - highest).
struct Part {
    float highest, total;
};

// scores (B, H R, K): log2(e) scale q . k, -inf where a row does not see a key. parts (B, tiles, H R).
template <class T, int WIDTH, int NT>
__global__ void __launch_bounds__(128) row_scores(const Attention a, float* scores, Part* parts) {
    constexpr int P = PITCH<T, WIDTH>, ROWS = 8 * NT, EACH = 16 / sizeof(T), PIECES = WIDTH / EACH;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int listed = a.group * a.rows, lists = (listed + ROWS - 1) / ROWS;
    const int kv_head = blockIdx.y / lists, first_row = blockIdx.y % lists * ROWS, first = blockIdx.x * KEYS;
    const int all_rows = gridDim.y / lists * listed;  // H R
    DYNAMIC_SHARED(shared);
    __shared__ Part of_warp[4][ROWS];
    char* const rows = shared + KEYS * P;
    load_tile<T, KEYS, WIDTH>(shared, a.head_keys<T>(kv_head), a.k_row, first, a.keys, 0, a.depth);
    for (int i = threadIdx.x; i < ROWS * PIECES; i += blockDim.x) {
        const int r = i / PIECES, c = i % PIECES * EACH, row = first_row + r;
        const int left = row < listed ? min(max(a.depth - c, 0), EACH) : 0;
        const T* const from = a.queries<T>(kv_head * a.group + (left ? row / a.rows : 0));
        copy16(rows + r * P + c * sizeof(T), left ? from + row % a.rows * a.q_row + c : from, left * int(sizeof(T)));
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    float product[2][NT][4] = {};
    multiply<T, WIDTH>(product, shared + 32 * warp * P, rows, T());

    const i64 list = i64(blockIdx.z) * all_rows + kv_head * listed;
    int segment[2][2];
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) segment[m][i] = a.key_segment(first + 32 * warp + 16 * m + g + 8 * i);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int r = 8 * n + 2 * t + j, row = first_row + r;
            const bool exists = row < listed;
            const int position = exists && a.row_positions ? a.position(row % a.rows) : 0;
            float highest = -infinity();
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int key = first + 32 * warp + 16 * m + g + 8 * i;
                    float& score = product[m][n][2 * i + j];
                    const bool seen = segment[m][i] != NOWHERE && (!a.row_positions || a.near(position, key));
                    score = seen ? score * (a.scale * LOG2E) : -infinity();
                    if (exists && key < a.keys) scores[(list + row) * a.keys + key] = score;
                    highest = fmaxf(highest, score);
                }
            for (int step = 4; step < 32; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, step));
            const float base = highest == -infinity() ? 0.0f : highest;
            float total = 0.0f;
#pragma unroll
            for (int m = 0; m < 2; m++) total += exp2f(product[m][n][j] - base) + exp2f(product[m][n][2 + j] - base);
            for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(ALL_LANES, total, step);
            if (g == 0) of_warp[warp][r] = {highest, total};
        }
    __syncthreads();
    const int r = threadIdx.x, row = first_row + r;
    if (r >= ROWS || row >= listed) return;
    float highest = -infinity(), total = 0.0f;
    for (int w = 0; w < 4; w++) highest = fmaxf(highest, of_warp[w][r].highest);
    const float base = highest == -infinity() ? 0.0f : highest;
    for (int w = 0; w < 4; w++) total += of_warp[w][r].total * exp2f(of_warp[w][r].highest - base);
    parts[(i64(blockIdx.z) * gridDim.x + blockIdx.x) * all_rows + kv_head * listed + row] = {highest, total};
}

// received (B, K): mean over heads and valid rows of 2^(score - log2 of the row's sum). row_valid (B, R) or null.
__global__ void __launch_bounds__(256) key_means(const float* scores, const Part* parts, const unsigned char* row_valid,
                                                 int heads, int rows, int keys, int tiles, float* received) {
    DYNAMIC_SHARED(shared);
    float* const shift = reinterpret_cast<float*>(shared);  // of every head and row; +inf for those that give nothing
    __shared__ float sums[4][64];
    const int all_rows = heads * rows, part = threadIdx.x / 64, key = blockIdx.x * 64 + threadIdx.x % 64;
    scores += i64(blockIdx.y) * all_rows * keys, parts += i64(blockIdx.y) * tiles * all_rows;
    if (row_valid) row_valid += i64(blockIdx.y) * rows;
    for (int r = threadIdx.x; r < all_rows; r += blockDim.x) {
        float highest = -infinity(), total = 0.0f;
        for (int tile = 0; tile < tiles; tile++) highest = fmaxf(highest, parts[i64(tile) * all_rows + r].highest);
        const float base = highest == -infinity() ? 0.0f : highest;
        for (int tile = 0; tile < tiles; tile++) {
            const Part p = parts[i64(tile) * all_rows + r];
            total += p.total * exp2f(p.highest - base);
        }
        const bool counts = total > 0.0f && (!row_valid || row_valid[r % rows]);
        shift[r] = counts ? base + log2f(total) : infinity();
    }
    __syncthreads();
    float sum = 0.0f;
    if (key < keys)
        for (int r = part; r < all_rows; r += 4) sum += exp2f(scores[i64(r) * keys + key] - shift[r]);
    sums[part][threadIdx.x % 64] = sum;
    __syncthreads();
    if (part || key >= keys) return;
    int valid = rows;
    if (row_valid) {
        valid = 0;
        for (int r = 0; r < rows; r++) valid += row_valid[r];
    }
    const int column = threadIdx.x;
    const float total = (sums[0][column] + sums[1][column]) + (sums[2][column] + sums[3][column]);
    received[i64(blockIdx.y) * keys + key] = total / float(heads * max(valid, 1));
}
