// Stands in for the CuTe-DSL launch runtime: the few functions that generated host code calls.
// Kernel launches go to one Python callback; there is no device and no CUDA library behind it.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int (*load_callback)(const void* image, void** library);
typedef int (*kernel_callback)(void* library, const char* name, void** kernel);
typedef int (*launch_callback)(const void* config, void* kernel, void** args);
typedef int (*attribute_callback)(int kind, int attribute, void* kernel, int* value);

static load_callback on_load;
static kernel_callback on_kernel;
static launch_callback on_launch;
static attribute_callback on_attribute;
static char last_error[4096] = "emulator: no session is open";

enum { ERROR_NONE = 0, ERROR_EMULATOR = 999 };
enum { ATTRIBUTE_OF_DEVICE, ATTRIBUTE_OF_KERNEL, SET_ATTRIBUTE_OF_KERNEL };

void emu_shim_install(load_callback load, kernel_callback kernel, launch_callback launch, attribute_callback attribute) {
  on_load = load;
  on_kernel = kernel;
  on_launch = launch;
  on_attribute = attribute;
}

void emu_shim_set_error(const char* text) { snprintf(last_error, sizeof last_error, "%s", text); }

int _cudaGetDevice(int* device) { *device = 0; return ERROR_NONE; }
int _cudaSetDevice(int device) { (void)device; return ERROR_NONE; }
int _cudaGetDeviceCount(int* count) { *count = 1; return ERROR_NONE; }
int _cudaDeviceSynchronize(void) { return ERROR_NONE; }
int _cudaStreamSynchronize(void* stream) { (void)stream; return ERROR_NONE; }

int _cudaDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  return on_attribute ? on_attribute(ATTRIBUTE_OF_DEVICE, attribute, NULL, value) : ERROR_EMULATOR;
}
int _cuKernelGetAttribute(int* value, int attribute, void* kernel, int device) {
  (void)device;
  return on_attribute ? on_attribute(ATTRIBUTE_OF_KERNEL, attribute, kernel, value) : ERROR_EMULATOR;
}
int _cudaFuncSetAttribute(void* kernel, int attribute, int value) {
  return on_attribute ? on_attribute(SET_ATTRIBUTE_OF_KERNEL, attribute, kernel, &value) : ERROR_EMULATOR;
}
int _cudaKernelSetAttributeForDevice(void* kernel, int attribute, int value, int device) {
  (void)device;
  return _cudaFuncSetAttribute(kernel, attribute, value);
}
int _cudaLibraryLoadData(void** library, const void* image, void* a, void* b, unsigned c, void* d, void* e, unsigned f) {
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
  return on_load ? on_load(image, library) : ERROR_EMULATOR;
}
int _cudaLibraryUnload(void* library) { (void)library; return ERROR_NONE; }
int _cudaLibraryGetKernel(void** kernel, void* library, const char* name) {
  return on_kernel ? on_kernel(library, name, kernel) : ERROR_EMULATOR;
}
int _cudaLaunchKernelEx(const void* config, void* kernel, void** args) {
  return on_launch ? on_launch(config, kernel, args) : ERROR_EMULATOR;
}

const char* cuda_dialect_get_error_name(int code) { return code ? "cudaErrorUnknown" : "cudaSuccess"; }
const char* CuteDSLRT_GetErrorName(int code) { return cuda_dialect_get_error_name(code); }
const char* CuteDSLRT_GetErrorString(int code) { return code ? last_error : "no error"; }

typedef void (*set_raised_parts)(const char* kind, const char** parts, int32_t count);
typedef void (*set_raised)(const char* kind, const char* message);

void CuteDSLRT_TVMFFISetRaisedCudaError(set_raised_parts raise, int code) {
  (void)code;
  const char* parts[] = {last_error};
  raise("RuntimeError", parts, 1);
}
void CuteDSLRT_TVMFFISetRaisedCudaLaunchError(set_raised_parts raise) {
  const char* parts[] = {"emulator: launch configuration out of limits"};
  raise("RuntimeError", parts, 1);
}

// The generated module calls this before each launch. `init` loads the module's kernel image, `load` looks its kernels up for a device.
int cuda_dialect_init_library_once(void** state, int (*init)(void**), int (*load)(void**, int32_t), set_raised raise) {
  if (*state) return ERROR_NONE;
  void** library = calloc(1, sizeof(void*));
  int error = init(library);
  if (!error) error = load(library, 0);
  if (error) {
    free(library);
    raise("RuntimeError", last_error);
    return error;
  }
  *state = library;
  return ERROR_NONE;
}
void cuda_dialect_unload_library_once(void** state) {
  free(*state);
  *state = NULL;
}
