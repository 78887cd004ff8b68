"""Threshold search and budgeted evaluation of whole curves, on synthetic confidences."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace

import numpy as np
import torch

from adaptive_inference import budget_curve, released_sweep
from utils.benchmarks.measure import Measurement, count, time_calls


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--samples", type=count, default=50_000, help="inputs in the hold-out and in the test set, each")
    parser.add_argument("--exits", type=count, default=10, help="exits of the network")


def run(args: Namespace, device: torch.device) -> list[Measurement]:
    """The searches run on the CPU, whatever the device of the network."""
    rng = np.random.default_rng(0)
    inputs = [*synthetic_scores(rng, args.exits, args.samples), *synthetic_scores(rng, args.exits, args.samples)]
    costs = np.arange(1, args.exits + 1) * 1e7
    config = {"samples": args.samples, "exits": args.exits}
    curves = {"released sweep, 39 points": released_sweep, "eq. 9, 40 budgets": budget_curve}
    return [Measurement(name, time_calls(lambda curve=curve: curve(*inputs, costs), args.repeats, device), config=config)
            for name, curve in curves.items()]


def synthetic_scores(rng: np.random.Generator, n_exits: int, n_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """(n_exits, n_samples) float32 confidences that grow with depth and fall with difficulty, and bool correctness."""
    difficulty = rng.random(n_samples)
    skill = np.linspace(0.5, 1.0, n_exits)[:, None]
    margin = skill - difficulty + 0.1 * rng.standard_normal((n_exits, n_samples))
    confidence = 1 / (1 + np.exp(-5 * margin))
    return confidence.astype(np.float32), rng.random((n_exits, n_samples)) < confidence
