// The CPU kernels without torch, for the sanitizers: every instruction set this processor has, every element type, widths
// around each vector length, arrays of exactly the size promised, against sums in double. Prints what differs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "activation/swiglu.h"
#include "advantages/advantages.h"
#include "attention/cached_attention.h"
#include "attention/packed_attention.h"
#include "linear/few_rows.h"
#include "logprob/logprob.h"
#include "logprob/sequences.h"
#include "norm/rms_norm.h"
#include "policy/policy_gradient.h"
#include "reshard/digest.h"
#include "sampling/sample_tokens.h"
#include "splitmix64.h"

namespace {
using namespace semion;
int num_faults = 0;
std::mt19937 draw(7);

void expect(const char* what, const char* isa, int64_t size, double found, double wanted, double tolerance) {
  const bool same = std::isnan(wanted) ? std::isnan(found) : found == wanted || std::fabs(found - wanted) <= tolerance;
  if (same || ++num_faults > 20) return;
  std::printf("%s, %s, size %ld: found %.9g, want %.9g within %.2g\n", what, isa, static_cast<long>(size), found, wanted,
              tolerance);
}

double decode(uint16_t bits, Element element) {
  if (element == Element::bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return exponent ? sign * std::ldexp(1024 + fraction, exponent - 25) : sign * std::ldexp(fraction, -24);
}

struct Matrix {  // rows of `stride` elements, the last one only `width` long
  Element element;
  int64_t stride;
  std::vector<float> wide;
  std::vector<uint16_t> narrow;

  Matrix(Element of, int64_t rows, int64_t width, int64_t row_stride) : element(of), stride(row_stride) {
    const size_t size = static_cast<size_t>((rows - 1) * stride + width);
    element == Element::float32 ? wide.resize(size) : narrow.resize(size);
  }
  void* data() { return element == Element::float32 ? static_cast<void*>(wide.data()) : narrow.data(); }
  double at(int64_t row, int64_t column) const {
    const size_t i = static_cast<size_t>(row * stride + column);
    return element == Element::float32 ? static_cast<double>(wide[i]) : decode(narrow[i], element);
  }
  void fill(float scale) {  // with every kind of value: normal, small, closed
    std::normal_distribution<float> normal(0, scale);
    for (float& value : wide) value = draw() % 7 == 0 ? -INFINITY : normal(draw);
    for (uint16_t& bits : narrow) {
      const float value = normal(draw);
      uint32_t word;
      std::memcpy(&word, &value, 4);
      const int exponent = std::clamp(static_cast<int>(word >> 23 & 255) - 112, 0, 30);
      bits = element == Element::bfloat16
                 ? static_cast<uint16_t>(word >> 16)
                 : static_cast<uint16_t>((word >> 16 & 0x8000) | static_cast<uint32_t>(exponent) << 10 | (word >> 13 & 1023));
      if (draw() % 7 == 0) bits = element == Element::bfloat16 ? 0xff80 : 0xfc00;
    }
  }
};

struct Kernels {
  const char* isa;
  decltype(&baseline::log_prob_parts) parts;
  decltype(&baseline::log_prob_join) join;
  decltype(&baseline::log_prob_backward) backward;
  decltype(&baseline::policy_gradient) policy;
  decltype(&baseline::block_digest) digest;
  decltype(&baseline::packed_attention) attention;
  decltype(&baseline::packed_attention_backward) attention_back;
  decltype(&baseline::swiglu) swiglu;
  decltype(&baseline::swiglu_backward) swiglu_back;
  decltype(&baseline::rms_norm) norm;
  decltype(&baseline::rms_norm_backward) norm_back;
  decltype(&baseline::rms_norm_weight) norm_weight;
  decltype(&baseline::sample_tokens) sample;
  decltype(&baseline::few_rows_product) product;
  decltype(&baseline::cache_tokens) cache_tokens;
  decltype(&baseline::cached_attention) cached_attention;
};

#define SEMION_KERNELS(isa) {#isa, isa::log_prob_parts, isa::log_prob_join, isa::log_prob_backward, isa::policy_gradient, \
                             isa::block_digest, isa::packed_attention, isa::packed_attention_backward, isa::swiglu, isa::swiglu_backward, \
                             isa::rms_norm, isa::rms_norm_backward, isa::rms_norm_weight, isa::sample_tokens, isa::few_rows_product, \
                             isa::cache_tokens, isa::cached_attention}

void check_log_probs(const Kernels& kernels, Element element, int64_t width, float scale, double temperature) {
  const int64_t rows = 3, valid = width > 2 ? width - 2 : width, start = 11;
  Matrix logits(element, rows, width, width + 5);
  logits.fill(scale);
  const std::vector<int64_t> targets{start + valid - 1, ignored, start + width + 100};  // mine, ignored, another rank's
  const LogProbRows in{logits.data(), logits.stride, targets.data(), rows, start, 0, start + width, temperature, element,
                       static_cast<int32_t>(width), static_cast<int32_t>(valid), true};
  std::vector<float> parts(4 * rows), log_probs(rows), entropy(rows), totals(3 * rows);
  kernels.parts(in, parts.data(), 0, rows);
  kernels.join(parts.data(), 1, targets.data(), rows, temperature, log_probs.data(), entropy.data(), totals.data(), 0, rows);
  const std::vector<float> g{0.7f, 0.9f, -1.3f}, h{0.3f, -0.4f, 0.0f};
  Matrix out(element, rows, width, width + 3);
  const LogProbGradient gradient{totals.data(), g.data(), h.data(), out.data(), out.stride};
  kernels.backward(in, gradient, 0, rows);
  for (int64_t row = 0; row < rows; ++row) {
    double largest = -INFINITY, total = 0, mean = 0;
    for (int64_t i = 0; i < valid; ++i) largest = std::max(largest, logits.at(row, i));
    if (largest == -INFINITY) continue;  // no distribution
    const auto d = [&](int64_t i) { return (logits.at(row, i) - largest) / temperature; };
    for (int64_t i = 0; i < valid; ++i) total += std::exp(d(i));
    for (int64_t i = 0; i < valid; ++i) mean += d(i) > -INFINITY ? std::exp(d(i)) * d(i) / total : 0;
    const double room = 2e-6 * (1 + std::fabs(std::log(total) - mean));
    expect("entropy", kernels.isa, width, entropy[row], std::log(total) - mean, room);
    if (row == 0) {
      const double wanted = d(valid - 1) - std::log(total);
      expect("log-prob", kernels.isa, width, log_probs[row], wanted, 2e-6 + 2e-7 * std::fabs(wanted));
    }
    if (row == 1) expect("ignored log-prob", kernels.isa, width, log_probs[row], 0, 0);
    const double gr = row == 1 ? 0 : static_cast<double>(g[row]) / temperature, hr = static_cast<double>(h[row]) / temperature;
    for (int64_t i = 0; i < width; ++i) {
      const double p = i < valid ? std::exp(d(i)) / total : 0, onehot = row == 0 && i == valid - 1 ? gr : 0;
      const double wanted = onehot - (p > 0 ? p * (gr + hr * (d(i) - mean)) : 0);
      const double unit = element == Element::float32 ? 1e-6 : element == Element::bfloat16 ? 4e-3 : 5e-4;
      const double tolerance = 2e-6 / temperature + unit * std::fabs(wanted);
      expect("gradient", kernels.isa, width, out.at(row, i), wanted, i < valid ? tolerance : 0);
    }
  }
}

void check_policy(const Kernels& kernels, int32_t first, int32_t second) {
  const std::vector<int32_t> bounds{0, first, first, first + second};
  const size_t size = static_cast<size_t>(first + second);
  std::normal_distribution<float> normal(0, 0.3f);
  std::vector<float> now(size), old(size), reference(size), gradient(size), advantages{0.8f, 1.0f, -0.6f};
  std::vector<int64_t> targets(size);
  for (size_t i = 0; i < size; ++i) {
    now[i] = normal(draw), old[i] = normal(draw), reference[i] = normal(draw);
    targets[i] = draw() % 4 ? 5 : ignored;
    if (draw() % 8 == 0) (draw() % 2 ? old : now)[i] -= 99;  // a log-ratio, or KL, that is no float
  }
  const PolicyGradientRow in{now.data(),     old.data(),     reference.data(), advantages.data(), bounds.data(),
                             targets.data(), first + second, 3,                0.2f,              0.3f,
                             1.5f,           0.1f};
  std::vector<double> sums(3 * num_policy_sums);
  kernels.policy(in, sums.data(), gradient.data(), 0, 3);
  for (size_t sequence = 0; sequence < 3; ++sequence) {
    double want[num_policy_sums] = {};
    for (int32_t j = bounds[sequence]; j < bounds[sequence + 1]; ++j) {
      const size_t i = static_cast<size_t>(j);
      const bool counted = targets[i] != ignored;
      const double gap = static_cast<double>(now[i]) - old[i], whole = static_cast<double>(reference[i]) - now[i];
      const double limit = log_limit, ratio = std::exp(std::min(gap, limit)), a = advantages[sequence];
      const double d = std::min(whole, limit), kl = std::exp(d) - d - 1;
      const double low = 1 - static_cast<double>(0.2f), high = 1 + static_cast<double>(0.3f), dual = 1.5;
      const double free = std::min(ratio * a, std::clamp(ratio, low, high) * a);
      const bool open = a >= 0 ? ratio <= high : ratio >= low && ratio <= dual;
      const double terms[] = {-(a < 0 ? std::max(free, dual * a) : free) + 0.1 * kl, kl,
                              static_cast<double>(!open), ratio, std::fabs(gap),
                              static_cast<double>(gap > limit || whole > limit)};
      for (int k = 0; k < num_policy_sums; ++k) want[k] += counted ? terms[k] : 0;
      const double slope = (open && gap <= limit ? -ratio * a : 0) + (whole <= limit ? 0.1 * (1 - std::exp(d)) : 0);
      expect("policy gradient", kernels.isa, first, gradient[i], counted ? slope : 0, 1e-6 * (1 + std::fabs(slope)));
    }
    for (int k = 0; k < num_policy_sums; ++k)
      expect("policy sum", kernels.isa, first, sums[sequence * num_policy_sums + static_cast<size_t>(k)], want[k],
             1e-5 * (1 + std::fabs(want[k])));
  }
}

template <class Word>
void check_digest(const Kernels& kernels, int64_t rows, int64_t width) {
  const int64_t stride = width + 3;
  std::vector<Word> block(static_cast<size_t>((rows - 1) * stride + width));
  std::vector<uint64_t> columns(static_cast<size_t>(width));
  for (Word& word : block) word = static_cast<Word>(draw() * 0x9E3779B97F4A7C15);
  for (uint64_t& weight : columns) weight = draw() * 0x9E3779B97F4A7C15;
  const DigestInput in{block.data(), stride, sizeof(Word), rows, width, columns.data(), 9, 77};
  uint64_t wanted = 0;
  for (int64_t r = 1; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c)
      wanted += row_weight(77, 9 + r) * columns[static_cast<size_t>(c)] * block[static_cast<size_t>(r * stride + c)];
  expect("digest", kernels.isa, width, static_cast<double>(kernels.digest(in, 1, rows) - wanted), 0, 0);
}

void check_digests(const Kernels& kernels) {
  for (int64_t width = 1; width < 9000; width += width < 40 ? 1 : 2047) {
    check_digest<uint8_t>(kernels, 7, width);
    check_digest<uint16_t>(kernels, 6, width);
    check_digest<uint32_t>(kernels, 5, width);
    check_digest<uint64_t>(kernels, 4, width);
  }
}

// A prompt, samples that go on from it, and a segment alone as long as the prompt: values and gradients against sums in double.
void check_attention(const Kernels& kernels, Element element, int32_t dim, int32_t prompt, const std::vector<int32_t>& samples) {
  constexpr int32_t heads = 4, kv_heads = 2;
  std::vector<int32_t> bounds{0, prompt};
  for (const int32_t length : samples) bounds.push_back(bounds.back() + length);
  bounds.push_back(bounds.back() + prompt);
  const int64_t tokens = bounds.back(), last = static_cast<int64_t>(samples.size()) + 1;
  const Family families[] = {{0, 1, last}, {last, 0, 0}};
  const auto plain = [&](Matrix& matrix) {
    matrix.fill(1);
    for (float& value : matrix.wide) value = std::isinf(value) ? 0.5f : value;
    for (uint16_t& bits : matrix.narrow) bits = bits == 0xff80 || bits == 0xfc00 ? 0 : bits;
  };
  const int64_t row = heads * dim, kv_row = kv_heads * dim;
  Matrix q(element, tokens, row, row + 3), k(element, tokens, kv_row, kv_row + 1), v(element, tokens, kv_row, kv_row);
  Matrix back(element, tokens, row, row + 2), cosines(element, tokens, dim / 2, dim / 2), sines(element, tokens, dim / 2, dim / 2);
  for (Matrix* matrix : {&q, &k, &v, &back, &cosines, &sines}) plain(*matrix);
  Matrix output(element, tokens, row, row), dq(element, tokens, row, row), dk(element, tokens, kv_row, kv_row),
      dv(element, tokens, kv_row, kv_row);
  std::vector<float> sums(static_cast<size_t>(heads * tokens));
  const bool rotates = dim % 2 == 0;
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  const PackedAttention in{{q.data(), q.stride, dim}, {k.data(), k.stride, dim}, {v.data(), v.stride, dim},
                           rotates ? cosines.data() : nullptr, rotates ? sines.data() : nullptr, bounds.data(), families, tokens,
                           heads, kv_heads, dim, scale, element};
  kernels.attention(in, {output.data(), sums.data()}, 0, 2 * kv_heads);
  kernels.attention_back(in, {{back.data(), back.stride, dim}, output.data(), sums.data(), dq.data(), dk.data(), dv.data()}, 0,
                         2 * kv_heads);
  typedef std::vector<double> Row;
  const auto turned = [&](const Matrix& from, int64_t token, int64_t head) {
    Row found(static_cast<size_t>(dim));
    for (int32_t d = 0; d < dim; ++d) found[static_cast<size_t>(d)] = from.at(token, head * dim + d);
    for (int32_t d = 0; rotates && d < dim / 2; ++d) {
      double &a = found[static_cast<size_t>(d)], &b = found[static_cast<size_t>(d + dim / 2)];
      const double c = cosines.at(token, d), s = sines.at(token, d), was = a;
      a = was * c - b * s, b = b * c + was * s;
    }
    return found;
  };
  const auto dot = [&](const Row& a, const Row& b) {
    double sum = 0;
    for (size_t d = 0; d < a.size(); ++d) sum += a[d] * b[d];
    return sum;
  };
  std::vector<Row> want_k(static_cast<size_t>(tokens * kv_heads), Row(static_cast<size_t>(dim))), want_v = want_k;
  const double unit = element == Element::float32 ? 2e-5 : element == Element::bfloat16 ? 0.12 : 0.015;  // the backward begins with a rounded output
  const auto near = [&](const char* what, const Matrix& found, int64_t token, int64_t head, Row wanted, bool rotated) {
    for (int32_t d = 0; rotated && rotates && d < dim / 2; ++d) {
      double &a = wanted[static_cast<size_t>(d)], &b = wanted[static_cast<size_t>(d + dim / 2)];
      const double c = cosines.at(token, d), s = sines.at(token, d), was = a;
      a = was * c + b * s, b = b * c - was * s;
    }
    double size = 1;
    for (const double value : wanted) size = std::max(size, std::fabs(value));
    for (int32_t d = 0; d < dim; ++d)
      expect(what, kernels.isa, dim, found.at(token, head * dim + d), wanted[static_cast<size_t>(d)], unit * size);
  };
  for (int64_t segment = 0; segment <= last; ++segment)
    for (int64_t token = bounds[static_cast<size_t>(segment)]; token < bounds[static_cast<size_t>(segment) + 1]; ++token)
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t of = head / (heads / kv_heads);
        std::vector<int64_t> seen;
        if (segment > 0 && segment < last)
          for (int64_t j = 0; j < prompt; ++j) seen.push_back(j);
        for (int64_t j = bounds[static_cast<size_t>(segment)]; j <= token; ++j) seen.push_back(j);
        const Row query = turned(q, token, head);
        std::vector<double> scores;
        for (const int64_t j : seen) scores.push_back(scale * dot(query, turned(k, j, of)));
        const double largest = *std::max_element(scores.begin(), scores.end());
        double total = 0;
        for (const double score : scores) total += std::exp(score - largest);
        expect("log-sum-exp", kernels.isa, dim, sums[static_cast<size_t>(head * tokens + token)], largest + std::log(total),
               2e-5 * (1 + std::fabs(largest)));
        Row wanted(static_cast<size_t>(dim)), slope(static_cast<size_t>(dim)), g(static_cast<size_t>(dim));
        for (int32_t d = 0; d < dim; ++d) g[static_cast<size_t>(d)] = back.at(token, head * dim + d);
        double mean = 0;
        std::vector<double> shares, pulls;
        for (size_t i = 0; i < seen.size(); ++i) {
          Row value(static_cast<size_t>(dim));
          for (int32_t d = 0; d < dim; ++d) value[static_cast<size_t>(d)] = v.at(seen[i], of * dim + d);
          shares.push_back(std::exp(scores[i] - largest) / total), pulls.push_back(dot(g, value));
          mean += shares[i] * pulls[i];
          for (size_t d = 0; d < value.size(); ++d) wanted[d] += shares[i] * value[d];
        }
        for (size_t i = 0; i < seen.size(); ++i) {
          const double s = scale * shares[i] * (pulls[i] - mean);
          const Row key = turned(k, seen[i], of);
          const size_t at = static_cast<size_t>(seen[i] * kv_heads + of);
          for (size_t d = 0; d < key.size(); ++d)
            slope[d] += s * key[d], want_k[at][d] += s * query[d], want_v[at][d] += shares[i] * g[d];
        }
        near("attention", output, token, head, wanted, false);
        near("dq", dq, token, head, slope, true);
      }
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t head = 0; head < kv_heads; ++head) {
      near("dk", dk, token, head, want_k[static_cast<size_t>(token * kv_heads + head)], true);
      near("dv", dv, token, head, want_v[static_cast<size_t>(token * kv_heads + head)], false);
    }
}

// One request whose tokens fill its blocks one after the other, in a cache whose other slots hold no number.
void check_cached_attention(const Kernels& kernels, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim) {
  const int64_t places = 32, blocks = (tokens + places - 1) / places, width = (heads + 2 * kv_heads) * dim;
  Matrix qkv(Element::float32, tokens, width, width), angles(Element::float32, tokens, dim, dim);
  std::normal_distribution<float> normal;
  for (float& value : qkv.wide) value = normal(draw);
  for (float& value : angles.wide) value = normal(draw);
  std::vector<float> cache(static_cast<size_t>(blocks * kv_heads * places * 2 * dim), NAN), out(static_cast<size_t>(tokens * heads * dim));
  std::vector<int64_t> positions, slots;
  std::vector<int32_t> requests(static_cast<size_t>(tokens)), table;
  for (int64_t block = 0; block < blocks; ++block) table.push_back(static_cast<int32_t>(blocks - 1 - block));
  for (int64_t i = 0; i < tokens; ++i) positions.push_back(i), slots.push_back(table[static_cast<size_t>(i / places)] * places + i % places);
  const CachedAttention in{qkv.wide.data(), positions.data(), slots.data(), requests.data(), table.data(), angles.wide.data(), cache.data(),
                           blocks, kv_heads * places * 2 * dim, places * 2 * dim, tokens, heads, kv_heads, dim, places, 0.3f};
  kernels.cache_tokens(in, 0, tokens);
  kernels.cached_attention(in, out.data(), 0, tokens * kv_heads);
  const auto turned = [&](int64_t row, int64_t head, int64_t d) {
    const int64_t half = dim / 2, i = d % half;
    const double first = qkv.at(row, head * dim + i), second = qkv.at(row, head * dim + half + i);
    const double cosine = angles.at(row, i), sine = angles.at(row, half + i);
    return d < half ? first * cosine - second * sine : second * cosine + first * sine;
  };
  for (int64_t row = 0; row < tokens; row += 1 + tokens / 5)
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t kv_head = head / (heads / kv_heads);
      std::vector<double> scores;
      double total = 0, size = 0;
      for (int64_t key = 0; key <= row; ++key) {
        double score = 0;
        for (int64_t d = 0; d < dim; ++d) score += turned(row, head, d) * turned(key, heads + kv_head, d);
        scores.push_back(0.3 * score), size = std::max(size, std::fabs(0.3 * score));
      }
      const double largest = *std::max_element(scores.begin(), scores.end());
      for (double& score : scores) total += score = std::exp(score - largest);
      for (int64_t d = 0; d < dim; ++d) {
        double wanted = 0;
        for (int64_t key = 0; key <= row; ++key)
          wanted += scores[static_cast<size_t>(key)] / total * qkv.at(key, (heads + kv_heads + kv_head) * dim + d);
        expect("cached attention", kernels.isa, tokens, out[static_cast<size_t>((row * heads + head) * dim + d)], wanted, 1e-5 * (1 + size));
      }
    }
}

void check_product(const Kernels& kernels, int64_t rows, int64_t width, int64_t depth) {
  Matrix x(Element::float32, rows, depth, depth), w(Element::float32, width, depth, depth), out(Element::float32, rows, width, width);
  std::normal_distribution<float> normal(0, 1);
  for (Matrix* matrix : {&x, &w})
    for (float& value : matrix->wide) value = normal(draw);
  kernels.product({x.wide.data(), w.wide.data(), out.wide.data(), rows, width, depth}, 0, (width + linear_block - 1) / linear_block);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t n = 0; n < width; ++n) {
      double wanted = 0, size = 1;
      for (int64_t i = 0; i < depth; ++i) wanted += x.at(row, i) * w.at(n, i), size += std::fabs(x.at(row, i) * w.at(n, i));
      expect("product", kernels.isa, depth, out.at(row, n), wanted, 1e-6 * size);
    }
}

void check_swiglu(const Kernels& kernels, Element element, int64_t width) {
  const int64_t rows = 3;
  Matrix x(element, rows, 2 * width, 2 * width), g(element, rows, width, width);
  Matrix out(element, rows, width, width), back(element, rows, 2 * width, 2 * width);
  x.fill(4), g.fill(1);
  for (Matrix* matrix : {&x, &g}) {
    for (float& value : matrix->wide) value = std::isinf(value) ? 0.5f : value;
    for (uint16_t& bits : matrix->narrow) bits = bits == 0xff80 || bits == 0xfc00 ? 0 : bits;
  }
  kernels.swiglu({x.data(), nullptr, out.data(), width, element}, 0, rows);
  kernels.swiglu_back({x.data(), g.data(), back.data(), width, element}, 0, rows);
  const double unit = element == Element::float32 ? 1e-6 : element == Element::bfloat16 ? 4e-3 : 5e-4;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < width; ++i) {
      const double gate = x.at(row, i), up = x.at(row, width + i), s = 1 / (1 + std::exp(-gate)), slope = g.at(row, i);
      const double wanted[] = {gate * s * up, slope * up * s * (1 + gate * (1 - s)), slope * gate * s};
      const double found[] = {out.at(row, i), back.at(row, i), back.at(row, width + i)};
      for (int n = 0; n < 3; ++n) expect("SwiGLU", kernels.isa, width, found[n], wanted[n], 1e-6 + unit * std::fabs(wanted[n]));
    }
}

void check_norm(const Kernels& kernels, Element element, int64_t width) {
  const int64_t rows = norm_block + 3, blocks = 2;
  Matrix x(element, rows, width, width), g(element, rows, width, width), w(element, 1, width, width);
  Matrix out(element, rows, width, width), back(element, rows, width, width), of_weight(element, 1, width, width);
  x.fill(4), g.fill(1), w.fill(1);
  for (Matrix* matrix : {&x, &g, &w}) {
    for (float& value : matrix->wide) value = std::isinf(value) ? 0.5f : value;
    for (uint16_t& bits : matrix->narrow) bits = bits == 0xff80 || bits == 0xfc00 ? 0 : bits;
  }
  std::vector<float> scales(rows), parts(static_cast<size_t>(blocks * width));
  const NormRows in{x.data(), w.data(), rows, width, 1e-5, element};
  kernels.norm(in, out.data(), scales.data(), 0, rows);
  kernels.norm_back(in, {g.data(), scales.data(), back.data(), parts.data()}, 0, blocks);
  kernels.norm_weight(parts.data(), blocks, width, element, of_weight.data());
  const double unit = element == Element::float32 ? 2e-6 : element == Element::bfloat16 ? 4e-3 : 5e-4;
  std::vector<double> weight_slope(static_cast<size_t>(width)), weight_size(static_cast<size_t>(width));
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0, products = 0;
    for (int64_t i = 0; i < width; ++i) squares += x.at(row, i) * x.at(row, i);
    const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + 1e-5);
    for (int64_t i = 0; i < width; ++i) products += g.at(row, i) * w.at(0, i) * x.at(row, i) * scale;
    for (int64_t i = 0; i < width; ++i) {
      const double normed = x.at(row, i) * scale, slope = g.at(row, i) * w.at(0, i);
      const double mean = products / static_cast<double>(width) * normed;
      expect("norm", kernels.isa, width, out.at(row, i), normed * w.at(0, i), 1e-6 + unit * std::fabs(normed * w.at(0, i)));
      expect("norm's x", kernels.isa, width, back.at(row, i), scale * (slope - mean),
             1e-5 + unit * scale * (std::fabs(slope) + std::fabs(mean)));
      weight_slope[static_cast<size_t>(i)] += g.at(row, i) * normed;
      weight_size[static_cast<size_t>(i)] += std::fabs(g.at(row, i) * normed);
    }
  }
  for (int64_t i = 0; i < width; ++i)
    expect("norm's weight", kernels.isa, width, of_weight.at(0, i), weight_slope[static_cast<size_t>(i)],
           1e-5 + unit * weight_size[static_cast<size_t>(i)]);
}

// The uniform number lies between the cumulative sums around the token, log-prob and rank are the token's; a last row has none.
void check_sampling(const Kernels& kernels, Element element, int64_t width, float scale) {
  const int64_t rows = 5;
  Matrix logits(element, rows, width, width + 3);
  logits.fill(scale);
  for (int64_t i = 0; i < width; ++i) {
    const size_t at = static_cast<size_t>((rows - 1) * logits.stride + i);
    element == Element::float32 ? void(logits.wide[at] = -INFINITY)
                                : void(logits.narrow[at] = element == Element::bfloat16 ? 0xff80 : 0xfc00);
  }
  const std::vector<float> temperatures{1, 0.7f, 1, 1.3f, 1};
  const std::vector<int64_t> seeds{static_cast<int64_t>(draw()), 0, static_cast<int64_t>(draw()), -5, 7};
  std::vector<int64_t> tokens(rows), ranks(rows);
  std::vector<float> log_probs(rows);
  for (const bool raw : {false, true}) {
    kernels.sample({logits.data(), logits.stride, temperatures.data(), seeds.data(), width, element, raw},
                   {tokens.data(), log_probs.data(), ranks.data()}, 0, rows);
    for (int64_t row = 0; row < rows; ++row) {
      const size_t n = static_cast<size_t>(row);
      const double temperature = temperatures[n], divisor = raw ? 1 : temperature;
      double largest = -INFINITY, total = 0, below = 0, all = 0;
      for (int64_t i = 0; i < width; ++i) largest = std::max(largest, logits.at(row, i));
      if (largest == -INFINITY) {
        expect("no token", kernels.isa, width, static_cast<double>(tokens[n] + ranks[n]), 0, 0);
        expect("no log-prob", kernels.isa, width, log_probs[n], NAN, 0);
        continue;
      }
      int64_t rank = 0;
      for (int64_t i = 0; i < width; ++i) {
        const double weight = std::exp((logits.at(row, i) - largest) / temperature);
        if (i < tokens[n]) below += weight;
        total += weight;
        all += std::exp((logits.at(row, i) - largest) / divisor);
        rank += logits.at(row, i) >= logits.at(row, tokens[n]);
      }
      const double u = static_cast<double>(splitmix64(static_cast<uint64_t>(seeds[n])) >> 11) * 0x1p-53;
      const double weight = std::exp((logits.at(row, tokens[n]) - largest) / temperature);
      expect("drawn", kernels.isa, width, std::clamp(u, below / total, (below + weight) / total), u, 1e-5);
      expect("drawn of weight 0", kernels.isa, width, weight > 0, 1, 0);
      const double wanted = (logits.at(row, tokens[n]) - largest) / divisor - std::log(all);
      double size = std::fabs(wanted);  // quotients are rounded before their difference is taken
      for (int64_t i = 0; i < width; ++i)
        if (logits.at(row, i) > -INFINITY) size = std::max(size, std::fabs(logits.at(row, i)) / divisor);
      expect("its log-prob", kernels.isa, width, log_probs[n], wanted, 2e-6 + 2e-7 * size);
      expect("its rank", kernels.isa, width, static_cast<double>(ranks[n]), static_cast<double>(rank), 0);
    }
  }
}

void check_small_ones() {
  const std::vector<float> values{1, 2, 4, 8};
  const std::vector<int32_t> bounds{0, 0, 3, 4};
  const bool mask[] = {true, false, true, true};
  std::vector<float> sums(3), back(4);
  sequence_sums(values.data(), bounds.data(), mask, sums.data(), 0, 3);
  sequence_sums_backward(sums.data(), bounds.data(), mask, back.data(), 0, 3);
  const float wanted[] = {0, 5, 8}, wanted_back[] = {5, 0, 5, 8};
  for (int64_t i = 0; i < 3; ++i) expect("sequence sum", "", i, sums[static_cast<size_t>(i)], wanted[i], 0);
  for (int64_t i = 0; i < 4; ++i) expect("sequence gradient", "", i, back[static_cast<size_t>(i)], wanted_back[i], 0);
  std::vector<double> rewards{0.1, 0.1, 0.1, 1, 3}, advantages(5);
  const std::vector<int32_t> groups{0, 3, 3, 5};
  bool no_signal[3];
  const auto advantages_of = [&](Normalize normalize) {
    return static_cast<double>(
        grouped_advantages(rewards.data(), groups.data(), 3, normalize, advantages.data(), no_signal));
  };
  expect("broken", "", 0, advantages_of(Normalize::leave_one_out), -1, 0);
  const double leave_one_out[] = {0, 0, 0, -2, 2};
  for (int64_t i = 0; i < 5; ++i) expect("advantage", "", i, advantages[static_cast<size_t>(i)], leave_one_out[i], 0);
  rewards = {0.3, 0.1 + 0.2, 0.3, 1e-200, 3e-200};
  expect("near", "", 0, advantages_of(Normalize::mean_std), -1, 0);
  const double near[] = {0, 0, 0, -1, 1};
  for (int64_t i = 0; i < 5; ++i) expect("near", "", i, advantages[static_cast<size_t>(i)], near[i], 1e-15);
  rewards = {1e308, -1e308, -1.7e308, 1, 3};
  expect("beyond", "", 0, advantages_of(Normalize::mean_std), -1, 0);
  rewards[0] = 1.7e308;
  expect("beyond", "", 1, advantages_of(Normalize::mean), 0, 0);
  rewards[4] = NAN, rewards[0] = 1;
  expect("broken", "", 1, advantages_of(Normalize::mean), 4, 0);
}
}  // namespace

int main() {
  std::vector<Kernels> all{SEMION_KERNELS(baseline)};
  if (best_isa() != Isa::baseline) all.push_back(SEMION_KERNELS(avx2));
  if (best_isa() == Isa::avx512) all.push_back(SEMION_KERNELS(avx512));
  for (const Kernels& kernels : all) {
    for (const Element element : {Element::float32, Element::bfloat16, Element::float16})
      for (int64_t width = 1; width < 6000; width += width < 70 ? 1 : 1409)
        for (const float scale : {2.0f, 40.0f}) check_log_probs(kernels, element, width, scale, width % 2 ? 1.0 : 0.6);
    for (int32_t size = 0; size < 40; ++size) check_policy(kernels, size, 700 - size);
    check_digests(kernels);
    for (const Element element : {Element::float32, Element::bfloat16, Element::float16})
      for (const int32_t dim : {2, 5, 6, 16, 24, 34, 64, 130}) {
        check_attention(kernels, element, dim, 3, {9, 4, 1});
        check_attention(kernels, element, dim, 40, {17, 33, 65});
        check_swiglu(kernels, element, dim);
        check_norm(kernels, element, dim);
      }
    std::printf("checked %s\n", kernels.isa);
  }
  for (const Kernels& kernels : all)  // after the others, which are drawn as before
    for (const Element element : {Element::float32, Element::bfloat16, Element::float16})
      for (int64_t width = 1; width < 6000; width += width < 70 ? 1 : 1409)
        for (const float scale : {2.0f, 40.0f}) check_sampling(kernels, element, width, scale);
  for (const Kernels& kernels : all)
    for (int64_t size = 1; size < 40; ++size) {
      check_product(kernels, size % 15, size, 45 - size);
      check_product(kernels, 7, 9, 500 + size);
    }
  for (const Kernels& kernels : all)
    for (const int64_t tokens : {1, 8, 16, 17, 31, 33, 70}) {
      check_cached_attention(kernels, tokens, 2, 2, 32);
      check_cached_attention(kernels, tokens, 6, 2, 64);
      check_cached_attention(kernels, tokens, 7, 1, 96);
    }
  check_small_ones();
  return num_faults != 0;
}
