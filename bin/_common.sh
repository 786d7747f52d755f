# Sourced by the commands of this folder: a Python that will do, and the project's environment made with it.
set -eu
cd "$(dirname "$0")/.."
# PostgreSQL may run as another user, from and in folders made here.
umask 022

fail() {
    echo "$*" >&2
    exit 1
}

# "3.13 /path/to/python", or nothing if it does not run (as a shim may not).
with_version() {
    "$1" -c 'import sys; print("%d.%d %s" % (sys.version_info[0], sys.version_info[1], sys.argv[1]))' "$1" 2>/dev/null || true
}

# A line of `with_version` for each Python of this machine, most usual first.
pythons() {
    {
        for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
            command -v "$name" || true
        done
        ls -d "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python3 2>/dev/null || true
    } | while read -r path; do with_version "$path"; done
}

# Of the lines of `pythons`, those from version $1 on.
from_version() {
    awk -v from="$1" '{
        split($1, have, "."); split(from, need, ".")
        if (have[1] > need[1] || have[1] == need[1] && have[2] >= need[2]) print
    }'
}

# Prints the Python to use: $PYTHON, or the first of this machine that can run the Django that is asked for.
find_python() {
    case "${DJANGO:-}" in 6.*) need=3.12 ;; *) need=3.11 ;; esac
    if [ -n "${PYTHON:-}" ]; then all=$(with_version "$PYTHON"); else all=$(pythons); fi
    found=$(echo "$all" | from_version "$need" | head -n 1)
    if [ -z "$found" ]; then
        seen=$(echo "$all" | cut -d ' ' -f 1 | sort -u | tr '\n' ' ')
        fail "tornjango${DJANGO:+ with Django $DJANGO} needs Python $need or later;" \
            "${PYTHON:-this machine} has ${seen:-none }only. Say where there is one: PYTHON=/path/to/python3 $0"
    fi
    echo "${found#* }"
}

# Sets $python to that of an environment with everything for the dependency group $1 (see pyproject.toml) installed.
environment() {
    python=$(find_python) || exit 1
    python=$("$python" bin/_environment.py "$1") || exit 1
}
