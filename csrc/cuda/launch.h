// The one door to CUDA for every kernel of csrc: real CUDA under nvcc, the CUDA simulator of the tests
// (tests/unit/ops/simt.h) where SEMION_SIMT is defined, and the plain runtime types for files that only call launchers. It holds no kernel.
#pragma once
#include <cstdint>

#ifdef SEMION_SIMT
#include "simt.h"
#else
#include <cuda_runtime_api.h>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// A failed launch is reported by the next cudaGetLastError, which every launcher returns.
#define SEMION_LAUNCH(kernel, grid, block, stream, ...) kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#endif
#endif
