// Enough of CUDA to run kernels/projection.cu on a CPU, for tests: every thread of a block is a fiber.
//
// Barriers hand over to the next fiber, in an order that is shuffled anew at each of them; shared memory begins as NaN;
// asynchronous copies land when they are waited for, and check that both ends are aligned. So a missing barrier, a
// missing wait or a read of what nobody wrote gives wrong numbers. Tensor cores are lane 0's loops over a fragment.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#define LOWRANK_SHARED(name) unsigned char* name = emulator::shared_memory()
#define LOWRANK_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  emulator::launch(grid, block, bytes, [&] { (kernel)(__VA_ARGS__); })
#define cudaFuncSetAttribute(...) (cudaSuccess)
#define cudaGetLastError() (cudaSuccess)
#define cudaGetErrorString(code) ("emulated")

static uint3 threadIdx, blockIdx;

namespace emulator {

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  std::vector<std::vector<Copy>> batches;  // committed and waiting; the last one is open
};

constexpr size_t kStack = 256 << 10;
constexpr int kWarp = 32;

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current;
inline const std::function<void()>* body;
inline std::mt19937 random_order(0);
inline float exchange[1024];

inline unsigned char* shared_memory() {
  alignas(128) static unsigned char memory[227 << 10];
  return memory;
}

inline void yield(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void entry() {
  (*body)();
  yield(State::kDone);
}

inline void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

inline void run_block(int threads) {
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) {
    order[i] = i;
    Fiber& fiber = fibers[i];
    fiber.state = State::kReady;
    fiber.batches.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, entry, 0);
  }
  for (;;) {
    std::shuffle(order.begin(), order.end(), random_order);
    bool ran = false;
    for (int i : order) {
      if (fibers[i].state != State::kReady) continue;
      current = i;
      threadIdx.x = static_cast<unsigned>(i);
      swapcontext(&scheduler, &fibers[i].context);
      ran = true;
    }
    if (ran) continue;
    // nobody can go on: let the warps go whose lanes are all there, else the block
    bool released = false;
    for (int warp = 0; warp * kWarp < threads; ++warp) {
      auto first = fibers.begin() + warp * kWarp, last = fibers.begin() + std::min(threads, (warp + 1) * kWarp);
      const bool waits = std::any_of(first, last, [](auto& f) { return f.state == State::kAtWarpBarrier; });
      if (!waits) continue;
      for (auto f = first; f != last; ++f) {
        check(f->state == State::kAtWarpBarrier, "lanes of a warp part at a warp barrier");
        f->state = State::kReady;
      }
      released = true;
    }
    if (released) continue;
    bool all_done = true;
    for (int i = 0; i < threads; ++i) {
      if (fibers[i].state == State::kDone) continue;
      all_done = false;
      fibers[i].state = State::kReady;
    }
    if (all_done) return;
  }
}

inline void launch(dim3 grid, dim3 block, size_t bytes, const std::function<void()>& kernel) {
  const int threads = static_cast<int>(block.x);
  check(block.y == 1 && block.z == 1 && threads <= 1024 && bytes <= (227u << 10), "a launch that is not ours");
  fibers.resize(std::max<size_t>(fibers.size(), threads));
  for (Fiber& fiber : fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  }
  body = &kernel;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        // NaN in every format
        std::memset(shared_memory(), 0xff, bytes);
        run_block(threads);
      }
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::yield(emulator::State::kAtBlockBarrier); }
inline void __syncwarp() { emulator::yield(emulator::State::kAtWarpBarrier); }

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  emulator::exchange[emulator::current] = value;
  __syncwarp();
  const float other = emulator::exchange[emulator::current ^ offset];
  __syncwarp();
  return other;
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulator::check(reinterpret_cast<uintptr_t>(to) % bytes == 0 && reinterpret_cast<uintptr_t>(from) % bytes == 0,
                  "an asynchronous copy that is not aligned");
  emulator::fibers[emulator::current].batches.back().push_back({to, from, bytes});
}
inline void __pipeline_commit() { emulator::fibers[emulator::current].batches.push_back({}); }
inline void __pipeline_wait_prior(size_t newest) {
  auto& batches = emulator::fibers[emulator::current].batches;
  while (batches.size() > newest + 1) {
    for (const auto& copy : batches.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    batches.erase(batches.begin());
  }
}

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  float x[16][16];
};

inline bool is_first_lane() { return threadIdx.x % emulator::kWarp == 0; }

inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float as_float(__half x) { return __half2float(x); }

template <class F>
void fill_fragment(F& f, float value) {
  if (!is_first_lane()) return;
  for (auto& line : f.x) std::fill(std::begin(line), std::end(line), value);
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* from, unsigned line) {
  emulator::check(reinterpret_cast<uintptr_t>(from) % 32 == 0 && line * sizeof(T) % 16 == 0,
                  "a fragment that is not aligned");
  if (!is_first_lane()) return;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      f.x[i][j] = as_float(from[std::is_same_v<Layout, row_major> ? i * line + j : j * line + i]);
    }
  }
}

template <class A, class B, class C>
void mma_sync(C& out, const A& a, const B& b, const C& c) {
  if (!is_first_lane()) return;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      float sum = c.x[i][j];
      for (int k = 0; k < 16; ++k) sum += a.x[i][k] * b.x[k][j];
      out.x[i][j] = sum;
    }
  }
}

template <class C>
void store_matrix_sync(float* to, const C& c, unsigned line, layout_t) {
  emulator::check(reinterpret_cast<uintptr_t>(to) % 32 == 0 && line % 4 == 0, "a fragment that is not aligned");
  if (!is_first_lane()) return;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to[i * line + j] = c.x[i][j];
  }
}

}  // namespace nvcuda::wmma
