# shellcheck shell=bash
# TPU v4. Sourced before a process starts; what is set already wins.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

# The two cores of a chip work as one device, for which the peak rate of this chip is meant. Source: PyTorch/XLA sets this
# variable on v4; libtpu reads it.
default_variable TPU_MEGACORE megacore_dense

# On by itself only from v5 on. Source: compiler options of AXLearn.
default_flag LIBTPU_INIT_ARGS --xla_enable_async_collective_permute=true
