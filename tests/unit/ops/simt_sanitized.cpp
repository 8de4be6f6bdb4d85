// The CUDA kernels under the address and undefined-behaviour sanitizers, thread by thread on a CPU: every array is exactly as
// long as promised, so that a read or a write beside it ends the program. What they compute is compared elsewhere.
#include <cstdio>
#include <vector>

#include "logprob/log_prob_kernel.h"
#include "logprob/sequences_kernel.h"
#include "policy/policy_gradient_kernel.h"
#include "reshard/digest_kernel.h"

namespace {
using namespace semion;
int num_faults = 0;

void expect(const char* what, int64_t size, cudaError_t error) {
  if (error == cudaSuccess) return;
  ++num_faults;
  std::printf("%s, size %ld: error %d\n", what, static_cast<long>(size), static_cast<int>(error));
}

// Rows of `width` elements that begin `offset` elements behind a 16 byte boundary; the last ends where the memory does.
template <class Storage>
void run_log_probs(Element element, int32_t width, int32_t offset, int32_t gap) {
  const int64_t rows = 3, stride = width + gap;
  std::vector<Storage> memory(static_cast<size_t>(offset + (rows - 1) * stride + width), Storage(1));
  std::vector<int64_t> targets{width - 1, ignored, 0};
  std::vector<float> parts(4 * rows), log_probs(rows), entropy(rows), totals(3 * rows), slopes(rows, 0.5f);
  LogProbRows in{memory.data() + offset, stride, targets.data(), rows, 0, 0, width, 1.0, element, width, width - width / 3, 0};
  for (const int32_t every_row : {0, 1}) {
    in.every_row = every_row;
    std::vector<float> workspace(static_cast<size_t>(3 * semion_log_prob_splits(&in) * rows));
    expect("parts", width, semion_log_prob_parts(&in, parts.data(), workspace.data(), nullptr));
    expect("join", width, semion_log_prob_join(parts.data(), 1, targets.data(), rows, 1.0f, log_probs.data(), entropy.data(),
                                               totals.data(), nullptr));
    LogProbGradient gradient{totals.data(), slopes.data(), every_row ? slopes.data() : nullptr, memory.data() + offset, stride};
    expect("backward", width, semion_log_prob_backward(&in, &gradient, nullptr));
    std::vector<Storage> other(static_cast<size_t>((rows - 1) * width + width));
    gradient.out = other.data(), gradient.row_stride = width;
    expect("backward elsewhere", width, semion_log_prob_backward(&in, &gradient, nullptr));
  }
}

void run_sequences(int32_t num_tokens) {
  const size_t size = static_cast<size_t>(num_tokens);
  std::vector<float> values(size, -1.0f), gradient(size), sums(2), advantages{1.0f, -1.0f}, out(num_policy_sums);
  std::vector<int32_t> bounds{0, num_tokens / 2, num_tokens};
  std::vector<int64_t> targets(size, 1);
  std::vector<uint8_t> mask(size, 1);
  expect("sums", num_tokens, semion_sequence_sums(values.data(), bounds.data(), mask.data(), num_tokens, 2, sums.data(), nullptr));
  expect("sums back", num_tokens,
         semion_sequence_sums_backward(sums.data(), bounds.data(), nullptr, num_tokens, 2, gradient.data(), nullptr));
  const PolicyGradientRow row{values.data(), values.data(), values.data(), advantages.data(), bounds.data(), targets.data(),
                              num_tokens,    2,             0.2f,          0.2f,              2.0f,          0.1f};
  std::vector<double> workspace(static_cast<size_t>(semion_policy_gradient_workspace(num_tokens)));
  expect("policy", num_tokens, semion_policy_gradient(&row, workspace.data(), out.data(), gradient.data(), nullptr));
}

template <class Word>
void run_digests() {
  const int64_t shapes[][3] = {{5, 16, 0}, {37, 130, 0}, {4, 33, 15}, {150, 1, 0}, {2, 2100, 12}, {0, 3, 0}, {3, 7, 2}};
  std::vector<std::vector<Word>> memory;
  std::vector<uint64_t> columns(2100, 3), digests(std::size(shapes));
  std::vector<SemionDigestBlock> blocks;
  for (const auto& [rows, width, gap] : shapes) {
    memory.emplace_back(static_cast<size_t>(rows ? (rows - 1) * (width + gap) + width : 0), Word(7));
    blocks.push_back({memory.back().data(), width + gap, columns.data() + 2100 - width, rows, width, 5, 9});
  }
  expect("digests", sizeof(Word), semion_block_digests(blocks.data(), static_cast<int64_t>(blocks.size()), sizeof(Word),
                                                       digests.data(), nullptr));
}
}  // namespace

int main() {
  for (const int32_t width : {1, 9, 40, 1031})
    for (const int32_t offset : {0, 5})
      for (const int32_t gap : {0, 3}) {
        run_log_probs<uint16_t>(Element::bfloat16, width, offset, gap);
        run_log_probs<uint16_t>(Element::float16, width, offset, gap);
        run_log_probs<float>(Element::float32, width, offset, gap);
      }
  for (const int32_t num_tokens : {0, 1, 257}) run_sequences(num_tokens);
  run_digests<uint8_t>();
  run_digests<uint16_t>();
  run_digests<uint32_t>();
  run_digests<uint64_t>();
  std::printf("checked the CUDA kernels\n");
  return num_faults != 0;
}
