"""Fig. 4 of a run: steps of labelled videos before and after ACP, for its page.

    python -m extras.fig4 runs/my                        writes runs/my/representation.json

What it shows is the network as the checkpoint has it: train.py starts it at the end of stage 1.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import acp
import data
import train
from evaluate import forward
from extras import bmn, mean_teacher, pgcn, spot
from plumbing import checkpoints
from plumbing.files import read_json, write_json
from plumbing.runs import guard
from plumbing.settings import Parser, settings_from
from plumbing.words import say

OTHERS = (mean_teacher.Settings, bmn.Settings, pgcn.Settings, spot.Settings)  # of other detectors
MOST = 25  # videos whose steps are shown


def read_run(folder):
    """The settings and the Dataset of the run in a folder, and its detectors before and after ACP.

    Before are the weights that the run began with, after the raw ones of its checkpoint. Raises
    BadInput.
    -> s, dataset, {"before": Detector, "after": Detector}"""
    config = read_json(folder / "config.json", "a run's file of settings")
    others = [kind for kind in OTHERS if kind.__annotations__.keys() <= config.keys()]
    kind = others[0] if others else train.Settings
    checkpoint = checkpoints.load(folder / "checkpoint.pt", kind)
    s = settings_from(checkpoint["settings"], kind, f"checkpoint in {folder}")
    dataset = data.training_data(s)
    after = s.build(dataset.dim, len(dataset.classes)).to(s.device)
    after.load_state_dict(checkpoint["detector"])
    return s, dataset, {"before": train.begin(s, dataset).detector.eval(), "after": after.eval()}


def spread_steps(video, m):
    """m steps of a video, from its first to its last -> (m,) integers."""
    return torch.linspace(0, video.steps - 1, m).round().long()


@torch.no_grad()
def representation_of(detector, videos, dataset, s):
    """The representation that ACP contrasts, at s.acp_steps steps of each video -> (N, L * C)."""
    parts = []
    for video in videos:
        steps = spread_steps(video, s.acp_steps)
        batch = data.collate([data.load_item(video, dataset, s)])
        levels, masks = forward(detector.pyramid, batch, s)
        parts.append(acp.representation(levels, masks, steps[None].to(s.device))[0])
    return torch.cat(parts)


def classes_of(videos, dataset, s):
    """The class of each of these steps, background as one more -> N numbers."""
    labels = []
    for video in videos:
        steps = spread_steps(video, s.acp_steps)
        none = video.segments[:0]
        labels += acp.step_classes(
            steps, video.segments, video.labels, none, len(dataset.classes)).tolist()
    return labels


def in_two_dimensions(z):
    """The two principal components of the rows of z (N, C), normalised: N pairs of numbers."""
    z = F.normalize(z, dim=-1)
    z = (z - z.mean(0)).double().cpu()
    _, _, axes = torch.linalg.svd(z, full_matrices=False)
    return (z @ axes[:2].T).tolist()


def write_representation(folder):
    """Write representation.json into the folder of a run -> its path; raises BadInput.

    {"classes", the background last, "label" of each step, "before" and "after", its places}"""
    folder = Path(folder)
    s, dataset, detectors = read_run(folder)
    videos = dataset.labelled[:MOST]
    content = {"classes": [*dataset.classes, "background"],
               "label": classes_of(videos, dataset, s)}
    for key, detector in detectors.items():
        content[key] = in_two_dimensions(representation_of(detector, videos, dataset, s))
    path = folder / "representation.json"
    write_json(path, content)
    return path


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    parser = Parser(__name__)
    parser.add_argument("run", help="the folder that train.py wrote, its --out")
    with guard() as stop:
        args = parser.parse_args(argv)
        say(f"{write_representation(args.run)} is written: python -m extras.viewer shows it")
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
