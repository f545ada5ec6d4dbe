"""The store itself: whole models or none, names, and what a source may be."""

import itertools
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from cluster.model_store import (
    InvalidModelNameError,
    ModelNotFoundError,
    ModelSourceError,
    ModelStoreError,
    list_models,
    prepare,
    read_manifest,
    resolve,
    store_root,
)
from cluster.model_store.staging import staged
from tests.tiny_gguf import random_tensors, write_gguf

pytestmark = pytest.mark.integration


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "Tiny Model.F32.gguf", {**random_tensors()})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_preparing_is_deterministic_and_writes_the_files_that_workers_open(source: Path, root: Path) -> None:
    first = _files(prepare(str(source), name="tiny", root=root))
    assert first.keys() == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "headrace.json",
    }
    assert _files(prepare(str(source), name="tiny", root=root)) == first


def test_the_digest_of_the_weights_tells_weights_and_configurations_apart(tmp_path: Path, root: Path) -> None:
    tensors = random_tensors()
    files = {
        "plain": write_gguf(tmp_path / "plain.gguf", {**tensors}),
        "theta": write_gguf(tmp_path / "theta.gguf", {**tensors}, metadata={"llama.rope.freq_base": 5e5}),
    }
    tensors["blk.0.ffn_up.weight"][0, 0] += 1
    files["weight"] = write_gguf(tmp_path / "weight.gguf", {**tensors})
    manifests = [read_manifest(prepare(str(path), name=name, root=root)) for name, path in files.items()]
    assert len({manifest.weights_digest for manifest in manifests}) == 3
    assert len({manifest.tokenizer_digest for manifest in manifests}) == 1


def test_the_name_comes_from_the_source_if_none_is_given(source: Path, root: Path) -> None:
    directory = prepare(str(source), name=None, root=root)
    assert directory == root / "models" / "tiny-model.f32"
    assert read_manifest(directory).name == "tiny-model.f32"


@pytest.mark.parametrize("name", ["", ".hidden", "Upper", "a/b", "..", "a b", "a" * 101])
def test_a_name_that_is_no_directory_name_is_refused_before_anything_is_read(name: str, root: Path) -> None:
    with pytest.raises(InvalidModelNameError, match="cannot be a model's name"):
        prepare("/nowhere", name=name, root=root)


def test_progress_rises_through_the_stages_to_the_end(source: Path, root: Path) -> None:
    seen: list[tuple[str, float]] = []
    prepare(str(source), name="tiny", root=root, progress=lambda stage, done: seen.append((stage, done)))
    stages = {
        stage: [done for _, done in calls] for stage, calls in itertools.groupby(seen, lambda call: call[0])
    }
    assert list(stages) == ["reading", "weights", "tokenizer"]
    for fractions in stages.values():
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0


def test_a_failure_leaves_the_model_that_was_there_and_nothing_else(source: Path, root: Path) -> None:
    before = _files(prepare(str(source), name="tiny", root=root))
    tensors = random_tensors()
    tensors["output.weight"][-1, -1] = float("nan")
    broken = write_gguf(source.with_name("broken.gguf"), {**tensors})
    with pytest.raises(ModelSourceError):
        prepare(str(broken), name="tiny", root=root)
    assert _files(root / "models" / "tiny") == before
    assert [path.name for path in (root / "models").iterdir()] == ["tiny"]


def test_a_new_model_replaces_the_old_one_whose_readers_keep_their_files(source: Path, root: Path) -> None:
    weights = prepare(str(source), name="tiny", root=root) / "model.safetensors"
    before = weights.read_bytes()
    other = write_gguf(source.with_name("other.gguf"), {**random_tensors(seed=1)})
    with weights.open("rb") as reader:
        prepare(str(other), name="tiny", root=root)
        assert reader.read() == before
    assert weights.read_bytes() != before


def test_a_full_disk_is_reported_before_anything_is_written(
    source: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(source)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ModelStoreError, match=r"GB are needed, .* free"):
        prepare(str(source), name="tiny", root=root)


def test_a_store_that_cannot_be_written_is_reported(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelStoreError, match="cannot be written"):
        prepare(str(source), name="tiny", root=tmp_path / "file")


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(root: Path) -> None:
    target = root / "models" / "tiny"
    with staged(target) as living:
        abandoned = root / "models" / ".staging-tiny-0"
        abandoned.mkdir()
        (abandoned / ".lock").touch()
        (living / "file").write_text("new")
        with staged(root / "models" / "other"):
            assert not abandoned.exists()
            assert living.exists()
    assert (target / "file").read_text() == "new"
    assert sorted(path.name for path in (root / "models").iterdir()) == ["other", "tiny"]


def test_a_staged_directory_disappears_when_its_block_fails(root: Path) -> None:
    with pytest.raises(KeyError), staged(root / "models" / "tiny") as directory:
        (directory / "file").write_text("half")
        raise KeyError
    assert list((root / "models").iterdir()) == []


def test_an_installed_package_that_carries_a_gguf_file_is_a_source(
    source: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(source.parent / "site", source, monkeypatch)
    directory = prepare("tiny-carrier", name=None, root=root)
    assert directory.name == "weights"
    assert read_manifest(directory).source == "GGUF file weights.gguf"


def _install(site: Path, source: Path, monkeypatch: pytest.MonkeyPatch, *, files: int = 1) -> None:
    """A distribution as an installer leaves it, with `files` copies of the GGUF file in it."""
    info = site / "tiny_carrier-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n")
    names = ["tiny_carrier/weights.gguf", "tiny_carrier/more.gguf"][:files]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in [*names, "tiny_carrier/__init__.py"]))
    (site / "tiny_carrier").mkdir()
    for name in names:
        shutil.copy(source, site / name)
    monkeypatch.syspath_prepend(site)
    assert metadata.distribution("tiny-carrier").version == "1.0"


@pytest.mark.parametrize(("files", "reason"), [(0, "no GGUF file"), (2, "2 GGUF files")])
def test_a_package_without_exactly_one_gguf_file_is_refused(
    files: int, reason: str, source: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(source.parent / "site", source, monkeypatch, files=files)
    with pytest.raises(ModelSourceError, match=rf"tiny-carrier: .*{reason}"):
        prepare("tiny-carrier", name=None, root=root)


@pytest.mark.parametrize("name", ["no-such-package-anywhere", "/no/such/file.gguf", ""])
def test_a_source_that_is_nothing_says_what_it_could_be(name: str, root: Path) -> None:
    with pytest.raises(
        ModelSourceError, match="neither a file, nor a directory, nor an installed Python package"
    ):
        prepare(name, name="tiny", root=root)


def test_another_kind_of_file_is_refused(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelSourceError, match="not a GGUF file: it starts with"):
        prepare(str(path), name="tiny", root=root)


def test_a_prepared_model_is_found_by_name_and_by_path(source: Path, root: Path) -> None:
    directory = prepare(str(source), name="tiny", root=root)
    assert resolve("tiny", root) == directory
    assert resolve(str(directory)) == directory
    assert [manifest.name for manifest in list_models(root)] == ["tiny"]


def test_an_unknown_model_gives_the_nearest_name_and_the_command_to_make_it(source: Path, root: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there are: none"):
        resolve("tinny", root)
    prepare(str(source), name="tiny", root=root)
    with pytest.raises(
        ModelNotFoundError, match=r"did you mean 'tiny'\?.*headrace model prepare SOURCE --name tinny"
    ):
        resolve("tinny", root)


def test_a_path_that_is_no_prepared_model_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no prepared model"):
        resolve(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="a file, not a prepared model"):
        resolve(str(source))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(format=2),
        lambda content: content.pop("weights_digest"),
        lambda content: content.update(eos_token_ids=3),
    ],
)
def test_a_manifest_that_is_not_of_this_format_is_refused(change: Any, source: Path, root: Path) -> None:
    path = prepare(str(source), name="tiny", root=root) / "headrace.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ModelStoreError, match="prepare the model again"):
        resolve("tiny", root)
    assert list_models(root) == []


def test_the_store_is_where_headrace_home_says(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "elsewhere"))
    assert prepare(str(source), name="tiny") == tmp_path / "elsewhere" / "models" / "tiny"
    monkeypatch.delenv("HEADRACE_HOME")
    assert store_root() == Path.home() / ".cache" / "headrace"
