# Sourced by the other scripts: runs them from the project's root and holds what they share.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# PyTorch's index of CPU wheels. Named nowhere else.
torch_index=https://download.pytorch.org/whl/cpu

say() { printf '==> %s\n' "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# usable PYTHON: it runs (a pyenv shim may not), is a version the locks are made for, and has venv.
usable() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

# find_python [X.Y]: prints an interpreter, of that version where one is given, else $PYTHON where that is
# set; fails if there is none.
# shellcheck disable=SC2120
find_python() {
    local candidates=() candidate
    if [[ $# -gt 0 ]]; then
        candidates=("python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/"python$1")
    elif [[ -n ${PYTHON:-} ]]; then
        candidates=("$PYTHON")
    else
        candidates=(python3.11 python3.12 python3.13 python3)
    fi
    for candidate in "${candidates[@]}"; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# stamp_of FILE...: a key that changes with the files' contents and with the project's place, since an
# environment cannot be moved.
stamp_of() { { pwd && cat "$@"; } | sha256sum | cut -d' ' -f1; }

# the_python: as find_python, or says what is missing and ends the script.
the_python() {
    find_python || die "no Python 3.11 to 3.13 with the venv module found; tried" \
        "${PYTHON:-python3.11, python3.12, python3.13, python3}." \
        "Install one (apt install python3 python3-venv) or set PYTHON to one"
}

# up_to_date ENV KEY
up_to_date() { [[ -x $1/bin/python && -f $1/.stamp && $(<"$1/.stamp") == "$2" ]]; }

# lock_env ENV: of two runs at once the second waits, to find the work done.
lock_env() {
    exec 9>"$1.lock"
    flock 9
}

# make_venv ENV PYTHON: makes or mends it. A package whose installation was cut off has no INSTALLER yet;
# pip would take it for installed, so it is removed first.
make_venv() {
    rm -f "$1/.stamp"
    "$1/bin/pip" --version >/dev/null 2>&1 || "$2" -m venv --clear "$1"
    local info
    for info in "$1"/lib/python*/site-packages/*.dist-info; do
        [[ -f $info/INSTALLER ]] || rm -rf "$info"
    done
    rm -rf "$1"/lib/python*/site-packages/~*
}

# install_torch ENV: from the configured indexes, else from PyTorch's, asked for this one package alone: as an
# extra index it would be asked for all of them, which is slow, and slower still where it cannot be reached.
install_torch() {
    local torch=(install --no-deps --no-compile -r requirements/torch-cpu.txt)
    say "torch (about 190 MB)"
    "$1/bin/pip" "${torch[@]}" && return
    say "the configured indexes do not have it; trying PyTorch's own"
    "$1/bin/pip" "${torch[@]}" --index-url "$torch_index" ||
        die "torch's CPU build could not be installed; is the network up?"
}

# install_lock ENV LOCK: exactly what the lock says, nothing resolved, nothing built.
install_lock() {
    local total
    say "the packages in $2"
    total=$(grep -c '^[A-Za-z0-9].*==' "$2")
    "$1/bin/pip" install --no-deps --require-hashes --only-binary :all: --no-compile --progress-bar off \
        -r "$2" | progress "$total"
}

# progress TOTAL: shortens pip's output, which has three lines a package.
progress() {
    local step=20 end='\n'
    [[ -t 1 ]] && step=1 end='\r'
    awk -v total="$1" -v step="$step" -v end="$end" '
        function show(note) { printf "    %d of %d packages%s", n, total, note; fflush() }
        /^(Collecting|Processing|Ignoring|Requirement already)/ { if (++n % step == 0) show(end) }
        /^Installing collected/ { show(", installing\n") }'
}

# finish_env ENV KEY: this tree itself, editable (hatchling comes from the lock), byte code (compileall uses
# all cores where pip uses one; a package may ship templates that are no valid Python), and the stamp.
finish_env() {
    "$1/bin/pip" install -q --no-deps --no-build-isolation -e .
    say "compiling"
    "$1/bin/python" -m compileall -qq -j 0 "$1"/lib/python*/site-packages || true
    echo "$2" >"$1/.stamp"
    say "$1 is ready"
}
