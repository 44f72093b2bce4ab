# Sourced by run_tests.sh, run_finetune.sh and run_retclip.sh: chooses the Python, and makes .venv when packages are missing.

# missing PYTHON FILE: prints the packages of a requirements file that PYTHON does not have; fails if PYTHON is unusable.
missing() {
    "$1" - "$2" 2>/dev/null <<'PYTHON'
import importlib.metadata, pathlib, re, sys

assert sys.version_info >= (3, 11)

def names(path):
    for line in path.read_text().splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["-r"]:
            yield from names(path.with_name(words[1]))
        elif words:
            yield re.split(r"[=<>!~;\[]", words[0])[0]

def absent(name):  # or too old to load weights of strangers
    try:
        version = importlib.metadata.version(name)
        return name == "torch" and tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 10)
    except importlib.metadata.PackageNotFoundError:
        return True

print(*[name for name in names(pathlib.Path(sys.argv[1])) if absent(name)])
PYTHON
}

# choose_python FILE: sets PYTHON to the active python, else that of .venv, whichever has all packages of FILE.
choose_python() {
    local candidate
    for candidate in python3 "$HERE/.venv/bin/python"; do
        if [[ $(missing "$candidate" "$1" || echo unusable) == "" ]]; then
            PYTHON=$candidate
            return
        fi
    done
    return 1
}

# set_up FILE: the same, and where neither has them, makes .venv and installs FILE. Once that is done, no network is used.
set_up() {
    choose_python "$1" && return
    local candidate venv=$HERE/.venv
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        for candidate in python3 python3.13 python3.12 python3.11 none; do
            "$candidate" -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null && break
        done
        if [[ $candidate == none ]]; then
            echo "error: no Python 3.11 or newer found (install one, or activate an environment that has it)" >&2
            exit 2
        fi
        echo "making $venv with $("$candidate" --version)"
        "$candidate" -m venv "$venv"
    fi
    echo "installing into $venv: $(missing "$venv/bin/python" "$1")"
    if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$1"; then
        echo "error: $1: could not be installed (this needs a network once; the same command goes on from here)" >&2
        exit 2
    fi
    PYTHON=$venv/bin/python
}
