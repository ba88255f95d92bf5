// Rows of a table by number, and the sum of the cotangents of each row: no atomics, one order.

// A block per token.  A number outside the table gives NaN.
template <typename S>
__global__ void embedding_forward(S* y, const S* table, const long long* ids, int V, int C) {
    long long id = ids[blockIdx.x];
    bool inside = 0 <= id && id < V;
    const S* from = table + (inside ? id : 0) * C;
    S* to = y + (long long)blockIdx.x * C;
    by_row(C, C % 4 == 0 && on16(table) && on16(y), [&](int i, auto width) {
        auto a = load(from + i, width);
        if (!inside)
            for (float& v : a.v) v = __int_as_float(0x7FC00000);
        store(to + i, a);
    });
}

constexpr int ROWS = 32;   // of the table, to a block
constexpr int TILE = 256;  // tokens looked at together, one by each thread

// A block owns ROWS rows.  It looks through all tokens, lists those that fall into its rows in
// their order, and adds them up, a thread to a column.
template <typename S>
__global__ void embedding_backward(float* dtable, const S* g, const long long* ids, int tokens,
                                   int V, int C) {
    __shared__ int listed[TILE], row_of[TILE], counts[TILE / LANES];
    long long first = (long long)blockIdx.x * ROWS, last = min(first + ROWS, (long long)V);
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    for (long long i = first * C + threadIdx.x; i < last * C; i += TILE) dtable[i] = 0;
    for (int start = 0; start < tokens; start += TILE) {
        int token = start + threadIdx.x;
        long long id = token < tokens ? ids[token] : -1;
        bool mine = first <= id && id < last;
        unsigned found = __ballot_sync(ALL, mine);
        if (lane == 0) counts[warp] = __popc(found);
        __syncthreads();  // and the rows are cleared, the last lists done with
        int before = __popc(found & ((1u << lane) - 1)), all = 0;
        for (int i = 0; i < TILE / LANES; i++) {
            if (i < warp) before += counts[i];
            all += counts[i];
        }
        if (mine) {
            listed[before] = token;
            row_of[before] = id - first;
        }
        __syncthreads();  // the lists are whole
        for (int c = threadIdx.x; c < C; c += TILE)
            for (int k = 0; k < all; k++) {
                float a = load(g + (long long)listed[k] * C + c, Width<1>()).v[0];
                dtable[(first + row_of[k]) * C + c] += a;
            }
    }
}
