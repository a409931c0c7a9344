// What a step of sparse attention is given, and what its kernels agree on.
//
// Compiled with -DD (head size), -DG (query heads of a KV head), -DELEMENT (stored type), -DQUERY (type of queries
// and output), -DPOLICY (of the group: sum, max or union).

#ifndef POLICY
#define POLICY 0
#endif
#define WARPS (THREADS / WARP)
#define BINS 2048
#define LOWEST_BITS 0x23800000  // of 2^-56: weights below share a bin
#define BIN_SHIFT 18            // 32 bins of an octave
#ifndef OWN
#define OWN 1024  // lists, or candidates of a block, in the bin in which a cut falls
#endif
#define CORRECTION 3.f          // the most that a second-order term adds to a logit
#define SLACK 8.f               // logits may pass the reference by so much before it moves
#define LOG2E 1.4426950408889634f

#define VECTORS (D * (int)sizeof(element) / 16)         // 16-byte loads of a row
#define QUERY_PARTS (QUERY == ELEMENT && ELEMENT != 2 ? 1 : 3)  // of a 16-bit type, see attend_rows.cuh

struct Step {
    int* lengths;
    const int* first;
    element *near_keys, *near_values;
    const element *keys, *values;
    const u32* codes;
    const u8* exponents;
    const int *ids, *pages, *labels, *orders, *counts, *sizes;
    const i8* anchors;
    const float* anchor_scales;
    const i8* means;
    const float *mean_scales, *squares;
    const float *inverse, *steps, *base, *spread, *distortion;  // inverse: (H, R, D)
    const int *coded, *slots, *chunks;  // slots: (H, R), chunks: (H,), quads: (H, FIELDS)
    const u32* quads;
    const float *weights, *least_codes;  // (H,): of a budget, and which part of it goes to codes at least
    const float *scarce, *asks;  // (H,), (3,): weights where bytes are scarce, and when they are
    const void* queries;
    const int* positions;  // (B, t), or none: the newest tokens
    void* out;
    float* lse;
    u32* bits;  // (units, width): the positions that are chosen, then the lists visited, instead of attending
    float *dots, *rotated, *estimates, *masses;
    int2* visited;
    u16* bins;
    u8* kept;
    int *rows, *histogram;
    float2* candidates;
    u32* counters;
    float* partial;
    const element *new_keys, *new_values;  // (B, H, d): of a token that the step adds first; or none
    const int* moved;  // how often arrays have moved; `version` when this launch was prepared
    u32* tickets;  // (B,), zero between launches
    i64* stamps;  // (grid, STAGES): clocks of each block at the beginning of each stage, with -DSTAMPS
    i64 key_batch, key_head, value_batch, value_head;  // strides of what is new
    double budget, share;
    float scale, cap, top_p;
    int heads, tokens, lists, ring, sinks, most_pages, coded_most, blocks, width;
    int code_bytes, row_bytes, nprobe, by_mass, refine, remainder, near, everything, cached, by_head, version;
};

enum { SUM, MAX, UNION };
#define RANKERS (POLICY == UNION ? G : 1)  // who chooses, each for itself
