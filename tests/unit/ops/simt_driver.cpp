// What the tests of the CUDA kernels need of the machine of simt.h besides the launchers: the order in which it
// runs the threads of a block, and kernels with a mistake each, to see that it finds them.
#include "cuda/grid.h"
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

__global__ void reads_before_it_writes(int* out) {
  __shared__ int shared[2];
  out[blockIdx.x] = shared[1];
  shared[0] = shared[1] = 7;
}

__global__ void does_nothing() {}

}  // namespace

extern "C" {

void simt_set_backwards(int backwards) { simt::machine.backwards = backwards != 0; }
void simt_set_multiprocessors(int count) { simt::machine.num_multiprocessors = count; }
int simt_num_launches() { return simt::machine.num_launches; }
int simt_splits_of(int64_t num_rows, int64_t most, int64_t at_once) { return semion::splits_of(num_rows, most, at_once); }

// What the shared memory holds that nobody has written, after another block wrote it.
int simt_reads_before_it_writes(int* out) {
  SEMION_LAUNCH(reads_before_it_writes, 2, 1, nullptr, out);
  return cudaGetLastError();
}

int simt_grid_of(int64_t x, int64_t y) {
  SEMION_LAUNCH(does_nothing, dim3(unsigned(x), unsigned(y)), 1, nullptr);
  return cudaGetLastError();
}

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
