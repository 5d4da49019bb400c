// libcuda.so.1 of the null device: what Triton and PyTorch ask of the driver itself.
//
// others.inc has all of cuda.h's functions that are not written here; they succeed and do nothing.

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

extern "C" {

void null_cuda_launch(const char* name, void* stream);  // of runtime.cpp, preloaded

#define IGNORED(name) \
    int name(...) { return 0; }
#include "others.inc"

struct Function {
    std::string name;
};

int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int) { return *device = 0, 0; }
int cuDeviceGetName(char* name, int size, int) {
    return snprintf(name, size, "NVIDIA Null (sm_90)"), 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = 80ull << 30, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    static const std::map<int, int> known = {
        {1, 1024},      // threads in a block
        {8, 49152},     // shared memory in a block
        {10, 32},       // threads in a warp
        {12, 65536},    // registers in a block
        {13, 1980000},  // clock, kHz
        {16, 132},      // multiprocessors
        {36, 2619000},  // memory clock, kHz
        {37, 5120},     // memory bus, bits
        {39, 2048},     // threads in a multiprocessor
        {75, 9},        // compute capability, major
        {76, 0},        // and minor
        {81, 233472},   // shared memory in a multiprocessor
        {82, 65536},    // registers in a multiprocessor
        {97, 232448},   // shared memory in a block, if asked for
    };
    auto found = known.find(attribute);
    return *value = found == known.end() ? 0 : found->second, 0;
}
int cuCtxGetCurrent(void** context) { return *context = (void*)0x10, 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxGetApiVersion(void*, unsigned* version) { return *version = 13000, 0; }
int cuCtxGetStreamPriorityRange(int* least, int* most) { return *least = 0, *most = -5, 0; }
int cuStreamGetCtx(void*, void** context) { return cuCtxGetCurrent(context); }
int cuStreamIsCapturing(void*, int* status) { return *status = 0, 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return cuCtxGetCurrent(context); }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
    return *flags = 0, *active = 1, 0;
}
int cuGetErrorString(int, const char** text) { return *text = "an error of the null device", 0; }
int cuGetErrorName(int, const char** text) { return *text = "null", 0; }
int cuPointerGetAttribute(void* value, int, unsigned long long pointer) {
    return *(unsigned long long*)value = pointer, 0;
}
int cuOccupancyMaxActiveClusters(int* count, void*, void*) { return *count = 8, 0; }

int cuModuleLoad(void** module, const char*) { return *module = malloc(8), 0; }
int cuModuleLoadData(void** module, const void*) { return *module = malloc(8), 0; }
int cuModuleLoadDataEx(void** module, ...) { return *module = malloc(8), 0; }
int cuLibraryLoadData(void** library, ...) { return *library = malloc(8), 0; }
int cuModuleGetFunction(void** function, void*, const char* name) {
    return *function = new Function{name}, 0;
}
int cuLibraryGetKernel(void** kernel, void*, const char* name) {
    return *kernel = new Function{name}, 0;
}
int cuKernelGetFunction(void** function, void* kernel) { return *function = kernel, 0; }
int cuFuncGetAttribute(int* value, int attribute, void*) {
    return *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0, 0;  // threads, registers
}
int cuLaunchKernel(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   unsigned, void* stream, void**, void**) {
    return null_cuda_launch(((Function*)function)->name.c_str(), stream), 0;
}
struct LaunchConfig {  // CUlaunchConfig up to its stream
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
};
int cuLaunchKernelEx(const LaunchConfig* config, void* function, void**, void**) {
    return null_cuda_launch(((Function*)function)->name.c_str(), config->stream), 0;
}

int cuGetProcAddress_v2(const char* name, void** function, int, unsigned long long, void*) {
    void* own = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = dlsym(own, (std::string(name) + "_v2").c_str());
    if (!*function) *function = dlsym(own, name);
    return *function ? 0 : 500;  // CUDA_ERROR_NOT_FOUND
}
int cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
}
