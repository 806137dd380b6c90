// What a CUDA kernel sees when it runs on a CPU: threads are fibers of one thread of the system, taken in random order.
// The threads of a warp meet where hardware has them act together; a block's, at barriers. What hardware demands and a
// CPU does not is demanded here: aligned vectors, whole warps and blocks at a meeting, shared memory within its limits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads)

namespace device {

struct Index {
    int x, y, z;
};

// Of the fiber that runs.
extern Index thread_index, block_index;
extern unsigned char* shared_memory;

[[noreturn]] void fail(int line, const char* what);

// Meetings. ``line`` tells the places of a source apart: all who meet must have come to the same.
void block_barrier(int line);
void warp_barrier(int line);
uint32_t exchange(int line, uint32_t mask, uint32_t value, int partner);

uint32_t shared_offset(int line, const void* address);
void load_matrices(int line, int count, bool transposed, uint32_t* words, uint32_t offset);
enum class Kind { f16, bf16 };
void multiply_16x8(int line, Kind kind, int depth, float* d, const uint32_t* a, const uint32_t* b, const float* c);
void multiply_8x8(int line, bool a_columns, bool b_columns, float* d, const uint32_t* a, const uint32_t* b, const float* c);
void copy_later(int line, uint32_t offset, const void* source, int bytes, int given);
void commit_copies(int line);
void wait_copies(int line, int left);

float half_to_float(unsigned short bits);
unsigned short float_to_half(float value);
unsigned short float_to_bfloat(float value);

template <typename T>
inline T shuffle(int line, uint32_t mask, T value, int partner) {
    static_assert(sizeof(T) == 4);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = exchange(line, mask, bits, partner);
    std::memcpy(&value, &bits, 4);
    return value;
}

template <typename T>
inline T& vector_at(int line, const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) fail(line, "a vector is not aligned to its size");
    return *static_cast<T*>(const_cast<void*>(address));
}

struct Entry {
    const char* name;
    void (*call)(void** arguments);
    int threads;
};

}  // namespace device

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

inline float __uint_as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
template <typename T> inline T min(T a, T b) { return b < a ? b : a; }
template <typename T> inline T max(T a, T b) { return a < b ? b : a; }

#define threadIdx device::thread_index
#define blockIdx device::block_index
#define __syncthreads() device::block_barrier(mctune_line)
#define __syncwarp(...) device::warp_barrier(mctune_line)
#define mctune_lane (static_cast<int>(threadIdx.x) % 32)
#define __shfl_sync(mask, value, lane, width) device::shuffle(__LINE__, mask, value, lane)
#define __shfl_xor_sync(mask, value, lanes, width) device::shuffle(__LINE__, mask, value, mctune_lane ^ (lanes))
#define __shfl_up_sync(mask, value, by, width) device::shuffle(__LINE__, mask, value, max(mctune_lane - (by), 0))
#define __shfl_down_sync(mask, value, by, width) device::shuffle(__LINE__, mask, value, min(mctune_lane + (by), 31))
