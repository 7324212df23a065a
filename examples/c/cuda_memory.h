/*
 * GPU memory and streams of GPU 0 through the CUDA driver, which is looked for when the program runs: it links with no
 * library of CUDA and starts without one.
 */
#ifndef CUDA_MEMORY_H
#define CUDA_MEMORY_H

#include <stddef.h>

#include "tenp.h"

/* The driver's functions; those of CUDA's cuda.h, by their versioned names. */
typedef struct cuda_memory {
  int (*allocate)(unsigned long long *address, size_t bytes);
  int (*upload)(unsigned long long to, const void *from, size_t bytes);
  int (*download)(void *to, unsigned long long from, size_t bytes);
  int (*new_stream)(tenp_stream *stream, unsigned flags);
  int (*wait)(tenp_stream stream);
} cuda_memory;

/* Finds the functions and makes the primary context of GPU 0 this thread's, as CUDA's runtime does; 0 on failure. */
int cuda_open(cuda_memory *cuda);

void *cuda_allocate(const cuda_memory *cuda, size_t bytes);
int cuda_upload(const cuda_memory *cuda, void *to, const void *from, size_t bytes);
int cuda_download(const cuda_memory *cuda, void *to, const void *from, size_t bytes);
tenp_stream cuda_new_stream(const cuda_memory *cuda);
int cuda_wait(const cuda_memory *cuda, tenp_stream stream);

#endif
