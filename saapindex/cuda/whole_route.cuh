// Inner products of queries with anchors, in whole numbers: anchors are int8, and each dimension of a query is three
// digits of base 128, of its 127th part of the head's largest. That is as close as float32.
//
// A lane has sixteen dimensions of each 64 of an anchor, and the order of the dimensions within a product follows from
// that. The digits of a lane's part of the queries stay in its registers.

#define CHUNKS ((D + 63) / 64)

// Products of small matrices: (16, 32) with (32, 8), of signed bytes.
__device__ __forceinline__ void multiply_signed(int* c, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Write the digits of the queries, a warp for each head: by those who attend, who have time before keys come.
__device__ __forceinline__ void split_queries(Shared& s) {
    const int lane = threadIdx.x % WARP;
#pragma unroll 1
    for (int g = threadIdx.x / WARP - CHOOSING; g < G; g += ATTENDING) {
        float most = 0.f;
#pragma unroll
        for (int d = 0; d < D; d += WARP)
            if (D % WARP == 0 || d + lane < D) most = fmaxf(most, fabsf(s.query[g][d + lane]));
        most = warp_max(most);
        const float inverse = most > SMALLEST ? 127.f / most : 0.f;
        if (lane == 0) s.unit[g] = most / 127.f;
#pragma unroll
        for (int word = lane; word < 16 * CHUNKS; word += WARP) {
            u32 digits[3] = {};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float rest = D % 64 == 0 || 4 * word + i < D ? s.query[g][4 * word + i] * inverse : 0.f;
#pragma unroll
                for (int part = 0; part < 3; ++part) {
                    const float digit = rintf(rest);
                    digits[part] |= ((u32)(int)digit & 255) << 8 * i;
                    rest = 128.f * (rest - digit);
                }
            }
#pragma unroll
            for (int part = 0; part < 3; ++part) s.digits[part][g][word] = digits[part];
        }
    }
    come_by(DIGITS);
}

// Fetch the anchors of some of this block's lists, as they are.
__device__ __forceinline__ void fetch_anchors(const Step& p, i64 row, int count, u8* anchors) {
#pragma unroll 1
    for (int i = threadIdx.x; i < count * (D / 16); i += CHOOSERS) copy_16(anchors + 16 * i, p.anchors + row * D + 16 * i);
    commit_copies();
}

// Logits of some lists, without second orders.
__device__ __forceinline__ void route(
    const Step& p, const Shared& s, int count, const u8* anchors, const float* scales, float* logits
) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head = lane / 4, quarter = lane % 4;
    const bool turned = CHUNKS % 2 == 0 && head % 2;  // of two rows each reads another half first: other banks
    u32 digits[CHUNKS][2][4], last[CHUNKS][2][4] = {};
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j)
#pragma unroll
        for (int part = 0; part < 3; ++part) {
            const uint4 x = head < G ? *(const uint4*)(s.digits[part][head] + 16 * j + 4 * quarter) : make_uint4(0, 0, 0, 0);
            u32(*to)[4] = part < 2 ? digits[j] : last[j];
            to[0][part % 2] = x.x, to[0][part % 2 + 2] = x.y, to[1][part % 2] = x.z, to[1][part % 2 + 2] = x.w;
        }
    const float unit = head < G ? p.scale * s.unit[head] : 0.f;
#pragma unroll 2
    for (int start = warp * 8; start < count; start += CHOOSING * 8) {
        const u8* anchor = anchors + min(start + head, count - 1) * D + 16 * quarter;
        uint4 read[CHUNKS];
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j) {
            const int at = 64 * (turned ? j ^ 1 : j);
            read[j] = D % 64 == 0 || at + 16 * quarter < D ? *(const uint4*)(anchor + at) : make_uint4(0, 0, 0, 0);
        }
        int sums[4] = {}, small[4] = {};
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j) {
            const uint4 x = turned ? read[CHUNKS % 2 == 0 ? j ^ 1 : j] : read[j];
            multiply_signed(sums, digits[j][0], x.x, x.y);
            multiply_signed(small, last[j][0], x.x, x.y);
            multiply_signed(sums, digits[j][1], x.z, x.w);
            multiply_signed(small, last[j][1], x.z, x.w);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int one = start + 2 * quarter + i;
            const float product = (float)sums[i] + ((float)sums[2 + i] + (float)small[i] / 128.f) / 128.f;
            if (head < G && one < count) logits[one * G + head] = product * unit * scales[one];
        }
    }
}
