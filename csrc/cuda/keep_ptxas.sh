#!/bin/sh
# Runs a command of nvcc with -Xptxas=-v. What ptxas says of each kernel goes to OBJECT.ptxas, where benchmarks/ptxas.py
# reads it, the rest to the terminal.
last=
for argument; do
  [ "$last" = -o ] && log=$argument.ptxas
  last=$argument
done
"$@" >"$log" 2>&1
status=$?
grep -Ev '^ptxas info|^ +[0-9]+ bytes stack frame' "$log" >&2
exit $status
