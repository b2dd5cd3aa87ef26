// The sparse product on a CPU: y = W^T cut(x), rows of cut inputs not read. Built and called by cpu.py.
//
// Each thread takes a range of outputs. It lists the kept inputs once a segment, then adds eight kept rows at a time to
// float32 sums that stay in the first-level cache: eight streams for the prefetcher, an eighth of the traffic to the sums.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  static BFloat16 from(float value) {  // round to nearest even
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if (std::isnan(value)) return {0x7fc0};
    return {uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
  }
};

struct Float16 {
  _Float16 value;
  operator float() const { return value; }
  static Float16 from(float value) { return {_Float16(value)}; }
};

struct Float32 {
  float value;
  operator float() const { return value; }
  static Float32 from(float value) { return {value}; }
};

constexpr int64_t ROWS = 8;       // kept rows added at a time
constexpr int64_t COLUMNS = 1024;  // outputs summed at a time: 4 KB
constexpr int64_t GRAIN = 64;      // a thread's range is a multiple of this: no cache line of W is read twice

template <typename T>
void outputs(const T* x, const T* weight, const float* threshold, T* out, int64_t n_in, int64_t n_out, int64_t begin,
             int64_t end, std::vector<int64_t>& kept, std::vector<float>& values) {
  int64_t n = 0;
  for (int64_t i = 0; i < n_in; i++) {
    float value = x[i];
    kept[n] = i;
    values[n] = value;
    n += !(std::fabs(value) <= threshold[i]);  // NaN is kept
  }
  alignas(64) float sums[COLUMNS];
  for (int64_t column = begin; column < end; column += COLUMNS) {
    const int64_t width = std::min(COLUMNS, end - column);
    std::fill(sums, sums + width, 0.0f);
    int64_t r = 0;
    for (; r + ROWS <= n; r += ROWS) {
      const T* row[ROWS];
      for (int64_t k = 0; k < ROWS; k++) row[k] = weight + kept[r + k] * n_out + column;
      const T *w0 = row[0], *w1 = row[1], *w2 = row[2], *w3 = row[3], *w4 = row[4], *w5 = row[5], *w6 = row[6],
              *w7 = row[7];
      const float *v = values.data() + r, v0 = v[0], v1 = v[1], v2 = v[2], v3 = v[3], v4 = v[4], v5 = v[5], v6 = v[6],
                  v7 = v[7];
#pragma omp simd
      for (int64_t j = 0; j < width; j++)
        sums[j] += v0 * float(w0[j]) + v1 * float(w1[j]) + v2 * float(w2[j]) + v3 * float(w3[j]) + v4 * float(w4[j]) +
                   v5 * float(w5[j]) + v6 * float(w6[j]) + v7 * float(w7[j]);
    }
    for (; r < n; r++) {
      const T* w = weight + kept[r] * n_out + column;
      const float value = values[r];
#pragma omp simd
      for (int64_t j = 0; j < width; j++) sums[j] += value * float(w[j]);
    }
    for (int64_t j = 0; j < width; j++) out[column + j] = T::from(sums[j]);
  }
}

template <typename T>
void product(const T* x, const T* weight, const float* threshold, T* out, int64_t batch, int64_t n_in, int64_t n_out,
             int64_t n_segments, const int64_t* segments, int threads) {
  const int64_t share = ((n_out + threads - 1) / threads + GRAIN - 1) / GRAIN * GRAIN;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int thread = 0; thread < threads; thread++) {
    std::vector<int64_t> kept(n_in + 1);  // one more: the slot after the last kept input is written too
    std::vector<float> values(n_in + 1);
    const int64_t first = thread * share, last = std::min(n_out, first + share);
    int64_t start = 0;
    for (int64_t s = 0; s < n_segments; start += segments[s++]) {
      const int64_t begin = std::max(first, start), end = std::min(last, start + segments[s]);
      if (begin >= end) continue;
      for (int64_t b = 0; b < batch; b++)
        outputs(x + b * n_in, weight, threshold + s * n_in, out + b * n_out, n_in, n_out, begin, end, kept, values);
    }
  }
}

}  // namespace

#define EXPORT(name, T)                                                                                             \
  extern "C" void name(const void* x, const void* weight, const float* threshold, void* out, int64_t batch,         \
                       int64_t n_in, int64_t n_out, int64_t n_segments, const int64_t* segments, int threads) {     \
    product(static_cast<const T*>(x), static_cast<const T*>(weight), threshold, static_cast<T*>(out), batch, n_in, \
            n_out, n_segments, segments, threads);                                                                  \
  }
EXPORT(sparse_gemv_bfloat16, BFloat16)
EXPORT(sparse_gemv_float16, Float16)
EXPORT(sparse_gemv_float32, Float32)
