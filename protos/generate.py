"""Generates client/headrace/v1 from the protos beside this file.

    python protos/generate.py [OUTPUT_DIR=client]

What is generated is checked in, so that an installation needs no compiler; a test regenerates it
and compares. Import paths are those of the proto files, so nothing generated is rewritten.
"""

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path

PROTO_DIR = Path(__file__).resolve().parent
DEFAULT_OUTPUT_DIR = PROTO_DIR.parent / "client"


def generate(output_dir: Path) -> None:
    """Writes OUTPUT_DIR/headrace/v1/*_pb2{,_grpc}.py and .pyi, replacing what is there.

    Raises:
        subprocess.CalledProcessError: protoc refused a file; it has said why on stderr.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    protos = sorted(str(path.relative_to(PROTO_DIR)) for path in PROTO_DIR.rglob("*.proto"))
    # The plugin of this very environment: another one on PATH may be of another version.
    plugin = Path(sysconfig.get_path("scripts")) / "protoc-gen-mypy_grpc"
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTO_DIR}"),
            f"--plugin=protoc-gen-mypy_grpc={plugin}",
            f"--python_out={output_dir}",
            f"--pyi_out={output_dir}",
            f"--grpc_python_out={output_dir}",
            f"--mypy_grpc_out=quiet:{output_dir}",
            *protos,
        ],
        check=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate the Python code of the protos.")
    parser.add_argument("output_dir", nargs="?", type=Path, default=DEFAULT_OUTPUT_DIR)
    generate(parser.parse_args().output_dir.resolve())


if __name__ == "__main__":
    main()
