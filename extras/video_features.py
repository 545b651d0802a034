"""Features of videos: a row a window of frames, by a video network of torchvision.

    python -m extras.video_features videos --out features
    python -m extras.video_features videos --network r3d_18 --frames 16 --stride 8 --rate 15

Features are <id>.npy of shape (windows, the network's width), float32. Videos that have theirs are
skipped: the command goes on where it was stopped. A video that cannot be read is a warning, and an
error when the others are done. It needs two packages that the rest does without: torchvision and
av.
"""
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch

from extras.windows import keep_settings, read_command, write_features
from plumbing.files import OF_VIDEOS, SOUNDS, VIDEOS, reading
from plumbing.processes import pick_device
from plumbing.runs import guard
from plumbing.settings import CheckedSettings, Count, OneOf, Positive, Text
from plumbing.sources import files_of_videos
from plumbing.words import BadInput, nearest, refuse, say, short, shown, warn

HEADS = ("fc", "classifier", "head")  # how torchvision's networks call their classification layer


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """What the command is asked for."""
    videos: Text("a video, or a folder of them")
    out: Text("folder of the features, with the sub-folders of the videos") = "features"
    network: Text("a video network of torchvision") = "r3d_18"
    weights: OneOf(("default", "none"), "torchvision's, or random ones") = "default"
    frames: Count("frames of a window") = 16
    stride: Count("frames from the start of a window to that of the next") = 8
    rate: Positive("frames a second, whatever the video has") = 15.0
    device: Text("auto, cpu, cuda, ...") = "auto"


def how_made(s):
    """What makes features others."""
    return {name: asdict(s)[name] for name in ("network", "weights", "frames", "stride", "rate")}


# ---- From a video to features -------------------------------------------------------------------

def packages():
    """The modules av and torchvision.models; raises BadInput where one cannot be imported."""
    try:
        import av
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: of another version than torch
        raise BadInput("video features need two packages that the rest does without, pip install "
                       f"torchvision av: {short(error)}") from None
    return av, models


@torch.inference_mode()
def row_of(network, frames):
    """The features (D,) of a window of prepared frames, each (3, 1, H, W)."""
    window = torch.cat(list(frames), dim=1)
    device = next(network.parameters()).device
    return network(window[None].to(device))[0].cpu().numpy()


def load_network(s, models):
    """A network that gives what its classification layer would take, and what prepares its frames.

    Raises BadInput for a name, weights or a number of frames that it cannot have."""
    names = models.list_models(module=models.video)
    if s.network not in names:
        raise BadInput(f"--network must be one of {', '.join(names)}, not {shown(s.network)}"
                       f"{nearest(s.network, names)}")
    preset = models.get_model_weights(s.network).DEFAULT
    prepare = preset.transforms()
    torch.manual_seed(0)  # random weights are the same ones when the command goes on
    network = models.get_model(s.network, weights=None)
    if s.weights == "default":
        with reading("weights", preset.url, "they can be neither fetched nor found in the cache"):
            network.load_state_dict(preset.get_state_dict(check_hash=True, weights_only=True))
    head = next(name for name in HEADS if hasattr(network, name))
    setattr(network, head, torch.nn.Identity())
    network.eval().to(pick_device(s.device))
    try:
        row_of(network, [prepare(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))] * s.frames)
    except RuntimeError as error:
        reason = short(str(error).splitlines()[0], 100)
        raise BadInput(f"--network {s.network} cannot take {s.frames} frames: {reason}") from None
    return network, prepare


def frames_at(path, rate, av):
    """Yield the frames of a video, (1, 3, H, W) uint8, that are nearest to 0, 1 / rate, ... s.

    Time starts at its first frame. Raises BadInput for what cannot be decoded."""
    fault = "it is damaged, or no video"
    with reading("video", path, fault), av.open(str(path)) as container:
        start, count = None, 0
        for frame, following in pairwise(chain(container.decode(video=0), [None])):
            start = frame.time if start is None else start
            until = following.time if following else frame.time + 1 / rate
            while count / rate < (frame.time + until) / 2 - start:
                yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None]
                count += 1


def features_of(path, s, network, prepare, av):
    """The features of a video (windows, D); raises BadInput if it has none."""
    window = deque(maxlen=s.frames)
    rows = []
    count = 0
    for frame in frames_at(path, s.rate, av):
        window.append(prepare(frame))
        count += 1
        if count >= s.frames and (count - s.frames) % s.stride == 0:
            rows.append(row_of(network, window))
    if not rows:
        raise BadInput(f"video {path} is shorter than a window: it has {count} frames at {s.rate:g}"
                       f" a second, and --frames is {s.frames}")
    return np.array(rows, dtype=np.float32)


# ---- All videos ---------------------------------------------------------------------------------

def make_features(s):
    """Write the features of all videos, and say what to train with; raises BadInput."""
    av, models = packages()
    files = files_of_videos(s.videos, [kind for kind in VIDEOS if kind not in SOUNDS])
    targets = {name: Path(s.out, f"{name}.npy") for name in files}
    todo = [name for name in files if not targets[name].exists()]
    network, prepare = load_network(s, models) if todo else (None, None)
    keep_settings(Path(s.out, OF_VIDEOS), how_made(s), [targets[name] for name in todo])
    say(f"{len(files)} videos, {len(files) - len(todo)} have their features already")
    faults = {}
    began = time.time()
    for done, name in enumerate(todo, 1):
        try:
            features = features_of(files[name], s, network, prepare, av)
            write_features(targets[name], features)
        except BadInput as error:
            faults[name] = error
            warn([error])
            continue
        minutes = (time.time() - began) / 60 / done * (len(todo) - done)
        say(f"{done} of {len(todo)}: {name}, {len(features)} rows; about {minutes:.0f} min left")
    refuse(faults)
    say(f"the features are in {s.out}; train with --stride {s.stride} --frames {s.frames} "
        f"--fps {s.rate:g}")


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    with guard() as stop:
        make_features(read_command(argv, Settings))
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
