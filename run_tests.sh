#!/usr/bin/env bash
# Style check and tests; makes .venv the first time.
#   ./run_tests.sh                    # what a change must pass: under 15 minutes on 2 cores
#   ./run_tests.sh --all              # the slow matrices too
#   ./run_tests.sh -k resume          # anything else goes to pytest
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$HERE"
source ./setup.sh
set_up requirements-dev.txt

markers="not slow"
if [[ ${1:-} == --all ]]; then
    markers=""
    shift
fi
"$PYTHON" -m ruff check .
export OMP_NUM_THREADS=1 # one test process a core is faster than one process with two threads
exec "$PYTHON" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "$markers" "$@"
