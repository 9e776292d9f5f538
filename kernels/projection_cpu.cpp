// The fused step on a CPU: a block of rows (right basis) or columns (left basis) at a time, so that gradient, moments,
// direction and weight of a block are in the cache together; the library's matrix product inside.
//
// A task is a block of a layer; tasks of all layers share the threads. Within a task everything is one thread's.

#include "projection_cpu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>

#include <algorithm>

namespace lowrank {
namespace {

// bytes of gradient and weight that a block may take: half of a usual second-level cache
constexpr int64_t kCacheBytes = 1 << 20;

// The matrix without gaps between its lines. The library's bfloat16 product reads a gap where the depth is odd, times
// zero, and a NaN there would come through (torch 2.13, oneDNN 3.12).
at::Tensor gapless(const at::Tensor& t) {
  const bool plain = t.scalar_type() != at::kBFloat16 || t.is_contiguous() || t.t().is_contiguous();
  return plain ? t : t.contiguous();
}

// out = a b in float32. bfloat16 goes through the library's bfloat16 product, which accumulates in float32 and rounds
// once (torch has no public product of bfloat16 into float32 on a CPU); float16 through float32, since a product of two
// float16 matrices can leave float16's range.
void product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor result = out;
  if (a.scalar_type() == at::kBFloat16) {
    result.copy_(at::mm(gapless(a), gapless(b)));
  } else {
    at::mm_out(result, a.to(at::kFloat), b.to(at::kFloat));
  }
}

// Direction over a contiguous stretch of moments, in place of the gradient.
void adam_float(const Adam& a, float* __restrict grad, float* __restrict mean, float* __restrict square,
                int64_t size) {
  for (int64_t i = 0; i < size; ++i) grad[i] = adam(a, clamp_gradient(grad[i]), mean[i], square[i]);
}

struct Tables {
  const float* code;
  float midpoints[kBlock - 1];

  explicit Tables(const float* entries) : code(entries) {
    for (int i = 0; i + 1 < kBlock; ++i) midpoints[i] = code ? 0.5f * (code[i] + code[i + 1]) : 0.0f;
  }
};

// The largest magnitude; NaN if any entry is, so that a broken moment shows.
float largest(const float* values, int size) {
  float most = 0.0f, sum = 0.0f;
#pragma omp simd reduction(max : most) reduction(+ : sum)
  for (int i = 0; i < size; ++i) {
    most = std::max(most, std::fabs(values[i]));
    sum += values[i] * 0.0f;
  }
  return most + sum;
}

void quantize(const float* __restrict midpoints, const float* __restrict values, uint8_t* __restrict out,
              float* scale, int size) {
  *scale = largest(values, size);
  const float inverse = inverse_scale(*scale);
#pragma omp simd
  for (int i = 0; i < size; ++i) out[i] = static_cast<uint8_t>(nearest(midpoints, values[i] * inverse));
}

void dequantize(const float* __restrict code, const uint8_t* __restrict from, float scale, float* __restrict values,
                int size) {
#pragma omp simd
  for (int i = 0; i < size; ++i) values[i] = code[from[i]] * scale;
}

// The same on 8-bit moments; `begin` is the stretch's place in them, a multiple of 256.
void adam_8bit(const Adam& a, float* grad, const CpuLayer& layer, int64_t begin, int64_t size, const Tables& first,
               const Tables& second) {
  auto* means = layer.exp_avg.mutable_data_ptr<uint8_t>() + begin;
  auto* squares = layer.exp_avg_sq.mutable_data_ptr<uint8_t>() + begin;
  auto* mean_scales = layer.exp_avg_scale.mutable_data_ptr<float>() + begin / kBlock;
  auto* square_scales = layer.exp_avg_sq_scale.mutable_data_ptr<float>() + begin / kBlock;
  float mean[kBlock], square[kBlock];
  for (int64_t start = 0; start < size; start += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, size - start));
    const int64_t block = start / kBlock;
    dequantize(first.code, means + start, mean_scales[block], mean, count);
    dequantize(second.code, squares + start, square_scales[block], square, count);
    adam_float(a, grad + start, mean, square, count);
    quantize(first.midpoints, mean, means + start, mean_scales + block, count);
    quantize(second.midpoints, square, squares + start, square_scales + block, count);
  }
}

// Adam on rows x cols of R (contiguous there), whose moments begin at `begin` and have rows `stride` apart.
void adam_block(const Adam& a, float* grad, const CpuLayer& layer, int64_t begin, int64_t rows, int64_t cols,
                int64_t stride, const Tables& first, const Tables& second) {
  if (cols == stride) {
    // one stretch: blocks of 8-bit moments may run over the ends of rows
    cols *= rows;
    rows = 1;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t place = begin + i * stride;
    if (first.code) {
      adam_8bit(a, grad + i * cols, layer, place, cols, first, second);
    } else {
      adam_float(a, grad + i * cols, layer.exp_avg.mutable_data_ptr<float>() + place,
                 layer.exp_avg_sq.mutable_data_ptr<float>() + place, cols);
    }
  }
}

// W <- decay * (W - step_size * a b): one product that accumulates into the weight and rounds once.
void expand(const at::Tensor& weight, const at::Tensor& a, const at::Tensor& b, const Adam& adam) {
  at::Tensor result = weight;
  result.addmm_(gapless(a), gapless(b), adam.decay, -static_cast<double>(adam.decay) * adam.step_size);
}

at::Tensor slice(const at::Tensor& t, bool left, int64_t begin, int64_t size) {
  return t.narrow(left ? 1 : 0, begin, size);
}

// The step on `size` rows (right) or columns (left) of a layer from `begin`.
void step_block(const CpuLayer& layer, const Tables& first, const Tables& second, const Adam& adam, bool left,
                bool projected, int64_t begin, int64_t size) {
  const int64_t rank = layer.basis.size(1), stride = layer.exp_avg.size(1);
  const auto shape = left ? std::vector<int64_t>{rank, size} : std::vector<int64_t>{size, rank};
  at::Tensor low = at::empty(shape, layer.weight.options().dtype(at::kFloat));
  const at::Tensor grad = slice(layer.grad, left, begin, size);
  if (projected) {
    low.copy_(grad);
  } else if (left) {
    product(low, layer.basis.t(), grad);
  } else {
    product(low, grad, layer.basis);
  }
  adam_block(adam, low.mutable_data_ptr<float>(), layer, left ? begin : begin * rank, shape[0], shape[1], stride,
             first, second);
  const at::Tensor direction = low.to(layer.weight.scalar_type());
  const at::Tensor weight = slice(layer.weight, left, begin, size);
  if (left) {
    expand(weight, layer.basis, direction, adam);
  } else {
    expand(weight, direction, layer.basis.t(), adam);
  }
}

// Library products over the whole layer, with their own threads, around Adam in pieces.
void step_whole(const CpuLayer& layer, const Tables& first, const Tables& second, const Adam& adam, bool left,
                bool projected) {
  at::Tensor low;
  if (projected) {
    low = at::empty(layer.grad.sizes(), layer.grad.options().dtype(at::kFloat)).copy_(layer.grad);
  } else {
    low = at::empty(layer.exp_avg.sizes(), layer.weight.options().dtype(at::kFloat));
    if (left) {
      product(low, layer.basis.t(), layer.grad);
    } else {
      product(low, layer.grad, layer.basis);
    }
  }
  float* values = low.mutable_data_ptr<float>();
  const int64_t blocks = (low.numel() + kBlock - 1) / kBlock;
  at::parallel_for(0, blocks, 64, [&](int64_t from, int64_t to) {
    const int64_t begin = from * kBlock, size = std::min(to * kBlock, low.numel()) - begin;
    adam_block(adam, values + begin, layer, begin, 1, size, size, first, second);
  });
  const at::Tensor direction = low.to(layer.weight.scalar_type());
  if (left) {
    expand(layer.weight, layer.basis, direction, adam);
  } else {
    expand(layer.weight, direction, layer.basis.t(), adam);
  }
}

// Rows or columns of a block: enough to keep a product efficient, few enough for the cache, whole blocks of moments.
int64_t block_size(const CpuLayer& layer, bool left) {
  const int64_t length = layer.weight.size(left ? 0 : 1);
  const int64_t fit = kCacheBytes / (2 * length * layer.weight.element_size());
  return std::max<int64_t>(kBlock, fit / kBlock * kBlock);
}

struct Task {
  size_t layer;
  int64_t begin, size;
};

// z = sub-tokens of x times v, accumulated in float32.
template <typename T>
void compress(const at::Tensor& x, const at::Tensor& vector, const at::Tensor& z) {
  const int64_t size = vector.size(0);
  const T* from = x.const_data_ptr<T>();
  const float* v = vector.const_data_ptr<float>();
  T* to = z.mutable_data_ptr<T>();
  at::parallel_for(0, z.numel(), std::max<int64_t>(1, 16384 / size), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < size; ++j) sum += static_cast<float>(from[i * size + j]) * v[j];
      to[i] = static_cast<T>(sum);
    }
  });
}

// The moments of F, then the weight along F (x) v: one pass over each.
template <typename T>
void step_along(const at::Tensor& weight, const at::Tensor& factor, const at::Tensor& vector,
                const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, Adam a) {
  const int64_t size = vector.size(0);
  const float* grad = factor.const_data_ptr<float>();
  const float* v = vector.const_data_ptr<float>();
  float* means = exp_avg.mutable_data_ptr<float>();
  float* squares = exp_avg_sq.mutable_data_ptr<float>();
  T* weights = weight.mutable_data_ptr<T>();
  at::parallel_for(0, factor.numel(), std::max<int64_t>(1, 16384 / size), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      adam(a, clamp_gradient(grad[i]), means[i], squares[i]);
      const float mean = means[i], root = std::sqrt(squares[i]);
      T* __restrict row = weights + i * size;
      for (int64_t j = 0; j < size; ++j) {
        row[j] = static_cast<T>(moved_along(a, static_cast<float>(row[j]), mean, root, v[j]));
      }
    }
  });
}

}  // namespace

void cpu_galore_step(const std::vector<CpuLayer>& layers, const CpuCodes& codes, const Adam& adam, bool left,
                     bool projected, bool whole) {
  const Tables first(codes.signed_code), second(codes.unsigned_code);
  std::vector<Task> tasks;
  for (size_t i = 0; i < layers.size(); ++i) {
    const CpuLayer& layer = layers[i];
    const int64_t size = layer.weight.size(left ? 1 : 0), block = block_size(layer, left);
    // blocks of 8-bit moments that run over the ends of rows cannot be cut by columns
    const bool ragged = left && first.code && size % kBlock != 0;
    if (whole || ragged) {
      step_whole(layer, first, second, adam, left, projected);
      continue;
    }
    for (int64_t begin = 0; begin < size; begin += block) tasks.push_back({i, begin, std::min(block, size - begin)});
  }
  if (static_cast<int64_t>(tasks.size()) < at::get_num_threads()) {
    // too few to keep the threads busy: those of the library divide the products further
    for (size_t i = 0; i < tasks.size(); ++i) {
      if (tasks[i].begin == 0) step_whole(layers[tasks[i].layer], first, second, adam, left, projected);
    }
    return;
  }
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t from, int64_t to) {
    // the other threads do not know that the caller is below autograd
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t i = from; i < to; ++i) {
      const Task& task = tasks[i];
      step_block(layers[task.layer], first, second, adam, left, projected, task.begin, task.size);
    }
  });
}

void cpu_velora_compress(const at::Tensor& x, const at::Tensor& vector, const at::Tensor& z) {
  if (x.scalar_type() == at::kFloat) {
    // the library's product with a vector is faster than a loop over short sub-tokens
    at::Tensor flat = z.view(-1);
    at::mv_out(flat, x.view({-1, vector.size(0)}), vector);
    return;
  }
  AT_DISPATCH_REDUCED_FLOATING_TYPES(x.scalar_type(), "velora_compress",
                                     [&] { compress<scalar_t>(x, vector, z); });
}

void cpu_velora_step(const at::Tensor& weight, const at::Tensor& factor, const at::Tensor& vector,
                     const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const Adam& adam) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, weight.scalar_type(), "velora_step",
      [&] { step_along<scalar_t>(weight, factor, vector, exp_avg, exp_avg_sq, adam); });
}

}  // namespace lowrank
