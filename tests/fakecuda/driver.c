// The CUDA driver, libcuda.so.1, without a GPU: what PyTorch and Triton call in it. Triton compiles
// kernels for the GPU's compute capability and loads and launches them; here that does nothing.
//
// C does not check parameter lists when it links, so calls that need nothing from theirs take none.

#define DONE { return 0; }
#define CONTEXT ((void *)16)
enum { MAX_THREADS = 0, NUM_REGISTERS = 4 };  // CUfunction_attribute
enum { SHARED_MEMORY = 8, WARP_SIZE = 10, MULTIPROCESSORS = 16, SHARED_MEMORY_OPTIN = 97 };

int cuInit(unsigned flags) DONE
int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
int cuGetErrorString(int error, const char **text) {
  *text = "error of the stand-in";
  return 0;
}
int cuDeviceGetCount(int *count) {
  *count = 1;
  return 0;
}
int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case SHARED_MEMORY: *value = 49152; break;
    case WARP_SIZE: *value = 32; break;
    case MULTIPROCESSORS: *value = 40; break;
    case SHARED_MEMORY_OPTIN: *value = 65536; break;  // Turing's, so that kernels fit everywhere
    default: *value = 1;
  }
  return 0;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  *active = 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context) {
  *context = CONTEXT;
  return 0;
}
int cuCtxGetCurrent(void **context) {
  *context = CONTEXT;
  return 0;
}
int cuCtxGetDevice(int *device) {
  *device = 0;
  return 0;
}
int cuCtxSetCurrent() DONE
int cuCtxGetLimit() DONE
int cuCtxSetLimit() DONE
int cuPointerGetAttribute(void **found, int attribute, unsigned long pointer) {
  *found = (void *)pointer;
  return 0;
}
int cuModuleLoadData() DONE
int cuModuleGetFunction() DONE
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == MAX_THREADS ? 1024 : attribute == NUM_REGISTERS ? 32 : 0;
  return 0;
}
int cuFuncSetAttribute() DONE
int cuFuncSetCacheConfig() DONE
int cuOccupancyMaxActiveClusters() DONE
int cuTensorMapEncodeTiled() DONE
int cuTensorMapEncodeIm2col() DONE
int cuLaunchKernel() DONE
int cuLaunchKernelEx() DONE
int cuGetProcAddress() DONE
int cuGetProcAddress_v2() DONE
