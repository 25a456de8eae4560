# shellcheck shell=bash
# TPU v6e (Trillium). Sourced before a process starts; what is set already wins.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

# 48 of the 128 MiB of on-chip memory for the operation that runs, so that dense matrix products get large tiles; by
# itself the compiler gives 16. Recipes give 96, with which 7b compiles for 198 instead of 104 s of processor time and has,
# by the count of docs/aot.md, 58.6 instead of 63.7 % MFU: on the chips, measure both. Source: v6e recipes of MaxText for
# dense models, compiler options of AXLearn.
default_flag LIBTPU_INIT_ARGS --xla_tpu_scoped_vmem_limit_kib=49152
