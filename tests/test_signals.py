"""Signals end a run between two steps with everything saved; only one run at a time writes a folder."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import command, differences, make_images, one_line_error, outcome, signal_at_step

import train_cifar100
from utils.core.errors import STOPPED, UserError
from utils.core.lock import locked
from utils.core.signals import SIGNALS, StopSignals
from utils.runs import checkpoint
from utils.training import engine

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


class Training:
    """A training run in a process, and a process group, of its own."""

    def __init__(self, line: list[str], output: Path) -> None:
        self.output = output
        with open(output, "w") as file:
            self.process = subprocess.Popen([sys.executable, "train_cifar100.py", *line], cwd=ROOT, stdout=file, stderr=file,
                                            start_new_session=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait_for(self, path: Path) -> None:
        """Wait until the run has written `path`."""
        for _ in range(1200):
            if path.exists():
                return
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)
        pytest.fail(f"no {path} after a minute: {self.output.read_text()}")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_each_signal_stops_after_the_step_saves_and_gives_exit_code_75(images, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)   # ignored, where a shell has started the tests in the background
    signal_at_step(monkeypatch, 7, number)
    assert train_cifar100.main(command(images, tmp_path)) == STOPPED == 75
    assert f"{number.name}: stopped at step 2 of epoch 2, all saved" in capsys.readouterr().out
    saved = checkpoint.load(tmp_path / checkpoint.LATEST)
    assert (saved["epoch"], saved["epoch_kind"]) == (1, "step 2 of epoch 2")
    assert signal.getsignal(number) is before


def test_a_second_interrupt_leaves_at_once_and_saves_nothing(images, tmp_path, monkeypatch, capsys):
    add = engine.EpochMeters.add

    def interrupt_twice(self, *arguments):
        add(self, *arguments)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("still running")

    monkeypatch.setattr(engine.EpochMeters, "add", interrupt_twice)
    assert "interrupted" in one_line_error(capsys, lambda: train_cifar100.main(command(images, tmp_path)), code=130)
    assert not (tmp_path / checkpoint.LATEST).exists()


def test_a_signal_during_validation_leaves_the_finished_epoch(images, tmp_path, monkeypatch):
    from utils.evaluation.predict import predict
    from utils.training import trainer

    def predict_and_signal(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return predict(*arguments)

    monkeypatch.setattr(trainer, "predict", predict_and_signal)
    assert train_cifar100.main(command(images, tmp_path)) == STOPPED
    saved = checkpoint.load(tmp_path / checkpoint.LATEST)
    assert (saved["epoch"], saved["training"]["figures"]["steps"], len(saved["training"]["history"])) == (1, 0, 1)


def test_handlers_are_only_there_inside_the_block():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGUSR1"
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_process_that_is_told_to_stop_ends_with_75_and_resumes_to_the_same_bits(images, tmp_path):
    folder = tmp_path / "run"
    with Training(command(images, folder, "--epochs", "100000"), tmp_path / "output") as training:
        training.wait_for(folder / checkpoint.PREVIOUS)
        training.process.send_signal(signal.SIGTERM)
        assert training.process.wait(60) == STOPPED
    output = (tmp_path / "output").read_text()
    assert "SIGTERM: stopped at" in output and "Traceback" not in output
    epochs = str(checkpoint.load(folder / checkpoint.LATEST)["epoch"] + 1)
    assert train_cifar100.main(command(images, folder, "--epochs", epochs, "--resume")) == 0
    assert train_cifar100.main(command(images, tmp_path / "whole", "--epochs", epochs)) == 0
    assert not list(differences(outcome(folder), outcome(tmp_path / "whole")))


def test_ctrl_c_in_a_pipeline_saves_though_the_reader_of_the_output_is_gone(images, tmp_path):
    """`python train_cifar100.py ... 2>&1 | tee file`: the signal ends tee first."""
    folder = tmp_path / "run"
    line = command(images, folder, "--epochs", "100000")
    with subprocess.Popen([sys.executable, "train_cifar100.py", *line], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        while b"epoch 2/" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == STOPPED
    assert "SIGINT: stopped at" in (folder / "train.log").read_text()


def test_a_line_that_the_terminal_cannot_show_does_not_silence_it(tmp_path):
    program = ("import logging; from utils.core.errors import user_errors; from utils.runs.folder import open_log\n"
               "with user_errors():\n    open_log(); log = logging.getLogger('boostnet')\n"
               "    log.info('caf\\udce9'); log.info('a %d', 'x'); log.info('after')")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0 and done.stdout == "caf\\udce9\nafter\n"


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_before_the_first_step_gives_75_at_once_and_costs_nothing(images, tmp_path, monkeypatch, capfd, number):
    def signal_now(*arguments, **options):
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(train_cifar100, "build_data", signal_now)
        with pytest.raises(SystemExit) as ended:
            train_cifar100.main(command(images, tmp_path / "run"))
    assert ended.value.code == STOPPED and f"{number.name}: stopped before the first step" in capfd.readouterr().err
    assert train_cifar100.main(command(images, tmp_path / "run", "--epochs", "1")) == 0


def test_results_are_there_though_nobody_reads_the_table(images, tmp_path):
    line = [sys.executable, "train_cifar100.py", *command(images, tmp_path / "run", "--epochs", "1")]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(60) == 0, process.stderr.read()
    line = [sys.executable, "eval_cifar100.py", "--data-root", str(images), "--evalmode", "dynamic",
            "--evaluate-from", str(tmp_path / "run/model_best.pth")]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(60) == 0, process.stderr.read()
    assert (tmp_path / "run/dynamic.json").exists() and "test" in json.loads((tmp_path / "run/results.json").read_text())


def test_a_signal_to_the_whole_process_group_does_not_end_the_data_loaders(tmp_path):
    """As batch schedulers and torchrun send it."""
    images, folder = make_images(tmp_path / "images", classes=2, train=40, test=2), tmp_path / "run"
    flags = "--image_size 224 --grFactor 1-1-1-1 --bnFactor 1-1-1-1 --growthRate 2 --batch-size 2 --workers 2 --epochs 100"
    with Training(command(images, folder, *flags.split()), tmp_path / "output") as training:
        training.wait_for(folder / checkpoint.LATEST)
        time.sleep(0.5)   # into the next epoch, where the loaders are at work
        os.killpg(training.process.pid, signal.SIGTERM)
        assert training.process.wait(60) == STOPPED, (tmp_path / "output").read_text()
    output = (tmp_path / "output").read_text()
    # The signal comes in a step, or while images are awaited, where no step is finished; loaders never answer it.
    assert output.count("SIGTERM: stopped") == 1 and "Traceback" not in output
    assert output.count("SIGTERM: finishing this step") <= 1


def test_a_second_run_is_kept_out_until_the_first_is_dead(images, tmp_path, capsys):
    folder = tmp_path / "run"
    with Training(command(images, folder, "--epochs", "100000"), tmp_path / "output") as training:
        training.wait_for(folder / checkpoint.LATEST)
        message = one_line_error(capsys, lambda: train_cifar100.main(command(images, folder, "--resume")))
        assert f"in use by another run (process {training.process.pid} on " in message and "--result_dir" in message
        training.process.kill()
        training.process.wait()
    epochs = str(checkpoint.load(folder / checkpoint.LATEST)["epoch"])
    assert train_cifar100.main(command(images, folder, "--epochs", epochs, "--resume")) == 0


def test_the_lock_of_a_killed_process_is_not_kept_by_its_children(tmp_path):
    program = ("import os, sys, time; from pathlib import Path; from utils.core.lock import locked\n"
               "with locked(Path(sys.argv[1])):\n"
               "    if os.fork(): os.kill(os.getpid(), 9)\n"
               "    print('child', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE,
                          start_new_session=True) as process:
        assert process.stdout.readline() == b"child\n" and process.wait() == -signal.SIGKILL
        with locked(tmp_path):
            pass
        os.killpg(process.pid, signal.SIGKILL)


def test_a_folder_is_free_again_after_the_block(tmp_path):
    for _ in range(2):
        with locked(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"), locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_pointed_out(tmp_path, monkeypatch, caplog):
    import errno

    from utils.core import lock

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with locked(tmp_path):
        assert "No locks available" in caplog.text
