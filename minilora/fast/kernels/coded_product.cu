// A few rows of x against a weight in four-bit codes, which is never made dense: bound by reading
// the codes once.
//
// A warp owns OUTPUTS rows of the weight.  A lane takes PIECE codes of each in one load of 16
// bytes, and the next ones while it works on these.  Their levels come from a table that stands in
// shared memory once for each lane, so that no two lanes meet in a bank; x from a tile that all
// warps of a block share.  PIECE codes share a scale, for a block has 32 or a multiple of it, and
// rows start where a piece does.  Sums go through the columns in one order, however many rows of x
// there are, in float32; what is stored is rounded once.

constexpr int PIECE = 32, OUTPUTS = 4, THREADS = 128, FOURS = PIECE / 4;

struct Piece {
    unsigned word[4];
    float scale;
};

// Sixteen bytes, the first in the lowest bits.
__device__ inline void load_codes(Piece& piece, const unsigned char* from, bool wide) {
    if (wide) {
        const uint4 a = *(const uint4*)from;
        piece.word[0] = a.x, piece.word[1] = a.y, piece.word[2] = a.z, piece.word[3] = a.w;
    } else {
        for (int i = 0; i < 4; i++) {
            piece.word[i] = 0;
            for (int j = 0; j < 4; j++) piece.word[i] |= (unsigned)from[4 * i + j] << 8 * j;
        }
    }
}

// y (rows, d_out) = x (rows, d_in) Ŵᵀ + more (rows, d_out) + bias, of which the last two may be
// null; rows <= ROWS.  E is float or bf16.
//
// The scale of block b is scales[b], or where its codes are given, as eight bits themselves,
// offset + scales[b >> code_shift] * meanings[codes[b]].
template <typename E, int ROWS>
__global__ void __launch_bounds__(THREADS)
    coded_product(E* __restrict__ y, const E* __restrict__ x,
                  const unsigned char* __restrict__ packed, const float* __restrict__ scales,
                  const unsigned char* __restrict__ codes, const float* __restrict__ meanings,
                  float offset, const float* __restrict__ table, const E* __restrict__ more,
                  const E* __restrict__ bias, int rows, int d_in, int d_out, int shift,
                  int code_shift) {
    __shared__ float levels[16 * LANES];
    __shared__ __align__(16) float tile[ROWS][FOURS][LANES + 1][4];  // + 1: a column in all banks
    for (int i = threadIdx.x; i < 16 * LANES; i += THREADS) levels[i] = table[i / LANES];
    const int lane = threadIdx.x % LANES;
    const int first = (blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES) * OUTPUTS;
    const float* mine = levels + lane;
    const bool wide = on16(packed), wide_x = on16(x);

    Piece now[OUTPUTS], next[OUTPUTS];
    auto fetch = [&](Piece* pieces, int column) {
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
            const int row = min(first + o, d_out - 1);
            const long long entry = row * (long long)d_in + column, b = entry >> shift;
            load_codes(pieces[o], packed + entry / 2, wide);
            float scale = scales[codes ? b >> code_shift : b];
            if (codes) scale = scale * meanings[codes[b]] + offset;
            pieces[o].scale = scale;
        }
    };
    float sums[OUTPUTS][ROWS] = {};
    if (PIECE * lane < d_in) fetch(now, PIECE * lane);
    for (int start = 0; start < d_in; start += PIECE * LANES) {
        const int column = start + PIECE * lane, after = column + PIECE * LANES;
        const int width = min(PIECE * LANES, d_in - start);
        __syncthreads();  // those who read the last tile are done; the levels stand
        for (int i = threadIdx.x; i < ROWS * FOURS * LANES; i += THREADS) {
            const int r = i / (FOURS * LANES), four = i % (FOURS * LANES);
            Floats<4> a = {};
            if (r < rows && 4 * four < width) {
                const E* from = x + (long long)r * d_in + start + 4 * four;
                if (wide_x) a = load(from, Width<4>());
                else
                    for (int j = 0; j < 4; j++) a.v[j] = load(from + j, Width<1>()).v[0];
            }
            store(tile[r][four % FOURS][four / FOURS], a);
        }
        __syncthreads();
        if (after < d_in) fetch(next, after);
        if (column < d_in) {
            float part[OUTPUTS][ROWS] = {};
#pragma unroll
            for (int f = 0; f < FOURS; f++) {
                float w[OUTPUTS][4];
#pragma unroll
                for (int o = 0; o < OUTPUTS; o++) {
                    const unsigned pairs = now[o].word[f / 2] >> 16 * (f % 2);
                    w[o][0] = mine[(pairs >> 4 & 15) * LANES];  // the high half comes first
                    w[o][1] = mine[(pairs & 15) * LANES];
                    w[o][2] = mine[(pairs >> 12 & 15) * LANES];
                    w[o][3] = mine[(pairs >> 8 & 15) * LANES];
                }
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const Floats<4> a = load(tile[r][f][lane], Width<4>());
#pragma unroll
                    for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
                        for (int j = 0; j < 4; j++) part[o][r] += w[o][j] * a.v[j];
                }
            }
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
                for (int r = 0; r < ROWS; r++) sums[o][r] += now[o].scale * part[o][r];
        }
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) now[o] = next[o];
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float sum = warp_sum(sums[o][r]);
            if (lane == 0 && r < rows && first + o < d_out) {
                const long long at = (long long)r * d_out + first + o;
                sum += more ? load(more + at, Width<1>()).v[0] : 0;
                sum += bias ? load(bias + first + o, Width<1>()).v[0] : 0;
                store(y + at, Floats<1>{{sum}});
            }
        }
}
