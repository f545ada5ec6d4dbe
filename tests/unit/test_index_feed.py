"""The router's index comes to be what each worker holds, whatever is lost on the way, and says when it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.pool import BlockPool
from engine.scheduler import Scheduler, StepLimits
from headrace.v1 import worker_pb2
from kvtransfer.keys import root_key, tenant_secret
from router.core import index_feed
from router.core.assumed_keys import AssumedKeys
from router.core.fleet import WorkerRef
from router.core.index_feed import FeedState, IndexFeed, KeyScheme
from router.core.prefix_index import PrefixIndex
from router.prompt_keys import MAX_ROOTS, KeyRoots, PromptKeys
from worker.block_journal import BlockJournal

pytestmark = pytest.mark.unit

SCHEME = KeyScheme("model", 4)
ONE, TWO = WorkerRef("one", 11), WorkerRef("two", 22)


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") * 2


@dataclass
class Prompt:
    """Keys by number, in one scheme."""

    numbers: Sequence[int]
    scheme: KeyScheme = SCHEME

    def keys(self, scheme: KeyScheme) -> list[bytes]:
        return [key(number) for number in self.numbers] if scheme == self.scheme else []


class Worker:
    """A journal and its stream into a feed."""

    def __init__(self, feed: IndexFeed, ref: WorkerRef = ONE, now: float = 0.0, **bounds: int) -> None:
        self.feed, self.ref = feed, ref
        self.journal = BlockJournal(**bounds)
        self.stream = self.journal.open()
        self.slot = feed.joined(ref, SCHEME, now)

    def add(self, *numbers: int) -> None:
        for number in numbers:
            self.journal.named(key(number), 0)

    def evict(self, *numbers: int) -> None:
        for number in numbers:
            self.journal.forgotten(key(number), 0)

    def tell(self, now: float = 0.0) -> bool:
        """One message; whether the feed then asks for a snapshot."""
        return self.feed.take(self.ref, self.stream.next_message(), now)

    def lose(self) -> worker_pb2.BlockEvents:
        return self.stream.next_message()

    @property
    def state(self) -> FeedState | None:
        return self.feed.state_of(self.ref)


def test_a_feed_is_exact_from_its_first_snapshot_on() -> None:
    feed = IndexFeed()
    worker = Worker(feed)
    assert worker.state is FeedState.SNAPSHOT_AWAITED
    worker.add(1, 2)
    assert not worker.tell()
    worker.add(3)
    worker.evict(1)
    assert not worker.tell()
    assert worker.state is FeedState.EXACT
    assert feed.index.keys_of(worker.slot) == {key(2), key(3)}
    assert feed.counters.snapshots == 1


def test_slots_are_dense_and_used_again() -> None:
    feed = IndexFeed()
    first, second = Worker(feed, ONE), Worker(feed, TWO)
    assert (first.slot, second.slot) == (0, 1)
    first.add(1)
    first.tell()
    feed.assume(ONE, Prompt([1, 2]), 0.0)
    feed.left(ONE)
    feed.left(ONE)
    assert feed.slot_of(ONE) is None
    assert feed.match([key(1), key(2)], 0.0) == []
    newer = WorkerRef("one", 12)
    assert feed.joined(newer, SCHEME, 0.0) == 0
    assert feed.match([key(1)], 0.0) == []
    with pytest.raises(ValueError, match="already"):
        feed.joined(newer, SCHEME, 0.0)


def test_a_gap_is_repaired_by_a_snapshot_that_is_asked_for_at_once() -> None:
    feed = IndexFeed()
    worker = Worker(feed)
    worker.tell()
    worker.add(1)
    worker.lose()
    worker.add(2)
    assert worker.tell(1.0)
    assert worker.state is FeedState.STALE
    worker.stream.restart()
    assert not worker.tell(1.1)
    assert worker.state is FeedState.EXACT
    assert feed.index.keys_of(worker.slot) == {key(1), key(2)}
    assert (feed.counters.gaps, feed.counters.repairs, feed.counters.requests) == (1, 1, 1)


def test_a_lost_first_snapshot_is_asked_for_at_once_too() -> None:
    feed = IndexFeed()
    worker = Worker(feed)
    worker.lose()
    assert worker.tell(0.1)


def test_repeats_change_nothing() -> None:
    feed = IndexFeed()
    worker = Worker(feed)
    worker.tell()
    worker.add(1)
    message = worker.lose()
    for _ in range(3):
        assert not feed.take(ONE, message, 0.0)
    worker.evict(1)
    worker.tell()
    assert not feed.take(ONE, message, 0.0)
    assert feed.index.num_blocks(worker.slot) == 0
    assert worker.state is FeedState.EXACT


@pytest.mark.parametrize("damage", ["digest", "num_blocks", "keys"])
def test_drift_shows_in_the_figures(damage: str) -> None:
    feed = IndexFeed()
    worker = Worker(feed)
    worker.tell()
    worker.add(1)
    message = worker.lose()
    match damage:
        case "digest":
            message.digest ^= 1
        case "num_blocks":
            message.num_blocks += 1
        case "keys":
            message.changes[0].keys = key(2)
    assert feed.take(ONE, message, 0.0)
    assert worker.state is FeedState.STALE
    assert feed.counters.mismatches == 1


def test_a_snapshot_without_its_first_page_is_not_believed() -> None:
    feed = IndexFeed()
    worker = Worker(feed, max_keys_per_message=2)
    worker.add(*range(6))
    worker.lose()
    assert worker.tell()
    assert worker.state is FeedState.STALE
    worker.tell()
    assert worker.state is FeedState.STALE


def test_what_a_snapshot_lacks_goes_when_it_is_whole() -> None:
    feed = IndexFeed()
    worker = Worker(feed, max_keys_per_message=2)
    worker.add(*range(4))
    worker.tell()
    worker.tell()
    worker.evict(0)
    worker.add(7)
    worker.stream.restart()
    worker.tell()
    assert worker.state is FeedState.SNAPSHOT_AWAITED
    worker.tell()
    assert worker.state is FeedState.EXACT
    assert feed.index.keys_of(worker.slot) == {key(number) for number in (1, 2, 3, 7)}


def test_a_snapshot_that_is_asked_for_while_another_is_told_follows_it_at_once() -> None:
    """What came and went meanwhile is in the next one alone."""
    feed = IndexFeed()
    worker = Worker(feed, max_keys_per_message=3)
    worker.add(*range(4))
    worker.tell()
    worker.evict(0)
    worker.stream.restart()
    while worker.stream.has_more:
        worker.tell()
    assert worker.state is FeedState.EXACT
    assert feed.index.keys_of(worker.slot) == {key(number) for number in (1, 2, 3)}


@pytest.mark.parametrize("is_snapshot", [True, False])
def test_a_message_that_cannot_be_read_is_refused_and_shows_as_a_gap(is_snapshot: bool) -> None:
    feed = IndexFeed()
    worker = Worker(feed)
    worker.tell()
    change = worker_pb2.BlockChange(added=not is_snapshot, keys=key(1) if is_snapshot else b"short")
    with pytest.raises(ValueError, match="block events 2 of worker 'one'"):
        feed.take(ONE, worker_pb2.BlockEvents(number=2, is_snapshot=is_snapshot, changes=[change]), 0.0)
    worker.lose()
    assert worker.tell()
    assert feed.counters.gaps == 1


def test_reports_without_news_of_blocks_make_a_feed_stale() -> None:
    feed = IndexFeed()
    worker = Worker(feed)
    worker.tell()
    for _ in range(index_feed.MAX_SILENT_REPORTS):
        assert not feed.reported(ONE, 1.0)
    worker.tell(1.0)
    for _ in range(index_feed.MAX_SILENT_REPORTS):
        assert not feed.reported(ONE, 2.0)
    assert feed.reported(ONE, 2.0)
    assert worker.state is FeedState.STALE
    assert feed.counters.silences == 1


def test_snapshots_are_asked_for_ever_more_rarely_until_changes_agree_again() -> None:
    feed = IndexFeed()
    worker = Worker(feed)
    assert feed.due(index_feed.FIRST_SNAPSHOT_S - 0.1) == []
    asked_at = [now for now in range(5, 400) if feed.due(float(now))]
    waits = [later - earlier for earlier, later in pairwise(asked_at)]
    assert waits == sorted(waits)
    assert max(waits) == index_feed.MAX_RETRY_S
    worker.tell(400.0)
    worker.tell(400.1)  # it agrees
    worker.lose()
    assert not worker.tell(400.2)  # it was asked lately
    assert feed.due(460.0) == [ONE]
    worker.stream.restart()
    worker.tell(460.0)
    worker.tell(460.1)  # it agrees: the waits begin anew
    for _ in range(2):
        worker.lose()
        worker.tell(600.0)
    assert feed.due(600.0 + index_feed.MIN_RETRY_S) == [ONE]


def test_a_snapshot_under_way_is_not_asked_for_again() -> None:
    feed = IndexFeed()
    worker = Worker(feed, max_keys_per_message=1)
    worker.add(*range(20))
    for step in range(19):
        worker.tell(float(step))
        assert feed.due(float(step)) == []
    assert feed.due(18.0 + index_feed.FIRST_SNAPSHOT_S) == [ONE]


def test_a_worker_out_of_touch_is_not_asked_and_its_next_stream_begins_anew() -> None:
    feed = IndexFeed()
    worker = Worker(feed)
    worker.add(1)
    worker.tell()
    feed.out_of_touch(ONE)
    assert feed.due(50.0) == []
    assert feed.match([key(1)], 50.0) == [(1, 1)]
    worker.evict(1)
    worker.journal.close(worker.stream)
    worker.stream = worker.journal.open()
    feed.back(ONE, 50.0)
    worker.add(2)
    worker.tell(50.0)
    assert worker.state is FeedState.EXACT
    assert feed.match([key(1)], 50.0) == []
    assert feed.match([key(2)], 50.0) == [(1, 1)]


def test_what_was_last_known_of_a_stale_worker_is_forgotten_in_the_end() -> None:
    feed = IndexFeed()
    worker = Worker(feed)
    worker.add(1)
    worker.tell()
    worker.lose()
    worker.tell(1.0)
    feed.due(index_feed.FORGET_STALE_S - 1)
    assert feed.match([key(1)], 1.0) == [(1, 1)]
    feed.due(index_feed.FORGET_STALE_S + 1)
    assert feed.match([key(1)], 1.0) == []


def test_a_worker_that_names_no_keys_is_never_asked() -> None:
    feed = IndexFeed()
    assert feed.joined(ONE, None, 0.0) == 0
    feed.assume(ONE, Prompt([1]), 0.0)
    for _ in range(100):
        assert not feed.reported(ONE, 1.0)
    assert feed.due(1000.0) == []
    assert not feed.take(ONE, worker_pb2.BlockEvents(number=7), 0.0)
    assert feed.cached(Prompt([1]), 0.0) == []
    assert feed.state_of(ONE) is None


def test_strangers_change_nothing() -> None:
    feed = IndexFeed()
    for told in (feed.take(ONE, worker_pb2.BlockEvents(number=1), 0.0), feed.reported(ONE, 0.0)):
        assert not told
    feed.back(ONE, 0.0)
    feed.out_of_touch(ONE)
    feed.assume(ONE, Prompt([1]), 0.0)
    assert feed.match([key(1)], 0.0) == []


def test_a_worker_for_which_there_is_no_room_is_served_approximately() -> None:
    feed = IndexFeed(index=PrefixIndex(max_entries=3))
    small, large = Worker(feed, ONE), Worker(feed, TWO)
    small.add(1)
    small.tell()
    large.add(1, 2, 3)
    assert not large.tell(1.0)
    assert (small.state, large.state) == (FeedState.EXACT, FeedState.STALE)
    feed.assume(TWO, Prompt([1, 2]), 1.0)
    assert feed.match([key(1), key(2)], 1.0) == [(2, 2), (1, 1)]
    assert feed.due(30.0) == []
    assert feed.due(1.0 + index_feed.MAX_RETRY_S) == [TWO]
    assert feed.counters.refused_full == 1


# --- what is expected and what is assumed --------------------------------------------------------------------


def test_a_prompt_counts_on_the_worker_it_was_sent_to_before_that_speaks() -> None:
    feed = IndexFeed(expected_s=10.0)
    worker, _ = Worker(feed, ONE), Worker(feed, TWO)
    worker.add(1)
    worker.tell()
    feed.assume(ONE, Prompt([1, 2, 3]), 0.0)
    assert feed.cached(Prompt([1, 2, 3, 4]), 1.0) == [(1, 3 * SCHEME.block_tokens)]
    worker.add(2)
    worker.tell(2.0)
    assert feed.cached(Prompt([1, 2, 3]), 3.0) == [(1, 12)]
    assert feed.cached(Prompt([1, 2, 3]), 11.0) == [(1, 8)]  # the third never came


def test_what_was_expected_and_is_evicted_is_expected_no_longer() -> None:
    feed = IndexFeed()
    worker = Worker(feed)
    worker.tell()
    feed.assume(ONE, Prompt([1]), 0.0)
    worker.add(1)
    worker.tell()
    assert feed.match([key(1)], 0.0) == [(1, 1)]
    worker.evict(1)
    worker.tell()
    assert feed.match([key(1)], 0.0) == []


def test_what_is_assumed_of_a_worker_without_a_feed_lasts_until_it_has_one() -> None:
    feed = IndexFeed(expected_s=10.0)
    worker = Worker(feed)
    feed.assume(ONE, Prompt([1, 2]), 0.0)
    assert feed.match([key(1), key(2)], 1000.0) == [(1, 2)]
    worker.add(1)
    worker.tell(1000.0)
    assert feed.match([key(1), key(2)], 1000.0) == [(1, 1)]


def test_what_is_assumed_is_bounded_and_the_prompt_sent_longest_ago_goes_first() -> None:
    assumed = AssumedKeys(max_per_worker=4, max_entries=5)
    assumed.assume(0, [key(1), key(2)], 1.0)
    assumed.assume(0, [key(3), key(4)], 2.0)
    assumed.assume(0, [key(1), key(5)], 3.0)
    assert assumed.index.keys_of(0) == {key(1), key(3), key(4), key(5)}
    assumed.assume(1, [key(6), key(7)], 4.0)  # no room in all
    assert assumed.index.num_blocks(1) == 0
    assumed.expire(0, 3.0)
    assert assumed.index.keys_of(0) == {key(1), key(5)}
    assumed.assume(2, [key(number) for number in range(10, 30)], 5.0)
    assert assumed.index.num_blocks(2) == 0
    assumed.clear(0)
    assumed.assume(2, [key(number) for number in range(10, 30)], 5.0)
    assert assumed.index.keys_of(2) == {key(number) for number in range(10, 14)}


# --- figures -------------------------------------------------------------------------------------------------


def test_the_age_is_that_of_the_feed_that_was_silent_longest() -> None:
    feed = IndexFeed()
    first, second = Worker(feed, ONE), Worker(feed, TWO)
    assert feed.age_s(3.0) == 0.0
    first.tell(1.0)
    second.tell(2.0)
    assert feed.age_s(3.0) == 2.0
    feed.left(ONE)
    assert feed.age_s(3.0) == 1.0
    assert feed.num_feeds() == {FeedState.EXACT: 1}


def test_predictions_are_held_against_what_was_there() -> None:
    feed = IndexFeed()
    Worker(feed, ONE).tell()
    Worker(feed, TWO)
    assert feed.counters.false_hit_rate == 0.0
    for ref, predicted, actual in ((ONE, 8, 8), (ONE, 8, 4), (TWO, 8, 0), (TWO, 0, 4), (ONE, 4, 8)):
        feed.confirm(ref, predicted, actual)
    counters = feed.counters
    assert (counters.predictions, counters.false_hits, counters.false_exact_hits) == (4, 2, 1)
    assert (counters.missed_hits, counters.false_hit_rate) == (2, 0.5)
    assert (counters.predicted_tokens, counters.confirmed_tokens) == (28, 16)


# --- the keys of a prompt ------------------------------------------------------------------------------------

SECRET = b"a secret of this test's cluster"


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8, 9, 40])
def test_a_router_makes_the_keys_that_workers_look_up(num_tokens: int) -> None:
    scheduler = Scheduler(BlockPool(64, 8), StepLimits(64, 4, 0, 512))
    tokens = list(range(100, 100 + num_tokens))
    root = root_key("identity", "", tenant_secret(SECRET, "alice"))
    prompt = PromptKeys(KeyRoots(SECRET), "alice", tokens)
    assert prompt.keys(KeyScheme("identity", 8)) == scheduler.prefix_keys(root, tokens)


def test_keys_differ_by_tenant_identity_and_block_size() -> None:
    roots, tokens = KeyRoots(SECRET), list(range(33))
    made = [
        PromptKeys(roots, tenant, tokens).keys(KeyScheme(identity, size))[0]
        for tenant, identity, size in (("a", "i", 8), ("b", "i", 8), ("a", "j", 8), ("a", "i", 16))
    ]
    assert len(set(made)) == 4


def test_a_prompt_makes_its_keys_once_for_each_scheme() -> None:
    prompt = PromptKeys(KeyRoots(SECRET), "a", list(range(33)))
    assert prompt.keys(KeyScheme("i", 8)) is prompt.keys(KeyScheme("i", 8))


def test_roots_of_many_tenants_are_bounded() -> None:
    roots = KeyRoots(SECRET)
    first = roots.root("i", "0")
    for number in range(MAX_ROOTS + 10):
        roots.root("i", str(number))
    assert len(roots._roots) == MAX_ROOTS
    assert roots.root("i", "0") == first


def test_a_short_cluster_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="cluster secret"):
        KeyRoots(b"short")


# --- the whole way, over a bad one ---------------------------------------------------------------------------

NUMBERS = st.integers(0, 9)


class FeedMachine(RuleBasedStateMachine):
    """Two workers whose blocks come and go; messages and requests are lost, repeated, reordered and damaged.

    Whenever a feed calls itself EXACT after a message, it holds what its worker held when that was written; and once
    nothing is lost any more, it becomes EXACT and equal to the worker.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.feed = IndexFeed()
        bounds = {"max_keys_per_message": 3, "max_collected": 6}
        self.workers = [Worker(self.feed, ref, **bounds) for ref in (ONE, TWO)]
        self.blocks: list[set[int]] = [set(), set()]
        self.wires: list[list[tuple[worker_pb2.BlockEvents, set[bytes] | None]]] = [[], []]
        self.asked = [0, 0]

    @rule(who=st.integers(0, 1), number=NUMBERS)
    def toggle(self, who: int, number: int) -> None:
        if number in self.blocks[who]:
            self.workers[who].evict(number)
        else:
            self.workers[who].add(number)
        self.blocks[who] ^= {number}

    @rule(who=st.integers(0, 1))
    def write(self, who: int) -> None:
        stream = self.workers[who].stream
        message = stream.next_message()
        whole = None if stream.has_more or message.continues else {key(n) for n in self.blocks[who]}
        self.wires[who].append((message, whole))

    @rule(who=st.integers(0, 1), data=st.data(), again=st.booleans())
    def deliver(self, who: int, data: st.DataObject, again: bool) -> None:
        """Mostly the oldest message; now and then another one, or one that stays to come again."""
        if self.wires[who]:
            at = data.draw(st.sampled_from([0, 0, 0, 0, len(self.wires[who]) - 1]))
            self._take(who, at, keep=again and data.draw(st.booleans()))

    def _take(self, who: int, at: int, keep: bool = False) -> None:
        message, whole = self.wires[who][at] if keep else self.wires[who].pop(at)
        worker = self.workers[who]
        is_news = message.number >= self.feed._feeds[worker.ref].next_number
        self.asked[who] += self.feed.take(worker.ref, message, self.now)
        if is_news and whole is not None and worker.state is FeedState.EXACT:
            assert self.feed.index.keys_of(worker.slot) == whole

    @precondition(lambda self: any(self.wires))
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        wire = data.draw(st.sampled_from([wire for wire in self.wires if wire]))
        wire.pop(data.draw(st.integers(0, len(wire) - 1)))

    @precondition(lambda self: any(self.wires))
    @rule(data=st.data(), number=NUMBERS)
    def damage(self, data: st.DataObject, number: int) -> None:
        wire = data.draw(st.sampled_from([wire for wire in self.wires if wire]))
        message, _ = wire[data.draw(st.integers(0, len(wire) - 1))]
        if message.changes and message.changes[0].keys[:16] != key(number):
            message.changes[0].keys = key(number) + message.changes[0].keys[16:]

    @rule(who=st.integers(0, 1), heard=st.booleans())
    def answer(self, who: int, heard: bool) -> None:
        if self.asked[who]:
            self.asked[who] -= 1
            if heard:
                self.workers[who].stream.restart()

    @rule(who=st.integers(0, 1))
    def reconnect(self, who: int) -> None:
        worker = self.workers[who]
        self.feed.out_of_touch(worker.ref)
        worker.journal.close(worker.stream)
        worker.stream = worker.journal.open()
        self.wires[who].clear()
        self.asked[who] = 0
        self.feed.back(worker.ref, self.now)

    @rule(who=st.integers(0, 1), numbers=st.lists(NUMBERS, max_size=4))
    def place(self, who: int, numbers: list[int]) -> None:
        self.feed.assume(self.workers[who].ref, Prompt(numbers), self.now)

    @rule(seconds=st.floats(0.1, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for ref in self.feed.due(self.now):
            self.asked[ref is TWO] += 1

    @invariant()
    def counts_agree(self) -> None:
        held = [self.feed.index.num_blocks(worker.slot) for worker in self.workers]
        assert self.feed.index.num_entries == sum(held)

    def teardown(self) -> None:
        for _ in range(30):
            self.wait(index_feed.MAX_RETRY_S)
            for who, worker in enumerate(self.workers):
                while self.wires[who]:
                    self._take(who, 0)
                if self.asked[who]:
                    worker.stream.restart()
                    self.asked[who] = 0
                self.write(who)
                while worker.stream.has_more:
                    self.write(who)
                while self.wires[who]:
                    self._take(who, 0)
        prompt = [key(number) for number in range(10)]
        for who, worker in enumerate(self.workers):
            assert worker.state is FeedState.EXACT
            assert self.feed.index.keys_of(worker.slot) == {key(number) for number in self.blocks[who]}
        expected: dict[int, int] = {}
        for who, worker in enumerate(self.workers):
            count = next((number for number in range(10) if number not in self.blocks[who]), 10)
            if count:
                expected[count] = expected.get(count, 0) | 1 << worker.slot
        assert {count: mask for mask, count in self.feed.match(prompt, self.now)} == expected


TestFeedMachine = FeedMachine.TestCase
TestFeedMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
