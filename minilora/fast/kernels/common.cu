// What every kernel file may use; the loader puts this text before it.  No #include anywhere.
//
// CuPy compiles with -ftz=true: a float below 2^-126, read or written by an operation, is zero.
// Math is float32; `S` is the type that an array is stored in, float or bf16.  Rows and flat
// arrays are walked four entries at a time where every pointer stands on 16 bytes, else singly.

#ifndef CUDA_CPU
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

constexpr int LANES = 32;
constexpr unsigned ALL = 0xFFFFFFFFu;

// A parameter for an array that is read and need not be contiguous; a launch passes a pointer.
template <typename P> struct Strided { P at; };

// bfloat16: the upper half of a float.
struct bf16 { unsigned short bits; };

__device__ inline float widen(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

// To the nearest, ties to even; a NaN stays one.
__device__ inline bf16 narrow(float x) {
    unsigned whole = __float_as_uint(x);
    if ((whole & 0x7FFFFFFF) > 0x7F800000) return {(unsigned short)(whole >> 16 | 0x40)};
    return {(unsigned short)((whole + 0x7FFF + (whole >> 16 & 1)) >> 16)};
}

template <int N> struct Width { static constexpr int n = N; };
template <int N> struct Floats { float v[N]; };

__device__ inline bool on16(const void* p) { return ((unsigned long long)p & 15) == 0; }

__device__ inline Floats<1> load(const float* p, Width<1>) { return {{*p}}; }
__device__ inline Floats<4> load(const float* p, Width<4>) {
    float4 a = *(const float4*)p;
    return {{a.x, a.y, a.z, a.w}};
}
__device__ inline void store(float* p, Floats<1> a) { *p = a.v[0]; }
__device__ inline void store(float* p, Floats<4> a) {
    *(float4*)p = make_float4(a.v[0], a.v[1], a.v[2], a.v[3]);
}

__device__ inline Floats<1> load(const bf16* p, Width<1>) { return {{widen(*p)}}; }
__device__ inline Floats<4> load(const bf16* p, Width<4>) {
    uint2 a = *(const uint2*)p;  // the first of two stands in the lower half
    return {{__uint_as_float(a.x << 16), __uint_as_float(a.x & 0xFFFF0000),
             __uint_as_float(a.y << 16), __uint_as_float(a.y & 0xFFFF0000)}};
}
__device__ inline void store(bf16* p, Floats<1> a) { *p = narrow(a.v[0]); }
__device__ inline void store(bf16* p, Floats<4> a) {
    *(uint2*)p = make_uint2(narrow(a.v[0]).bits | narrow(a.v[1]).bits << 16,
                            narrow(a.v[2]).bits | narrow(a.v[3]).bits << 16);
}

__device__ inline float infinite() { return __int_as_float(0x7F800000); }

// f(first entry, Width) over the C entries of a row, by all threads of a block.
template <typename F> __device__ inline void by_row(int C, bool wide, F f) {
    if (wide)
        for (int i = 4 * threadIdx.x; i < C; i += 4 * blockDim.x) f(i, Width<4>());
    else
        for (int i = threadIdx.x; i < C; i += blockDim.x) f(i, Width<1>());
}

// f(first entry, Width) over n entries, by all threads of the grid; a short tail goes singly.
template <typename F> __device__ inline void by_grid(long long n, bool wide, F f) {
    long long me = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    long long all = gridDim.x * (long long)blockDim.x;
    long long whole = wide ? n - n % 4 : 0;
    for (long long i = 4 * me; i < whole; i += 4 * all) f(i, Width<4>());
    for (long long i = whole + me; i < n; i += all) f(i, Width<1>());
}

template <typename T> __device__ inline T warp_sum(T v) {
    for (int d = LANES / 2; d > 0; d /= 2) v += __shfl_xor_sync(ALL, v, d);
    return v;
}

__device__ inline float warp_max(float v) {
    for (int d = LANES / 2; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(ALL, v, d));
    return v;
}

// The sum over a block of whole warps, the same bits in every thread.
template <typename T> __device__ inline T block_sum(T v) {
    __shared__ T parts[LANES];
    v = warp_sum(v);
    __syncthreads();  // those who read the last sum are done
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = v;
    __syncthreads();
    v = parts[0];
    for (int i = 1; i < blockDim.x / LANES; i++) v += parts[i];
    return v;
}
