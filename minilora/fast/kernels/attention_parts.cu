// What attention in float32 and in bfloat16 share; E is float or bf16.

constexpr int THREADS = 128, TILE = 64;  // of a block; rows of a tile
constexpr float LOG2_E = 1.4426950408889634f;

// rows, time and heads of an array (N, T, H, D) whose last axis is contiguous, in entries
struct Strides { long long n, t, h; };
