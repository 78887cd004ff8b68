"""Several processes compute what one does, report a mistake once, end together, and go on from the last checkpoint."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
from tiny import differences, make_images, one_line_error, outcome
from torch import nn

import train_imagenet
from args import parse_args
from dataloader import build_data
from models import BoostedNet, MSDNet, grouped
from utils.core import distributed, errors
from utils.core.errors import UserError
from utils.core.lock import locked
from utils.core.machine import choose_device
from utils.core.signals import StopSignals
from utils.evaluation import modes as evaluation
from utils.options.network import NetworkSpec
from utils.runs import checkpoint
from utils.runs.restore import build_model
from utils.training import start as beginning
from utils.training import trainer

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = {
    "msdnet": "--arch msdnet_ge --nChannels 4 --nBlocks 2 --base 1 --step 1 --grFactor 1-2-4 --bnFactor 1-2-4",
    # Its last layers drop a scale at a depth where the finer scales of the layer before feed nothing any more.
    "unread": "--arch msdnet_ge --nChannels 4 --nBlocks 3 --base 2 --step 1 --grFactor 1-2-4 --bnFactor 1-2-4",
    "ranet": "--arch ranet_ge --nChannels 4 --nBlocks 1 --block-step 1 --step 1 --grFactor 4-2-1 --bnFactor 4-2-1",
    "chain": f"--arch {ROOT}/tests/small_chain.py:build",
}
RUNS = {"msdnet": "msdnet", "ranet": "ranet", "equalised": "unread --loss_equal", "equalised_ranet": "ranet --loss_equal",
        "distilled": "msdnet --method boost_distill", "chain": "chain", "frozen": "chain --freeze_backbone",
        "averaged": "msdnet --ema 0.6 --label_smoothing 0.1 --lr-type linear"}
OWN = {"own": "msdnet", "own_averaged": "msdnet --ema 0.6"}   # in which every process has statistics of its own images
MINUTE = 60
ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}   # torchrun's


def launch(world: int, *arguments: object, options: str = "", output: Path) -> subprocess.Popen:
    """Start torchrun, in a process group of its own, with all that is printed going to a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", *options.split(),
               *map(str, arguments)]
    with open(output, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def train_flags(images: Path, folder: Path, network: str, batch_size: int, *more: str) -> list[str]:
    """Flags of a run on 41 training images, which no batch size here divides; 7 are held out."""
    name, *rest = network.split()
    flags = (f"--dataset folder --data-root {images} --result_dir {folder} --use-valid --valid_size 7 --epochs 1 "
             f"--batch-size {batch_size} --lr_milestones 2 --lr_f 0.02 --print-freq 2 --device cpu {NETWORKS[name]}")
    return [*flags.split(), *rest, *more]


def eval_runs(images: Path, trained: Path, folder: Path) -> list[dict]:
    flags = f"--data-root {images} --evaluate-from {trained} --result_dir {folder} --batch-size 4 --device cpu".split()
    modes = {"anytime": ["--evalmode", "anytime"], "dynamic": ["--evalmode", "dynamic"],
             "calibrated": ["--evalmode", "dynamic", "--calibrate"]}
    return [{"script": "eval", "name": name, "flags": [*flags, *mode]} for name, mode in modes.items()]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), test=7)


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory) -> Path:
    """Folder of runs in this one process, in batches of 6."""
    folder = tmp_path_factory.mktemp("alone")
    runs = [{"script": "train", "flags": train_flags(images, folder / name, network, 6)} for name, network in RUNS.items()]
    with pytest.MonkeyPatch.context() as patch:   # puts back what run_all replaces
        patch.setattr(nn.BatchNorm2d, "forward", nn.BatchNorm2d.forward)
        for module in (trainer, evaluation):
            patch.setattr(module, "predict", module.predict)
        patch.setattr(grouped, "run_bottlenecks", grouped.run_bottlenecks)
        ranks.run_all([*runs, *eval_runs(images, folder / "msdnet/model_best.pth", folder)], folder)
    return folder


@pytest.fixture(scope="module")
def together(images, alone, tmp_path_factory) -> Path:
    """Folder of the same runs in two processes, in batches of 3 each, and of the evaluation of the same checkpoint."""
    folder = tmp_path_factory.mktemp("together")
    runs = [{"script": "train", "flags": train_flags(images, folder / name, network, 3)} for name, network in RUNS.items()]
    runs += [{"script": "train", "flags": train_flags(images, folder / name, network, 3), "own_statistics": True}
             for name, network in OWN.items()]
    run_ranks(2, [*runs, *eval_runs(images, alone / "msdnet/model_best.pth", folder)], folder)
    return folder


def run_ranks(world: int, runs: list[dict], folder: Path) -> None:
    (folder / "runs.json").write_text(json.dumps(runs))
    job = launch(world, ROOT / "tests/ranks.py", folder, output=folder / "output")
    try:
        assert job.wait(5 * MINUTE) == 0, (folder / "output").read_text()
    finally:
        end(job)


def end(job: subprocess.Popen) -> None:
    """End what may be left of a job: torchrun gives every process it starts a group of its own."""
    for pid in [*children(job), job.pid] if job.poll() is None else []:
        os.killpg(pid, signal.SIGKILL)
    job.wait()


def children(job: subprocess.Popen) -> list[int]:
    return [int(pid) for path in Path(f"/proc/{job.pid}/task").glob("*/children") for pid in path.read_text().split()]


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_to_the_same_network_as_one(alone, together, run):
    """Losses, accuracies and parameters; the last of the seven batches has five images, two of them on the first rank."""
    one, two = (checkpoint.load(folder / run / checkpoint.LATEST) for folder in (alone, together))
    start = build_model(NetworkSpec.from_args(_args(run))).backbone.state_dict()
    assert max((one["state_dict"][name] - start[name]).abs().max() for name in start) > 0.01   # it did move
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two["training"]["objective"], one["training"]["objective"], rtol=1e-5, atol=0)
    results = [json.loads((folder / run / "results.json").read_text()) for folder in (alone, together)]
    for name in ("train_loss", "train_top1", "valid_top1"):
        first, second = (result["epochs"][0][name] for result in results)
        assert second == pytest.approx(first, rel=1e-5), name
    for name in ("top1", "top5"):
        assert results[0]["test"][name] == results[1]["test"][name]


def _args(run: str):
    torch.manual_seed(0)
    args = parse_args(train_flags(Path("d"), Path("r"), RUNS[run], 3))
    args.num_classes = 3
    return args


def test_a_network_of_these_runs_has_layers_that_no_exit_reads():
    net = build_model(NetworkSpec.from_args(_args("equalised")))
    sum(p.sum() for p in net(torch.randn(2, 3, 32, 32))).backward()
    assert any(parameter.grad is None for parameter in net.parameters())


def check_evaluation(alone: Path, folder: Path) -> None:
    for name in ("anytime", "dynamic"):
        one, several = (torch.load(path / f"{name}.pth") for path in (alone, folder))
        assert len(one) == len(several) == (1 if name == "anytime" else 2)
        for a, b in zip(one, several):
            assert all(torch.equal(a[key], b[key]) for key in ("confidence", "correct", "top5"))
            assert (a["details"] is not None) is (name == "anytime")
            assert all(torch.equal(value, b["details"][key]) for key, value in (a["details"] or {}).items())
    for name in ("any.txt", "dynamic.txt", "dynamic_calibrated.txt"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes()
    one, several = (json.loads((path / "dynamic_calibrated.json").read_text()) for path in (alone, folder))
    assert several["calibration"] == one["calibration"] and several["points"] == one["points"]


def test_two_processes_evaluate_to_the_last_bit_as_one(alone, together):
    check_evaluation(alone, together)


@pytest.mark.slow
def test_three_processes_evaluate_to_the_last_bit_as_one(images, alone, tmp_path):
    run_ranks(3, eval_runs(images, alone / "msdnet/model_best.pth", tmp_path), tmp_path)
    check_evaluation(alone, tmp_path)


def test_only_the_first_process_writes(together):
    first, second = (json.loads((together / f"report{rank}.json").read_text())["changed"] for rank in (0, 1))
    for name in ("model_latest.pth", "model_best.pth", "results.json", "train.log", "split.pth", "any.txt"):
        assert any(name in path for path in first), name
    assert not [path for path in second if path.startswith(str(together)) or not path.startswith("/")]


def test_all_processes_get_the_same_answers(together):
    for rank in (0, 1):
        report = json.loads((together / f"report{rank}.json").read_text())
        assert (report["world"], report["any"], report["none"]) == (2, True, False)
        assert report["differences"] == {"number": [0, 1]}


def test_the_sums_of_an_epoch_are_saved_and_restored_for_each_process(together):
    reports = [json.loads((together / f"report{rank}.json").read_text()) for rank in (0, 1)]
    assert [report["own"] for report in reports] == [10, 20]
    assert all(report["train_loss"] == [pytest.approx((1 + 2) / 30)] for report in reports)


def test_all_processes_validate_the_network_that_is_saved(together):
    """Each normalises its training images by their own statistics; for the hold-out those of the first one count."""
    first, second = (json.loads((together / f"report{rank}.json").read_text())["validated"] for rank in (0, 1))
    assert first == second and len(first) == len(RUNS) + len(OWN)
    for run, validated in zip(OWN, first[-len(OWN):], strict=True):
        saved = checkpoint.load(together / run / checkpoint.LATEST)["state_dict"]
        total = sum(tensor.sum().item() for name, tensor in saved.items() if "running" in name)
        assert validated == pytest.approx(total, rel=1e-6)


def test_what_many_processes_print_comes_once(together):
    output = (together / "output").read_text()
    assert output.count("epoch 1/1  lr") == len(RUNS) + len(OWN) and output.count("Budgeted batch") == 1


class Recorder(nn.Module):
    def __init__(self, module, **options):
        super().__init__()
        self.module, self.options = module, options


def test_on_gpus_normalisation_is_synchronised_and_keeps_names_and_parameters(monkeypatch):
    """The conversion alone: such a layer refuses to run on the CPU."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "DistributedDataParallel", Recorder)
    model = BoostedNet(MSDNet(n_blocks=2, n_channels=4, base=1), [0.5, 0.5])
    names, parameters = list(model.state_dict()), list(model.parameters())
    wrapped = distributed.wrap(model, torch.device("cuda", 1))
    assert wrapped.module is model and wrapped.options == {"device_ids": [1], "find_unused_parameters": True}
    kinds = {type(module) for module in model.modules()}
    assert nn.SyncBatchNorm in kinds and nn.BatchNorm2d not in kinds
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))   # those an optimizer already has
    model = BoostedNet(MSDNet(n_blocks=2, n_channels=4, base=1), [0.5, 0.5])
    assert distributed.wrap(model, torch.device("cpu")).options == {"device_ids": None, "find_unused_parameters": True}
    assert nn.SyncBatchNorm not in {type(module) for module in model.modules()}


def test_every_process_gets_a_gpu_of_its_own(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device("auto", "2") == torch.device("cuda", 2)   # no torchrun
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_device("auto", "3,1,0") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 2), torch.device("cuda", 1)]
    assert choose_device("cpu", "0,1") == torch.device("cpu") and len(current) == 2
    with pytest.raises(UserError, match="--gpu 0,1"):
        choose_device("auto", "0")
    with pytest.raises(UserError, match="no device 7"):
        choose_device("auto", "0,7")


@pytest.mark.parametrize(("world", "fresh"), [(2, True), (4, False)])
def test_restarted_processes_on_one_machine_find_no_addresses_of_dead_ones(monkeypatch, world, fresh):
    """torchrun keeps its store. On several machines the number of a start may differ, so that it cannot tell starts apart."""
    kept, stores = torch.distributed.HashStore(), []
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(kept, 0, world)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, store, **__: stores.append(store))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for name, value in {**ENVIRONMENT, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for start in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        with distributed.process_group(torch.device("cpu")):
            pass
    stores[0].set("address", "127.0.0.1")
    assert stores[1].check(["address"]) == (not fresh)


@pytest.fixture
def second_of_two(monkeypatch):
    """This process is the second one; returns the store that both use."""
    store = torch.distributed.HashStore()
    for name, value in (("world_size", lambda: 2), ("rank", lambda: 1), ("_store", store), ("_turns", 0), ("POLL_S", 0.01)):
        monkeypatch.setattr(distributed, name, value)
    return store


def test_the_other_processes_wait_for_the_first_one_to_prepare_the_data(second_of_two, monkeypatch):
    order = []

    def prepare():
        order.append("first")
        second_of_two.set("turn1", "")

    timer = threading.Timer(0.3, prepare)
    timer.start()
    assert distributed.first_rank_first(lambda: order.append("second") or 7) == 7 and order == ["first", "second"]
    monkeypatch.setattr(distributed, "PATIENCE_S", 0)
    with pytest.raises(UserError, match="first process has not prepared the data"):
        distributed.first_rank_first(lambda: pytest.fail("read too early"))


def test_a_signal_is_answered_while_a_process_waits_for_the_first_one(second_of_two):
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    with StopSignals(begun=False), pytest.raises(SystemExit):
        distributed.first_rank_first(lambda: pytest.fail("read too early"))


def test_the_first_process_lets_the_others_go_on_when_it_fails_as_well(second_of_two, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    for turn in (1, 2):
        assert not second_of_two.check([f"turn{turn}"])
        with pytest.raises(ZeroDivisionError):
            distributed.first_rank_first(lambda: 1 // 0)
        assert second_of_two.check([f"turn{turn}"])


def test_a_backend_that_the_device_cannot_use_is_refused(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="needs GPUs"), distributed.process_group(torch.device("cpu"), "nccl"):
        pass


@pytest.mark.parametrize(("variables", "message"), [
    ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE in the environment, but not MASTER_ADDR and MASTER_PORT"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE in the environment, but not RANK and"),
    ({**ENVIRONMENT, "RANK": "2"}, "RANK=2 in the environment, but with WORLD_SIZE=2 the processes are numbered from 0 to 1"),
    ({**ENVIRONMENT, "RANK": "first"}, "cannot find each other with RANK=first, WORLD_SIZE=2"),
])
def test_an_environment_that_is_not_torchruns_is_refused_with_one_line(images, tmp_path, monkeypatch, capsys, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(errors.time, "sleep", lambda _: None)
    line = train_flags(images, tmp_path, "msdnet", 6)
    assert message in one_line_error(capsys, lambda: train_imagenet.main(line))


def test_copies_that_a_scheduler_starts_are_told_about_torchrun(monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "1")
    for tasks, warned in (("1", False), ("4", True)):
        monkeypatch.setenv("SLURM_NTASKS", tasks)
        with distributed.process_group(torch.device("cpu")):
            assert ("torchrun" in caplog.text) == warned


def test_processes_started_by_different_commands_are_refused(monkeypatch):
    """Everything but paths and loaders counts: another rate, seed or print frequency would pass silently or hang."""
    compared = []
    monkeypatch.setattr(distributed, "differences", lambda values: compared.append(values) or {"lr_f": [0.1, 0.2]})
    args = parse_args(["--result_dir", "r", "--teacher", "t.pth", "--method", "boost_distill"])
    with pytest.raises(UserError, match="different commands: lr_f is 0.1 and 0.2"):
        beginning.require_same_flags(args)
    free = {"result_dir", "tensorboard_dir", "data_root", "checkpoint", "teacher", "workers", "val_workers", "gpu", "threads",
            "distributed", "local_rank", "bnAfter"}
    assert set(vars(args)) - set(compared[0]) == free | {"explicit"} and compared[0]["print_freq"] == 10


def test_processes_that_would_train_something_else_are_refused(images, monkeypatch):
    """One hold-out per machine, or another teacher under the same path."""
    data, redrawn = (build_data(dataset="folder", data_root=images, use_valid=True, valid_size=7, seed=n) for n in (1, 2))
    model = BoostedNet(MSDNet(n_blocks=2, n_channels=4, base=1), [0.5, 0.5])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    seen = []
    monkeypatch.setattr(distributed, "differences", lambda values: seen.append(values) or {})
    same = {"saved": None, "data": data, "model": model, "teacher_hash": "a"}
    others = {"the checkpoint to go on from": {"saved": {"epoch": 1, "training": {"figures": {"steps": 2}}}},
              "the hold-out split": {"data": redrawn},
              "the weights to begin with": {"model": BoostedNet(MSDNet(n_blocks=2, n_channels=4, base=1), [0.5, 0.5])},
              "the teacher": {"teacher_hash": "b"}}
    for name, other in others.items():
        seen.clear()
        beginning.require_same_start(**same)
        beginning.require_same_start(**same | other)
        assert [key for key in seen[0] if seen[0][key] != seen[1][key]] == [name]
    monkeypatch.setattr(distributed, "differences", lambda values: {"the teacher": ["a", "b"]})
    with pytest.raises(UserError, match="differ in the teacher"):
        beginning.require_same_start(None, data, model, "a")


def test_all_processes_but_the_first_wait_before_they_report_a_mistake(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(errors.time, "sleep", waits.append)
    for rank, count in (("0", 0), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        errors.fail(UserError("bad"))
        with pytest.raises(SystemExit):
            parse_args(["--epochs", "0"])
        assert len(waits) == 2 * count
    monkeypatch.delenv("RANK")
    errors.fail(UserError("bad"))
    assert len(waits) == 2 and capsys.readouterr().err.count("error: bad") == 3


# ---- Whole jobs, as a user starts them.


@pytest.fixture
def start(images, tmp_path):
    """Starts train_imagenet.py in two processes: start(*flags, options=...) returns (torchrun, file of its output)."""
    jobs = []

    def start_job(*flags: str, options: str = "") -> tuple[subprocess.Popen, Path]:
        output = tmp_path / f"output{len(jobs)}"
        jobs.append(launch(2, "train_imagenet.py", *train_flags(images, tmp_path / "run", "msdnet", 3, *flags), options=options,
                           output=output))
        return jobs[-1], output

    yield start_job
    for job in jobs:
        end(job)


def wait_until(happened: Callable[[], bool], job: subprocess.Popen, output: Path) -> None:
    deadline = time.monotonic() + 3 * MINUTE
    while not happened():
        assert job.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)


def kill_rank(job: subprocess.Popen, rank: int) -> None:
    [victim] = [pid for pid in children(job)
                if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    os.kill(victim, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job_with_an_error_within_a_minute(start, tmp_path, rank):
    job, output = start("--epochs", "100000")
    wait_until((tmp_path / "run" / checkpoint.PREVIOUS).exists, job, output)
    kill_rank(job, rank)
    assert job.wait(MINUTE) != 0
    assert "SIGKILL" in output.read_text()
    assert checkpoint.load_latest(tmp_path / "run")["epoch"] >= 1


@pytest.mark.slow
def test_a_restarted_and_resumed_job_ends_with_the_bits_of_one_that_never_stopped(start, images, tmp_path):
    """A process is killed and torchrun starts all again; then torchrun is told to stop; then the job is started anew."""
    folder, previous = tmp_path / "run", tmp_path / "run" / checkpoint.PREVIOUS
    small = ("--batch-size", "1")   # so that epochs have many steps, and it most likely stops in the middle of one
    job, output = start("--epochs", "100000", *small, "--resume", options="--max-restarts=1")
    wait_until(previous.exists, job, output)
    kill_rank(job, 1)
    wait_until(lambda: "resuming at" in output.read_text(), job, output)
    previous.unlink()   # there again as soon as the restarted processes have saved
    wait_until(previous.exists, job, output)
    job.send_signal(signal.SIGTERM)
    job.wait(MINUTE)
    assert "SIGTERM: stopped at" in output.read_text()
    epochs = str(checkpoint.load(folder / checkpoint.LATEST)["epoch"] + 1)
    job, output = start("--epochs", epochs, *small, "--resume")
    assert job.wait(3 * MINUTE) == 0, output.read_text()
    broken = outcome(folder)
    folder.rename(tmp_path / "broken")
    job, output = start("--epochs", epochs, *small)
    assert job.wait(3 * MINUTE) == 0, output.read_text()
    assert not list(differences(broken, outcome(folder)))


@pytest.mark.slow
def test_four_processes_resume_to_the_same_bits(images, tmp_path):
    """More than two terms have an order, which must not depend on how often a run was started."""
    starts = (("whole", "--epochs", "2"), ("cut", "--epochs", "1"), ("cut", "--epochs", "2", "--resume"))
    run_ranks(4, [{"script": "train", "flags": train_flags(images, tmp_path / name, "msdnet", 2, *more), "own_statistics": True}
                  for name, *more in starts], tmp_path)
    assert not list(differences(outcome(tmp_path / "cut"), outcome(tmp_path / "whole")))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["folder in use", "no data", "bad flag"])
def test_a_mistake_ends_all_processes_at_once_with_one_line(start, tmp_path, mistake):
    (tmp_path / "run").mkdir()
    flags = {"folder in use": [], "no data": ["--data-root", str(tmp_path / "nowhere")], "bad flag": ["--epochs", "0"]}[mistake]
    with locked(tmp_path / ("run" if mistake == "folder in use" else ".")):
        job, output = start(*flags)
        assert job.wait(2 * MINUTE) != 0
    text = output.read_text()
    assert text.count("train_imagenet.py: error:") == 1, text
    assert "exitcode  : 2" in text and "rank0]: Traceback" not in text and "rank1]: Traceback" not in text
