// Conversions and sums; the activations of the MLP and the rotation of heads, whose ways back form
// everything again from what went in.

template <typename To, typename From> __global__ void converted(To* y, const From* x, long long n) {
    by_grid(n, on16(x) && on16(y),
            [&](long long i, auto width) { store(y + i, load(x + i, width)); });
}

template <typename S> __global__ void added(S* y, const S* a, const S* b, long long n) {
    by_grid(n, on16(y) && on16(a) && on16(b), [&](long long i, auto width) {
        auto c = load(a + i, width), d = load(b + i, width);
        for (int j = 0; j < width.n; j++) c.v[j] += d.v[j];
        store(y + i, c);
    });
}

// y[row] += b, for rows of C
template <typename S>
__global__ void add_to_rows(S* y, const S* b, int C) {
    y += (long long)blockIdx.x * C;
    by_row(C, C % 4 == 0 && on16(y) && on16(b), [&](int i, auto width) {
        auto c = load(y + i, width), d = load(b + i, width);
        for (int j = 0; j < width.n; j++) c.v[j] += d.v[j];
        store(y + i, c);
    });
}

__device__ inline float gelu_tanh(float x) {
    return tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x));
}

template <typename S> __global__ void gelu_forward(S* y, const S* x, long long n) {
    by_grid(n, on16(x) && on16(y), [&](long long i, auto width) {
        auto a = load(x + i, width);
        for (float& v : a.v) v = 0.5f * v * (1 + gelu_tanh(v));
        store(y + i, a);
    });
}

template <typename S>
__global__ void gelu_backward(S* dx, const S* g, const S* x, long long n) {
    by_grid(n, on16(x) && on16(g) && on16(dx), [&](long long i, auto width) {
        auto a = load(x + i, width), b = load(g + i, width);
        for (int j = 0; j < width.n; j++) {
            float v = a.v[j], t = gelu_tanh(v);
            float inner = 0.7978845608028654f * (1 + 3 * 0.044715f * v * v);
            b.v[j] *= 0.5f * (1 + t) + 0.5f * v * (1 - t * t) * inner;
        }
        store(dx + i, b);
    });
}

__device__ inline float logistic(float x) { return 1 / (1 + expf(-x)); }

template <typename S>
__global__ void swiglu_forward(S* y, const S* gate, const S* up, long long n) {
    by_grid(n, on16(y) && on16(gate) && on16(up), [&](long long i, auto width) {
        auto a = load(gate + i, width), b = load(up + i, width);
        for (int j = 0; j < width.n; j++) b.v[j] *= a.v[j] * logistic(a.v[j]);
        store(y + i, b);
    });
}

// Either gradient may be null.
template <typename S>
__global__ void swiglu_backward(S* dgate, S* dup, const S* g, const S* gate, const S* up,
                                long long n) {
    bool wide = on16(dgate) && on16(dup) && on16(g) && on16(gate) && on16(up);
    by_grid(n, wide, [&](long long i, auto width) {
        auto a = load(gate + i, width), b = load(up + i, width), d = load(g + i, width);
        auto e = d;
        for (int j = 0; j < width.n; j++) {
            float s = logistic(a.v[j]);
            e.v[j] = d.v[j] * (a.v[j] * s);
            d.v[j] *= b.v[j] * (s * (1 + a.v[j] * (1 - s)));
        }
        if (dgate) store(dgate + i, d);
        if (dup) store(dup + i, e);
    });
}

// A thread turns one pair of one token in all its heads, so the angle is worked out once, in
// double.  x may lie in a wider array: xn, xt, xh are its steps in entries.  `turn` is 1 or -1.
template <typename S>
__global__ void rope(S* y, Strided<const S*> x, const long long* positions, int N, int T, int H,
                     int D, long long xn, long long xt, long long xh, double theta, double turn,
                     double factor, double low, double high, double context) {
    int half = D / 2;
    long long me = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (me >= (long long)N * T * half) return;
    int i = me % half, t = me / half % T, n = me / half / T;
    double rate = pow(theta, i * (-2.0 / D));
    if (context > 0) {
        double keep = (rate * (context / 6.283185307179586) - low) / (high - low);
        keep = fmin(fmax(keep, 0.0), 1.0);
        rate *= keep + (1 - keep) / factor;
    }
    double angle = (positions ? positions[(long long)n * T + t] : t) * rate;
    float c = cos(angle), s = sin(angle) * turn;
    const S* from = x.at + n * xn + t * xt + i;
    S* to = y + ((long long)n * T + t) * H * D + i;
    for (int h = 0; h < H; h++) {
        float a = load(from + h * xh, Width<1>()).v[0];
        float b = load(from + h * xh + half, Width<1>()).v[0];
        store(to + h * D, Floats<1>{{a * c - b * s}});
        store(to + h * D + half, Floats<1>{{b * c + a * s}});
    }
}
