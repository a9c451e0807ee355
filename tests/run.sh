#!/usr/bin/env bash
# Installs what the tests need, builds, and runs every test: tests/run.sh [ARGUMENT OF CTEST...]
# The exit code is 0 only when all of them passed.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "== Packages"
launch/setup.sh build tests
echo "== Build (log: build/tests.log)"
mkdir -p build
if ! { cmake --preset tests && cmake --build --preset tests -j "$(nproc)"; } >build/tests.log 2>&1; then
    tail -n 40 build/tests.log >&2
    exit 1
fi
echo "== Tests"
ctest --preset tests "$@"
