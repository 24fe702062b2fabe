"""Regenerate moe_core/pb from proto/. Run as `make protos`; `--check` only compares.

Knows protoc's output and the one thing it gets wrong for us: protoc derives Python imports
from a .proto's path (`epserve/v1/…`), which would name the `epserve` package, while the
generated code lives under `moe_core.pb`. Knows nothing of what the messages mean.
"""

import argparse
import filecmp
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "proto"
TARGET = ROOT / "moe_core" / "pb"
IMPORT = re.compile(r"^from epserve\.v1 import", re.MULTILINE)


def generate(target: Path) -> None:
    """Write the generated package below `target`. Raises SystemExit if protoc fails."""
    well_known = resources.files("grpc_tools") / "_proto"
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    sources = sorted(str(path) for path in SOURCE.rglob("*.proto"))
    status = protoc.main(["protoc", f"-I{SOURCE}", f"-I{well_known}", *outputs, *sources])
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")
    for path in (*target.rglob("*.py"), *target.rglob("*.pyi")):
        path.write_text(IMPORT.sub("from moe_core.pb.epserve.v1 import", path.read_text()))
    for package in (target, target / "epserve", target / "epserve" / "v1"):
        (package / "__init__.py").touch()


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
