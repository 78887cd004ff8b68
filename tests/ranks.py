"""What each process of a test does: `torchrun ... tests/ranks.py FOLDER`, with the runs to do in FOLDER/runs.json."""
from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny import signal_at_step

import eval_imagenet
import train_imagenet
from utils.core import distributed
from utils.core.errors import STOPPED
from utils.evaluation import calibration
from utils.evaluation import modes as evaluation
from utils.training import trainer
from utils.training.engine import EpochMeters


def run_all(runs: list[dict], folder: Path) -> list[float]:
    """Do the runs one after the other; what `predict` returned in an evaluation is kept in FOLDER/<name>.pth.

    A run with `stop_at` gets a signal at that step. Leaves `predict` patched.

    Returns:
        A sum over the statistics of the network of every validation during training.
    """
    predict, seen, validated = evaluation.predict, [], []

    def validate(model, batches):
        validated.append(sum(b.sum().item() for name, b in model.named_buffers() if "running" in name))
        return predict(model, batches)

    trainer.predict = validate
    evaluation.predict = calibration.predict = lambda *arguments, **more: seen.append(predict(*arguments, **more)) or seen[-1]
    for run in runs:
        seen.clear()
        script = {"train": train_imagenet, "eval": eval_imagenet}[run["script"]]
        with pytest.MonkeyPatch.context() as patch:
            if "stop_at" in run:
                signal_at_step(patch, run["stop_at"])
            assert script.main(run["flags"]) == (STOPPED if "stop_at" in run else 0)
        if run["script"] == "eval" and distributed.is_main():
            kept = [{**p._asdict(), "details": p.details and p.details._asdict()} for p in seen]
            torch.save(kept, folder / f"{run['name']}.pth")
    return validated


def changed_paths(event: str, arguments: tuple) -> list[str]:
    """Paths that an event of Python's audit log writes to, moves or removes."""
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return []
    if event not in ("open", "os.mkdir", "os.remove", "os.rename", "os.link", "os.symlink"):
        return []
    return [os.fsdecode(path) for path in arguments[:2] if isinstance(path, (str, bytes)) and path not in ("r", "rb")]


def main() -> None:
    folder, changed = Path(sys.argv[1]), []
    sys.addaudithook(lambda event, arguments: changed.extend(changed_paths(event, arguments)))
    with distributed.process_group(torch.device("cpu")):
        # One group for all runs: torchrun's store still has the addresses of a group that was there before.
        train_imagenet.process_group = eval_imagenet.process_group = lambda *_: nullcontext()
        validated = run_all(json.loads((folder / "runs.json").read_text()), folder)
        meters, restored = (EpochMeters(1, torch.device("cpu")) for _ in range(2))
        meters.sums += distributed.rank() + 1
        meters.samples = 10 * (distributed.rank() + 1)
        restored.load_state_dict(meters.state_dict())
        report = {"changed": list(changed), "validated": validated, "world": distributed.world_size(),
                  "differences": distributed.differences({"one": "a", "number": distributed.rank()}),
                  "any": distributed.any_rank(distributed.rank() == 1), "none": distributed.any_rank(False),
                  "own": restored.samples, "train_loss": restored.summary()["train_loss"]}
        (folder / f"report{distributed.rank()}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
