#!/usr/bin/env bash
# The equality suite and the decode benchmark on one CUDA device that both tiers share; under nine
# minutes. Uses the torch that is installed (a PyTorch image's, say) and installs the rest from wheels:
# where there is no network, `export PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR` names a folder that has them.
#
#   bash benchmarks/gpu.sh | tee gpu.txt
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" - <<'CHECK'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: torch {torch.__version__} sees no CUDA device here")
card = torch.cuda.get_device_properties(0)
print(f"{card.name}, {card.total_memory >> 30} GiB, torch {torch.__version__}, CUDA {torch.version.cuda}")
CHECK
lscpu | grep -E '^(Model name|CPU\(s\))' || true

"$python" -m venv --system-site-packages "$work/venv"
"$work/venv/bin/pip" install --quiet --editable . pytest pytest-asyncio pytest-timeout hypothesis psutil 'transformers>=5.23,<6'

echo "== equality with transformers, float32, both tiers on the card"
timeout 240 "$work/venv/bin/python" -m pytest -q tests/equivalence/test_layouts.py --device cuda

echo "== decode, one process and two tiers, tokens/s"
"$work/venv/bin/python" benchmarks/make_checkpoint.py "$work/comparison"
timeout 240 "$work/venv/bin/python" benchmarks/two_tiers.py "$work/comparison" --device cuda --batches 1,16,32 --rounds 3
