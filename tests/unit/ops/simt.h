// Runs CUDA kernels on a CPU: with SEMION_SIMT defined the same .cu files compile as C++, and each CUDA thread of a
// block is a fiber that runs until it waits at a barrier or a shuffle. Blocks run one after another, so it shows wrong
// arithmetic, wrong indices, misaligned vectors, missing barriers (run in both orders of threads), barriers that not all
// threads reach, shared memory that is read before it is written, and grids that no GPU takes; it does not show races
// between blocks, memory ordering or speed. No tensor cores, no async copies.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block at a time: static is the block's storage. It lies in a section of its own, which is filled with a pattern before
// every block, so that what a block reads before it writes shows.
#define __shared__ [[gnu::section("semion_shared")]] static
extern "C" char __start_semion_shared[], __stop_semion_shared[];  // the linker's; of this library

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using std::isfinite;
using cudaStream_t = void*;
enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,  // here: some threads wait at a barrier that the others never reach
};

namespace simt {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned MAX_GRID_YZ = 65535;  // in x 2^31 - 1
constexpr int POISON = 0xff;             // NaN as a float or double, -1 as an integer

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  const Barrier* waits_for = nullptr;
  unsigned generation_seen = 0;
  unsigned num_shuffles = 0;
  bool ready() const { return !done && (waits_for == nullptr || waits_for->generation != generation_seen); }
};

struct Machine {
  std::vector<Fiber> fibers = std::vector<Fiber>(MAX_THREADS);
  ucontext_t scheduler;
  std::function<void()> body;
  dim3 grid, block, block_index, thread_index;
  int current = 0, num_threads = 0, num_multiprocessors = 132, num_launches = 0;
  Barrier block_barrier, warp_barriers[MAX_THREADS / WARP];
  uint64_t exchange[2][MAX_THREADS];  // two, taken in turns: a shuffle may write while the last one is still read
  bool backwards = false;             // the order in which the threads of a block run
  cudaError_t error = cudaSuccess;
};
inline Machine machine;

inline void set_thread_index(int thread) {
  const dim3& b = machine.block;
  machine.thread_index = dim3(thread % b.x, thread / b.x % b.y, thread / (b.x * b.y));
}

inline void enter_fiber() {
  machine.body();
  machine.fibers[machine.current].done = true;
}

inline void wait(Barrier& barrier, int num_expected) {
  const int me = machine.current;
  if (++barrier.arrived == num_expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber& fiber = machine.fibers[me];
  fiber.waits_for = &barrier;
  fiber.generation_seen = barrier.generation;
  swapcontext(&fiber.context, &machine.scheduler);
  fiber.waits_for = nullptr;
}

// Runs every thread of one block to its end, or until none can go on.
inline void run_block() {
  Machine& m = machine;
  std::memset(__start_semion_shared, POISON, static_cast<size_t>(__stop_semion_shared - __start_semion_shared));
  m.block_barrier = Barrier();
  for (Barrier& barrier : m.warp_barriers) barrier = Barrier();
  for (int t = 0; t < m.num_threads; ++t) {
    Fiber& fiber = m.fibers[t];
    if (!fiber.stack) fiber.stack.reset(new char[STACK_BYTES]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = &m.scheduler;
    makecontext(&fiber.context, enter_fiber, 0);
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.num_shuffles = 0;
  }
  int num_done = 0;
  for (bool moved = true; moved;) {
    moved = false;
    for (int i = 0; i < m.num_threads; ++i) {
      const int t = m.backwards ? m.num_threads - 1 - i : i;
      if (!m.fibers[t].ready()) continue;
      m.current = t;
      set_thread_index(t);
      swapcontext(&m.scheduler, &m.fibers[t].context);
      num_done += m.fibers[t].done;
      moved = true;
    }
  }
  if (num_done != m.num_threads) m.error = cudaErrorLaunchFailure;
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, Arguments... arguments) {
  Machine& m = machine;
  m.grid = grid;
  m.block = block;
  m.num_threads = static_cast<int>(block.x * block.y * block.z);
  if (m.num_threads < 1 || m.num_threads > MAX_THREADS || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > MAX_GRID_YZ || grid.z > MAX_GRID_YZ) {
    m.error = cudaErrorInvalidValue;
    return;
  }
  ++m.num_launches;
  m.body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x && m.error == cudaSuccess; ++x) {
        m.block_index = dim3(x, y, z);
        run_block();
      }
}

template <class T>
T shuffle(T value, int source_lane) {
  const int me = machine.current, lane = me % WARP;
  uint64_t* exchange = machine.exchange[machine.fibers[me].num_shuffles++ % 2];
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  std::memcpy(&exchange[me], &value, sizeof value);
  const int warp = me / WARP, rest = machine.num_threads - warp * WARP;
  wait(machine.warp_barriers[warp], rest < WARP ? rest : WARP);
  T result;
  std::memcpy(&result, &exchange[me - lane + source_lane], sizeof result);
  return result;
}

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint16_t to_bfloat16(float x) {  // to nearest, ties to even
  const uint32_t bits = float_bits(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  float x = std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
  if (exponent == 31) x = fraction ? NAN : INFINITY;
  return half & 0x8000 ? -x : x;
}

inline uint16_t to_float16(float x) {  // to nearest, ties to even (nearbyint's rounding), beyond 65,520 to infinity
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);                        // size in [2^(exponent - 1), 2^exponent)
  const int step = size == 0 || exponent < -13 ? -24 : exponent - 11;  // weight of the last bit, subnormals included
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, -step)));
  return static_cast<uint16_t>(sign | (step == -24 ? units : units + ((step + 24) << 10)));
}

}  // namespace simt

#define threadIdx (simt::machine.thread_index)
#define blockIdx (simt::machine.block_index)
#define blockDim (simt::machine.block)
#define gridDim (simt::machine.grid)

inline void __syncthreads() { simt::wait(simt::machine.block_barrier, simt::machine.num_threads); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {  // every lane of the warp must come
  return simt::shuffle(value, simt::machine.current % simt::WARP ^ mask);
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {  // every lane of the warp must come
  return simt::shuffle(value, lane % simt::WARP);
}

template <class T>
T __ldcs(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) simt::machine.error = cudaErrorMisalignedAddress;
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <class T>
void __stcs(T* address, T value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) simt::machine.error = cudaErrorMisalignedAddress;
  std::memcpy(address, &value, sizeof value);
}

inline unsigned long long atomicMin(unsigned long long* address, unsigned long long value) {
  const unsigned long long old = *address;
  if (value < old) *address = value;
  return old;
}

inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  const unsigned long long old = *address;
  *address += value;
  return old;
}

inline float __uint_as_float(uint32_t bits) { return simt::bits_float(bits); }

inline cudaError_t cudaMemsetAsync(void* address, int value, size_t num_bytes, cudaStream_t) {
  std::memset(address, value, num_bytes);
  return cudaSuccess;
}

enum cudaDeviceAttr : int { cudaDevAttrMultiProcessorCount = 16 };

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = simt::machine.num_multiprocessors;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = simt::machine.error;
  simt::machine.error = cudaSuccess;
  return error;
}

#define SEMION_LAUNCH(kernel, grid, block, stream, ...) \
  (static_cast<void>(stream), simt::launch((kernel), dim3(grid), dim3(block) __VA_OPT__(, ) __VA_ARGS__))

// What csrc/cuda/elements.h has of CUDA's conversions.
namespace semion {

inline uint16_t narrow_bfloat16(float x) { return simt::to_bfloat16(x); }
inline uint16_t narrow_float16(float x) { return simt::to_float16(x); }
inline float widen_float16(uint16_t half) { return simt::from_float16(half); }
inline uint32_t narrow_pair_bfloat16(float a, float b) { return narrow_bfloat16(a) | uint32_t(narrow_bfloat16(b)) << 16; }
inline uint32_t narrow_pair_float16(float a, float b) { return narrow_float16(a) | uint32_t(narrow_float16(b)) << 16; }
inline uint32_t float_bits(float x) { return simt::float_bits(x); }
inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace semion
