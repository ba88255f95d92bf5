// CUDA C++ on a CPU: the same kernel text, one fiber per thread, an adversarial scheduler.
//
// Blocks run one after another in an order that the seed draws.  In a block a warp is picked at
// random and run as far ahead as the barriers allow; its lanes take turns in random order.  A
// barrier that not all live threads reach is an error, shuffles from an absent lane give NaN, and
// shared memory is filled with 0xFF before each block.  Floats below 2^-126 are zero, and so,
// unlike on a card, are doubles below 2^-1022.  There is no model of memory ordering, and
// blocks do not race.
#pragma once
#include <link.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // with red zones around it
#else
#define __shared__ static thread_local  // so that all of it can be found, and filled
#endif

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) {
    return {x, y, z, w};
}

namespace shim {

enum State { READY, AT_WARP, AT_BLOCK, DONE };
enum Meeting { SYNC, SHUFFLE };

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
// What swapcontext does, without its two system calls: the registers that a call preserves.
extern "C" __attribute__((visibility("hidden"))) void shim_swap(void** from, void** to);
asm(".text\n.globl shim_swap\n.hidden shim_swap\n.type shim_swap, @function\nshim_swap:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov (%rsi), %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
typedef void* Context;
inline void swap(Context* from, Context* to) { shim_swap(from, to); }
inline void prepare(Context* fiber, char* stack, size_t size, void (*run)()) {
    void** top = (void**)(stack + size) - 1;  // so that `run` starts 8 beyond a multiple of 16
    *--top = (void*)run;
    *fiber = top - 6;
}
#else
typedef ucontext_t Context;
inline void swap(Context* from, Context* to) { swapcontext(from, to); }
inline void prepare(Context* fiber, char* stack, size_t size, void (*run)()) {
    getcontext(fiber);
    fiber->uc_stack.ss_sp = stack;
    fiber->uc_stack.ss_size = size;
    makecontext(fiber, run, 0);
}
#endif

struct Fiber {
    Context context;
    State state;
    Meeting meeting;
    unsigned mask;
    int turn;                 // which of the two slots the next shuffle uses
    unsigned char slot[2][16];
    bool filled[2];
    dim3 index;
};

const int MOST = 1024, LANES = 32;
const size_t STACK = 1 << 16;
static Fiber* fibers;
static char* stacks;
static Fiber* now;
static int threads;
static Context scheduler;
static dim3 block_index, block_size, grid_size;
static uint64_t random_state;
static void (*body)(void**);
static void** body_arguments;
static unsigned char* dynamic;
static size_t dynamic_size;
static thread_local char first_of_shared;

inline unsigned draw(unsigned below) {  // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (unsigned)((random_state * 2685821657736338717ull) >> 33) % below;
}

inline void shuffle(int* items, int n) {
    for (int i = n - 1; i > 0; i--) {
        int j = draw(i + 1), kept = items[i];
        items[i] = items[j];
        items[j] = kept;
    }
}

static void stop(State state) {
    now->state = state;
    swap(&now->context, &scheduler);
}

static void start() {
    body(body_arguments);
    stop(DONE);
}

static void meet(unsigned mask, Meeting meeting) {
    now->mask = mask;
    now->meeting = meeting;
    stop(AT_WARP);
}

template <typename T> T exchange(unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 16, "a shuffle moves 16 bytes at most");
    Fiber* me = now;
    int turn = me->turn, self = me - fibers;
    me->turn = 1 - turn;
    memcpy(me->slot[turn], &value, sizeof(T));
    me->filled[turn] = true;
    meet(mask, SHUFFLE);
    Fiber* from = &fibers[self / LANES * LANES + source];
    if (source < 0 || source >= LANES) return value;
    bool there = from - fibers < threads && (mask >> source & 1) && from->filled[turn];
    if (there) memcpy(&value, from->slot[turn], sizeof(T));
    else memset(&value, 0xFF, sizeof(T));
    return value;
}

// Free those lanes of a warp that have met; false if none.
static bool release(int first, int last) {
    bool freed = false;
    for (int i = first; i < last; i++) {
        if (fibers[i].state != AT_WARP) continue;
        unsigned mask = fibers[i].mask;
        bool all = mask >> (i - first) & 1;
        for (int j = first; j < last && all; j++)
            if ((mask >> (j - first) & 1) && fibers[j].state != DONE)
                all = fibers[j].state == AT_WARP && fibers[j].mask == mask &&
                      fibers[j].meeting == fibers[i].meeting;
        if (!all) continue;
        for (int j = first; j < last; j++)
            if ((mask >> (j - first) & 1)) {
                if (fibers[j].state == AT_WARP) fibers[j].state = READY;
                else fibers[j].filled[0] = fibers[j].filled[1] = false;
            }
        freed = true;
    }
    return freed;
}

// Run one warp until none of its lanes may go on.
static void run_warp(int first, int last) {
    int order[LANES];
    do {
        int n = 0;
        for (int i = first; i < last; i++)
            if (fibers[i].state == READY) order[n++] = i;
        shuffle(order, n);
        for (int i = 0; i < n; i++) {
            now = &fibers[order[i]];
            swap(&scheduler, &now->context);
        }
    } while (release(first, last));
}

static const char* run_block() {
    for (int i = 0; i < threads; i++) {
        Fiber* f = &fibers[i];
        f->state = READY;
        f->turn = 0;
        f->filled[0] = f->filled[1] = false;
        f->index = {i % block_size.x, i / block_size.x % block_size.y,
                    i / block_size.x / block_size.y};
        prepare(&f->context, stacks + i * STACK, STACK, start);
    }
    int warps = (threads + LANES - 1) / LANES, able[MOST / LANES];
    for (;;) {
        int n = 0, waiting = 0, live = 0;
        for (int w = 0; w < warps; w++) {
            bool ready = false;
            for (int i = w * LANES; i < threads && i < (w + 1) * LANES; i++) {
                ready |= fibers[i].state == READY;
                live += fibers[i].state != DONE;
                waiting += fibers[i].state == AT_BLOCK;
            }
            if (ready) able[n++] = w;
        }
        if (!live) return nullptr;
        if (n) {
            int w = able[draw(n)];
            run_warp(w * LANES, threads < (w + 1) * LANES ? threads : (w + 1) * LANES);
        } else if (waiting < live) {
            return "a barrier that not all threads reach";
        } else if (live < threads) {
            return "__syncthreads after some threads have returned";
        } else {
            for (int i = 0; i < threads; i++) fibers[i].state = READY;
        }
    }
}

#ifndef __SANITIZE_ADDRESS__
static int fill_shared(struct dl_phdr_info* info, size_t, void*) {
    uintptr_t here = (uintptr_t)&fill_shared;
    uintptr_t anchor = (uintptr_t)&first_of_shared;
    bool mine = false;
    size_t size = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        auto& part = info->dlpi_phdr[i];
        uintptr_t from = info->dlpi_addr + part.p_vaddr;
        if (part.p_type == PT_LOAD) mine |= from <= here && here < from + part.p_memsz;
        if (part.p_type == PT_TLS) size = part.p_memsz;
    }
    uintptr_t from = (uintptr_t)info->dlpi_tls_data;
    if (!mine || from > anchor || anchor >= from + size) return 0;
    memset((void*)from, 0xFF, size);
    return 1;
}
#endif

// CuPy compiles every kernel with -ftz=true: a number below 2^-126 is zero, read or written.
struct FlushToZero {
#ifdef __x86_64__
    unsigned before = _mm_getcsr();
    FlushToZero() { _mm_setcsr(before | 0x8040); }  // results, and what is read
    ~FlushToZero() { _mm_setcsr(before); }
#endif
};

// Returns what went wrong, or null.
static const char* launch(void (*kernel)(void**), void** arguments, const unsigned* shape,
                          size_t shared, uint64_t seed) {
    grid_size = {shape[0], shape[1], shape[2]};
    block_size = {shape[3], shape[4], shape[5]};
    threads = block_size.x * block_size.y * block_size.z;
    if (!fibers) {
        fibers = (Fiber*)calloc(MOST, sizeof(Fiber));
        stacks = (char*)aligned_alloc(64, MOST * STACK);
    }
    body = kernel;
    body_arguments = arguments;
    random_state = seed * 0x9E3779B97F4A7C15ull + 0x2545F4914F6CDD1Dull;
    dynamic = (unsigned char*)aligned_alloc(128, (shared + 127) / 128 * 128 + 128);
    dynamic_size = shared;
    int blocks = grid_size.x * grid_size.y * grid_size.z;
    int* order = (int*)malloc(blocks * sizeof(int));
    for (int i = 0; i < blocks; i++) order[i] = i;
    shuffle(order, blocks);
    const char* wrong = nullptr;
    FlushToZero flush;
    for (int i = 0; i < blocks && !wrong; i++) {
        int b = order[i];
        block_index = {b % grid_size.x, b / grid_size.x % grid_size.y,
                       b / grid_size.x / grid_size.y};
        memset(dynamic, 0xFF, shared + 64);
#ifndef __SANITIZE_ADDRESS__
        first_of_shared = 0;
        dl_iterate_phdr(fill_shared, nullptr);
#endif
        wrong = run_block();
        for (int j = 0; j < 64 && !wrong; j++)
            if (dynamic[shared + j] != 0xFF) wrong = "a write behind the dynamic shared memory";
    }
    free(order);
    free(dynamic);
    return wrong;
}

// Unpack an array of pointers to arguments by the types of the kernel, as cuLaunchKernel does.
template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A>*)arguments[I]...);
}
template <typename... A> void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>());
}

template <typename T> constexpr char letter() {
    return std::is_floating_point_v<T> ? 'f' : std::is_same_v<T, bool> ? 'b'
           : !std::is_integral_v<T> ? 'V' : std::is_signed_v<T> ? 'i' : 'u';
}
// A struct whose member `at` is a pointer stands for an array that need not be contiguous.
template <typename T, typename = void> struct Pointer {
    using type = T;
    static constexpr char mark = std::is_pointer_v<T> ? 'P' : ' ';
};
template <typename T> struct Pointer<T, std::void_t<decltype(T::at)>> {
    using type = decltype(T::at);
    static constexpr char mark = 'S';
};
// Three characters a parameter: P, S or space, the kind of NumPy dtype, the digit of its size.
template <typename... A> const char* signature(void (*)(A...)) {
    static char text[3 * sizeof...(A) + 1];
    char* p = text;
    auto one = [&](auto* parameter) {
        using P = Pointer<std::remove_pointer_t<decltype(parameter)>>;
        using T = typename P::type;
        using V = std::remove_cv_t<std::remove_pointer_t<T>>;
        *p++ = P::mark;
        *p++ = letter<V>();
        *p++ = '0' + (int)sizeof(V);
    };
    (one((A*)nullptr), ...);
    *p = 0;
    return text;
}

}  // namespace shim

#define threadIdx (shim::now->index)
#define blockIdx shim::block_index
#define blockDim shim::block_size
#define gridDim shim::grid_size
#define DYNAMIC_SHARED(name) unsigned char* name = shim::dynamic

inline void __syncthreads() { shim::stop(shim::AT_BLOCK); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { shim::meet(mask, shim::SYNC); }
inline int shim_lane() { return (shim::now - shim::fibers) % shim::LANES; }
template <typename T> T __shfl_sync(unsigned mask, T v, int source) {
    return shim::exchange(mask, v, source & 31);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T v, int bits) {
    return shim::exchange(mask, v, shim_lane() ^ bits);
}
template <typename T> T __shfl_down_sync(unsigned mask, T v, int by) {
    return shim::exchange(mask, v, shim_lane() + by);
}
template <typename T> T __shfl_up_sync(unsigned mask, T v, int by) {
    return shim::exchange(mask, v, shim_lane() - by);
}
inline unsigned __ballot_sync(unsigned mask, int yes) {
    unsigned found = 0;
    unsigned mine = (yes != 0 ? 1u : 0u) << shim_lane();
    for (int d = 0; d < 32; d++) {
        int source = shim_lane() ^ d;
        unsigned other = d == 0 ? mine : shim::exchange(mask, mine, source);
        if (mask >> source & 1 && other != 0xFFFFFFFFu) found |= other;
    }
    return found;
}
inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
inline int __all_sync(unsigned mask, int yes) { return __ballot_sync(mask, !yes) == 0; }

template <typename T> T __ldg(const T* p) { return *p; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { return (unsigned)__float_as_int(x); }
inline float __uint_as_float(unsigned x) { return __int_as_float((int)x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ----------------------------------------------------------------- tensor cores (PTX ISA)

// What all lanes of a warp hand in, seen by each: read it before the next exchange.
template <typename T> struct shim_posted {
    int turn;
    explicit shim_posted(T mine) {
        turn = shim::now->turn;
        shim::exchange(0xFFFFFFFFu, mine, shim_lane());
    }
    T of(int lane) const {
        shim::Fiber* from = shim::now - shim_lane() + lane;
        T value;
        if (from->filled[turn]) memcpy(&value, from->slot[turn], sizeof(T));
        else memset(&value, 0xFF, sizeof(T));
        return value;
    }
};
struct shim_words { unsigned at[4]; };
inline float shim_half(unsigned word, int half) {
    return __uint_as_float(half ? word & 0xFFFF0000u : word << 16);
}

// mma.sync m16n8k16, bfloat16 by bfloat16 to float: d += a b.  Entry (r, k) of a stands in lane
// 4 (r % 8) + k % 8 / 2, register (r >= 8) + 2 (k >= 8), half k % 2; entry (k, c) of b in lane
// 4 c + k % 8 / 2, register k >= 8, half k % 2; entry (r, c) of d in lane 4 (r % 8) + c / 2,
// place 2 (r >= 8) + c % 2.
inline void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    int g = shim_lane() / 4, t = shim_lane() % 4;
    float left[2][16], right[2][16];
    shim_posted<shim_words> as({a[0], a[1], a[2], a[3]});
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < 16; k++)
            left[r][k] = shim_half(as.of(4 * g + k % 8 / 2).at[r + 2 * (k / 8)], k % 2);
    shim_posted<uint2> bs({b0, b1});
    for (int c = 0; c < 2; c++)
        for (int k = 0; k < 16; k++) {
            uint2 words = bs.of(4 * (2 * t + c) + k % 8 / 2);
            right[c][k] = shim_half(k < 8 ? words.x : words.y, k % 2);
        }
    for (int place = 0; place < 4; place++) {
        double sum = d[place];
        for (int k = 0; k < 16; k++) sum += (double)left[place / 2][k] * right[place % 2][k];
        d[place] = (float)sum;
    }
}

// ldmatrix x4: lane l points at row l % 8 of matrix l / 8, sixteen bytes that stand on sixteen.
template <bool TRANSPOSED> inline void fetch(unsigned (&to)[4], const void* row) {
    int g = shim_lane() / 4, t = shim_lane() % 4;
    shim_posted<const void*> rows(row);
    for (int matrix = 0; matrix < 4; matrix++) {
        unsigned short half[2];
        for (int i = 0; i < 2; i++) {
            int r = TRANSPOSED ? 2 * t + i : g, c = TRANSPOSED ? g : 2 * t + i;
            const char* from = (const char*)rows.of(8 * matrix + r);
            if ((uintptr_t)from % 16) half[i] = 0xFFFF;  // a card would stop
            else memcpy(&half[i], from + 2 * c, 2);
        }
        to[matrix] = half[0] | (unsigned)half[1] << 16;
    }
}
