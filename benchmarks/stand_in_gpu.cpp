// Answers, without a GPU, what torch asks of CUDA when autograd handles tensors of that device: CUDA is the accelerator,
// it has one device with one stream, and no context exists on it. To be preloaded. In a build of torch for CUDA these
// answers replace its own, that there is no device; only the guard is replaced by that of the build.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

#include <optional>

namespace at::accelerator {
// Overrides libtorch_cpu's function.
C10_EXPORT std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
}  // namespace at::accelerator

namespace at {
struct StandInHooks : CUDAHooksInterface {
  explicit StandInHooks(CUDAHooksArgs) {}
  bool hasPrimaryContext(DeviceIndex) const override {
    return false;
  }
};
C10_REGISTER_TYPED_CLASS_WITH_PRIORITY(CUDAHooksRegistry, "CUDAHooks", c10::REGISTRY_PREFERRED, StandInHooks)
}  // namespace at

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>)
