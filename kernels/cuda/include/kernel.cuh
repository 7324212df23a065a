// How a kernel is written: its entry, its shared memory. Under TENP_SIMT the executor supplies the same words.
//
//   TENP_KERNEL(tenp_rms_norm, TenpRmsNormParams, 256, 1) {
//       TENP_SHARED(float, partial);
//       ... p.rows ...
//   }
#pragma once

#include "params.h"

#if defined(TENP_SIMT)

#include "simt_kernel.hpp"

#else

// An entry: takes one parameter struct `p`, is launched with at most `max_threads` threads a block, and is compiled so
// that `min_blocks` blocks fit on a multiprocessor.
#define TENP_KERNEL(name, Params, max_threads, min_blocks)                                          \
    extern "C" __global__ void __launch_bounds__(max_threads, min_blocks) name(const __grid_constant__ Params p)

// An entry that also takes the tensor maps `maps` of its two operands.
#define TENP_KERNEL_MAPS(name, Params, max_threads, min_blocks)                                     \
    extern "C" __global__ void __launch_bounds__(max_threads, min_blocks)                           \
        name(const __grid_constant__ Params p, const __grid_constant__ TenpTensorMaps maps)

// `name`: this block's dynamic shared memory, 1024-byte aligned. There is no static shared memory, so the window's start
// is the array's start and the alignment holds on every architecture.
#define TENP_SHARED(Type, name)                                                                     \
    extern __shared__ __align__(1024) unsigned char tenp_shared_bytes[];                            \
    Type *const name = reinterpret_cast<Type *>(tenp_shared_bytes)

#endif

#include "ptx.cuh"
