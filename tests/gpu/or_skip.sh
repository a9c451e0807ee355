#!/usr/bin/env bash
# A test that wants a card: runs it where there is one, and says loudly that it did not where there is none.
#   or_skip.sh [--sm 9.0] COMMAND...   --sm: and that is of this compute capability
skip() { echo "SKIPPED: $1; nothing was tested: $2"; exit 77; }
wanted=
[ "$1" = --sm ] && wanted=$2 && shift 2
[ -e /dev/nvidiactl ] || skip "there is no NVIDIA device on this machine" "$*"
[ -z "$wanted" ] || [ "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)" = "$wanted" ] || skip "the device is not of compute capability $wanted" "$*"
exec "$@"
