// Rotary position embedding: one thread for each pair, and for each dimension that is only copied.

extern "C" __global__ void __launch_bounds__(256)
rotate(const element* __restrict__ x, i64 stride, const i64* __restrict__ positions, const double* __restrict__ half_turns,
       const double* __restrict__ scale, element* __restrict__ out, i64 n, int d, int pairs, int interleaved) {
    const int width = d - pairs;  // threads of a row
    const i64 number = (i64)blockIdx.x * blockDim.x + threadIdx.x, row = number / width;
    if (row >= n) return;
    const int i = (int)(number - row * width);
    x += row * stride;
    out += row * d;
    if (i >= pairs) {
        out[pairs + i] = x[pairs + i];
        return;
    }
    // Angles in half turns: the whole ones drop out exactly, in float64 as the definition has it.
    const double turns = (double)positions[row] * half_turns[i];
#if ELEMENT == 2
    double sin, cos;
    sincospi(turns, &sin, &cos);
    const float s = (float)(sin * scale[i]), c = (float)(cos * scale[i]);
#else
    float sin, cos;  // what is left of the angle needs no more than float32 for a result in 16 bits
    sincospif((float)(turns - 2 * rint(turns / 2)), &sin, &cos);
    const float s = sin * (float)scale[i], c = cos * (float)scale[i];
#endif
    const int first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + pairs;
    const float a = widen(x[first]), b = widen(x[second]);
    out[first] = narrow(a * c - b * s);
    out[second] = narrow(b * c + a * s);
}
