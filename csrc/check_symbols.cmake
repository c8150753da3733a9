# What the linker would not complain about, looked for after every link:
#   OBJECTS  those of instruction sets beyond the baseline define no weak function: the linker keeps one copy of those,
#            which may be one that a lesser processor does not run
#   MODULE   misses no function of its own, which would show at import only
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND "${NM}" -C --defined-only "${object}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [Wu] [^\n]*" weak "${symbols}")
  if(weak)
    list(JOIN weak "\n" weak)
    message(FATAL_ERROR "tpext: weak symbols in ${object}, which is for one instruction set: put the functions into an "
                        "unnamed namespace, or force them inline\n${weak}")
  endif()
endforeach()
if(MODULE)
  execute_process(COMMAND "${NM}" -C -u "${MODULE}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* tpext::[^\n]*" missing "${symbols}")
  if(missing)
    list(JOIN missing "\n" missing)
    message(FATAL_ERROR "tpext: ${MODULE} uses what no source defines\n${missing}")
  endif()
endif()
