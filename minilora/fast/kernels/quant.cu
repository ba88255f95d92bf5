// Block-wise codes, to the bit: numbers to four bits, and four or eight bits back to numbers.
// Save where a number on the way lies below 2^-126, which is taken for zero (see `common.cu`).

// A warp per block of `block` entries.  A byte holds two codes, the first in the high half.
// EXTREME: the scale is minus the entry of largest magnitude, the first of equals.  `bad` is set
// where an entry is not finite; what is written then means nothing.
template <bool EXTREME>
__global__ void quantize4(unsigned char* packed, float* scales, int* bad, const float* w,
                          long long n, int block, const float* thresholds, int count,
                          const unsigned char* order) {
    __shared__ float bounds[16];
    __shared__ unsigned char stored[16];
    if (threadIdx.x < count) bounds[threadIdx.x] = thresholds[threadIdx.x];
    if (threadIdx.x <= count) stored[threadIdx.x] = order[threadIdx.x];
    __syncthreads();
    int lane = threadIdx.x % LANES;
    long long b = blockIdx.x * (long long)(blockDim.x / LANES) + threadIdx.x / LANES;
    if (b * block >= n) return;  // a whole warp, and no barrier of the block follows
    const float* x = w + b * block;
    int length = min((long long)block, n - b * block);

    float peak = 0;
    int where = 0;
    bool fits = true;
    for (int i = lane; i < length; i += LANES) {
        float size = fabsf(x[i]);
        fits = fits && size <= 3.402823466e38f;  // false for NaN
        if (size > peak) {
            peak = size;
            where = i;
        }
    }
    for (int d = LANES / 2; d > 0; d /= 2) {
        float other = __shfl_xor_sync(ALL, peak, d);
        int there = __shfl_xor_sync(ALL, where, d);
        if (other > peak || (other == peak && there < where)) {
            peak = other;
            where = there;
        }
    }
    if (!fits) *bad = 1;  // whoever writes it, it is 1
    float scale = peak < 1.17549435e-38f ? 0.0f : EXTREME ? -x[where] : peak;
    float divisor = scale == 0 ? 1.0f : scale, inverse = 1 / divisor;
    // bitsandbytes divides in a short last block; 1/s is taken for zero where s is above 2^126
    bool whole = length == block && inverse != 0;
    unsigned char* bytes = packed + b * (block / 2);
    for (int i = lane; 2 * i < length; i += LANES) {
        int byte = 0;
        for (int j = 2 * i; j < 2 * i + 2; j++) {
            float v = 0;
            if (j < length) v = whole ? x[j] * inverse : x[j] / divisor;
            int level = 0;
            for (int k = 0; k < count; k++) level += v > bounds[k];
            byte = byte << 4 | stored[level];
        }
        bytes[i] = byte;
    }
    if (lane == 0) scales[b] = scale;
}

// Four entries of codes at i, as indices into a table.
template <int BITS> __device__ inline void codes_at(const unsigned char* packed, long long i,
                                                    int code[4]) {
    if (BITS == 8) {
        uchar4 c = *(const uchar4*)(packed + i);
        code[0] = c.x, code[1] = c.y, code[2] = c.z, code[3] = c.w;
    } else {
        unsigned pair = *(const unsigned short*)(packed + i / 2);  // the low byte comes first
        code[0] = pair >> 4 & 15, code[1] = pair & 15, code[2] = pair >> 12, code[3] = pair >> 8 & 15;
    }
}

// Entries of four share a scale, for 2^shift, the size of a block, is at least 32.
template <typename S, int BITS>
__global__ void dequantize(S* __restrict__ out, const unsigned char* __restrict__ packed,
                           const float* __restrict__ scales, const float* __restrict__ table,
                           long long n, int shift) {
    constexpr int COPIES = BITS == 4 ? LANES : 1;  // one for each lane: no two meet in a bank
    __shared__ float levels[COPIES << BITS];
    for (int i = threadIdx.x; i < COPIES << BITS; i += blockDim.x) levels[i] = table[i / COPIES];
    __syncthreads();
    const float* mine = levels + threadIdx.x % COPIES;
    bool wide = on16(out) && on16(packed);
    long long me = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    long long all = gridDim.x * (long long)blockDim.x;
    long long fours = wide ? n / 4 : 0;
#pragma unroll 4
    for (long long k = me; k < fours; k += all) {
        int code[4];
        codes_at<BITS>(packed, 4 * k, code);
        float scale = scales[4 * k >> shift];
        Floats<4> x;
        for (int j = 0; j < 4; j++) x.v[j] = mine[code[j] * COPIES] * scale;
        store(out + 4 * k, x);
    }
    for (long long i = 4 * fours + me; i < n; i += all) {
        int code = BITS == 8 ? packed[i] : i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
        store(out + i, Floats<1>{{mine[code * COPIES] * scales[i >> shift]}});
    }
}
