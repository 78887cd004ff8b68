"""Processes that prepare images: they need no /dev/shm, their death ends a run with one line, and signals go to the parent."""
from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing.reductions
from tiny import command, differences, make_images, one_line_error, outcome

import train_cifar100
from dataloader import build_data
from utils.core.errors import FAILURE, STOPPED, Stopped, UserError, WorkerKilled
from utils.core.signals import StopSignals
from utils.data import workers
from utils.data.decoders import PillowDecoder
from utils.data.workers import InSharedBatch, SharedBatches, in_parallel
from utils.runs import checkpoint

ROOT = Path(__file__).resolve().parent.parent
LARGE = "--image_size 224 --grFactor 1-1-1-1 --bnFactor 1-1-1-1 --growthRate 2 --workers 1 --batch-size 4".split()


@pytest.fixture(autouse=True)
def two_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "usable_cores", lambda: 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture()
def no_process_left():
    """Processes that a test of another file left behind in this pytest are not this file's to end."""
    others = {process.pid for process in active_children()}
    yield
    assert {process.pid for process in active_children()} <= others


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), classes=2, train=12, test=2)


def kill_self(task: int) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_results_come_in_the_order_of_the_tasks_from_other_processes(no_process_left):
    results = list(in_parallel(with_pid, list(range(7))))
    assert [task for task, _ in results] == list(range(7)) and os.getpid() not in {pid for _, pid in results}


def with_pid(task: int) -> tuple[int, int]:
    return task, os.getpid()


def test_a_killed_process_ends_the_work_with_one_error(no_process_left):
    with pytest.raises(WorkerKilled, match="memory ran out"):
        list(in_parallel(kill_self, list(range(9))))


def test_a_killed_process_ends_a_run_with_one_line(images, tmp_path, monkeypatch, capsys):
    def killed(**_):
        raise WorkerKilled("a process was killed")

    monkeypatch.setattr(train_cifar100, "build_data", killed)
    assert "was killed" in one_line_error(capsys, lambda: train_cifar100.main(command(images, tmp_path)), FAILURE)


def hold_until_told(task: int) -> int:
    if task == 1:
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(0 if task == 0 else 60)
    return task


def test_a_signal_to_the_parent_ends_the_work_at_once_and_is_answered_by_it_alone(no_process_left, capfd):
    started = time.monotonic()
    with StopSignals(begun=False), pytest.raises(SystemExit) as ended:
        list(in_parallel(hold_until_told, list(range(4))))
    assert ended.value.code == STOPPED and time.monotonic() - started < 30
    assert capfd.readouterr().err.count("stopped before the first step") == 1


def interrupt_self(task: int) -> int:
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return task


def test_interrupts_that_reach_the_workers_too_are_left_to_the_parent():
    with StopSignals(begun=False):
        assert list(in_parallel(interrupt_self, list(range(4)))) == list(range(4))


def test_too_few_open_files_end_the_work_with_an_error_and_no_process_that_waits(no_process_left):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    try:
        for extra in range(1, 14, 3):
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + extra, limits[1]))
            try:
                assert list(in_parallel(abs, [1, -2, 3])) == [1, 2, 3]
            except OSError as error:
                assert "open files" in str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path):
    program = ("import sys, time; from utils.data import workers\n"
               "workers.usable_cores = lambda: 2\n"
               "def write(task):\n    import os; open(f'{sys.argv[1]}/{os.getpid()}', 'w'); time.sleep(600)\n"
               "list(workers.in_parallel(write, [1, 2]))")
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT) as process:
        while len(list(tmp_path.iterdir())) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    deadline = time.monotonic() + 20
    while any(_runs(int(file.name)) for file in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def fill(batches: SharedBatches, connection) -> None:
    batches.arrays[1, :2] = 7
    connection.send(InSharedBatch(batches, 1, 2))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_what_a_worker_writes_arrives_without_being_sent(method):
    context = get_context(method)
    batches = SharedBatches(2, (3, 4, 4, 3))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=fill, args=(batches, sender))
    process.start()
    arrived = receiver.recv()
    process.join()
    assert arrived.shape == (2, 4, 4, 3) and bool((arrived == 7).all())
    assert not batches.arrays[0].any() and not batches.arrays[1, 2].any()
    batches.arrays[1, 0] = 9
    assert bool((arrived[0] == 9).all())


def test_nothing_of_a_batch_goes_through_dev_shm(images, monkeypatch):
    def refuse(*_):
        raise AssertionError("a tensor came through PyTorch's shared memory")

    monkeypatch.setattr(torch.multiprocessing.reductions, "rebuild_storage_fd", refuse)
    data = build_data(dataset="folder", data_root=images, image_size=224, batch_size=4, workers=2)
    assert sum(len(batch.labels) for batch in data.train(0)) == 24


def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for(images):
    """There is room for what is under way and one more; each batch is compared after a wait in which workers go on."""
    options = dict(dataset="folder", data_root=images, image_size=224, batch_size=1)
    alone = [batch.images.clone() for batch in build_data(**options, workers=0).train(0)]
    for crops, expected in zip(build_data(**options, workers=1).train(0), alone, strict=True):
        time.sleep(0.02)
        assert np.array_equal(crops.images.numpy(), expected.numpy())


@pytest.mark.slow
def test_training_works_with_a_dev_shm_smaller_than_a_batch(images, tmp_path):
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("only root can mount a small /dev/shm")
    line = " ".join([sys.executable, "train_cifar100.py", *command(images, tmp_path / "run", *LARGE, "--epochs", "1")])
    done = subprocess.run(["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=256k tmpfs /dev/shm && exec {line}"], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr


def test_without_room_for_semaphores_pools_work_alone_and_loaders_end_with_one_line(images, tmp_path, monkeypatch, capsys):
    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(multiprocessing, "Semaphore", no_room)
    pids = list(in_parallel(lambda _: os.getpid(), [1, 2, 3, 4]))
    assert set(pids) == {os.getpid()}
    message = one_line_error(capsys, lambda: train_cifar100.main(command(images, tmp_path / "run", *LARGE, "--epochs", "1")))
    assert "/dev/shm (No space left on device)" in message and "--workers 0" in message


def _stuck_after(monkeypatch, n_loaded: int, number: int = signal.SIGTERM) -> None:
    """Let the worker's file system hang for a minute after so many images; a second later the run is told to stop."""
    load, count = PillowDecoder.load, iter(range(10**9))
    parent = os.getpid()

    def load_or_hang(self, path):
        if next(count) == n_loaded and os.getpid() != parent:
            time.sleep(1)
            os.kill(parent, number)
            time.sleep(60)
        return load(self, path)

    monkeypatch.setattr(PillowDecoder, "load", load_or_hang)


@pytest.mark.slow
@pytest.mark.parametrize("n_loaded", [0, 9], ids=["before the first step", "in the middle of an epoch"])
def test_a_signal_is_answered_while_the_next_batch_does_not_come(images, tmp_path, monkeypatch, capsys, n_loaded):
    line = command(images, tmp_path / "run", *LARGE)
    with monkeypatch.context() as patch:
        _stuck_after(patch, n_loaded)
        started = time.monotonic()
        assert train_cifar100.main(line) == STOPPED
        assert time.monotonic() - started < 45 and "all saved" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "run" / checkpoint.LATEST)["training"]["figures"]["steps"] == n_loaded // 4
    assert train_cifar100.main([*line, "--resume"]) == 0
    assert train_cifar100.main(command(images, tmp_path / "whole", *LARGE)) == 0
    assert not list(differences(outcome(tmp_path / "run"), outcome(tmp_path / "whole")))


def test_a_signal_while_the_hold_out_is_read_keeps_the_steps_of_the_epoch(images, tmp_path, monkeypatch):
    from utils.training import trainer

    def stop(*_):
        raise Stopped("SIGTERM")

    line = command(images, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "predict", stop)
        assert train_cifar100.main(line) == STOPPED
    assert checkpoint.load(tmp_path / "run" / checkpoint.LATEST)["training"]["figures"]["steps"] == 2
    assert train_cifar100.main([*line, "--resume"]) == 0
    assert train_cifar100.main(command(images, tmp_path / "whole")) == 0
    assert not list(differences(outcome(tmp_path / "run"), outcome(tmp_path / "whole")))


def test_a_killed_loader_ends_a_run_with_one_line(images, tmp_path, monkeypatch, capsys):
    parent, load = os.getpid(), PillowDecoder.load

    def killed(self, path):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, path)

    monkeypatch.setattr(PillowDecoder, "load", killed)
    message = one_line_error(capsys, lambda: train_cifar100.main(command(images, tmp_path, *LARGE)), FAILURE)
    assert "loads images was killed" in message and "shared memory" not in message


def test_an_error_in_a_process_arrives_unchanged():
    with pytest.raises(UserError, match="task 2"):
        list(in_parallel(fail_at_two, list(range(5))))


def fail_at_two(task: int) -> int:
    if task == 2:
        raise UserError("task 2")
    return task
