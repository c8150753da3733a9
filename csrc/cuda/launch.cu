// The CUDA runtime's side of cuda/launch.h. Nothing here waits for the device or allocates, and what is asked of the
// runtime besides the launch is asked once a kernel and device: launches can be captured into a graph.
#include <cuda.h>
#include <cuda_runtime.h>

#include <limits>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/launch.h"

namespace tpext::cuda {
namespace {

void check(cudaError_t error, const char* call, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else our next call would report it once more
  throw CudaError("CUDA: " + std::string(call) + " for device " + std::to_string(device) + ": " +
                  cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// A function of the driver, which nothing here links.
template <class Function>
Function* driver_function(const char* name, int device) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status), name, device);
#else
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status), name, device);
#endif
  if (status != cudaDriverEntryPointSuccess) throw CudaError("CUDA: the driver has no " + std::string(name));
  return reinterpret_cast<Function*>(found);
}

// Makes a device current, and what was current before again, be it no device at all: cudaSetDevice would give the
// device that it goes back to a context, half a gigabyte there, in a process that uses another one alone.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    int current = 0;
    check(cudaGetDevice(&current), "cudaGetDevice", device);
    static auto* const get_context = driver_function<CUresult(CUcontext*)>("cuCtxGetCurrent", device);
    get_context(&previous_);
    if (previous_ != nullptr && current == device) return;
    check(cudaSetDevice(device), "cudaSetDevice", device);
    changed_ = true;
  }
  ~DeviceGuard() {
    if (!changed_) return;
    static auto* const set_context = driver_function<CUresult(CUcontext)>("cuCtxSetCurrent", 0);
    set_context(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUcontext previous_ = nullptr;
  bool changed_ = false;
};

// The first use of a kernel loads it, which a capture of the strict kind refuses on any thread.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(int device) : device_(device) { exchange(); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  void exchange() {
    check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode", device_);
  }

  int device_;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

constexpr int kSharedWithoutAsking = 48 << 10;
constexpr int kClusterWithoutAsking = 8;

// What has been set for a kernel on a device, and what the runtime said of it.
struct KernelState {
  int shared_bytes = kSharedWithoutAsking;
  bool large_clusters = false;
  std::map<std::tuple<int, int, int>, int> resident;  // by threads, shared bytes, cluster
};

struct Cache {
  std::mutex mutex;
  std::map<int, Limits> limits;
  std::map<std::pair<const void*, int>, KernelState> kernels;
};

Cache& cache() {
  static Cache* const made = new Cache;  // never destroyed: threads may launch while the process ends
  return *made;
}

// With the cache's mutex held, the device current and capture relaxed.
void raise_limits(KernelState& state, const void* kernel, const Shape& shape, int device) {
  const bool more_shared = shape.shared_bytes > state.shared_bytes;
  const bool larger_clusters = shape.cluster > kClusterWithoutAsking && !state.large_clusters;
  if (more_shared) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes),
          "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)", device);
    state.shared_bytes = shape.shared_bytes;
  }
  if (larger_clusters) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute(NonPortableClusterSizeAllowed)", device);
    state.large_clusters = true;
  }
}

// The launch configuration and the attributes that it points to.
struct Configuration {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2];

  Configuration(const Shape& shape, int64_t blocks, void* stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (shape.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
      attribute.val.clusterDim.y = 1;
      attribute.val.clusterDim.z = 1;
    }
    if (shape.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
};

int ask_resident(const void* kernel, const Shape& shape, int device, int multiprocessors) {
  if (shape.cluster == 1) {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, shape.threads,
                                                        static_cast<size_t>(shape.shared_bytes)),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor", device);
    return blocks * multiprocessors;
  }
  const Configuration configuration(shape, shape.cluster, nullptr);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration.config), "cudaOccupancyMaxActiveClusters",
        device);
  return clusters;
}

Limits ask_limits(int device) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount", device);
  const auto attribute = [device](cudaDeviceAttr which, const char* call) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), call, device);
    return value;
  };
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, "cudaDeviceGetAttribute(ComputeCapabilityMajor)");
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, "cudaDeviceGetAttribute(ComputeCapabilityMinor)");
  return {
      .capability = 10 * major + minor,
      .multiprocessors = attribute(cudaDevAttrMultiProcessorCount, "cudaDeviceGetAttribute(MultiProcessorCount)"),
      .shared_memory =
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "cudaDeviceGetAttribute(MaxSharedMemoryPerBlockOptin)"),
      .cooperative = attribute(cudaDevAttrCooperativeLaunch, "cudaDeviceGetAttribute(CooperativeLaunch)") != 0,
  };
}

}  // namespace

const Limits& limits(int device) {
  Cache& known = cache();
  const std::lock_guard<std::mutex> lock(known.mutex);
  auto found = known.limits.find(device);
  if (found == known.limits.end()) found = known.limits.emplace(device, ask_limits(device)).first;
  return found->second;
}

namespace detail {

void launch(const void* kernel, void** arguments, const Shape& shape, const Queue& queue) {
  if (shape.blocks == 0) return;
  if (shape.blocks < 0 || shape.blocks > std::numeric_limits<int32_t>::max()) {
    throw CudaError("CUDA: a grid of " + std::to_string(shape.blocks) + " blocks for device " +
                    std::to_string(queue.device) + ": at most 2147483647 are possible");
  }
  const DeviceGuard guard(queue.device);
  const RelaxedCapture relaxed(queue.device);
  if (shape.shared_bytes > kSharedWithoutAsking || shape.cluster > kClusterWithoutAsking) {
    Cache& known = cache();
    const std::lock_guard<std::mutex> lock(known.mutex);
    raise_limits(known.kernels[{kernel, queue.device}], kernel, shape, queue.device);
  }
  const Configuration configuration(shape, shape.blocks, queue.stream);
  check(cudaLaunchKernelExC(&configuration.config, kernel, arguments), "cudaLaunchKernelExC", queue.device);
}

int resident(const void* kernel, const Shape& shape, int device) {
  const Limits& of_device = limits(device);
  constexpr int most_threads = 1024, largest_cluster = 16;
  if (shape.threads < 1 || shape.threads > most_threads || shape.shared_bytes > of_device.shared_memory ||
      shape.cluster > (of_device.capability < 90 ? 1 : largest_cluster)) {
    return 0;
  }
  Cache& known = cache();
  const std::lock_guard<std::mutex> lock(known.mutex);
  KernelState& state = known.kernels[{kernel, device}];
  const std::tuple key{shape.threads, shape.shared_bytes, shape.cluster};
  auto found = state.resident.find(key);
  if (found == state.resident.end()) {
    const DeviceGuard guard(device);
    const RelaxedCapture relaxed(device);
    int count = 0;
    try {
      raise_limits(state, kernel, shape, device);
      count = ask_resident(kernel, shape, device, of_device.multiprocessors);
    } catch (const CudaError&) {
      // A device may refuse clusters of a size; there are other ways to run.
      if (shape.cluster == 1) throw;
    }
    found = state.resident.emplace(key, count).first;
  }
  return found->second;
}

}  // namespace detail
}  // namespace tpext::cuda
