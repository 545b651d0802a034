"""Checkpoints: a file has the form of what the run would write, and is of the same data.

Read without executing anything, and checked before anything is built from it.
"""
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from plumbing.files import load_torch
from plumbing.processes import process_count
from plumbing.settings import LATER, settings_from
from plumbing.words import BadInput, several, short, shown

# ---- Form ---------------------------------------------------------------------------------------

class Some(dict):
    """A pattern of fits(): a dict of which some keys may lack."""


def form(x):
    """A value as a message shows it; of a tensor dtype and shape."""
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else shown(x)


def is_like(found, pattern):
    """fits() for what holds nothing else; what is no tensor may raise anything."""
    if isinstance(found, torch.Tensor) and (found.layout != torch.strided or not found.is_cpu):
        return False
    if isinstance(pattern, torch.Tensor):
        return form(found) == form(pattern)
    if callable(pattern):
        return pattern(found)
    return type(found) is type(pattern) and found == pattern


def fits(found, pattern, where):
    """Raise BadInput unless `found`, from a file, has the form of `pattern`.

    pattern  a dict or list: its keys or its length, and each value fits; a tensor: one of its
             shape and dtype, finite; a function: it holds for what is found; else that value
    where    begins the message"""
    fault = f"{where} is damaged or not of this version"
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
    good = False
    with suppress(Exception):
        good = is_like(found, pattern)
    if not good:
        wanted = f", not {form(pattern)}" if isinstance(pattern, torch.Tensor) else ""
        raise BadInput(f"{fault}: {form(found)}{wanted}")
    if isinstance(found, torch.Tensor) and not found.isfinite().all():
        raise BadInput(f"{fault}: it holds NaN or infinity")


# Patterns that are functions.

def anything(x):
    """What is looked at elsewhere."""
    return True


def count(x):
    """A whole number that a run can reach."""
    return type(x) is int and 0 <= x < 1e12


def number(x):
    """A finite number, or None."""
    return x is None or type(x) is float and abs(x) < 1e12


def rate(x):
    """A positive number, as fps and learning rates."""
    return type(x) is float and 0 < x < 1e12


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
        finite = x.isfinite().all() or column == "similarity"  # NaN: to no labelled instance
        sound = finite if limit is None else (x >= 0).all() and (x < limit).all()
        shape = (n, 2) if column == "segments" else (n,)
        if not sound or x.shape != shape or x.is_floating_point() != (limit is None):
            return False
    return bool((record["scores"] >= 0).all())


def sound_rows(rows, stages):
    """Rows of a log."""
    return type(rows) is list and all(
        row["stage"] in stages and count(row["epoch"]) and count(row.get("step", 0))
        for row in rows)


def sound_trust(trust):
    """How far to trust a list, as listing.find_actions() takes it; None before a run's end."""
    if trust is None:
        return True
    known = {"score": number, "precision": number, "recall": number, "videos": count}
    return type(trust["exclusive"]) is bool and all(
        key == "exclusive" or known[key](value) and value is not None
        for key, value in trust.items())


def state_form(part):
    """The pattern of the state of a module or an optimiser."""
    state = part.state_dict()
    if not isinstance(part, torch.optim.Optimizer):
        return state
    params = [p for group in part.param_groups for p in group["params"]]
    moments = [{"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for p in params]
    groups = [group | {"lr": rate} for group in state["param_groups"]]
    return {"state": Some(enumerate(moments)), "param_groups": groups}


# ---- What every checkpoint has ------------------------------------------------------------------

# Of train.py, beside the weights, raw, averaged or both.
ALWAYS = {"settings": anything, "classes": different_names, "mean": row_of_numbers,
          "std": row_of_numbers, "fps": rate}
WEIGHTS = {"raw": "detector", "ema": "ema"}


def check_detector(content, kind, where):
    """Raise BadInput unless a detector can be built from a checkpoint, with an input to match.

    kind  the class of its settings"""
    if not isinstance(content, dict) or not ALWAYS.keys() <= content.keys():
        raise BadInput(f"{where} cannot be read: it is not of train.py, or of another version")
    s = settings_from(content["settings"], kind, where)
    for name, pattern in ALWAYS.items():
        fits(content[name], pattern, f"{where}, {name}")
    mean, std = content["mean"], content["std"]
    if mean.shape != std.shape or not (std > 0).all():
        raise BadInput(f"{where} is not usable: its std is 0 somewhere, or its mean of another "
                       "width")
    if "trust" in content:
        fits(content["trust"], sound_trust, f"{where}, trust")
    parts = [part for part in WEIGHTS.values() if part in content]
    if not parts:
        raise BadInput(f"{where} is not of this version: it has no weights")
    with torch.device("meta"):  # the shapes, without the memory
        shapes = s.build(len(mean), len(content["classes"])).state_dict()
    for part in parts:
        fits(content[part], shapes, f"{where}, {part}")


# ---- Going on -----------------------------------------------------------------------------------

@dataclass
class Expected:
    """What a run that goes on from a checkpoint asks of it."""
    s: object  # the run's settings
    settings: dict  # {stage: the names of the settings that it depends on}
    former: dict  # {setting that no longer is: its value that changed nothing}
    tuned: tuple  # what may differ from the settings of another run
    state: dict  # what the run itself would write
    parts: dict  # {key: what has a state of its own}: modules and optimisers
    limits: dict  # {column of a pseudo label: what its whole numbers stay below; None: real}


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


def check_settings(theirs, stage, expected, where):
    """Raise BadInput where the settings that the stages so far depend on are others."""
    s = expected.s
    mine = asdict(s)
    theirs = LATER | theirs
    if stage not in list(expected.settings):
        raise BadInput(f"{where} is not usable: its stage is {shown(stage)}")
    for name, value in theirs.items():
        if name not in mine and (name, value) not in expected.former.items():
            raise BadInput(f"{where} is not of this version: it has a setting {short(name)}")
    for name in expected.settings[stage]:
        if mine[name] != theirs[name] and not (s.start and name in expected.tuned):
            raise BadInput(f"{where} is of another configuration: its {name} is "
                           f"{shown(theirs[name])}, not {shown(mine[name])}")


def alike(theirs, mine):
    """Whether two lists of numbers are equal to rounding, whatever machine added them up."""
    with suppress(Exception):  # what numpy raises of what are no numbers
        return np.shape(theirs) == np.shape(mine) and np.allclose(theirs, mine, 1e-5, 1e-6)
    return False


BEGIN = "; a new run takes its weights with --init"  # whatever the data


def check_data(content, expected, where):
    """Raise BadInput where features or labels are not those that a checkpoint was trained on."""
    for key, what in (("fingerprint", "features"), ("instances", "labels")):
        theirs, mine = content.get(key), expected.state[key]
        if not isinstance(theirs, dict):
            raise BadInput(f"{where} is not of this version: it does not say what data it is of")
        changed = [name for name in mine | theirs if not alike(theirs.get(name), mine.get(name))]
        if changed:
            raise BadInput(f"{where} is of other data: {len(changed)} videos are new, gone or have "
                           f"other {what} now: {several(changed)}{BEGIN}")
    if content["classes"] != expected.state["classes"]:
        raise BadInput(f"{where} is of other data: its classes are not those of "
                       f"{short(expected.s.dataset, 150)}{BEGIN}")


PATTERNS = {int: count, float: number, type(None): number}  # of what the run itself would write


def check_run(content, expected, where):
    """Raise BadInput for a checkpoint that a run cannot go on from."""
    mine, s = expected.state, expected.s
    stage, processes, done, records = map(content.get, ("stage", "processes", "done", "pseudo"))
    if stage is None:
        raise BadInput(f"{where} has no stage: it holds the detector alone, no run to go on with")
    check_settings(content["settings"], stage, expected, where)
    check_data(content, expected, where)
    fits(done, count, f"{where}, done")
    if (type(processes), processes) != (int, process_count()) and (done or not s.start):
        raise BadInput(f"{where} is of {shown(processes)} process(es), not {process_count()}")
    pattern = {name: PATTERNS.get(type(value), value) for name, value in mine.items()}
    pattern |= {name: state_form(part) for name, part in expected.parts.items()}
    pattern |= dict.fromkeys(("settings", "stage", "fingerprint", "instances"), anything)
    pattern["rng"] = random_states if done else anything
    pattern["rows"] = partial(sound_rows, stages=expected.settings.keys())
    content.setdefault("rows", [])  # which an older file has not, nor how far to trust a list
    content.setdefault("trust", None)
    pattern["trust"] = anything
    if records is not None:
        record = partial(sound_record, limits=expected.limits)
        pattern["pseudo"] = dict.fromkeys(mine["fingerprint"].keys() - mine["labelled"], record)
    fits(content, pattern, where)


def file_of(path):
    """The checkpoint that a path names: a file, or of a run's folder the whole run, else the small
    detector."""
    path = Path(path)
    whole, small = path / "checkpoint.pt", path / "detector.pt"
    if not path.is_dir():
        return path
    return small if small.exists() and not whole.exists() else whole


def load(path, kind, expected=None):
    """A checkpoint of train.py on the CPU, with which a detector can be built; raises BadInput.

    path      the file, checkpoint.pt or detector.pt, or the folder of its run
    kind      the class of its settings, which build its detector
    expected  what a run that goes on from it asks of it: an Expected"""
    path = file_of(path)
    where = f"checkpoint {path}"
    content = load_torch(path, "checkpoint")
    check_detector(content, kind, where)
    if expected:
        check_run(content, expected, where)
    return content
