// Decoding on a CPU: the product that reads only the weight rows of kept inputs, and a whole decode step of 1 to 8 texts
// made of it. cpu.py builds it and calls the product, decoder.py the step.
//
// The product alone: a thread takes a range of the outputs, so sums have one order, whatever the number of threads. In
// a step: a thread takes a part of the kept inputs at full width, so its rows are long streams, and the sums are added
// when the threads have met. Either way a thread lists the kept inputs, then adds eight kept rows at a time to float32
// sums that stay in the first-level cache, fetching later ones meanwhile. Several texts, and gate and up, share what is
// read: the list is of inputs that any of them keeps, with a value of 0 for what cuts the input, which adds exactly
// nothing. Values are rounded to the model's dtype where the plain torch path rounds them; only the inside of attention
// keeps float32.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <omp.h>
#include <signal.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// ---- vectors of the widest kind that this build has: 16 floats with AVX-512, 8 with AVX2, 4 with NEON and SSE

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <typename To, typename From>
To read(const From* from) {
  To value;
  std::memcpy(&value, from, sizeof(To));
  return value;
}

// a * b + c, rounded once where the CPU can.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool ROUNDS_ONCE = true;
#else
constexpr bool ROUNDS_ONCE = false;
#endif
inline float fma(float a, float b, float c) { return ROUNDS_ONCE ? __builtin_fmaf(a, b, c) : a * b + c; }
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int64_t lane = 0; lane < LANES; lane++) c[lane] = fma(a[lane], b[lane], c[lane]);
  return c;
#endif
}
inline Floats fma(float a, Floats b, Floats c) { return fma(a - Floats{}, b, c); }

float sum(Floats v) {
  float total = 0;
  for (int64_t lane = 0; lane < LANES; lane++) total += v[lane];
  return total;
}

// ---- weight types: `load` widens LANES of them, `float` one; `from` rounds to the nearest, ties to even

struct BFloat16;
struct Int4;
struct Packed;

// How many vectors hold what lies side by side: output APART i + v is lane i of vector v, of weights and of the sums
// while rows are added. 1: all are in order.
template <typename T>
constexpr int64_t APART = std::is_same_v<T, Packed> ? 8 : std::is_same_v<T, BFloat16> || std::is_same_v<T, Int4> ? 2 : 1;

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    return read<float>(&wide);
  }
  static BFloat16 from(float value) {
    const uint32_t wide = read<uint32_t>(&value);
    const uint16_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return {value == value ? rounded : uint16_t(0x7fc0)};
  }
  static Floats load(const BFloat16* from) {
#if defined(__AVX512F__)  // gcc 12 widens a vector in two halves
    const Words wide = (Words)_mm512_cvtepu16_epi32(read<__m256i>(from));
#elif defined(__AVX2__)
    const Words wide = (Words)_mm256_cvtepu16_epi32(read<__m128i>(from));
#else
    const Words wide = __builtin_convertvector(read<Halves>(from), Words);
#endif
    return (Floats)(wide << 16);
  }
  static void load(const BFloat16* from, Floats& even, Floats& odd) {  // in half the time of two vectors in order
    const Words pairs = read<Words>(from);
    even = (Floats)(pairs << 16), odd = (Floats)(pairs & 0xffff0000);
  }
};

struct Float16 {
  _Float16 value;
  operator float() const { return value; }
  static Float16 from(float value) { return {_Float16(value)}; }
  static Floats load(const Float16* from) {
#if defined(__AVX512F__)  // gcc 12 converts a vector of _Float16 lane by lane
    return (Floats)_mm512_cvtph_ps(read<__m256i>(from));
#elif defined(__F16C__) && defined(__AVX2__)
    return (Floats)_mm256_cvtph_ps(read<__m128i>(from));
#else
    typedef _Float16 Float16s __attribute__((vector_size(2 * LANES)));
    return __builtin_convertvector(read<Float16s>(from), Floats);
#endif
  }
};

struct Float32 {
  float value;
  operator float() const { return value; }
  static Float32 from(float value) { return {value}; }
  static Floats load(const Float32* from) { return read<Floats>(from); }
};

struct Int8 {  // of a weight alone; the scale of its output makes it what it stands for
  int8_t value;
  operator float() const { return value; }
  static Floats load(const Int8* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(from)));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    return __builtin_convertvector(read<Bytes>(from), Floats);
#endif
  }
};

struct Int4 {  // of a weight alone: two outputs' codes, the even one's in the low nibble; see kernels/quantized.py
  uint8_t codes;
  float at(int64_t odd) const { return (codes >> odd * 4 & 15) - 8; }
  // The codes of 2 LANES outputs less 8, even and odd ones apart. Putting them in order here would double the time.
  static void load(const Int4* from, Floats& even, Floats& odd) {
#if defined(__AVX512F__)
    const __m512i codes = _mm512_cvtepu8_epi32(read<__m128i>(from));
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    even = (Floats)_mm512_permutexvar_ps(codes, values);  // which looks at an index's lowest 4 bits
    odd = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values);
#elif defined(__AVX2__)
    const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
    even = (Floats)_mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(15))) - 8.0f;
    odd = (Floats)_mm256_cvtepi32_ps(_mm256_srli_epi32(codes, 4)) - 8.0f;
#else
    for (int64_t lane = 0; lane < LANES; lane++) even[lane] = from[lane].at(0), odd[lane] = from[lane].at(1);
#endif
  }
};

// bfloat16 in 12 bits, see kernels/packed.py. 64 weights are a group of 96 bytes, three planes of 32-bit words, of which
// the words t are about weights 8 t to 8 t + 7, an element. Escapes are in a table that kernels/packed.py describes.
struct Packed {
  static constexpr int64_t GROUP = 64, GROUP_BYTES = 96;
  uint8_t bytes[GROUP_BYTES];

  // Weights 2 pair and 2 pair + 1 of elements, bfloat16 side by side, from their words; base: of their segment's window,
  // from the table.
  template <typename Word>
  static Word two(int pair, Word first, Word second, Word third, uint32_t base) {
    if (pair < 3) return ((pair == 0 ? first : pair == 1 ? second : third) & 0x87ff87ff) + base;
    return ((first >> 4 & 0x07800780) | (second >> 8 & 0x00780078) | ((third >> 12 | third << 20) & 0x80078007)) + base;
  }

  // The segment of a column.
  static int segment(const int32_t* table, int64_t column) { return (column >= table[5]) + (column >= table[6]); }

  struct Escape {
    int32_t column, bits;  // of the bfloat16
  };

  // Puts an escape, weight i of a block, into the words of pairs from `first` on, if it is one of these.
  template <typename Word, size_t PAIRS>
  static void put(Word (&two)[PAIRS], int first, int64_t i, uint32_t bits) {
    constexpr size_t N = sizeof(Word) / sizeof(uint32_t);
    Word lanes;
    for (size_t lane = 0; lane < N; lane++) lanes[lane] = lane;
    const uint32_t there = i % 2 ? 0xffff0000 : 0xffff, pair = i % 8 / 2 - first, lane = i / 8;
    for (uint32_t p = 0; p < PAIRS; p++)
      two[p] = lanes == (p == pair ? lane : ~0u) ? (two[p] & ~there) | (bits << 16 | bits) & there : two[p];
  }

  // The escapes of row i from this column on, which come by column, and the end of the row's.
  static std::pair<const Escape*, const Escape*> escapes(const int32_t* table, int64_t i, int64_t column) {
    const int32_t* starts = table + table[8];
    const auto* all = reinterpret_cast<const Escape*>(table + table[9]);
    const Escape *escape = all + starts[i], *const end = all + starts[i + 1];
    while (escape < end && escape->column < column) escape++;
    return {escape, end};
  }

  // to = columns begin .. end, both multiples of GROUP, of a row.
  static void unpack(const Packed* row, const int32_t* table, int64_t i, int64_t begin, int64_t end, BFloat16* to) {
    for (int64_t column = begin; column < end; column += GROUP) {
      const uint32_t base = table[segment(table, column)];
      uint32_t words[3][8], pairs[8][4];
      std::memcpy(words, row + column / GROUP, sizeof(words));
      for (int pair = 0; pair < 4; pair++)
        for (int t = 0; t < 8; t++) pairs[t][pair] = two(pair, words[0][t], words[1][t], words[2][t], base);
      std::memcpy(reinterpret_cast<uint16_t*>(to) + (column - begin), pairs, sizeof(pairs));
    }
    for (auto [escape, last] = escapes(table, i, begin); escape < last && escape->column < end; escape++)
      to[escape->column - begin].bits = escape->bits;
  }
};

template <typename T>
float rounded(float value) {
  return T::from(value);
}

template <typename T>
void round_all(const float* from, float* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; j++) to[j] = rounded<T>(from[j]);
}

// exp, right to 2 ulp for x from -87 to 88. A smaller x gives e^-87, a larger one e^88, NaN gives NaN. Vectorises.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // the nearest integer to x / ln 2, in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t scale = (read<uint32_t>(&shifted) + 127) << 23;
  return p * read<float>(&scale);
}

// ---- sums whose order does not matter
//
// Float32 additions in another order round to another sum. So a sum of a step starts at C = 1.5 * 2^(e + 1), where 2^e
// is more than any of its partial sums: it then stays in the binade of C, and each fused multiply-add rounds its product
// to one grid, a multiple of 2^(e - 22), whatever was added before. Taking C off again is exact, and so is every later
// sum of such sums. A product exactly half-way between two multiples would round to the even one of the sum so far; none
// is, since the lowest mantissa bit of every input is set, which is below a weight's. e needs no calibration: a sum is
// at most the inputs' 2-norm times the 2-norm of its output's weights (Cauchy and Schwarz), as is that of any part.
//
// 24 bits are too few for a float32 model, and a CPU without fused multiply-adds rounds twice: there sums start at 0.

template <typename T>
constexpr bool ANY_ORDER = ROUNDS_ONCE && !std::is_same_v<T, Float32>;

// The binary logarithm of a 2-norm, of its square, in quarters: rounded up, with 3.5 % for what rounding adds to sums.
inline int log_norm(float square) {
  const float quarters = 2 * std::log2(square) + 0.2f;
  return quarters < -128 ? -128 : quarters < 127 ? int(std::ceil(quarters)) : 127;  // of NaN, too
}

// C of the sums that stay below the product of two norms.
inline float start_of_sum(int log_norm, int other_log_norm) {
  const uint32_t bits = uint32_t(((log_norm + other_log_norm + 3) >> 2) + 1 + 127) << 23 | 0x400000;
  return read<float>(&bits);
}

// A float with its lowest bit set, but of 0.
inline float with_lowest_bit(float value) {
  const uint32_t bits = read<uint32_t>(&value) | (value != 0);
  return read<float>(&bits);
}

// ---- products

constexpr int64_t ROWS = 8;        // rows added at a time
constexpr int64_t BATCH = 8;       // the most texts of a step
constexpr int64_t COLUMNS = 6144;  // outputs of all texts summed at a time: 24 KB
constexpr int64_t GROUPS = COLUMNS / 16;  // of int4: the most among them
constexpr int64_t AHEAD = 16384;   // bytes that are fetched before they are used, of at most
constexpr int64_t ROWS_AHEAD = 64; // rows
constexpr int64_t HEAD_AHEAD = 8192;  // bytes of the lm_head, which is one stream
constexpr int64_t GRAIN = 32;      // a thread's range is a multiple of this: no cache line of a 2-byte W is read twice

// A row from one of its outputs on.
template <typename W>
struct Row {
  const W* weights;
};
template <>
struct Row<Int4> {
  const Int4* weights;
  const BFloat16* pairs;  // scale and minimum of a group
};

template <>
struct Row<Packed> {
  const Packed* weights;
  const int32_t* table;
  int64_t input, output;  // which row, and the first of these weights
};

template <typename W>
constexpr int64_t LINE = 64 / sizeof(W);  // outputs in a cache line
template <>
constexpr int64_t LINE<Int4> = 128;
template <>
constexpr int64_t LINE<Packed> = 42;  // at least

// A weight [in, out].
template <typename W>
struct Matrix {
  const W* weight;
  const void* scale;  // of Int4: scale and minimum, BFloat16, of every `group` outputs of an input; of Packed: the table
                      // of escapes; of others unused
  int64_t n_out, group;
  const int8_t* log_norms = nullptr;  // see `column_norms`; null: sums start at 0

  Row<W> row(int64_t input, int64_t output) const {
    if constexpr (std::is_same_v<W, Int4>)
      return {weight + (input * n_out + output) / 2,
              static_cast<const BFloat16*>(scale) + (input * (n_out / group) + output / group) * 2};
    else if constexpr (std::is_same_v<W, Packed>)
      return {weight + (input * n_out + output) / W::GROUP, static_cast<const int32_t*>(scale), input, output};
    else
      return {weight + input * n_out + output};
  }
};

// Values or sums of B texts, one text's `apart` behind the other's.
template <typename F>
struct Texts {
  F* of_first;
  int64_t apart;
  F* operator[](int64_t text) const { return of_first + text * apart; }
};

// sums[b][j] += value[b][k] * row[k][j] over N rows, for B texts. Meanwhile it fetches next[k] into the second-level
// cache, since the first has too few misses in flight: a step of SmolLM2-135M at 50 %, bfloat16, takes 7.0 to 7.5 ms on
// two cores of an EPYC, 8.9 to 9.8 with the first.
template <int N, int B, typename T>
  requires(!std::is_same_v<T, Int4> && !std::is_same_v<T, Packed>)
void add_rows(const Row<T>* row, const Row<T>* next, Texts<const float> value, Texts<float> sums, int64_t width,
              int64_t = 0, const float (*)[GROUPS / B] = nullptr) {
  // what stands in registers is copied: else each store of a sum might change it
  const T *weights[N], *later[N];
  for (int k = 0; k < N; k++) weights[k] = row[k].weights, later[k] = next[k].weights;
  constexpr bool COPIED = N * B <= 16;
  Floats copies[COPIED ? B : 0][N];
  for (int b = 0; COPIED && b < B; b++)
    for (int k = 0; k < N; k++) copies[b][k] = value[b][k] - Floats{};

  constexpr int VECTORS = APART<T>;
  int64_t j = 0;
  for (; j + VECTORS * LANES <= width; j += VECTORS * LANES) {
    if (j % LINE<T> == 0)
      for (int k = 0; k < N; k++) __builtin_prefetch(later[k] + j, 0, 2);
    Floats total[B][VECTORS];
#pragma GCC unroll 8
    for (int b = 0; b < B; b++)
      for (int v = 0; v < VECTORS; v++) total[b][v] = read<Floats>(sums[b] + j + v * LANES);
#pragma GCC unroll 8
    for (int k = 0; k < N; k++) {
      Floats vectors[2];
      if constexpr (VECTORS == 2)
        T::load(weights[k] + j, vectors[0], vectors[1]);
      else
        vectors[0] = T::load(weights[k] + j);
#pragma GCC unroll 8
      for (int b = 0; b < B; b++)
        for (int v = 0; v < VECTORS; v++)
          total[b][v] = fma(COPIED ? copies[b][k] : value[b][k] - Floats{}, vectors[v], total[b][v]);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; b++)
      for (int v = 0; v < VECTORS; v++) std::memcpy(sums[b] + j + v * LANES, &total[b][v], sizeof(Floats));
  }
  for (; j < width; j++)
    for (int b = 0; b < B; b++)
      for (int k = 0; k < N; k++) sums[b][j] = fma(value[b][k], float(weights[k][j]), sums[b][j]);
}

// The same of int4's codes, whole groups at a time, whose sums start at `start`. A code is taken less 8, and its group's
// minimum more by 8 scales, since smaller products have a finer grid. It leaves the sums of even and odd outputs apart;
// `in_order` puts them in their places.
template <int N, int B>
void add_rows(const Row<Int4>* row, const Row<Int4>* next, Texts<const float> value, Texts<float> sums, int64_t width,
              int64_t group, const float (*start)[GROUPS / B]) {
  // the groups' scales, times their rows' inputs and with the lowest bits set, and sums of their minima times inputs
  const int64_t groups = width / group;
  float scale[B][N][GROUPS / B], minimum[B][GROUPS / B];
  for (int b = 0; b < B; b++) std::copy_n(start[b], groups, minimum[b]);
  for (int k = 0; k < N; k++) {
    for (int64_t g = 0; g < groups; g += 16) __builtin_prefetch(next[k].pairs + 2 * g, 0, 2);
    for (int b = 0; b < B; b++) {
      const float x = value[b][k];
#pragma omp simd
      for (int64_t g = 0; g < groups; g++) {
        const uint32_t pair = read<uint32_t>(row[k].pairs + 2 * g), low = pair << 16, high = pair & 0xffff0000;
        const float s = read<float>(&low);
        scale[b][k][g] = with_lowest_bit(x * s);
        minimum[b][g] = fma(x, fma(8, s, read<float>(&high)), minimum[b][g]);
      }
    }
  }
  for (int b = 0; b < B; b++)
    for (int64_t g = 0; g < groups; g++) minimum[b][g] -= start[b][g];

  for (int64_t g = 0, begin = 0; g < groups; begin = ++g * group) {
    // two vectors of outputs at a time, then what is left of the group one by one
    int64_t j = begin;
    for (; j + 2 * LANES <= begin + group; j += 2 * LANES) {
      if (j % LINE<Int4> < 2 * LANES)
        for (int k = 0; k < N; k++) __builtin_prefetch(next[k].weights + j / 2, 0, 2);
      Floats even[B], odd[B];
      for (int b = 0; b < B; b++) {
        even[b] = read<Floats>(sums[b] + j) + minimum[b][g];
        odd[b] = read<Floats>(sums[b] + j + LANES) + minimum[b][g];
      }
      for (int k = 0; k < N; k++) {
        Floats even_codes, odd_codes;
        Int4::load(row[k].weights + j / 2, even_codes, odd_codes);
        for (int b = 0; b < B; b++) {
          even[b] = fma(scale[b][k][g], even_codes, even[b]);
          odd[b] = fma(scale[b][k][g], odd_codes, odd[b]);
        }
      }
      for (int b = 0; b < B; b++) {
        std::memcpy(sums[b] + j, &even[b], sizeof(Floats));
        std::memcpy(sums[b] + j + LANES, &odd[b], sizeof(Floats));
      }
    }
    for (; j < begin + group; j++)
      for (int b = 0; b < B; b++) {
        sums[b][j] += minimum[b][g];
        for (int k = 0; k < N; k++) sums[b][j] = fma(scale[b][k][g], row[k].weights[j / 2].at(j % 2), sums[b][j]);
      }
  }
}

// The same of packed weights, `width` a multiple of their group.
template <int N, int B>
void add_rows(const Row<Packed>* row, const Row<Packed>* next, Texts<const float> value, Texts<float> sums, int64_t width,
              int64_t = 0, const float (*)[GROUPS / B] = nullptr) {
  constexpr int64_t BLOCK = APART<Packed> * LANES;
  const int64_t output = row[0].output;
  const uint32_t base = row[0].table[Packed::segment(row[0].table, output)];
  const char *weights[N], *later[N];
  const Packed::Escape *escape[N], *last[N];
  for (int k = 0; k < N; k++) {
    weights[k] = reinterpret_cast<const char*>(row[k].weights);
    later[k] = reinterpret_cast<const char*>(next[k].weights);
    std::tie(escape[k], last[k]) = Packed::escapes(row[k].table, row[k].input, output);
    __builtin_prefetch(row[k].table + row[k].table[8] + next[k].input);
  }

  // the first output with an escape in one of these rows
  const auto first_escape = [&] {
    int64_t first = width;
    for (int k = 0; k < N; k++)
      if (escape[k] < last[k]) first = std::min(first, escape[k]->column - output);
    return first;
  };

  constexpr int PAIRS = B <= 2 ? 4 : 1;  // whose sums fit the registers
  const auto add_block = [&](int64_t j, auto whole, auto escaped) {
    const int64_t at = j / Packed::GROUP * Packed::GROUP_BYTES + j % Packed::GROUP / 2;
    const auto plane = [&](const char* from) {
#if defined(__AVX512F__)  // 16 words are of two groups, unless only one is left
      const __m512i first = _mm512_castsi256_si512(read<__m256i>(from));
      if constexpr (!whole) return (Words)_mm512_inserti64x4(first, _mm256_setzero_si256(), 1);
      return (Words)_mm512_inserti64x4(first, read<__m256i>(from + Packed::GROUP_BYTES), 1);
#else
      return read<Words>(from);
#endif
    };
#pragma GCC unroll 4
    for (int first = 0; first < 4; first += PAIRS) {
      Floats total[B][2 * PAIRS];
#pragma GCC unroll 8
      for (int b = 0; b < B; b++)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * PAIRS; v++) total[b][v] = read<Floats>(sums[b] + j + (2 * first + v) * LANES);
#pragma GCC unroll 8
      for (int k = 0; k < N; k++) {
        const Words words[3] = {plane(weights[k] + at), plane(weights[k] + at + 32), plane(weights[k] + at + 64)};
        Words two[PAIRS];
#pragma GCC unroll 4
        for (int p = 0; p < PAIRS; p++) two[p] = Packed::two(first + p, words[0], words[1], words[2], base);
        if constexpr (escaped)
          for (const auto* e = escape[k]; e < last[k] && e->column < output + j + BLOCK; e++)
            Packed::put(two, first, e->column - output - j, e->bits);
#pragma GCC unroll 4
        for (int p = 0; p < PAIRS; p++) {
          const Floats even = (Floats)(two[p] << 16), odd = (Floats)(two[p] & 0xffff0000);
#pragma GCC unroll 8
          for (int b = 0; b < B; b++) {
            const Floats x = value[b][k] - Floats{};
            total[b][2 * p] = fma(x, even, total[b][2 * p]);
            total[b][2 * p + 1] = fma(x, odd, total[b][2 * p + 1]);
          }
        }
      }
#pragma GCC unroll 8
      for (int b = 0; b < B; b++)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * PAIRS; v++)
          std::memcpy(sums[b] + j + (2 * first + v) * LANES, &total[b][v], sizeof(Floats));
    }
  };

  int64_t escape_at = first_escape();
  for (int64_t j = 0; j < width; j += BLOCK) {
    const bool whole = j + BLOCK <= width;
    const int64_t at = j / Packed::GROUP * Packed::GROUP_BYTES;
    for (int k = 0; whole && k < N; k++)
#pragma GCC unroll 4
      for (int64_t line = 0; line < BLOCK * 3 / 2; line += 64) __builtin_prefetch(later[k] + at + line, 0, 2);
    if (escape_at < j + BLOCK) [[unlikely]] {
      whole ? add_block(j, std::true_type(), std::true_type()) : add_block(j, std::false_type(), std::true_type());
      for (int k = 0; k < N; k++)
        while (escape[k] < last[k] && escape[k]->column < output + j + BLOCK) escape[k]++;
      escape_at = first_escape();
    } else if (whole) {
      add_block(j, std::true_type(), std::false_type());
    } else {
      add_block(j, std::false_type(), std::false_type());
    }
  }
}

// to = the values of `from`, where those of APART vectors lie apart, in order.
template <typename T>
void in_order(const float* from, float* to, int64_t width) {
  constexpr int64_t V = APART<T>, BLOCK = V * LANES;
  int64_t j = 0;
  for (; V > 1 && j + BLOCK <= width; j += BLOCK) {
    Floats vectors[V];
    for (int64_t v = 0; v < V; v++) vectors[v] = read<Floats>(from + j + v * LANES);
    for (int64_t lane = 0; lane < LANES; lane++)
      for (int64_t v = 0; v < V; v++) to[j + V * lane + v] = vectors[v][lane];
  }
  for (; V == 8 && j < width; j++) to[j] = from[j / BLOCK * BLOCK + j % V * LANES + j % BLOCK / V];  // half a block
  std::copy(from + j, from + width, to + j);
}

// The other way.
template <typename T>
void apart(float* v, int64_t width) {
  constexpr int64_t V = APART<T>, BLOCK = V * LANES;
  for (int64_t j = 0; V > 1 && (V == 8 ? j < width : j + BLOCK <= width); j += BLOCK) {
    float values[BLOCK] = {};
    std::copy(v + j, v + std::min(j + BLOCK, V == 8 ? width : j + BLOCK), values);
    for (int64_t lane = 0; lane < LANES; lane++)
      for (int64_t i = 0; i < V; i++) v[j + i * LANES + lane] = values[V * lane + i];
  }
}

// A row's products with the x of B texts. One row after the other is one stream: 28 to 33 GB/s, four rows at a time 10
// to 15 (113 MB, two cores of an EPYC). In bfloat16 the CPU fetches it ahead by itself for one text; for two it reads
// 17 GB/s, and 27 where fetching is asked for (one thread).
template <int B, typename T>
__attribute__((noinline)) void dots(const T* row, Texts<const float> x, int64_t width, float* results) {
  Floats total[B][4] = {};
  int64_t j = 0;
  for (; j + 4 * LANES <= width; j += 4 * LANES) {
    for (int64_t i = 0; (B > 1 || sizeof(T) == 1) && i < 4 * LANES; i += LINE<T>)
      __builtin_prefetch(row + j + i + HEAD_AHEAD / sizeof(T), 0, 2);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      const Floats weights = T::load(row + j + k * LANES);
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) total[b][k] = fma(read<Floats>(x[b] + j + k * LANES), weights, total[b][k]);
    }
  }
  for (; j + LANES <= width; j += LANES)
    for (int b = 0; b < B; b++) total[b][0] = fma(read<Floats>(x[b] + j), T::load(row + j), total[b][0]);
#pragma GCC unroll 4
  for (int b = 0; b < B; b++) {
    results[b] = sum((total[b][0] + total[b][1]) + (total[b][2] + total[b][3]));
    for (int64_t i = j; i < width; i++) results[b] = fma(x[b][i], float(row[i]), results[b]);
  }
}
// The same of a packed row, which is output `i` of a matrix [any, width]. buffer: room for a row. With
// AVX-512 an element's sums are those that `dots` has of its outputs.
template <int B>
void dots(const Packed* row, const int32_t* table, int64_t i, Texts<const float> x, Texts<const float> x_apart,
          int64_t width, BFloat16* buffer, float* results) {
#if defined(__AVX512F__)
  typedef float Eight __attribute__((vector_size(32)));
  typedef uint32_t EightWords __attribute__((vector_size(32)));
  const uint32_t base = table[0];
  Eight total[B][8] = {};
  const auto unpack_pairs = [&](int64_t j, int first, auto& two) {
    const char* group = reinterpret_cast<const char*>(row + j / Packed::GROUP);
    for (int64_t i = 0; first == 0 && i < Packed::GROUP_BYTES; i += 48) __builtin_prefetch(group + HEAD_AHEAD + i, 0, 2);
    const EightWords words[3] = {read<EightWords>(group), read<EightWords>(group + 32), read<EightWords>(group + 64)};
#pragma GCC unroll 4
    for (size_t p = 0; p < std::size(two); p++) two[p] = Packed::two(first + p, words[0], words[1], words[2], base);
  };

  // a row with escapes is unpacked first: each escape would cost a wrong guess of a branch
  auto [escape, last] = Packed::escapes(table, i, 0);
  const bool escaped = escape < last;
  for (int64_t j = 0; escaped && j < width; j += Packed::GROUP) {
    EightWords two[4];
    unpack_pairs(j, 0, two);
    std::memcpy(static_cast<void*>(buffer + j), two, sizeof(two));
  }
  for (; escape < last; escape++) {
    const int64_t at = escape->column % Packed::GROUP;
    buffer[escape->column - at + at % 8 / 2 * 16 + at / 8 * 2 + at % 2].bits = escape->bits;
  }

  constexpr int PAIRS = B <= 2 ? 4 : 1;  // whose sums fit the registers
  const auto add_pairs = [&](int first, auto unpacked) {
    for (int64_t j = 0; j < width; j += Packed::GROUP) {
      EightWords two[PAIRS];
      if constexpr (unpacked)
        std::memcpy(two, buffer + j + first * 16, sizeof(two));
      else
        unpack_pairs(j, first, two);
#pragma GCC unroll 4
      for (int p = 0; p < PAIRS; p++) {
        const Eight even = (Eight)(two[p] << 16), odd = (Eight)(two[p] & 0xffff0000);
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) {
          const float* const at = x_apart[b] + j + (first + p) * 16;
          Eight& low = total[b][2 * (first + p)];
          Eight& high = total[b][2 * (first + p) + 1];
          low = (Eight)_mm256_fmadd_ps((__m256)read<Eight>(at), (__m256)even, (__m256)low);
          high = (Eight)_mm256_fmadd_ps((__m256)read<Eight>(at + 8), (__m256)odd, (__m256)high);
        }
      }
    }
  };
#pragma GCC unroll 4
  for (int first = 0; first < 4; first += PAIRS)
    if (escaped)
      add_pairs(first, std::true_type());
    else
      add_pairs(first, std::false_type());
  for (int b = 0; b < B; b++) {  // as the sum of (quarter 0 + quarter 1) + (quarter 2 + quarter 3) of 64 sums in order
    float lanes[16];
    for (int v = 0; v < 8; v++) {
      Eight sums = total[b][v] + __builtin_shufflevector(total[b][v], total[b][v], 2, 3, 2, 3, 6, 7, 6, 7);
      sums += __builtin_shufflevector(sums, sums, 4, 5, 4, 5, 4, 5, 4, 5);
      lanes[v] = sums[0], lanes[8 + v] = sums[1];
    }
    results[b] = std::accumulate(lanes, lanes + 16, 0.0f);
  }
#else
  Packed::unpack(row, table, i, 0, width, buffer);
  dots<B>(buffer, x, width, results);
#endif
}
template <typename T>
float dot(const T* row, const float* x, int64_t width) {
  float result;
  dots<1>(row, {x, 0}, width, &result);
  return result;
}

float sum(const float* v, int64_t n) {
  Floats total{};
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) total += read<Floats>(v + j);
  float result = sum(total);
  for (; j < n; j++) result += v[j];
  return result;
}

float sum_of_squares(const float* v, int64_t n) { return dot(reinterpret_cast<const Float32*>(v), v, n); }

// Room that begins with a cache line, as no vector then lies in two.
template <typename T>
struct Lines : std::allocator<T> {
  T* allocate(size_t n) { return static_cast<T*>(operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* room, size_t) { operator delete(room, std::align_val_t(64)); }
};
using Values = std::vector<float, Lines<float>>;

// Calls `run` with the least number of texts that code is made for and that is enough.
template <typename Run>
void for_batch(int64_t batch, Run run) {
  if (batch == 1) return run(std::integral_constant<int, 1>());
  if (batch == 2) return run(std::integral_constant<int, 2>());
  if (batch <= 4) return run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 8>());
}

// The inputs of a product that any text keeps, with the values of each text: 0 where it cuts the input.
struct Kept {
  const int64_t batch;
  std::vector<int32_t> index;
  Values value, block;  // block: room for the sums that `outputs` takes at a time
  int64_t first = 0, n = 0;         // the part of the list that this thread takes
  int norm[2 * BATCH];              // each text's `log_norm`, of its own kept inputs

  Kept(int64_t batch, int64_t most, int64_t group)
      : batch(batch), index(most + LANES + ROWS_AHEAD), value(2 * std::bit_ceil(uint64_t(batch)) * index.size()),
        block(COLUMNS + BATCH * (group + 17 * LANES)) {}

  Texts<float> values() { return {value.data(), int64_t(index.size())}; }  // with room to write behind the last one

  // Lists the kept inputs of texts [batch, n_in], by one threshold [n_in] or by any of P, each of which has values of its
  // own; threshold null: all. any_order: readies them for sums in any order. A norm is taken at the inputs' own places,
  // so that it is the same whatever the other texts keep.
  template <int B, int P>
  void list(const float* x, const float* threshold, int64_t n_in, bool any_order) {
    const Texts<const float> from{x, n_in};
    const Texts<float> to = values();
    const int64_t texts = std::min<int64_t>(batch, B);  // more are copies of the first
    const auto text = [=](int v) { return v % B < texts ? v % B : 0; };
    float squares[P * B] = {};
    int64_t i = 0, n = 0;
#if defined(__AVX512F__)  // 16 at a time: the loop below takes a nanosecond for each
    const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i lowest_bit = _mm512_set1_epi32(any_order);
    Floats square[P * B] = {};
    for (; i + LANES <= n_in; i += LANES) {
      __m512 v[P * B];
      __mmask16 any = 0;
      for (int b = 0; b < P * B; b++) {
        const __m512 limit = threshold ? _mm512_loadu_ps(threshold + b / B * n_in + i) : _mm512_set1_ps(-1);
        v[b] = _mm512_loadu_ps(from[text(b)] + i);
        const __mmask16 keep = _mm512_cmp_ps_mask(_mm512_abs_ps(v[b]), limit, _CMP_NLE_UQ);
        v[b] = _mm512_maskz_mov_ps(keep, v[b]);
        square[b] = fma((Floats)v[b], (Floats)v[b], square[b]);
        const __mmask16 some = _mm512_cmp_ps_mask(v[b], _mm512_setzero_ps(), _CMP_NEQ_UQ);
        v[b] = (__m512)_mm512_mask_or_epi32((__m512i)v[b], some, (__m512i)v[b], lowest_bit);
        any |= keep;
      }
      const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(i), numbers);
      _mm512_storeu_si512(index.data() + n, _mm512_maskz_compress_epi32(any, at));
      for (int b = 0; b < P * B; b++) _mm512_storeu_ps(to[b] + n, _mm512_maskz_compress_ps(any, v[b]));
      n += __builtin_popcount(any);
    }
    for (int b = 0; b < P * B; b++) squares[b] = sum(square[b]);
#endif
    for (; i < n_in; i++) {
      bool any = false;
      for (int b = 0; b < P * B; b++) {
        const float v = from[text(b)][i];
        const bool keep = !threshold || !(std::fabs(v) <= threshold[b / B * n_in + i]);  // NaN is kept
        const float kept = keep ? v : 0;
        squares[b] += kept * kept;
        to[b][n] = any_order ? with_lowest_bit(kept) : kept;
        any |= keep;
      }
      index[n] = i;
      n += any;
    }
    if (any_order)
      for (int b = 0; b < P * B; b++) norm[b] = log_norm(squares[b]);
    this->first = 0, this->n = n;
  }

  // Keeps only the part of the list that a thread takes, of inputs begin .. end.
  void take(int64_t begin, int64_t end, int thread, int threads) {
    const auto place = [&](int64_t input) {
      return std::lower_bound(index.begin(), index.begin() + n, input) - index.begin();
    };
    const int64_t from = place(begin), own = place(end) - from;
    first = from + own * thread / threads;
    n = from + own * (thread + 1) / threads - first;
  }
};

// sums[b][0 .. end - begin) = each text's outputs begin .. end of the product. They are P parts of equal width, each with
// values of its own; several must fit in COLUMNS.
template <int B, int P, typename W>
void outputs(const Matrix<W>& matrix, Kept& kept, int64_t begin, int64_t end, Texts<float> sums) {
  constexpr bool groups = std::is_same_v<W, Int4>;
  constexpr int64_t MOST = COLUMNS / B;
  const int64_t columns = groups ? std::max(matrix.group, MOST / matrix.group * matrix.group) : MOST;
  const int64_t n = kept.n;
  int32_t* const index = kept.index.data() + kept.first;
  const Texts<const float> value{kept.value.data() + kept.first, kept.values().apart};
  float starts[P][B][GROUPS / B] = {};  // of int4's groups
  for (int64_t column = begin, width; column < end; column += width) {
    width = std::min(columns, end - column);
    if constexpr (std::is_same_v<W, Packed> && P == 1) {  // of one segment, whose window has one base
      const int32_t* table = static_cast<const int32_t*>(matrix.scale);
      const int segment = Packed::segment(table, column);
      if (segment < 2) width = std::min<int64_t>(width, table[5 + segment] - column);
    }
    const int64_t part = width / P, starts_of_part = groups ? part / matrix.group : part;
    const int64_t apart_by = APART<W> == 8 ? (part + 8 * LANES - 1) / (8 * LANES) * 8 * LANES : part;  // whole blocks
    const int8_t* log_norms = matrix.log_norms ? matrix.log_norms + column / (groups ? matrix.group : 1) : nullptr;
    const Texts<float> block{kept.block.data(), P * apart_by + LANES};  // not 4 KB apart, which CPUs take for the same place

    // the sums' starts
    for (int v = 0; v < P * B; v++) {
      float *const to = block[v % B] + v / B * apart_by, *const start = groups ? starts[v / B][v % B] : to;
      if (!log_norms)
        std::fill_n(start, starts_of_part, 0.0f);
      else
#pragma omp simd
        for (int64_t j = 0; j < starts_of_part; j++)
          start[j] = start_of_sum(log_norms[v / B * starts_of_part + j], kept.norm[v]);
      for (int64_t g = 0; groups && g < starts_of_part; g++) std::fill_n(to + g * matrix.group, matrix.group, start[g]);
      if (!groups) apart<W>(start, part);
    }

    // the first rows, whose fetching no earlier ones cover
    const int64_t bytes = ROWS * width * 64 / LINE<W>, ahead = std::clamp(AHEAD / bytes * ROWS, ROWS, ROWS_AHEAD);
    for (int64_t r = 0; column == begin && r < std::min(ahead, n); r++)
      for (int64_t line = 0; line * LINE<W> < width; line++)
        __builtin_prefetch(reinterpret_cast<const char*>(matrix.row(index[r], column).weights) + line * 64, 0, 2);

    // ROWS rows at a time, then the rest one by one; behind the last come the next columns' first ones
    const int64_t jump = column + width < end ? width : 0;
    for (int64_t r = 0; n && r < ahead; r++) index[n + r] = index[jump ? std::min(r, n - 1) : n - 1];
    const auto add = [&](auto N, int64_t r) {
      for (int p = 0; p < P; p++) {
        Row<W> row[N], next[N];
        for (int64_t k = 0; k < N; k++) {
          row[k] = matrix.row(index[r + k], column + p * part);
          next[k] = matrix.row(index[r + k + ahead], column + p * part + (r + k + ahead < n ? 0 : jump));
        }
        add_rows<N, B>(row, next, {value[p * B] + r, value.apart}, {block[0] + p * apart_by, block.apart}, part,
                       matrix.group, starts[p]);
      }
    };
    int64_t r = 0;
    for (; r + ROWS <= n; r += ROWS) add(std::integral_constant<int, ROWS>(), r);
    for (; r < n; r++) add(std::integral_constant<int, 1>(), r);

    // what was added to them
    for (int b = 0; b < std::min<int64_t>(B, kept.batch); b++)
      for (int p = 0; p < P; p++) {
        float *const from = block[b] + p * apart_by, *const to = sums[b] + column - begin + p * part;
        const int64_t length = groups ? matrix.group : part;
        for (int64_t j = 0; APART<W> > 1 && j < part; j += length) {
          in_order<W>(from + j, to + j, length);
          for (int64_t i = j; groups && i < j + length; i++) to[i] -= starts[p][b][j / length];
        }
        const float* const added = APART<W> > 1 ? to : from;
        if (!groups && log_norms)
#pragma omp simd
          for (int64_t j = 0; j < part; j++)
            to[j] = added[j] - start_of_sum(log_norms[p * part + j], kept.norm[p * B + b]);
        else if (added != to)
          std::copy_n(added, part, to);
      }
  }
}

// log_norms[j] = the `log_norm` of output j's weights, or of int4 that of group j's largest possible ones.
template <typename W>
void column_norms(const Matrix<W>& matrix, int64_t n_in, int8_t* log_norms, int threads) {
  constexpr bool groups = std::is_same_v<W, Int4>;
  constexpr int64_t BLOCK = 1024;
  const int64_t n = groups ? matrix.n_out / matrix.group : matrix.n_out;
#pragma omp parallel for num_threads(threads)
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t width = std::min(BLOCK, n - begin);
    float squares[BLOCK] = {};
    for (int64_t i = 0; i < n_in; i++) {
      const Row<W> row = matrix.row(i, begin * (groups ? matrix.group : 1));
      BFloat16 unpacked[BLOCK];
      if constexpr (std::is_same_v<W, Packed>)
        W::unpack(row.weights - begin / W::GROUP, row.table, i, begin, begin + width, unpacked);
      for (int64_t j = 0; j < width; j++) {
        float most;
        if constexpr (groups) {
          const float s = row.pairs[2 * j], minimum = fma(8, s, float(row.pairs[2 * j + 1]));
          most = 8 * std::fabs(s) + std::fabs(minimum);
        } else if constexpr (std::is_same_v<W, Packed>) {
          most = unpacked[j];
        } else {
          most = row.weights[j];
        }
        squares[j] += most * most;
      }
    }
    for (int64_t j = 0; j < width; j++) log_norms[begin + j] = log_norm(squares[j]);
  }
}

// The part of n that a thread takes, in multiples of `grain`.
struct Range {
  int64_t begin, end;
  Range(int64_t n, int thread, int threads, int64_t grain) {
    const int64_t grains = (n + grain - 1) / grain;
    begin = std::min(n, grains * thread / threads * grain);
    end = std::min(n, grains * (thread + 1) / threads * grain);
  }
};

// Returns 1 where memory is short, else 0: an exception may not leave a parallel region.
template <typename T, typename W>
int product(const T* x, const Matrix<W>& matrix, const float* threshold, T* out, int64_t batch, int64_t n_in,
            int64_t n_segments, const int64_t* segments, int threads) {
  const int64_t n_out = matrix.n_out, grain = matrix.group ? std::lcm(GRAIN, matrix.group) : GRAIN;
  const float* scale = matrix.group ? nullptr : static_cast<const float*>(matrix.scale);
  std::atomic<int> failed{0};
#pragma omp parallel num_threads(threads)
  try {
    const Range mine(n_out, omp_get_thread_num(), omp_get_num_threads(), grain);
    Kept kept(1, n_in, matrix.group);
    std::vector<float> input(n_in), sums(mine.end - mine.begin);
    int64_t start = 0;
    for (int64_t s = 0; s < n_segments; start += segments[s++]) {
      const int64_t begin = std::max(mine.begin, start), end = std::min(mine.end, start + segments[s]);
      if (begin >= end) continue;
      for (int64_t b = 0; b < batch; b++) {
        std::copy(x + b * n_in, x + (b + 1) * n_in, input.begin());
        kept.list<1, 1>(input.data(), threshold + s * n_in, n_in, false);
        outputs<1, 1>(matrix, kept, begin, end, {sums.data(), 0});
        if (scale)
          for (int64_t j = begin; j < end; j++) sums[j - begin] *= scale[j];
        for (int64_t j = begin; j < end; j++) out[b * n_out + j] = T::from(sums[j - begin]);
      }
    }
  } catch (const std::bad_alloc&) {
    failed = 1;
  }
  return failed;
}

// ---- the decode step

// What decoder.py passes through the structures of cpu.py; keep both in the same order. The embedding and the output
// are [vocab, dim].
struct Projection {
  const void *weight, *bias;  // [in, out], [out] or null
  const void* scale;          // of int8 [out] float, of int4 and packed weights see Matrix, else null
  const float* threshold;     // [segments, in]
  const float* shift;         // [in] or null: what a cut input is taken to be
  const float* offset;        // [out] or null: the product of the shift
  int64_t group;              // of int4 and packed weights, else 0
  const int8_t* log_norms;    // see `column_norms`: [out], of int4 [groups]
};

struct Layer {
  const void *attention_norm, *ffn_norm, *q_norm, *k_norm;  // the last two [head_dim] or null
  Projection wqkv, wo, w13, w2;
  void *k_cache, *v_cache;  // [rows, n_local_heads, cache_length, head_dim]; rows: 1 if texts share it, else one a text
  const float* inv_freq;    // [head_dim / 2]; 0 rotates nothing
  float rope_factor;        // of the cosines and sines of what is rotated
  int64_t window;           // keys that a query sees, itself included
};

// Of a step that several processes of one host take together, each a rank with threads and weights of its own. Memory
// that they share holds h, y, act, logits, tops and partials.
struct Ranks {
  int64_t rank, ranks;
  int64_t hidden, hidden_first;  // of all ranks; where this one's begin
  float* partials;               // see Worker
  class Barrier* barrier;
  const int64_t* pids;           // of all ranks
};

struct Model {
  int64_t n_layer, n_head, n_local_heads, head_dim, dim, hidden, vocab, cache_length;
  const Layer* layers;
  const void *embedding, *norm, *output;
  const void* output_scale;   // of an int8 output [vocab] float, of a packed one the table of escapes, else null
  float *h, *qkv, *y, *act, *logits;  // room for each text's values between the phases of a step
  float* tops;                        // the largest logit of each GROUP of each text, NaN where one is
  int64_t* tokens;                    // [texts, cache_length + 1]: a step reads those at its positions, writes the next
  int64_t cut;                        // 0: thresholds, shifts and offsets are left out
  int64_t shared;                     // 1: texts are the same one at positions in ascending order, in one row of caches
  int64_t activation;                 // 0: SiLU, 1: GELU, 2: GELU by tanh, 3: ReLU
  float eps, softmax_scale, embedding_multiplier, residual_multiplier, logits_scaling, temperature;
  int64_t top_k;
  struct Pace* pace;                  // zeros before the first step; null: every step takes all threads
  const Ranks* ranks;                 // null: this process alone; else heads, hidden and W are this rank's part
};
constexpr int64_t GROUP = 64;  // logits

// Threads wait for each other: awake at first, since most waits are shorter than waking up, then asleep, so that whoever
// is waited for gets the core. Threads of several processes look in turn whether all of these are there.
struct RankEnded {};
class Barrier {
  alignas(64) std::atomic<int> waiting{0};
  alignas(64) std::atomic<int> round{0};

 public:
  void wait(int threads, const Ranks* ranks) {
    const int now = round.load(std::memory_order_relaxed);
    if (waiting.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      waiting.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      round.notify_all();
      return;
    }
    for (int spins = 0; spins < 4000 && round.load(std::memory_order_acquire) == now; spins++) {
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
    if (!ranks) round.wait(now, std::memory_order_acquire);
    for (int naps = 1; ranks && round.load(std::memory_order_acquire) == now; naps++) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
      for (int64_t r = 0; naps % 4096 == 0 && r < ranks->ranks; r++)
        if (kill(ranks->pids[r], 0) && errno == ESRCH) throw RankEnded();
    }
  }
};

// How many threads the steps take. Threads meet 270 times in a step of 30 layers, and a core that another process uses
// keeps all of them waiting, so that beside one busy process on two cores two threads are several times as slow as one.
// Level l takes 1 / 2^l of the threads. A level is kept while no level of fewer threads is known to be quicker. From
// time to time one step tries another level, and the quicker is kept. A try that lost time is repeated when its
// loss has become small: 0.5 % for fewer threads, 4 % for more, which are only tried beside other work.
struct Pace {  // see PACE_DOUBLES of cpu.py
  double seconds[32];    // of a step at each level; 0: not known
  double until_try[2];   // seconds until more and fewer threads are tried
  double lost;           // seconds that this level lost to the quickest of fewer threads
  int64_t most, level;
  int64_t away;          // levels from here to the try that is under way, below 0: more threads; 0: none
  int64_t last_away;     // the last try's of fewer threads: they take turns
  int64_t warm;          // the first step, which fills caches, is behind

  int threads(int64_t now_most) {
    if (now_most != most) *this = {};
    most = now_most;
    return std::max<int64_t>(1, most >> (level + away));
  }

  void took(double step) {
    if (!std::exchange(warm, 1)) return;
    double& own = seconds[level];

    // after a try: move there if it was quicker, and let the slower level wait
    if (const int64_t tried = std::exchange(away, 0)) {
      seconds[level + tried] = step;
      const bool moves = step < own, slower_has_fewer = (tried > 0) != moves;
      if (moves) until_try[0] = until_try[1] = lost = 0;
      until_try[slower_has_fewer] = (slower_has_fewer ? 200 : 25) * std::fabs(step - own);
      if (moves) level += tried;
      return;
    }

    // a step at this level, of which one very slow one is no proof: fewer threads if those were quicker
    int64_t other = 0;
    for (int64_t l = level + 1; most >> l; l++)
      if (seconds[l] && (!other || seconds[l] < seconds[other])) other = l;
    const double quickest = other ? seconds[other] : step;
    own += own ? (std::min(step, 4 * quickest) - own) / 8 : step;
    lost = std::max(0.0, lost + step - quickest);
    for (double& seconds_left : until_try) seconds_left -= step;
    if (other && own > quickest) {
      until_try[0] = 25 * lost;
      until_try[1] = lost = 0;
      level = other;
      return;
    }

    // the next step's try, if one is due
    if (until_try[1] <= 0 && most >> (level + 1))
      away = last_away = most >> (level + last_away + 1) ? last_away + 1 : 1;
    else if (until_try[0] <= 0 && level > 0)
      away = -1;
  }
};
static_assert(sizeof(Pace) <= 40 * sizeof(double));

inline uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352d;
  x = (x ^ x >> 15) * 0x21f0aaad;
  return x ^ x >> 15;
}

// The draw of a text's next token from its logits, by the numbers of decoder.py's `sample`: the largest of the top_k
// logits over the temperature plus noise, a hash of seed, position and token. Those equal to the top_k-th take part. -1
// where the largest logit is not finite or one is not a number.
int64_t sample(const Model& m, int64_t text, uint32_t seed, int64_t position) {
  const int64_t groups = (m.vocab + GROUP - 1) / GROUP;
  const float *logits = m.logits + text * m.vocab, *tops = m.tops + text * groups;
  float peak = tops[0];
  for (int64_t g = 1; g < groups; g++) peak = tops[g] <= peak || peak != peak ? peak : tops[g];
  if (!std::isfinite(peak)) return -1;
  if (m.temperature == 0) {
    const int64_t v = (std::max_element(tops, tops + groups) - tops) * GROUP;
    return std::max_element(logits + v, logits + std::min(m.vocab, v + GROUP)) - logits;
  }
  float bound = -std::numeric_limits<float>::infinity();
  if (m.top_k < groups) {  // the top_k-th largest group has as many logits that are at least its largest
    std::vector<float> largest(tops, tops + groups);
    std::nth_element(largest.begin(), largest.begin() + m.top_k - 1, largest.end(), std::greater());
    bound = largest[m.top_k - 1] / m.temperature;
  }

  // the logits that reach it, over the temperature, and their tokens
  std::vector<float> best;
  std::vector<int64_t> tokens;
  size_t n = 0;
  for (int64_t g = 0; g < groups; g++) {
    if (tops[g] / m.temperature < bound) continue;
    best.resize(n + GROUP), tokens.resize(n + GROUP);
    for (int64_t v = g * GROUP; v < std::min(m.vocab, (g + 1) * GROUP); v++) {  // without branches
      best[n] = logits[v] / m.temperature, tokens[n] = v;
      n += !(best[n] < bound);
    }
  }

  // the top_k-th largest of them, and the largest with noise of those that are not below it
  std::vector<float> ordered(best.begin(), best.begin() + n);
  const int64_t last = std::min<int64_t>(m.top_k, n) - 1;
  std::nth_element(ordered.begin(), ordered.begin() + last, ordered.end(), std::greater());
  const uint32_t hash = mixed(mixed(seed) + uint32_t(position));
  int64_t drawn = tokens[0];
  float most = -std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < n; i++) {
    if (best[i] < ordered[last]) continue;
    const uint32_t bits = mixed(hash + uint32_t(tokens[i]));
    const float noisy = best[i] - std::log(-std::log((float(bits >> 9) + 0.5f) * 0x1p-23f));
    if (noisy > most) most = noisy, drawn = tokens[i];
  }
  return drawn;
}

// One thread's part of a step of `batch` texts. W is the type of the projections' weights, but V of wqkv's and output's;
// T of all else.
template <typename T, typename W, typename V>
class Worker {
  const Model& m;
  const int64_t batch, *const positions;
  const int thread, threads;
  const int rank = m.ranks ? m.ranks->rank : 0, ranks = m.ranks ? m.ranks->ranks : 1;
  const int member = rank * threads + thread, team = ranks * threads;  // among the threads of all ranks
  Barrier& barrier;
  float* const partials;  // [2, team, batch, most]: of two products in turn, as others may still read the last one's
  const int64_t most;     // outputs of a product
  const int64_t q = m.n_head * m.head_dim, kv = m.n_local_heads * m.head_dim, width = q + 2 * kv;
  const int64_t hidden = m.ranks ? m.ranks->hidden : m.hidden;  // of all ranks
  const int64_t hidden_first = m.ranks ? m.ranks->hidden_first : 0;
  bool second = false;
  Kept kept;
  Values x, shifted, sums, scores, cos, sin, head;

 public:
  Worker(const Model& m, int64_t batch, const int64_t* positions, int thread, int threads, Barrier& barrier,
         float* partials, int64_t most)
      : m(m), batch(batch), positions(positions), thread(thread), threads(threads), barrier(barrier),
        partials(partials), most(most), kept(batch, std::max({m.dim, hidden, ranks * q}), m.layers[0].w2.group),
        x(std::bit_ceil(uint64_t(batch)) * m.dim), shifted(batch * kept.index.size()),
        sums(std::max({batch * GROUP, m.dim, 2 * m.hidden})),
        scores(*std::max_element(positions, positions + batch) + 1), cos(batch * m.head_dim / 2), sin(cos.size()),
        head(3 * m.head_dim) {}

  void step() {
    // h = the tokens' embeddings
    const float multiplier = rounded<T>(m.embedding_multiplier);
    const Range mine(m.dim, member, team, GRAIN);
    for (int64_t b = 0; b < batch; b++) {
      const T* embedding = static_cast<const T*>(m.embedding) + std::max<int64_t>(0, *token(b, 0)) * m.dim;
      for (int64_t i = mine.begin; i < mine.end; i++)
        m.h[b * m.dim + i] = rounded<T>(embedding[i] * multiplier);
    }
    meet();

    for (int64_t l = 0; l < m.n_layer; l++) {
      const Layer& layer = m.layers[l];
      if (l == 0 || layer.inv_freq != m.layers[l - 1].inv_freq) prepare_rotations(layer);
      project_qkv(layer);
      expect(layer.wo, ranks * q, m.dim);
      meet();
      if (m.shared) {
        share(batch * m.n_local_heads, [&](int64_t i) { cache(layer, i / m.n_local_heads, i % m.n_local_heads); });
        meet();
      }
      share(batch * m.n_head, [&](int64_t i) { attend(layer, i / m.n_head, i % m.n_head); });
      meet();
      add_product(m.y, ranks * q, rank * q, q, layer.wo);
      expect(layer.w13, 2 * m.dim, 2 * m.hidden);
      meet();
      gate_and_up(layer);
      expect(layer.w2, hidden, m.dim);
      meet();
      add_product(m.act, hidden, hidden_first, m.hidden, layer.w2);
      if (l + 1 < m.n_layer) expect(m.layers[l + 1].wqkv, 3 * m.dim, width);
      meet();
    }

    // logits of this thread's groups of tokens, and the largest of each
    normalize(m.norm);
    constexpr bool packed = std::is_same_v<V, Packed>;
    std::vector<float> x_apart(packed ? x.size() : 0);  // of each group weights 8 t + v at 8 v + t
    for (size_t i = 0; i < x_apart.size(); i++) x_apart[i / 64 * 64 + i % 8 * 8 + i % 64 / 8] = x[i];
    std::vector<BFloat16> buffer(packed ? m.dim : 0);
    const auto row_of = [&](int64_t v) { return static_cast<const V*>(m.output) + v * m.dim / (packed ? 64 : 1); };
    const Range rows(m.vocab, member, team, GROUP);
    for (int64_t v = rows.begin; v < rows.end; v += GROUP) {
      const int64_t n = std::min(GROUP, rows.end - v), groups = (m.vocab + GROUP - 1) / GROUP;
      for_batch(batch, [&](auto B) {
        constexpr int AT_ONCE = B < 4 ? B : 4;
        float results[B];
        for (int64_t i = 0; i < n; i++) {
          for (int b = 0; b < B; b += AT_ONCE) {
            const Texts<const float> some{x.data() + b * m.dim, m.dim};
            if constexpr (packed)
              dots<AT_ONCE>(row_of(v + i), static_cast<const int32_t*>(m.output_scale), v + i, some,
                            {x_apart.data() + b * m.dim, m.dim}, m.dim, buffer.data(), results + b);
            else
              dots<AT_ONCE>(row_of(v + i), some, m.dim, results + b);
          }
          const float scale = m.output_scale && !packed ? static_cast<const float*>(m.output_scale)[v + i] : 1.0f;
          for (int64_t b = 0; b < batch; b++) sums[b * GROUP + i] = results[b] * scale;
        }
      });
      for (int64_t b = 0; b < batch; b++) {
        float* logits = m.logits + b * m.vocab + v;
        round_all<T>(sums.data() + b * GROUP, logits, n);
        for (int64_t i = 0; i < n; i++) logits[i] = rounded<T>(logits[i] / m.logits_scaling);
        float top = logits[0];
        for (int64_t i = 1; i < n; i++) top = logits[i] <= top || top != top ? top : logits[i];
        m.tops[b * groups + v / GROUP] = top;
      }
    }
    meet();
  }

  // The next tokens of this thread's texts. Raises std::bad_alloc.
  void draw(const uint32_t* seeds) {
    share(batch, [&](int64_t b) { *token(b, 1) = sample(m, b, seeds[b], positions[b] + 1); });
  }

 private:
  // Waits for the threads of all ranks.
  void meet() { barrier.wait(team, m.ranks); }

  int64_t* token(int64_t b, int64_t behind) const { return m.tokens + b * (m.cache_length + 1) + positions[b] + behind; }

  // This thread's part of n calls.
  template <typename Call>
  void share(int64_t n, Call call) const {
    for (int64_t i = n * thread / threads; i < n * (thread + 1) / threads; i++) call(i);
  }

  // x = each text's normalised h
  void normalize(const void* gain) {
    for (int64_t b = 0; b < batch; b++) normalize(m.h + b * m.dim, gain, m.dim, x.data() + b * m.dim);
  }

  // The inputs [batch, n_in] that the thresholds test: x - shift.
  const float* shift(const float* from, const Projection& projection, int64_t n_in) {
    if (!m.cut || !projection.shift) return from;
    for (int64_t b = 0; b < batch; b++)
#pragma omp simd
      for (int64_t i = 0; i < n_in; i++) shifted[b * n_in + i] = rounded<T>(from[b * n_in + i] - projection.shift[i]);
    return shifted.data();
  }

  // Fetches what the next product wants at once: else it waits, as nothing of a step stays in the caches until the next.
  void expect(const Projection& next, int64_t thresholds, int64_t n_out) const {
    for (int64_t i = 0; m.cut && i < thresholds; i += 16) __builtin_prefetch(next.threshold + i, 0, 2);
    const int64_t norms = next.group ? n_out / next.group : n_out;
    for (int64_t i = 0; next.log_norms && i < norms; i += 64) __builtin_prefetch(next.log_norms + i, 0, 2);
  }

  // This thread's sums over its share of the kept inputs of from [batch, n_in], of which this rank has `own` from
  // `first` on; then the threads meet. Segments with the same thresholds are taken as one: at threshold 0 the rows are
  // as long as the dense product's. Gate and up share a list: two lists read 24 GB/s where one reads 28 (bfloat16, two
  // texts), for 3 % more rows.
  template <typename M>
  void multiply(const float* from, const Projection& projection, int64_t n_in, int64_t first, int64_t own,
                std::initializer_list<int64_t> widths) {
    const int64_t n_out = std::accumulate(widths.begin(), widths.end(), int64_t(0));
    const Matrix<M> matrix{static_cast<const M*>(projection.weight), projection.scale, n_out, projection.group,
                           ANY_ORDER<T> ? projection.log_norms : nullptr};
    second = !second;
    float* to = partials + (second * team + member) * batch * most;
    const auto add = [&](const float* threshold, int64_t begin, int64_t end, auto P) {
      for_batch(batch, [&](auto B) {
        kept.list<B, P>(from, threshold, n_in, ANY_ORDER<T>);
        kept.take(first, first + own, thread, threads);
        outputs<B, P>(matrix, kept, begin, end, {to + begin, most});
      });
    };
    constexpr std::integral_constant<int, 1> ONE;
    const int64_t summed = n_out * std::bit_ceil(uint64_t(batch));
    if (!m.cut) {
      add(nullptr, 0, n_out, ONE);
    } else if (widths.size() == 2 && n_out % (2 * GRAIN) == 0 && summed <= COLUMNS) {  // else rows are long anyway
      add(projection.threshold, 0, n_out, std::integral_constant<int, 2>());
    } else {
      int64_t begin = 0, end = 0;
      const float* next = projection.threshold;
      for (const int64_t width : widths) {
        const float* threshold = next;
        next += n_in;
        end += width;
        if (end < n_out && !std::memcmp(threshold, next, n_in * sizeof(float))) continue;
        add(threshold, begin, end, ONE);
        begin = end;
      }
    }
    if (m.cut && projection.offset) {
      // else `gather` would wait for the offset: 30 to 45 us of a step of SmolLM2-135M, two cores of an EPYC
      for (int64_t j = 0; j < n_out; j += 16) __builtin_prefetch(projection.offset + j, 0, 2);
    }
    meet();
  }

  // to[0 .. end - begin) = a text's outputs begin .. end of the last product, rounded: the sum of `members` from `first`
  // on, this rank's threads or those of all ranks.
  void gather(int64_t b, const Projection& projection, int64_t begin, int64_t end, float* to, int first, int members) {
    const float* from = partials + ((second * team + first) * batch + b) * most;
    std::copy(from + begin, from + end, to);
    for (int t = 1; t < members; t++)
      for (int64_t j = begin; j < end; j++) to[j - begin] += from[t * batch * most + j];

    // int8's scale, then offset and bias, rounded after each as the plain model rounds
    if (projection.scale && !projection.group)
      for (int64_t j = begin; j < end; j++) to[j - begin] *= static_cast<const float*>(projection.scale)[j];
    round_all<T>(to, to, end - begin);
    if (m.cut && projection.offset)
      for (int64_t j = begin; j < end; j++) to[j - begin] = rounded<T>(to[j - begin] + projection.offset[j]);
    if (const T* bias = static_cast<const T*>(projection.bias))
      for (int64_t j = begin; j < end; j++) to[j - begin] = rounded<T>(to[j - begin] + float(bias[j]));
  }

  void project_qkv(const Layer& layer) {
    normalize(layer.attention_norm);
    multiply<V>(shift(x.data(), layer.wqkv, m.dim), layer.wqkv, m.dim, 0, m.dim, {q, kv, kv});
    const Range mine(width, thread, threads, GRAIN);
    for (int64_t b = 0; b < batch; b++)
      gather(b, layer.wqkv, mine.begin, mine.end, m.qkv + b * width + mine.begin, rank * threads, threads);
  }

  void prepare_rotations(const Layer& layer) {
    for (int64_t b = 0, half = m.head_dim / 2; b < batch; b++)
      for (int64_t i = 0; i < half; i++) {
        const float angle = float(positions[b]) * layer.inv_freq[i];
        const float factor = layer.inv_freq[i] != 0 ? layer.rope_factor : 1.0f;
        cos[b * half + i] = std::cos(angle) * factor;
        sin[b * half + i] = std::sin(angle) * factor;
      }
  }

  // to = RMSNorm(from) of n values, rounded as that rounds.
  void normalize(const float* from, const void* gain, int64_t n, float* to) const {
    const T* weight = static_cast<const T*>(gain);
    const float rstd = 1.0f / std::sqrt(sum_of_squares(from, n) / n + m.eps);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = rounded<T>(rounded<T>(from[i] * rstd) * float(weight[i]));
  }

  // to = a text's query or key, normalised if it has a gain, and rotated.
  void rotate(int64_t b, const float* from, const void* gain, float* to) {
    if (gain) normalize(std::exchange(from, to), gain, m.head_dim, to);
    for (int64_t i = 0, half = m.head_dim / 2; i < half; i++) {
      const float even = from[2 * i], odd = from[2 * i + 1], c = cos[b * half + i], s = sin[b * half + i];
      to[2 * i] = rounded<T>(even * c - odd * s);
      to[2 * i + 1] = rounded<T>(odd * c + even * s);
    }
  }

  // A text's keys or values of one head.
  T* cached(void* caches, int64_t b, int64_t kv_head) const {
    return static_cast<T*>(caches) + ((m.shared ? 0 : b) * m.n_local_heads + kv_head) * m.cache_length * m.head_dim;
  }

  // Caches a text's new key and value of one head.
  void cache(const Layer& layer, int64_t b, int64_t kv_head) {
    const int64_t d = m.head_dim, at = positions[b] * d;
    const float *qkv = m.qkv + b * width, *v = qkv + q + kv + kv_head * d;
    float* k = head.data() + d;
    rotate(b, qkv + q + kv_head * d, layer.k_norm, k);
    for (int64_t i = 0; i < d; i++) {
      cached(layer.k_cache, b, kv_head)[at + i] = T::from(k[i]);
      cached(layer.v_cache, b, kv_head)[at + i] = T::from(v[i]);
    }
  }

  // y of one head of a text. Its new key and value are not read from the cache, which another thread may be writing.
  void attend(const Layer& layer, int64_t b, int64_t h) {
    const int64_t heads_per_kv = m.n_head / m.n_local_heads, kv_head = h / heads_per_kv, d = m.head_dim;
    const int64_t first = std::max<int64_t>(0, positions[b] - layer.window + 1), n = positions[b] - first;
    const T* keys = cached(layer.k_cache, b, kv_head) + first * d;
    const T* values = cached(layer.v_cache, b, kv_head) + first * d;

    // the new query and key, rotated; the first of a key/value head's queries caches key and value
    if (!m.shared && h % heads_per_kv == 0) cache(layer, b, kv_head);
    float *rotated = head.data(), *k = rotated + d, *weighted = k + d;
    float* const y = m.y + (b * ranks + rank) * q + h * d;
    const float *qkv = m.qkv + b * width, *v = qkv + q + kv + kv_head * d;
    rotate(b, qkv + h * d, layer.q_norm, rotated);
    rotate(b, qkv + q + kv_head * d, layer.k_norm, k);

    // scores, and their softmax's exponentials and total
    for (int64_t j = 0; j < n; j++) scores[j] = dot(keys + j * d, rotated, d);
    scores[n] = 0;
    for (int64_t i = 0; i < d; i++) scores[n] += rotated[i] * k[i];
    const float top = *std::max_element(scores.begin(), scores.begin() + n + 1);
#pragma omp simd
    for (int64_t j = 0; j <= n; j++) scores[j] = exponential((scores[j] - top) * m.softmax_scale);
    const float total = sum(scores.data(), n + 1);

    // y = the values, weighted
    for (int64_t i = 0; i < d; i++) y[i] = scores[n] * v[i];
    apart<T>(y, d);
    Row<T> row[ROWS];
    int64_t j = 0;
    for (; j + ROWS <= n; j += ROWS) {
      for (int64_t r = 0; r < ROWS; r++) row[r] = {values + (j + r) * d};
      add_rows<ROWS, 1>(row, row, {scores.data() + j, 0}, {y, 0}, d);
    }
    for (; j < n; j++) {
      row[0] = {values + j * d};
      add_rows<1, 1>(row, row, {scores.data() + j, 0}, {y, 0}, d);
    }
    in_order<T>(y, weighted, d);
    for (int64_t i = 0; i < d; i++) y[i] = rounded<T>(weighted[i] / total);
  }

  // h += the residual multiplier times the product of from [batch, n_in]
  void add_product(const float* from, int64_t n_in, int64_t first, int64_t own, const Projection& projection) {
    const Range mine(m.dim, member, team, GRAIN);
    multiply<W>(shift(from, projection, n_in), projection, n_in, first, own, {m.dim});
    for (int64_t b = 0; b < batch; b++) {
      float* h = m.h + b * m.dim;
      gather(b, projection, mine.begin, mine.end, sums.data(), 0, team);
#pragma omp simd
      for (int64_t j = mine.begin; j < mine.end; j++)
        h[j] = rounded<T>(h[j] + rounded<T>(sums[j - mine.begin] * m.residual_multiplier));
    }
  }

  // act = activation(gate) * up, of the same columns of both
  void gate_and_up(const Layer& layer) {
    normalize(layer.ffn_norm);
    const Range mine(m.hidden, thread, threads, GRAIN);
    float *gate = sums.data(), *up = gate + m.hidden;
    multiply<W>(shift(x.data(), layer.w13, m.dim), layer.w13, m.dim, 0, m.dim, {m.hidden, m.hidden});
    for (int64_t b = 0; b < batch; b++) {
      float* act = m.act + b * hidden + hidden_first + mine.begin;
      gather(b, layer.w13, mine.begin, mine.end, gate, rank * threads, threads);
      gather(b, layer.w13, m.hidden + mine.begin, m.hidden + mine.end, up, rank * threads, threads);
      const auto times_up = [&](auto activation) {
#pragma omp simd
        for (int64_t j = 0; j < mine.end - mine.begin; j++) act[j] = rounded<T>(rounded<T>(activation(gate[j])) * up[j]);
      };
      const auto swish = [](float x, float y) { return x / (1.0f + exponential(-y)); };
      if (m.activation == 0) times_up([&](float x) { return swish(x, x); });
      if (m.activation == 1) times_up([](float x) { return 0.5f * x * (1.0f + std::erf(x * 0.707106781f)); });
      if (m.activation == 2) times_up([&](float x) { return swish(x, 1.59576912f * (x + 0.044715f * x * x * x)); });
      if (m.activation == 3) times_up([](float x) { return x < 0 ? 0.0f : x; });
    }
  }
};

// Writes the next tokens of `batch` texts at these positions. Returns 1 where memory is short, 2 where another rank has
// ended, else 0. No thread starts before all have their memory: none may miss a meeting.
template <typename T, typename W, typename V>
int decode(const Model& m, int64_t batch, const int64_t* positions, const uint32_t* seeds, int threads) try {
  const auto start = std::chrono::steady_clock::now();
  Pace* pace = ANY_ORDER<T> ? m.pace : nullptr;  // else the number of threads would change tokens
  if (pace) threads = pace->threads(threads);
  Barrier barrier;
  const int64_t hidden = m.ranks ? m.ranks->hidden : m.hidden;  // all ranks have the same room for a product
  const int64_t most = std::max({m.dim, 2 * hidden, (m.n_head + 2 * m.n_local_heads) * m.head_dim});
  const auto own = std::make_unique_for_overwrite<float[]>(m.ranks ? 0 : 2 * threads * batch * most);
  float* const partials = m.ranks ? m.ranks->partials : own.get();
  Barrier& meeting = m.ranks ? *m.ranks->barrier : barrier;
  std::atomic<int> failed{0};
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<Worker<T, W, V>> worker;
    try {
      const int thread = omp_get_thread_num(), team = omp_get_num_threads();  // maybe fewer than were asked for
      if (m.ranks && team != threads) throw std::bad_alloc();
      worker = std::make_unique<Worker<T, W, V>>(m, batch, positions, thread, team, meeting, partials, most);
    } catch (const std::bad_alloc&) {
      failed = 1;
    }
#pragma omp barrier
    try {
      if (!failed) worker->step();
      if (!failed) worker->draw(seeds);
    } catch (const std::bad_alloc&) {
      failed = 1;
    } catch (const RankEnded&) {
      failed = 2;
    }
  }
  if (failed) return failed;
  if (pace) pace->took(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

}  // namespace

#define EXPORT(name, T, W, V)                                                                                         \
  extern "C" int sparse_gemv_##name(const void* x, const void* weight, const void* scale, const float* threshold,    \
                                    void* out, int64_t batch, int64_t n_in, int64_t n_out, int64_t group,            \
                                    int64_t n_segments, const int64_t* segments, int threads) {                      \
    const Matrix<W> matrix{static_cast<const W*>(weight), scale, n_out, group};                                      \
    return product(static_cast<const T*>(x), matrix, threshold, static_cast<T*>(out), batch, n_in, n_segments,       \
                   segments, threads);                                                                               \
  }                                                                                                                  \
  extern "C" void column_norms_##name(const void* weight, const void* scale, int64_t n_in, int64_t n_out,            \
                                      int64_t group, int8_t* log_norms, int threads) {                               \
    if (ANY_ORDER<T>) column_norms<W>({static_cast<const W*>(weight), scale, n_out, group}, n_in, log_norms, threads); \
  }                                                                                                                  \
  extern "C" int decode_##name(const Model* model, int64_t batch, int64_t* positions, const uint32_t* seeds,          \
                               int threads, int64_t steps) {                                                         \
    for (int failed; steps > 0; steps--) {                                                                           \
      if ((failed = decode<T, W, V>(*model, batch, positions, seeds, threads))) return failed;                       \
      for (int64_t b = 0; b < batch; b++) positions[b]++;                                                            \
    }                                                                                                                \
    return 0;                                                                                                        \
  }
EXPORT(bfloat16, BFloat16, BFloat16, BFloat16)
EXPORT(float16, Float16, Float16, Float16)
EXPORT(float32, Float32, Float32, Float32)
EXPORT(bfloat16_packed, BFloat16, Packed, Packed)
EXPORT(bfloat16_int8, BFloat16, Int8, Int8)
EXPORT(float16_int8, Float16, Int8, Int8)
EXPORT(float32_int8, Float32, Int8, Int8)
EXPORT(bfloat16_int4, BFloat16, Int4, Int8)
EXPORT(float16_int4, Float16, Int4, Int8)
EXPORT(float32_int4, Float32, Int4, Int8)

// to [n, n_columns] = the bfloat16 of packed rows.
extern "C" void unpack(const Packed* rows, const int32_t* table, BFloat16* to, int64_t n, int64_t n_columns, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; i++)
    Packed::unpack(rows + i * n_columns / Packed::GROUP, table, i, 0, n_columns, to + i * n_columns);
}

// Asks for huge pages under a range: rows at random places then miss fewer translations. Where it fails, nothing
// changes.
extern "C" void use_huge_pages(void* start, int64_t bytes) {
#if defined(__linux__)
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE of Linux 6.1, which older headers do not name
  const uintptr_t page = 2 << 20, from = uintptr_t(start) / page * page;
  for (uintptr_t p = from; p < uintptr_t(start) + bytes; p += page) madvise(reinterpret_cast<void*>(p), page, COLLAPSE);
#endif
}

// Reads a range as fast as threads can, for the bandwidth that decoding is compared with. Returns the sum of its words.
extern "C" uint64_t read_all(const void* start, int64_t bytes, int threads) {
  const uint64_t* words = static_cast<const uint64_t*>(start);
  uint64_t total = 0;
#pragma omp parallel for simd num_threads(threads) reduction(+ : total) schedule(static)
  for (int64_t i = 0; i < bytes / 8; i++) total += words[i];
  return total;
}
