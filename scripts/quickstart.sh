#!/usr/bin/env bash
# Trains one small model on this machine, with stock 1F1B and with PACI, and draws the comparison.
#
#   bash scripts/quickstart.sh [arguments for amdp compare]             under DeepSpeed
#   bash scripts/quickstart.sh megatron [arguments for amdp compare]    under Megatron, and with AMDP too
#
# AMDP_OUTPUT  where the table and the picture go (default: quickstart_output in the repository; in it, megatron)

set -euo pipefail

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

output="$AMDP_ROOT/quickstart_output"
configs="$AMDP_ROOT/ds_configs"
compared=(--configs "$configs/1f1b.json" "$configs/paci.json")
if [[ "${1:-}" == megatron ]]; then
    shift
    output="$output/megatron"
    compared=(--host megatron --schedules stock "paci:$AMDP_ROOT/scripts/megatron_error_feedback.json" amdp)
fi
output="${AMDP_OUTPUT:-$output}"

# One thread a rank, so that two ranks on two cores do not slow each other down and the comparison stays fair.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

amdp compare "${compared[@]}" --nproc 2 --output "$output" "$@"

amdp_say "done in ${SECONDS} s; the table and the picture:"
find "$output" -maxdepth 1 -type f | sort
