"""Early exit against the whole network, on PyTorch and on ONNX Runtime: images/s, and the latency of single images."""
from __future__ import annotations

import tempfile
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptive_inference import exit_shares, fit_thresholds, solve_exit_rate
from models import Backbone, BoostedNet, MSDNet, RANet
from op_counter import measure_model
from utils.benchmarks.measure import Measurement, count
from utils.benchmarks.openvino import PRECISIONS, OpenVinoPrograms, require_openvino
from utils.core.errors import UserError
from utils.core.log import echo
from utils.core.tables import Table
from utils.evaluation.fast_form import FORMS, default_form, load_model
from utils.evaluation.onnx_exit import OnnxPrograms, has_shared_pool, use_all_cores
from utils.evaluation.programs import require_onnx, write_folder
from utils.evaluation.runtime import OnnxRuntime, Runtime, TorchRuntime
from utils.options.parser import list_of, number

# The paper's networks for anytime prediction on CIFAR-100.
NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "msdnet10": lambda: MSDNet(n_blocks=10, n_channels=16, base=4, step=2),
    "ranet8": lambda: RANet(n_blocks=2, n_channels=16, step=4, scale_list=[1, 2, 3, 3], gr_factor=[4, 2, 1, 1],
                            bn_factor=[4, 2, 1, 1]),
}
PERCENTILES = (50, 95, 99)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--network", type=list_of(network, ",", "msdnet10,ranet8"), default=list(NETWORKS), metavar="NAME[,NAME]",
                        help=f"{' and '.join(NETWORKS)}, with weights drawn at random (default: both)")
    parser.add_argument("--checkpoint", metavar="FILE", help="a trained network instead; it classifies noise all the same")
    parser.add_argument("--form", choices=FORMS, help="of PyTorch's network; default: growing on the CPU, folded on a GPU")
    parser.add_argument("--batch-sizes", type=list_of(count, ",", "1,64"), default="1,8,64,256", metavar="N[,N]")
    parser.add_argument("--budgets", type=list_of(share, ",", "0.2,0.8"), default="0.2,0.35,0.5,0.65,0.8", metavar="X[,X]",
                        help="shares of the MACs of the whole network (default: %(default)s)")
    parser.add_argument("--images", type=count, default=256, help="classified per repeat and batch size (default: %(default)s)")
    parser.add_argument("--openvino", action="store_true", help="run the ONNX programs on OpenVINO too, where it is installed")


def network(text: str) -> str:
    if text not in NETWORKS:
        raise ArgumentTypeError(f"unknown network {text!r}; choose from {', '.join(NETWORKS)}")
    return text


def share(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


class Way(NamedTuple):
    """A way to run a network.

    Attributes:
        full: runs all exits on a batch of images.
        runtime: runs early exit; None where there is none.
        in_steps: whether `runtime.exit_times` is the time of `full` in parts.
    """

    full: Callable[[Tensor], Any]
    runtime: Runtime | None = None
    in_steps: bool = True


class Variant(NamedTuple):
    """What is timed: a way to run the network, with all exits or (with a budget, a share of all MACs) with early exit."""

    way: str
    call: Callable[[Tensor], Any]
    budget: float | None = None

    @property
    def name(self) -> str:
        return f"{'all exits' if self.budget is None else f'early exit at {self.budget:g}'}, {self.way}"


def run(args: Namespace, device: torch.device) -> list[Measurement]:
    """Thresholds are fitted on the very images that are classified, so that the shares come out as prescribed."""
    networks, results = list(_networks(args, device)), []
    for network_ in networks:
        least = network_.macs[0] / network_.macs[-1]
        if min(args.budgets) < least:
            raise UserError(f"--budgets {min(args.budgets):g}: the first exit of {network_.name} alone takes {least:.3g} of all "
                            "MACs")
    with tempfile.TemporaryDirectory() as folder:
        for network_, ways in zip(networks, _ways(networks, args, device, Path(folder))):
            images = torch.randn(args.images, 3, network_.side, network_.side, generator=torch.Generator().manual_seed(1))
            images = images.to(device)
            variants = [Variant(name, way.full) for name, way in ways.items()] + _early(network_, ways, args.budgets, images)
            for size in args.batch_sizes:
                config = {"network": network_.name, "form": args.form or default_form(network_.model), "images": args.images,
                          "batch size": size}
                results += _measure(variants, ways, network_.macs, images.split(size), args.repeats, config)
    return results


class Network(NamedTuple):
    """A network in eval mode, the side of its images and the (n_exits,) MACs of its exits."""

    name: str
    model: BoostedNet
    side: int
    macs: np.ndarray


def _networks(args: Namespace, device: torch.device) -> Iterator[Network]:
    if args.checkpoint:
        model, saved = load_model(args.checkpoint)
        side = saved["architecture"]["image_size"]
        yield Network(args.checkpoint, model.to(device), side, np.asarray(measure_model(model, side, side)[0], np.float64))
        return
    for name in args.network:
        torch.manual_seed(0)
        backbone = NETWORKS[name]()
        backbone.train()
        with torch.no_grad():   # statistics as after training: every feature of mean 0 and variance 1
            for _ in range(10):
                backbone(torch.randn(64, 3, 32, 32))
        model = BoostedNet(backbone, [0.5] * backbone.n_exits).to(device).eval()
        yield Network(name, model, 32, np.asarray(measure_model(model, 32, 32)[0], np.float64))


def _ways(networks: Sequence[Network], args: Namespace, device: torch.device, folder: Path) -> list[dict[str, Way]]:
    """For each network all ways to run it here; a line for each way that cannot be had."""
    threads, ways = torch.get_num_threads(), []
    for network_ in networks:
        ready = TorchRuntime(network_.model, form=args.form)
        ways.append({"PyTorch eager": Way(network_.model), "PyTorch": Way(ready.network, ready)})
    try:
        if device.type != "cpu":
            raise UserError("ONNX Runtime is measured on the CPU only")
        require_onnx()
    except UserError as error:
        echo(f"without ONNX: {error}")
        return ways
    if args.openvino:
        require_openvino()
    echo("exporting all exits, and all of them in one file")
    exported = [_export(network_, folder / str(i)) for i, network_ in enumerate(networks)]
    # Both ways of `OnnxPrograms` to use the cores. After `use_all_cores` ONNX Runtime gives no program a thread of its own.
    in_slices = ([] if threads == 1 or has_shared_pool() else
                 [_on_programs(*(OnnxPrograms(part, threads) for part in parts), in_steps=False) for parts in exported])
    use_all_cores(threads)
    for i, (found, parts) in enumerate(zip(ways, exported)):
        found["ONNX"] = _on_programs(*map(OnnxPrograms, parts))
        if in_slices:
            found["ONNX in slices"] = in_slices[i]
        if args.openvino:
            for precision in PRECISIONS:
                found[f"OpenVINO {precision}"] = _on_programs(*(OpenVinoPrograms(part, threads, precision) for part in parts))
    return ways


def _export(network_: Network, folder: Path) -> tuple[Path, Path]:
    """Folders of ONNX programs: one per exit, and all exits in one."""
    about = {"architecture": {"arch": network_.name, "image_size": network_.side, "num_classes": 0}, "method": "boost",
             "dataset": "cifar100"}
    parts = {folder / "steps": network_.model, folder / "whole": BoostedNet(_OneStep(network_.model), [1.0])}
    for target, model in parts.items():
        for _ in write_folder(model, about, [], target, "onnx"):
            pass
    steps, whole = parts
    return steps, whole


class _OneStep(Backbone):
    """All exits of a network as one step, whose logits are the predictions of the last exit."""

    n_exits = 1

    def __init__(self, model: BoostedNet) -> None:
        super().__init__()
        self.model = model

    def start(self, x: Tensor) -> Tensor:
        return x

    def step(self, n: int, state: Tensor) -> tuple[Tensor, None]:
        return self.model(state)[-1], None


def _on_programs(steps: OnnxPrograms, whole: OnnxPrograms, *, in_steps: bool = True) -> Way:
    return Way(lambda images: whole.in_slices(lambda part: whole.step(0, [part]), images.numpy()), OnnxRuntime(steps), in_steps)


def _early(network_: Network, ways: dict[str, Way], budgets: Sequence[float], images: Tensor) -> list[Variant]:
    """Early exit at every budget, in every way that has it."""
    early = []
    certainty = {name: _certainty(way.runtime, images) for name, way in ways.items() if way.runtime}
    for budget in budgets:
        shares = exit_shares(solve_exit_rate(network_.macs, budget * network_.macs[-1]), len(network_.macs))
        for name, of_way in certainty.items():
            early.append(Variant(name, ways[name].runtime.early_exit(fit_thresholds(of_way, shares)), budget))
    return early


@torch.inference_mode()
def _certainty(runtime: Runtime, images: Tensor) -> Tensor:
    """(n_exits, N) float32, what is held against thresholds."""
    return torch.cat([runtime.measure(torch.stack(list(runtime.network(part)))) for part in images.split(64)], dim=1).cpu()


def _measure(variants: Sequence[Variant], ways: dict[str, Way], macs: np.ndarray, batches: Sequence[Tensor], repeats: int,
             config: dict[str, Any]) -> list[Measurement]:
    """Everything in every repeat, in turn, so that a slow moment of the machine meets all alike."""
    device, n_images = batches[0].device, sum(map(len, batches))
    seconds: dict[str, list[list[float]]] = {variant.name: [] for variant in variants}   # of every batch in every repeat
    steps = {name: way.runtime.exit_times for name, way in ways.items() if way.runtime and way.in_steps}
    steps_s: dict[str, list[np.ndarray]] = {way: [] for way in steps}
    for _ in range(repeats):
        for variant in variants:
            seconds[variant.name].append(_second_pass(lambda x, call=variant.call: _seconds(device, call, x), batches))
        for way, exit_times in steps.items():
            steps_s[way].append(np.sum(_second_pass(exit_times, batches), axis=0))
    totals = {name: np.sum(found, axis=1) for name, found in seconds.items()}
    # OpenVINO is no requirement, and thus not what others are held against.
    whole = [v.name for v in variants if v.budget is None and not v.way.startswith("OpenVINO")]
    fastest = min(whole, key=lambda name: float(np.median(totals[name])))
    results = []
    for variant in variants:
        total, details = totals[variant.name], {"way": variant.way, "budget": variant.budget, "fastest": fastest}
        details["ratio"] = float(np.median(totals[fastest] / total))
        if variant.budget is not None:
            exits = torch.cat([variant.call(x).exit for x in batches])
            left = np.bincount(exits.cpu().numpy(), minlength=len(macs)) / n_images
            details |= {"MACs share": float(left @ macs / macs[-1]), "exit share": left.tolist()}
            if variant.way in steps:
                predicted = np.cumsum(steps_s[variant.way], axis=1) @ left
                details["ratio without losses"] = float(np.median(totals[fastest] / predicted))
        elif variant.way in steps:
            details["step_ms"] = (1e3 * np.median(steps_s[variant.way], axis=0) / n_images).tolist()
        if config["batch size"] == 1:
            details |= {f"p{q} ms": float(np.percentile(seconds[variant.name], q) * 1e3) for q in PERCENTILES}
        results.append(Measurement(variant.name, tuple(n_images / total), "images/s", config, details))
    return results


def _second_pass(timed: Callable[[Tensor], Any], batches: Sequence[Tensor]) -> list[Any]:
    """The times of all batches in the second of two passes: code that the CPU's library has made for one network or the sizes of
    one budget is lost to the next.
    """
    for x in batches:
        timed(x)
    return [timed(x) for x in batches]


@torch.inference_mode()
def _seconds(device: torch.device, call: Callable[[Tensor], Any], x: Tensor) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def report(lines: Sequence[dict[str, Any]], where: str) -> str:
    """One table per network and batch size."""
    def key(line: dict[str, Any]) -> tuple[str, int]:
        return line["config"]["network"], line["config"]["batch size"]

    return "\n\n".join(_table([line for line in lines if key(line) == one], where) for one in dict.fromkeys(map(key, lines)))


def _table(lines: Sequence[dict[str, Any]], where: str) -> str:
    config = lines[0]["config"]
    title = (f"{config['network']} in batches of {config['batch size']}, {config['images']} images, PyTorch in its "
             f"{config['form']} form, medians of {lines[0]['n']}; {where}\nratio: to {lines[0]['fastest']}; without losses: if a "
             "row cost the same in a batch of any size and leaving cost nothing")
    percentiles = [name for name in lines[0] if name.startswith("p") and name.endswith(" ms")]
    formats = {"MACs share": ".3f", "median": ".0f", "ratio": ".2f", "ratio without losses": ".2f",
               **dict.fromkeys(percentiles, ".2f")}
    rows = [[line["name"], *(format(line[column], form) if column in line else "" for column, form in formats.items())]
            for line in lines]
    steps = [f"ms per image of every step, {line['way']}: {' '.join(f'{ms:.3g}' for ms in line['step_ms'])}"
             for line in lines if "step_ms" in line]
    columns = ["", "MACs share", "images/s", "ratio", "without losses", *percentiles]
    return Table(title, columns, rows, steps).text()
