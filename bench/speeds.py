"""From seconds to the metrics of `headrace bench engine`, of ourselves and of every peer."""

from __future__ import annotations


def speeds(prefill_s: dict[int, float], step_s: dict[int, float]) -> dict[str, float]:
    """prefill_s: by number of tokens of a prompt. step_s: by number of answers that each get a token in a step."""
    found = {f"prefill_tok_s_{num_tokens}": num_tokens / taken_s for num_tokens, taken_s in prefill_s.items()}
    for num_streams, taken_s in step_s.items():
        if num_streams == 1:
            found["decode_ms_b1"] = 1e3 * taken_s
        else:
            found[f"out_tok_s_c{num_streams}"] = num_streams / taken_s
    return found
