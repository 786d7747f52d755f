# Sourced by the commands of this folder: a Python that will do, and the project's environment made with it.
set -eu
cd "$(dirname "$0")/.."
# PostgreSQL may run as another user, from and in folders made here.
umask 022

fail() {
    echo "$*" >&2
    exit 1
}

# Prints "3.13", or nothing if $1 does not run (as a shim may not).
version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# Is version $1 a Python 3 from version $2 on?
at_least() {
    case $1 in 3.*) [ "${1#3.}" -ge "${2#3.}" ] ;; *) false ;; esac
}

# Prints the paths of what may be a Python, most usual first.
candidates() {
    for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
        command -v "$name" || true
    done
    ls -d "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python3 2>/dev/null || true
}

# Prints "3.13 /path/to/python" for each candidate from version $1 on.
pythons() {
    candidates | while read -r path; do
        found=$(version "$path")
        ! at_least "$found" "$1" || echo "$found $path"
    done
}

# Prints the Python to use: $PYTHON, or the first of this machine that can run the Django that is asked for.
find_python() {
    case "${DJANGO:-}" in 6.*) need=3.12 ;; *) need=3.11 ;; esac
    what="tornjango${DJANGO:+ with Django $DJANGO} needs Python $need or later"
    if [ -n "${PYTHON:-}" ]; then
        found=$(version "$PYTHON")
        at_least "$found" "$need" || fail "$what; PYTHON=$PYTHON is ${found:-no Python that runs}."
        echo "$PYTHON"
        return
    fi
    found=$(candidates | while read -r path; do
        ! at_least "$(version "$path")" "$need" || { echo "$path" && break; }
    done)
    [ -n "$found" ] || fail "$what, and this machine shows none. Say where one is: PYTHON=/path/to/python3 $0"
    echo "$found"
}

# Sets $python to that of an environment with everything for the dependency group $1 (see pyproject.toml) installed.
environment() {
    python=$(find_python) || exit 1
    python=$("$python" bin/_environment.py "$1") || exit 1
}
