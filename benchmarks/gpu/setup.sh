#!/usr/bin/env bash
# setup.sh PIECES SITE: make the environments of a GPU host from the pieces of pack.py, all in one folder.
#
# SITE/trainer/bin/python runs Sluice (this checkout), SITE/engine/bin/python SGLang and the router, SITE/trl/bin/python
# TRL. All see the host's own packages (torch, triton, transformers) behind theirs, and none sees another's.
set -euo pipefail
mkdir -p "$2"
pieces=$(cd "$1" && pwd) site=$(cd "$2" && pwd)
repository=$(cd "$(dirname "$0")/../.." && pwd)
host=$(python3 -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])')
for name in trainer engine trl; do
  python3 -m venv --without-pip "$site/$name"
  packages=$(echo "$site/$name"/lib/python3.*/site-packages)
  mkdir -p "$site/unpacked"
  ln -sfn "$packages" "$site/unpacked/$name"
  echo "import site; site.addsitedir('$host')" > "$packages/zz-host.pth"
done
echo "$repository/src" > "$site/unpacked/trainer/sluice.pth"
for archive in $(ls "$pieces" | sed -n 's/\.[0-9][0-9][0-9]$//p' | sort -u); do
  cat "$pieces/$archive".[0-9][0-9][0-9] | xz -T0 -dc | tar -C "$site/unpacked" --keep-directory-symlink -xf -
done
printf '#!%s\nfrom sluice.cli import main\n\nmain()\n' "$site/trainer/bin/python" > "$site/trainer/bin/sluice"
chmod +x "$site/trainer/bin/sluice"
"$site/trainer/bin/python" -c 'import sluice, torch, transformers; print("trainer", torch.__version__, transformers.__version__)'
if [ -d "$site/unpacked/trainer/megatron" ]; then
  "$site/trainer/bin/python" -c 'import megatron.core as core; print("megatron-core", core.__version__)'
fi
if [ -d "$site/unpacked/engine/sglang" ]; then
  "$site/engine/bin/python" -c 'import importlib.metadata as m, torch; print("engine", torch.__version__, m.version("sglang"), m.version("smg"))'
fi
