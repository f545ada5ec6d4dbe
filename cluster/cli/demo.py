"""`headrace demo`: a cluster up, two real prompts answered, their stages shown, all stopped."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.ask import show
from cluster.cli.console import LaunchProgress, out, stream
from cluster.cli.stages import stages_table
from cluster.errors import ClusterError
from cluster.launch import down, up
from cluster.profile import LoadedProfile
from cluster.profiles import find_profile
from headrace import Answer, Client, Message

ARTICLE = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "headrace.txt"
TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked, and what the screen shows of it."""

    name: str
    question: str
    content: str
    max_tokens: int


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(demo)


def demo(
    profile: Annotated[str, typer.Option(help="Which cluster to bring up.")] = "laptop",
) -> None:
    """Bring a cluster up, answer two prompts, show where the time went, stop it."""
    loaded = _on_a_free_port(find_profile(profile))
    prompts = demo_prompts()
    with LaunchProgress() as progress:
        state = up(loaded, progress=progress)
    try:
        with Client(state.routers, timeout_s=TIMEOUT_S) as client:
            answers = [(prompt.name, _answer(client, prompt)) for prompt in prompts]
        out.print(stages_table(answers))
    finally:
        with LaunchProgress() as progress:
            down(progress=progress)


def demo_prompts() -> tuple[Prompt, Prompt]:
    """A short question, and a summary of an article of about 2,000 tokens."""
    question = "Why is the sky blue? Answer in three sentences."
    task = "Summarize the article in five sentences."
    shown = f"{task} (The article is {ARTICLE.parent.name}/{ARTICLE.name}.)"
    article = ARTICLE.read_text(encoding="utf-8")
    return (
        Prompt("short prompt", question, question, max_tokens=128),
        Prompt("long prompt", shown, f"{article}\n\n{task}", max_tokens=128),
    )


def _on_a_free_port(loaded: LoadedProfile) -> LoadedProfile:
    """Nobody else needs to find the demo's router, and it should not fail because a port is taken."""
    router = loaded.profile.router.model_copy(update={"grpc": "127.0.0.1:0"})
    return dataclasses.replace(loaded, profile=loaded.profile.model_copy(update={"router": router}))


def _answer(client: Client, prompt: Prompt) -> Answer:
    """Stream one answer. Raises HeadraceError, or ClusterError for an answer without text."""
    out.print(f"\n[bold green]>[/bold green] [bold]{prompt.question}[/bold]", soft_wrap=True)
    # Greedy: everybody who tries the demo sees the same answer.
    answer = client.chat([Message("user", prompt.content)], max_tokens=prompt.max_tokens, temperature=0.0)
    show(answer)
    stream("\n\n")
    if not answer.text.strip():
        raise ClusterError(f"the answer to the {prompt.name} has no text")
    return answer
