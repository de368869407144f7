// A device with memory of its own, for machines without one. Its memory is the CPU's, counted apart, and the CPU does its
// work; but as on a GPU, an operation refuses tensors of two devices. It takes the place of Intel's Gaudi (`hpu`), which
// PyTorch leaves empty: in PyTorch's eyes a device like CUDA, to which parameters move in place.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

namespace {

constexpr auto kDevice = c10::DeviceType::HPU;
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::HPU);
std::atomic<int64_t> allocated{0}, max_allocated{0};

struct Block {
  void* data;
  size_t size;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= block->size;
  c10::free_cpu(block->data);
  delete block;
}

struct CountingAllocator final : at::Allocator {
  at::DataPtr allocate(size_t size) override {
    auto* block = new Block{c10::alloc_cpu(std::max<size_t>(size, 1)), size};
    allocated += size;
    max_allocated = std::max(max_allocated.load(), allocated.load());
    return {block->data, block, &release, at::Device(kDevice, 0)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};

CountingAllocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator);

// The same memory, as a tensor of the CPU.
at::Tensor on_cpu(const at::Tensor& tensor) {
  if (tensor.device().type() != kDevice) return tensor;
  const auto options = tensor.options().device(at::kCPU);
  if (tensor.numel() == 0) return at::empty(tensor.sizes(), options);
  return at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(), options);
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  return at::cpu::set_(tensor, std::move(storage), offset, size, stride);
}

at::Tensor& set_whole_storage(at::Tensor& tensor, at::Storage storage) {
  return at::cpu::set_(tensor, std::move(storage));
}

at::Scalar local_scalar(const at::Tensor& tensor) { return at::_local_scalar_dense(on_cpu(tensor)); }

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  // Like CUDA, it takes single numbers from the CPU, and indices: those are a list of optional tensors.
  const auto check = [&](const at::Tensor& tensor) {
    TORCH_CHECK(!tensor.defined() || tensor.device().type() == kDevice || tensor.dim() == 0,
                "Expected all tensors to be on the same device, but ", op.schema().name(), " got one of ",
                tensor.sizes(), " on ", tensor.device());
  };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) check(value.toTensor());
    if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) check(tensor);
    }
  }
  at::native::cpu_fallback(op, stack);
}

// One device with one stream, on which everything is done at once.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<kDevice> {
  static c10::Device device() { return c10::Device(kDevice, 0); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct HPUHooks final : at::HPUHooksInterface {  // PyTorch finds it by this name
  explicit HPUHooks(at::HPUHooksArgs) {}
  void init() const override {}
  bool hasHPU() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

}  // namespace

namespace at {
REGISTER_HPU_HOOKS(HPUHooks);
}

C10_REGISTER_GUARD_IMPL(HPU, Guard);

// Autocast as on CUDA.
namespace at::autocast {

TORCH_LIBRARY_IMPL(_, AutocastHPU, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastHPU, m) {
#define LOWER(...) KERNEL(c10::DeviceType::HPU, __VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL(c10::DeviceType::HPU, __VA_ARGS__, fp32)
#define WIDEST(...) KERNEL(c10::DeviceType::HPU, __VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FLOAT32)
  AT_FORALL_PROMOTE(WIDEST)
}

}  // namespace at::autocast

TORCH_LIBRARY_IMPL(_, HPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, HPU, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("view", at::native::view);
  m.impl("resize_", at::native::resize_);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("memory_allocated", [] { return allocated.load(); });
  m.def("max_memory_allocated", [] { return max_allocated.load(); });
  m.def("reset_peak_memory_stats", [] { max_allocated = allocated.load(); });
}
