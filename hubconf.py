"""Published networks through torch.hub, which fixes the name of this file and takes its public functions for entry points.

    model = torch.hub.load(REPO, "msdnet10_boost_cifar100", source="local")
    predictions = model(images)                       # logits (B, 100) of every exit
    predict = torch.hub.load(REPO, "msdnet10_boost_cifar100", source="local", early_exit="25e6")
    prediction, confidence, exit = predict(images)    # images leave early, at 25e6 MACs on average; exits counted from 0

REPO is a folder with this repository. Images are (B, 3, 32, 32), from 0 to 1, less mean (0.5071, 0.4867, 0.4408), over standard
deviation (0.2675, 0.2565, 0.2761). Names of the classes are in `model.class_names`, or `predict.model.class_names`.
docs/results.md says how the networks were trained and how accurate they are.
"""
from contextlib import contextmanager as _contextmanager

dependencies = ["torch", "numpy", "tqdm"]

_MODULES = {"adaptive_inference", "args", "dataloader", "models", "op_counter", "utils"}   # at the top level of this repository
_PREFIX = "boostnet_hub."   # of their names in sys.modules where other modules have these names


def msdnet10_boost_cifar100(early_exit=None, device="cpu"):
    """BoostNet on the paper's MSDNet-10, 30 epochs: exits at 15 to 122 x 10^6 MACs.

    Args:
        early_exit: mean MACs per image, such as "25e6", for a network that images leave early; None for the whole network.
        device: where it computes, such as "cuda".
    """
    return _open("msdnet10_cifar100/boost/model_dynamic.pth", early_exit, device)


def msdnet5_boost_cifar100(early_exit=None, device="cpu"):
    """BoostNet on an MSDNet of 5 exits at 9 to 25 x 10^6 MACs, 12 epochs. Arguments as those of msdnet10_boost_cifar100."""
    return _open("cifar100_small/msdnet_boost/model_anytime.pth", early_exit, device)


def ranet6_boost_cifar100(early_exit=None, device="cpu"):
    """BoostNet on a RANet of 6 exits at 8 to 32 x 10^6 MACs, 6 epochs. Arguments as those of msdnet10_boost_cifar100."""
    return _open("cifar100_small/ranet_boost/model_anytime.pth", early_exit, device)


def _open(weights: str, early_exit, device):
    try:
        budget = None if early_exit is None else float(early_exit)
    except (TypeError, ValueError):
        raise ValueError(f"early_exit is a budget in MACs per image, such as \"25e6\", got {early_exit!r}") from None
    _check(device)
    with _modules_of_this_repository() as root:
        from utils.evaluation.published import open_published
        return open_published(root / "published" / weights, budget, device)


def _check(device) -> None:
    import torch
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:   # whatever torch says of what is no device, or not there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"device is where the network computes, such as \"cpu\" or \"cuda\", got {device!r}: {reason}") from None


@_contextmanager
def _modules_of_this_repository():
    """Let `utils`, `models` and so on be this repository's; yields its folder, which torch.hub has put on sys.path.

    Where the caller has modules of these names, loaded or not, theirs are in place again afterwards, and those of this repository
    stay known under other names. Nothing that is returned imports one later.
    """
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    root = Path(__file__).resolve().parent

    def is_here(module) -> bool:
        place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), "")
        return Path(place).resolve().is_relative_to(root)

    def loaded() -> dict:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in _MODULES}

    theirs = loaded()
    elsewhere = [path for path in sys.path if Path(path).resolve() != root]
    taken = theirs or {name for name in _MODULES if PathFinder.find_spec(name, elsewhere)}
    if not taken or theirs and all(map(is_here, theirs.values())):
        yield root
        return
    for name in theirs:
        del sys.modules[name]
    sys.modules |= {name.removeprefix(_PREFIX): module for name, module in sys.modules.items() if name.startswith(_PREFIX)}
    try:
        yield root
    finally:
        for name, module in loaded().items():
            sys.modules[_PREFIX + name] = module
            del sys.modules[name]
        sys.modules.update(theirs)
