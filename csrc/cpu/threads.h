// The place of the calling thread in its team, with and without OpenMP.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

#ifdef _OPENMP
inline int thread_index() { return omp_get_thread_num(); }
inline int thread_count() { return omp_get_num_threads(); }
#else
inline int thread_index() { return 0; }
inline int thread_count() { return 1; }
#endif

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
