#!/usr/bin/env bash
# Build the null CUDA device: build.sh VENV; a venv without a CUDA build of torch gets one (5.5 GB).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$(realpath -m "$1")
top="$here/../.."
[ -d "$venv" ] || "${PYTHON:-python3}" -m venv "$venv"
if ! "$venv/bin/python" -c 'import torch, pytest_timeout; assert torch.version.cuda' 2> /dev/null; then
    # A prediction of what another version launches would be another number: pinned for the tests.
    grep -v -e '^torch==' -e '^descript' "$top/requirements.txt" > "$venv/requirements.txt"
    "$venv/bin/pip" install --quiet torch==2.14.1 -r "$venv/requirements.txt" pytest pytest-timeout
fi
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
triton="$packages/triton/backends/nvidia/include"
mkdir -p "$venv/null/lib"
cd "$venv/null"
g++ -O1 -shared -fPIC -I"$packages/nvidia/cu13/include" -I"$triton" \
    -o runtime.so "$here/runtime.cpp"
# All functions of the driver, also under the names that macros give them, but the ones written out.
comm -23 \
    <(grep -oE '\bcu[A-Z][A-Za-z0-9]+(_v[0-9])?\b' "$triton/cuda.h" | sort -u) \
    <(grep -oE '^int cu[A-Za-z0-9_]+' "$here/driver.cpp" | cut -c5- | sort -u) |
    sed 's/.*/IGNORED(&)/' > others.inc
g++ -O1 -w -shared -fPIC -Wl,-soname,libcuda.so.1 -I. -o lib/libcuda.so.1 "$here/driver.cpp"
ln -sf libcuda.so.1 lib/libcuda.so
