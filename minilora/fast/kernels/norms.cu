// LayerNorm (CENTERED) and RMSNorm: a block per row on the way out and back; the gradients of
// weight and bias are summed in strips of rows, and the strips then in order: no atomics.  Weight
// and bias are float32 beside any x.

// y = n w + b,  n = (x - mean) / sqrt(var + eps); the sums are double, 1e20 squared fits.
template <typename S, bool CENTERED>
__global__ void norm_forward(S* y, float* inverse, float* mean, const S* x, const float* weight,
                             const float* bias, int C, double eps) {
    long long row = blockIdx.x;
    x += row * C;
    y += row * C;
    bool wide = C % 4 == 0 && on16(x) && on16(y) && on16(weight) && on16(bias);
    float center = 0;
    if (CENTERED) {
        double sum = 0;
        by_row(C, wide, [&](int i, auto width) {
            auto a = load(x + i, width);
            for (float v : a.v) sum += v;
        });
        center = block_sum(sum) / C;
    }
    double squares = 0;
    by_row(C, wide, [&](int i, auto width) {
        auto a = load(x + i, width);
        for (float v : a.v) squares += (double)(v - center) * (v - center);
    });
    float scale = 1 / sqrt(block_sum(squares) / C + eps);
    by_row(C, wide, [&](int i, auto width) {
        auto a = load(x + i, width), w = load(weight + i, width);
        for (int j = 0; j < width.n; j++) a.v[j] = (a.v[j] - center) * scale * w.v[j];
        if (CENTERED) {
            auto b = load(bias + i, width);
            for (int j = 0; j < width.n; j++) a.v[j] += b.v[j];
        }
        store(y + i, a);
    });
    if (threadIdx.x == 0) {
        inverse[row] = scale;
        if (CENTERED) mean[row] = center;
    }
}

// dx = (h - mean(h) - n mean(h n)) / sqrt(var + eps),  h = g w
template <typename S, bool CENTERED>
__global__ void norm_backward(S* dx, const S* g, const S* x, const float* weight,
                              const float* inverse, const float* mean, int C) {
    long long row = blockIdx.x;
    dx += row * C;
    g += row * C;
    x += row * C;
    bool wide = C % 4 == 0 && on16(dx) && on16(g) && on16(x) && on16(weight);
    float scale = inverse[row], center = CENTERED ? mean[row] : 0.0f;
    float plain = 0, along = 0;
    by_row(C, wide, [&](int i, auto width) {
        auto a = load(x + i, width), h = load(g + i, width), w = load(weight + i, width);
        for (int j = 0; j < width.n; j++) {
            h.v[j] *= w.v[j];
            plain += h.v[j];
            along += h.v[j] * ((a.v[j] - center) * scale);
        }
    });
    along = block_sum(along) / C;
    if (CENTERED) plain = block_sum(plain) / C;
    by_row(C, wide, [&](int i, auto width) {
        auto a = load(x + i, width), h = load(g + i, width), w = load(weight + i, width);
        for (int j = 0; j < width.n; j++) {
            float n = (a.v[j] - center) * scale, hj = h.v[j] * w.v[j];
            a.v[j] = (CENTERED ? hj - plain - n * along : hj - n * along) * scale;
        }
        store(dx + i, a);
    });
}

// Over one strip of rows: sum of g n and, CENTERED, of g.  32 columns to a block of 8 warps.
template <typename S, bool CENTERED>
__global__ void norm_columns(float* dweight, float* dbias, const S* g, const S* x,
                             const float* inverse, const float* mean, int rows, int C, int strip) {
    __shared__ float parts[2][8][LANES];
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    int column = blockIdx.x * LANES + lane;
    int stop = min(rows, ((int)blockIdx.y + 1) * strip);
    float gn = 0, plain = 0;
    if (column < C)
        for (int row = blockIdx.y * strip + warp; row < stop; row += 8) {
            long long i = (long long)row * C + column;
            float a = load(x + i, Width<1>()).v[0], b = load(g + i, Width<1>()).v[0];
            gn += b * ((CENTERED ? a - mean[row] : a) * inverse[row]);
            plain += b;
        }
    parts[0][warp][lane] = gn;
    parts[1][warp][lane] = plain;
    __syncthreads();
    if (warp < (CENTERED ? 2 : 1) && column < C) {
        float sum = 0;
        for (int i = 0; i < 8; i++) sum += parts[warp][i][lane];
        (warp == 0 ? dweight : dbias)[(long long)blockIdx.y * C + column] = sum;
    }
}

// out[c] = sum over strips of parts[strip][c], in order.
__global__ void add_strips(float* out, const float* parts, int strips, int C) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= C) return;
    float sum = 0;
    for (int i = 0; i < strips; i++) sum += parts[(long long)i * C + column];
    out[column] = sum;
}
