"""Workers around a training that only counts: every run is trained to its end by exactly one, whoever dies, fails or is slow."""

import threading
import time
from collections import Counter

import pytest

from llm_jax.core.config import ConfigError
from llm_jax.lab import plan, schedule
from llm_jax.lab.claims import Crew
from llm_jax.lab.schedule import Alone, Workers
from llm_jax.lab.workfolder import WorkFolder
from tests.lab.test_experiment import ablation

RUNS = plan.tuning_runs(ablation())  # two arms at two points of the grid


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(Crew, "pause", lambda self: (time.sleep(0.01), self.check()))


def one_by_one(runs, waiting):
    return [[run] for run in waiting]


def all_together(runs, waiting):
    return [list(waiting)]


class Worker:
    """Trains by writing down who did it. fails: names of runs that raise an error; room: runs that fit in memory together."""

    def __init__(self, path, *, fails=(), room=100, before=lambda runs: None):
        self.folder, self.notes, self.groups = WorkFolder(path), [], []
        self.crew = Crew(self.folder.shared_files, lease=3600.0)
        self.fails, self.room, self.before = fails, room, before

    def __enter__(self):
        self.crew.__enter__()
        self.workers = Workers(self.folder, self.crew, self.notes.append)
        return self

    def __exit__(self, *_):
        self.crew.__exit__()

    def train(self, runs, overall):
        self.before(runs)
        self.groups.append([run.name for run in runs])
        if len(runs) > self.room:
            return False
        time.sleep(0.01)
        self.crew.confirm()
        for run in runs:
            if run.name not in self.fails:
                assert self.folder.finish(run.name, {"status": "done", "by": self.crew.worker})
        return True

    def finish(self, runs=RUNS, grouped=one_by_one):
        self.workers.finish(runs, grouped, self.train)


def together(*workers, grouped=None):
    """Each in a thread of its own, from start to end."""
    errors = []

    def work(worker, grouped):
        try:
            with worker:
                worker.finish(grouped=grouped)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(workers, grouped or [one_by_one] * 9, strict=False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def trained(*workers):
    return Counter(name for worker in workers for group in worker.groups for name in group)


def results(path):
    return {run.name: WorkFolder(path).result(run.name) for run in RUNS}


def test_one_process_trains_all_of_them_and_halves_what_does_not_fit(tmp_path):
    worker = Worker(tmp_path, room=2)
    worker.crew.confirm = lambda: None
    worker.crew.worker = "me"
    Alone(worker.folder).finish(RUNS, all_together, worker.train)
    assert [len(group) for group in worker.groups] == [4, 2, 2] and all(results(tmp_path).values())


def test_four_workers_train_each_run_once(tmp_path):
    workers = [Worker(tmp_path) for _ in range(4)]
    together(*workers)
    assert trained(*workers) == Counter(run.name for run in RUNS) and all(results(tmp_path).values())


def test_whoever_comes_when_all_is_done_trains_nothing(tmp_path):
    together(Worker(tmp_path))
    late = Worker(tmp_path)
    together(late)
    assert not late.groups and not late.notes


def test_all_follow_the_groups_that_the_first_wrote_down(tmp_path):
    """Whatever memory says to each of them."""
    workers = [Worker(tmp_path) for _ in range(3)]
    together(*workers, grouped=[all_together, one_by_one, all_together])
    assert trained(*workers) == Counter(run.name for run in RUNS)
    assert len({frozenset(w.workers._groups) for w in workers if w.workers._groups}) == 1


def test_groups_are_added_for_runs_that_are_in_none(tmp_path):
    with Worker(tmp_path) as one, Worker(tmp_path) as two:
        one.finish(RUNS[:3], grouped=all_together)
        two.finish(RUNS, grouped=all_together)
    assert [len(g) for g in one.groups] == [3] and two.groups == [[RUNS[3].name]]


def test_a_group_that_does_not_fit_is_halved_for_all(tmp_path):
    small, other = Worker(tmp_path, room=1), Worker(tmp_path)
    with small:
        small.finish(grouped=all_together)
    assert [len(group) for group in small.groups] == [4, 2, 1, 1, 2, 1, 1] and all(results(tmp_path).values())
    together(other)
    assert not other.groups and len(other.workers._groups) == 4


def test_what_failed_is_tried_again_by_a_later_worker_and_by_nobody_else(tmp_path):
    bad = RUNS[1].name
    with Worker(tmp_path, fails=[bad]) as one, Worker(tmp_path, fails=[bad]) as two:
        one.finish(RUNS[:2])
        two.finish()
        one.finish()
        assert trained(one, two)[bad] == 1
        with Worker(tmp_path, fails=[bad]) as three, Worker(tmp_path) as four:
            three.finish()
            four.finish()
        assert trained(three) == {bad: 1} and not four.groups
    last = Worker(tmp_path)
    together(last)
    assert trained(last) == {bad: 1} and all(results(tmp_path).values())


def test_a_dead_workers_group_is_taken_over(tmp_path):
    with Worker(tmp_path) as dead, Worker(tmp_path) as heir:
        heir.workers._agree(RUNS, one_by_one)
        dead.workers._agree(RUNS, one_by_one)
        first = next(iter(dead.workers._groups))
        dead.crew.claim(first, None)
        threading.Timer(0.3, heir.crew.signs.gone.add, [dead.crew.worker]).start()
        heir.finish()
    assert trained(heir) == Counter(run.name for run in RUNS)
    assert heir.notes[0].startswith("all groups that are left") and "taking it over" in heir.notes[1] and len(heir.notes) == 2


@pytest.mark.parametrize("written", ["results", "halves"])
def test_what_a_worker_finished_before_it_died_is_not_done_again(tmp_path, written):
    with Worker(tmp_path) as dead, Worker(tmp_path) as heir:
        dead.workers._agree(RUNS, all_together)
        (name,) = dead.workers._groups
        claim = dead.crew.claim(name, None)
        heir.workers._agree(RUNS, all_together)
        if written == "results":
            dead.train(RUNS, (0, 4))
        else:
            halves = [[run.name for run in part] for part in (RUNS[:2], RUNS[2:])]
            assert dead.workers._append({"groups": {"a": halves[0], "b": halves[1]}, "replaces": claim.name})
        heir.crew.signs.gone.add(dead.crew.worker)
        heir.finish(grouped=all_together)
    assert [len(group) for group in heir.groups] == ([] if written == "results" else [2, 2])


def test_a_worker_that_lapsed_claims_anew_and_writes_nothing_meanwhile(tmp_path):
    times = []

    def lapses(runs):
        times.append(runs)
        if len(times) == 2:
            worker.crew._lapsed.set()

    worker = Worker(tmp_path, before=lapses)
    together(worker)
    assert all(results(tmp_path).values()) and trained(worker)[times[1][0].name] == 2
    assert len({result["by"] for result in results(tmp_path).values()}) == 2 and any("claims it next" in n for n in worker.notes)


def test_a_worker_of_some_arms_parts_a_group_that_holds_others(tmp_path):
    with Worker(tmp_path) as both:
        both.workers._agree(RUNS, all_together)
    some, rest = Worker(tmp_path), Worker(tmp_path)
    with some:
        some.finish(RUNS[:2], grouped=all_together)
    together(rest)
    assert some.groups == [[run.name for run in RUNS[:2]]] and rest.groups == [[run.name for run in RUNS[2:]]]


def test_a_result_that_is_gone_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "SEEN_LATE", 0.0)
    together(Worker(tmp_path))
    (tmp_path / "trials" / RUNS[0].name / "results.json").unlink()
    with pytest.raises(ConfigError, match="is gone: run without --worker once"), Worker(tmp_path) as late:
        late.finish()


def test_groups_of_the_program_that_is_compiled_come_first(tmp_path):
    arms = {run.name: run.arm for run in RUNS}
    with Worker(tmp_path) as one:
        one.finish([RUNS[0], RUNS[2], RUNS[1], RUNS[3]])
        order = [arms[name] for (name,) in one.groups]
    assert order == [RUNS[0].arm] * 2 + [RUNS[2].arm] * 2


def test_a_result_is_written_once(tmp_path, monkeypatch):
    folder = WorkFolder(tmp_path)
    assert folder.finish("t", {"status": "failed"}) and folder.finish("t", {"status": "done", "by": 1})
    assert not folder.finish("t", {"status": "done", "by": 2}) and folder.result("t")["by"] == 1
    with monkeypatch.context() as late:  # as NFS shows what another host has written a moment ago
        late.setattr(WorkFolder, "_written", lambda self, name: None)
        assert not folder.finish("t", {"status": "done", "by": 3})
    assert folder.result("t")["by"] == 1


def test_others_signs_are_named_in_the_display(tmp_path):
    shown = []
    with Worker(tmp_path, before=lambda runs: shown.append(one.workers.beside())) as one, Worker(tmp_path):
        one.crew.beat()
        one.finish()
    assert shown[0] == "group 1 of 4 · 1 other worker" and len(shown) == 4


def test_a_group_whose_workers_die_holds_up_no_other(tmp_path):
    with Worker(tmp_path) as dead, Worker(tmp_path) as one:
        dead.workers._agree(RUNS, one_by_one)
        first = next(iter(dead.workers._groups))
        dead.crew.claim(first, None)
        one.crew.signs.gone.add(dead.crew.worker)
        one.finish()
        assert one.groups[-1] == dead.workers._groups[first] and len(one.groups) == 4
