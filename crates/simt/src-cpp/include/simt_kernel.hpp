// The words of CUDA C++ that kernels use, as C++20. Included before every kernel source, outside any namespace.
#pragma once

#include <algorithm>
#include <bit>
#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <type_traits>
#include <utility>

#include "simt_runtime.hpp"

#define memcpy(destination, source, bytes) ::simt::copy_bytes(destination, source, bytes)
#define memmove(destination, source, bytes) ::simt::copy_bytes(destination, source, bytes)
#define memset(destination, value, bytes) ::simt::set_bytes(destination, value, bytes)

#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) alignas(bytes)
#define SIMT_INLINE inline __attribute__((always_inline))
#define SIMT_SITE ::simt::Site site = ::simt::Site::current()

#define TENP_KERNEL(name, Params, max_threads, min_blocks)                                          \
    static void name##_body(const Params &p);                                                       \
    extern "C" void name(const void *raw) { name##_body(*static_cast<const Params *>(raw)); }       \
    static const ::simt::Registration name##_registration(#name, sizeof(Params), max_threads, name); \
    static void name##_body(const Params &p)

// Behind the parameters, at a multiple of 128 bytes, come the tensor maps.
#define TENP_KERNEL_MAPS(name, Params, max_threads, min_blocks)                                     \
    static void name##_body(const Params &p, const TenpTensorMaps &maps);                           \
    extern "C" void name(const void *raw) {                                                         \
        const auto *bytes = static_cast<const unsigned char *>(raw);                                \
        name##_body(*reinterpret_cast<const Params *>(bytes),                                       \
                    *reinterpret_cast<const TenpTensorMaps *>(bytes + (sizeof(Params) + 127) / 128 * 128)); \
    }                                                                                               \
    static const ::simt::Registration name##_registration(                                          \
        #name, (sizeof(Params) + 127) / 128 * 128 + sizeof(TenpTensorMaps), max_threads, name);     \
    static void name##_body(const Params &p, const TenpTensorMaps &maps)

#define TENP_SHARED(Type, name) Type *const name = reinterpret_cast<Type *>(::simt::shared_window())

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())
inline constexpr int warpSize = 32;

#define SIMT_VECTORS(T, name, alignment2, alignment4)                                               \
    struct alignas(alignment2) name##2 { T x, y; };                                                 \
    struct name##3 { T x, y, z; };                                                                  \
    struct alignas(alignment4) name##4 { T x, y, z, w; };                                           \
    SIMT_INLINE name##2 make_##name##2(T x, T y) { return {x, y}; }                                 \
    SIMT_INLINE name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                         \
    SIMT_INLINE name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(unsigned char, uchar, 2, 4)
SIMT_VECTORS(short, short, 4, 8)
SIMT_VECTORS(unsigned short, ushort, 4, 8)
SIMT_VECTORS(int, int, 8, 16)
SIMT_VECTORS(unsigned, uint, 8, 16)
SIMT_VECTORS(float, float, 8, 16)
SIMT_VECTORS(double, double, 16, 16)

SIMT_INLINE void __syncthreads(SIMT_SITE) { ::simt::sync_threads(site); }
SIMT_INLINE void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) { ::simt::sync_warp(mask, site); }

template <class T>
SIMT_INLINE T simt_shuffle(::simt::Shuffle kind, unsigned mask, T value, uint32_t operand, int width, ::simt::Site site) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
    const uint64_t bits = ::simt::shuffle(kind, mask, std::bit_cast<Bits>(value), operand, width, site);
    return std::bit_cast<T>(static_cast<Bits>(bits));
}
template <class T> SIMT_INLINE T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_SITE) {
    return simt_shuffle(::simt::Shuffle::Index, mask, value, lane, width, site);
}
template <class T> SIMT_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    return simt_shuffle(::simt::Shuffle::Up, mask, value, delta, width, site);
}
template <class T> SIMT_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    return simt_shuffle(::simt::Shuffle::Down, mask, value, delta, width, site);
}
template <class T> SIMT_INLINE T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_SITE) {
    return simt_shuffle(::simt::Shuffle::Xor, mask, value, lanes, width, site);
}
SIMT_INLINE unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
    return ::simt::ballot(mask, predicate != 0, site);
}
SIMT_INLINE int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
    return ::simt::ballot(mask, predicate != 0, site) != 0;
}
SIMT_INLINE int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
    return ::simt::ballot(mask, predicate != 0, site) == mask;
}

SIMT_INLINE int atomicAdd(int *address, int value) {
    return static_cast<int>(::simt::atomic(::simt::Atomic::Add, address, static_cast<uint32_t>(value)));
}
SIMT_INLINE unsigned atomicAdd(unsigned *address, unsigned value) {
    return ::simt::atomic(::simt::Atomic::Add, address, value);
}
SIMT_INLINE int atomicMax(int *address, int value) {
    return static_cast<int>(::simt::atomic(::simt::Atomic::MaxSigned, address, static_cast<uint32_t>(value)));
}
SIMT_INLINE unsigned atomicMax(unsigned *address, unsigned value) {
    return ::simt::atomic(::simt::Atomic::MaxUnsigned, address, value);
}

SIMT_INLINE int __popc(unsigned v) { return __builtin_popcount(v); }
SIMT_INLINE int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
SIMT_INLINE int __ffs(int v) { return __builtin_ffs(v); }
SIMT_INLINE int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
SIMT_INLINE int __clzll(long long v) { return std::countl_zero(static_cast<unsigned long long>(v)); }
SIMT_INLINE float __int_as_float(int v) { return std::bit_cast<float>(v); }
SIMT_INLINE float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
SIMT_INLINE int __float_as_int(float v) { return std::bit_cast<int>(v); }
SIMT_INLINE unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
SIMT_INLINE long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
SIMT_INLINE double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }
template <class T> SIMT_INLINE T __ldg(const T *address) { return *address; }

SIMT_INLINE float rsqrtf(float v) { return 1.0f / sqrtf(v); }
SIMT_INLINE double rsqrt(double v) { return 1.0 / sqrt(v); }
SIMT_INLINE float __expf(float v) { return expf(v); }
SIMT_INLINE float __logf(float v) { return logf(v); }
SIMT_INLINE float __fdividef(float a, float b) { return a / b; }

// Of floats the one that is a number, as on the device.
template <class A, class B> SIMT_INLINE std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) {
        return std::fmin(static_cast<T>(a), static_cast<T>(b));
    } else {
        return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
    }
}
template <class A, class B> SIMT_INLINE std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) {
        return std::fmax(static_cast<T>(a), static_cast<T>(b));
    } else {
        return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
    }
}
