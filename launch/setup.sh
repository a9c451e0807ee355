#!/usr/bin/env bash
# Installs Debian packages that are missing: setup.sh SET..., with SET of build, quickstart, tests, check.
# MUONSHARD_SKIP_SETUP=1 leaves the machine as it is, for systems that have what is needed under other names.
set -euo pipefail

packages_of() {
    case $1 in
    build) echo gcc libc6-dev cmake make pkg-config libopenmpi-dev openmpi-bin libopenblas-dev libyaml-dev libjansson-dev libxxhash-dev ;;
    quickstart) echo gnuplot-nox perl-doc ;;
    tests) echo libcmocka-dev g++ binutils procps iproute2 gnuplot-nox ;;
    check) echo git clang libclang-rt-14-dev clang-format-14 valgrind cppcheck ;;
    *)
        echo "setup.sh: unknown set $1; there are build, quickstart, tests, check" >&2
        exit 2
        ;;
    esac
}

wanted=()
for set in "$@"; do
    list=$(packages_of "$set")
    # shellcheck disable=SC2206 # words they are
    wanted+=($list)
done
[ -z "${MUONSHARD_SKIP_SETUP-}" ] || exit 0
if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    echo "setup.sh: this is no Debian. Install what these Debian packages hold, then set MUONSHARD_SKIP_SETUP=1: ${wanted[*]}" >&2
    exit 1
fi

installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' | awk '$1 == "installed" { print $2 }')
missing=()
for package in "${wanted[@]}"; do
    grep -qxF "$package" <<<"$installed" || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "setup.sh: root, or sudo, is needed for: apt-get install ${missing[*]}" >&2
        exit 1
    fi
    as_root=(sudo)
fi
log=$(cd "$(dirname "$0")/.." && pwd)/build/setup.log
mkdir -p "${log%/*}"
echo "Installing ${#missing[@]} Debian packages (log: $log): ${missing[*]}"

apt() {
    echo "== apt-get $*" >>"$log"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y "$@" >>"$log" 2>&1 </dev/null
}
# A download that fails is tried once more, after the lists have been brought up to date again.
for attempt in 1 2; do
    apt update || true
    if apt install --no-install-recommends "${missing[@]}"; then
        exit 0
    fi
    [ $attempt -eq 2 ] || echo "setup.sh: apt-get install failed; once more"
done
echo "setup.sh: apt-get install failed; the end of $log:" >&2
tail -n 15 "$log" >&2
exit 1
