"""What a run keeps of itself, and how it goes on from there. `run` is a train.Run."""
from dataclasses import asdict

import numpy as np
import torch

from plumbing import checkpoints, files, journal, runs
from plumbing.processes import process_count
from plumbing.settings import settings_of_stages
from plumbing.words import is_first


def state_of(run):
    """What a checkpoint holds: the whole run."""
    labelled, unlabelled = run.data.labelled, run.data.unlabelled
    instances = {video.id: torch.cat([video.segments, video.labels[:, None]], 1).tolist()
                 for video in labelled}
    return asdict(run.at) | {
        "settings": asdict(run.s),
        "classes": run.data.classes,
        "mean": run.data.mean,
        "std": run.data.std,
        "fps": float(np.median([video.grid.fps for video in labelled + unlabelled])),
        "labelled": list(instances),
        "instances": instances,
        "fingerprint": run.data.fingerprint,
        "t_plus": torch.stack(list(run.t_plus.values())).cpu(),
        "pseudo": run.pseudo,
        "theta_h": run.theta_h,
        "supervised_mAP": run.supervised_mAP,
        "trust": run.trust,
        "processes": process_count(),
    } | {key: part.state_dict() for key, part in run.parts().items()}


def save(run):
    """The whole run as one file, written by the first process."""
    s, path = run.s, run.folder.path / "checkpoint.pt"
    if not is_first():
        return
    rng = checkpoints.states_of_generators(run.generator, s.device) if run.at.done else None
    content = state_of(run) | {"rng": rng, "rows": run.folder.rows}
    files.write_atomically(path, lambda file: torch.save(content, file))
    if not run.folder.saved:
        run.folder.clear()
        journal.write_configuration(run)
        run.folder.claim(f"{s.TRAIN} --resume {s.out} goes on")


def save_detector(run):
    """The reported weights alone, enough for detection on new videos; and the run once more, since
    it says now how far such a list can be trusted."""
    save(run)
    content = state_of(run)
    part = checkpoints.WEIGHTS[run.s.weights]
    small = {key: content[key] for key in (*checkpoints.ALWAYS, part, "trust")}
    path = run.folder.path / "detector.pt"
    files.write_atomically(path, lambda file: torch.save(small, file))


def expected_of(run, stages, limits):
    """What a run asks of a checkpoint to go on from, a checkpoints.Expected.

    stages  the names of all stages in their order
    limits  {column of the pseudo labels: what its numbers stay below, None: they are real}"""
    known = {stage: settings_of_stages(type(run.s), stages[:n])
             for n, stage in enumerate(stages, 1)}
    return checkpoints.Expected(run.s, known, state_of(run), run.parts(), limits)


def restore(run, stages, limits):
    """Load the checkpoint of --resume or --start into a run, where one is asked for.

    stages, limits  as expected_of() has them
    Raises BadInput."""
    path = run.s.resume or run.s.start
    if not path:
        return
    content = checkpoints.load(path, type(run.s), expected_of(run, stages, limits))
    for key, part in run.parts().items():
        part.load_state_dict(content[key])
    run.at = runs.Progress(**{name: content[name] for name in asdict(run.at)})
    run.t_plus = dict(zip(run.t_plus, content["t_plus"].to(run.s.device)))
    for name in ("pseudo", "theta_h", "supervised_mAP", "trust", "rng"):
        setattr(run, name, content[name])
    if run.s.resume:
        run.folder.rows = content["rows"]


def take_folder(run, stop, stages):
    """Make the run's folder its own; a resumed one goes on in what lies there."""
    run.folder.open(stop)
    if run.s.resume and is_first():
        run.folder.cut_log(run.at, stages)
        journal.write_configuration(run)
        run.folder.claim(f"{run.s.TRAIN} --resume {run.s.out} goes on")
