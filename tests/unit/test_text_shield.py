"""What callers write never turns into a control token, wherever a template puts it."""

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from text.errors import TextInputError
from text.shield import ControlTexts, Shield

pytestmark = pytest.mark.unit

_CONTROLS = ControlTexts(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]"])
# For the search of counterexamples: short tokens of few characters, which any two texts may well join to.
_SHORT = ControlTexts(["<s>", "<ss>", "[<]"])
_TEXT = st.text(alphabet="<s>[] ", max_size=4)
_TRIM = st.sampled_from([str, str.strip, str.lstrip, str.rstrip])


@settings(max_examples=600, deadline=None)
@given(texts=st.lists(st.tuples(_TEXT, _TEXT), max_size=4), first=_TEXT, trim=_TRIM)
@example(texts=[("s", ">")], first="<", trim=str.strip)
def test_the_only_control_tokens_are_those_within_the_templates_own_text(
    texts: list[tuple[str, str]], first: str, trim: Callable[[str], str]
) -> None:
    """The template writes `first`, then each caller's text, trimmed, and a text of its own right after it."""
    shield = Shield(_SHORT)
    rendered = first + "".join(trim(shield.protect(text)) + own for text, own in texts)
    template_alone = first + "".join(("\0" if trim(text) else "") + own for text, own in texts)
    found = [part for part, is_control in shield.split(rendered) if is_control]
    assert found == _SHORT.pattern.findall(template_alone)


@settings(max_examples=300, deadline=None)
@given(text=_TEXT)
def test_what_is_protected_comes_back_unchanged(text: str) -> None:
    shield = Shield(_SHORT)
    assert shield.restore(shield.protect(text)) == text
    assert "".join(part for part, _ in shield.split("<s>" + shield.protect(text))) == "<s>" + text


@pytest.mark.parametrize("change", [str.upper, str.lower, str.title, str.swapcase])
def test_a_change_of_case_by_the_template_leaves_it_plain_text(change: Callable[[str], str]) -> None:
    shield = Shield(_CONTROLS)
    ((text, is_control),) = shield.split(change(shield.protect("1 <|im_end|> 2")))
    assert (text, is_control) == ("1 <|im_end|> 2", False)


def test_control_tokens_of_the_template_are_found_in_order() -> None:
    shield = Shield(_CONTROLS)
    rendered = "<|im_start|>user\n" + shield.protect("<|im_start|>") + "<|im_end|>"
    assert shield.split(rendered) == [
        ("<|im_start|>", True),
        ("user\n<|im_start|>", False),
        ("<|im_end|>", True),
    ]


def test_words_that_templates_compare_are_left_alone() -> None:
    message = {
        "role": "user",
        "type": "text",
        "content": [{"type": "text", "text": "hi"}],
        "n": 3,
        "ok": None,
    }
    assert Shield(_CONTROLS).protect(message) == message


def test_a_role_that_is_no_identifier_is_made_safe() -> None:
    assert "<|im_end|>" not in Shield(_CONTROLS).protect({"role": "<|im_end|>"})["role"]


def test_keys_are_made_safe_too() -> None:
    shield = Shield(_CONTROLS)
    (key,) = shield.protect({"<s>": 1})
    assert "<s>" not in key
    assert shield.restore(key) == "<s>"


def test_markers_differ_from_rendering_to_rendering() -> None:
    assert Shield(_CONTROLS).protect("<s>") != Shield(_CONTROLS).protect("<s>")


@pytest.mark.parametrize("value", [object(), {1: "a"}, {"a": b"bytes"}, [{"a": {1, 2}}]])
def test_only_json_values_are_taken(value: object) -> None:
    with pytest.raises(TextInputError, match="messages hold"):
        Shield(_CONTROLS).protect(value)


def test_deep_nesting_is_refused() -> None:
    value: list[object] = []
    for _ in range(100):
        value = [value]
    with pytest.raises(TextInputError, match="nested"):
        Shield(_CONTROLS).protect(value)
