// The way back of flash attention.  P is formed again from the log-sum-exps:
//
//     P = 2^(S - lse)     dV = P^T dO     dS = P (dO V^T - delta)     delta = row sums of dO O
//     dQ = dS K / sqrt(D)                 dK = dS^T Q / sqrt(D)
//
// One kernel walks over the keys for 8 R queries, the other over the queries for 64 keys and all
// query heads of their key head, in order: each gradient has one owner, who sums it in one order.

// delta[n][h][t] = sum over d of g o.   One warp a row; o (N, T, H, D) is contiguous.
__global__ void __launch_bounds__(THREADS)
    attention_delta(Strided<const float*> g, const float* o, float* delta, long long gn,
                    long long gt, long long gh, int T, int H, int D, long long rows) {
    const long long row = (long long)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    if (row >= rows) return;  // a warp as a whole
    const int h = row % H, lane = threadIdx.x % LANES;
    const long long t = row / H % T, n = row / H / T;
    const float* at = g.at + n * gn + t * gt + h * gh;
    o += row * D;
    float sum = 0;
    for (int d = lane; d < D; d += LANES) sum += at[d] * o[d];
    sum = warp_sum(sum);
    if (lane == 0) delta[(n * H + h) * T + t] = sum;
}

template <int WIDTH> struct Backward {
    static constexpr int R = WIDTH > 64 ? 4 : 8, QUERIES = 8 * R;  // two blocks fit an H100's SM
};

// P and dS of a thread's queries `first_query` + y + 8 i and keys `first_key` + x + 16 j.
template <int WIDTH, int R>
__device__ void weights_and_slopes(float (&p)[R][4], float (&ds)[R][4], const float* queries,
                                   const float* gradients, const float* keys, const float* values,
                                   const float* lse, const float* delta, int first_query,
                                   int first_key, int T, int y, int x) {
    scores<WIDTH, R>(p, queries, keys, y, x);
    scores<WIDTH, R>(ds, gradients, values, y, x);
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int t = first_query + y + 8 * i;
        const int last = t < T ? t - first_key - x : -1;  // the last 16 j that this query sees
        const float mine = t < T ? lse[t] : 0, slope = t < T ? delta[t] : 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            p[i][j] = 16 * j <= last ? exp2f(p[i][j] - mine) : 0;
            ds[i][j] = 16 * j <= last ? p[i][j] * (ds[i][j] - slope) : 0;
        }
    }
}

template <int R> __device__ void write_weights(float* weights, float (&w)[R][4], int y, int x) {
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) weights[(y + 8 * i) * WEIGHT_LD + x + 16 * j] = w[i][j];
}

template <int WIDTH>
__global__ void __launch_bounds__(THREADS, 2)
    attention_backward_q(Strided<const float*> q, Strided<const float*> k, Strided<const float*> v,
                         Strided<const float*> g, const float* lse, const float* delta, float* dq,
                         long long qn, long long qt, long long qh, long long kn, long long kt,
                         long long kh, long long vn, long long vt, long long vh, long long gn,
                         long long gt, long long gh, int T, int H, int K, int D, float scale) {
    using L = Layout<WIDTH>;
    constexpr int R = Backward<WIDTH>::R, QUERIES = Backward<WIDTH>::QUERIES;
    DYNAMIC_SHARED(memory);
    float* queries = (float*)memory;
    float* gradients = queries + QUERIES * L::LD;
    float* keys = gradients + QUERIES * L::LD;
    float* values = keys + TILE * L::LD;
    float* weights = values + TILE * L::LD;

    const int y = own_y(), x = own_x();
    const int n = blockIdx.x / H, h = blockIdx.x % H, key_head = h / (H / K);
    const int start = (gridDim.y - 1 - blockIdx.y) * QUERIES;
    const int end = start + QUERIES < T ? start + QUERIES : T;
    const float* of_keys = k.at + n * kn + key_head * kh;
    const float* of_values = v.at + n * vn + key_head * vh;
    lse += ((long long)n * H + h) * T;
    delta += ((long long)n * H + h) * T;
    load_tile<WIDTH, QUERIES>(queries, q.at + n * qn + start * qt + h * qh, qt, T - start, D,
                              scale * LOG2_E);
    load_tile<WIDTH, QUERIES>(gradients, g.at + n * gn + start * gt + h * gh, gt, T - start, D, 1);

    float sum[R][L::COLUMNS] = {};
    for (int first = 0; first < end; first += TILE) {
        __syncthreads();  // the keys and weights of the tile before are read
        load_tile<WIDTH, TILE>(keys, of_keys + first * kt, kt, T - first, D, 1);
        load_tile<WIDTH, TILE>(values, of_values + first * vt, vt, T - first, D, 1);
        __syncthreads();
        float p[R][4], ds[R][4];
        weights_and_slopes<WIDTH, R>(p, ds, queries, gradients, keys, values, lse, delta, start,
                                     first, T, y, x);
        write_weights<R>(weights, ds, y, x);
        __syncthreads();
        add_weighted<WIDTH, R>(sum, weights, keys, y, x);
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int t = start + y + 8 * i;
        if (t < T)
            store_row<WIDTH>(dq + (((long long)n * T + t) * H + h) * D, sum[i], x, D, scale);
    }
}

// sum[j][c] += sum over i of weights[i][8 y + j] rows[i][column c]
template <int WIDTH, int QUERIES>
__device__ void add_transposed(float (&sum)[8][WIDTH / 16], const float* weights,
                               const float* rows, int y, int x) {
    using L = Layout<WIDTH>;
#pragma unroll 4
    for (int i = 0; i < QUERIES; i++) {
        const float4 a = *(const float4*)(weights + i * WEIGHT_LD + 8 * y);
        const float4 b = *(const float4*)(weights + i * WEIGHT_LD + 8 * y + 4);
        float row[L::COLUMNS];
        read_columns<WIDTH>(row, rows + i * L::LD, x);
#pragma unroll
        for (int c = 0; c < L::COLUMNS; c++) {
            sum[0][c] += a.x * row[c];
            sum[1][c] += a.y * row[c];
            sum[2][c] += a.z * row[c];
            sum[3][c] += a.w * row[c];
            sum[4][c] += b.x * row[c];
            sum[5][c] += b.y * row[c];
            sum[6][c] += b.z * row[c];
            sum[7][c] += b.w * row[c];
        }
    }
}

template <int WIDTH>
__global__ void __launch_bounds__(THREADS, 2)
    attention_backward_kv(Strided<const float*> q, Strided<const float*> k, Strided<const float*> v,
                          Strided<const float*> g, const float* lse, const float* delta, float* dk,
                          float* dv, long long qn, long long qt, long long qh, long long kn,
                          long long kt, long long kh, long long vn, long long vt, long long vh,
                          long long gn, long long gt, long long gh, int T, int H, int K, int D,
                          float scale) {
    using L = Layout<WIDTH>;
    constexpr int R = Backward<WIDTH>::R, QUERIES = Backward<WIDTH>::QUERIES;
    DYNAMIC_SHARED(memory);
    float* keys = (float*)memory;
    float* values = keys + TILE * L::LD;
    float* queries = values + TILE * L::LD;
    float* gradients = queries + QUERIES * L::LD;
    float* weights = gradients + QUERIES * L::LD;

    const int y = own_y(), x = own_x();
    const int n = blockIdx.x / K, key_head = blockIdx.x % K, group = H / K;
    const int first = blockIdx.y * TILE;
    load_tile<WIDTH, TILE>(keys, k.at + n * kn + first * kt + key_head * kh, kt, T - first, D, 1);
    load_tile<WIDTH, TILE>(values, v.at + n * vn + first * vt + key_head * vh, vt, T - first, D,
                           1);

    float key_sum[8][L::COLUMNS] = {}, value_sum[8][L::COLUMNS] = {};
    for (int h = key_head * group; h < (key_head + 1) * group; h++) {
        const long long at = ((long long)n * H + h) * T;
        for (int start = first; start < T; start += QUERIES) {
            __syncthreads();  // the queries and weights of the tile before are read
            load_tile<WIDTH, QUERIES>(queries, q.at + n * qn + start * qt + h * qh, qt, T - start,
                                      D, scale * LOG2_E);
            load_tile<WIDTH, QUERIES>(gradients, g.at + n * gn + start * gt + h * gh, gt,
                                      T - start, D, 1);
            __syncthreads();
            float p[R][4], ds[R][4];
            weights_and_slopes<WIDTH, R>(p, ds, queries, gradients, keys, values, lse + at,
                                         delta + at, start, first, T, y, x);
            write_weights<R>(weights, p, y, x);
            __syncthreads();
            add_transposed<WIDTH, QUERIES>(value_sum, weights, gradients, y, x);
            __syncthreads();
            write_weights<R>(weights, ds, y, x);
            __syncthreads();
            add_transposed<WIDTH, QUERIES>(key_sum, weights, queries, y, x);
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int t = first + 8 * y + j;
        if (t >= T) continue;
        const long long at = (((long long)n * T + t) * K + key_head) * D;
        store_row<WIDTH>(dk + at, key_sum[j], x, D, 1 / LOG2_E);  // queries held log2(e)/sqrt(D)
        store_row<WIDTH>(dv + at, value_sum[j], x, D, 1);
    }
}
