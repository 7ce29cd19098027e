#!/usr/bin/env bash
# The demo, run by `make demo`.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

case ${1:-} in
    -h | --help)
        cat <<'EOF'
usage: launch/demo.sh [section.key=value ...]

  launch/demo.sh run.epochs=3

Two ranks (one on a machine with a single GPU) train on Fashion-MNIST with a global batch of 8192 and
noise, as in configs/demo.yaml with the given settings changed; then the learning curve is drawn and the
report is written. Creates .venv and fetches the images if they are missing.

The environment variables of launch/local.sh and docker/environment.sh apply.
EOF
        exit 0
        ;;
    -*) echo "demo.sh: error: unknown option $1; see demo.sh --help" >&2 && exit 2 ;;
esac
python=$root/.venv/bin/python

docker/environment.sh
images=$(docker/fashion_mnist.sh)
settings=(configs/demo.yaml "data.root=$images" "$@")
ranks=$(
    "$python" - "$@" <<'EOF'
import sys

import torch

gpus = 0 if "run.device=cpu" in sys.argv else torch.cuda.device_count()
if torch.version.cuda is None:
    print(f"demo: torch {torch.__version__} is built for CPUs: training on the CPU", file=sys.stderr)
elif not torch.cuda.is_available():
    print("demo: no GPU found: training on the CPU", file=sys.stderr)
print(1 if gpus == 1 else 2)  # two ranks cannot share a GPU
EOF
)
launch/local.sh -np "$ranks" train "${settings[@]}"
run=$("$python" -m dist_train config run-directory "${settings[@]}")
picture=$("$python" -m dist_train curve "$run")
report=$("$python" -m dist_train report "$run")
accuracy=$("$python" -c '
import sys
from pathlib import Path
from dist_train.rundir.status import read_status
status = read_status(Path(sys.argv[1]) / "status.json")
best = status.best_accuracy if status else None
print("unknown" if best is None else f"{best:.2%}")' "$run")
printf 'demo: best test accuracy %s; the run is in %s, its learning curve is %s\n' "$accuracy" "$run" "$picture"
printf 'demo: open the report in a browser: %s\n' "$report"
