// What torch's CPU build asks of CUDA when autograd meets tensors of that device, answered without a GPU: that CUDA is
// the accelerator, that it has one device with one stream, and that nothing has been set up on it. To be preloaded.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

#include <optional>

namespace at::accelerator {
// Found before libtorch_cpu's own, which knows at compile time that there is none.
C10_EXPORT std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
}  // namespace at::accelerator

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasPrimaryContext(DeviceIndex) const override {
    return false;
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>)
