// Rotary position embedding: a thread for each PAIRS pairs that lie together, and dimensions that are only copied.
//
// Compiled with -DPAIRS=2 where rows are in halves, 16 bits wide and aligned for it.

#ifndef PAIRS
#define PAIRS 1
#endif
#if PAIRS == 2
typedef u32 packet;
#else
typedef element packet;
#endif

union Packet {
    packet whole;
    element part[PAIRS];
};

extern "C" __global__ void __launch_bounds__(256)
rotate(const element* __restrict__ x, i64 stride, const i64* __restrict__ positions, const double* __restrict__ half_turns,
       const double* __restrict__ scale, element* __restrict__ out, i64 n, int d, int pairs, int interleaved) {
    const int width = (d - pairs) / PAIRS;  // threads of a row
    const i64 number = (i64)blockIdx.x * blockDim.x + threadIdx.x, row = number / width;
    if (row >= n) return;
    const int i = (int)(number - row * width) * PAIRS;
    x += row * stride;
    out += row * d;
    if (i >= pairs) {
        *(packet*)(out + pairs + i) = *(const packet*)(x + pairs + i);
        return;
    }
    const int first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + pairs;
    Packet a, b;
    a.whole = *(const packet*)(x + first);
    b.whole = *(const packet*)(x + second);
    const double position = (double)positions[row];
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
        // Angles in half turns: the whole ones drop out exactly, in float64 as the definition has it.
        const double turns = position * half_turns[i + j];
#if ELEMENT == 2
        double sin, cos;
        sincospi(turns, &sin, &cos);
        const float s = (float)(sin * scale[i + j]), c = (float)(cos * scale[i + j]);
#else
        float sin, cos;  // what is left of the angle needs no more than float32 for a result in 16 bits
        sincospif((float)(turns - 2 * rint(turns / 2)), &sin, &cos);
        const float s = sin * (float)scale[i + j], c = cos * (float)scale[i + j];
#endif
        const float u = widen(a.part[j]), v = widen(b.part[j]);
        a.part[j] = narrow(u * c - v * s);
        b.part[j] = narrow(v * c + u * s);
    }
    *(packet*)(out + first) = a.whole;
    *(packet*)(out + second) = b.whole;
}
