"""Regenerate moe_core/pb from proto/. Run as `make protos`; `--check` only compares.

Knows protoc's output and the one thing it gets wrong for us: protoc derives Python imports
from a .proto's path (`epserve/v1/…`), which would name the `epserve` package, while the
generated code lives under `moe_core.pb`. Knows nothing of what the messages mean.

The .proto files of others (proto/smg) name each other by their own paths, so they are a root of
their own: what they register under must be what their owner's own generated code does.
"""

import argparse
import filecmp
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "proto"
TARGET = ROOT / "moe_core" / "pb"
OURS = re.compile(r"^from epserve\.v1 import", re.MULTILINE)
SMG = re.compile(r"^import (common_pb2|vllm_engine_pb2) as", re.MULTILINE)


def generate(target: Path) -> None:
    """Write the generated package below `target`. Raises SystemExit if protoc fails."""
    for package in (target, target / "epserve", target / "epserve" / "v1", target / "smg"):
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
    _run_protoc(SOURCE, sorted((SOURCE / "epserve").rglob("*.proto")), target)
    _run_protoc(SOURCE / "smg", sorted((SOURCE / "smg").glob("*.proto")), target / "smg")
    for path in (*target.rglob("*.py"), *target.rglob("*.pyi")):
        code = OURS.sub("from moe_core.pb.epserve.v1 import", path.read_text())
        path.write_text(SMG.sub(r"from moe_core.pb.smg import \1 as", code))


def _run_protoc(root: Path, sources: Sequence[Path], target: Path) -> None:
    well_known = resources.files("grpc_tools") / "_proto"
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    status = protoc.main(["protoc", f"-I{root}", f"-I{well_known}", *outputs, *map(str, sources)])
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")


def stale_files(fresh: Path) -> list[str]:
    """Names below `fresh` or TARGET whose contents differ or that only one side has."""
    names = {
        str(path.relative_to(base))
        for base in (fresh, TARGET)
        for path in base.rglob("*.py*")
        if "__pycache__" not in path.parts
    }

    def same(name: str) -> bool:
        left, right = fresh / name, TARGET / name
        return left.exists() and right.exists() and filecmp.cmp(left, right, shallow=False)

    return sorted(name for name in names if not same(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare with proto/")
    if not parser.parse_args().check:
        generate(TARGET)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = stale_files(Path(folder))
    if stale:
        sys.exit(f"stale generated code, run `make protos`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
