// Launchers of the log-prob kernels on a GPU, in plain types: no torch, no allocation, no check of arguments (the
// bindings do both). Each queues its kernels on `stream` and returns the launch's error. Unverified on a GPU so far.
// The operators and a rank's part of a row are those of logprob.h; one difference: a target outside [lowest_id, end_id)
// that is not -100 makes its row's log-prob NaN, because an error would make every forward wait for the GPU.
#pragma once
#include <cstdint>

#include "../simt/launch.h"

extern "C" {

struct SemionLogProbRows {
  void* logits;            // [T, num_columns], unit column stride; written by log_prob_store alone
  int64_t row_stride;      // in elements
  const int64_t* targets;  // [T], -100 or an index of the whole vocabulary
  int64_t num_rows;
  int64_t vocab_start;     // index of this rank's first column
  int64_t lowest_id, end_id;
  int32_t element;         // 0 float32, 1 bfloat16, 2 float16
  int32_t num_columns;     // of this rank, padding included
  int32_t num_valid;       // of this rank: the columns beyond are padding
  int32_t every_row;       // also read rows whose target is ignored, and gather for the entropy
  float temperature;
};

struct SemionLogProbGradient {
  const float* totals;         // [3, T]: reference, sum of e^d, mean of d, of all ranks together
  const float* grad_log_prob;  // [T]
  const float* grad_entropy;   // [T] or null
  void* out;                   // [T, num_columns], may be the logits
  int64_t row_stride;          // of out
};

// How many blocks share a row of log_prob_parts: over 1 only where the rows alone cannot fill a GPU, and then it needs a
// workspace of 3 * T * splits floats. Depends on the shape only.
int semion_log_prob_splits(const SemionLogProbRows* rows);

// parts [4, T] of this rank; reads the logits once, and none of an ignored row unless every_row.
cudaError_t semion_log_prob_parts(const SemionLogProbRows* rows, float* parts, float* workspace, cudaStream_t stream);

// parts [R, 4, T] -> log_probs [T], entropy [T], totals [3, T].
cudaError_t semion_log_prob_join(const float* parts, int64_t num_ranks, const int64_t* targets, int64_t num_rows,
                                 float temperature, float* log_probs, float* entropy, float* totals,
                                 cudaStream_t stream);

// Writes the gradient of the logits; reads each logit once, and none of a row without a gradient.
cudaError_t semion_log_prob_backward(const SemionLogProbRows* rows, const SemionLogProbGradient* gradient,
                                     cudaStream_t stream);

// parts of one rank that holds the whole vocabulary, without the entropy's, and P - onehot over the logits (0 in padding
// and ignored rows). A row's gradient is that times -grad_log_prob / temperature, a coefficient that the caller folds
// into the small sides of the products that follow.
cudaError_t semion_log_prob_store(const SemionLogProbRows* rows, float* parts, cudaStream_t stream);
}
