// The fused step on a GPU; launchers and shapes are in projection.h.
//
// One tiled product serves all four cases, C (M, N) = A (M, K) B (K, N), with A and B stored by rows or by columns:
//   project, right   R = G Q         A = G,    B = Q         epilogue: Adam, or R itself
//   project, left    R = P^T G       A = P^T,  B = G
//   expand, right    W += N Q^T      A = N,    B = Q^T       epilogue: decay and accumulate into W
//   expand, left     W += P N        A = P,    B = N
//   expand into a weight that is stored by columns is the transpose: W^T += Q N^T, or N^T P^T.
// A thread block makes one tile of one layer; the layers of a group are the grid's third dimension. Each element is
// summed by one thread block in one order, without atomics: the same numbers every time.

#include "product.cuh"

namespace lowrank {
namespace {

// ---- Adam on a given R

struct Stretch {
  const float* low_rank[kMaxLayers];
  void* exp_avg[kMaxLayers];
  void* exp_avg_sq[kMaxLayers];
  float* exp_avg_scale[kMaxLayers];
  float* exp_avg_sq_scale[kMaxLayers];
  void* direction[kMaxLayers];
  int64_t size;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const __grid_constant__ Stretch s, Adam given, const float* scalars) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.size) return;
  const int layer = blockIdx.y;
  const Adam a = with_scalars(given, scalars);
  float* means = static_cast<float*>(s.exp_avg[layer]);
  float* squares = static_cast<float*>(s.exp_avg_sq[layer]);
  float mean = means[i], square = squares[i];
  const float direction = adam(a, clamp_gradient(s.low_rank[layer][i]), mean, square);
  means[i] = mean;
  squares[i] = square;
  static_cast<T*>(s.direction[layer])[i] = from_float<T>(direction);
}

// The largest magnitude of a warp's values, for all its lanes; NaN if there is one, so that a broken moment shows.
__device__ __forceinline__ float warp_largest(const float* values, int count) {
  float most = 0.0f, poison = 0.0f;
  for (int k = 0; k < count; ++k) {
    most = fmaxf(most, fabsf(values[k]));
    poison += values[k] * 0.0f;
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    poison += __shfl_xor_sync(0xffffffffu, poison, offset);
  }
  return most + poison;
}

// A warp has a block of 256 moments, 8 of them a lane.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    adam_8bit_kernel(const __grid_constant__ Stretch s, Codes codes, Adam given, const float* scalars) {
  constexpr int kPerLane = kBlock / kWarp;
  __shared__ float code[2][kBlock];
  __shared__ float midpoints[2][kBlock];
  for (int i = threadIdx.x; i < kBlock; i += kThreads) {
    code[0][i] = codes.signed_code[i];
    code[1][i] = codes.unsigned_code[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBlock - 1; i += kThreads) {
    midpoints[0][i] = 0.5f * (code[0][i] + code[0][i + 1]);
    midpoints[1][i] = 0.5f * (code[1][i] + code[1][i + 1]);
  }
  __syncthreads();
  const int layer = blockIdx.y, lane = threadIdx.x % kWarp;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t begin = block * kBlock;
  // a whole warp leaves together
  if (begin >= s.size) return;
  const Adam a = with_scalars(given, scalars);
  uint8_t* means = static_cast<uint8_t*>(s.exp_avg[layer]);
  uint8_t* squares = static_cast<uint8_t*>(s.exp_avg_sq[layer]);
  const float mean_scale = s.exp_avg_scale[layer][block], square_scale = s.exp_avg_sq_scale[layer][block];
  float mean[kPerLane], square[kPerLane];
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int64_t i = begin + lane + k * kWarp;
    mean[k] = square[k] = 0.0f;
    if (i < s.size) {
      mean[k] = code[0][means[i]] * mean_scale;
      square[k] = code[1][squares[i]] * square_scale;
      const float direction = adam(a, clamp_gradient(s.low_rank[layer][i]), mean[k], square[k]);
      static_cast<T*>(s.direction[layer])[i] = from_float<T>(direction);
    }
  }
  const float mean_most = warp_largest(mean, kPerLane), square_most = warp_largest(square, kPerLane);
  const float mean_inverse = inverse_scale(mean_most), square_inverse = inverse_scale(square_most);
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int64_t i = begin + lane + k * kWarp;
    if (i < s.size) {
      means[i] = static_cast<uint8_t>(nearest(midpoints[0], mean[k] * mean_inverse));
      squares[i] = static_cast<uint8_t>(nearest(midpoints[1], square[k] * square_inverse));
    }
  }
  // the scales were read above by every lane, and warp_largest has brought the lanes together since
  if (lane == 0) {
    s.exp_avg_scale[layer][block] = mean_most;
    s.exp_avg_sq_scale[layer][block] = square_most;
  }
}

// ---- VeLoRA

// A warp makes one number: the sum over a sub-token, in an order that depends on nothing but its size.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    velora_compress_kernel(const T* x, const float* vector, T* z, int64_t total, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= total) return;
  const int lane = threadIdx.x % kWarp;
  float sum = 0.0f;
  for (int64_t j = lane; j < size; j += kWarp) sum += to_float(x[i * size + j]) * vector[j];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane == 0) z[i] = from_float<T>(sum);
}

// A thread block has one row: first the moments of its groups, then its weights.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    velora_step_kernel(T* weight, const float* factor, const float* vector, float* exp_avg, float* exp_avg_sq,
                       int64_t groups, int64_t size, Adam given, const float* scalars) {
  const Adam a = with_scalars(given, scalars);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * groups;
  for (int64_t g = first + threadIdx.x; g < first + groups; g += kThreads) {
    adam(a, clamp_gradient(factor[g]), exp_avg[g], exp_avg_sq[g]);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < groups * size; i += kThreads) {
    const int64_t g = first + i / size;
    T* to = weight + first * size + i;
    *to = from_float<T>(moved_along(a, to_float(*to), exp_avg[g], sqrtf(exp_avg_sq[g]), vector[i % size]));
  }
}

// ---- launching

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, bool kARows, bool kBRows, Epilogue kEpilogue>
int launch(const Jobs& jobs, int count, const Adam& a, const float* scalars, void* stream) {
  using P = Product<T, kARows, kBRows>;
  constexpr int kBytes = shared_bytes<T, kARows, kBRows>();
  const int64_t down = divided(jobs.rows, P::kM);
  // the grid's second dimension ends at 65,535: 4 million rows
  if (down > 65535) return static_cast<int>(cudaErrorInvalidConfiguration);
  const auto kernel = product_kernel<T, kARows, kBRows, kEpilogue>;
  // above 48 KiB a kernel has to ask, once for every device; asking again costs little
  const cudaError_t asked = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (asked != cudaSuccess) return static_cast<int>(asked);
  const dim3 grid(static_cast<unsigned>(divided(jobs.cols, P::kN)), static_cast<unsigned>(down),
                  static_cast<unsigned>(count));
  LOWRANK_LAUNCH(kernel, grid, dim3(kThreads), kBytes, stream, jobs, a, scalars);
  return static_cast<int>(cudaGetLastError());
}

template <typename T, Epilogue kEpilogue>
int launch_layouts(bool a_rows, bool b_rows, const Jobs& jobs, int count, const Adam& a, const float* scalars,
                   void* stream) {
  if (a_rows && b_rows) return launch<T, true, true, kEpilogue>(jobs, count, a, scalars, stream);
  if (a_rows) return launch<T, true, false, kEpilogue>(jobs, count, a, scalars, stream);
  if (b_rows) return launch<T, false, true, kEpilogue>(jobs, count, a, scalars, stream);
  return launch<T, false, false, kEpilogue>(jobs, count, a, scalars, stream);
}

template <Epilogue kEpilogue>
int launch_dtype(Dtype dtype, bool a_rows, bool b_rows, const Jobs& jobs, int count, const Adam& a,
                 const float* scalars, void* stream) {
  switch (dtype) {
    case Dtype::kFloat:
      return launch_layouts<float, kEpilogue>(a_rows, b_rows, jobs, count, a, scalars, stream);
    case Dtype::kBFloat16:
      return launch_layouts<__nv_bfloat16, kEpilogue>(a_rows, b_rows, jobs, count, a, scalars, stream);
    default:
      return launch_layouts<__half, kEpilogue>(a_rows, b_rows, jobs, count, a, scalars, stream);
  }
}

template <Epilogue kEpilogue>
int project(const Group& g, const Adam& a, const float* scalars, void* stream) {
  Jobs jobs{};
  jobs.rows = g.left ? g.r : g.m, jobs.cols = g.left ? g.n : g.r, jobs.depth = g.left ? g.m : g.n;
  for (int i = 0; i < g.count; ++i) {
    const Layer& layer = g.layer[i];
    Job& job = jobs.job[i];
    const Matrix &first = g.left ? layer.basis : layer.grad, &second = g.left ? layer.grad : layer.basis;
    job.a = first.data, job.a_stride = first.stride;
    job.b = second.data, job.b_stride = second.stride;
    job.c = layer.low_rank;
    job.exp_avg = static_cast<float*>(layer.exp_avg), job.exp_avg_sq = static_cast<float*>(layer.exp_avg_sq);
    job.direction = layer.direction;
  }
  // on the left A is P^T: what P has by rows, P^T has by columns
  const bool a_rows = g.left ? !g.basis_rows : g.grad_rows, b_rows = g.left ? g.grad_rows : g.basis_rows;
  return launch_dtype<kEpilogue>(g.dtype, a_rows, b_rows, jobs, g.count, a, scalars, stream);
}

Stretch stretch_of(const Group& g) {
  Stretch s{};
  s.size = g.left ? g.r * g.n : g.m * g.r;
  for (int i = 0; i < g.count; ++i) {
    const Layer& layer = g.layer[i];
    s.low_rank[i] = layer.low_rank;
    s.exp_avg[i] = layer.exp_avg, s.exp_avg_sq[i] = layer.exp_avg_sq;
    s.exp_avg_scale[i] = layer.exp_avg_scale, s.exp_avg_sq_scale[i] = layer.exp_avg_sq_scale;
    s.direction[i] = layer.direction;
  }
  return s;
}

template <typename T>
int adam_of(const Group& g, const Adam& a, const float* scalars, const Codes* codes, void* stream) {
  const Stretch s = stretch_of(g);
  const int64_t per_block = codes ? kThreads / kWarp * kBlock : kThreads;
  const dim3 grid(static_cast<unsigned>(divided(s.size, per_block)), static_cast<unsigned>(g.count));
  if (codes) {
    LOWRANK_LAUNCH(adam_8bit_kernel<T>, grid, dim3(kThreads), 0, stream, s, *codes, a, scalars);
  } else {
    LOWRANK_LAUNCH(adam_kernel<T>, grid, dim3(kThreads), 0, stream, s, a, scalars);
  }
  return static_cast<int>(cudaGetLastError());
}

template <typename T>
int compress_of(const void* x, const float* vector, void* z, int64_t total, int64_t size, void* stream) {
  const dim3 grid(static_cast<unsigned>(divided(total, kThreads / kWarp)));
  LOWRANK_LAUNCH(velora_compress_kernel<T>, grid, dim3(kThreads), 0, stream, static_cast<const T*>(x), vector,
                 static_cast<T*>(z), total, size);
  return static_cast<int>(cudaGetLastError());
}

template <typename T>
int velora_step_of(void* weight, const float* factor, const float* vector, float* exp_avg, float* exp_avg_sq,
                   int64_t m, int64_t groups, int64_t size, const Adam& a, const float* scalars, void* stream) {
  LOWRANK_LAUNCH(velora_step_kernel<T>, dim3(static_cast<unsigned>(m)), dim3(kThreads), 0, stream,
                 static_cast<T*>(weight), factor, vector, exp_avg, exp_avg_sq, groups, size, a, scalars);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int cuda_project_adam(const Group& group, const Adam& a, const float* scalars, void* stream) {
  return project<Epilogue::kAdam>(group, a, scalars, stream);
}

int cuda_project(const Group& group, void* stream) {
  return project<Epilogue::kStore>(group, Adam{}, nullptr, stream);
}

int cuda_adam(const Group& group, const Adam& a, const float* scalars, const Codes* codes, void* stream) {
  switch (group.dtype) {
    case Dtype::kFloat:
      return adam_of<float>(group, a, scalars, codes, stream);
    case Dtype::kBFloat16:
      return adam_of<__nv_bfloat16>(group, a, scalars, codes, stream);
    default:
      return adam_of<__half>(group, a, scalars, codes, stream);
  }
}

int cuda_expand(const Group& g, const Adam& a, const float* scalars, void* stream) {
  // a weight by columns is W^T (n, m) by rows: the operands change places and each is transposed
  const bool turned = !g.weight_rows;
  Jobs jobs{};
  jobs.rows = turned ? g.n : g.m, jobs.cols = turned ? g.m : g.n, jobs.depth = g.r;
  for (int i = 0; i < g.count; ++i) {
    const Layer& layer = g.layer[i];
    Job& job = jobs.job[i];
    const Matrix direction{layer.direction, g.left ? g.n : g.r};
    // P N, N Q^T; turned: N^T P^T, Q N^T. The basis comes first on one side of them and second on the other.
    const bool basis_first = g.left != turned;
    const Matrix &first = basis_first ? layer.basis : direction, &second = basis_first ? direction : layer.basis;
    job.a = first.data, job.a_stride = first.stride;
    job.b = second.data, job.b_stride = second.stride;
    job.c = layer.weight.data, job.c_stride = layer.weight.stride;
  }
  // plain: P and N, or N and Q^T; turned: N^T and P^T, or Q and N^T; N itself is by rows
  bool a_rows, b_rows;
  if (!turned) {
    a_rows = g.left ? g.basis_rows : true;
    b_rows = g.left ? true : !g.basis_rows;
  } else {
    a_rows = g.left ? false : g.basis_rows;
    b_rows = g.left ? !g.basis_rows : false;
  }
  return launch_dtype<Epilogue::kExpand>(g.dtype, a_rows, b_rows, jobs, g.count, a, scalars, stream);
}

int cuda_velora_compress(const void* x, const float* vector, void* z, int64_t rows, int64_t groups, int64_t size,
                         Dtype dtype, void* stream) {
  const int64_t total = rows * groups;
  switch (dtype) {
    case Dtype::kFloat:
      return compress_of<float>(x, vector, z, total, size, stream);
    case Dtype::kBFloat16:
      return compress_of<__nv_bfloat16>(x, vector, z, total, size, stream);
    default:
      return compress_of<__half>(x, vector, z, total, size, stream);
  }
}

int cuda_velora_step(void* weight, const float* factor, const float* vector, float* exp_avg, float* exp_avg_sq,
                     int64_t m, int64_t groups, int64_t size, Dtype dtype, const Adam& a, const float* scalars,
                     void* stream) {
  switch (dtype) {
    case Dtype::kFloat:
      return velora_step_of<float>(weight, factor, vector, exp_avg, exp_avg_sq, m, groups, size, a, scalars, stream);
    case Dtype::kBFloat16:
      return velora_step_of<__nv_bfloat16>(weight, factor, vector, exp_avg, exp_avg_sq, m, groups, size, a, scalars,
                                           stream);
    default:
      return velora_step_of<__half>(weight, factor, vector, exp_avg, exp_avg_sq, m, groups, size, a, scalars, stream);
  }
}

const char* cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace lowrank
