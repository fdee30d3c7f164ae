# shellcheck shell=bash
# How the scripts speak. Sourced by every one of them.

amdp_say() { printf '[amdp] %s\n' "$*"; }
amdp_fail() {
    printf '[amdp] error: %s\n' "$*" >&2
    exit 1
}
