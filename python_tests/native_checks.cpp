// Of the kernels' own tools, what no entry of the module shows: test_native.py compiles it, with the sanitizer that
// stops at undefined behaviour, and runs it with the name of a check. Exit status 0: passed.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#define TPEXT_CAPABILITY baseline
#define TPEXT_VECTOR_BYTES 16
#include "cpu/layer_gradients.h"

using namespace tpext::cpu::baseline;

namespace {

bool all_passed = true;

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("failed: %s\n", what);
  all_passed = false;
}

template <class T>
void lanes_without_numbers() {
  const volatile T nan = static_cast<T>(__builtin_nan("")), infinity = static_cast<T>(__builtin_inf()),
                   minus_zero = T(-0.0);
  for (const T value : {T(nan), -T(nan), T(infinity), -T(infinity), T(minus_zero)}) {
    const Vec<T> v = Vec<T>{} + value;
    const T tanh_v = tanh<T>(v)[0], ratio = half_log_ratio<T>(v, Vec<T>{} + T(1), v)[0],
            atanh_v = half_log_ratio<T>(T(1) + v, T(1) - v, v + v)[0];
    if (value != value) expect(tanh_v != tanh_v && ratio != ratio && atanh_v != atanh_v, "NaN stays NaN");
  }
}

// The members of a team write to columns of their own, and together to all.
template <class T>
void columns_of_a_team() {
  for (int64_t hidden = 1; hidden <= 70; ++hidden)
    for (int parts = 1; parts <= panel_units<T>(hidden); ++parts) {
      std::vector<int> writers(static_cast<size_t>(hidden), -1);
      for (int part = 0; part < parts; ++part) {
        Tile tile = {};
        tile.rows = tile.blocks = 1;
        tile.part = part;
        tile.parts = parts;
        const PanelGroups<T> groups(hidden, tile);
        for (int64_t group = 0; group < groups.count(); ++group)
          for (int64_t panel = groups.begin(group); panel < groups.begin(group + 1); ++panel)
            for (int64_t i = 0; i < kLanes<T> && panel_column<T>(hidden, panel) + i < hidden; ++i) {
              int& writer = writers[static_cast<size_t>(panel_column<T>(hidden, panel) + i)];
              expect(writer == -1 || writer == part, "a column has one writer");
              writer = part;
            }
      }
      for (const int writer : writers) expect(writer != -1, "every column is written");
    }
}

// Wherever a team shares the rows of a group, each member has one, on any number of processors.
template <class T>
void rows_of_a_team() {
  for (int64_t batch = 1; batch <= 130; ++batch)
    for (const int64_t time : {1, 20, 200, 5000})
      for (const int64_t hidden : {1, 8, 32, 100, 300}) {
        const tpext::RnnSizes sizes{1, time, batch, hidden, nullptr, nullptr};
        const int64_t groups = group_count(sizes, 2 * hidden);
        if (groups == 0) continue;
        for (int threads = 1; threads <= 96; ++threads) {
          const GroupTeams teams = share_groups<T>(sizes, groups, 1, threads, threads);
          expect(teams.members >= 1 && teams.teams * teams.members <= threads, "no more places than threads");
          expect(teams.members == 1 || teams.teams == groups, "a team of several has one group");
          if (!teams.by_columns) expect(teams.members <= batch / groups, "a member has a row of every group");
          if (teams.by_columns) expect(teams.members <= panel_units<T>(hidden), "a member has a column");
        }
      }
}

// Rounds until a team of two dissolved, at most `rounds`; the second thread comes late by so much.
int meet(int rounds, int pauses, std::chrono::microseconds late) {
  Barrier barrier;
  std::memset(static_cast<void*>(&barrier), 0, sizeof barrier);
  const auto run = [&](bool slow) {
    for (int round = 1; round <= rounds; ++round) {
      if (slow && late.count() != 0) std::this_thread::sleep_for(late);
      if (!barrier.wait(2, pauses)) return round;
    }
    return rounds;
  };
  int of_other = 0;
  std::thread other([&] { of_other = run(true); });
  const int of_first = run(false);
  other.join();
  expect(of_first == of_other, "a team dissolves in one round");
  return of_first;
}

void barrier() {
  expect(meet(1000, 10, std::chrono::microseconds(2000)) <= 8, "a team that waits longer than it works dissolves");
  // Never: nobody sleeps before so many pauses.
  expect(meet(10000, 1 << 30, std::chrono::microseconds(0)) == 10000, "a team whose members are in time stays");
}

}  // namespace

int main(int count, char** names) {
  const auto wanted = [&](const char* name) { return count > 1 && std::strcmp(names[1], name) == 0; };
  if (wanted("lanes_without_numbers")) {
    lanes_without_numbers<float>();
    lanes_without_numbers<double>();
  } else if (wanted("columns_of_a_team")) {
    columns_of_a_team<float>();
    columns_of_a_team<double>();
  } else if (wanted("rows_of_a_team")) {
    rows_of_a_team<float>();
    rows_of_a_team<double>();
  } else if (wanted("barrier")) {
    barrier();
  } else {
    return 2;
  }
  return all_passed ? 0 : 1;
}
