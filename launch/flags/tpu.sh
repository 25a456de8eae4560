# shellcheck shell=bash
# What the files of all TPU generations set. Sourced by them.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/default.sh"

# Left out on purpose: --xla_enable_async_all_gather and the --xla_tpu_enable_async_collective_fusion* family of many
# published recipes. The compiler chooses them by itself where they are right, and libtpu 0.0.50 refuses a program that
# forces them on anything but v5e.

# Between slices: the gradients' all-reduce of one layer runs during the gradient of the next, also where the sizes
# differ. Without slices they change nothing. Source: recipes of MaxText and compiler options of AXLearn.
default_flag LIBTPU_INIT_ARGS --xla_tpu_enable_data_parallel_all_reduce_opt=true
default_flag LIBTPU_INIT_ARGS --xla_tpu_data_parallel_opt_different_sized_ops=true
