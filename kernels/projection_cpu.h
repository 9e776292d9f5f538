// The CPU side of the ops; see projection.h for the shapes.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "projection.h"

namespace lowrank {

// One layer of a step, checked by the bindings.
struct CpuLayer {
  at::Tensor weight, grad, basis, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale;
};

// 256 sorted entries each, or null for float32 moments.
struct CpuCodes {
  const float *signed_code = nullptr, *unsigned_code = nullptr;
};

void cpu_galore_step(const std::vector<CpuLayer>& layers, const CpuCodes& codes, const Adam& adam, bool left,
                     bool projected, bool whole);
void cpu_velora_compress(const at::Tensor& x, const at::Tensor& vector, const at::Tensor& z);
void cpu_velora_step(const at::Tensor& weight, const at::Tensor& factor, const at::Tensor& vector,
                     const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const Adam& adam);

}  // namespace lowrank
