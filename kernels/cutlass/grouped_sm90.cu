// Grouped products on Hopper: CUTLASS's persistent grouped kernel with TMA and warp specialisation (CUTLASS 3.x and 4.x,
// include/cutlass/gemm/kernel/sm90_gemm_array_tma_warpspecialized_*.hpp), tokens by expert.
//
// One shared library per variant, by macros: ELEMENT (a type of CUTLASS), B_ALONG_K, TILE_M, TILE_N, PINGPONG, and BLOCKS
// for e4m3 with factors of 1 x 128 and 128 x 128, promoted to fp32 every 128 products.

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "setup.cuh"

// Named: nvcc 13.0 does not find a kernel's template argument in an unnamed namespace.
namespace vllm_accel {

using namespace cute;

using Problem = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;
using Element = ELEMENT;
#if BLOCKS
using Result = cutlass::bfloat16_t;
#else
using Result = ELEMENT;
#endif
using Rows = cutlass::layout::RowMajor;
#if B_ALONG_K
using LayoutB = cutlass::layout::ColumnMajor;
#else
using LayoutB = cutlass::layout::RowMajor;
#endif
constexpr int kAlign = 128 / cutlass::sizeof_bits<Element>::value;
constexpr int kAlignOut = 128 / cutlass::sizeof_bits<Result>::value;

using Tile = Shape<Int<TILE_M>, Int<TILE_N>, Int<128 / sizeof(Element)>>;
// Two blocks side by side along M share b through multicast; with few rows per group there is no second one.
using Cluster = std::conditional_t<TILE_M >= 128 && !BLOCKS, Shape<_2, _1, _1>, Shape<_1, _1, _1>>;
#if BLOCKS
using MainSchedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeFP8Blockwise;
using EndSchedule = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
#elif PINGPONG
using MainSchedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
using EndSchedule = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
#else
using MainSchedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
using EndSchedule = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
#endif

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Rows*, kAlignOut, Result, Rows*, kAlignOut,
    EndSchedule, cutlass::epilogue::fusion::LinearCombination<Result, float, void, float>>::CollectiveOp;

#if BLOCKS
// Factors run along K first, in both: group e's are a contiguous part of (T, K / 128), and of (E, N / 128, K / 128).
using Scales = cutlass::detail::Sm90BlockwiseScaleConfig<1, 128, 128, GMMA::Major::K, GMMA::Major::K>;
using LayoutSFA = decltype(Scales::deduce_layoutSFA());
using LayoutSFB = decltype(Scales::deduce_layoutSFB());
using TagA = cute::tuple<Rows*, LayoutSFA*>;
using TagB = cute::tuple<LayoutB*, LayoutSFB*>;
#else
using TagA = Rows*;
using TagB = LayoutB*;
#endif

using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, TagA, kAlign, Element, TagB, kAlign, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    MainSchedule>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

using StrideA = typename Kernel::InternalStrideA;
using StrideB = typename Kernel::InternalStrideB;
using StrideD = typename Kernel::InternalStrideD;

// Arrays with one entry for each group.
struct Groups {
  typename Problem::UnderlyingProblemShape* shape;
  Element const** a;
  Element const** b;
  Result** out;
  StrideA* a_stride;
  StrideB* b_stride;
  StrideD* out_stride;
#if BLOCKS
  float const** a_scale;
  float const** b_scale;
  LayoutSFA* a_layout;
  LayoutSFB* b_layout;
#endif

  __device__ void operator()(grouped::Operands const& o, int e, int64_t start, int rows) const {
    shape[e] = make_shape(rows, o.n, o.k);
    a[e] = reinterpret_cast<Element const*>(o.a) + start * o.a_stride;
    b[e] = reinterpret_cast<Element const*>(o.b) + e * o.b_group;
    out[e] = reinterpret_cast<Result*>(o.out) + start * o.out_stride;
    get<0>(a_stride[e]) = o.a_stride;
#if B_ALONG_K
    get<0>(b_stride[e]) = o.b_stride;
#else
    get<1>(b_stride[e]) = o.b_stride;
#endif
    get<0>(out_stride[e]) = o.out_stride;
#if BLOCKS
    int const along_k = (o.k + 127) / 128;
    a_scale[e] = o.a_scale + start * along_k;
    b_scale[e] = o.b_scale + static_cast<int64_t>(e) * ((o.n + 127) / 128) * along_k;
    a_layout[e] = Scales::tile_atom_to_shape_SFA(make_shape(rows, o.n, o.k, 1));
    b_layout[e] = Scales::tile_atom_to_shape_SFB(make_shape(rows, o.n, o.k, 1));
#endif
  }
};

Groups carve(grouped::Carve& from, int count) {
  Groups g{};
  g.shape = from.take<typename Problem::UnderlyingProblemShape>(count);
  g.a = from.take<Element const*>(count);
  g.b = from.take<Element const*>(count);
  g.out = from.take<Result*>(count);
  g.a_stride = from.take<StrideA>(count);
  g.b_stride = from.take<StrideB>(count);
  g.out_stride = from.take<StrideD>(count);
#if BLOCKS
  g.a_scale = from.take<float const*>(count);
  g.b_scale = from.take<float const*>(count);
  g.a_layout = from.take<LayoutSFA>(count);
  g.b_layout = from.take<LayoutSFB>(count);
#endif
  return g;
}

typename Gemm::Arguments arguments_of(VllmAccelGroupedGemm const& call, Groups const& g) {
  typename Gemm::Arguments made{};
  made.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
  made.problem_shape = {call.groups, g.shape, nullptr};
#if BLOCKS
  made.mainloop = {g.a, g.a_stride, g.b, g.b_stride, g.a_scale, g.a_layout, g.b_scale, g.b_layout};
#else
  made.mainloop = {g.a, g.a_stride, g.b, g.b_stride};
#endif
  made.epilogue = {{}, nullptr, g.out_stride, g.out, g.out_stride};
  made.epilogue.thread.alpha = 1.0f;
  made.epilogue.thread.beta = 0.0f;
  made.hw_info.device_id = 0;  // asked only where the number of multiprocessors is not given
  made.hw_info.sm_count = call.sms;
  return made;
}

}  // namespace vllm_accel

using namespace vllm_accel;

// Bytes of workspace for `groups` on a device with `sms` multiprocessors.
VLLM_ACCEL_EXPORT int64_t vllm_accel_workspace(int32_t groups, int32_t sms) {
  grouped::Carve counted{nullptr};
  VllmAccelGroupedGemm call{};
  call.groups = groups;
  call.sms = sms;
  Groups const g = carve(counted, groups);
  return reinterpret_cast<int64_t>(counted.at) + static_cast<int64_t>(Gemm::get_workspace_size(arguments_of(call, g)));
}

// Launch. Returns 0, a cutlass::Status, or 1000 + a cudaError_t.
VLLM_ACCEL_EXPORT int32_t vllm_accel_grouped_gemm(VllmAccelGroupedGemm const* call) {
  cudaStream_t const stream = static_cast<cudaStream_t>(call->stream);
  grouped::Carve from{static_cast<char*>(call->workspace)};
  Groups const g = carve(from, call->groups);
  grouped::prepare<<<1 + grouped::kClearing, grouped::kThreads, 0, stream>>>(operands_of(*call), g, int(sizeof(Result)));
  if (cudaError_t const failed = cudaGetLastError(); failed != cudaSuccess) return 1000 + static_cast<int>(failed);
  Gemm gemm;
  auto const arguments = arguments_of(*call, g);
  if (auto const status = gemm.initialize(arguments, from.at, stream); status != cutlass::Status::kSuccess) {
    return static_cast<int32_t>(status);
  }
  return static_cast<int32_t>(gemm.run(stream));
}
