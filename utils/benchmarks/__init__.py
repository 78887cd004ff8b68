"""Benchmarks of `python -m utils.benchmark`, one module each: `add_arguments(parser)` and `run(args, device)`."""
