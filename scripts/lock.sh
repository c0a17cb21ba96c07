#!/usr/bin/env bash
# Makes requirements/cpu.lock from pyproject.toml: `make lock`.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
version=$(sed -n 's/^torch = "==\(.*\)"/\1/p' rayrlhf/launch/supported.toml)
.venv/bin/python -m pip download --quiet --no-deps --dest "$wheels" "torch==$version+cpu" ||
    .venv/bin/python -m pip download --quiet --no-deps --dest "$wheels" --index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu"
.venv/bin/uv pip compile pyproject.toml --extra cpu --extra dev \
    --override requirements/left_out.txt --find-links "$wheels" --no-emit-find-links --no-emit-index-url \
    --no-emit-package torch --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --custom-compile-command "make lock" --output-file requirements/cpu.lock "$@"
