#!/usr/bin/env bash
# Everything that must pass before a change is good: lint, types, tests. Runs all three, then fails if any did.
#
#   bash scripts/test.sh [arguments for pytest]
#
# AMDP_TEST_WORKERS  pytest processes (default 2; 0 runs the tests in one process, as debuggers need)

set -euo pipefail

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$AMDP_ROOT"

# Tests start several ranks each: more threads in each would only fight for the same cores.
export OMP_NUM_THREADS=1

times=("environment: ${SECONDS} s")
failed=()

part() {
    local name="$1" started="$SECONDS" result="ok"
    shift
    amdp_say "$*"
    "$@" || {
        result="FAILED"
        failed+=("$name")
    }
    times+=("$name: $((SECONDS - started)) s, $result")
}

part lint ruff check .
part types mypy amdp_plugin
part tests pytest -n "${AMDP_TEST_WORKERS:-2}" "$@"

for line in "${times[@]}"; do amdp_say "$line"; done
[[ ${#failed[@]} -eq 0 ]] || amdp_fail "failed: ${failed[*]}"
