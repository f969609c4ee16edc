#!/bin/sh
# Everything that needs a GPU, in one command: see bench/gpu.py --help. PYTHON is one that has torch.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
