#include "cuda_memory.h"

#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

/* Looks a function up; ISO C has no cast from object to function pointers, so the bytes are copied. */
static int find(void *library, const char *name, void *function) {
  void *found = dlsym(library, name);
  memcpy(function, &found, sizeof found);
  return found != NULL;
}

int cuda_open(cuda_memory *cuda) {
  int (*init)(unsigned flags);
  int (*get_device)(int *device, int ordinal);
  int (*retain)(void **context, int device);
  int (*set_current)(void *context);
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
  int device;
  void *context;
  return library && find(library, "cuInit", &init) && find(library, "cuDeviceGet", &get_device) &&
         find(library, "cuDevicePrimaryCtxRetain", &retain) && find(library, "cuCtxSetCurrent", &set_current) &&
         find(library, "cuMemAlloc_v2", &cuda->allocate) && find(library, "cuMemcpyHtoD_v2", &cuda->upload) &&
         find(library, "cuMemcpyDtoH_v2", &cuda->download) && find(library, "cuStreamCreate", &cuda->new_stream) &&
         find(library, "cuStreamSynchronize", &cuda->wait) && init(0) == 0 && get_device(&device, 0) == 0 &&
         retain(&context, device) == 0 && set_current(context) == 0;
}

void *cuda_allocate(const cuda_memory *cuda, size_t bytes) {
  unsigned long long address = 0;
  return cuda->allocate(&address, bytes) == 0 ? (void *)(uintptr_t)address : NULL;
}

int cuda_upload(const cuda_memory *cuda, void *to, const void *from, size_t bytes) {
  return cuda->upload((uintptr_t)to, from, bytes) == 0;
}

int cuda_download(const cuda_memory *cuda, void *to, const void *from, size_t bytes) {
  return cuda->download(to, (uintptr_t)from, bytes) == 0;
}

tenp_stream cuda_new_stream(const cuda_memory *cuda) {
  tenp_stream stream = NULL;
  return cuda->new_stream(&stream, 0) == 0 ? stream : NULL;
}

int cuda_wait(const cuda_memory *cuda, tenp_stream stream) { return cuda->wait(stream) == 0; }
