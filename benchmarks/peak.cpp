// What the machine can do at most: multiply-adds of the widest vectors in registers, and bytes read from memory.
// Prints GFLOP/s and GB/s of so many threads, the best of some rounds: peak THREADS
#include <omp.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float Vec __attribute__((vector_size(BYTES), aligned(4)));

// Twelve sums hide the latency of a multiply-add on every processor so far; as many as AVX2 has registers for.
constexpr int kSums = 12;
constexpr long kSteps = 1 << 24;

double multiply_adds(int threads) {
  const double begin = omp_get_wtime();
#pragma omp parallel num_threads(threads)
  {
    Vec sums[kSums], factor = Vec{} + 0.999f, term = Vec{} + 1e-4f;
    for (int i = 0; i < kSums; ++i) sums[i] = Vec{} + static_cast<float>(i);
    asm volatile("" : "+x"(factor), "+x"(term));
    for (long step = 0; step < kSteps; ++step)
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + term;
    for (int i = 0; i < kSums; ++i) asm volatile("" ::"x"(sums[i]));
  }
  return 2.0 * kSteps * kSums * (BYTES / 4) * threads / (omp_get_wtime() - begin) / 1e9;
}

double reading(int threads, const std::vector<float>& memory) {
  const double begin = omp_get_wtime();
#pragma omp parallel num_threads(threads)
  {
    const size_t vectors = memory.size() * 4 / BYTES, part = vectors / static_cast<size_t>(threads);
    const Vec* const from =
        reinterpret_cast<const Vec*>(memory.data()) + static_cast<size_t>(omp_get_thread_num()) * part;
    Vec joined[4] = {};
    for (size_t i = 0; i + 4 <= part; i += 4)
      for (int k = 0; k < 4; ++k) joined[k] += from[i + static_cast<size_t>(k)];
    for (int k = 0; k < 4; ++k) asm volatile("" ::"x"(joined[k]));
  }
  return static_cast<double>(memory.size()) * 4 / (omp_get_wtime() - begin) / 1e9;
}

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
  alignas(64) static std::vector<float> memory(64 << 20, 1.0f);
  double flops = 0, bytes = 0;
  for (int round = 0; round < 5; ++round) {
    const double f = multiply_adds(threads), b = reading(threads, memory);
    flops = f > flops ? f : flops;
    bytes = b > bytes ? b : bytes;
  }
  std::printf("%.1f %.1f\n", flops, bytes);
}
