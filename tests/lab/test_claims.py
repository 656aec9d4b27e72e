"""Claims by files alone: exactly one of many gets each, a dead worker's is taken over by one, and a slow one finds out in time."""

import errno
import json
import os
import subprocess
import sys
import tempfile
import threading

import pytest

from llm_jax.core.config import ConfigError
from llm_jax.io.shared import Shared
from llm_jax.lab import claims
from llm_jax.lab.claims import Crew, Lapsed

LEASE = 3600.0  # no thread gives a sign of life within a test: `beat` does


class Clock:
    """A machine's own: it starts anywhere and may run fast."""

    def __init__(self, start=0.0, rate=1.0):
        self.start, self.rate, self.true = start, rate, 0.0

    def __call__(self):
        return self.start + self.rate * self.true


@pytest.fixture(params=["local", "bucket"])
def place(request, tmp_path) -> str:
    return str(tmp_path / "shared") if request.param == "local" else request.getfixturevalue("bucket") + "/shared"


def crew(place, *, lease=LEASE, clock=None, **given) -> Crew:
    return Crew(Shared(place), lease=lease, clock=clock or Clock(), **given)


def newest(worker: Crew, name: str):
    found = worker.claims().get(name)
    return found and worker.told(found)


def die(worker: Crew) -> None:
    """As after kill -9: no further sign, and nothing said."""
    worker.files = Shared(tempfile.mkdtemp())


PREEMPTED = """
import signal
import sys
from llm_jax.io.shared import Shared
from llm_jax.lab.claims import Crew
from llm_jax.train.interruption import interruptions
with interruptions(leaves=True), Crew(Shared(sys.argv[1]), lease=3600.0) as one:
    assert one.claim("group", None)
    signal.raise_signal(signal.SIGTERM)
"""


def test_what_a_preempted_worker_had_claimed_is_free_at_once(tmp_path):
    subprocess.run([sys.executable, "-c", PREEMPTED, str(tmp_path)], check=True, timeout=60)
    with crew(tmp_path) as other:
        other.signs.look()
        assert other.claim("group", newest(other, "group")).generation == 2


RACE = """
import sys
import tempfile
from llm_jax.io.shared import Shared
files, me = Shared(sys.argv[1]), sys.argv[2]
print(*(n for n in range(COUNT) if files.create(f"claims/{n}.1.json", {"worker": me})))
"""


@pytest.mark.parametrize("kind", ["local", pytest.param("bucket", marks=pytest.mark.slow)])
def test_of_many_processes_exactly_one_gets_each_claim(tmp_path, kind, request):
    where, count = (str(tmp_path), 150) if kind == "local" else (request.getfixturevalue("bucket"), 40)
    race = [sys.executable, "-c", RACE.replace("COUNT", str(count)), where]
    racing = [subprocess.Popen([*race, str(i)], stdout=subprocess.PIPE) for i in range(4)]
    won = [[int(n) for n in process.communicate(timeout=120)[0].split()] for process in racing]
    assert sorted(n for own in won for n in own) == list(range(count))
    files = Shared(where)
    assert all(files.read(f"claims/{n}.1.json") == {"worker": str(i)} for i, own in enumerate(won) for n in own)
    if kind == "local":
        assert not [f for f in os.listdir(tmp_path / "claims") if f.startswith(".")]


def test_of_many_threads_exactly_one_takes_over(tmp_path):
    with crew(tmp_path) as one:
        held = one.claim("group", None)
    workers = [crew(tmp_path) for _ in range(8)]
    for worker in workers:
        worker.__enter__()
    last, found, start = newest(workers[0], "group"), [], threading.Barrier(8)
    assert last == held

    def race(worker):
        start.wait()
        found.append(worker.claim("group", last))

    threads = [threading.Thread(target=race, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [c.generation for c in found if c is not None] == [2] and len(found) == 8
    for worker in workers:
        worker.__exit__()


def test_what_a_living_worker_has_is_nobody_elses(place):
    with crew(place) as one, crew(place) as two:
        assert one.claim("a", None).generation == 1
        for _ in range(3):
            one.beat()
            two.beat()
            assert two.claim("a", newest(two, "a")) is None and two.claim("a", None) is None
        assert two.claim("b", None) is not None
        one.confirm()


@pytest.mark.parametrize("start, rate", [(0.0, 1.0), (1e9, 1.0), (-1e6, 1.2), (5.0, 0.85)])
def test_a_dead_workers_claim_is_taken_over_after_a_lease_of_the_observers_clock_and_not_before(place, start, rate):
    """The owner gives up first, also where the clocks of the two run at different speeds from different starts."""
    mine, theirs = Clock(), Clock(start, rate)
    with crew(place, clock=mine) as one, crew(place, clock=theirs) as two:
        one.claim("a", None)
        two.beat()
        die(one)
        gave_up = took_over = None
        for second in range(0, int(1.4 * LEASE), 100):
            mine.true = theirs.true = float(second)
            two.beat()
            if took_over is None and two.claim("a", newest(two, "a")) is not None:
                took_over = second
            try:
                one.check()
            except Lapsed:
                gave_up = second if gave_up is None else gave_up
        assert gave_up < took_over and LEASE <= took_over * rate <= LEASE + 200 * rate
        assert newest(two, "a").worker == two.worker and newest(two, "a").generation == 2


def test_a_worker_that_leaves_is_followed_at_once(place):
    with crew(place) as two:
        with crew(place) as one:
            one.claim("a", None)
        two.beat()
        assert two.claim("a", newest(two, "a")).generation == 2


def test_what_has_ended_says_how_and_an_older_owner_cannot_say_otherwise(place):
    with crew(place) as one, crew(place) as two:
        held = one.claim("a", None)
        one.release(held, "failed")
        again = two.claim("a", newest(two, "a"))
        two.release(again, "done")
        one.release(held, "failed")
        assert newest(one, "a").outcome == "done" and newest(one, "a").generation == 2


def test_a_worker_whose_clock_stood_still_finds_that_it_was_taken_over(place):
    """A paused virtual machine: no time has passed for it."""
    paused, clock = Clock(), Clock()
    with crew(place, clock=paused) as one, crew(place, clock=clock) as two:
        one.claim("a", None)
        two.beat()
        for part in range(12):
            clock.true = 0.1 * part * LEASE
            two.beat()
        assert two.claim("a", newest(two, "a")) is not None
        one.check()
        with pytest.raises(Lapsed, match="another worker"):
            one.confirm()
        with pytest.raises(Lapsed):
            one.check()


def test_a_worker_that_was_silent_never_revives_its_name(place):
    clock = Clock()
    with crew(place, clock=clock) as one:
        before = one.worker
        one.claim("a", None)
        clock.true = 0.8 * LEASE
        with pytest.raises(Lapsed, match="no sign of life for 2880 seconds"):
            one.beat()
        with pytest.raises(Lapsed):
            one.claim("b", None)
        one.rejoin()
        assert one.worker != before and one.others == 0
        one.check()
        assert one.claim("a", newest(one, "a")).generation == 2


def test_others_are_counted_while_they_are_there(place):
    clock = Clock()
    with crew(place, clock=clock) as one:
        two = crew(place).__enter__()
        with crew(place):
            one.beat()
            assert one.others == 2
        one.beat()
        assert one.others == 1
        die(two)
        clock.true = 0.6 * LEASE
        one.beat()
        assert one.others == 1
        clock.true = 1.2 * LEASE
        one.beat()
        assert one.others == 0


@pytest.fixture
def sleeping(monkeypatch):
    """Clocks that go on only while somebody waits, and what happens then."""
    clock, meanwhile = Clock(), []

    def sleep(seconds):
        clock.true += seconds
        for happens in meanwhile:
            happens()

    monkeypatch.setattr(claims.time, "sleep", sleep)
    return clock, meanwhile


def test_workers_of_other_code_are_refused_while_one_is_alive(place, sleeping):
    clock, meanwhile = sleeping
    old = crew(place, versions={"code": "a", "jax": "1"}, lease=60.0).__enter__()
    meanwhile.append(old.beat)
    with pytest.raises(ConfigError, match="code is a there and b here") as error, crew(place, versions={"code": "b", "jax": "1"}):
        pass
    assert "jax" not in str(error.value) and "\n" not in str(error.value)
    with crew(place, versions={"code": "a", "jax": "1"}):
        pass
    meanwhile.clear()
    die(old)
    new = crew(place, versions={"code": "b"}, clock=clock)
    meanwhile.append(lambda: new.beat())
    with new:
        assert new.claim("a", None) is not None and 60.0 < clock.true < 62.0


def test_signs_of_workers_that_are_gone_are_cleared_and_those_of_one_that_lives_are_not(place, sleeping):
    _, meanwhile = sleeping
    notes = []
    claims.clear(Shared(place), notes.append)
    one = crew(place).__enter__()
    one.claim("a", None)
    meanwhile.append(one.beat)
    with pytest.raises(ConfigError, match="in use by another"):
        claims.clear(Shared(place), notes.append)
    assert len(notes) == 1 and one.claims()
    one.__exit__()
    claims.clear(Shared(place), notes.append)
    assert len(notes) == 1 and not one.claims()


def test_a_lease_that_is_too_short_is_refused(place):
    with pytest.raises(ConfigError, match="--lease must be at least 2 seconds"):
        crew(place, lease=1.0)
    slow = iter(range(0, 1000, 3))
    with (
        pytest.raises(ConfigError, match=r"--lease=8 is too short: a sign of life took 3\.0 s; give 30"),
        crew(place, lease=8.0, clock=lambda: float(next(slow))),
    ):
        pass


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_refused(tmp_path, monkeypatch, number):
    def link(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    with (
        pytest.raises(ConfigError, match=f"exactly one of several processes .{os.strerror(number)}") as error,
        crew(tmp_path / "w"),
    ):
        pass
    assert str(tmp_path / "w") in str(error.value)


def test_a_store_that_ignores_the_condition_is_refused(place, monkeypatch):
    monkeypatch.setattr(Shared, "create", lambda self, name, data: self.write(name, data) or True)
    with pytest.raises(ConfigError, match="two processes can create the same file"), crew(place):
        pass


def test_a_request_that_was_repeated_is_known_for_its_own(tmp_path, bucket, monkeypatch):
    """NFS and buckets may carry out a request whose answer is lost, and then say that the file exists."""
    link = os.link

    def twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    files = Shared(tmp_path)
    assert files.create("a.json", {"by": 1}) and not files.create("a.json", {"by": 2}) and files.read("a.json") == {"by": 1}
    far = Shared(bucket)
    far.write("a.json", {"by": 1})
    assert far.create("a.json", {"by": 1}) and not far.create("a.json", {"by": 2})


def test_a_path_is_no_chain_of_addresses(tmp_path):
    files = Shared(tmp_path / "a::b [1]")
    assert files.create("claims/x.1.json", {"by": 1}) and not files.create("claims/x.1.json", {"by": 2})
    assert files.names("claims") == ["x.1.json"] and (tmp_path / "a::b [1]" / "claims" / "x.1.json").is_file()


def test_the_thread_gives_signs_of_life_by_itself(tmp_path):
    with Crew(Shared(tmp_path), lease=3.0) as one:
        stopped = threading.Event()
        for _ in range(100):
            stopped.wait(0.1)
            sign = json.loads((tmp_path / "workers" / f"{one.worker}.json").read_text())
            if sign["beat"] >= 2:
                break
        assert sign["beat"] >= 2 and not sign["left"]
    assert json.loads((tmp_path / "workers" / f"{one.worker}.json").read_text())["left"]


def test_who_is_alone_lets_nobody_join_and_joins_nobody(place, sleeping):
    _, meanwhile = sleeping
    notes = []
    left = crew(place).__enter__()
    left.claim("a", None)
    left.__exit__()
    with crew(place, alone=True) as one:
        assert not one.claims()  # what is left of others is gone
        meanwhile.append(one.beat)
        for given in ({}, {"alone": True}):
            with pytest.raises(ConfigError, match="in use by another"), crew(place, note=notes.append, **given):
                pass
        assert len(notes) == 2
        with pytest.raises(ConfigError, match="in use by another"):
            claims.clear(Shared(place), notes.append)
    with crew(place) as other:
        meanwhile[:] = [other.beat]
        with pytest.raises(ConfigError, match="in use by another"), crew(place, alone=True):
            pass


def test_who_is_alone_goes_on_after_a_silence(place):
    clock = Clock()
    with crew(place, alone=True, lease=60.0, clock=clock) as one:
        clock.true = 1000.0
        one.beat()
        one.check()


def test_who_seemed_dead_and_whose_place_was_taken_finds_out(place, sleeping):
    clock, _ = sleeping
    one, two = (crew(place, alone=True, clock=own, lease=60.0) for own in (Clock(), clock))
    one.__enter__()
    with two:  # after a lease without another sign
        one.check()
        with pytest.raises(Lapsed, match="another run has taken over"):
            one.beat()
        with pytest.raises(Lapsed):
            one.check()
        two.beat()
        assert not two.others
