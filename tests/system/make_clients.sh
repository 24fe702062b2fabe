#!/usr/bin/env bash
# make_clients.sh PYTHON: makes .venv-clients, with the programs of clients.txt. What they share with
# us (torch, transformers, numpy and so on) is found in .venv, where its versions are pinned.
set -euo pipefail
cd "$(dirname "$0")/../.."

"$1" -m venv .venv-clients
.venv-clients/bin/pip install --quiet --no-deps --requirement tests/system/clients.txt
shared=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$shared')" \
    > "$(.venv-clients/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
touch .venv-clients/.installed
