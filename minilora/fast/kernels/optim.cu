// The gradient's norm and the steps of AdamW.  What steers a step is read from `control` on the
// card, float64: so a captured step needs no word from the host.

enum Control { LR, STEP, CALLS, NORM, FACTOR, BAD_CALL, BAD_INDEX };

__device__ inline bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

__device__ inline long long block_min(long long v) {
    __shared__ long long parts[LANES];
    for (int d = LANES / 2; d > 0; d /= 2) v = min(v, __shfl_xor_sync(ALL, v, d));
    __syncthreads();
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = v;
    __syncthreads();
    v = parts[0];
    for (int i = 1; i < blockDim.x / LANES; i++) v = min(v, parts[i]);
    return v;
}

// Of each block: the sum of squares, and the first entry that is not finite (n if all are).
__global__ void square_sums(double* sums, long long* bad, const float* g, long long n) {
    double sum = 0;
    long long first = n;
    by_grid(n, on16(g), [&](long long i, auto width) {
        auto a = load(g + i, width);
        for (int j = 0; j < width.n; j++) {
            sum += (double)a.v[j] * a.v[j];
            if (!is_finite(a.v[j])) first = min(first, i + j);
        }
    });
    sum = block_sum(sum);
    first = block_min(first);
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = sum;
        bad[blockIdx.x] = first;
    }
}

// One block: add the sums up, and write what the step needs.  `clip` is infinite for none.
__global__ void measure(double* control, const double* sums, const long long* bad, int blocks,
                        long long n, double divide_by, double clip) {
    double sum = 0;
    long long first = n;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
        sum += sums[i];
        first = min(first, bad[i]);
    }
    sum = block_sum(sum);
    first = block_min(first);
    if (threadIdx.x > 0) return;
    double norm = sqrt(sum) / divide_by;
    control[CALLS] += 1;
    control[NORM] = norm;
    if (is_finite(norm)) {
        control[FACTOR] = fmin(1.0, clip / fmax(norm, 1e-300)) / divide_by;
        return;
    }
    control[FACTOR] = norm - norm;  // NaN
    if (control[BAD_CALL] == 0) {
        control[BAD_CALL] = control[CALLS];
        control[BAD_INDEX] = first == n ? 0 : first;
    }
}

// The numbers of one step, worked out in double by one thread of each block.
struct Step { float rate, root, shrink, factor, eps, b1, b2, rest1, rest2; };

__device__ inline Step step_of(const double* control, double b1, double b2, double eps,
                               double decay, double lr_factor, bool decay_last) {
    __shared__ Step step;
    if (threadIdx.x == 0) {
        double lr = control[LR] * lr_factor, t = control[STEP] + 1;
        double root = sqrt(1 - pow(b2, t)), first = 1 - pow(b1, t);
        step.rate = decay_last ? lr * root / first : lr / first;
        step.eps = decay_last ? root * eps : eps;
        step.root = root;
        step.shrink = 1 - lr * decay;
        step.factor = control[FACTOR];
        step.b1 = b1;
        step.b2 = b2;
        step.rest1 = 1 - b1;
        step.rest2 = 1 - b2;
    }
    __syncthreads();
    return step;
}

__global__ void adamw(float* p, const float* g, float* m, float* v, const double* control,
                      long long n, double b1, double b2, double eps, double decay,
                      double lr_factor) {
    if (!is_finite(control[NORM])) return;
    Step s = step_of(control, b1, b2, eps, decay, lr_factor, false);
    bool wide = on16(p) && on16(g) && on16(m) && on16(v);
    by_grid(n, wide, [&](long long i, auto width) {
        auto p_ = load(p + i, width), g_ = load(g + i, width);
        auto m_ = load(m + i, width), v_ = load(v + i, width);
        for (int j = 0; j < width.n; j++) {
            float a = g_.v[j] * s.factor;
            m_.v[j] = s.b1 * m_.v[j] + s.rest1 * a;
            v_.v[j] = s.b2 * v_.v[j] + s.rest2 * (a * a);
            p_.v[j] = p_.v[j] * s.shrink - s.rate * (m_.v[j] / (sqrtf(v_.v[j]) / s.root + s.eps));
        }
        store(p + i, p_);
        store(m + i, m_);
        store(v + i, v_);
    });
}

constexpr int LEVELS = 256;  // and as many entries share a scale

struct Book { float table[LEVELS], thresholds[LEVELS]; unsigned char order[LEVELS]; };

__device__ inline void open_book(Book& book, const float* table, const float* thresholds,
                                 const unsigned char* order) {
    int i = threadIdx.x;
    book.table[i] = table[i];
    book.thresholds[i] = i < LEVELS - 1 ? thresholds[i] : 0.0f;
    book.order[i] = order[i];
}

// What is stored for x: by how many thresholds lie below it.
__device__ inline unsigned char nearest(const Book& book, float x) {
    int low = 0, high = LEVELS - 1;
    while (low < high) {
        int middle = (low + high) / 2;
        if (book.thresholds[middle] < x) low = middle + 1;
        else high = middle;
    }
    return book.order[low];
}

__device__ inline float block_max(float v) {
    __shared__ float parts[LANES];
    v = warp_max(v);
    __syncthreads();
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = v;
    __syncthreads();
    v = parts[0];
    for (int i = 1; i < blockDim.x / LANES; i++) v = fmaxf(v, parts[i]);
    return v;
}

// AdamW with moments of a byte; a thread for each of the 256 entries that share two scales.
__global__ void adamw8bit(float* p, const float* g, unsigned char* m, unsigned char* v,
                          float* scales_m, float* scales_v, const double* control,
                          const float* table_m, const float* thresholds_m,
                          const unsigned char* order_m, const float* table_v,
                          const float* thresholds_v, const unsigned char* order_v, long long n,
                          double b1, double b2, double eps, double decay, double lr_factor) {
    __shared__ Book book_m, book_v;
    if (!is_finite(control[NORM])) return;
    open_book(book_m, table_m, thresholds_m, order_m);
    open_book(book_v, table_v, thresholds_v, order_v);
    Step s = step_of(control, b1, b2, eps, decay, lr_factor, true);  // and a barrier
    long long blocks = (n + LEVELS - 1) / LEVELS;
    for (long long b = blockIdx.x; b < blocks; b += gridDim.x) {
        long long i = b * LEVELS + threadIdx.x;
        float first = 0, second = 0;
        if (i < n) {
            float a = g[i] * s.factor;
            first = s.b1 * (book_m.table[m[i]] * scales_m[b]) + s.rest1 * a;
            second = s.b2 * (book_v.table[v[i]] * scales_v[b]) + s.rest2 * (a * a);
            second = min(second, 3.40282347e38f);  // an infinite scale makes NaN of the others
            p[i] = (p[i] - s.rate * (first / (sqrtf(second) + s.eps))) * s.shrink;
        }
        float peak_m = block_max(fabsf(first)), peak_v = block_max(fabsf(second));
        if (i < n) {
            int code = nearest(book_m, first / (peak_m > 0 ? peak_m : 1));
            if ((__float_as_int(book_m.table[code]) < 0) != (__float_as_int(first) < 0))
                code += first > 0 ? 1 : -1;  // rounded to a level of the other sign
            m[i] = code;
            v[i] = nearest(book_v, second / (peak_v > 0 ? peak_v : 1));
        }
        if (threadIdx.x == 0) {  // all have read the old ones: two barriers lie between
            scales_m[b] = peak_m;
            scales_v[b] = peak_v;
        }
    }
}
