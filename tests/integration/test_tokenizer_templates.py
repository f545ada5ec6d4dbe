"""Chat templates as transformers renders them: the constructs that the models in use rely on."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from text.chat import ChatTemplate
from text.errors import TemplateError
from text.shield import ControlTexts

pytestmark = pytest.mark.integration

_CONTROLS = ControlTexts(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "[INST]", "[/INST]"])
_VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

# In the manner of Llama 3.1: defaults, dates, tools as indented JSON, slices, is-tests.
_DATED = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "Today: " + date_string + "\\n" + system_message + "<|eot|>" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {{- message['role'] + '\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif message.content is iterable and message.content is not mapping %}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'assistant' }}
{%- endif %}
"""

# In the manner of Qwen 3: macros, namespaces, reversed indices, string methods, reasoning cut from history.
_REASONING = """{%- macro shown(text) %}{{ text.split('</think>')[-1].lstrip('\\n') }}{%- endmacro %}
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}{% else %}{% set content = '' %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == "assistant" and loop.index0 < ns.last %}
        {{- shown(content) }}
    {%- else %}
        {{- content }}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) ~ '}' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{%- if enable_thinking is defined and enable_thinking is false %}{{ '\\n<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

# In the manner of Mistral: block tags on lines of their own, alternation enforced, loop controls.
_ALTERNATING = """{{ bos_token }}
{% for message in messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('roles must alternate user/assistant') }}
  {% endif %}
  {% if loop.index0 > 3 %}{% break %}{% endif %}
  {% if message['role'] == 'user' %}
    {{ '[INST] ' ~ message['content'] ~ ' [/INST]' }}
  {% else %}
    {% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
  {% endif %}
{% endfor %}
"""

_PARTS = [{"type": "text", "text": "two"}, {"type": "text", "text": "parts"}]
_CALLS = [{"type": "function", "function": {"name": "find", "arguments": {"q": "<é>", "n": [1, None, True]}}}]
_CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "  Hello, 世界 🙂  \n"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>x</think>\n\ntwo"},
        {"role": "user", "content": 'three < four > & "five" \''},
    ],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": _PARTS}],
    [{"role": "user", "content": "find it"}, {"role": "assistant", "content": None, "tool_calls": _CALLS}],
]
_TOOLS = [
    {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
]


def _theirs(source: str, chat: Sequence[dict[str, Any]], **options: Any) -> str:
    ((rendered,), _) = render_jinja_template(
        [list(chat)], chat_template=source, add_generation_prompt=True, **_VARIABLES, **options
    )
    return str(rendered)


@pytest.mark.parametrize(
    "source", [_DATED, _REASONING, _ALTERNATING], ids=["dated", "reasoning", "alternating"]
)
@pytest.mark.parametrize("chat", _CHATS, ids=range(len(_CHATS)))
@pytest.mark.parametrize("tools", [None, _TOOLS], ids=["no tools", "tools"])
def test_a_template_renders_as_in_transformers(source: str, chat: list[dict[str, Any]], tools: Any) -> None:
    template = ChatTemplate(source, _CONTROLS, _VARIABLES)
    options = {"enable_thinking": False}
    try:
        expected = _theirs(source, chat, tools=tools, **options)
    except (jinja2.TemplateError, TypeError):  # what the template refuses there must be refused here
        assert source is _ALTERNATING
        with pytest.raises(TemplateError):
            template.render(chat, tools=tools, options=options)
        return
    assert "".join(part.text for part in template.render(chat, tools=tools, options=options)) == expected


def test_the_date_is_that_of_the_clock_given() -> None:
    template = ChatTemplate(_DATED, _CONTROLS, _VARIABLES, now=lambda: datetime(2024, 7, 26))
    text = "".join(part.text for part in template.render(_CHATS[0]))
    assert "Today: 26 Jul 2024\n" in text
    dated = template.render(_CHATS[0], options={"date_string": "1 Jan"})
    assert "Today: 1 Jan\n" in "".join(part.text for part in dated)
