// packed_attention.h on the CPU, compiled once per instruction set. The sequences are short and many: of each, keys and values
// are packed once for all queries of their head, and every product is one kernel that keeps a tile of the result in
// registers. A block of queries has its scores over all keys at once, so that the softmax is exact and nothing is rescaled.
#include "packed_attention.h"

#include <new>

#include "../vec.h"

namespace semion {
namespace SEMION_ISA {
namespace {
constexpr int64_t block_rows = 32;  // queries whose scores exist at once
constexpr int64_t block_depth = 128;  // of a product, so that what is read again stays in the first-level cache
constexpr int tile_rows = 4;
constexpr int tile_vectors = SEMION_LANES == 16 ? 4 : 2;
constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

// What follows stands for the standard library's, whose templates would be the linker's to choose among instruction sets.
int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

void fill(float* from, float* until, float value) {
  for (; from < until; ++from) *from = value;
}

class Room {
 public:
  Room() = default;
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() { delete[] data_; }

  // At least so many floats, of any value; what was there before is gone.
  float* of(int64_t count) {
    if (count > size_) {
      delete[] data_;
      data_ = nullptr, size_ = 0;
      data_ = new float[static_cast<size_t>(count)];
      size_ = count;
    }
    return data_;
  }
  float* data() const { return data_; }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

int64_t whole_vectors(int64_t count) {
  return (count + lanes - 1) / lanes * lanes;
}

// One side of a product: element (row, k) of the left, or the vector (k, column) of the right.
struct Left {
  const float* data;
  int64_t row, k;
};
struct Right {
  const float* data;
  int64_t k, vector;
};

template <int rows, int vectors>
void tile(Left a, Right b, int64_t depth, float* c, int64_t ldc, bool add) {
  Floats sums[rows][vectors];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) sums[r][v] = add ? load(c + r * ldc + v * lanes) : all(0);
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[vectors];
    for (int v = 0; v < vectors; ++v) right[v] = load(b.data + k * b.k + v * b.vector);
    for (int r = 0; r < rows; ++r) {
      const Floats left = all(a.data[r * a.row + k * a.k]);
      for (int v = 0; v < vectors; ++v) sums[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) store(c + r * ldc + v * lanes, sums[r][v]);
}

template <int vectors>
void tiles(Left a, Right b, int64_t rows, int64_t depth, float* c, int64_t ldc, bool add) {
  int64_t r = 0;
  for (; r + tile_rows <= rows; r += tile_rows, a.data += tile_rows * a.row, c += tile_rows * ldc)
    tile<tile_rows, vectors>(a, b, depth, c, ldc, add);
  switch (rows - r) {
    case 3: return tile<3, vectors>(a, b, depth, c, ldc, add);
    case 2: return tile<2, vectors>(a, b, depth, c, ldc, add);
    case 1: return tile<1, vectors>(a, b, depth, c, ldc, add);
  }
}

// c [rows, vectors * lanes] = a b, or what is there and a b.
void product(Left a, Right b, int64_t rows, int64_t vectors, int64_t depth, float* c, int64_t ldc, bool add) {
  for (int64_t first = 0; first < vectors; first += tile_vectors) {
    const Right columns{b.data + first * b.vector, b.k, b.vector};
    float* to = c + first * lanes;
    for (int64_t k = 0; k < depth || k == 0; k += block_depth) {
      const int64_t part = least(block_depth, depth - k);
      const Left left{a.data + k * a.k, a.row, a.k};
      const Right right{columns.data + k * b.k, b.k, b.vector};
      const bool more = add || k > 0;
      switch (least(tile_vectors, vectors - first)) {
        case 1: tiles<1>(left, right, rows, part, to, ldc, more); break;
        case 2: tiles<2>(left, right, rows, part, to, ldc, more); break;
#if SEMION_LANES == 16
        case 3: tiles<3>(left, right, rows, part, to, ldc, more); break;
        case 4: tiles<4>(left, right, rows, part, to, ldc, more); break;
#endif
      }
    }
  }
}

// A head's row of floats, times `factor`, rotated by the token's angle where there is one; `sign` -1 turns it back.
template <class E>
void rotate(float* row, int64_t half, const E* cosines, const E* sines, float sign) {
  int64_t i = 0;
  for (; i + lanes <= half; i += lanes) {
    const Floats a = load(row + i), b = load(row + half + i), c = load(cosines + i), s = load(sines + i) * sign;
    store(row + i, a * c - b * s);
    store(row + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = row[i], b = row[half + i], c = widen(cosines + i), s = widen(sines + i) * sign;
    row[i] = a * c - b * s;
    row[half + i] = b * c + a * s;
  }
}

template <class E>
void read_row(const E* from, int64_t size, int64_t padded, float factor, float* to) {
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) store(to + i, load(from + i) * factor);
  for (; i < size; ++i) to[i] = widen(from + i) * factor;
  for (; i < padded; ++i) to[i] = 0;
}

template <class E>
void write_row(const float* from, int64_t size, float factor, E* to) {
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) store(to + i, load(from + i) * factor);
  if (i < size) {
    float rest[lanes] = {};
    std::memcpy(rest, from + i, static_cast<size_t>(size - i) * sizeof(float));
    store_part(to + i, size - i, load(rest) * factor);
  }
}

// rows [n, depth] -> panels [n / lanes, depth, lanes]: what a product reads whose columns are these rows. Rows beyond n are 0.
void to_panels(const float* rows, int64_t n, int64_t depth, float* panels) {
  for (int64_t first = 0; first < n; first += lanes, panels += depth * lanes) {
    const int64_t count = least(lanes, n - first);
    if (count < lanes) fill(panels, panels + depth * lanes, 0.0f);
    for (int64_t lane = 0; lane < count; ++lane) {
      const float* row = rows + (first + lane) * depth;
      for (int64_t d = 0; d < depth; ++d) panels[d * lanes + lane] = row[d];
    }
  }
}

// The keys and values of a segment, and in a backward their gradients: of one head, in float, rows of whole vectors.
struct Keys {
  int64_t first = 0, count = 0;  // tokens of the row
  Room k, v, k_panels, v_panels, dk, dv;
};

template <class E>
struct Head {
  const PackedAttention& in;
  int64_t head, group, dim, padded;
  float factor;  // of the queries: scores are exponents of 2

  Head(const PackedAttention& in, int64_t head)
      : in(in),
        head(head),
        group(in.heads / in.kv_heads),
        dim(in.head_dim),
        padded(whole_vectors(in.head_dim)),
        factor(static_cast<float>(in.scale * log2_e)) {}

  const E* row_of(const HeadRows& rows, int64_t token, int64_t h) const {
    return static_cast<const E*>(rows.data) + token * rows.token_stride + h * rows.head_stride;
  }

  void turn(float* row, int64_t token, float sign) const {
    if (in.cosines == nullptr) return;
    const int64_t half = dim / 2, at = token * half;
    rotate(row, half, static_cast<const E*>(in.cosines) + at, static_cast<const E*>(in.sines) + at, sign);
  }

  void pack(Keys& keys, int64_t segment, bool backward) const {
    keys.first = in.bounds[segment], keys.count = in.bounds[segment + 1] - keys.first;
    const int64_t size = keys.count * padded, panels = whole_vectors(keys.count) * padded;
    float *k = keys.k.of(size), *v = keys.v.of(size);
    for (int64_t i = 0; i < keys.count; ++i) {
      float* row = k + i * padded;
      read_row(row_of(in.k, keys.first + i, head), dim, padded, 1.0f, row);
      turn(row, keys.first + i, 1);
      read_row(row_of(in.v, keys.first + i, head), dim, padded, 1.0f, v + i * padded);
    }
    to_panels(k, keys.count, padded, keys.k_panels.of(panels));
    if (!backward) return;
    to_panels(v, keys.count, padded, keys.v_panels.of(panels));
    for (Room* gradient : {&keys.dk, &keys.dv}) {
      float* from = gradient->of(size);
      fill(from, from + size, 0);
    }
  }
};

// Scores of a block of queries: columns of the prompt, whole vectors of them, then of the segment's own tokens.
struct Columns {
  int64_t prompt, own;      // keys
  int64_t own_from, width;  // where the own ones begin, and the length of a row

  Columns(int64_t prompt, int64_t own)
      : prompt(prompt), own(own), own_from(whole_vectors(prompt)), width(own_from + whole_vectors(own)) {}
};

void scores_of(const float* rows, int64_t num_rows, int64_t padded, const float* prompt_panels, const float* own_panels,
               const Columns& columns, float* scores) {
  const Left left{rows, padded, 1};
  const auto against = [&](const float* panels, int64_t count, float* to) {
    if (count > 0)
      product(left, {panels, lanes, padded * lanes}, num_rows, whole_vectors(count) / lanes, padded, to, columns.width, false);
  };
  against(prompt_panels, columns.prompt, scores);
  against(own_panels, columns.own, scores + columns.own_from);
}

// What a query whose own keys end at `seen` has nothing to do with.
void hide(float* row, const Columns& columns, int64_t seen, float value) {
  fill(row + columns.prompt, row + columns.own_from, value);
  fill(row + columns.own_from + seen, row + columns.width, value);
}

template <class E>
void attend(const Head<E>& of, const Keys* prompt, const Keys& own, const AttentionOutput& out, Room& room) {
  const PackedAttention& in = of.in;
  const int64_t padded = of.padded, group = of.group, rows = own.count * group;
  const int64_t widest = Columns(prompt ? prompt->count : 0, own.count).width;
  float *scores = room.of(block_rows * (widest + 2 * padded)), *queries = scores + block_rows * widest, *sums = queries + block_rows * padded;
  for (int64_t first = 0; first < rows; first += block_rows) {
    const int64_t count = least(block_rows, rows - first);
    const Columns columns(prompt ? prompt->count : 0, (first + count - 1) / group + 1);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = own.first + (first + r) / group, h = of.head * group + (first + r) % group;
      read_row(of.row_of(in.q, token, h), of.dim, padded, of.factor, queries + r * padded);
      of.turn(queries + r * padded, token, 1);
    }
    scores_of(queries, count, padded, prompt ? prompt->k_panels.data() : nullptr, own.k_panels.data(), columns, scores);
    float totals[block_rows];
    for (int64_t r = 0; r < count; ++r) {
      float* row = scores + r * columns.width;
      hide(row, columns, (first + r) / group + 1, -INFINITY);
      Floats most = all(-INFINITY), total = all(0);
      for (int64_t i = 0; i < columns.width; i += lanes) most = larger(most, load(row + i));
      const float largest = largest_lane(most);
      for (int64_t i = 0; i < columns.width; i += lanes) {
        const Floats share = exp2(load(row + i) - largest);
        total += share;
        store(row + i, share);
      }
      const double whole = sum_lanes(total);
      totals[r] = static_cast<float>(1 / whole);
      const int64_t token = own.first + (first + r) / group, h = of.head * group + (first + r) % group;
      out.sums[h * in.num_tokens + token] = static_cast<float>(ln_2 * largest + std::log(whole));
    }
    if (prompt) product({scores, columns.width, 1}, {prompt->v.data(), padded, lanes}, count, padded / lanes, prompt->count, sums, padded, false);
    product({scores + columns.own_from, columns.width, 1}, {own.v.data(), padded, lanes}, count, padded / lanes, columns.own, sums,
            padded, prompt != nullptr);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = own.first + (first + r) / group, h = of.head * group + (first + r) % group;
      write_row(sums + r * padded, of.dim, totals[r], static_cast<E*>(out.output) + (token * in.heads + h) * of.dim);
    }
  }
}

template <class E>
void go_back(const Head<E>& of, Keys* prompt, Keys& own, const AttentionGradient& gradient, Room& room) {
  const PackedAttention& in = of.in;
  const int64_t padded = of.padded, group = of.group, rows = own.count * group, vectors = padded / lanes;
  const int64_t widest = Columns(prompt ? prompt->count : 0, own.count).width;
  float *shares = room.of(block_rows * (2 * widest + 3 * padded)), *slopes = shares + block_rows * widest, *queries = slopes + block_rows * widest;
  float *back = queries + block_rows * padded, *dq = back + block_rows * padded;
  for (int64_t first = 0; first < rows; first += block_rows) {
    const int64_t count = least(block_rows, rows - first);
    const Columns columns(prompt ? prompt->count : 0, (first + count - 1) / group + 1);
    float deltas[block_rows], references[block_rows];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = own.first + (first + r) / group, h = of.head * group + (first + r) % group;
      read_row(of.row_of(in.q, token, h), of.dim, padded, of.factor, queries + r * padded);
      of.turn(queries + r * padded, token, 1);
      float *row = back + r * padded, *known = dq + r * padded;
      read_row(of.row_of(gradient.gradient, token, h), of.dim, padded, 1.0f, row);
      read_row(static_cast<const E*>(gradient.output) + (token * in.heads + h) * of.dim, of.dim, padded, 1.0f, known);
      Floats sum = all(0);
      for (int64_t i = 0; i < padded; i += lanes) sum += load(row + i) * load(known + i);
      deltas[r] = static_cast<float>(sum_lanes(sum));
      references[r] = static_cast<float>(gradient.sums[h * in.num_tokens + token] * log2_e);
    }
    scores_of(queries, count, padded, prompt ? prompt->k_panels.data() : nullptr, own.k_panels.data(), columns, shares);
    scores_of(back, count, padded, prompt ? prompt->v_panels.data() : nullptr, own.v_panels.data(), columns, slopes);
    for (int64_t r = 0; r < count; ++r) {
      float *share = shares + r * columns.width, *slope = slopes + r * columns.width;
      hide(share, columns, (first + r) / group + 1, -INFINITY);
      for (int64_t i = 0; i < columns.width; i += lanes) {
        const Floats p = exp2(load(share + i) - references[r]);
        store(share + i, p);
        store(slope + i, p * (load(slope + i) - deltas[r]));
      }
    }
    const auto to_keys = [&](Keys& keys, int64_t at, int64_t seen, bool add) {
      const float *p = shares + at, *s = slopes + at;
      product({p, 1, columns.width}, {back, padded, lanes}, seen, vectors, count, keys.dv.data(), padded, true);
      product({s, 1, columns.width}, {queries, padded, lanes}, seen, vectors, count, keys.dk.data(), padded, true);
      product({s, columns.width, 1}, {keys.k.data(), padded, lanes}, count, vectors, seen, dq, padded, add);
    };
    if (prompt) to_keys(*prompt, 0, columns.prompt, false);
    to_keys(own, columns.own_from, columns.own, prompt != nullptr);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = own.first + (first + r) / group, h = of.head * group + (first + r) % group;
      of.turn(dq + r * padded, token, -1);
      write_row(dq + r * padded, of.dim, in.scale, static_cast<E*>(gradient.q) + (token * in.heads + h) * of.dim);
    }
  }
}

template <class E>
void write_keys(const Head<E>& of, Keys& keys, const AttentionGradient& gradient) {
  for (int64_t i = 0; i < keys.count; ++i) {
    const int64_t token = keys.first + i, at = (token * of.in.kv_heads + of.head) * of.dim;
    float* row = keys.dk.data() + i * of.padded;
    of.turn(row, token, -1);
    write_row(row, of.dim, static_cast<float>(ln_2), static_cast<E*>(gradient.k) + at);
    write_row(keys.dv.data() + i * of.padded, of.dim, 1.0f, static_cast<E*>(gradient.v) + at);
  }
}

template <class E>
void forward_of(const PackedAttention& in, const AttentionOutput& out, int64_t begin, int64_t end) {
  Keys prompt, own;
  Room room;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Family& family = in.families[unit / in.kv_heads];
    const Head<E> of(in, unit % in.kv_heads);
    of.pack(prompt, family.prompt, false);
    attend(of, nullptr, prompt, out, room);
    for (int64_t sample = family.first_sample; sample < family.end_sample; ++sample) {
      of.pack(own, sample, false);
      attend(of, &prompt, own, out, room);
    }
  }
}

template <class E>
void backward_of(const PackedAttention& in, const AttentionGradient& gradient, int64_t begin, int64_t end) {
  Keys prompt, own;
  Room room;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Family& family = in.families[unit / in.kv_heads];
    const Head<E> of(in, unit % in.kv_heads);
    of.pack(prompt, family.prompt, true);
    go_back(of, nullptr, prompt, gradient, room);
    for (int64_t sample = family.first_sample; sample < family.end_sample; ++sample) {
      of.pack(own, sample, true);
      go_back(of, &prompt, own, gradient, room);
      write_keys(of, own, gradient);
    }
    write_keys(of, prompt, gradient);
  }
}
}  // namespace

void packed_attention(const PackedAttention& in, const AttentionOutput& out, int64_t begin, int64_t end) {
  switch (in.element) {
    case Element::float32: return forward_of<float>(in, out, begin, end);
    case Element::bfloat16: return forward_of<Bf16>(in, out, begin, end);
    case Element::float16: return forward_of<Half>(in, out, begin, end);
  }
}

void packed_attention_backward(const PackedAttention& in, const AttentionGradient& gradient, int64_t begin, int64_t end) {
  switch (in.element) {
    case Element::float32: return backward_of<float>(in, gradient, begin, end);
    case Element::bfloat16: return backward_of<Bf16>(in, gradient, begin, end);
    case Element::float16: return backward_of<Half>(in, gradient, begin, end);
  }
}
}  // namespace SEMION_ISA
}  // namespace semion
