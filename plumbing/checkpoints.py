"""Checkpoints: a file has the form of what the run would write, and is of the same data.

Read without executing anything, and checked before anything is built from it.
"""
from contextlib import suppress
from pathlib import Path

import torch

from plumbing.files import is_row, load_torch
from plumbing.settings import settings_from
from plumbing.words import BadInput, several, shown

# ---- Form ---------------------------------------------------------------------------------------

class Some(dict):
    """A pattern of fits(): a dict of which some keys may lack."""


def form(x):
    """A value as a message shows it; of a tensor dtype and shape."""
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else shown(x)


def is_like(found, pattern):
    """fits() for what holds nothing else; where it does not, this may raise anything."""
    if isinstance(pattern, torch.Tensor):
        like = form(found) == form(pattern)
    elif callable(pattern):
        like = pattern(found)
    else:
        like = type(found) is type(pattern) and found == pattern
    if isinstance(found, torch.Tensor):
        like = like and found.layout == torch.strided and found.is_cpu and found.isfinite().all()
    return like


def fits(found, pattern, where):
    """Raise BadInput unless `found`, from a file, has the form of `pattern`.

    pattern  a dict or list: its keys or its length, and each value fits; a tensor: one of its
             shape and dtype, finite; a function: it holds for what is found; else that value
    where    begins the message"""
    fault = f"{where} is damaged, not finite or not of this version"
    if isinstance(found, list) and isinstance(pattern, list):
        found, pattern = dict(enumerate(found)), dict(enumerate(pattern))
    if isinstance(found, dict) and isinstance(pattern, dict):
        other = found.keys() ^ pattern.keys()
        if isinstance(pattern, Some):
            other -= pattern.keys()
        if other:
            raise BadInput(f"{fault}: it lacks or adds {several(other)}")
        for key, value in found.items():
            fits(value, pattern[key], f"{where}, {key}")
        return
    with suppress(Exception):
        if is_like(found, pattern):
            return
    wanted = f", not {form(pattern)}" if isinstance(pattern, torch.Tensor) else ""
    raise BadInput(f"{fault}: {form(found)}{wanted}")


# Patterns that are functions.

def anything(x):
    """What is looked at elsewhere."""
    return True


def text(x):
    """Any text."""
    return type(x) is str


def count(x):
    """A whole number that a run can reach."""
    return type(x) is int and 0 <= x < 1e12


def number(x):
    """A finite number, or None."""
    return x is None or type(x) is float and abs(x) < 1e12


def rate(x):
    """A positive number, as fps and learning rates."""
    return type(x) is float and 0 < x < 1e12


def names(x):
    """A list of texts."""
    return type(x) is list and all(type(name) is str for name in x)


def different_names(x):
    """A list of different texts."""
    return type(x) is list and x == list(dict.fromkeys(map(str, x)))


def row_of_numbers(x):
    """A tensor of real numbers (D,)."""
    return x.is_floating_point() and x.ndim == 1 and 0 < len(x) < 10 ** 6


def random_states(x):
    """States that generators take; else torch raises an exception."""
    if type(x) is not dict:
        return False
    for key in ("torch", "run"):
        torch.Generator().set_state(x[key])
    return x["torch"].ndim == x["run"].ndim == 1


def sound_record(record, limits):
    """A record of these columns, of one length: whole numbers below their limit, or real ones."""
    if type(record) is not dict or record.keys() != limits.keys():
        return False
    n = len(record["labels"])
    for column, limit in limits.items():
        x = record[column]
        if column == "similarity":
            x = x.nan_to_num()  # to no labelled instance
        least = 0 if limit or column == "scores" else -1e12
        inside = (x >= least) & (x < (limit or 1e12))
        shape = (n, 2) if column == "segments" else (n,)
        if not inside.all() or x.shape != shape or x.is_floating_point() == bool(limit):
            return False
    return True


def sound_rows(rows, stages):
    """Rows of a log."""
    return type(rows) is list and all(is_row(row, stages) for row in rows)


def flag(x):
    """On or off."""
    return type(x) is bool


def flag_or_none(x):
    """On, off, or as torch chooses."""
    return x is None or flag(x)


def share(x):
    """A number from 0 to 1."""
    return type(x) is float and 0 <= x <= 1


def state_form(part):
    """The pattern of the state of a module or an optimiser."""
    state = part.state_dict()
    if not isinstance(part, torch.optim.Optimizer):
        return state
    params = [p for group in part.param_groups for p in group["params"]]
    moments = [{"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for p in params]
    groups = [group | {"lr": rate, "fused": flag_or_none} for group in state["param_groups"]]
    return {"state": Some(enumerate(moments)), "param_groups": groups}


# ---- What every checkpoint has ------------------------------------------------------------------

# Of train.py, beside the weights, raw, averaged or both.
ALWAYS = {"settings": anything, "classes": different_names, "mean": row_of_numbers,
          "std": row_of_numbers, "fps": rate}
WEIGHTS = {"raw": "detector", "ema": "ema"}
# How far to trust a list, as listing.find_actions() takes it; without tests "exclusive" alone.
TRUST = Some(exclusive=flag, score=share, precision=share, recall=share, videos=count)


def weights_of(content, weights):
    """The raw or the averaged weights in a checkpoint; raises BadInput where it lacks them."""
    part = WEIGHTS[weights]
    if part not in content:
        raise BadInput(f"the checkpoint has no {weights} weights")
    return content[part]


def trust_of(content, weights):
    """How far the list of a checkpoint's detector can be trusted, with the raw or averaged weights.
    """
    trust = content.get("trust") or {}
    if content["settings"]["weights"] == weights:
        return trust
    return {key: trust[key] for key in trust.keys() & {"exclusive"}}  # the rest is of the others


def unfinished(content, path):
    """Yield a warning where a checkpoint's detector is none that a run has ended with."""
    if content.get("trust", {}) is None:
        yield (f"checkpoint {path}: its detector is not finished, it is that of stage "
               f"{content['stage']}, epoch {content['epoch']}")


def check_detector(content, kind, where):
    """Raise BadInput unless a detector can be built from a checkpoint, with an input to match.

    kind  the class of its settings"""
    if not isinstance(content, dict) or not ALWAYS.keys() <= content.keys():
        raise BadInput(f"{where} cannot be read: it is not of train.py, or of another version")
    s = settings_from(content["settings"], kind, where)
    fits({name: content[name] for name in ALWAYS}, ALWAYS, where)
    mean, std = content["mean"], content["std"]
    if mean.shape != std.shape or not (std > 0).all():
        raise BadInput(f"{where} is not usable: its std is 0 somewhere, or its mean of another "
                       "width")
    fits({"columns": content.get("columns", [])}, {"columns": names}, where)
    trust = content.get("trust")
    if trust is not None:  # before a run's end
        fits(trust, TRUST, f"{where}, trust")
        fits(trust.get("exclusive"), flag, f"{where}, trust, exclusive")
    parts = {part: content[part] for part in WEIGHTS.values() if part in content}
    if not parts:
        raise BadInput(f"{where} is not of this version: it has no weights")
    with torch.device("meta"):  # the shapes, without the memory
        shapes = s.build(len(mean), len(content["classes"])).state_dict()
    for state in parts.values():
        if isinstance(state, dict) and len(state.keys() & shapes.keys()) < len(shapes) / 2:
            raise BadInput(f"{where} is of another detector: the command that trained it reads it")
    fits(parts, dict.fromkeys(parts, shapes), where)


# ---- Generators, files --------------------------------------------------------------------------

def states_of_generators(generator, device):
    """The states of the generators that an epoch draws from."""
    states = {"torch": torch.get_rng_state(), "run": generator.get_state()}
    if device.startswith("cuda"):
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states, generator, device):
    """Go on in the midst of an epoch: set the generators to the states that were saved."""
    torch.set_rng_state(states["torch"])
    generator.set_state(states["run"])
    if "cuda" in states and device.startswith("cuda"):
        torch.cuda.set_rng_state(states["cuda"], device)


def file_of(path):
    """The checkpoint that a path names: a file, or of a run's folder the whole run, else the small
    detector."""
    path = Path(path)
    whole, small = path / "checkpoint.pt", path / "detector.pt"
    if not path.is_dir():
        return path
    return small if small.exists() and not whole.exists() else whole


def load(path, kind):
    """A checkpoint of train.py on the CPU, with which a detector can be built; raises BadInput.

    path  the file, checkpoint.pt or detector.pt, or the folder of its run
    kind  the class of its settings, which build its detector"""
    path = file_of(path)
    content = load_torch(path, "checkpoint")
    check_detector(content, kind, f"checkpoint {path}")
    return content
