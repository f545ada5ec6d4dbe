"""The generated code is what the protos give, and each rpc says how it may be called."""

import filecmp
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
CHECKED_IN = ROOT / "client" / "headrace" / "v1"


def test_the_checked_in_code_is_what_the_protos_give(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "protos" / "generate.py", tmp_path], check=True)
    fresh_dir = tmp_path / "headrace" / "v1"
    fresh = {path.name for path in fresh_dir.iterdir()}
    assert fresh == {path.name for path in CHECKED_IN.glob("*_pb2*")}
    _, stale, _ = filecmp.cmpfiles(fresh_dir, CHECKED_IN, fresh, shallow=False)
    assert stale == [], "run `make protos`"


def rpc_comments(descriptors: FileDescriptorSet) -> dict[str, str]:
    """Service.Method to the comment above it, for every rpc."""
    comments = {}
    for file in descriptors.file:
        located = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        for s, service in enumerate(file.service):
            for m, method in enumerate(service.method):
                # 6: FileDescriptorProto.service; 2: ServiceDescriptorProto.method.
                comments[f"{service.name}.{method.name}"] = located[(6, s, 2, m)]
    return comments


def test_every_rpc_says_what_it_changes_and_whether_it_may_be_repeated(tmp_path: Path) -> None:
    compiled = tmp_path / "descriptors.binpb"
    protos = ROOT / "protos"
    files = [str(path.relative_to(protos)) for path in sorted(protos.rglob("*.proto"))]
    compile_protos = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--proto_path={protos}",
        "--include_source_info",
    ]
    subprocess.run([*compile_protos, f"--descriptor_set_out={compiled}", *files], check=True)
    comments = rpc_comments(FileDescriptorSet.FromString(compiled.read_bytes()))
    assert {"Inference.Generate", "Cluster.Status", "KvTransfer.Commit", "Worker.Session"} <= comments.keys()
    silent = [
        rpc
        for rpc, comment in comments.items()
        if not (re.search("side effect|idempoten", comment, re.I) and re.search("retry", comment, re.I))
    ]
    assert silent == []
