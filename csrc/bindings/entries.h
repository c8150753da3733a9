// The entries of `_C` by family; csrc/bindings/module.cpp puts them together.
#pragma once

#include <pybind11/pybind11.h>

namespace tpext::bindings {

void define_act_inverse(pybind11::module_& m);
void define_counter_normal(pybind11::module_& m);
void define_gated(pybind11::module_& m);
void define_kaczmarz(pybind11::module_& m);
void define_large_array(pybind11::module_& m);
void define_pooled_difference(pybind11::module_& m);
void define_regularized_inverse(pybind11::module_& m);
void define_rnn(pybind11::module_& m);

}  // namespace tpext::bindings
