#!/usr/bin/env bash
# Trains one small model twice on this machine, with stock 1F1B and with PACI, and draws the comparison.
#
#   bash scripts/quickstart.sh [arguments for amdp compare]
#
# AMDP_OUTPUT  where the table and the picture go (default: quickstart_output in the repository)

set -euo pipefail

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

output="${AMDP_OUTPUT:-$AMDP_ROOT/quickstart_output}"
configs="$AMDP_ROOT/ds_configs"

# One thread a rank, so that two ranks on two cores do not slow each other down and the comparison stays fair.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

amdp compare --configs "$configs/1f1b.json" "$configs/paci.json" --nproc 2 --output "$output" "$@"

amdp_say "done in ${SECONDS} s; the table and the picture:"
find "$output" -maxdepth 1 -type f | sort
