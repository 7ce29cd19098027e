// Answers, without a GPU, what torch's CPU build asks of CUDA when autograd handles tensors of that device: CUDA is the
// accelerator, it has one device with one stream, and no context exists on it. To be preloaded.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

#include <optional>

namespace at::accelerator {
// Overrides libtorch_cpu's function, which returns at compile time that there is no accelerator.
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
