"""The client of `bench.link_cluster`: `python -m bench.link_client ADDRESS` prints each prompt's time to first token in
seconds, of all of them once, and then of all of them again."""

from __future__ import annotations

import sys
import time

from bench.link_cluster import prompts
from headrace import Client

WAIT_S = 60.0


def main() -> None:
    """Ask one after the other, behind a short prompt that is not counted."""
    with Client(sys.argv[1], timeout_s=300) as client:
        give_up_at = time.monotonic() + WAIT_S
        while len([worker for worker in client.status().workers if worker.connected]) < 2:
            if time.monotonic() > give_up_at:
                raise TimeoutError("the workers did not register")
            time.sleep(0.1)
        known = prompts()
        _ttft_s(client, list(reversed(known[0]))[:128])
        for prompt in (*known, *known):
            sys.stdout.write(f"{_ttft_s(client, prompt)}\n")


def _ttft_s(client: Client, prompt: list[int]) -> float:
    answer = client.generate(prompt, max_tokens=2, temperature=0.0, ignore_eos=True)
    answer.read()
    return answer.timing.ttft_s


if __name__ == "__main__":
    main()
