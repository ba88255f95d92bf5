// Cross-entropy of rows of logits: read twice, written once, in place where that is asked.

// A running maximum and the sum of e^(z - maximum).
struct Tail { float top, sum; };

__device__ inline Tail join(Tail a, Tail b) {
    if (b.top > a.top) {
        Tail c = a;
        a = b;
        b = c;
    }
    // b.top <= a.top; both may be -inf, and a NaN stays one
    if (b.sum != 0) a.sum += b.top == a.top ? b.sum : b.sum * expf(b.top - a.top);
    return a;
}

// A block per row: losses = log sum e^z - z_target, and dz = softmax(z) - 1[target], which may
// be z or null.  Where the target is `ignored` both are 0; a target outside 0..V-1 gives NaN.
template <typename S>
__global__ void token_losses(float* losses, S* dz, const S* z, const long long* targets, int V,
                             long long ignored) {
    __shared__ Tail parts[LANES];
    long long row = blockIdx.x, target = targets[row];
    z += row * V;
    if (dz) dz += row * V;
    bool wide = V % 4 == 0 && on16(z) && on16(dz);
    if (target == ignored) {
        if (dz)
            by_row(V, wide, [&](int i, auto width) {
                auto a = load(z + i, width);
                for (float& v : a.v) v = 0;
                store(dz + i, a);
            });
        if (threadIdx.x == 0) losses[row] = 0;
        return;  // all threads of the block
    }
    float infinity = __int_as_float(0x7F800000);
    Tail mine = {-infinity, 0};
    by_row(V, wide, [&](int i, auto width) {
        auto a = load(z + i, width);
        for (float v : a.v) {
            if (v > mine.top) {
                mine.sum = mine.sum == 0 ? 0.0f : mine.sum * expf(mine.top - v);
                mine.top = v;
            }
            if (!(v == -infinity)) mine.sum += expf(v - mine.top);
        }
    });
    for (int d = LANES / 2; d > 0; d /= 2)
        mine = join(mine, {__shfl_xor_sync(ALL, mine.top, d), __shfl_xor_sync(ALL, mine.sum, d)});
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = mine;
    bool inside = 0 <= target && target < V;
    float of_target = inside ? load(z + target, Width<1>()).v[0] : infinity - infinity;
    __syncthreads();  // and z_target has been read before it may be written
    Tail all = parts[0];
    for (int i = 1; i < blockDim.x / LANES; i++) all = join(all, parts[i]);
    float lse = all.sum == 0 ? -infinity : all.top + logf(all.sum);
    if (threadIdx.x == 0) losses[row] = lse - of_target;
    if (!dz) return;
    float top = all.top == -infinity ? 0.0f : all.top, inverse = all.sum == 0 ? 0 : 1 / all.sum;
    if (!inside) inverse = of_target;
    by_row(V, wide, [&](int i, auto width) {
        auto a = load(z + i, width);
        for (int j = 0; j < width.n; j++)
            a.v[j] = expf(a.v[j] - top) * inverse - (i + j == target ? 1.0f : 0.0f);
        store(dz + i, a);
    });
}

// One block: total = sum of n losses, in double and in a fixed order.
__global__ void add_losses(float* total, const float* losses, int n) {
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += losses[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *total = sum;
}

// y = factor x, with the factor on the device.
template <typename S>
__global__ void scaled(S* y, const S* x, const float* factor, long long n) {
    float by = *factor;
    by_grid(n, on16(y) && on16(x), [&](long long i, auto width) {
        auto a = load(x + i, width);
        for (float& v : a.v) v *= by;
        store(y + i, a);
    });
}
