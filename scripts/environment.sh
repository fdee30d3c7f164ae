# shellcheck shell=bash
# Makes the Python environment that every other script uses, and puts it first on PATH.
#
#   source scripts/environment.sh          from a script
#   bash scripts/environment.sh            by hand; then: source .venv/bin/activate
#
# AMDP_VENV    where the environment is (default: .venv in the repository)
# AMDP_PYTHON  the Python that makes it, 3.10 or newer (default: python3)

set -euo pipefail

AMDP_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
AMDP_VENV="${AMDP_VENV:-$AMDP_ROOT/.venv}"
# Absolute, because the scripts change directory and PATH must keep its meaning.
[[ "$AMDP_VENV" == /* ]] || AMDP_VENV="$PWD/$AMDP_VENV"

# shellcheck source=scripts/messages.sh
source "$AMDP_ROOT/scripts/messages.sh"

amdp_make_venv() {
    local python="${AMDP_PYTHON:-python3}"
    command -v "$python" >/dev/null || amdp_fail "'$python' not found; install Python 3.10 or newer, or set AMDP_PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        amdp_fail "'$python' is $("$python" --version 2>&1); Python 3.10 or newer is needed, set AMDP_PYTHON to one"
    amdp_say "making $AMDP_VENV with $("$python" --version)"
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        # Some distributions split ensurepip off; the pip that is there can then fill the environment.
        "$python" -m venv --without-pip "$AMDP_VENV"
        "$python" -m pip --python "$AMDP_VENV/bin/python" install --quiet pip ||
            amdp_fail "'$python' has neither ensurepip nor pip 22.3 or newer; install the python3-venv package"
    else
        "$python" -m venv "$AMDP_VENV" || amdp_fail "could not make $AMDP_VENV"
    fi
}

# An editable install of another checkout is no install of this one, so the path is part of the stamp.
amdp_install_stamp() {
    printf '%s\n' "$AMDP_ROOT"
    (cd "$AMDP_ROOT" && cksum setup.py constraints.txt)
}

amdp_install() {
    local stamp="$AMDP_VENV/.amdp-installed"
    [[ -f "$stamp" && "$(<"$stamp")" == "$(amdp_install_stamp)" ]] && return
    # Without a working pip the environment is missing, or was left half made.
    "$AMDP_VENV/bin/python" -m pip --version >/dev/null 2>&1 || amdp_make_venv
    amdp_say "installing amdp_plugin and what it needs (minutes, the first time)"
    "$AMDP_VENV/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
        -c "$AMDP_ROOT/constraints.txt" -e "${AMDP_ROOT}[deepspeed,megatron,test]" ||
        amdp_fail "pip could not install; see its message above"
    amdp_install_stamp >"$stamp"
}

# On a machine without GPU, DeepSpeed compiles a shared-memory communication library when its first process group
# starts (deepspeed.comm.torch.TorchBackend). Compiling it here, in one process, keeps every rank from waiting for it.
# The build does nothing where the accelerator has no such library. The stamp holds the library's path, or nothing.
amdp_build_shared_memory_op() {
    local stamp="$AMDP_VENV/.amdp-shared-memory-op" library
    if [[ -f "$stamp" ]]; then
        library="$(<"$stamp")"
        # The cache is shared by all environments of the user: it must be there, and made from this one.
        if [[ -z "$library" ]] || { [[ -f "$library" ]] && grep -qsF "$AMDP_VENV/" "${library%/*}/build.ninja"; }; then
            return
        fi
    fi
    amdp_say "compiling DeepSpeed's shared-memory op (about a minute; not needed with a GPU)"
    local log="$AMDP_VENV/.amdp-shared-memory-op.log"
    if ! AMDP_STAMP="$stamp.new" "$AMDP_VENV/bin/python" >"$log" 2>&1 <<'PYTHON'; then
import faulthandler
import os
from pathlib import Path

# The lock of a build that was killed stays, and torch would wait for it for ever.
faulthandler.dump_traceback_later(300, exit=True)

from deepspeed.comm.torch import build_shm_op

library = build_shm_op()
Path(os.environ["AMDP_STAMP"]).write_text(library.__file__ if library else "")
PYTHON
        cat "$log" >&2
        amdp_explain_build
        amdp_fail "DeepSpeed cannot start on this machine without its shared-memory op; see the message above"
    fi
    mv "$stamp.new" "$stamp"
}

# What is usually wrong, said plainly: the compiler's own message is a page long.
amdp_explain_build() {
    local compiler="${CXX:-c++}" headers
    command -v "$compiler" >/dev/null || amdp_fail "'$compiler' not found; install a C++ compiler (package g++) or set CXX"
    headers="$("$AMDP_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')"
    [[ -f "$headers/Python.h" ]] || amdp_fail "$headers/Python.h not found; install Python's headers (package python3-dev)"
    amdp_say "if it waited in file_baton.py: a killed build left its lock;" \
        "remove deepspeed_shm_comm from ${TORCH_EXTENSIONS_DIR:-~/.cache/torch_extensions}" >&2
}

amdp_install
# torch finds ninja, which compiles the op, through PATH only.
export PATH="$AMDP_VENV/bin:$PATH"
amdp_build_shared_memory_op
