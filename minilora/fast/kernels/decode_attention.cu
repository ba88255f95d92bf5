// Attention of a few new queries over a cache, for decoding: bound by reading the cache once.
//
// A block of 128 threads takes one query and CHUNK keys; LANES_PER_KEY lanes, four channels each,
// share a key.  Softmax in base 2.  How many keys a query sees is read on the device, so that one
// launch, and one captured graph, serves every position: blocks beyond the last key do nothing.
// The second kernel adds up the chunks in order.  E is the type in which entries are stored.

constexpr int THREADS = 128, CHUNK = 128, AT_ONCE = 4;
constexpr float LOG2_E = 1.4426950408889634f;

// The keys that query t of row n sees are 0..end-1.
__device__ inline int seen_keys(const long long* positions, long long query, int S) {
    const long long p = positions[query];
    return p < 0 ? 0 : p < S ? (int)p + 1 : S;
}

template <typename E> __device__ float4 four(const E* at, int d, int D, bool wide) {
    const auto one = [&](int e) { return d + e < D ? load(at + d + e, Width<1>()).v[0] : 0.0f; };
    if (!wide) return make_float4(one(0), one(1), one(2), one(3));
    const Floats<4> x = load(at + d, Width<4>());
    return make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
}

// parts[query][head][chunk]: D sums of 2^(score - top) v, then top, then the sum of 2^(score - top)
template <typename E, int LANES_PER_KEY>
__global__ void __launch_bounds__(THREADS)
    attention_decode(Strided<const E*> q, Strided<const E*> k, Strided<const E*> v,
                     const long long* positions, float* parts, long long qn, long long qt,
                     long long qh, long long kn, long long kt, long long kh, long long vn,
                     long long vt, long long vh, int T, int S, int H, int K, int D, float scale) {
    constexpr int GROUPS = THREADS / LANES_PER_KEY, STEP = GROUPS * AT_ONCE;
    __shared__ __align__(16) float sums[GROUPS][4 * LANES_PER_KEY];
    __shared__ float tops[GROUPS], totals[GROUPS];
    const int lane = threadIdx.x % LANES_PER_KEY, group = threadIdx.x / LANES_PER_KEY;
    const int h = blockIdx.y % H, t = blockIdx.y / H, n = blockIdx.z, key_head = h / (H / K);
    const long long query = (long long)n * T + t;
    const int seen = seen_keys(positions, query, S), first = blockIdx.x * CHUNK;
    if (first >= seen) return;  // the block as a whole
    const int end = first + CHUNK < seen ? first + CHUNK : seen, d = 4 * lane;

    const E* queries = q.at + n * qn + t * qt + h * qh;
    const E* keys = k.at + n * kn + key_head * kh;
    const E* values = v.at + n * vn + key_head * vh;
    const bool wide_keys = on16(keys) && kt % 4 == 0 && D % 4 == 0;
    const bool wide_values = on16(values) && vt % 4 == 0 && D % 4 == 0;
    const float4 zeros = make_float4(0, 0, 0, 0);
    const float4 x = d < D ? four(queries, d, D, on16(queries) && D % 4 == 0) : zeros;

    float4 sum = zeros;
    float top = -infinite(), total = 0;
    for (int key = first + group; key - group < end; key += STEP) {
        float4 a[AT_ONCE], b[AT_ONCE];
        float s[AT_ONCE], high = top;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int mine = key + i * GROUPS;
            const bool here = mine < end && d < D;
            a[i] = here ? four(keys + mine * kt, d, D, wide_keys) : zeros;
            b[i] = here ? four(values + mine * vt, d, D, wide_values) : zeros;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            s[i] = x.x * a[i].x + x.y * a[i].y + x.z * a[i].z + x.w * a[i].w;
#pragma unroll
            for (int other = LANES_PER_KEY / 2; other; other /= 2)
                s[i] += __shfl_xor_sync(ALL, s[i], other);
            s[i] = key + i * GROUPS < end ? s[i] * scale * LOG2_E : -infinite();
            high = fmaxf(high, s[i]);  // drops a NaN, which the exponential brings back
        }
        const float base = high == -infinite() ? 0 : high;  // nothing seen yet: no inf - inf
        const float shrink = exp2f(top - base);
        top = high;
        total *= shrink;
        sum.x *= shrink, sum.y *= shrink, sum.z *= shrink, sum.w *= shrink;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const float p = exp2f(s[i] - base);
            total += p;
            sum.x += p * b[i].x, sum.y += p * b[i].y;
            sum.z += p * b[i].z, sum.w += p * b[i].w;
        }
    }
    *(float4*)&sums[group][d] = sum;
    if (lane == 0) tops[group] = top, totals[group] = total;
    __syncthreads();

    float high = -infinite();
    for (int i = 0; i < GROUPS; i++) high = fmaxf(high, tops[i]);
    const float base = high == -infinite() ? 0 : high;
    float whole = 0, of_all = 0;
    for (int i = 0; i < GROUPS; i++) {
        const float share = exp2f(tops[i] - base);
        of_all += share * totals[i];
        if (threadIdx.x < D) whole += share * sums[i][threadIdx.x];
    }
    float* part = parts + ((query * H + h) * gridDim.x + blockIdx.x) * (D + 2);
    if (threadIdx.x < D) part[threadIdx.x] = whole;
    if (threadIdx.x == 0) part[D] = high, part[D + 1] = of_all;
}

// out[query][head] = the chunks of one query put together; one that sees no key gets 0 / 0.
template <typename E>
__global__ void __launch_bounds__(THREADS)
    attention_combine(const float* parts, const long long* positions, E* out, int chunks,
                      int S, int H, int D) {
    const long long query = blockIdx.y, row = query * H + blockIdx.x;
    const int seen = seen_keys(positions, query, S), used = (seen + CHUNK - 1) / CHUNK;
    parts += row * chunks * (D + 2);
    float high = -infinite(), sum = 0, total = 0;
    for (int i = 0; i < used; i++) high = fmaxf(high, parts[i * (D + 2) + D]);
    const float base = high == -infinite() ? 0 : high;
    for (int i = 0; i < used; i++) {
        const float* part = parts + i * (D + 2);
        const float share = exp2f(part[D] - base);
        total += share * part[D + 1];
        if (threadIdx.x < D) sum += share * part[threadIdx.x];
    }
    if (threadIdx.x < D) store(out + row * D + threadIdx.x, Floats<1>{{sum / total}});
}
