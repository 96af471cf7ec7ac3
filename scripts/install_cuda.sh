#!/usr/bin/env bash
# Build llama-cpp-python for the NVIDIA GPUs of this machine, and check that it offloads to them.
#
#   scripts/install_cuda.sh [ARCHITECTURES]
#
# ARCHITECTURES as CMake names them, such as 90 for an H100; without it, those of the GPUs that are present.
set -euo pipefail

fail() { printf 'install_cuda.sh: %s\n' "$1" >&2; exit 1; }

command -v python >/dev/null || fail 'no python: activate the environment that me-local is installed in'
if ! command -v nvidia-smi >/dev/null || ! nvidia-smi >/dev/null 2>&1; then
  [ $# -ge 1 ] || fail 'no NVIDIA driver answers (nvidia-smi). Install it, or name the architectures to build for another machine, such as 90'
  echo 'install_cuda.sh: no NVIDIA driver answers here, so the result cannot be tried' >&2
fi
nvcc=${CUDACXX:-$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || true)}
[ -n "$nvcc" ] || fail 'no nvcc: install the CUDA toolkit, and put its bin folder into PATH or its nvcc into CUDACXX'

architectures=${1:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | tr -d . | sort -u | paste -sd ';')}
echo "nvcc: $nvcc; architectures: $architectures"
export CUDACXX=$nvcc CMAKE_ARGS="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=$architectures ${CMAKE_ARGS:-}"
python -m pip install --upgrade --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python \
  'llama-cpp-python>=0.3.36,<0.4'

python - <<'CHECK' || fail 'it was built, but does not offload: is the driver at least as new as the toolkit?'
import sys
import llama_cpp
offloads = llama_cpp.llama_supports_gpu_offload()
print("offloads to the GPU:", bool(offloads))
sys.exit(0 if offloads else 1)
CHECK
