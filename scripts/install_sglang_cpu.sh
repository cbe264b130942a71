#!/usr/bin/env bash
# Install the CPU build of the SGLang engine into an environment of its own, from requirements/sglang-cpu.lock.
#
#   scripts/install_sglang_cpu.sh [FOLDER]
#
# FOLDER defaults to $SLUICE_HOME/engines/sglang-cpu, SLUICE_HOME to ~/.cache/sluice. About 1.6 GB with a CPU
# wheel of torch; set PIP_INDEX_URL or PIP_FIND_LINKS if your default index offers only the CUDA build (7 GB).
# PYTHON names the interpreter, python3.11 by default: the lock holds for that version on Linux.
#
# A second run with the same lock returns at once. A changed lock, or a run that was cut short, installs afresh.
# The folder is wiped then, so one that this script did not make is refused.
set -euo pipefail

lock="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/requirements/sglang-cpu.lock"
target="${1:-${SLUICE_HOME:-$HOME/.cache/sluice}/engines/sglang-cpu}"
python="${PYTHON:-python3.11}"
marker="$target/.sluice-engine"  # ours; holds the hash of the lock once the installation is complete

fail() {
  printf 'install_sglang_cpu: %s\n  → %s\n' "$1" "$2" >&2
  exit 1
}

[ -r "$lock" ] || fail "there is no lock at $lock" "run the script from a checkout of Sluice"
version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" ||
  fail "cannot run $python" "install Python 3.11, or name one: PYTHON=/path/to/python3.11 $0"
[ "$version" = 3.11 ] || fail "$python is Python $version, the lock is for 3.11" "PYTHON=/path/to/python3.11 $0"

if [ -e "$target" ] && [ ! -f "$marker" ] && [ -n "$(ls -A "$target")" ]; then
  fail "$target exists and was not made by this script" "choose another folder, or remove it yourself"
fi

hash="$(sha256sum "$lock" | cut -d' ' -f1)"
mkdir -p "$(dirname "$target")"
exec 9>"$target.lock"  # two runs at once: the second waits, then finds the work done
flock --wait 1800 9 || fail "another installation into $target has run for 30 minutes" "end it, then run this again"

if [ -f "$marker" ] && [ "$(cat "$marker")" = "$hash" ]; then
  echo "install_sglang_cpu: $target is up to date"
  exit 0
fi
echo "install_sglang_cpu: installing into $target"
rm -rf "$target"
mkdir -p "$target"
: >"$marker"
log="$target/install.log"

step() {
  "$@" >>"$log" 2>&1 || {
    tail -n 20 "$log" >&2
    fail "'$*' failed; the whole output is in $log" "check the network and the free disk (3 GB), then run this again"
  }
}

step "$python" -m venv "$target"
pip=("$target/bin/python" -m pip install --no-input --disable-pip-version-check)
# torch brings its own dependencies, at the locked versions. The rest comes without: SGLang declares CUDA
# packages (flashinfer, cutlass, nvshmem and others, 10 GB) that cannot be installed, or used, on a CPU.
step "${pip[@]}" --constraint "$lock" torch
step "${pip[@]}" --no-deps --requirement "$lock"
step "$target/bin/python" -c 'import torch, transformers'

printf '%s' "$hash" >"$marker"
echo "install_sglang_cpu: done; the interpreter is $target/bin/python"
