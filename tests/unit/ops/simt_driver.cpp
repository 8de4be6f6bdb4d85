// What the tests of the CUDA kernels need of the machine of simt.h besides the launchers: the order in which it
// runs the threads of a block, and kernels with a mistake each, to see that it finds them.
#include "cuda/launch.h"

namespace {

__global__ void half_the_block_waits() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void loads_beside_a_boundary(const char* bytes) {
  (void)__ldcs(reinterpret_cast<const uint4*>(bytes + 4));
}

// Every thread writes its number and reads its neighbour's, with the barrier between them left out or not.
__global__ void passes_around(bool with_barrier, int* out) {
  __shared__ int shared[64];
  const int thread = threadIdx.x;
  shared[thread] = thread;
  if (with_barrier) __syncthreads();
  out[thread] = shared[(thread + 1) % 64];
  __syncthreads();
  shared[thread] = -1;
}

}  // namespace

extern "C" {

void simt_set_backwards(int backwards) { simt::machine.backwards = backwards != 0; }

int simt_half_the_block_waits() {
  SEMION_LAUNCH(half_the_block_waits, 1, 64, nullptr);
  return cudaGetLastError();
}

int simt_loads_beside_a_boundary(const void* aligned) {
  SEMION_LAUNCH(loads_beside_a_boundary, 1, 1, nullptr, static_cast<const char*>(aligned));
  return cudaGetLastError();
}

int simt_passes_around(int with_barrier, int* out) {
  SEMION_LAUNCH(passes_around, 1, 64, nullptr, with_barrier != 0, out);
  return cudaGetLastError();
}

uint16_t simt_to_bfloat16(float x) { return simt::to_bfloat16(x); }
uint16_t simt_to_float16(float x) { return simt::to_float16(x); }
float simt_from_float16(uint16_t half) { return simt::from_float16(half); }
}
