// The counter of normal noise from an entry's arguments.
#pragma once

#include <string>

#include "bindings/arguments.h"
#include "core/counter_normal.h"

namespace tpext::bindings {

inline void require_range(const char* op, const char* name, int64_t value, int64_t end, const char* end_text) {
  if (value < 0 || value >= end)
    throw py::value_error(std::string(op) + ": " + name + " must lie in [0, " + end_text + "), got " +
                          std::to_string(value));
}

// For `rows` rows of `columns` numbers.
inline NoiseCounter noise_counter(const char* op, int64_t seed, int64_t step, int64_t stream, int64_t first_row,
                                  int64_t rows, int64_t columns) {
  constexpr int64_t kWords = int64_t{1} << 32;
  if (seed < 0) throw py::value_error(std::string(op) + ": seed must be >= 0, got " + std::to_string(seed));
  require_range(op, "step", step, kWords, "2^32");
  require_range(op, "stream", stream, kWords, "2^32");
  require_range(op, "first_row", first_row, kWords, "2^32");
  if (first_row + rows > kWords)
    throw py::value_error(std::string(op) + ": first_row + B must be at most 2^32, got " + std::to_string(first_row) +
                          " + " + std::to_string(rows));
  if (columns > 4 * kWords)
    throw py::value_error(std::string(op) + ": a row must have at most 2^34 numbers, got " + std::to_string(columns));
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(step), static_cast<uint32_t>(stream),
          static_cast<uint32_t>(first_row)};
}

}  // namespace tpext::bindings
