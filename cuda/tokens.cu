// What is done to every token by itself, in one pass over its values.
//
// Layout   rows of tokens contiguous, at multiples of 16 bytes; results contiguous.
// Launch   grid (ceil(tokens / 8), B), 256 threads: a warp per token, 16 bytes per lane and step.
// Shared   merge: room for a list of all sources, r words. matches: a bit for each neuron.
// Floor    bytes: transition 2 D, matches F, gather 2 D per row taken, merge (N + K) D elements, at memory speed.
#include "common.cuh"

// transition_score: size and exp(1 - cos) of the step from `before` to what `after` adds. magnitude = |after| / |before| * turn.
template <class T>
__global__ void __launch_bounds__(256)
    transition(const T* before, const T* after, i64 before_row, i64 after_row, int rows, int depth, int absolute,
               float* magnitude, float* turn) {
    const int r = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (r >= rows) return;
    const T *const x = before + r * before_row, *const y = after + r * after_row;
    float xx = 0.0f, xy = 0.0f, yy = 0.0f;
    for (int i = lane * Piece<T>::EACH; i < depth; i += 32 * Piece<T>::EACH) {
        const Piece<T> from_x(x + i), from_y(y + i);
#pragma unroll
        for (int j = 0; j < Piece<T>::EACH; j++) {
            if (i + j >= depth) break;
            const float a = to_float(from_x.value[j]), b = to_float(from_y.value[j]);
            xx = fmaf(a, a, xx), xy = fmaf(a, b, xy), yy = fmaf(b, b, yy);
        }
    }
    const float length = sqrtf(warp_sum(yy)), from = fmaxf(sqrtf(warp_sum(xx)), 1e-8f);
    const float cosine = warp_sum(xy) / (from * fmaxf(length, 1e-8f));
    if (lane) return;
    const float e = expf(1.0f - (absolute ? fabsf(cosine) : cosine));
    magnitude[r] = length / from * e, turn[r] = e;
}

// 16 bytes of activations as bits: which are positive? BITS is the type by its bits and MOST those of its infinity, so that
// neither NaN passes nor is a subnormal number flushed to zero; of bool, bytes 0 and 1, any MOST will do.
template <unsigned MOST, class BITS>
__device__ __forceinline__ unsigned positives(const Piece<BITS>& activations) {
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < Piece<BITS>::EACH; j++) bits |= unsigned(unsigned(activations.value[j]) - 1 < MOST) << j;
    return bits;
}

// match_counts: bits set both in active (B, N, F), packed as it is read, and in core (B, F of bytes 0 and 1, then zeros up to a
// multiple of 16), packed once for a block. Bits are never stored: writing and reading them again would only add to the bytes.
template <class BITS, unsigned MOST>
__global__ void __launch_bounds__(256)
    matches(const BITS* active, i64 batch, i64 row, const unsigned char* core, int rows, int width, i64* counts) {
    constexpr int EACH = Piece<BITS>::EACH;
    DYNAMIC_SHARED(shared);
    unsigned short* const wanted = reinterpret_cast<unsigned short*>(shared);  // 16 neurons each
    const int words = (width + 15) / 16;
    core += i64(blockIdx.y) * words * 16;
    for (int i = threadIdx.x; i < words; i += blockDim.x)
        wanted[i] = (unsigned short)positives<1>(Piece<unsigned char>(core + 16 * i));
    __syncthreads();
    const int r = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (r >= rows) return;
    active += blockIdx.y * batch + r * row;
    int count = 0;
#pragma unroll 4
    for (int i = lane * EACH; i < width; i += 32 * EACH)
        count += __popc(positives<MOST>(Piece<BITS>(active + i)) & wanted[i / 16] >> i % 16);
    count = __reduce_add_sync(ALL_LANES, count);
    if (lane == 0) counts[i64(blockIdx.y) * rows + r] = count;
}

// gather_tokens: rows of x by index, as they stand. index (B, K): -1 gives zeros; where marked (B, K; or null), the marker.
// WORD: the widest type in whose multiples all rows are long and apart.
template <class WORD>
__global__ void __launch_bounds__(256)
    gather(const WORD* x, i64 batch, i64 row, const i64* index, const unsigned char* marked, const WORD* marker,
           i64 marker_batch, i64 marker_row, int n, int width, int kept, WORD* out) {
    const int r = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (r >= kept) return;
    const i64 item = blockIdx.y, place = item * kept + r, from = index[place];
    const WORD* source = x + item * batch + from * row;
    bool empty = from < 0;
    if (marked && marked[place]) {
        source = marker + item * marker_batch + r * marker_row, empty = false;
    } else if (from >= n) {
        __trap();  // as torch does
        return;
    }
    out += place * width;
#pragma unroll 4
    for (int i = lane; i < width; i += 32) out[i] = empty ? WORD() : source[i];
}

// merge_tokens: every kept row looks for the sources that merge into it, so that no sum depends on the order of arrival.
// keep (B, K) rows of x, source (B, r) rows of x, target (B, r) places in keep, sizes (B, N) or null, after (B, K).
template <class T>
__global__ void __launch_bounds__(256, 4)
    merge(const T* x, i64 batch, i64 row, const i64* keep, const i64* source, const i64* target, const float* sizes, int n,
          int depth, int kept, int merged, T* out, float* after) {
    constexpr int EACH = Piece<T>::EACH, PLACE = 28;  // bits below the row within the block
    DYNAMIC_SHARED(shared);
    unsigned* const found = reinterpret_cast<unsigned*>(shared);
    __shared__ int n_found[8];
    const i64 item = blockIdx.y;
    x += item * batch, source += item * merged, target += item * merged;
    const int first = blockIdx.x * 8, mine = threadIdx.x / 32, lane = threadIdx.x % 32, r = first + mine;
    // every warp lists, in its eighth of the sources, those that merge into one of the block's eight rows
    const int each = (merged + 7) / 8, stop = min((mine + 1) * each, merged);
    int count = 0;
    for (int from = mine * each; from < stop; from += 32) {
        const int s = from + lane, into = s < stop ? int(existing(target[s], kept)) - first : -1;
        const bool here = into >= 0 && into < 8;
        const unsigned lanes = __ballot_sync(ALL_LANES, here);
        if (here) found[mine * each + count + __popc(lanes & ((1u << lane) - 1))] = unsigned(into) << PLACE | unsigned(s);
        count += __popc(lanes);
    }
    if (lane == 0) n_found[mine] = count;
    __syncthreads();
    if (r >= kept) return;
    auto size = [&](i64 token) { return sizes ? sizes[item * n + token] : 1.0f; };
    auto for_each_source = [&](auto f) {  // all lanes together, in the order of `source`
        for (int part = 0; part < 8; part++) {
            const unsigned* const list = found + part * each;
            for (int from = 0; from < n_found[part]; from += 32) {
                const bool listed = from + lane < n_found[part];
                unsigned hits = __ballot_sync(ALL_LANES, listed && int(list[from + lane] >> PLACE) == mine);
                for (; hits; hits &= hits - 1) f(existing(source[list[from + __ffs(hits) - 1] & ((1u << PLACE) - 1)], n));
            }
        }
    };
    const i64 own = existing(keep[item * kept + r], n);
    float total = size(own);
    bool alone = true;
    for_each_source([&](i64 token) { total += size(token), alone = false; });
    if (lane == 0) after[item * kept + r] = total;
    out += (item * kept + r) * depth;
    for (int start = 0; start < depth; start += 32 * EACH) {
        const int c = start + lane * EACH;
        const bool inside = c < depth;
        Piece<T> mean(x + own * row + (inside ? c : 0));
        if (!alone) {
            float sum[EACH];
#pragma unroll
            for (int j = 0; j < EACH; j++) sum[j] = size(own) * to_float(mean.value[j]);
            for_each_source([&](i64 token) {
                const Piece<T> other(x + token * row + (inside ? c : 0));
                const float weight = size(token);
#pragma unroll
                for (int j = 0; j < EACH; j++) sum[j] = fmaf(weight, to_float(other.value[j]), sum[j]);
            });
#pragma unroll
            for (int j = 0; j < EACH; j++) from_float(sum[j] / total, mean.value[j]);
        }
        if (inside && depth % EACH == 0)
            *reinterpret_cast<uint4*>(out + c) = *reinterpret_cast<const uint4*>(mean.value);
        else
            for (int j = 0; j < EACH && c + j < depth; j++) out[c + j] = mean.value[j];
    }
}
