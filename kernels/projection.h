// What the CPU source, the CUDA source and the bindings share: the arithmetic of one element, and the CUDA launchers.
//
// No header of torch, and none of CUDA: the host, the device and the tests compile this file.
// Shapes: a weight W and its gradient G are (m, n); the basis P is (m, r) on the left, Q (n, r) on the right; the
// projected gradient R, Adam's moments M and V and the direction N are (r, n) on the left, (m, r) on the right.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LOWRANK_FN __host__ __device__ inline
#else
#define LOWRANK_FN inline
#endif

namespace lowrank {

// elements that share a scale in 8-bit moments
constexpr int kBlock = 256;
// gradients are cut to this, whose square float32 still holds
constexpr float kLargest = 1e18f;

// Adam's numbers of one step. The bias corrections are in `step_size` and `eps`, worked out in double by the caller:
// W <- decay * (W - step_size * N Q^T) with N = M / (sqrt(V) + eps).
struct Adam {
  float beta1, beta2;
  // 1 - beta from double: in float32 1 - 0.999f is wrong in the fifth digit
  float rest1, rest2;
  float eps, step_size, decay;
};

// NaN stays NaN, and infinity becomes NaN: a weight that is broken shows it.
LOWRANK_FN float clamp_gradient(float grad) {
  const float low = grad > kLargest ? kLargest : grad;
  return (low < -kLargest ? -kLargest : low) + 0.0f * grad;
}

// Takes both moments one step on; returns the direction M / (sqrt(V) + eps).
LOWRANK_FN float adam(const Adam& a, float grad, float& mean, float& square) {
  mean = a.beta1 * mean + a.rest1 * grad;
  square = a.beta2 * square + a.rest2 * (grad * grad);
  return mean / (std::sqrt(square) + a.eps);
}

// The weight after the step, from the product of direction and basis.
LOWRANK_FN float moved(const Adam& a, float weight, float product) {
  return a.decay * (weight - a.step_size * product);
}

// The weight after a step along F (x) v, v one entry of the vector: the dense Adam of F (x) v. VeLoRA.
LOWRANK_FN float moved_along(const Adam& a, float weight, float mean, float root, float v) {
  return a.decay * (weight - a.step_size * (mean * v) / (root * std::fabs(v) + a.eps));
}

// Index of the entry nearest to x among 256 sorted ones, from the 255 midpoints between them; a tie goes down.
// Without branches or a loop, so that a compiler makes vectors of it.
LOWRANK_FN int nearest(const float* midpoints, float x) {
  int index = x > midpoints[127] ? 128 : 0;
  index += x > midpoints[index + 63] ? 64 : 0;
  index += x > midpoints[index + 31] ? 32 : 0;
  index += x > midpoints[index + 15] ? 16 : 0;
  index += x > midpoints[index + 7] ? 8 : 0;
  index += x > midpoints[index + 3] ? 4 : 0;
  index += x > midpoints[index + 1] ? 2 : 0;
  return index + (x > midpoints[index] ? 1 : 0);
}

// The factor that takes a block's moments to [-1, 1]; a block of zeros stays zeros.
LOWRANK_FN float inverse_scale(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// ---- CUDA. Each launcher returns a cudaError_t as an int, 0 for success, and never waits for the device.

enum class Dtype : int { kFloat, kBFloat16, kHalf };

// layers of a launch; their pointers are kernel arguments, of which there are 4 KiB
constexpr int kMaxLayers = 32;

// A matrix in memory: by rows, element (i, j) at i * stride + j; otherwise at i + j * stride.
struct Matrix {
  void* data;
  int64_t stride;
};

struct Layer {
  Matrix weight, grad, basis;
  void* exp_avg;     // float32, or uint8 with scales
  void* exp_avg_sq;  // likewise
  float* exp_avg_scale;
  float* exp_avg_sq_scale;
  float* low_rank;  // R, float32, contiguous; read when it is given or came from a library, else scratch
  void* direction;  // N, in the weight's dtype, contiguous: scratch
};

// Same-shaped layers of one launch.
struct Group {
  Layer layer[kMaxLayers];
  int count;
  int64_t m, n, r;
  Dtype dtype;
  bool left, weight_rows, grad_rows, basis_rows;
};

// Codes of 8-bit moments on the device: 256 entries of each, sorted.
struct Codes {
  const float *signed_code, *unsigned_code;
};

// `scalars` may be null; otherwise eps, step_size and decay come from these three floats on the device, so that a
// captured graph can be replayed with other ones.

// R = P^T G or G Q, then Adam on float32 moments in its epilogue: writes moments and direction.
int cuda_project_adam(const Group& group, const Adam& adam, const float* scalars, void* stream);
// R = P^T G or G Q in float32, nothing more.
int cuda_project(const Group& group, void* stream);
// Adam on a given R, with float32 moments, or 8-bit ones where codes are given: writes moments and direction.
int cuda_adam(const Group& group, const Adam& adam, const float* scalars, const Codes* codes, void* stream);
// W <- decay * (W - step_size * P N) or (... N Q^T).
int cuda_expand(const Group& group, const Adam& adam, const float* scalars, void* stream);
// z[i, g] = sum_j x[i, g M + j] v[j]: x (rows, groups * size) contiguous, v float32 (size,), z (rows, groups).
int cuda_velora_compress(const void* x, const float* vector, void* z, int64_t rows, int64_t groups, int64_t size,
                         Dtype dtype, void* stream);
// Moments of F (m, groups), then W (m, groups * size), both contiguous.
int cuda_velora_step(void* weight, const float* factor, const float* vector, float* exp_avg, float* exp_avg_sq,
                     int64_t m, int64_t groups, int64_t size, Dtype dtype, const Adam& adam, const float* scalars,
                     void* stream);
const char* cuda_error(int code);

}  // namespace lowrank
