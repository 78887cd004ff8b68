"""Early exit against running everything: shares of MACs and of time, images/s, latency of single images."""
from __future__ import annotations

import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_inference import exit_shares, fit_thresholds, solve_exit_rate
from models import BoostedNet, MSDNet, RANet
from op_counter import measure_model
from utils.benchmarks.measure import Measurement, count
from utils.core.tables import format_table
from utils.evaluation.early_exit import SIZES_PER_DOUBLING, EarlyExit
from utils.evaluation.fast_form import FORMS, default_form, exit_times, load_model, prepare_for_inference
from utils.options.parser import list_of, number

# The paper's networks for anytime prediction on CIFAR-100.
NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "msdnet10": lambda: MSDNet(n_blocks=10, n_channels=16, base=4, step=2),
    "ranet8": lambda: RANet(n_blocks=2, n_channels=16, step=4, scale_list=[1, 2, 3, 3], gr_factor=[4, 2, 1, 1],
                            bn_factor=[4, 2, 1, 1]),
}
SHARES = ("MACs share", "predicted", "realised")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--network", choices=NETWORKS, default="msdnet10", help="with weights drawn at random")
    parser.add_argument("--checkpoint", metavar="FILE", help="a trained network instead; it classifies noise all the same")
    parser.add_argument("--form", choices=("plain", *FORMS), help="default: growing on the CPU, folded on a GPU")
    parser.add_argument("--batch-sizes", type=list_of(count, ",", "1,64"), default="1,8,64,256", metavar="N[,N]")
    parser.add_argument("--budgets", type=list_of(share, ",", "0.1,0.8"), default="0.1,0.275,0.45,0.625,0.8", metavar="X[,X]",
                        help="shares of the way from the cost of the first exit to that of the last (default: %(default)s)")
    parser.add_argument("--images", type=count, default=256, help="classified per repeat and batch size (default: %(default)s)")
    parser.add_argument("--sizes-per-doubling", type=int, choices=(0, 1, 2, 4, 8, 16), default=SIZES_PER_DOUBLING,
                        help="sizes a batch may shrink to, between a number and its double; 0 allows every size (default: "
                             "%(default)s)")


def share(text: str) -> float:
    value = number(text)
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return value


def run(args: Namespace, device: torch.device) -> list[Measurement]:
    """Thresholds are fitted on the very images that are classified, so that the shares come out as prescribed."""
    name, model, side = _network(args, device)
    ready = model if args.form == "plain" else prepare_for_inference(model, args.form)
    macs = np.asarray(measure_model(model, side, side)[0], np.float64)
    images = torch.randn(args.images, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)
    confidence = _confidence(ready, images)
    runners = {}
    for fraction in args.budgets:
        shares = exit_shares(solve_exit_rate(macs, macs[0] + fraction * (macs[-1] - macs[0])), len(macs))
        runners[fraction] = EarlyExit(ready, fit_thresholds(confidence, shares),
                                      sizes_per_doubling=args.sizes_per_doubling or None)
    results = []
    for size in args.batch_sizes:
        config = {"network": name, "form": args.form or default_form(model), "images": args.images, "batch size": size}
        results += _measure(model, ready, runners, macs, images.split(size), args.repeats, config)
    return results


def _network(args: Namespace, device: torch.device) -> tuple[str, BoostedNet, int]:
    """Name, network in eval mode, side of its images."""
    if args.checkpoint:
        model, saved = load_model(args.checkpoint)
        return args.checkpoint, model.to(device).eval(), saved["architecture"]["image_size"]
    torch.manual_seed(0)
    backbone = NETWORKS[args.network]()
    backbone.train()
    with torch.no_grad():   # statistics as after training: every feature of mean 0 and variance 1
        for _ in range(10):
            backbone(torch.randn(64, 3, 32, 32))
    return args.network, BoostedNet(backbone, [0.5] * backbone.n_exits).to(device).eval(), 32


@torch.inference_mode()
def _confidence(model: BoostedNet, images: Tensor) -> Tensor:
    """(n_exits, N) float32."""
    return torch.cat([torch.stack([p.float() for p in model(part)]).softmax(dim=2).amax(dim=2) for part in images.split(64)],
                     dim=1)


def _measure(model: BoostedNet, ready: BoostedNet, runners: dict[float, EarlyExit], macs: np.ndarray,
             batches: Sequence[Tensor], repeats: int, config: dict[str, Any]) -> list[Measurement]:
    """Everything in every repeat, in turn, so that a slow moment of the machine meets all alike."""
    device, n_images = batches[0].device, sum(map(len, batches))
    plain_s, exits_s, latencies, shares = [], [], {f: [] for f in runners}, {}
    for fraction, runner in runners.items():
        left_at = torch.cat([runner(x).exit for x in batches])
        shares[fraction] = torch.bincount(left_at, minlength=len(macs)).double().cpu().numpy() / n_images
    for _ in range(repeats):
        plain_s.append(sum(_second_pass(lambda x: _seconds(device, model, x), batches)))
        exits_s.append(np.sum(_second_pass(lambda x: exit_times(ready, x), batches), axis=0))
        for fraction, runner in runners.items():
            latencies[fraction].append(_second_pass(lambda x, runner=runner: _seconds(device, runner, x), batches))
    cumulative = np.median(np.cumsum(exits_s, axis=1), axis=0)
    results = [Measurement("full network, plain", tuple(n_images / np.asarray(plain_s)), "images/s", config),
               Measurement("full network, this form", tuple(n_images / np.sum(exits_s, axis=1)), "images/s", config,
                           {"speed-up": float(np.median(plain_s) / cumulative[-1]), "step_ms": _milliseconds(exits_s)})]
    for fraction, seconds in latencies.items():
        totals = np.sum(seconds, axis=1)
        details = {"MACs share": float(shares[fraction] @ macs / macs[-1]),
                   "predicted": float(shares[fraction] @ cumulative / cumulative[-1]),
                   "realised": float(np.median(totals) / cumulative[-1]), "exit share": shares[fraction].tolist()}
        if config["batch size"] == 1:
            details |= {f"p{q} ms": float(np.percentile(seconds, q) * 1e3) for q in (50, 95, 99)}
        results.append(Measurement(f"budget M1 + {fraction:g} (MN - M1)", tuple(n_images / totals), "images/s", config, details))
    return results


def _second_pass(timed: Callable[[Tensor], Any], batches: Sequence[Tensor]) -> list[Any]:
    """The times of all batches in the second of two passes: code that the CPU's library has made for one network or the sizes of
    one budget is lost to the next.
    """
    for x in batches:
        timed(x)
    return [timed(x) for x in batches]


def _milliseconds(exits_s: Sequence[np.ndarray]) -> list[float]:
    return (1e3 * np.median(exits_s, axis=0)).tolist()


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
    """One table per batch size."""
    tables = []
    for size in dict.fromkeys(line["config"]["batch size"] for line in lines):
        part = [line for line in lines if line["config"]["batch size"] == size]
        config = part[0]["config"]
        percentiles = [key for key in part[-1] if key.startswith("p") and key.endswith(" ms")]
        rows = []
        for line in part:
            shares = [f"{line[key]:.3f}" if key in line else "" for key in SHARES]
            ratio = f"{line['realised'] / line['predicted']:.2f}" if "realised" in line else ""
            speed_up = f" (x{line['speed-up']:.2f})" if "speed-up" in line else ""
            rows.append([line["name"] + speed_up, *shares, ratio, f"{line['median']:.0f}",
                         *(f"{line[key]:.2f}" if key in line else "" for key in percentiles)])
        tables.append(format_table(
            ["", *SHARES, "real./pred.", "images/s", *percentiles], rows,
            title=f"{config['network']} in batches of {size}, form {config['form']}, {config['images']} images, medians of "
                  f"{part[0]['n']}; {where}"))
    return "\n\n".join(tables)
