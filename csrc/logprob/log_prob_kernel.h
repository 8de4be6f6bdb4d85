// Launchers of the log-prob kernels on a GPU, in plain types: no torch, no allocation, no check of arguments (the
// bindings do both). Each queues its kernels on `stream` and returns the launch's error. Unverified on a GPU so far.
// Rows and parts are those of rows.h; one difference: a target outside [lowest_id, end_id)
// that is not -100 makes its row's log-prob NaN, because an error would make every forward wait for the GPU.
#pragma once
#include <cstdint>

#include "../cuda/launch.h"
#include "rows.h"

extern "C" {

// How many blocks share a row of log_prob_parts: over 1 only where the rows alone do not fill the waves of blocks of the
// current device, and then it needs a workspace of 3 * T * splits floats. Depends on the shape and the device only.
int semion_log_prob_splits(const semion::LogProbRows* rows);

// parts [4, T] of this rank; reads the logits once, and none of an ignored row unless every_row.
cudaError_t semion_log_prob_parts(const semion::LogProbRows* rows, float* parts, float* workspace, cudaStream_t stream);

// parts [R, 4, T] -> log_probs [T], entropy [T], totals [3, T].
cudaError_t semion_log_prob_join(const float* parts, int64_t num_ranks, const int64_t* targets, int64_t num_rows,
                                 float temperature, float* log_probs, float* entropy, float* totals,
                                 cudaStream_t stream);

// Writes the gradient of the logits; reads each logit once, and none of a row without a gradient.
cudaError_t semion_log_prob_backward(const semion::LogProbRows* rows, const semion::LogProbGradient* gradient,
                                     cudaStream_t stream);
}
