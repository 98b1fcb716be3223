# Sourced by the scripts beside it, from the root of the checkout: makes .venv and installs the
# project into it. $PYTHON chooses the interpreter of a new .venv.

modern='import sys; sys.exit(sys.version_info < (3, 11))'

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c "$modern" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or later is needed; name it with PYTHON=/path/to/python3" >&2
    return 1
}

# install EXTRA: EXTRA is "" or "[test]"
install() {
    if ! .venv/bin/python -c "$modern" 2>/dev/null; then
        rm -rf .venv
        python=$(find_python) || return
        "$python" -m venv .venv || {
            echo "$python cannot make a virtual environment; Debian has it in python3-venv" >&2
            return 1
        }
    fi
    pip=".venv/bin/python -m pip --quiet --quiet --disable-pip-version-check"

    # Dependencies only when they changed, so that later runs need no network.
    wanted=$(cat setup.cfg pyproject.toml | cksum)
    stamp=".venv/installed$1"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        $pip install "setuptools>=77" ".$1" || return
        echo "$wanted" > "$stamp"
    fi

    # A strict editable install is a tree of links to the modules there are now, which mypy and
    # every other tool can follow: made anew each time, because files come and go.
    rm -rf build
    $pip uninstall --yes hyperseaport || return
    $pip install --no-deps --no-build-isolation --editable . --config-settings editable_mode=strict
}
