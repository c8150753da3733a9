// regularized_solve:  X = Y W (W'W + reg I)^-1      if N <= M
//                     X = Y (WW' + reg I)^-1 W      else
//
// for the K rows of Y and every matrix of a batch: the smaller Gram matrix is factored once, then the rows are
// multiplied by W and substituted, or the other way round. Operations a matrix, k = min(M, N), m = max(M, N):
// k^2 m + k^3 / 3 for the factor, 2 k (m + k) a row.
//
// A batch of small matrices is solved for in groups, one in each lane (interleaved.h), kRhs rows of Y at a time; each
// thread takes groups of its own. What is left over, and all larger matrices, go one by one (blocked.h), a row of Y in
// each lane, to the same bits. Deterministic: both say why.
#include "core/regularized_inverse.h"
#include "cpu/blocked.h"
#include "cpu/interleaved.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Rows of Y that are solved for together: those of a square matrix of 32 stay in the first-level cache.
constexpr int64_t kRhs = 8;

// Solves for the first matrices of a batch in groups of one a lane, and returns how many.
template <class T>
int64_t solve_groups(const RegularizedSolve<T>& args, int threads) {
  using V = Vec<T>;
  constexpr int C = Interleaved<T>::C;
  const int64_t M = args.rows, N = args.columns, K = args.count;
  const Interleaved<T> group(M, N, args.reg == T(0));
  if (!group.suits_solve()) return 0;
  const double operations = group.solve_operations(K), of_one = Blocked<T>(M, N, args.reg == T(0)).operations(K);
  const auto pays = [&](int64_t matrices) { return operations < static_cast<double>(matrices) * of_one; };
  const int64_t rest = args.batch % kLanes<T>;
  const int64_t batch = pays(rest) ? args.batch : pays(kLanes<T>) ? args.batch - rest : 0;
  if (batch == 0) return 0;
  // One strip holds C rows of Y, of X or of what is between them; a term more than there are stays zero.
  const int64_t longest = group.padded() > group.terms() ? group.padded() : group.terms() + 1;
  const int64_t stride = (longest + Interleaved<T>::R) * C, strips = kRhs / C;
  const Buffer<int32_t> places(2 * M * N + kRhs * (M + N));
  int32_t *const of_weight = places.get(), *const of_inverse = of_weight + M * N, *const of_rhs = of_inverse + M * N,
                 *const of_solution = of_rhs + kRhs * M;
  group.place(of_weight, of_inverse);
  for (int64_t q = 0; q < kRhs; ++q) {
    const auto begin = static_cast<int32_t>(q / C * stride + q % C);
    for (int64_t i = 0; i < M; ++i) of_rhs[q * M + i] = begin + static_cast<int32_t>(i * C);
    for (int64_t i = 0; i < N; ++i) of_solution[q * N + i] = begin + static_cast<int32_t>(i * C);
  }
  const int64_t memory = group.matrix_size() + group.factor_size() + 2 * strips * stride;
  for_groups<T>(batch, operations, memory, threads, [&](int64_t first, int64_t count, V* b) {
    const T* const weight = args.weight + first * M * N;
    int64_t* const status = args.status + first;
    V *const u = b + group.matrix_size(), *const y = u + group.factor_size(), *const x = y + strips * stride;
    group.load_matrices(weight, count, (args.batch - first) * M * N, of_weight, b);
    group.factor(b, V{} + args.reg, weight, count, u, status);
    for (int64_t q = 0; q < K; q += kRhs) {
      const int64_t rows = K - q < kRhs ? K - q : kRhs, columns = ceil_div(rows, C);
      const int64_t skipped = first * K + q;
      group.load_lanes(args.rhs + skipped * M, K * M, rows * M, count, (args.batch * K - skipped) * M, of_rhs, y);
      if (group.tall()) {
        group.project(b, y, x, columns, stride);
        group.substitute(u, x, columns, stride);
      } else {
        for (int64_t column = 0; column < columns; ++column)
          for (int64_t i = group.order() * C; i < group.padded() * C; ++i) y[column * stride + i] = V{};
        group.substitute(u, y, columns, stride);
        group.expand(b, y, x, columns, stride);
      }
      group.store_lanes(x, K * N, rows * N, count, status, of_solution, args.solution + skipped * N);
    }
  });
  return batch;
}

template <class T>
void solve(const RegularizedSolve<T>& args, int threads) {
  const int64_t M = args.rows, N = args.columns, K = args.count;
  if (M == 0 || N == 0) {
    for (int64_t i = 0; i < args.batch; ++i) args.status[i] = RegularizedInverse<T>::ok;
    for (int64_t i = 0; i < args.batch * K * N; ++i) args.solution[i] = T(0);
    return;
  }
  const int64_t done = solve_groups(args, threads);
  if (done == args.batch) return;
  const Blocked<T> matrix(M, N, args.reg == T(0));
  const T *const weight = args.weight + done * M * N, *const rhs = args.rhs + done * K * M;
  T* const solution = args.solution + done * K * N;
  for_matrices<T>(args.batch - done, matrix.operations(K), matrix.shared_size(K), matrix.private_size(), threads,
                  args.status + done, [&](int64_t i, T* shared, T* own, bool alone) {
                    return matrix.solve(weight + i * M * N, args.reg, rhs + i * K * M, K, solution + i * K * N, shared,
                                        own, alone);
                  });
}

}  // namespace

void regularized_solve(const RegularizedSolve<float>& args, int threads) { solve(args, threads); }
void regularized_solve(const RegularizedSolve<double>& args, int threads) { solve(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
