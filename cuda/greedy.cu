// Greedy subsets: every pick depends on the one before, so a whole loop is one launch and one block serves one image.
//
// Layout   gram (B, N, N) float32 cosines, picks (B, k) int64 in order of selection. Ties go to the lower index.
// Launch   diverse, conditional_dpp: grid (B), 1024 threads. diverse_step, dpp_step: grid (ceil(N / 64), B), 256 threads, once
//          per pick, for so many tokens that their Gram matrix would be too large.
// Shared   scores of all tokens, N floats (conditional_dpp: and k). Steps: the pick's values, D floats (dpp_step: and k).
// Floor    latency: k picks of one Gram row and two barriers each, 1 to 2 us a pick. conditional_dpp also reads its earlier
//          factors, k^2 N / 2 floats of L2 an image, which one multiprocessor must do alone. Steps: the tokens once per pick.
#include "common.cuh"

// diverse_subset. `start` (B) first picks, or null: the token whose nearest other token is farthest, by `nearest`
// (B, tiles, N). max_sum: a token's score is its summed similarity to all picks, else its largest; lowest is picked.
__global__ void __launch_bounds__(1024)
    diverse(const float* gram, const float* nearest, int tiles, const i64* start, int n, int k, int max_sum, i64* picks) {
    DYNAMIC_SHARED(shared);
    float* const score = reinterpret_cast<float*>(shared);
    __shared__ unsigned best[128];
    gram += i64(blockIdx.x) * n * n, picks += i64(blockIdx.x) * k;
    int pick;
    if (start) {
        pick = int(existing(start[blockIdx.x], n));
    } else {
        nearest += i64(blockIdx.x) * tiles * n;
        unsigned low = ~0u;
        int where = -1;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            float closest = -infinity();
            for (int tile = 0; tile < tiles; tile++) closest = fmaxf(closest, nearest[i64(tile) * n + i]);
            if (where < 0 || ordered(closest) < low) low = ordered(closest), where = i;
        }
        pick = block_lowest(low, where, best, 1);
    }
    for (int step = 0;; step++) {
        if (threadIdx.x == 0) picks[step] = pick;
        if (step == k - 1) return;
        const float* const similarity = gram + i64(pick) * n;
        unsigned low = ~0u;
        int where = -1;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const float s = similarity[i], before = step ? score[i] : max_sum ? 0.0f : -infinity();
            const float now = i == pick ? infinity() : max_sum ? before + s : fmaxf(before, s);
            score[i] = now;
            if (where < 0 || ordered(now) < low) low = ordered(now), where = i;
        }
        pick = block_lowest(low, where, best, step);
    }
}

// What a step without a Gram matrix starts with: the token that the launch before found lowest, by what each of its blocks left
// in `lows`. `score` becomes that token's. All threads get both.
__device__ __forceinline__ int lowest_of_blocks(const u64* lows, int blocks, unsigned& score, unsigned* best) {
    u64 low = ~0ull;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) low = min(low, lows[i]);
    score = unsigned(low >> 32);
    return block_lowest(score, int(unsigned(low)), best, 0);
}

constexpr int STEP_ROWS = 64;  // tokens of a block of the steps

// Over one warp: x . picked, where `x` is one token's row.
template <class T>
__device__ __forceinline__ float dot_with_pick(const T* x, const float* picked, int depth, int lane) {
    float dot = 0.0f;
    for_each_value(x, depth, lane, 32, [&](int c, float value) { dot = fmaf(value, picked[c], dot); });
    return warp_sum(dot);
}

// One pick of diverse_subset without a Gram matrix. Reads what the launch before left in `lows` (2, B, blocks), the best of
// every block by parity of the step; the first pick stands in picks. x (B, N, D), `inverse` its inverse norms.
template <class T>
__global__ void __launch_bounds__(256)
    diverse_step(const T* x, i64 batch, i64 row, const float* inverse, int n, int depth, int k, int step, int max_sum,
                 float* score, u64* lows, i64* picks) {
    __shared__ unsigned best[128];
    DYNAMIC_SHARED(shared);
    float* const picked = reinterpret_cast<float*>(shared);  // the pick's values
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = gridDim.x;
    const i64 item = blockIdx.y, each = i64(gridDim.y) * blocks;
    x += item * batch, inverse += item * n, score += item * n, picks += item * k, lows += item * blocks;
    unsigned low = ~0u;
    const int pick = step ? lowest_of_blocks(lows + (step + 1) % 2 * each, blocks, low, best) : int(existing(picks[0], n));
    if (step && blockIdx.x == 0 && threadIdx.x == 0) picks[step] = pick;
    if (step == k - 1) return;
    for (int i = threadIdx.x; i < depth; i += blockDim.x) picked[i] = to_float(x[pick * row + i]);
    __syncthreads();
    low = ~0u;
    int where = -1;
    for (int r = warp; r < STEP_ROWS; r += 8) {
        const int i = blockIdx.x * STEP_ROWS + r;
        if (i >= n) break;
        const float s = dot_with_pick(x + i * row, picked, depth, lane) * (inverse[i] * inverse[pick]);
        const float old = step ? score[i] : max_sum ? 0.0f : -infinity();
        const float now = i == pick ? infinity() : max_sum ? old + s : fmaxf(old, s);
        __syncwarp();  // all lanes have read the old score
        if (lane == 0) score[i] = now;
        if (where < 0 || ordered(now) < low) low = ordered(now), where = i;
    }
    const int lowest = block_lowest(low, where, best, 1);
    if (where == lowest && lane == 0) lows[step % 2 * each + blockIdx.x] = u64(low) << 32 | unsigned(lowest);
}

// What conditional_dpp picks the lowest of: the negative of a token's gain, zero where that is below `noise`. Picked tokens have
// gain -inf and come last.
__device__ __forceinline__ unsigned gain_score(float gain, float noise) {
    return gain == -infinity() ? ~0u : ordered(gain > noise ? -gain : 0.0f);
}

// conditional_dpp: kernel r_i cos(i, j) r_j. A gain below `noise` of the token's own entry counts as zero. `factors` (B, k, N)
// are the rows of the incremental Cholesky decomposition.
__global__ void __launch_bounds__(1024) conditional_dpp(const float* gram, const float* relevance, const float* diagonal,
                                                        float noise, int n, int k, float* factors, i64* picks) {
    DYNAMIC_SHARED(shared);
    float* const gain = reinterpret_cast<float*>(shared);
    float* const of_pick = gain + n;  // earlier factors at the pick
    __shared__ unsigned best[128];
    gram += i64(blockIdx.x) * n * n, relevance += i64(blockIdx.x) * n, diagonal += i64(blockIdx.x) * n;
    factors += i64(blockIdx.x) * k * n, picks += i64(blockIdx.x) * k;

    unsigned low = ~0u;
    int where = -1;
    auto consider = [&](int i) {
        const unsigned score = gain_score(gain[i], noise * diagonal[i]);
        if (where < 0 || score < low) low = score, where = i;
    };
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        gain[i] = diagonal[i];
        consider(i);
    }
    for (int step = 0; step < k; step++) {
        const int pick = block_lowest(low, where, best, step);
        if (threadIdx.x == 0) picks[step] = pick;
        if (step == k - 1) return;
        const float left = -from_ordered(low);
        const bool adds = left > 0.0f;
        const float scale = adds ? 1.0f / sqrtf(left) : 0.0f;
        for (int s = threadIdx.x; s < step; s += blockDim.x) of_pick[s] = factors[i64(s) * n + pick];
        __syncthreads();
        low = ~0u, where = -1;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            float projected = 0.0f;
#pragma unroll 8
            for (int s = 0; s < step; s++) projected = fmaf(of_pick[s], factors[i64(s) * n + i], projected);
            const float entry = relevance[pick] * gram[i64(pick) * n + i] * relevance[i];
            const float factor = adds ? (entry - projected) * scale : 0.0f;
            factors[i64(step) * n + i] = factor;
            gain[i] = i == pick ? -infinity() : gain[i] - factor * factor;
            consider(i);
        }
        __syncthreads();
    }
}

// One pick of conditional_dpp without a Gram matrix, as diverse_step makes its own. `gain` (B, N), the diagonal at first.
template <class T>
__global__ void __launch_bounds__(256)
    dpp_step(const T* x, i64 batch, i64 row, const float* inverse, int n, int depth, int k, int step, const float* relevance,
             const float* diagonal, float noise, float* gain, float* factors, u64* lows, i64* picks) {
    constexpr int PARTS = 256 / STEP_ROWS;  // threads that share the earlier factors of a token
    __shared__ unsigned best[128];
    __shared__ float cosine[STEP_ROWS], projected[PARTS][STEP_ROWS];
    DYNAMIC_SHARED(shared);
    float* const picked = reinterpret_cast<float*>(shared);  // the pick's values
    float* const of_pick = picked + depth;                   // earlier factors at the pick
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = gridDim.x, first = blockIdx.x * STEP_ROWS;
    const i64 item = blockIdx.y, each = i64(gridDim.y) * blocks;
    x += item * batch, inverse += item * n, relevance += item * n, diagonal += item * n, gain += item * n;
    factors += item * k * n, picks += item * k, lows += item * blocks;
    unsigned low = ~0u;
    const int pick = step ? lowest_of_blocks(lows + (step + 1) % 2 * each, blocks, low, best) : int(existing(picks[0], n));
    if (step && blockIdx.x == 0 && threadIdx.x == 0) picks[step] = pick;
    if (step == k - 1) return;
    const float left = step ? -from_ordered(low) : diagonal[pick];  // its gain itself may be overwritten by its own block
    const bool adds = left > 0.0f;
    const float scale = adds ? 1.0f / sqrtf(left) : 0.0f;
    for (int i = threadIdx.x; i < depth; i += blockDim.x) picked[i] = to_float(x[pick * row + i]);
    for (int s = threadIdx.x; s < step; s += blockDim.x) of_pick[s] = factors[i64(s) * n + pick];
    __syncthreads();
    for (int r = warp; r < STEP_ROWS && first + r < n; r += 8) {
        const float s = dot_with_pick(x + (first + r) * row, picked, depth, lane) * (inverse[first + r] * inverse[pick]);
        if (lane == 0) cosine[r] = s;
    }
    const int r = threadIdx.x % STEP_ROWS, part = threadIdx.x / STEP_ROWS, i = first + r;
    const int known = i < n ? step : 0;
    float sum = 0.0f;
#pragma unroll 8
    for (int s = part; s < known; s += PARTS) sum = fmaf(of_pick[s], factors[i64(s) * n + i], sum);
    projected[part][r] = sum;
    __syncthreads();
    low = ~0u;
    int where = -1;
    if (part == 0 && i < n) {
        for (int p = 1; p < PARTS; p++) sum += projected[p][r];
        const float entry = relevance[pick] * cosine[r] * relevance[i];
        const float factor = adds ? (entry - sum) * scale : 0.0f;
        factors[i64(step) * n + i] = factor;
        gain[i] = i == pick ? -infinity() : gain[i] - factor * factor;
        low = gain_score(gain[i], noise * diagonal[i]), where = i;
    }
    const int lowest = block_lowest(low, where, best, 1);
    if (where == lowest) lows[step % 2 * each + blockIdx.x] = u64(low) << 32 | unsigned(lowest);
}
