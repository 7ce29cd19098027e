#!/usr/bin/env bash
# Creates .venv-peers for Lightning and Ignite: they need none of our packages, and we need none of theirs.
set -euo pipefail
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ -x .venv-peers/bin/python ]] || "${PYTHON:-python3}" -m venv .venv-peers
.venv-peers/bin/python -m pip install --quiet 'torch>=2.4' 'torchvision>=0.19' 'numpy>=1.26' 'lightning>=2.4' 'pytorch-ignite>=0.5'
.venv-peers/bin/python -c 'import lightning, ignite, torch; print("Lightning", lightning.__version__, "Ignite", ignite.__version__, "torch", torch.__version__)'
