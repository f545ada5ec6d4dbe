"""A campaign's journal: what was written is read again; half a line, another campaign and other files are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.chaos_journal import Journal
from bench.chaos_plan import kinds_of, plan
from bench.chaos_round import RoundResult
from bench.chaos_verdict import Tally

pytestmark = pytest.mark.unit

CAMPAIGN = {"seed": 1, "faults": 16}


def result(number: int) -> RoundResult:
    return RoundResult(
        number, 100 + number, Tally(requests=5, lost_tokens=number), plan(number, kinds_of(number, 8)),
        recoveries_s={"kill_decode": [0.5, 1.25]}, ends={"FINISHED": 5}, problems=["r: lost"],
    )  # fmt: skip


def test_rounds_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, CAMPAIGN)
    journal.add(result(0))
    journal.add(result(2))
    assert Journal(path, CAMPAIGN).rounds == {0: result(0), 2: result(2)}


def test_half_a_line_is_dropped_and_the_next_round_follows_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, CAMPAIGN).add(result(0))
    with path.open("a") as file:
        file.write('{"number": 1, "se')
    again = Journal(path, CAMPAIGN)
    assert set(again.rounds) == {0}
    again.add(result(1))
    assert set(Journal(path, CAMPAIGN).rounds) == {0, 1}


def test_another_campaign_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, CAMPAIGN)
    with pytest.raises(ValueError, match="another campaign"):
        Journal(path, CAMPAIGN | {"seed": 2})


def test_another_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not mine\n")
    with pytest.raises(ValueError, match="is not a journal"):
        Journal(path, CAMPAIGN)
    assert path.read_text() == "not mine\n"


def test_without_a_path_nothing_is_kept() -> None:
    journal = Journal(None, CAMPAIGN)
    journal.add(result(0))
    assert set(journal.rounds) == {0}
