"""The ONNX programs on OpenVINO, an optional part of the benchmark of early exit."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.core.errors import UserError
from utils.evaluation.onnx_exit import OnnxPrograms, read_header

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}   # and OpenVINO's names of them


def require_openvino() -> None:
    """Raise UserError where OpenVINO is missing."""
    try:
        import openvino  # noqa: F401  here, because few have it
    except ImportError as error:
        raise UserError("--openvino needs OpenVINO: pip install openvino") from error


class OpenVinoPrograms(OnnxPrograms):
    """`OnnxPrograms` run by OpenVINO on the CPU.

    Args:
        precision: of the arithmetic, a name in PRECISIONS.
    """

    def __init__(self, folder: Path, threads: int, precision: str) -> None:
        import openvino

        self.header = read_header(folder)
        self.shares_pool, self.n_threads, self._pool = True, 1, None   # each program uses all threads
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": PRECISIONS[precision], "NUM_STREAMS": 1}
        core = openvino.Core()
        self._requests = [core.compile_model(str(folder / name), "CPU", settings).create_infer_request()
                          for name in self.header["steps"]]
        self.n_exits = len(self._requests)

    def step(self, n: int, state: Sequence[np.ndarray]) -> list[np.ndarray]:
        found = self._requests[n].infer(dict(enumerate(state)), share_inputs=True)
        return [found[i] for i in range(len(found))]
