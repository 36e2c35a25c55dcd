/* A CUDA runtime without a GPU: memory, streams, events and graphs are there, and no kernel computes anything.
 *
 * Loaded in front of the real one (LD_PRELOAD), it lets PyTorch's own CUDA code run to its end: where tensors are, what
 * a step launches, whether it can be captured, and what makes the host wait, which is counted. Whatever is asked of the
 * device is 0. `tests/hollow.py` builds it, and says what is tried with it.
 */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DEVICE 1
#define PINNED 2

/* ------------------------------------------------------------------------------------------------ what is counted */

static long waits, pageable; /* calls that wait for the device, and copies to it from memory that is not pinned */
long hollow_waits(void) { return waits; }
long hollow_pageable(void) { return pageable; }

/* --------------------------------------------------------------------------------------------------------- memory */

typedef struct { char *start; size_t size; int kind; } Block;
static Block blocks[1 << 18];
static int count;
static size_t taken;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int kind_of(const void *pointer) {
    int kind = 0;
    pthread_mutex_lock(&lock);
    for (int i = count - 1; i >= 0 && !kind; i--)
        if ((char *)pointer >= blocks[i].start && (char *)pointer < blocks[i].start + blocks[i].size) kind = blocks[i].kind;
    pthread_mutex_unlock(&lock);
    return kind;
}

static cudaError_t take(void **pointer, size_t size, int kind) {
    size = size ? size : 1;
    if (posix_memalign(pointer, 4096, size)) return cudaErrorMemoryAllocation;
    memset(*pointer, 0, size);
    pthread_mutex_lock(&lock);
    blocks[count++] = (Block){*pointer, size, kind};
    taken += kind == DEVICE ? size : 0;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

static cudaError_t give_back(void *pointer) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < count; i++)
        if (blocks[i].start == pointer) {
            taken -= blocks[i].kind == DEVICE ? blocks[i].size : 0;
            blocks[i] = blocks[--count];
            break;
        }
    pthread_mutex_unlock(&lock);
    free(pointer);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **pointer, size_t size) { return take(pointer, size, DEVICE); }
cudaError_t cudaMallocHost(void **pointer, size_t size) { return take(pointer, size, PINNED); }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) { return take(pointer, size, PINNED); }
cudaError_t cudaFreeHost(void *pointer) { return give_back(pointer); }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = 80UL << 30, *available = *total - taken;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
    int kind = kind_of(pointer);
    memset(found, 0, sizeof *found);
    found->type = kind == DEVICE ? cudaMemoryTypeDevice : kind == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    found->devicePointer = found->hostPointer = (void *)pointer;
    return cudaSuccess;
}

/* ------------------------------------------------------------------------------------------------ streams, capture */

static cudaStream_t captured; /* the stream that is captured, if one is, by which thread, and what it was given to do */
static pthread_t by;
static unsigned long long captures;
static size_t nodes;
static cudaError_t last = cudaSuccess;
static __thread enum cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

static cudaError_t refuse(cudaError_t error) { return last = error; }
static int capturing(cudaStream_t stream) { return captured && stream == captured; }
static cudaError_t waited(void) {
    waits++;
    int here = captured && pthread_equal(by, pthread_self()) && mode != cudaStreamCaptureModeRelaxed;
    return here ? refuse(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaFree(void *pointer) {
    cudaError_t error = pointer ? waited() : cudaSuccess;
    return error ? error : give_back(pointer);
}
static cudaError_t new_handle(void *handle) {
    *(void **)handle = calloc(1, 64);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { return new_handle(stream); }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waited(); }
cudaError_t cudaDeviceSynchronize(void) { return waited(); }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **before, const cudaGraphEdgeData **edges,
                                     size_t *number) {
    if (id) *id = captures;
    if (graph) *graph = (cudaGraph_t)&captures;
    if (before) *before = NULL;
    if (edges) *edges = NULL;
    if (number) *number = 0;
    return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode asked) {
    captured = stream, by = pthread_self(), captures++, nodes = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) { return captured = NULL, new_handle(graph); }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *asked) {
    enum cudaStreamCaptureMode before = mode;
    return mode = *asked, *asked = before, cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *found, size_t *number) { return *number = nodes, cudaSuccess; }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) { return new_handle(made); }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) { return new_handle(made); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaSuccess; }

/* --------------------------------------------------------------------------------------------------------- events */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return new_handle(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event);
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaEventRecord(event, stream); }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waited(); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    struct timespec *a = (struct timespec *)from, *b = (struct timespec *)to;
    *milliseconds = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6;
    return cudaSuccess;
}

/* --------------------------------------------------------------------------------------------------------- copies */

static cudaError_t copy(void *to, const void *from, size_t size, int async, cudaStream_t stream) {
    int target = kind_of(to), source = kind_of(from);
    if (!size) return cudaSuccess;
    if (target == DEVICE && !source) {
        pageable++;
        if (capturing(stream)) return refuse(cudaErrorStreamCaptureUnsupported);
    }
    if (source == DEVICE && (!target || (!async && target == PINNED)) && waited() != cudaSuccess) return last;
    if (capturing(stream)) nodes++;
    else if (source == DEVICE && target != DEVICE) memset(to, 0, size); /* what no kernel has written */
    else memmove(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) { return copy(to, from, size, 0, NULL); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, size, 1, stream);
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    if (capturing(stream)) nodes++;
    else memset(to, value, size);
    return cudaSuccess;
}

/* -------------------------------------------------------------------------------------------------------- kernels */

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    nodes += capturing(stream);
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *kernel, void **arguments) {
    nodes += capturing(how->stream);
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { return *kernel = (cudaKernel_t)function, cudaSuccess; }
static __thread struct { dim3 grid, block; size_t shared; void *stream; } next;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    next.grid = grid, next.block = block, next.shared = shared, next.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = next.grid, *block = next.block, *shared = next.shared, *(void **)stream = next.stream;
    return cudaSuccess;
}
void **__cudaRegisterFatBinary(void *binary) { static void *handle[8]; return handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *a, void *b, void *c, void *d, int *e) {}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int ext, size_t size, int constant, int global) {}
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) { static char all[1 << 16]; return *address = all, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute what, int value) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024, found->numRegs = 32, found->ptxVersion = found->binaryVersion = 90;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks_, const void *kernel, int size, size_t shared, unsigned flags) {
    return *blocks_ = 2, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks_, const void *kernel, int size, size_t shared) {
    return *blocks_ = 2, cudaSuccess;
}

/* --------------------------------------------------------------------------------------------------------- device */

static __thread int current;
cudaError_t cudaGetDeviceCount(int *number) { return *number = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? refuse(cudaErrorInvalidDevice) : (current = device, cudaSuccess); }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "a hollow GPU");
    found->major = 9, found->totalGlobalMem = 80UL << 30, found->multiProcessorCount = 100, found->warpSize = 32;
    found->maxThreadsPerBlock = 1024, found->maxThreadsPerMultiProcessor = 2048, found->maxBlocksPerMultiProcessor = 32;
    found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
    found->maxGridSize[0] = 2147483647, found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536, found->l2CacheSize = 1 << 25;
    found->sharedMemPerBlock = 49152, found->sharedMemPerBlockOptin = found->sharedMemPerMultiprocessor = 232448;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr what, int device) {
    switch (what) {
        case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
        case cudaDevAttrMaxBlockDimZ: *value = 64; break;
        case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMultiProcessorCount: *value = 100; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 232448; break;
        default: *value = 1;
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) { return strncpy(id, "0000:00:00.0", size), cudaSuccess; }
cudaError_t cudaGetLastError(void) { cudaError_t error = last; return last = cudaSuccess, error; }
cudaError_t cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing" : "refused";
}
const char *cudaGetErrorName(cudaError_t error) { return "cudaError"; }
static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
    *function = (void *)nothing;
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* -------------------------------------------------------------------------------------------------------- cuBLAS */

int cublasCreate_v2(void **handle) { return new_handle(handle); }
int cublasGetMathMode(void *handle, int *found) { return *found = 0; }
int cublasGetPointerMode_v2(void *handle, int *found) { return *found = 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *what, void *a, void *b, void *c, void *d, void *how, int asked, void *found, int *number) {
    return *number = 1, 0;
}
#define DOES_NOTHING(name) int name(void) { return 0; }
DOES_NOTHING(cublasDestroy_v2) DOES_NOTHING(cublasSetStream_v2) DOES_NOTHING(cublasSetWorkspace_v2)
DOES_NOTHING(cublasSetMathMode) DOES_NOTHING(cublasSetPointerMode_v2) DOES_NOTHING(cublasSetSmCountTarget)
DOES_NOTHING(cublasGemmEx) DOES_NOTHING(cublasSgemmEx) DOES_NOTHING(cublasSgemm_v2) DOES_NOTHING(cublasSgemv_v2)
DOES_NOTHING(cublasGemmStridedBatchedEx) DOES_NOTHING(cublasSgemmStridedBatched) DOES_NOTHING(cublasSdot_v2)
DOES_NOTHING(cublasLtMatmul) DOES_NOTHING(cublasLtMatmulDescCreate) DOES_NOTHING(cublasLtMatmulDescDestroy)
DOES_NOTHING(cublasLtMatmulDescSetAttribute) DOES_NOTHING(cublasLtMatmulPreferenceCreate)
DOES_NOTHING(cublasLtMatmulPreferenceDestroy) DOES_NOTHING(cublasLtMatmulPreferenceSetAttribute)
DOES_NOTHING(cublasLtMatrixLayoutCreate) DOES_NOTHING(cublasLtMatrixLayoutDestroy) DOES_NOTHING(cublasLtMatrixLayoutSetAttribute)

/* -------------------------------------------------------------------------------------------------------- driver */

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
int cuCtxGetCurrent(void **context) { return *context = &captures, 0; }
DOES_NOTHING(cuCtxSetCurrent) DOES_NOTHING(cuDeviceGet) DOES_NOTHING(cuDeviceGetAttribute) DOES_NOTHING(cuDevicePrimaryCtxRetain)
DOES_NOTHING(cuFuncGetAttribute) DOES_NOTHING(cuFuncSetAttribute) DOES_NOTHING(cuFuncSetCacheConfig) DOES_NOTHING(cuGetErrorString)
DOES_NOTHING(cuLaunchCooperativeKernel) DOES_NOTHING(cuLaunchKernel) DOES_NOTHING(cuLinkAddData_v2) DOES_NOTHING(cuLinkComplete)
DOES_NOTHING(cuLinkCreate_v2) DOES_NOTHING(cuModuleGetFunction) DOES_NOTHING(cuModuleLoad) DOES_NOTHING(cuModuleLoadData)
DOES_NOTHING(cuModuleLoadDataEx) DOES_NOTHING(cuModuleUnload) DOES_NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor)
DOES_NOTHING(cuPointerGetAttribute) DOES_NOTHING(cuTensorMapEncodeTiled)
