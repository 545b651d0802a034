"""What a run keeps of itself, and how it goes on from there. `run` is a train.Run."""
import hashlib
import json
import shlex
from contextlib import suppress
from dataclasses import asdict
from functools import partial

import numpy as np
import torch

from plumbing import checkpoints, checks, files, journal, runs
from plumbing.checkpoints import anything, count, fits, number
from plumbing.processes import process_count
from plumbing.settings import LATER, settings_of_stages
from plumbing.words import BadInput, is_first, several, short, shown

# Settings that only older files have, with the values under which a run goes on.
FORMER = {"icd_steps": (0,), "pseudo_weights": ("raw", "ema")}
TUNED = ("lr", "warmup", "clip")  # what may differ from the settings of another run

# ---- Saving -------------------------------------------------------------------------------------


def tests_of(dataset):
    """A sum of what the mAP of a Dataset is over: its test videos and their annotations."""
    truth = {name: [a.segments.tolist(), a.labels] for name, a in dataset.truth.items()}
    steps = {video.id: video.steps for video in dataset.test}
    return hashlib.sha256(json.dumps([steps, truth], sort_keys=True).encode()).hexdigest()


def state_of(run):
    """What a checkpoint holds: the whole run."""
    labelled, unlabelled = run.data.labelled, run.data.unlabelled
    instances = {video.id: torch.cat([video.segments, video.labels[:, None]], 1).tolist()
                 for video in labelled}
    return asdict(run.at) | {
        "settings": asdict(run.s) | {"resume": ""},  # how this command began is no part of it
        "classes": run.data.classes,
        "mean": run.data.mean,
        "std": run.data.std,
        "columns": checks.channels_of(run.data, run.s),
        "fps": checks.usual_rate(labelled + unlabelled),
        "labelled": list(instances),
        "instances": instances,
        "fingerprint": run.data.fingerprint,
        "t_plus": torch.stack(list(run.t_plus.values())).cpu(),
        "pseudo": run.pseudo,
        "theta_h": run.theta_h,
        "supervised_mAP": run.supervised_mAP,
        "tests": tests_of(run.data),
        "trust": run.trust,
        "processes": process_count(),
    } | {key: part.state_dict() for key, part in run.parts().items()}


def begin(run, rows):
    """From here on the files in the run's folder are its own; rows: of its log so far."""
    run.folder.begin(rows, f"{run.s.TRAIN} --resume {shlex.quote(run.s.out)} goes on")
    journal.write_configuration(run)


def save(run):
    """The whole run as one file, written by the first process.

    At the first save of a new run the results go that another left."""
    folder = run.folder
    if not is_first():
        return
    rng = checkpoints.states_of_generators(run.generator, run.s.device) if run.at.done else None
    content = state_of(run) | {"rng": rng, "rows": folder.rows}
    files.write_atomically(folder.path / "checkpoint.pt", lambda file: torch.save(content, file))
    if not folder.saved:
        for name in runs.RESULTS:
            (folder.path / name).unlink(missing_ok=True)
        begin(run, folder.rows)


def save_detector(run):
    """The reported weights alone, enough for detection on new videos; and the run once more, since
    it says now how far such a list can be trusted."""
    save(run)
    content = state_of(run)
    part = checkpoints.WEIGHTS[run.s.weights]
    small = {key: content[key] for key in (*checkpoints.ALWAYS, "columns", part, "trust")}
    path = run.folder.path / "detector.pt"
    files.write_atomically(path, lambda file: torch.save(small, file))


# ---- Going on -----------------------------------------------------------------------------------

def check_settings(theirs, s, stages, where):
    """Raise BadInput where the settings that the stages so far depend on are others."""
    mine = asdict(s)
    theirs = LATER | theirs
    for name, value in theirs.items():
        if name not in mine and value not in FORMER.get(name, ()):
            raise BadInput(f"{where} is not of this version: it has a setting {short(name)}")
    for name in settings_of_stages(type(s), stages):
        if mine[name] != theirs[name] and not (s.start and name in TUNED):
            raise BadInput(f"{where} is of another configuration: its {name} is "
                           f"{shown(theirs[name])}, not {shown(mine[name])}")


def alike(theirs, mine):
    """Whether two lists of numbers are equal to rounding, whatever machine added them up."""
    with suppress(Exception):  # what numpy raises of what are no numbers
        return np.shape(theirs) == np.shape(mine) and np.allclose(theirs, mine, 1e-5, 1e-6)
    return False


BEGIN = "; a new run takes its weights with --init"  # whatever the data


def check_data(theirs, mine, where):
    """Raise BadInput where features or labels are not those that a checkpoint was trained on.

    theirs, mine  what it holds, and what the run would write"""
    for key, what in (("fingerprint", "features"), ("instances", "labels")):
        old, new = theirs.get(key), mine[key]
        if not isinstance(old, dict):
            raise BadInput(f"{where} is not of this version: it does not say what data it is of")
        changed = [name for name in new | old if not alike(old.get(name), new.get(name))]
        if changed:
            raise BadInput(f"{where} is of other data: {len(changed)} videos are new, gone or have "
                           f"other {what} now: {several(changed)}{BEGIN}")
    if theirs["classes"] != mine["classes"]:
        raise BadInput(f"{where} is of other data: its classes are not those of "
                       f"{short(mine['settings']['dataset'], 150)}{BEGIN}")


PATTERNS = {int: count, float: number, type(None): number}  # of what the run itself would write
# Each in its own check.
SEEN = ("settings", "stage", "columns", "fingerprint", "instances", "trust", "rng")


def check_run(content, run, stages, limits, where):
    """Raise BadInput for a checkpoint that a run cannot go on from.

    stages  the names of all stages in their order
    limits  {column of the pseudo labels: what its numbers stay below, None: they are real}"""
    mine, stage = state_of(run), content.get("stage")
    if stage not in stages:
        raise BadInput(f"{where} holds the detector alone, or is not of this version: its stage is "
                       f"{shown(stage)}")
    check_settings(content["settings"], run.s, stages[:stages.index(stage) + 1], where)
    check_data(content, mine, where)
    pattern = {name: PATTERNS.get(type(value), value) for name, value in mine.items()}
    pattern |= {name: checkpoints.state_form(part) for name, part in run.parts().items()}
    pattern |= dict.fromkeys(SEEN, anything)
    pattern["tests"] = checkpoints.text
    pattern["rows"] = partial(checkpoints.sound_rows, stages=stages)
    for name, value in {"rows": [], "columns": [], "trust": None, "tests": ""}.items():
        content.setdefault(name, value)  # which an older file has not
    if content.get("pseudo") is not None:
        theirs = content["settings"]["weights"]
        if theirs != run.s.weights:
            raise BadInput(f"{where} has pseudo labels of its {theirs} weights: --weights "
                           f"{run.s.weights} cannot go on from there; evaluate.py takes it")
        record = partial(checkpoints.sound_record, limits=limits)
        pattern["pseudo"] = dict.fromkeys([video.id for video in run.data.unlabelled], record)
    fits(content, pattern, where)
    done, processes = content["done"], content["processes"]
    if done:
        fits(content["rng"], checkpoints.random_states, f"{where}, rng")
    if processes != process_count() and (done or not run.s.start):
        raise BadInput(f"{where} is of {processes} process(es), not {process_count()}")


def restore(run, stages, limits):
    """Load the checkpoint of --resume or --start into a run, where one is asked for.

    stages, limits  as check_run() has them
    Raises BadInput."""
    path = run.s.resume or run.s.start
    if not path:
        return
    content = checkpoints.load(path, type(run.s))
    check_run(content, run, stages, limits, f"checkpoint {checkpoints.file_of(path)}")
    for key, part in run.parts().items():
        part.load_state_dict(content[key])
    run.at = runs.Progress(**{name: content[name] for name in asdict(run.at)})
    if run.at.stage not in run.plan:
        raise BadInput(f"{path} is in the stage {run.at.stage} already: --stage {run.s.stage} ends "
                       "before it")
    run.t_plus = dict(zip(run.t_plus, content["t_plus"].to(run.s.device)))
    for name in ("pseudo", "theta_h", "supervised_mAP", "rng"):
        setattr(run, name, content[name])
    of_mAP = ("weights", "test_subset", "ext_scores")
    other = any(content["settings"][name] != getattr(run.s, name) for name in of_mAP)
    if other or content["tests"] != tests_of(run.data):
        run.supervised_mAP = None  # of the other weights, videos or scores
    if run.s.resume:
        run.folder.rows = content["rows"]


def take_folder(run, stop, stages):
    """Make the run's folder its own; a resumed one goes on in what lies there."""
    run.folder.open(stop)
    if run.s.resume and is_first():
        begin(run, run.folder.rows_until(run.at, stages))
