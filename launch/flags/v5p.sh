# shellcheck shell=bash
# TPU v5p. Sourced before a process starts; what is set already wins.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

# All three from the v5p recipes of MaxText, which reach 69 to 72 % of the peak with them: gathers stay out of the
# fusions that both cores of a chip share, permutes are asynchronous, and gathers of the backward pass are pipelined.
default_flag LIBTPU_INIT_ARGS --xla_tpu_megacore_fusion_allow_ags=false
default_flag LIBTPU_INIT_ARGS --xla_enable_async_collective_permute=true
default_flag LIBTPU_INIT_ARGS --xla_tpu_enable_ag_backward_pipelining=true
