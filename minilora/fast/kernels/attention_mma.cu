// Flash attention over bfloat16 on tensor cores: the algorithm of `attention.cu`.
//
// A block of 4 warps holds 64 rows, 16 to a warp, and walks over tiles of 64 others.  A warp's
// product of 16 x 16 by 16 x 8 leaves sums in float32: lane l, with g = l / 4 and t = l % 4, holds
// of the rows g and g + 8 the columns 2 t and 2 t + 1.  Weights are rounded to bfloat16 in place,
// for these are the places in which the next product wants its left side.

template <int WIDTH> constexpr int ROW = WIDTH + 8;  // ROW / 8 is odd: no two rows meet in a bank

__device__ inline unsigned pair(float a, float b) {
    return narrow(a).bits | (unsigned)narrow(b).bits << 16;
}

#ifndef CUDA_CPU  // the shim has its own
// d += a b   of a warp
__device__ inline void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 x 8: lane l points at row l % 8 of matrix l / 8, and gets of each its entries
// (g, 2 t) and (g, 2 t + 1), of a TRANSPOSED one (2 t, g) and (2 t + 1, g).
template <bool TRANSPOSED> __device__ inline void fetch(unsigned (&to)[4], const void* row) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}
#endif

// tile[row][d] = from[row * stride + d], zero beyond `count` rows and D channels.
template <int WIDTH>
__device__ void copy_tile(bf16* tile, const bf16* from, long long stride, int count, int D) {
    const bool wide = on16(from) && stride % 8 == 0 && D % 8 == 0;
    for (int i = threadIdx.x; i < TILE * WIDTH / 8; i += THREADS) {
        const int row = i / (WIDTH / 8), d = i % (WIDTH / 8) * 8;
        const bf16* at = from + row * stride + d;
        bf16* to = tile + row * ROW<WIDTH> + d;
        if (wide) {
            const uint4 zeros = {0, 0, 0, 0};
            *(uint4*)to = row < count && d < D ? *(const uint4*)at : zeros;
        } else {
            for (int e = 0; e < 8; e++) to[e] = row < count && d + e < D ? at[e] : bf16{0};
        }
    }
}

// s[j] = the warp's 16 rows of a, by rows 8 j .. 8 j + 7 of b, transposed
template <int WIDTH>
__device__ void row_products(float (&s)[8][4], const bf16* a, const bf16* b) {
    const int lane = threadIdx.x % LANES, low = lane % 8, odd = lane / 8 % 2, far = lane / 16;
    a += (threadIdx.x / LANES * 16 + low + 8 * odd) * ROW<WIDTH> + 8 * far;
    b += (low + 8 * far) * ROW<WIDTH> + 8 * odd;
#pragma unroll
    for (int j = 0; j < 8; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0;
#pragma unroll 4
    for (int d = 0; d < WIDTH; d += 16) {
        unsigned left[4], right[4];
        fetch<false>(left, a + d);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            fetch<false>(right, b + 8 * j * ROW<WIDTH> + d);
            multiply(s[j], left, right[0], right[1]);
            multiply(s[j + 1], left, right[2], right[3]);
        }
    }
}

// sum[c] += the weights of 16 rows, rounded, times channels 8 c .. 8 c + 7 of the 64 rows of b
template <int WIDTH>
__device__ void add_products(float (&sum)[WIDTH / 8][4], const float (&w)[8][4], const bf16* b) {
    const int lane = threadIdx.x % LANES, low = lane % 8, odd = lane / 8 % 2, far = lane / 16;
    b += (low + 8 * odd) * ROW<WIDTH> + 8 * far;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const unsigned left[4] = {pair(w[j][0], w[j][1]), pair(w[j][2], w[j][3]),
                                  pair(w[j + 1][0], w[j + 1][1]), pair(w[j + 1][2], w[j + 1][3])};
#pragma unroll
        for (int c = 0; c < WIDTH / 8; c += 2) {
            unsigned right[4];
            fetch<true>(right, b + 8 * j * ROW<WIDTH> + 8 * c);
            multiply(sum[c], left, right[0], right[1]);
            multiply(sum[c + 1], left, right[2], right[3]);
        }
    }
}

// Row `i` of a lane's two, times a factor, to an array of D channels.
template <int WIDTH>
__device__ void store_sums(bf16* to, const float (&sum)[WIDTH / 8][4], int i, int D,
                           float factor) {
#pragma unroll
    for (int c = 0; c < WIDTH / 8; c++) {
        const int d = 8 * c + threadIdx.x % 4 * 2;
        const float a = sum[c][2 * i] * factor, b = sum[c][2 * i + 1] * factor;
        if (D % 2 == 0 && d < D) {
            *(unsigned*)(to + d) = pair(a, b);
        } else {
            if (d < D) to[d] = narrow(a);
            if (d + 1 < D) to[d + 1] = narrow(b);
        }
    }
}

template <int WIDTH>
__device__ void forward_mma(const bf16* q, const bf16* k, const bf16* v,
                            const long long* positions, bf16* out, float* lse, Strides q_,
                            Strides k_, Strides v_, int T, int S, int H, int K, int D,
                            float scale) {
    DYNAMIC_SHARED(memory);
    bf16* queries = (bf16*)memory;
    bf16* keys = queries + TILE * ROW<WIDTH>;
    bf16* values = keys + TILE * ROW<WIDTH>;
    __shared__ int last_of[THREADS / LANES];

    const int warp = threadIdx.x / LANES, g = threadIdx.x % LANES / 4, t2 = threadIdx.x % 4 * 2;
    const int n = blockIdx.x / H, h = blockIdx.x % H, kh = h / (H / K);
    const int start = (gridDim.y - 1 - blockIdx.y) * TILE;  // the longest walks start first
    k += n * k_.n + kh * k_.h;
    v += n * v_.n + kh * v_.h;
    copy_tile<WIDTH>(queries, q + n * q_.n + start * q_.t + h * q_.h, q_.t, T - start, D);

    int limit[2], last = -1;  // the last key that each query sees
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int t = start + 16 * warp + g + 8 * i;
        limit[i] = t < T ? t : -1;
        if (positions != nullptr && t < T) {
            const long long p = positions[(long long)n * T + t];
            limit[i] = p < 0 ? -1 : p < S ? (int)p : S - 1;
        }
        last = limit[i] > last ? limit[i] : last;
    }
    for (int lane = 16; lane > 2; lane /= 2) {
        const int other = __shfl_xor_sync(ALL, last, lane);
        last = other > last ? other : last;
    }
    if (threadIdx.x % LANES == 0) last_of[warp] = last;
    __syncthreads();
    for (int i = 0; i < THREADS / LANES; i++) last = last_of[i] > last ? last_of[i] : last;

    float sum[WIDTH / 8][4] = {}, top[2] = {-infinite(), -infinite()}, total[2] = {};
    for (int first = 0; first <= last; first += TILE) {
        __syncthreads();  // the tiles before are read
        copy_tile<WIDTH>(keys, k + first * k_.t, k_.t, S - first, D);
        copy_tile<WIDTH>(values, v + first * v_.t, v_.t, S - first, D);
        __syncthreads();
        float s[8][4];
        row_products<WIDTH>(s, queries, keys);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float high = top[i];
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 2 * i; e < 2 * i + 2; e++) {
                    const bool seen = first + 8 * j + t2 + e % 2 <= limit[i];
                    s[j][e] = seen ? s[j][e] * (scale * LOG2_E) : -infinite();
                    high = fmaxf(high, s[j][e]);  // drops a NaN, which the exponential brings back
                }
            high = fmaxf(high, __shfl_xor_sync(ALL, high, 1));
            high = fmaxf(high, __shfl_xor_sync(ALL, high, 2));
            const float base = high == -infinite() ? 0 : high;  // nothing seen: no inf - inf
            const float shrink = exp2f(top[i] - base);
            top[i] = high;
            total[i] *= shrink;
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 2 * i; e < 2 * i + 2; e++) {
                    s[j][e] = exp2f(s[j][e] - base);
                    total[i] += s[j][e];  // of this lane's keys; the four are summed at the end
                }
#pragma unroll
            for (int c = 0; c < WIDTH / 8; c++) {
                sum[c][2 * i] *= shrink;
                sum[c][2 * i + 1] *= shrink;
            }
        }
        add_products<WIDTH>(sum, s, values);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int t = start + 16 * warp + g + 8 * i;
        total[i] += __shfl_xor_sync(ALL, total[i], 1);
        total[i] += __shfl_xor_sync(ALL, total[i], 2);
        if (t >= T) continue;
        store_sums<WIDTH>(out + (((long long)n * T + t) * H + h) * D, sum, i, D, 1 / total[i]);
        if (t2 == 0) lse[((long long)n * H + h) * T + t] = top[i] + log2f(total[i]);
    }
}

template <int WIDTH>
__global__ void __launch_bounds__(THREADS, WIDTH > 64 ? 2 : 3)
    attention_forward_mma(Strided<const bf16*> q, Strided<const bf16*> k, Strided<const bf16*> v,
                          bf16* out, float* lse, long long qn, long long qt, long long qh,
                          long long kn, long long kt, long long kh, long long vn, long long vt,
                          long long vh, int T, int H, int K, int D, float scale) {
    forward_mma<WIDTH>(q.at, k.at, v.at, nullptr, out, lse, {qn, qt, qh}, {kn, kt, kh},
                       {vn, vt, vh}, T, T, H, K, D, scale);
}

template <int WIDTH>
__global__ void __launch_bounds__(THREADS, WIDTH > 64 ? 2 : 3)
    attention_cached_mma(Strided<const bf16*> q, Strided<const bf16*> k, Strided<const bf16*> v,
                         const long long* positions, bf16* out, float* lse, long long qn,
                         long long qt, long long qh, long long kn, long long kt, long long kh,
                         long long vn, long long vt, long long vh, int T, int S, int H, int K,
                         int D, float scale) {
    forward_mma<WIDTH>(q.at, k.at, v.at, positions, out, lse, {qn, qt, qh}, {kn, kt, kh},
                       {vn, vt, vh}, T, S, H, K, D, scale);
}
