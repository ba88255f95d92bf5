// Flash attention in float32, forward (Dao et al. 2022, and Dao 2023 for the loop order).
//
// A block of 128 threads holds 64 queries of one head and walks over the keys they see, 64 at a
// time.  Thread (y, x) of the 8 x 16 owns the queries y + 8 i, and of them the scores of the keys
// x + 16 j and COLUMNS output channels.  All operands of a product stand in shared memory with
// rows of LD floats: LD / 4 is odd, so that lanes that read 16 bytes of different rows meet
// different banks.  Neighbors in a warp share x and differ in y, next neighbors share y: a card
// can serve such lanes by one read.  Four channels cost a thread 12 reads and 128 FMAs.
//
// The softmax is in base 2: queries come in times log2(e) / sqrt(D), and so do the log-sum-exps.
// The text up to the forward kernel serves `attention_backward.cu` too.

constexpr int WEIGHT_LD = TILE + 16;

__device__ inline int own_y() { return threadIdx.x / LANES * 2 + threadIdx.x % 2; }
__device__ inline int own_x() { return threadIdx.x / 2 % 16; }

// WIDTH: the head width D rounded up to 32, 64, 96 or 128; channels D.. are zeros.
template <int WIDTH> struct Layout {
    static constexpr int LD = WIDTH + 4, COLUMNS = WIDTH / 16, VECTOR = WIDTH % 64 ? 2 : 4;
    // The c-th channel of lane x: 2 or 4 adjacent ones, then a stride over all lanes.
    static __device__ int column(int x, int c) {
        return x * VECTOR + c / VECTOR * 16 * VECTOR + c % VECTOR;
    }
};

__device__ inline bool in_fours(const float* at, long long stride, int D) {
    return on16(at) && stride % 4 == 0 && D % 4 == 0;
}

// tile[row][d] = factor * from[row * stride + d], zero beyond `count` rows and D channels.
template <int WIDTH, int ROWS>
__device__ void load_tile(float* tile, const float* from, long long stride, int count, int D,
                          float factor) {
    const bool wide = in_fours(from, stride, D);
    for (int i = threadIdx.x; i < ROWS * WIDTH / 4; i += THREADS) {
        const int row = i / (WIDTH / 4), d = i % (WIDTH / 4) * 4;
        const float* at = from + row * stride + d;
        float4 x = {0, 0, 0, 0};
        if (row < count && d < D) {
            if (wide) {
                x = *(const float4*)at;
            } else {
                x.x = at[0];
                if (d + 1 < D) x.y = at[1];
                if (d + 2 < D) x.z = at[2];
                if (d + 3 < D) x.w = at[3];
            }
        }
        x.x *= factor, x.y *= factor, x.z *= factor, x.w *= factor;
        *(float4*)(tile + row * Layout<WIDTH>::LD + d) = x;
    }
}

// The inverse for a thread's own channels of one row.
template <int WIDTH>
__device__ void store_row(float* to, const float* values, int x, int D, float factor) {
    using L = Layout<WIDTH>;
    const bool wide = in_fours(to, 0, D) && L::VECTOR == 4;
#pragma unroll
    for (int c = 0; c < L::COLUMNS; c += L::VECTOR) {
        const int d = L::column(x, c);
        if (wide && d < D) {
            float4 y = {values[c], values[c + 1], values[c + L::VECTOR - 2],
                        values[c + L::VECTOR - 1]};
            y.x *= factor, y.y *= factor, y.z *= factor, y.w *= factor;
            *(float4*)(to + d) = y;
        } else {
#pragma unroll
            for (int e = 0; e < L::VECTOR; e++)
                if (d + e < D) to[d + e] = values[c + e] * factor;
        }
    }
}

// s[i][j] = sum over d of a[y + 8 i][d] b[x + 16 j][d]
template <int WIDTH, int R>
__device__ void scores(float (&s)[R][4], const float* a, const float* b, int y, int x) {
    constexpr int LD = Layout<WIDTH>::LD;
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) s[i][j] = 0;
#pragma unroll 4
    for (int d = 0; d < WIDTH; d += 4) {
        float4 key[4];
#pragma unroll
        for (int j = 0; j < 4; j++) key[j] = *(const float4*)(b + (x + 16 * j) * LD + d);
#pragma unroll
        for (int i = 0; i < R; i++) {
            const float4 query = *(const float4*)(a + (y + 8 * i) * LD + d);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] += query.x * key[j].x;
                s[i][j] += query.y * key[j].y;
                s[i][j] += query.z * key[j].z;
                s[i][j] += query.w * key[j].w;
            }
        }
    }
}

template <int WIDTH>
__device__ void read_columns(float (&to)[WIDTH / 16], const float* row, int x) {
    using L = Layout<WIDTH>;
#pragma unroll
    for (int c = 0; c < L::COLUMNS; c += L::VECTOR) {
        const float* at = row + L::column(x, c);
        if (L::VECTOR == 4) {
            const float4 part = *(const float4*)at;
            to[c] = part.x, to[c + 1] = part.y;
            to[c + L::VECTOR - 2] = part.z, to[c + L::VECTOR - 1] = part.w;
        } else {
            const float2 part = *(const float2*)at;
            to[c] = part.x, to[c + 1] = part.y;
        }
    }
}

// sum[i][c] += sum over j of weights[y + 8 i][j] rows[j][column c]
template <int WIDTH, int R>
__device__ void add_weighted(float (&sum)[R][WIDTH / 16], const float* weights, const float* rows,
                             int y, int x) {
    using L = Layout<WIDTH>;
#pragma unroll 2
    for (int j = 0; j < TILE; j += 4) {
        float row[4][L::COLUMNS];
#pragma unroll
        for (int e = 0; e < 4; e++) read_columns<WIDTH>(row[e], rows + (j + e) * L::LD, x);
#pragma unroll
        for (int i = 0; i < R; i++) {
            const float4 w = *(const float4*)(weights + (y + 8 * i) * WEIGHT_LD + j);
#pragma unroll
            for (int c = 0; c < L::COLUMNS; c++) {
                sum[i][c] += w.x * row[0][c];
                sum[i][c] += w.y * row[1][c];
                sum[i][c] += w.z * row[2][c];
                sum[i][c] += w.w * row[3][c];
            }
        }
    }
}

// ------------------------------------------------------------------------------- forward

// out = softmax(q k^T / sqrt(D)) v and lse = log2 of the sum of 2^score, (N, H, T).
// Query t sees the keys 0..t, or with `positions` (N, T) the keys 0..positions[n][t].
template <int WIDTH>
__device__ void forward(const float* q, const float* k, const float* v, const long long* positions,
                        float* out, float* lse, Strides q_, Strides k_, Strides v_, int T, int S,
                        int H, int K, int D, float scale) {
    using L = Layout<WIDTH>;
    constexpr int R = TILE / 8;
    DYNAMIC_SHARED(memory);
    float* queries = (float*)memory;
    float* rows = queries + TILE * L::LD;  // of the keys, then of the values
    float* weights = rows + TILE * L::LD;
    __shared__ int last_of[8];

    const int y = own_y(), x = own_x();
    const int n = blockIdx.x / H, h = blockIdx.x % H, kh = h / (H / K);
    const int start = (gridDim.y - 1 - blockIdx.y) * TILE;  // the longest walks start first
    k += n * k_.n + kh * k_.h;
    v += n * v_.n + kh * v_.h;

    int limit[R], last = -1;  // the last key that each query sees
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int t = start + y + 8 * i;
        limit[i] = t < T ? t : -1;
        if (positions != nullptr && t < T) {
            const long long p = positions[(long long)n * T + t];
            limit[i] = p < 0 ? -1 : p < S ? (int)p : S - 1;
        }
        last = limit[i] > last ? limit[i] : last;
    }
    if (x == 0) last_of[y] = last;
    load_tile<WIDTH, TILE>(queries, q + n * q_.n + start * q_.t + h * q_.h, q_.t, T - start, D,
                           scale * LOG2_E);
    __syncthreads();
    for (int i = 0; i < 8; i++) last = last_of[i] > last ? last_of[i] : last;

    float sum[R][L::COLUMNS] = {}, top[R], total[R] = {};
#pragma unroll
    for (int i = 0; i < R; i++) top[i] = -infinite();

    for (int first = 0; first <= last; first += TILE) {
        __syncthreads();  // the values and weights of the tile before are read
        load_tile<WIDTH, TILE>(rows, k + first * k_.t, k_.t, S - first, D, 1);
        __syncthreads();
        float s[R][4];
        scores<WIDTH, R>(s, queries, rows, y, x);
        __syncthreads();
        load_tile<WIDTH, TILE>(rows, v + first * v_.t, v_.t, S - first, D, 1);
#pragma unroll
        for (int i = 0; i < R; i++) {
            float high = top[i];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (first + x + 16 * j > limit[i]) s[i][j] = -infinite();
                high = fmaxf(high, s[i][j]);  // drops a NaN, which the exponential brings back
            }
#pragma unroll
            for (int lane = 16; lane > 1; lane /= 2)
                high = fmaxf(high, __shfl_xor_sync(ALL, high, lane));
            const float base = high == -infinite() ? 0 : high;  // nothing seen so far: no inf - inf
            const float shrink = exp2f(top[i] - base);
            top[i] = high;
            total[i] *= shrink;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float p = exp2f(s[i][j] - base);
                total[i] += p;  // of this lane's keys; the lanes are summed at the end
                weights[(y + 8 * i) * WEIGHT_LD + x + 16 * j] = p;
            }
#pragma unroll
            for (int c = 0; c < L::COLUMNS; c++) sum[i][c] *= shrink;
        }
        __syncthreads();
        add_weighted<WIDTH, R>(sum, weights, rows, y, x);
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int t = start + y + 8 * i;
#pragma unroll
        for (int lane = 16; lane > 1; lane /= 2)
            total[i] += __shfl_xor_sync(ALL, total[i], lane);
        if (t >= T) continue;
        store_row<WIDTH>(out + (((long long)n * T + t) * H + h) * D, sum[i], x, D, 1 / total[i]);
        if (x == 0) lse[((long long)n * H + h) * T + t] = top[i] + log2f(total[i]);
    }
}

template <int WIDTH>
__global__ void __launch_bounds__(THREADS, WIDTH > 64 ? 2 : 3)
    attention_forward(Strided<const float*> q, Strided<const float*> k, Strided<const float*> v,
                      float* out, float* lse, long long qn, long long qt, long long qh,
                      long long kn, long long kt, long long kh, long long vn, long long vt,
                      long long vh, int T, int H, int K, int D, float scale) {
    forward<WIDTH>(q.at, k.at, v.at, nullptr, out, lse, {qn, qt, qh}, {kn, kt, kh}, {vn, vt, vh},
                   T, T, H, K, D, scale);
}

template <int WIDTH>
__global__ void __launch_bounds__(THREADS, WIDTH > 64 ? 2 : 3)
    attention_cached(Strided<const float*> q, Strided<const float*> k, Strided<const float*> v,
                     const long long* positions, float* out, float* lse, long long qn,
                     long long qt, long long qh, long long kn, long long kt, long long kh,
                     long long vn, long long vt, long long vh, int T, int S, int H, int K, int D,
                     float scale) {
    forward<WIDTH>(q.at, k.at, v.at, positions, out, lse, {qn, qt, qh}, {kn, kt, kh},
                   {vn, vt, vh}, T, S, H, K, D, scale);
}
