#!/usr/bin/env bash
# Everything that only a machine with GPUs can show, part by part; writes report.md and report.json.
#
#   bash scripts/check_gpu.sh [--out DIR] [--only NAME ...] [--list]
#
# AMDP_PYTHON_AS_IS  a Python that has torch, DeepSpeed, Megatron and pytest already: nothing is made or installed

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# Before anything is installed: without a GPU nothing is done.
case " $* " in
    *" --list "* | *" --help "* | *" -h "*) exec "${AMDP_PYTHON_AS_IS:-python3}" "$root/scripts/check_gpu.py" "$@" ;;
esac
if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    echo "check_gpu: this machine has no GPU that nvidia-smi can see, so nothing was checked" >&2
    exit 3
fi
if [[ -z "${AMDP_PYTHON_AS_IS:-}" ]]; then
    # shellcheck source=scripts/environment.sh
    source "$root/scripts/environment.sh"
fi
exec "${AMDP_PYTHON_AS_IS:-python}" "$root/scripts/check_gpu.py" "$@"
