# Sourced by the other scripts here: `prepare_environment [EXTRA]` leaves a working .venv in the checkout, with the
# packages of that extra of pyproject.toml beside those of development where one is named.
# Safe to interrupt and to run twice at once: the stamp that says "ready" is written last, under a lock.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
base_stamp="$venv/.hypertorch-ready"
stamp="$base_stamp"
extras=dev
constraints="$root/scripts/constraints.txt"

say() { printf 'hypertorch: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# A name on PATH proves nothing (version managers leave shims that only print an error), so each candidate is run.
usable_python() {
    "$1" - >/dev/null 2>&1 <<'PYTHON'
import sys
import ensurepip, venv
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        usable_python "$PYTHON" || fail "\`PYTHON\` is $PYTHON, which does not run as a Python 3.10 to 3.13 with the venv module." \
            "The environment cannot be made with it. Name another interpreter, or unset PYTHON to let this script look for one."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.13 python3.10 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[0-3].*/bin/python /opt/homebrew/bin/python3.1[0-3]; do
        if usable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.10, 3.11, 3.12 or 3.13 with the venv module was found." \
        "hypertorch needs one to make its environment. Install one (on Debian and Ubuntu: apt install python3 python3-venv)," \
        "or name it: PYTHON=/path/to/python3.12 $0"
}

# The environment is ready when it was completed from these very files, at this very place, and still starts.
fingerprint() { printf '%s\n' "$root"; cksum <"$root/pyproject.toml"; cksum <"$constraints"; }
write_stamp() { fingerprint >"$1.new" && mv "$1.new" "$1"; }
environment_is_ready() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] && "$venv/bin/python" -c "" >/dev/null 2>&1
}

install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check "$@" && return
    fail "pip could not install: $* (its own message is above)." \
        "Without it nothing can run. If there is no network, or a mirror is needed, set pip up for it" \
        "(PIP_INDEX_URL, PIP_FIND_LINKS, HTTPS_PROXY); then give the same command again: it goes on from here."
}

make_environment() {
    local python torch
    # Gone before anything changes: an interrupted install must not look finished.
    rm -f "$base_stamp"*
    if ! usable_python "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)" || exit 1
        say "making .venv with $python ($("$python" --version 2>&1))"
        "$python" -m venv --clear "$venv" || fail "\`$python -m venv $venv\` failed (its own message is above)." \
            "Without an environment nothing can run. Check that the folder can be written, or name another interpreter with PYTHON=..."
    fi
    torch="$(grep '^torch==' "$constraints")"
    say "installing $torch (the largest part: up to a few GB where the CUDA build is taken)"
    # Alone and first: so pip's choice between CPU and CUDA builds is made by the user's pip settings only.
    install "$torch"
    say "installing hypertorch and its other requirements"
    install -qq -c "$constraints" -e "$root[$extras]"
    write_stamp "$base_stamp"
    [ "$stamp" = "$base_stamp" ] || write_stamp "$stamp"
    say "the environment is ready; the next call starts at once"
}

prepare_environment() {
    if [ "$#" -gt 0 ]; then
        # A stamp of its own: the environment may be ready without the extra.
        extras="dev,$1"
        stamp="$base_stamp-$1"
    fi
    environment_is_ready && return
    if command -v flock >/dev/null 2>&1; then
        # Beside .venv, not in it: making the environment may empty that folder.
        exec 9>"$root/.venv.lock" || fail "\`$root/.venv.lock\` cannot be written." \
            "The environment is made in the checkout. Give yourself write access to $root, or use another checkout."
        flock -n 9 || { say "another call is setting the environment up; waiting for it"; flock 9; }
        environment_is_ready || make_environment
        exec 9>&-
    else
        make_environment
    fi
}
