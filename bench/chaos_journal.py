"""A campaign's rounds on disk, a line of JSON each, so that one that was cut off goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.chaos_plan import Fault, Kind
from bench.chaos_round import RoundResult
from bench.chaos_verdict import Tally


class Journal:
    """`campaign`: what must be equal for a file to be gone on with. Without a path nothing is kept."""

    def __init__(self, path: Path | None, campaign: dict[str, Any]) -> None:
        """Raises ValueError for a file of another campaign, or one that is no journal."""
        self.rounds: dict[int, RoundResult] = {}
        self._path = path
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            self._read(path, campaign)
        else:
            path.write_text(json.dumps({"campaign": campaign}) + "\n")

    def add(self, result: RoundResult) -> None:
        """A round that is over."""
        self.rounds[result.number] = result
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")

    def _read(self, path: Path, campaign: dict[str, Any]) -> None:
        # What was being written when the machine went down ends without a line's end, and is asked again.
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        try:
            head, *lines = map(json.loads, whole.splitlines())
            known = head["campaign"]
            rounds = [_from_plain(line) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a journal of `headrace bench chaos` ({error})") from None
        if known != campaign:
            raise ValueError(
                f"{path} is of another campaign: {known}, asked for {campaign}; name another file"
            )
        self.rounds = {each.number: each for each in rounds}
        path.write_text(whole)


def _from_plain(line: dict[str, Any]) -> RoundResult:
    faults = [Fault(**{**fault, "kind": Kind(fault["kind"])}) for fault in line["faults"]]
    return RoundResult(**{**line, "tally": Tally(**line["tally"]), "faults": faults})
