// The way back of flash attention over bfloat16: the algorithm of `attention_backward.cu`, with the
// products of `attention_mma.cu`.

// delta[n][h][t] = sum over d of g o, of an o (N, T, H, D) that was rounded to bfloat16.  Where a
// query sees few keys, dP - delta is the small rest of two that are alike, and that rounding is
// felt: over two keys dQ was off by 3 %, and by as much as itself where weights are sharp.
//
// The row sum of P dP is the same number, and not rounded.  Queries of the first tile see the keys
// of one tile: of these delta is formed so, at the cost of two products in a block of its own.
// The others see more than 64 keys and keep the sum of g o, with which gradients stay within 7e-3,
// sharp weights or not.  For them P dP would be two products more beside the seven of the
// way back, and o in float32, or what was rounded off it, four or two bytes an entry.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS, WIDTH > 64 ? 2 : 3)
    attention_delta_mma(Strided<const bf16*> q, Strided<const bf16*> k, Strided<const bf16*> v,
                        Strided<const bf16*> g, const bf16* o, const float* lse, float* delta,
                        long long qn, long long qt, long long qh, long long kn, long long kt,
                        long long kh, long long vn, long long vt, long long vh, long long gn,
                        long long gt, long long gh, int T, int H, int K, int D, float scale) {
    DYNAMIC_SHARED(memory);
    bf16* queries = (bf16*)memory;
    bf16* gradients = queries + TILE * ROW<WIDTH>;
    bf16* keys = gradients + TILE * ROW<WIDTH>;
    bf16* values = keys + TILE * ROW<WIDTH>;

    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int n = blockIdx.x / H, h = blockIdx.x % H, key_head = h / (H / K);
    const int start = blockIdx.y * TILE;
    lse += ((long long)n * H + h) * T;
    delta += ((long long)n * H + h) * T;
    copy_tile<WIDTH>(gradients, g.at + n * gn + start * gt + h * gh, gt, T - start, D);
    if (start > 0) {
        bf16* outputs = queries;
        copy_tile<WIDTH>(outputs, o + (((long long)n * T + start) * H + h) * D, (long long)H * D,
                         T - start, D);
        __syncthreads();
        const int row = threadIdx.x / 2;  // two threads share it
        float sum = 0;
#pragma unroll
        for (int d = threadIdx.x % 2 * 4; d < WIDTH; d += 8) {
            const Floats<4> a = load(gradients + row * ROW<WIDTH> + d, Width<4>());
            const Floats<4> b = load(outputs + row * ROW<WIDTH> + d, Width<4>());
            for (int j = 0; j < 4; j++) sum += a.v[j] * b.v[j];
        }
        sum += __shfl_xor_sync(ALL, sum, 1);
        if (threadIdx.x % 2 == 0 && start + row < T) delta[start + row] = sum;
        return;  // a block as a whole
    }
    copy_tile<WIDTH>(queries, q.at + n * qn + h * qh, qt, T, D);
    copy_tile<WIDTH>(keys, k.at + n * kn + key_head * kh, kt, T, D);
    copy_tile<WIDTH>(values, v.at + n * vn + key_head * vh, vt, T, D);
    __syncthreads();
    float s[8][4], dp[8][4];
    row_products<WIDTH>(s, queries, keys);
    row_products<WIDTH>(dp, gradients, values);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int t = 16 * warp + lane / 4 + 8 * i;
        const float base = t < T ? lse[t] : 0;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 2 * i; e < 2 * i + 2; e++) {
                const bool seen = 8 * j + lane % 4 * 2 + e % 2 <= t;
                sum += seen ? exp2f(s[j][e] * (scale * LOG2_E) - base) * dp[j][e] : 0;
            }
        sum += __shfl_xor_sync(ALL, sum, 1);
        sum += __shfl_xor_sync(ALL, sum, 2);
        if (lane % 4 == 0 && t < T) delta[t] = sum;
    }
}

template <int WIDTH>
__global__ void __launch_bounds__(THREADS, 2)
    attention_backward_q_mma(Strided<const bf16*> q, Strided<const bf16*> k,
                             Strided<const bf16*> v, Strided<const bf16*> g, const float* lse,
                             const float* delta, bf16* dq, long long qn, long long qt,
                             long long qh, long long kn, long long kt, long long kh, long long vn,
                             long long vt, long long vh, long long gn, long long gt, long long gh,
                             int T, int H, int K, int D, float scale) {
    DYNAMIC_SHARED(memory);
    bf16* queries = (bf16*)memory;
    bf16* gradients = queries + TILE * ROW<WIDTH>;
    bf16* keys = gradients + TILE * ROW<WIDTH>;
    bf16* values = keys + TILE * ROW<WIDTH>;

    const int n = blockIdx.x / H, h = blockIdx.x % H, key_head = h / (H / K);
    const int start = (gridDim.y - 1 - blockIdx.y) * TILE;
    const int end = start + TILE < T ? start + TILE : T;
    const int mine = start + threadIdx.x / LANES * 16 + threadIdx.x % LANES / 4;
    const int t2 = threadIdx.x % 4 * 2;
    const bf16* of_keys = k.at + n * kn + key_head * kh;
    const bf16* of_values = v.at + n * vn + key_head * vh;
    copy_tile<WIDTH>(queries, q.at + n * qn + start * qt + h * qh, qt, T - start, D);
    copy_tile<WIDTH>(gradients, g.at + n * gn + start * gt + h * gh, gt, T - start, D);
    float base[2], slope[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const long long at = ((long long)n * H + h) * T + mine + 8 * i;
        base[i] = mine + 8 * i < T ? lse[at] : 0;
        slope[i] = mine + 8 * i < T ? delta[at] : 0;
    }

    float sum[WIDTH / 8][4] = {};
    for (int first = 0; first < end; first += TILE) {
        __syncthreads();  // the tiles before are read
        copy_tile<WIDTH>(keys, of_keys + first * kt, kt, T - first, D);
        copy_tile<WIDTH>(values, of_values + first * vt, vt, T - first, D);
        __syncthreads();
        float s[8][4], ds[8][4];
        row_products<WIDTH>(s, queries, keys);
        row_products<WIDTH>(ds, gradients, values);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int i = e / 2, key = first + 8 * j + t2 + e % 2;
                const float p = exp2f(s[j][e] * (scale * LOG2_E) - base[i]);
                ds[j][e] = key <= mine + 8 * i ? p * (ds[j][e] - slope[i]) : 0;
            }
        add_products<WIDTH>(sum, ds, keys);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (mine + 8 * i < T)
            store_sums<WIDTH>(dq + (((long long)n * T + mine + 8 * i) * H + h) * D, sum, i, D,
                              scale);
}

// Here the rows of a warp are keys, and the tiles that go by are queries.  Those beyond the end
// have gradients of zero, and add nothing.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS, 2)
    attention_backward_kv_mma(Strided<const bf16*> q, Strided<const bf16*> k,
                              Strided<const bf16*> v, Strided<const bf16*> g, const float* lse,
                              const float* delta, bf16* dk, bf16* dv, long long qn, long long qt,
                              long long qh, long long kn, long long kt, long long kh,
                              long long vn, long long vt, long long vh, long long gn,
                              long long gt, long long gh, int T, int H, int K, int D,
                              float scale) {
    DYNAMIC_SHARED(memory);
    bf16* keys = (bf16*)memory;
    bf16* values = keys + TILE * ROW<WIDTH>;
    bf16* queries = values + TILE * ROW<WIDTH>;
    bf16* gradients = queries + TILE * ROW<WIDTH>;
    __shared__ float bases[TILE], slopes[TILE];

    const int n = blockIdx.x / K, key_head = blockIdx.x % K, group = H / K;
    const int first = blockIdx.y * TILE;
    const int mine = first + threadIdx.x / LANES * 16 + threadIdx.x % LANES / 4;
    const int t2 = threadIdx.x % 4 * 2;
    copy_tile<WIDTH>(keys, k.at + n * kn + first * kt + key_head * kh, kt, T - first, D);
    copy_tile<WIDTH>(values, v.at + n * vn + first * vt + key_head * vh, vt, T - first, D);

    float key_sum[WIDTH / 8][4] = {}, value_sum[WIDTH / 8][4] = {};
    for (int h = key_head * group; h < (key_head + 1) * group; h++) {
        const long long at = ((long long)n * H + h) * T;
        for (int start = first; start < T; start += TILE) {
            __syncthreads();  // the tiles before are read
            copy_tile<WIDTH>(queries, q.at + n * qn + start * qt + h * qh, qt, T - start, D);
            copy_tile<WIDTH>(gradients, g.at + n * gn + start * gt + h * gh, gt, T - start, D);
            if (threadIdx.x < TILE) {
                const int t = start + threadIdx.x;
                bases[threadIdx.x] = t < T ? lse[at + t] : 0;
                slopes[threadIdx.x] = t < T ? delta[at + t] : 0;
            }
            __syncthreads();
            float p[8][4], ds[8][4];
            row_products<WIDTH>(p, keys, queries);
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int column = 8 * j + t2 + e % 2;
                    const bool seen = mine + 8 * (e / 2) <= start + column;
                    p[j][e] = seen ? exp2f(p[j][e] * (scale * LOG2_E) - bases[column]) : 0;
                }
            add_products<WIDTH>(value_sum, p, gradients);
            row_products<WIDTH>(ds, values, gradients);
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    ds[j][e] = p[j][e] * (ds[j][e] - slopes[8 * j + t2 + e % 2]);
            add_products<WIDTH>(key_sum, ds, queries);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (mine + 8 * i >= T) continue;
        const long long at = (((long long)n * T + mine + 8 * i) * K + key_head) * D;
        store_sums<WIDTH>(dk + at, key_sum, i, D, scale);
        store_sums<WIDTH>(dv + at, value_sum, i, D, 1);
    }
}
