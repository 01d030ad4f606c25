// What the kernels of attention know about one call: where queries and keys lie, and who sees whom.
#pragma once
#include "tile.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr int NOWHERE = -0x7fffffff - 1;

// What a launch reads: the fields of GEOMETRY in attention.py, in that order.
struct Attention {
    const void *q, *k;
    i64 q_batch, q_head, q_row, k_batch, k_head, k_row;  // strides in elements
    const i64* row_positions;                            // (B, Q) place of a query row among the keys; null: row + first_query
    const int* segments;                                 // (B, K) keys are seen from their own segment only; null: from all
    const unsigned char* key_valid;                      // (B, K) keys that may be seen; null: all
    int rows, keys, depth, group;                        // Q, K, d, H / H_kv
    int before, after, first_query;                      // a row sees keys at position - before .. position + after
    float scale;

    template <class T>
    __device__ const T* queries(int head) const {
        return static_cast<const T*>(q) + blockIdx.z * q_batch + head * q_head;
    }
    template <class T>
    __device__ const T* head_keys(int head) const {  // of one of the H_kv heads
        return static_cast<const T*>(k) + blockIdx.z * k_batch + head * k_head;
    }
    __device__ int position(int row) const {
        return row_positions ? int(row_positions[i64(blockIdx.z) * rows + row]) : row + first_query;
    }
    __device__ int segment(int position) const { return segments ? segments[i64(blockIdx.z) * keys + position] : 0; }
    __device__ int key_segment(int key) const {  // of a key that nobody may see: NOWHERE
        return key < keys && (!key_valid || key_valid[i64(blockIdx.z) * keys + key]) ? segment(key) : NOWHERE;
    }
    __device__ bool near(int position, int key) const {
        return unsigned(key - position + before) <= unsigned(before) + unsigned(after);
    }
};
