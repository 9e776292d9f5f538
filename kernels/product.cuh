// The tiled product of projection.cu: types, tiles in shared memory, tensor cores, and what becomes of each element.
//
// C (M, N) = A (M, K) B (K, N), A and B stored by rows or by columns. Included by projection.cu alone.

#pragma once

#if defined(LOWRANK_EMULATED)
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <mma.h>
#define LOWRANK_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define LOWRANK_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

#include <type_traits>

#include "projection.h"

namespace lowrank {
namespace {

// ---- types

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half(x);
}

// ---- a product of one launch

enum class Epilogue { kAdam, kStore, kExpand };

struct Job {
  const void *a, *b;
  void* c;  // R (float32), or W
  float *exp_avg, *exp_avg_sq;
  void* direction;
  int64_t a_stride, b_stride, c_stride;
};

struct Jobs {
  Job job[kMaxLayers];
  int64_t rows, cols, depth;  // M, N, K
};

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// A tile in shared memory is kept in the order of its matrix in global memory: `kOuter` lines of `kInner` adjacent
// elements. The pad of 16 bytes spreads lines over the banks and keeps them aligned for 16-byte copies.
template <typename T, int kOuter_, int kInner_>
struct TileShape {
  static constexpr int kOuter = kOuter_, kInner = kInner_;
  static constexpr int kLine = kInner + 16 / static_cast<int>(sizeof(T));
  static constexpr int kElements = kOuter * kLine;
};

// Copies a tile from (outer0, inner0) of a matrix of outer x inner elements; what lies outside is zero. Aligned lines
// are copied asynchronously, 16 bytes a thread; the caller commits and waits.
template <typename T, class Shape>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int64_t stride, int64_t outer0, int64_t inner0,
                                          int64_t outer, int64_t inner, bool aligned) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  constexpr int kPerLine = Shape::kInner / kVector;
  for (int chunk = threadIdx.x; chunk < Shape::kOuter * kPerLine; chunk += kThreads) {
    const int line = chunk / kPerLine, place = chunk % kPerLine * kVector;
    const int64_t i = outer0 + line, j = inner0 + place;
    T* to = tile + line * Shape::kLine + place;
    if (aligned && i < outer && j + kVector <= inner) {
      __pipeline_memcpy_async(to, from + i * stride + j, 16);
    } else {
      for (int k = 0; k < kVector; ++k) {
        to[k] = i < outer && j + k < inner ? from[i * stride + j + k] : from_float<T>(0.0f);
      }
    }
  }
}

// What becomes of one element of the product.
template <typename T, Epilogue kEpilogue>
__device__ __forceinline__ void finish(const Job& job, const Jobs& jobs, const Adam& a, int64_t row, int64_t col,
                                       float sum) {
  if (row >= jobs.rows || col >= jobs.cols) return;
  if (kEpilogue == Epilogue::kExpand) {
    T* weight = static_cast<T*>(job.c) + row * job.c_stride + col;
    *weight = from_float<T>(moved(a, to_float(*weight), sum));
    return;
  }
  const int64_t place = row * jobs.cols + col;
  if (kEpilogue == Epilogue::kStore) {
    static_cast<float*>(job.c)[place] = sum;
    return;
  }
  float mean = job.exp_avg[place], square = job.exp_avg_sq[place];
  const float direction = adam(a, clamp_gradient(sum), mean, square);
  job.exp_avg[place] = mean;
  job.exp_avg_sq[place] = square;
  static_cast<T*>(job.direction)[place] = from_float<T>(direction);
}

__device__ __forceinline__ Adam with_scalars(Adam a, const float* scalars) {
  if (scalars != nullptr) a.eps = scalars[0], a.step_size = scalars[1], a.decay = scalars[2];
  return a;
}

// ---- the product of two tiles, summed over the depth: tensor cores for 16 bit, plain arithmetic for float32

template <typename T, bool kARows, bool kBRows>
struct Product {
  static constexpr int kM = 128, kN = 128, kK = 32;
  using ATile = TileShape<T, kARows ? kM : kK, kARows ? kK : kM>;
  using BTile = TileShape<T, kBRows ? kK : kN, kBRows ? kN : kK>;
  using ALayout = std::conditional_t<kARows, nvcuda::wmma::row_major, nvcuda::wmma::col_major>;
  using BLayout = std::conditional_t<kBRows, nvcuda::wmma::row_major, nvcuda::wmma::col_major>;
  // 8 warps as 2 x 4; each makes 64 x 32 of the tile
  static constexpr int kWarpM = 64, kWarpN = 32, kStep = 16;
  static constexpr int kPatchLine = kStep + 4;
  static constexpr int kScratchBytes = kThreads / kWarp * kStep * kPatchLine * 4;

  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kStep, kStep, kStep, float> sum[kWarpM / kStep][kWarpN / kStep];

  __device__ __forceinline__ static int warp() { return threadIdx.x / kWarp; }
  __device__ __forceinline__ static int row0() { return warp() / 4 * kWarpM; }
  __device__ __forceinline__ static int col0() { return warp() % 4 * kWarpN; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& line : sum) {
#pragma unroll
      for (auto& part : line) nvcuda::wmma::fill_fragment(part, 0.0f);
    }
  }

  __device__ __forceinline__ void add(const T* a, const T* b) {
    using nvcuda::wmma::fragment;
#pragma unroll
    for (int k = 0; k < kK; k += kStep) {
      fragment<nvcuda::wmma::matrix_b, kStep, kStep, kStep, T, BLayout> right[kWarpN / kStep];
#pragma unroll
      for (int j = 0; j < kWarpN / kStep; ++j) {
        const int col = col0() + j * kStep;
        nvcuda::wmma::load_matrix_sync(right[j], b + (kBRows ? k * BTile::kLine + col : col * BTile::kLine + k),
                                       BTile::kLine);
      }
#pragma unroll
      for (int i = 0; i < kWarpM / kStep; ++i) {
        const int row = row0() + i * kStep;
        fragment<nvcuda::wmma::matrix_a, kStep, kStep, kStep, T, ALayout> left;
        nvcuda::wmma::load_matrix_sync(left, a + (kARows ? row * ATile::kLine + k : k * ATile::kLine + row),
                                       ATile::kLine);
#pragma unroll
        for (int j = 0; j < kWarpN / kStep; ++j) nvcuda::wmma::mma_sync(sum[i][j], left, right[j], sum[i][j]);
      }
    }
  }

  // Calls done(row, col, sum) for every element of the tile; `scratch` is shared memory that nobody else uses.
  template <class Done>
  __device__ __forceinline__ void each(unsigned char* scratch, Done done) {
    float* patch = reinterpret_cast<float*>(scratch) + warp() * kStep * kPatchLine;
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kWarpM / kStep; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpN / kStep; ++j) {
        nvcuda::wmma::store_matrix_sync(patch, sum[i][j], kPatchLine, nvcuda::wmma::mem_row_major);
        __syncwarp();
        // enough loads under way at once, and no more: the sums of the other fragments need the registers
#pragma unroll 2
        for (int element = lane; element < kStep * kStep; element += kWarp) {
          const int row = element / kStep, col = element % kStep;
          done(row0() + i * kStep + row, col0() + j * kStep + col, patch[row * kPatchLine + col]);
        }
        __syncwarp();
      }
    }
  }
};

template <bool kARows, bool kBRows>
struct Product<float, kARows, kBRows> {
  static constexpr int kM = 64, kN = 64, kK = 16;
  using ATile = TileShape<float, kARows ? kM : kK, kARows ? kK : kM>;
  using BTile = TileShape<float, kBRows ? kK : kN, kBRows ? kN : kK>;
  // 16 x 16 threads; each makes every 16th row and column
  static constexpr int kSide = 16, kRows = kM / kSide, kCols = kN / kSide;
  static constexpr int kScratchBytes = 0;

  float sum[kRows][kCols];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& line : sum) {
#pragma unroll
      for (float& part : line) part = 0.0f;
    }
  }

  __device__ __forceinline__ void add(const float* a, const float* b) {
    const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
#pragma unroll 4
    for (int k = 0; k < kK; ++k) {
      float left[kRows], right[kCols];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = y + i * kSide;
        left[i] = a[kARows ? row * ATile::kLine + k : k * ATile::kLine + row];
      }
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const int col = x + j * kSide;
        right[j] = b[kBRows ? k * BTile::kLine + col : col * BTile::kLine + k];
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kCols; ++j) sum[i][j] += left[i] * right[j];
      }
    }
  }

  template <class Done>
  __device__ __forceinline__ void each(unsigned char*, Done done) {
    const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCols; ++j) done(y + i * kSide, x + j * kSide, sum[i][j]);
    }
  }
};

constexpr int kStages = 3;

template <typename T, bool kARows, bool kBRows>
constexpr int shared_bytes() {
  using P = Product<T, kARows, kBRows>;
  const int tiles = kStages * (P::ATile::kElements + P::BTile::kElements) * static_cast<int>(sizeof(T));
  return tiles > P::kScratchBytes ? tiles : P::kScratchBytes;
}

template <typename T, bool kARows, bool kBRows, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads, 2)
    product_kernel(const __grid_constant__ Jobs jobs, Adam given, const float* scalars) {
  using P = Product<T, kARows, kBRows>;
  LOWRANK_SHARED(raw);
  const Job& job = jobs.job[blockIdx.z];
  // column tiles are neighbours in time, so that they find the lines of A in the second-level cache
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * P::kM, col0 = static_cast<int64_t>(blockIdx.x) * P::kN;
  const T* a = static_cast<const T*>(job.a);
  const T* b = static_cast<const T*>(job.b);
  const bool a_aligned = reinterpret_cast<uintptr_t>(a) % 16 == 0 && job.a_stride * sizeof(T) % 16 == 0;
  const bool b_aligned = reinterpret_cast<uintptr_t>(b) % 16 == 0 && job.b_stride * sizeof(T) % 16 == 0;
  T* a_tiles = reinterpret_cast<T*>(raw);
  T* b_tiles = a_tiles + kStages * P::ATile::kElements;

  const auto load = [&](int64_t depth, int stage) {
    load_tile<T, typename P::ATile>(a_tiles + stage * P::ATile::kElements, a, job.a_stride, kARows ? row0 : depth,
                                    kARows ? depth : row0, kARows ? jobs.rows : jobs.depth,
                                    kARows ? jobs.depth : jobs.rows, a_aligned);
    load_tile<T, typename P::BTile>(b_tiles + stage * P::BTile::kElements, b, job.b_stride, kBRows ? depth : col0,
                                    kBRows ? col0 : depth, kBRows ? jobs.depth : jobs.cols,
                                    kBRows ? jobs.cols : jobs.depth, b_aligned);
  };

  P product;
  product.clear();
  const int steps = static_cast<int>((jobs.depth + P::kK - 1) / P::kK);
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(static_cast<int64_t>(step) * P::kK, step);
    __pipeline_commit();
  }
  for (int step = 0; step < steps; ++step) {
    // this thread's copies for the step have landed; after the barrier everyone's have, and nobody reads the stage
    // of the step before, which is the one that is filled next
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();
    const int next = step + kStages - 1;
    if (next < steps) load(static_cast<int64_t>(next) * P::kK, next % kStages);
    __pipeline_commit();
    product.add(a_tiles + step % kStages * P::ATile::kElements, b_tiles + step % kStages * P::BTile::kElements);
  }
  // the epilogue's scratch lies where the tiles were
  __pipeline_wait_prior(0);
  __syncthreads();
  const Adam adam_now = with_scalars(given, scalars);
  product.each(raw, [&](int row, int col, float sum) {
    finish<T, kEpilogue>(job, jobs, adam_now, row0 + row, col0 + col, sum);
  });
}

}  // namespace
}  // namespace lowrank
