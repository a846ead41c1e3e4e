// Grouped products on Ampere and Ada: CUTLASS 2.x's grouped kernel, which finds its tiles on the device
// (include/cutlass/gemm/kernel/gemm_grouped.h), tokens by expert. Macros: ELEMENT, B_ALONG_K, TILE_M, TILE_N.

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/thread/linear_combination.h"
#include "cutlass/gemm/device/gemm_grouped.h"
#include "cutlass/gemm/kernel/default_gemm_grouped.h"
#include "cutlass/gemm/kernel/gemm_grouped.h"
#include "setup.cuh"

// Named: nvcc 13.0 does not find a kernel's template argument in an unnamed namespace.
namespace vllm_accel {

using Element = ELEMENT;
using Rows = cutlass::layout::RowMajor;
#if B_ALONG_K
using LayoutB = cutlass::layout::ColumnMajor;
#else
using LayoutB = cutlass::layout::RowMajor;
#endif
constexpr int kAlign = 128 / cutlass::sizeof_bits<Element>::value;

using Kernel = typename cutlass::gemm::kernel::DefaultGemmGrouped<
    Element, Rows, cutlass::ComplexTransform::kNone, kAlign, Element, LayoutB, cutlass::ComplexTransform::kNone, kAlign,
    Element, Rows, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<TILE_M, TILE_N, 32>, cutlass::gemm::GemmShape<TILE_M / 2, TILE_N / 2, 32>,
    cutlass::gemm::GemmShape<16, 8, 16>, cutlass::epilogue::thread::LinearCombination<Element, kAlign, float, float>,
    cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, 4,
    cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;
using Gemm = cutlass::gemm::device::GemmGrouped<Kernel>;

// Arrays with one entry for each group. The kernel takes mutable pointers and reads a and b alone.
struct Groups {
  cutlass::gemm::GemmCoord* shape;
  Element** a;
  Element** b;
  Element** out;
  int64_t* a_stride;
  int64_t* b_stride;
  int64_t* out_stride;

  __device__ void operator()(grouped::Operands const& o, int e, int64_t start, int rows) const {
    shape[e] = cutlass::gemm::GemmCoord(rows, o.n, o.k);
    a[e] = reinterpret_cast<Element*>(const_cast<char*>(o.a)) + start * o.a_stride;
    b[e] = reinterpret_cast<Element*>(const_cast<char*>(o.b)) + e * o.b_group;
    out[e] = reinterpret_cast<Element*>(o.out) + start * o.out_stride;
    a_stride[e] = o.a_stride;
    b_stride[e] = o.b_stride;
    out_stride[e] = o.out_stride;
  }
};

Groups carve(grouped::Carve& from, int count) {
  Groups g{};
  g.shape = from.take<cutlass::gemm::GemmCoord>(count);
  g.a = from.take<Element*>(count);
  g.b = from.take<Element*>(count);
  g.out = from.take<Element*>(count);
  g.a_stride = from.take<int64_t>(count);
  g.b_stride = from.take<int64_t>(count);
  g.out_stride = from.take<int64_t>(count);
  return g;
}

}  // namespace vllm_accel

using namespace vllm_accel;

// Bytes of workspace for `groups`.
VLLM_ACCEL_EXPORT int64_t vllm_accel_workspace(int32_t groups, int32_t) {
  grouped::Carve counted{nullptr};
  carve(counted, groups);
  return reinterpret_cast<int64_t>(counted.at);
}

// Launch. Returns 0, a cutlass::Status, or 1000 + a cudaError_t.
VLLM_ACCEL_EXPORT int32_t vllm_accel_grouped_gemm(VllmAccelGroupedGemm const* call) {
  cudaStream_t const stream = static_cast<cudaStream_t>(call->stream);
  grouped::Carve from{static_cast<char*>(call->workspace)};
  Groups const g = carve(from, call->groups);
  grouped::prepare<<<1 + grouped::kClearing, grouped::kThreads, 0, stream>>>(operands_of(*call), g, int(sizeof(Element)));
  if (cudaError_t const failed = cudaGetLastError(); failed != cudaSuccess) return 1000 + static_cast<int>(failed);
  static int const resident = Gemm::maximum_active_blocks();
  if (resident <= 0) return static_cast<int32_t>(cutlass::Status::kErrorInternal);
  typename Gemm::Arguments const arguments(
      g.shape, call->groups, call->sms * resident, {1.0f, 0.0f}, g.a, g.b, g.out, g.out, g.a_stride, g.b_stride,
      g.out_stride, g.out_stride);
  Gemm gemm;
  if (auto const status = gemm.initialize(arguments, nullptr, stream); status != cutlass::Status::kSuccess) {
    return static_cast<int32_t>(status);
  }
  return static_cast<int32_t>(gemm.run(stream));
}
