"""Several processes compute what one does, report a mistake once, end together, and go on from the last checkpoint."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import ranks
import torch
from in_turn import InTurn
from jobs import MINUTE, ROOT, end, finish, kill_rank, launch, wait_until
from tiny import differences, make_images, one_line_error, outcome
from torch import nn

import eval_cifar100
import train_cifar100
import train_imagenet
from args import parse_args
from dataloader import build_data
from models import BoostedNet, MSDNet
from utils.core import distributed, errors
from utils.core.errors import UserError
from utils.core.lock import locked
from utils.core.machine import choose_device
from utils.core.rng import seed_all
from utils.core.signals import StopSignals
from utils.evaluation import calibration
from utils.evaluation import modes as evaluation
from utils.evaluation.predict import predict
from utils.methods import build_method
from utils.options.network import NetworkSpec
from utils.runs import checkpoint
from utils.runs.restore import build_model
from utils.training import start as beginning
from utils.training import trainer
from utils.training.average import WeightAverage
from utils.training.engine import EpochMeters
from utils.training.fast_forward import training_forward
from utils.training.optim import Schedule, build_optimizer

NETWORKS = {
    "msdnet": "--arch msdnet_ge --nChannels 4 --nBlocks 2 --base 1 --step 1 --grFactor 1-2-4 --bnFactor 1-2-4",
    # Its last layers drop a scale at a depth where the finer scales of the layer before feed nothing any more.
    "unread": "--arch msdnet_ge --nChannels 4 --nBlocks 3 --base 2 --step 1 --grFactor 1-2-4 --bnFactor 1-2-4",
    "ranet": "--arch ranet_ge --nChannels 4 --nBlocks 1 --block-step 1 --step 1 --grFactor 4-2-1 --bnFactor 4-2-1",
    "chain": f"--arch {ROOT}/tests/small_chain.py:build",
}
RUNS = {"msdnet": "msdnet", "ranet": "ranet", "equalised": "unread --loss_equal", "distilled": "msdnet --method boost_distill",
        "l2w": "unread --method l2w --meta_net_hidden_size 8", "block_losses": "ranet --method block_losses --overlap 1",
        "chain": "chain", "frozen": "chain --freeze_backbone --method l2w --meta_net_hidden_size 8",
        "averaged": "msdnet --ema 0.6 --label_smoothing 0.1 --lr-type linear"}
ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}   # torchrun's


def train_flags(images: Path, folder: Path, network: str, batch_size: int, *more: str) -> list[str]:
    """Flags of a run on 41 training images, which no batch size here divides; 7 are held out."""
    name, *rest = network.split()
    flags = (f"--dataset folder --data-root {images} --result_dir {folder} --use-valid --valid_size 7 --epochs 1 "
             f"--batch-size {batch_size} --lr_milestones 2 --lr_f 0.02 --print-freq 2 --device cpu {NETWORKS[name]}")
    return [*flags.split(), *rest, *more]


def eval_runs(images: Path, trained: Path, folder: Path) -> list[dict]:
    """Evaluations, in batches that leave no process with a single image at the end: that is computed by other kernels."""
    flags = f"--data-root {images} --evaluate-from {trained} --result_dir {folder} --batch-size 5 --device cpu".split()
    modes = {"anytime": ["--evalmode", "anytime"], "dynamic": ["--evalmode", "dynamic"],
             "calibrated": ["--evalmode", "dynamic", "--calibrate"]}
    return [{"script": "eval", "name": name, "flags": [*flags, *mode]} for name, mode in modes.items()]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), test=5)


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory) -> Path:
    """Folder of a run in this one process, and of its evaluation."""
    folder = tmp_path_factory.mktemp("alone")
    runs = [{"script": "train", "flags": train_flags(images, folder / "msdnet", "msdnet", 6)}]
    with pytest.MonkeyPatch.context() as patch:   # puts back what run_all replaces
        for module in (trainer, evaluation, calibration):
            patch.setattr(module, "predict", module.predict)
        ranks.run_all([*runs, *eval_runs(images, folder / "msdnet/model_best.pth", folder)], folder)
    return folder


@pytest.fixture(scope="module")
def together(images, alone, tmp_path_factory) -> Path:
    """Folder of runs in two processes, in batches of 3 each, and of the evaluation of the checkpoint of `alone`."""
    folder = tmp_path_factory.mktemp("together")
    runs = [{"script": "train", "flags": train_flags(images, folder / name, network, 3)} for name, network in RUNS.items()]
    run_ranks(2, [*runs, *eval_runs(images, alone / "msdnet/model_best.pth", folder)], folder)
    return folder


def run_ranks(world: int, runs: list[dict], folder: Path) -> None:
    (folder / "runs.json").write_text(json.dumps(runs))
    finish(launch(world, ROOT / "tests/ranks.py", folder, output=folder / "output"), folder / "output")


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_as_their_parts_of_each_batch_do_one_after_the_other(images, together, run):
    """Losses, accuracies, parameters, statistics of the first; the last of the seven batches has parts of 2 and 3 images."""
    args = parse_args(train_flags(images, Path("r"), RUNS[run], 3))
    args.num_classes = 3
    data, *each = (build_data(dataset="folder", data_root=images, use_valid=True, valid_size=7, batch_size=3, rank=rank,
                              world=world) for rank, world in ((0, 1), (0, 2), (1, 2)))
    seed_all(args.seed)
    model = build_model(NetworkSpec.from_args(args)).train()
    if args.freeze_backbone:
        model.backbone.freeze()
    start = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    optimizer = build_optimizer(model.backbone, name="sgd", lr=args.lr_f, momentum=0.9, weight_decay=args.weight_decay)
    schedule = Schedule(args.lr_type, args.lr_f, 1)
    method = build_method(args, model, optimizer, network=training_forward(model, batch_size=3))
    in_turn, meters = InTurn(method, 2), EpochMeters(model.n_exits, torch.device("cpu"))
    average = WeightAverage(model, args.ema) if args.ema else None
    for i, parts in enumerate(zip(*(one.train(0) for one in each), strict=True)):
        for one, rate in ((optimizer, schedule), *((o, schedule.cosine(o.defaults["lr"])) for o in method.other_optimizers)):
            one.param_groups[0]["lr"] = rate(i / 7)
        for outcome_ in in_turn.step(parts):
            meters.add(outcome_.predictions, outcome_.labels, outcome_.per_sample)
        with in_turn.own_buffers(0):
            if average:
                average.update()
    judged = average.model if average else model
    with in_turn.own_buffers(0):
        weights, kept = model.backbone.state_dict(), judged.backbone.state_dict()
        valid_top1 = predict(judged, data.valid()).top1

    saved = checkpoint.load(together / run / checkpoint.LATEST)
    assert max((weights[name] - start[name]).abs().max() for name in start if "running" not in name) > 0.01
    torch.testing.assert_close(saved["state_dict"], kept, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(saved["training"].get("weights", saved["state_dict"]), weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(saved["training"]["objective"]["average"], method.objective.average, rtol=1e-5, atol=0)
    [entry] = json.loads((together / run / "results.json").read_text())["epochs"]
    for name, value in (*meters.summary().items(), ("valid_top1", valid_top1)):
        if name != "valid_share":   # depends on which samples are looked at together
            assert entry[name] == pytest.approx(value, rel=1e-5), name


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
    assert first == second and len(first) == len(RUNS)
    for run, validated in zip(RUNS, first, strict=True):
        saved = checkpoint.load(together / run / checkpoint.LATEST)["state_dict"]
        total = sum(tensor.sum().item() for name, tensor in saved.items() if "running" in name)
        assert validated == pytest.approx(total, rel=1e-6)


def test_what_many_processes_print_comes_once(together):
    output = (together / "output").read_text()
    assert output.count("epoch 1/1  lr") == len(RUNS) and output.count("Budgeted batch") == 2


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


def test_a_process_that_others_have_left_can_be_ended_while_it_waits_for_their_errors(monkeypatch):
    """Without a traceback, and without the news that it will finish its step."""
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 1, 2)]))
    for name, value in {**ENVIRONMENT, "RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    handlers = []
    monkeypatch.setattr(errors.time, "sleep", lambda _: handlers.append(signal.getsignal(signal.SIGTERM)))
    with StopSignals():
        noting = signal.getsignal(signal.SIGTERM)
        with pytest.raises(RuntimeError), distributed.process_group(torch.device("cpu")):
            raise RuntimeError("Connection closed by peer")
        assert handlers == [signal.SIG_DFL] != [noting] and signal.getsignal(signal.SIGTERM) == noting


def test_copies_that_a_scheduler_starts_are_told_about_torchrun(monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "1")
    for tasks, warned in (("1", False), ("4", True)):
        monkeypatch.setenv("SLURM_NTASKS", tasks)
        with distributed.process_group(torch.device("cpu")):
            assert ("torchrun" in caplog.text) == warned
        distributed.refuse_other_processes("train_imagenet.py")
        assert ("use train_imagenet.py" in caplog.text) == warned


@pytest.mark.parametrize(("program", "flags"), [("train", "--result_dir r"), ("eval", "--evaluate-from no.pth")])
def test_a_program_for_one_process_refuses_to_be_one_of_several(monkeypatch, tmp_path, capsys, program, flags):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.chdir(tmp_path)
    main = {"train": train_cifar100, "eval": eval_cifar100}[program].main
    message = one_line_error(capsys, lambda: main(flags.split()))
    assert "WORLD_SIZE=4" in message and f"{program}_imagenet.py runs in several processes" in message
    assert not list(tmp_path.iterdir())


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


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "method"), [(0, "boost"), (1, "boost"), (0, "l2w"), (1, "block_losses --overlap 1")])
def test_a_killed_process_ends_the_job_with_an_error_within_a_minute(start, tmp_path, rank, method):
    job, output = start("--epochs", "100000", "--method", *method.split())
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
    run_ranks(4, [{"script": "train", "flags": train_flags(images, tmp_path / name, "msdnet", 2, *more)}
                  for name, *more in starts], tmp_path)
    assert not list(differences(outcome(tmp_path / "cut"), outcome(tmp_path / "whole")))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["l2w --lr-type cosine", "block_losses --overlap 1", "imta --checkpoint {joint}"])
def test_a_run_of_any_method_stopped_in_mid_epoch_ends_as_if_it_had_not_been(images, tmp_path, method):
    joint = {"script": "train", "flags": train_flags(images, tmp_path / "joint", "msdnet", 6, "--method", "joint")}
    more = ["--method", *method.format(joint=tmp_path / "joint" / checkpoint.LATEST).split(), "--epochs", "2"]
    whole, cut = (train_flags(images, tmp_path / name, "msdnet", 3, *more) for name in ("whole", "cut"))
    again = [*cut[:cut.index("--checkpoint")], "--epochs", "2"] if "--checkpoint" in cut else cut
    run_ranks(2, [joint, {"script": "train", "flags": whole}, {"script": "train", "flags": cut, "stop_at": 9},
                  {"script": "train", "flags": [*again, "--resume"]}], tmp_path)
    assert "stopped at step 2 of epoch 2" in (tmp_path / "cut/train.log").read_text()
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
