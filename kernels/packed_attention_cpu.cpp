// The two products of packed attention for few query rows, over codes as they lie in memory; see packed_attention.py.
//
// Bytes become floats in a tile that stays in the first-level cache, and every row of the KV head is multiplied with it
// there: memory is read once, and written only with scores or outputs. Rows are the heads of a group and their queries.
// HEAD_DIM is given to the compiler; it is padded to whole vectors with zeros.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
constexpr int64_t VECTORS = (HEAD_DIM + LANES - 1) / LANES;
constexpr int64_t TILE = 32;   // tokens
constexpr int64_t AHEAD = 64;  // tokens whose bytes are fetched before they are needed

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef uint16_t Shorts __attribute__((vector_size(LANES * 2)));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

// One token's codes as floats: byte j holds channels j, j + width, j + 2 · width ... from the lowest bits up.
template <int BITS>
inline void widen(const uint8_t* bytes, int64_t token_stride, Vector* to) {
  constexpr int64_t WIDTH = HEAD_DIM * BITS / 8;
  constexpr int32_t TOP = (1 << BITS) - 1;
  __builtin_prefetch(bytes + AHEAD * token_stride);
  if constexpr (WIDTH % LANES == 0) {
    for (int64_t j = 0; j < WIDTH / LANES; j++) {
      const Bytes narrow = reinterpret_cast<const Bytes*>(bytes)[j];
      const Integers wide = __builtin_convertvector(__builtin_convertvector(narrow, Shorts), Integers);
      for (int digit = 0; digit < 8 / BITS; digit++)
        to[digit * (WIDTH / LANES) + j] = __builtin_convertvector(wide >> BITS * digit & TOP, Vector);
    }
  } else {
    float* codes = reinterpret_cast<float*>(to);
    for (int digit = 0; digit < 8 / BITS; digit++)
      for (int64_t j = 0; j < WIDTH; j++) codes[digit * WIDTH + j] = bytes[j] >> BITS * digit & TOP;
  }
}

// Lane i: the sum of the lanes of parts[i].
inline Vector sums(Vector* parts) {
  Integers even;
  for (int64_t i = 0; i < LANES; i++) even[i] = 2 * i;
#pragma GCC unroll 16
  for (int64_t count = LANES / 2; count; count /= 2)
#pragma GCC unroll 16
    for (int64_t i = 0; i < count; i++) {
      const Vector a = parts[2 * i], b = parts[2 * i + 1];
      parts[i] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
    }
  return parts[0];
}

inline float total(Vector x) {
  float sum = 0;
  for (int64_t lane = 0; lane < LANES; lane++) sum += x[lane];
  return sum;
}

// Vector v of so many floats; zero after them.
inline Vector load(const float* from, int64_t v, int64_t count) {
  Vector x = {};
  const int64_t left = std::min(LANES, count - v * LANES);
  if (left == LANES)
    std::memcpy(&x, from + v * LANES, sizeof x);
  else if (left > 0)
    std::memcpy(&x, from + v * LANES, left * sizeof(float));
  return x;
}

struct Shape {
  int64_t batch, kv_heads, rows, tokens;
  int64_t batch_stride, head_stride, token_stride;  // of the codes, in bytes
};

template <int BITS>
void scores(const Shape& s, const float* q, const uint8_t* codes, const float* scale, const float* zero,
            int64_t group, float* out, int threads) {
  const int64_t blocks = s.tokens / group;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t head = 0; head < s.batch * s.kv_heads; head++)
    for (int64_t block = 0; block < blocks; block++) {
      std::vector<Vector> folded(s.rows * VECTORS);
      std::vector<float> offset(s.rows);
      const float* block_scale = scale + (head * blocks + block) * HEAD_DIM;
      const float* block_zero = zero + (head * blocks + block) * HEAD_DIM;
      for (int64_t row = 0; row < s.rows; row++) {
        Vector products = {};
        for (int64_t v = 0; v < VECTORS; v++) {
          const Vector x = load(q + (head * s.rows + row) * HEAD_DIM, v, HEAD_DIM);
          folded[row * VECTORS + v] = x * load(block_scale, v, HEAD_DIM);
          products += x * load(block_zero, v, HEAD_DIM);
        }
        offset[row] = total(products);
      }
      const uint8_t* bytes = codes + head / s.kv_heads * s.batch_stride + head % s.kv_heads * s.head_stride;
      Vector tile[LANES][VECTORS] = {};
      for (int64_t first = block * group; first < (block + 1) * group; first += LANES) {
        const int64_t tokens = std::min(LANES, (block + 1) * group - first);
        for (int64_t t = 0; t < tokens; t++) widen<BITS>(bytes + (first + t) * s.token_stride, s.token_stride, tile[t]);
        for (int64_t row = 0; row < s.rows; row++) {
          Vector parts[LANES];
#pragma GCC unroll 16
          for (int64_t t = 0; t < LANES; t++) {
            parts[t] = folded[row * VECTORS] * tile[t][0];
            for (int64_t v = 1; v < VECTORS; v++) parts[t] += folded[row * VECTORS + v] * tile[t][v];
          }
          const Vector row_scores = sums(parts) + offset[row];
          std::memcpy(out + (head * s.rows + row) * s.tokens + first, &row_scores, tokens * sizeof(float));
        }
      }
    }
}

template <int BITS>
void outputs(const Shape& s, const float* p, const uint8_t* codes, const float* scale, const float* zero,
             int64_t splits, float* out, int threads) {
  const int64_t heads = s.batch * s.kv_heads, each = (s.tokens + splits - 1) / splits;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t split = 0; split < splits; split++)
    for (int64_t head = 0; head < heads; head++) {
      std::vector<Vector> sum(s.rows * VECTORS), offset(s.rows);
      const uint8_t* bytes = codes + head / s.kv_heads * s.batch_stride + head % s.kv_heads * s.head_stride;
      const int64_t last = std::min(s.tokens, (split + 1) * each);
      Vector tile[TILE][VECTORS] = {};
      for (int64_t first = split * each; first < last; first += TILE) {
        const int64_t tokens = std::min(TILE, last - first);
        for (int64_t t = 0; t < tokens; t++) widen<BITS>(bytes + (first + t) * s.token_stride, s.token_stride, tile[t]);
        for (int64_t row = 0; row < s.rows; row++) {
          Vector weights[TILE / LANES];  // zero after the last token
          for (int64_t v = 0; v < TILE / LANES; v++) {
            const Vector x = load(p + (head * s.rows + row) * s.tokens + first, v, tokens);
            weights[v] = x * load(scale + head * s.tokens + first, v, tokens);
            offset[row] += x * load(zero + head * s.tokens + first, v, tokens);
          }
          Vector parts[VECTORS] = {};
          for (int64_t t = 0; t < TILE; t++)
            for (int64_t v = 0; v < VECTORS; v++) parts[v] += weights[t / LANES][t % LANES] * tile[t][v];
          for (int64_t v = 0; v < VECTORS; v++) sum[row * VECTORS + v] += parts[v];
        }
      }
      for (int64_t row = 0; row < s.rows; row++) {
        float* to = out + ((split * heads + head) * s.rows + row) * HEAD_DIM;
        const float shift = total(offset[row]);
        for (int64_t d = 0; d < HEAD_DIM; d++) to[d] = sum[row * VECTORS + d / LANES][d % LANES] + shift;
      }
    }
}

}  // namespace

extern "C" {

// out[batch, kv_heads, rows, tokens] = q[batch, kv_heads, rows, HEAD_DIM] · (zero + scale · code), with scale and zero
// [batch, kv_heads, tokens / group, HEAD_DIM].
void packed_scores(const Shape* shape, int bits, const float* q, const uint8_t* codes, const float* scale,
                   const float* zero, int64_t group, float* out, int threads) {
  const auto run = bits == 8 ? scores<8> : bits == 4 ? scores<4> : bits == 2 ? scores<2> : scores<1>;
  run(*shape, q, codes, scale, zero, group, out, threads);
}

// out[splits, batch, kv_heads, rows, HEAD_DIM], each of its part of the tokens: the sum of p[batch, kv_heads, rows,
// tokens] · (zero + scale · code), with scale and zero [batch, kv_heads, tokens].
void packed_outputs(const Shape* shape, int bits, const float* p, const uint8_t* codes, const float* scale,
                    const float* zero, int64_t splits, float* out, int threads) {
  const auto run = bits == 8 ? outputs<8> : bits == 4 ? outputs<4> : bits == 2 ? outputs<2> : outputs<1>;
  run(*shape, p, codes, scale, zero, splits, out, threads);
}
}
