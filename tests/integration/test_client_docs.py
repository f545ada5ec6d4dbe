"""The examples of docs/sdk.md run as they stand, but for the address."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.scripted_router import HELLO, ScriptedRouter, serve

pytestmark = pytest.mark.integration

PAGE = (Path(__file__).parents[2] / "docs" / "sdk.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    router = ScriptedRouter()
    server = serve(router)
    yield router
    server.stop(None).wait()


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(example: str, router: ScriptedRouter, capsys: pytest.CaptureFixture[str]) -> None:
    assert "127.0.0.1:8460" in example
    for _ in range(3):
        router.will(*HELLO)
    exec(compile(example.replace("127.0.0.1:8460", router.address), "docs/sdk.md", "exec"), {})
    assert "Hello" in capsys.readouterr().out


def test_the_page_has_examples() -> None:
    assert len(EXAMPLES) >= 5
