# Sourced by the other scripts: makes .venv beside pyproject.toml and installs the project into it.
# Needs Python >= 3.11 and the network; does nothing if everything is installed already.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="$repository/.venv/bin/python"
# Tests that concern the commit, recovery, lock and journal code: scripts/coverage runs them, and scripts/test the rest.
covered_tests=(tests/durable tests/snapshot tests/manager tests/formats tests/state/test_on_device.py
    tests/cli/test_{export,import,prune}.py
    tests/loop/test_{deadline,faults,full_disk,interval,odd_loops,opening,reading_again}.py
    tests/loop/test_{run,saver,saving_in_evaluation,take_over,waiting}.py)

say() { printf '== %s\n' "$*"; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && command -v "$candidate" > /dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: no Python >= 3.11 found; install one, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

# make_environment DIRECTORY: a virtual environment, unless there is one
make_environment() {
    local found
    if [ -x "$1/bin/python" ]; then return 0; fi
    found=$(find_python) || return 1
    say "making $1 with $found"
    if ! "$found" -m venv "$1"; then
        echo "error: $found cannot make virtual environments (on Debian: apt install python3-venv)" >&2
        return 1
    fi
}

# prepare EXTRA: an environment in which the extra of pyproject.toml is installed
prepare() {
    local extra=$1 stamp wanted
    make_environment "$repository/.venv" || exit 1
    stamp="$repository/.venv/installed-$extra"
    wanted=$(cat "$repository/pyproject.toml" "$repository/scripts/constraints.txt" | cksum)
    if [ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]; then
        say "installing the project and its [$extra] packages into .venv (torch is large: a minute or more)"
        "$python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$repository/scripts/constraints.txt" --editable "$repository[$extra]" || exit 1
        printf '%s\n' "$wanted" > "$stamp"
    fi
    compile_sources
}

# As pip does with what it installs: where Python may not write bytecode, each start would compile the sources again.
compile_sources() { "$python" -m compileall -q "$repository/resumable_trainer" "$repository/benchmarks" || true; }

# Debian packages that some tests need (a systemd and a cron of their own); where they cannot be had, those tests are skipped.
install_packages() {
    local package missing=()
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then return 0; fi
    for package in systemd dbus cron util-linux procps; do
        dpkg -s "$package" > /dev/null 2>&1 || missing+=("$package")
    done
    if [ "${#missing[@]}" = 0 ]; then return 0; fi
    say "installing ${missing[*]}, which some tests need"
    {
        export DEBIAN_FRONTEND=noninteractive
        apt-get update && apt-get install --yes --no-install-recommends "${missing[@]}"
    } > /dev/null 2>&1 < /dev/null || say "not installed; tests that need them are skipped"
    return 0
}
