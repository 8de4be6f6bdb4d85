// Launchers of the sums over the sequences of a packed row on a GPU (sequences.h says what they mean), in plain types: no
// torch, no allocation, no check of arguments. Unverified on a GPU so far.
#pragma once
#include <cstdint>

#include "../cuda/launch.h"

extern "C" {

// sums [B] of values [T] between cu_seqlens [B + 1]; mask [T] (one byte a token) may be null.
cudaError_t semion_sequence_sums(const float* values, const int32_t* cu_seqlens, const uint8_t* mask,
                                 int32_t num_tokens, int32_t num_sequences, float* sums, cudaStream_t stream);

// Writes grad_values of the tokens in a sequence; the others the caller has cleared.
cudaError_t semion_sequence_sums_backward(const float* grad_sums, const int32_t* cu_seqlens, const uint8_t* mask,
                                          int32_t num_tokens, int32_t num_sequences, float* grad_values,
                                          cudaStream_t stream);
}
