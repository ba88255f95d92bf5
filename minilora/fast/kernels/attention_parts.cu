// What attention in float32 and in bfloat16 share; E is float or bf16.

constexpr int THREADS = 128, TILE = 64;  // of a block; rows of a tile
constexpr float LOG2_E = 1.4426950408889634f;

// rows, time and heads of an array (N, T, H, D) whose last axis is contiguous, in entries
struct Strides { long long n, t, h; };

// delta[n][h][t] = sum over d of g o.   One warp a row; o (N, T, H, D) is contiguous.
template <typename E>
__global__ void __launch_bounds__(THREADS)
    attention_delta(Strided<const E*> g, const E* o, float* delta, long long gn,
                    long long gt, long long gh, int T, int H, int D, long long rows) {
    const long long row = (long long)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= rows) return;  // a warp as a whole
    const int h = row % H, lane = threadIdx.x % 32;
    const long long t = row / H % T, n = row / H / T;
    const E* at = g.at + n * gn + t * gt + h * gh;
    o += row * D;
    float sum = 0;
    for (int d = lane; d < D; d += 32)
        sum += load(at + d, Width<1>()).v[0] * load(o + d, Width<1>()).v[0];
    sum = warp_sum(sum);
    if (lane == 0) delta[(n * H + h) * T + t] = sum;
}
