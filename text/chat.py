"""Chat messages to prompt text, in parts that are either ordinary text or a control token."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from text.errors import TemplateError, TextInputError
from text.sandbox import RenderLimits, SandboxedTemplate
from text.shield import ControlTexts, Shield

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
_PROBE = "reply"


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Rendered text. With `is_control`, exactly one control token that the template (not a caller) wrote."""

    text: str
    is_control: bool


class ChatTemplate:
    """A model's chat template.

    `variables` are what templates see besides the messages, such as bos_token. The clock is the calling
    thread's CPU time, so that a busy machine does not fail a good template.
    """

    def __init__(
        self,
        source: str,
        controls: ControlTexts,
        variables: Mapping[str, str],
        *,
        limits: RenderLimits | None = None,
        clock: Callable[[], float] = time.thread_time,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Raises TemplateError if `source` does not compile."""
        self._template = SandboxedTemplate(source, limits=limits or RenderLimits(), clock=clock, now=now)
        self._controls = controls
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[PromptPart]:
        """The prompt for `messages`, each with a "role" of ROLES and whatever the template reads.

        `options` are further template variables, such as enable_thinking. Raises TextInputError (the
        messages' form), TemplateError or TemplateLimitError.
        """
        _check_messages(messages)
        shield = Shield(self._controls)
        variables = {
            **{key: _option(value, shield) for key, value in (options or {}).items()},
            **self._variables,
            "messages": shield.protect(messages),
            "tools": shield.protect(tools) if tools is not None else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            rendered = self._template.render(variables)
        except TemplateError as error:
            raise type(error)(shield.restore(str(error))) from error
        return [PromptPart(text, is_control) for text, is_control in shield.split(rendered)]

    def end_of_turn(self) -> str | None:
        """The control token that follows an assistant's message, found by rendering one; None without any."""
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
        try:
            parts = self.render(messages, add_generation_prompt=False)
        except TemplateError:
            return None
        replied = False
        for part in parts:
            if replied:
                return part.text if part.is_control else None
            replied = not part.is_control and part.text.rstrip().endswith(_PROBE)
        return None


def _option(value: Any, shield: Shield) -> Any:
    """Template options are compared with literals in templates, so words pass as they are."""
    return value if isinstance(value, str) and value.isidentifier() else shield.protect(value)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise TextInputError("a chat needs a list of at least one message")
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise TextInputError(
                f"message {index} has the role {role!r}; known are {', '.join(sorted(ROLES))}"
            )
