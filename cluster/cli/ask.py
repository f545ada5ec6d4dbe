"""`headrace generate`, `chat`: one question, or a conversation, streamed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from cluster.cli.console import err, fail, out, stream
from cluster.errors import NotRunningError
from cluster.launch import running_cluster
from headrace import Answer, AnswerOptions, Client, HeadraceError, Message

ADDRESS_VARIABLE, KEY_VARIABLE = "HEADRACE_ADDRESS", "HEADRACE_API_KEY"

Address = Annotated[
    str, typer.Option(help="The router. Default: the cluster that is up here.", envvar=ADDRESS_VARIABLE)
]
ApiKey = Annotated[str, typer.Option(help="Sent as a bearer token.", envvar=KEY_VARIABLE)]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. Default 1.")]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the likeliest tokens that reach this probability.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(generate)
    app.command()(chat)


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from; - reads it from standard input.")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    stages: Annotated[bool, typer.Option("--stages", help="Show where the time went.")] = False,
    address: Address = "",
    api_key: ApiKey = "",
) -> None:
    """Continue a text, streaming what the model writes."""
    text = sys.stdin.read() if prompt == "-" else prompt
    options = AnswerOptions(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop or None
    )
    with connect(address, api_key) as client, client.generate(text, **options) as answer:
        show(answer)
        stream("\n")
        if stages:
            from cluster.cli.stages import stages_table

            err.print(stages_table([("request", answer)]))


def chat(
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    system: Annotated[str, typer.Option(help="What the model is told before the conversation.")] = "",
    address: Address = "",
    api_key: ApiKey = "",
) -> None:
    """Talk with the model. /reset forgets what was said, /exit ends; Ctrl-C ends an answer."""
    options = AnswerOptions(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with connect(address, api_key) as client:
        out.print("[dim]/reset forgets what was said, /exit ends, Ctrl-C ends an answer[/dim]")
        Conversation(client, options, system).run(_ask)


class Conversation:
    """Turns of a chat."""

    def __init__(self, client: Client, options: AnswerOptions, system: str = "") -> None:
        self._client = client
        self._options = options
        self._system = [Message("system", system)] if system else []
        self._turns = list(self._system)

    def reset(self) -> None:
        """Forget what was said."""
        self._turns = list(self._system)

    def run(self, ask: Callable[[], str | None]) -> None:
        """Answer what `ask` gives until it gives None or /exit."""
        while (line := ask()) is not None and line != "/exit":
            if line == "/reset":
                self.reset()
            elif line.startswith("/"):
                err.print("there is /reset and /exit")
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        turns = [*self._turns, Message("user", line)]
        try:
            with self._client.chat(turns, **self._options) as answer:
                try:
                    show(answer)
                except KeyboardInterrupt:
                    stream(" …")
                self._turns = [*turns, Message("assistant", answer.partial_text)]
        except HeadraceError as error:
            # A conversation outlives an answer that failed; what was asked is not kept.
            fail(str(error))
        stream("\n")


def connect(address: str, api_key: str) -> Client:
    """A client of the router at `address`, or of the cluster that is up here. Raises NotRunningError."""
    if not address:
        state = running_cluster()
        if not state.ready:
            raise NotRunningError(f"the cluster of profile {state.profile} is still starting")
        return Client(state.routers, api_key=api_key or None)
    return Client(address, api_key=api_key or None)


def show(answer: Answer) -> None:
    """Stream the answer's text."""
    for text in answer:
        stream(text)


def _ask() -> str | None:
    try:
        return out.input("[bold green]>[/bold green] ").strip()
    except (EOFError, KeyboardInterrupt):
        out.print()
        return None
