"""Checkpoints come back bit for bit, damage falls back to an older one, and a full disk ends nothing."""

import functools
import pathlib
import time
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.paths import append, move_folder, opened, to_path
from llm_jax.io import checkpoint, lines
from llm_jax.io.checkpoint import Checkpointer
from llm_jax.io.tracker import Tracker


@pytest.fixture(params=["local", "bucket"])
def place(request, tmp_path) -> pathlib.Path:
    return tmp_path if request.param == "local" else to_path(request.getfixturevalue("bucket"))


def state(scale: float = 1.0, parts: int = 1):
    mesh = jax.make_mesh((parts,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:parts])
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    tree = {
        "w": scale * jnp.arange(4096.0).reshape(8, 512),
        "key": jax.random.split(jax.random.key(3), 8),
        "none": None,
        "t": (jnp.arange(8),),
    }
    return jax.device_put(tree, where)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def saved(folder, steps=(10, 20), **options):
    with_warnings: list[str] = []
    checkpointer = Checkpointer(folder, keep_last=3, warn=with_warnings.append, **options)
    for step in steps:
        assert checkpointer.save(step, state(step), {"seconds": step / 3}, {"loss": float(step)})
    checkpointer.close()
    assert not with_warnings


def assert_equal(a, b):
    plain = lambda x: np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)  # noqa: E731
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(plain(x), plain(y)), a, b)


@pytest.mark.parametrize("parts", [1, 4])
def test_what_was_saved_comes_back_on_any_layout(tmp_path, parts):
    saved(tmp_path / "c")
    like = state(20, parts)
    step, restored, extra = Checkpointer(tmp_path / "c").restore(abstract(like))
    assert step == 20 and extra == {"seconds": 20 / 3}
    assert_equal(restored, like)
    assert restored["w"].sharding.is_equivalent_to(like["w"].sharding, 2)


@pytest.mark.parametrize("members", [5, 8, 10])
def test_a_population_padded_for_other_devices_comes_back(tmp_path, members):
    saved(tmp_path / "c")
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (members, *x.shape[1:]), x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        state(),
    )
    _, restored, _ = Checkpointer(tmp_path / "c", warn=pytest.fail).restore(like)
    kept = min(members, 8)
    assert restored["w"].shape[0] == members
    assert_equal(*(jax.tree.map(lambda x: x[:kept], tree) for tree in (restored, state(20))))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("written, asked", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
def test_what_comes_back_as_another_dtype_is_what_numpy_casts_it_to(tmp_path, written, asked, parts):
    where = state(parts=parts)["w"].sharding
    numbers = np.random.default_rng(0).normal(size=(8, 512)).astype(written)
    numbers[:, :4] = [0.0, -0.0, np.inf, 1 + 2**-8]  # the last lies between two numbers of bfloat16
    checkpointer = Checkpointer(tmp_path / "c", warn=pytest.fail)
    assert checkpointer.save(10, {"params": {"w": jax.device_put(numbers, where)}}, {}, {})
    checkpointer.close()
    cast, like = numbers.astype(asked), {"params": {"w": jax.ShapeDtypeStruct((8, 512), asked, sharding=where)}}
    assert (cast.astype("float64") != numbers.astype("float64")).any() == (written == "float32")
    _, restored, _ = Checkpointer(tmp_path / "c", warn=pytest.fail).restore(like)
    _, part = checkpoint.read(tmp_path / "c", {"params": None}, layout=lambda _: like)
    for found in (restored, part):
        assert found["params"]["w"].dtype == asked and found["params"]["w"].sharding.is_equivalent_to(where, 2)
        np.testing.assert_array_equal(np.asarray(found["params"]["w"]).view("uint8"), cast.view("uint8"))


def _flip(file: pathlib.Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {"flipped": _flip, "truncated": lambda f: f.write_bytes(f.read_bytes()[:-7]), "deleted": lambda f: f.unlink()}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_next_newest_taken(tmp_path, damage):
    saved(tmp_path / "c")
    damage(max((f for f in (tmp_path / "c" / "20" / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size))
    warnings: list[str] = []
    step, restored, _ = Checkpointer(tmp_path / "c", warn=warnings.append).restore(abstract(state()))
    assert step == 10 and len(warnings) == 1 and "step 20 is damaged" in warnings[0]
    assert_equal(restored, state(10))
    assert (tmp_path / "c.damaged" / "20").is_dir() and not (tmp_path / "c" / "20").exists()


def test_a_checkpoint_in_a_bucket_comes_back_and_a_damaged_one_does_not(bucket):
    folder, like = to_path(bucket) / "c", state(20, 4)
    saved(folder)
    step, restored, _ = Checkpointer(folder, warn=pytest.fail).restore(abstract(like))
    assert step == 20 and checkpoint.steps(folder, whole=True) == [10, 20]
    assert_equal(restored, like)
    system, name = opened(folder / "20" / "state")
    _flip(to_path(f"gs://{max(system.find(name, detail=True).values(), key=lambda file: file['size'])['name']}"))
    warnings: list[str] = []
    step, restored, _ = Checkpointer(folder, warn=warnings.append).restore(abstract(state()))
    assert step == 10 and len(warnings) == 1 and "step 20 is damaged" in warnings[0]
    assert_equal(restored, state(10))
    assert (folder.with_name("c.damaged") / "20").is_dir() and not (folder / "20").exists()


def test_a_folder_in_a_bucket_is_moved_by_requests_that_every_storage_knows(bucket):
    folder, began = to_path(bucket) / "c" / "10", time.monotonic()
    for name in ("a", "b/c", "b/10"):
        (folder / name).write_text(name)
    (folder.parent / "100").write_text("another's")
    move_folder(folder, to_path(bucket) / "aside" / "10")
    assert time.monotonic() - began < 15, "others are repeated for half a minute"
    system, name = opened(bucket)
    found = {file.removeprefix(f"{name}/"): system.cat(file).decode() for file in system.find(name)}
    assert found == {"aside/10/a": "a", "aside/10/b/c": "b/c", "aside/10/b/10": "b/10", "c/100": "another's"}


def test_a_whole_checkpoint_of_another_structure_is_an_error_and_stays(tmp_path):
    saved(tmp_path / "c")
    other = abstract(state()) | {"more": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=abstract(state())["w"].sharding)}
    with pytest.raises(Exception, match="more"):
        Checkpointer(tmp_path / "c", warn=pytest.fail).restore(other)
    assert (tmp_path / "c" / "20").is_dir()


def test_nothing_good_is_none(tmp_path):
    assert Checkpointer(tmp_path / "none").restore(abstract(state())) is None
    saved(tmp_path / "c", steps=(10,))
    _flip(tmp_path / "c" / "10" / "checksums.json")
    assert Checkpointer(tmp_path / "c", warn=lambda _: None).restore(abstract(state())) is None


def test_the_best_and_the_last_stay(tmp_path):
    checkpointer = Checkpointer(tmp_path / "c", keep_last=1, keep_every=40, best_metric="loss")
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5), (50, 2.2), (60, 2.1)):
        checkpointer.save(step, state(step), {}, {"loss": loss})
    checkpointer.close()
    assert {20, 40, 60} <= {int(f.name) for f in (tmp_path / "c").iterdir() if f.name.isdigit()}
    assert not (tmp_path / "c" / "10").exists()


def test_a_failed_save_is_told_and_the_next_one_works(tmp_path, monkeypatch):
    warnings: list[str] = []
    checkpointer = Checkpointer(tmp_path / "c", warn=warnings.append)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint.ocp.CheckpointManager, "save", full)
        assert not checkpointer.save(10, state(10), {}, {})
    assert len(warnings) == 1 and "step 10 could not be saved, training goes on" in warnings[0] and "No space left" in warnings[0]
    assert checkpointer.save(20, state(20), {}, {})
    checkpointer.close()
    assert Checkpointer(tmp_path / "c").restore(abstract(state()))[0] == 20


def test_a_save_that_fails_behind_training_is_told_of_its_own_step_and_the_next_is_made(tmp_path, monkeypatch):
    warnings: list[str] = []
    checkpointer = Checkpointer(tmp_path / "c", warn=warnings.append)
    wait, failed = checkpoint.ocp.CheckpointManager.wait_until_finished, []

    def fails_once(manager):
        wait(manager)
        if not failed:
            failed.append(True)
            raise OSError(28, "No space left on device")

    assert checkpointer.save(10, state(10), {}, {})
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", fails_once)
    assert checkpointer.save(20, state(20), {}, {}) and checkpointer.wait()
    checkpointer.close()
    assert len(warnings) == 1 and "step 10 could not be saved, training goes on" in warnings[0]
    assert 20 in checkpoint.steps(tmp_path / "c")


def test_the_tracker_forgets_what_a_resumed_run_will_write_again(place):
    tracker = Tracker(place)
    for step in (1, 2, 3):
        tracker.log({"step": step, "train/loss": float("nan") if step == 2 else 1 / step})
    tracker.close()
    append(place / "metrics.jsonl", '{"step": 4, "tra')
    tracker = Tracker(place, tensorboard=False)
    tracker.truncate_after(2)
    tracker.log({"step": 3, "train/loss": 0.5})
    tracker.close()
    assert Tracker.read(place) == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": None},
        {"step": 3, "train/loss": 0.5},
    ]
    assert list(place.glob("events.*")), "TensorBoard should mirror it"


def test_what_is_kept_outlives_a_process_that_is_killed(place):
    tracker = Tracker(place, tensorboard=False)
    for step in (1, 2, 3):
        tracker.log({"step": step})
        if step == 2:
            tracker.keep()
    # killed here; in a bucket what came after the last checkpoint is written again, by whoever goes on from that
    assert [record["step"] for record in Tracker.read(place)][:2] == [1, 2]
    after = Tracker(place, tensorboard=False)
    after.truncate_after(2)
    after.log({"step": 3})
    after.close()
    assert [record["step"] for record in Tracker.read(place)] == [1, 2, 3]
    tracker.close()


def test_a_growing_file_goes_to_a_bucket_now_and_then_and_not_at_every_line(bucket, monkeypatch):
    sent: list[bytes] = []
    now = [0.0]
    monkeypatch.setattr(lines, "write_whole", lambda file, content: sent.append(content))
    monkeypatch.setattr(lines.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lines, "uploads", _AtOnce)
    file = lines.lines(to_path(bucket) / "metrics.jsonl")
    for second in range(100):
        now[0] = float(second)
        file.append({"step": second})
    file.close()
    assert len(sent) == 4  # three half minutes and the end
    assert sent[-1].count(b"\n") == 100 and all(one.endswith(b"\n") for one in sent)
    file.keep()
    assert len(sent) == 4


def test_records_wait_while_a_bucket_is_out_of_reach(bucket, monkeypatch):
    tracker = Tracker(bucket, tensorboard=False)
    tracker.log({"step": 1})
    tracker.keep()
    with monkeypatch.context() as away:
        away.setattr(lines, "write_whole", functools.partial(_raise, RuntimeError("no route to host")))
        tracker.log({"step": 2})
        with pytest.warns(UserWarning, match="no route to host: records wait in memory until they can be written"):
            tracker.keep()
        tracker.keep()  # said once
        with pytest.raises(OSError, match="no route to host"):
            tracker.close()
    tracker.close()
    assert [record["step"] for record in Tracker.read(bucket)] == [1, 2]


class _AtOnce:
    def submit(self, call, *given):
        done = Future()
        done.set_result(call(*given))
        return done


def _raise(error: Exception, *_) -> None:
    raise error


def test_a_mirror_that_breaks_is_switched_off(tmp_path, monkeypatch):
    import tensorboardX

    monkeypatch.setattr(tensorboardX, "SummaryWriter", lambda *_: (_ for _ in ()).throw(RuntimeError("no disk")))
    with pytest.warns(UserWarning, match="TensorBoard is switched off"):
        tracker = Tracker(tmp_path)
    tracker.log({"step": 1, "train/loss": 1.0})
    tracker.close()
    assert len(Tracker.read(tmp_path)) == 1


def test_a_mirror_that_breaks_later_is_switched_off(tmp_path, monkeypatch):
    from tensorboardX import SummaryWriter

    def breaks(*_):
        raise RuntimeError("no disk")

    monkeypatch.setattr(SummaryWriter, "add_scalar", breaks)
    tracker = Tracker(tmp_path)
    with pytest.warns(UserWarning, match="TensorBoard is switched off"):
        tracker.log({"step": 1, "train/loss": 1.0})
    tracker.log({"step": 2, "train/loss": 0.5})
    tracker.close()
    assert len(Tracker.read(tmp_path)) == 2


def test_a_mirror_whose_thread_has_died_holds_nothing_up(tmp_path, monkeypatch):
    from tensorboardX.event_file_writer import EventsWriter

    def breaks(*_):
        raise OSError(28, "No space left on device")

    tracker = Tracker(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(EventsWriter, "write_event", breaks)
        full.setattr("threading.excepthook", lambda _: None)
        tracker.log({"step": 1, "train/loss": 1.0})
        tracker._writer.file_writer.event_writer._worker.join(30)
        with pytest.warns(UserWarning, match="its thread has died"):
            tracker.log({"step": 2, "train/loss": 0.5})
        for step in range(3, 40):
            tracker.log({"step": step, "train/loss": 0.5})
    tracker.close()
    assert len(Tracker.read(tmp_path)) == 39
