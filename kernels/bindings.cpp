// The ops of lowrank_cli/ops/fused_step.py on one device: arguments checked, tensors taken apart, kernels called.
//
// Compiled twice: with projection_cpu.cpp, and with -DLOWRANK_CUDA and projection.cu. No CUDA header is needed: the
// stream comes from c10 as a bare pointer. A third time by a test, which runs projection.cu on the CPU: LOWRANK_EMULATED.

#include <ATen/core/Tensor.h>
#include <ATen/core/List.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "projection.h"

#if defined(LOWRANK_CUDA)
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#if defined(LOWRANK_EMULATED)
#define LOWRANK_KEY CPU
#else
#define LOWRANK_KEY CUDA
#endif
#else
#include "projection_cpu.h"
#define LOWRANK_KEY CPU
#endif

namespace lowrank {
namespace {

Adam adam_of(double beta1, double beta2, double eps, double step_size, double decay) {
  return {static_cast<float>(beta1), static_cast<float>(beta2), static_cast<float>(1 - beta1),
          static_cast<float>(1 - beta2), static_cast<float>(eps), static_cast<float>(step_size),
          static_cast<float>(decay)};
}

bool is_matrix(const at::Tensor& t) {
  // no overlap, and one of the two dimensions dense; a dimension of one may have any stride
  const bool rows = (t.stride(1) == 1 || t.size(1) == 1) && t.stride(0) >= t.size(1);
  const bool columns = (t.stride(0) == 1 || t.size(0) == 1) && t.stride(1) >= t.size(0);
  return rows || columns || t.size(0) == 1 || t.size(1) == 1;
}

void check_moments(const at::Tensor& moment, const at::Tensor* scale, at::IntArrayRef shape) {
  TORCH_CHECK(moment.sizes() == shape && moment.is_contiguous(), "a moment is ", moment.sizes(),
              " with strides ", moment.strides(), "; it must be contiguous and ", shape);
  TORCH_CHECK(moment.scalar_type() == (scale ? at::kByte : at::kFloat), "a moment is ", moment.scalar_type());
  if (scale) {
    const int64_t blocks = (moment.numel() + kBlock - 1) / kBlock;
    TORCH_CHECK(scale->scalar_type() == at::kFloat && scale->is_contiguous() && scale->numel() == blocks,
                "the scales of 8-bit moments must be ", blocks, " contiguous float32 numbers, one for every ", kBlock,
                " elements");
  }
}

void check_layer(const at::Tensor& weight, const at::Tensor& grad, const at::Tensor& basis, bool left,
                 bool projected) {
  TORCH_CHECK(weight.dim() == 2 && grad.dim() == 2 && basis.dim() == 2, "weight, gradient and basis are matrices");
  const auto dtype = weight.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "a weight is ", dtype,
              "; it must be float32, bfloat16 or float16");
  TORCH_CHECK(basis.scalar_type() == dtype, "the basis is ", basis.scalar_type(), " and its weight ", dtype);
  TORCH_CHECK(grad.scalar_type() == (projected ? at::kFloat : dtype), "a gradient is ", grad.scalar_type(),
              " and its weight ", dtype, "; a projected one must be float32, another one of the weight's dtype");
  TORCH_CHECK(basis.size(0) == weight.size(left ? 0 : 1), "the basis is ", basis.sizes(), " for a weight of ",
              weight.sizes());
  const int64_t m = weight.size(0), n = weight.size(1), r = basis.size(1);
  const std::vector<int64_t> low = left ? std::vector<int64_t>{r, n} : std::vector<int64_t>{m, r};
  TORCH_CHECK(projected ? grad.sizes() == at::IntArrayRef(low) : grad.sizes() == weight.sizes(), "a gradient is ",
              grad.sizes(), " for a weight of ", weight.sizes());
  TORCH_CHECK(is_matrix(weight) && is_matrix(basis) && is_matrix(grad),
              "weight, gradient and basis must have a dense dimension and no overlap; their strides are ",
              weight.strides(), ", ", grad.strides(), ", ", basis.strides());
  TORCH_CHECK(weight.device() == grad.device() && weight.device() == basis.device(),
              "weight, gradient and basis must be on one device");
}

// What the CPU and the CUDA side take as arguments, in the order of the schema.
struct Step {
  std::vector<at::Tensor> weights, grads, bases, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, codes;
  bool left, projected, whole;
  Adam adam;
  std::optional<at::Tensor> scalars;

  bool quantized() const { return !codes.empty(); }

  void check() const {
    const size_t count = weights.size();
    TORCH_CHECK(grads.size() == count && bases.size() == count && exp_avgs.size() == count &&
                    exp_avg_sqs.size() == count,
                "the lists of tensors must be of one length");
    TORCH_CHECK(codes.empty() || codes.size() == 2, "codes are none, or the signed and the unsigned one");
    const size_t scales = quantized() ? count : 0;
    TORCH_CHECK(exp_avg_scales.size() == scales && exp_avg_sq_scales.size() == scales,
                "8-bit moments come with scales and codes, float32 ones without");
    for (const at::Tensor& code : codes) {
      TORCH_CHECK(code.scalar_type() == at::kFloat && code.is_contiguous() && code.numel() == kBlock,
                  "a code has 256 contiguous float32 entries");
    }
    for (size_t i = 0; i < count; ++i) {
      check_layer(weights[i], grads[i], bases[i], left, projected);
      const int64_t m = weights[i].size(0), n = weights[i].size(1), r = bases[i].size(1);
      const std::vector<int64_t> low = left ? std::vector<int64_t>{r, n} : std::vector<int64_t>{m, r};
      check_moments(exp_avgs[i], quantized() ? &exp_avg_scales[i] : nullptr, low);
      check_moments(exp_avg_sqs[i], quantized() ? &exp_avg_sq_scales[i] : nullptr, low);
    }
    if (scalars) {
      TORCH_CHECK(scalars->scalar_type() == at::kFloat && scalars->is_contiguous() && scalars->numel() == 3,
                  "scalars are three float32 numbers: eps, step_size, decay");
    }
  }
};

#if defined(LOWRANK_CUDA)

void* stream_of([[maybe_unused]] const at::Tensor& t) {
#if defined(LOWRANK_EMULATED)
  return nullptr;
#else
  return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(t.device()).native_handle();
#endif
}

void check_cuda(int code, const char* what) { TORCH_CHECK(code == 0, what, ": ", cuda_error(code)); }

Dtype dtype_of(const at::Tensor& t) {
  if (t.scalar_type() == at::kFloat) return Dtype::kFloat;
  return t.scalar_type() == at::kHalf ? Dtype::kHalf : Dtype::kBFloat16;
}

bool by_rows(const at::Tensor& t) { return t.size(1) == 1 || t.stride(1) == 1; }

Matrix matrix_of(const at::Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), by_rows(t) ? t.stride(0) : t.stride(1)};
}

// Layers that can share a launch: one shape, one dtype, one way of lying in memory.
bool alike(const Step& s, size_t i, size_t j) {
  return s.weights[i].sizes() == s.weights[j].sizes() && s.bases[i].size(1) == s.bases[j].size(1) &&
         s.weights[i].scalar_type() == s.weights[j].scalar_type() && s.weights[i].device() == s.weights[j].device() &&
         by_rows(s.weights[i]) == by_rows(s.weights[j]) && by_rows(s.grads[i]) == by_rows(s.grads[j]) &&
         by_rows(s.bases[i]) == by_rows(s.bases[j]);
}

// R of a layer by the library's product, float32.
void library_product(const at::Tensor& low, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor result = low;
  if (a.scalar_type() == at::kFloat) {
    at::mm_out(result, a, b);
  } else {
    at::mm_out(result, a, b, at::kFloat);
  }
}

void run_group(const Step& s, const std::vector<size_t>& members) {
  const at::Tensor& like = s.weights[members[0]];
  const c10::DeviceGuard guard(like.device());
  void* stream = stream_of(like);
  const float* scalars = s.scalars ? s.scalars->const_data_ptr<float>() : nullptr;
  const at::Tensor& moment = s.exp_avgs[members[0]];
  const auto count = static_cast<int64_t>(members.size());
  const auto options = like.options();
  // scratch of the caching allocator: a captured graph keeps it, and nothing waits
  const at::Tensor directions = at::empty({count, moment.size(0), moment.size(1)}, options);
  const bool in_epilogue = !s.projected && !s.whole && !s.quantized();
  at::Tensor low;
  if (!s.projected && !in_epilogue) low = at::empty(directions.sizes(), options.dtype(at::kFloat));

  Group group{};
  group.count = static_cast<int>(count);
  group.m = like.size(0), group.n = like.size(1), group.r = s.bases[members[0]].size(1);
  group.dtype = dtype_of(like);
  group.left = s.left;
  group.weight_rows = by_rows(like);
  group.grad_rows = by_rows(s.grads[members[0]]);
  group.basis_rows = by_rows(s.bases[members[0]]);
  std::vector<at::Tensor> given;
  for (int64_t k = 0; k < count; ++k) {
    const size_t i = members[k];
    Layer& layer = group.layer[k];
    layer.weight = matrix_of(s.weights[i]), layer.grad = matrix_of(s.grads[i]), layer.basis = matrix_of(s.bases[i]);
    layer.exp_avg = s.exp_avgs[i].mutable_data_ptr(), layer.exp_avg_sq = s.exp_avg_sqs[i].mutable_data_ptr();
    layer.exp_avg_scale = s.quantized() ? s.exp_avg_scales[i].mutable_data_ptr<float>() : nullptr;
    layer.exp_avg_sq_scale = s.quantized() ? s.exp_avg_sq_scales[i].mutable_data_ptr<float>() : nullptr;
    layer.direction = directions[k].mutable_data_ptr();
    if (s.projected) {
      given.push_back(s.grads[i].contiguous());
      layer.low_rank = const_cast<float*>(given.back().const_data_ptr<float>());
    } else if (!in_epilogue) {
      layer.low_rank = low[k].mutable_data_ptr<float>();
    }
  }
  if (in_epilogue) {
    check_cuda(cuda_project_adam(group, s.adam, scalars, stream), "projection");
  } else {
    if (!s.projected && s.whole) {
      for (int64_t k = 0; k < count; ++k) {
        const at::Tensor &grad = s.grads[members[k]], &basis = s.bases[members[k]];
        s.left ? library_product(low[k], basis.t(), grad) : library_product(low[k], grad, basis);
      }
    } else if (!s.projected) {
      check_cuda(cuda_project(group, stream), "projection");
    }
    Codes codes{};
    if (s.quantized()) codes = {s.codes[0].const_data_ptr<float>(), s.codes[1].const_data_ptr<float>()};
    check_cuda(cuda_adam(group, s.adam, scalars, s.quantized() ? &codes : nullptr, stream), "Adam");
  }
  if (!s.whole || scalars) {
    check_cuda(cuda_expand(group, s.adam, scalars, stream), "expansion");
    return;
  }
  for (int64_t k = 0; k < count; ++k) {
    at::Tensor weight = s.weights[members[k]];
    const at::Tensor &basis = s.bases[members[k]], direction = directions[k];
    const double decay = s.adam.decay, alpha = -decay * s.adam.step_size;
    s.left ? weight.addmm_(basis, direction, decay, alpha) : weight.addmm_(direction, basis.t(), decay, alpha);
  }
}

void run(const Step& s) {
  std::vector<bool> done(s.weights.size());
  for (size_t i = 0; i < s.weights.size(); ++i) {
    if (done[i]) continue;
    std::vector<size_t> members;
    for (size_t j = i; j < s.weights.size() && members.size() < kMaxLayers; ++j) {
      if (done[j] || !alike(s, i, j)) continue;
      members.push_back(j);
      done[j] = true;
    }
    if (s.weights[i].numel() > 0) run_group(s, members);
  }
}

#else

void run(const Step& s) {
  TORCH_CHECK(!s.scalars, "scalars on the device are for CUDA graphs");
  std::vector<CpuLayer> layers(s.weights.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i] = {s.weights[i], s.grads[i], s.bases[i], s.exp_avgs[i], s.exp_avg_sqs[i], {}, {}};
    if (s.quantized()) {
      layers[i].exp_avg_scale = s.exp_avg_scales[i];
      layers[i].exp_avg_sq_scale = s.exp_avg_sq_scales[i];
    }
  }
  CpuCodes codes;
  if (s.quantized()) codes = {s.codes[0].const_data_ptr<float>(), s.codes[1].const_data_ptr<float>()};
  cpu_galore_step(layers, codes, s.adam, s.left, s.projected, s.whole);
}

#endif

void galore_step_(at::TensorList weights, at::TensorList grads, at::TensorList bases, at::TensorList exp_avgs,
                  at::TensorList exp_avg_sqs, at::TensorList exp_avg_scales, at::TensorList exp_avg_sq_scales,
                  at::TensorList codes, bool left, bool projected, bool whole, double beta1, double beta2, double eps,
                  double step_size, double decay, const std::optional<at::Tensor>& scalars) {
  const Step step{weights.vec(), grads.vec(), bases.vec(), exp_avgs.vec(), exp_avg_sqs.vec(), exp_avg_scales.vec(),
                  exp_avg_sq_scales.vec(), codes.vec(), left, projected, whole,
                  adam_of(beta1, beta2, eps, step_size, decay), scalars};
  step.check();
  run(step);
}

at::Tensor velora_compress(const at::Tensor& x, const at::Tensor& vector) {
  TORCH_CHECK(vector.dim() == 1 && vector.size(0) > 0 && x.dim() > 0 && x.size(-1) % vector.size(0) == 0,
              "the vector is ", vector.sizes(), " for features of ", x.sizes());
  const at::Tensor from = x.contiguous(), v = vector.to(at::kFloat).contiguous();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() /= vector.size(0);
  at::Tensor z = at::empty(shape, x.options());
#if defined(LOWRANK_CUDA)
  const c10::DeviceGuard guard(x.device());
  const int64_t groups = shape.back(), rows = groups ? z.numel() / groups : 0;
  if (z.numel() > 0) {
    check_cuda(cuda_velora_compress(from.const_data_ptr(), v.const_data_ptr<float>(), z.mutable_data_ptr(), rows,
                                    groups, v.size(0), dtype_of(from), stream_of(x)),
               "sub-token projection");
  }
#else
  cpu_velora_compress(from, v, z);
#endif
  return z;
}

void velora_step_(const at::Tensor& weight, const at::Tensor& factor, const at::Tensor& vector,
                  const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, double beta1, double beta2, double eps,
                  double step_size, double decay, const std::optional<at::Tensor>& scalars) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "the weight must be a contiguous matrix");
  TORCH_CHECK(vector.dim() == 1 && vector.scalar_type() == at::kFloat && vector.is_contiguous(),
              "the vector must be contiguous float32");
  TORCH_CHECK(factor.dim() == 2 && factor.scalar_type() == at::kFloat && factor.is_contiguous() &&
                  factor.size(0) == weight.size(0) && factor.size(1) * vector.size(0) == weight.size(1),
              "the factor is ", factor.scalar_type(), " ", factor.sizes(), " for a weight of ", weight.sizes(),
              " and a vector of ", vector.sizes(), "; it must be contiguous float32 (m, D / M)");
  check_moments(exp_avg, nullptr, factor.sizes());
  check_moments(exp_avg_sq, nullptr, factor.sizes());
  const Adam adam = adam_of(beta1, beta2, eps, step_size, decay);
#if defined(LOWRANK_CUDA)
  const c10::DeviceGuard guard(weight.device());
  if (weight.numel() > 0) {
    check_cuda(cuda_velora_step(weight.mutable_data_ptr(), factor.const_data_ptr<float>(),
                                vector.const_data_ptr<float>(), exp_avg.mutable_data_ptr<float>(),
                                exp_avg_sq.mutable_data_ptr<float>(), weight.size(0), factor.size(1), vector.size(0),
                                dtype_of(weight), adam, scalars ? scalars->const_data_ptr<float>() : nullptr,
                                stream_of(weight)),
               "factored step");
  }
#else
  TORCH_CHECK(!scalars, "scalars on the device are for CUDA graphs");
  cpu_velora_step(weight, factor, vector, exp_avg, exp_avg_sq, adam);
#endif
}

}  // namespace

TORCH_LIBRARY_IMPL(lowrank, LOWRANK_KEY, m) {
  m.impl("galore_step_", galore_step_);
  m.impl("velora_compress", velora_compress);
  m.impl("velora_step_", velora_step_);
}

}  // namespace lowrank
