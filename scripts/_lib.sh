# Sourced by the other scripts: finds a Python, and makes virtual environments, which are updated only when their
# dependencies have changed.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }

find_python() {
    local name
    for name in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "Python 3.11 or newer with its venv module is needed; set PYTHON to one (Debian: apt-get install python3-venv)" >&2
    return 1
}

# ensure_venv FOLDER STAMP INSTALL: makes the virtual environment FOLDER and calls the function INSTALL with its pip
# command, unless that was done before with the same STAMP, Python, pyproject.toml and constraints. The versions are those
# of constraints/ (see scripts/lock): of this Python's file, else of the Python that they were tested with.
ensure_venv() {
    local folder=$1 install=$3 python version kind want tested with=()
    python=$(find_python)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    kind=${folder#.venv}
    tested=$root/constraints/py$version${kind%-"$version"}.txt
    [ -f "$tested" ] || tested=$root/constraints/py3.11${kind%-"$version"}.txt
    want=$(printf '%s\n' "$2" "$("$python" -V)" |
        cat - "$root/pyproject.toml" "$root"/constraints/*.txt "$root/scripts/_lib.sh" | sha256sum)
    if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$want" ]; then
        return
    fi
    say "installing into $(basename "$folder") (once; a few minutes where torch has to be fetched)"
    [ -x "$folder/bin/python" ] || "$python" -m venv "$folder" || return # set -e does not count where a caller has ||
    [ ! -f "$tested" ] || with=(-c "$tested")
    "$install" "$folder/bin/python" -m pip install -qq --disable-pip-version-check "${with[@]}" || return
    printf '%s' "$want" >"$folder/.installed"
}
