"""The command: exit codes, one-line errors, what each sub-command says without a cluster."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli import demo as demo_module
from cluster.cli import main
from cluster.cli.ask import Conversation
from cluster.errors import ClusterError, LaunchError
from cluster.local_ray import LocalRay
from cluster.state import ClusterState, run_directory, write_state
from headrace import HeadraceError, InvalidRequest

pytestmark = pytest.mark.unit

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HEADRACE_HOME with nothing in it."""
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    monkeypatch.delenv("HEADRACE_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call `headrace ARGUMENTS`: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["headrace", *arguments])
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return int(str(code or 0)), captured.out, captured.err

    return call


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


def state(**changes: object) -> ClusterState:
    facts: dict[str, object] = {
        "profile": "laptop",
        "router_address": "127.0.0.1:1",
        "cluster_secret": "00" * 32,
        "ray_address": "127.0.0.1:2",
        "local_ray": None,
        "ready": True,
    }
    return ClusterState(**(facts | changes))  # type: ignore[arg-type]


def test_without_a_command_the_help_lists_them(run: Run) -> None:
    code, out, err = run()
    assert code == 2
    for command in ("up", "down", "status", "generate", "chat", "model", "profile", "bench", "demo"):
        assert command in out + err


@pytest.mark.parametrize("command", ["up", "down", "status", "generate", "chat", "model", "profile", "demo"])
def test_every_command_has_help(run: Run, command: str) -> None:
    assert run(command, "--help")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["nope"],
        ["up"],
        ["status", "--nope"],
        ["generate", "x", "--max-tokens", "many"],
        ["drain"],
        ["drain", "decode-0", "--to", "serving"],
        ["drain", "decode-0", "--undo", "--timeout", "1"],
        ["drain", "decode-0", "--no-wait", "--timeout", "1"],
        ["restart"],
        ["restart", "decode-0", "--all"],
    ],
)
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str]) -> None:
    assert run(*arguments)[0] == 2


@pytest.mark.parametrize(
    "arguments", [["status"], ["generate", "hi"], ["chat"], ["drain", "decode-0"], ["restart", "--all"]]
)
def test_without_a_cluster_one_line_says_how_to_get_one(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err == "error: no cluster is up; start one with `headrace up PROFILE`\n"


def test_down_without_a_cluster_is_no_error(run: Run) -> None:
    assert run("down") == (0, "", "no cluster is up\n")


def test_a_cluster_that_ended_by_itself_is_told_from_one_that_is_up(run: Run, home: Path) -> None:
    ray = LocalRay(pid=2**22 + 1, started_s=0.0, address="127.0.0.1:2", temp_dir=str(home / "gone"))
    write_state(run_directory(), state(local_ray=ray))
    code, _, err = run("status")
    assert code == 1
    assert "ended without `headrace down`" in err


def test_a_stale_cluster_is_cleaned_up(run: Run, home: Path) -> None:
    ray = LocalRay(pid=2**22 + 1, started_s=0.0, address="127.0.0.1:2", temp_dir=str(home / "gone"))
    write_state(run_directory(), state(local_ray=ray))
    code, _, err = run("down")
    assert code == 0
    assert "stopped" in err
    assert run("down")[2] == "no cluster is up\n"


def test_the_state_file_is_for_its_owner_only(home: Path) -> None:
    write_state(run_directory(), state())
    assert (home / "run" / "cluster.json").stat().st_mode & 0o777 == 0o600


def test_a_state_file_that_cannot_be_read_says_which(run: Run, home: Path) -> None:
    (run_directory() / "cluster.json").write_text("{", encoding="utf-8")
    code, _, err = run("status")
    assert code == 1
    assert "cluster.json cannot be read" in err


def test_a_router_that_does_not_answer_is_named(run: Run) -> None:
    write_state(run_directory(), state())
    code, _, err = run("status")
    assert code == 1
    assert err.startswith("error: the router at 127.0.0.1:1 does not answer (UNAVAILABLE)")
    assert err.count("\n") == 1


def test_a_bad_profile_prints_each_problem_and_exits_with_2(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("version: 1\nname: x\nmodl: {path: a}\nprefill: {replicas: 0}\ndecode: {}\n")
    for command in (("profile", "check"), ("profile", "show"), ("up",)):
        code, out, err = run(*command, str(file))
        assert (code, out) == (2, "")
        assert [line.split()[1] for line in err.splitlines()] == [
            f"{file}:1:1:",
            f"{file}:3:1:",
            f"{file}:4:21:",
        ]


def test_a_model_that_is_not_prepared_names_its_place_before_anything_starts(
    run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("version: 1\nname: x\nmodel: {path: nosuchmodel}\ncolocated: {}\n")
    code, _, err = run("up", str(file))
    assert code == 2
    assert f"{file}:3:15: model.path: no model 'nosuchmodel'" in err
    assert not list((tmp_path / "run").glob("cluster.json"))


def test_check_says_that_a_profile_is_good(run: Run) -> None:
    code, out, _ = run("profile", "check", "laptop")
    assert code == 0
    assert out.endswith("laptop.yaml: good\n")


def test_show_prints_the_sources(run: Run) -> None:
    code, out, _ = run("profile", "show", "laptop")
    assert code == 0
    assert "# default" in out and "# derived: " in out and "laptop.yaml:2" in out


def test_the_schema_is_one_json_object(run: Run) -> None:
    code, out, _ = run("profile", "schema")
    assert code == 0
    assert json.loads(out)["title"] == "Headrace profile"


def test_an_empty_store_is_no_error(run: Run, home: Path) -> None:
    code, _, err = run("model", "list")
    assert code == 0
    assert str(home) in err


def test_prepare_if_missing_needs_the_name(run: Run) -> None:
    assert run("model", "prepare", "x.gguf", "--if-missing")[0] == 2


def test_preparing_what_is_not_there_is_one_clear_line(run: Run, tmp_path: Path) -> None:
    code, _, err = run("model", "prepare", str(tmp_path / "no.gguf"), "--name", "x")
    assert code == 1
    assert "no.gguf" in err and "Traceback" not in err


def test_an_unknown_benchmark_names_those_there_are(run: Run) -> None:
    code, _, err = run("bench", "isolatoin")
    assert code == 2
    known = importlib.util.find_spec("bench.isolation") is not None
    assert ("isolation" in err) is known


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ClusterError("it broke"), 1),
        (HeadraceError("it broke"), 1),
        (InvalidRequest("it broke"), 2),
        (RuntimeError("it broke"), 1),
    ],
)
def test_any_error_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    monkeypatch.setattr(demo_module, "up", raising(error))
    got, out, err = run("demo")
    assert (got, out) == (code, "")
    assert err.count("\n") == 1 and "it broke" in err


def test_a_worker_that_did_not_start_shows_the_end_of_its_log(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        demo_module, "up", raising(LaunchError("decode-0", "out of memory", ("line 1", "line 2")))
    )
    code, _, err = run("demo")
    assert code == 1
    assert err.splitlines() == ["error: decode-0 did not start: out of memory", "  line 1", "  line 2"]


def test_debugging_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_DEBUG", "1")
    monkeypatch.setattr(demo_module, "up", raising(RuntimeError("it broke")))
    with pytest.raises(RuntimeError, match="it broke"):
        run("demo")


class FakeAnswer:
    """An answer that says its last question back."""

    def __init__(self, text: str) -> None:
        self.partial_text = text

    def __iter__(self) -> "FakeAnswer":
        self._left = [self.partial_text]
        return self

    def __next__(self) -> str:
        if not self._left:
            raise StopIteration
        return self._left.pop()

    def __enter__(self) -> "FakeAnswer":
        return self

    def __exit__(self, *_: object) -> None:
        return None


class FakeClient:
    def __init__(self) -> None:
        self.asked: list[list[tuple[str, str]]] = []

    def chat(self, turns: list[object], **options: object) -> FakeAnswer:
        said = [(turn.role, turn.content) for turn in turns]  # type: ignore[attr-defined]
        self.asked.append(said)
        if said[-1][1] == "fail":
            raise HeadraceError("no room")
        return FakeAnswer(said[-1][1].upper())


def converse(*lines: str, system: str = "") -> FakeClient:
    client, script = FakeClient(), list(lines)
    Conversation(client, {}, system).run(lambda: script.pop(0) if script else None)  # type: ignore[arg-type]
    return client


def test_a_chat_remembers_what_was_said() -> None:
    assert converse("a", "b", "/exit", "c").asked == [
        [("user", "a")],
        [("user", "a"), ("assistant", "A"), ("user", "b")],
    ]


def test_reset_forgets_all_but_the_system_prompt() -> None:
    assert converse("a", "/reset", "", "b", system="s").asked == [
        [("system", "s"), ("user", "a")],
        [("system", "s"), ("user", "b")],
    ]


def test_a_chat_goes_on_after_an_answer_that_failed(capsys: pytest.CaptureFixture[str]) -> None:
    assert converse("fail", "a", "/nope").asked[-1] == [("user", "a")]
    assert "no room" in capsys.readouterr().err


def test_the_demo_asks_one_short_and_one_long_question() -> None:
    short, long = demo_module.demo_prompts()
    assert len(short.content.split()) < 30
    assert 1400 < len(long.content.split()) < 1900
