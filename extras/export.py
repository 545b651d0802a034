"""The trained detector of a run as one file for other programs: ONNX, or torch's own .pt2.

    python -m extras.export runs/my --out detector.onnx   needs onnx, onnxscript, onnxruntime
    python -m extras.export runs/my --out detector.pt2    and detector.json; needs torch alone

Input   features (1, T, D) of a video, float32, any T >= 1, as the extractor gave them.
Output  segments (P, 2) in grid steps and joint scores (P, K), Eq. (4), of the P points of all
        levels, one after the other; level l has ceil(T / 2^l).

    segments, scores = InferenceSession("detector.onnx").run(None, {"features": features[None]})
    segments, scores = torch.export.load("detector.pt2").module()(features[None])

What is left to do are thresholds and Soft-NMS. Their numbers, the names of the K classes and how
steps become seconds are in the ONNX metadata, each as JSON, or in the .json beside a .pt2.
"""
import io
import json
import logging
import sys
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from alqa import joint_score
from evaluate import Localizer
from plumbing.files import check_replaced, write_atomically, write_json
from plumbing.runs import guard
from plumbing.settings import Parser
from plumbing.words import BadInput, say, short

MOST = 1e-4  # difference to torch, as a share of numbers over 1
FOR_ONNX = ("onnx", "onnxscript", "onnxruntime")
TOLD = ("stride", "frames", "resize", "skip_columns", "min_score", "min_length", "pre_nms",
        "nms_sigma", "nms_agnostic", "vote", "max_detections")  # settings that others need
SECONDS = "(steps * stride + frames / 2) / fps"
OF_STRIDE_0 = "stride = frames = seconds of the video * fps / T"
OF_RESIZED = "after resizing stride = frames = ((T - 1) * stride + frames) / resize"


# ---- The network --------------------------------------------------------------------------------

def least_steps(s):
    """So many steps give the attention of every level two blocks or more: pyramid() adds one.

    Whether there is one block is a branch that torch.export would settle for all lengths."""
    windows, _ = s.levels()
    needed = []
    for level, window in enumerate(windows):
        size = 2 * max(window // 2, 8)  # queries of a block, as model.local_attention() has them
        needed.append(size * 2 ** level)
    return max(needed)


class Portable(nn.Module):
    """The detector of a Localizer from features to segments and joint scores, for any length.

    features  (1, T, D), not standardised
    ->        segments (P, 2) in grid steps, scores (P, K)"""

    def __init__(self, localize):
        super().__init__()
        self.s = localize.s
        self.least = least_steps(localize.s)
        self.detector = localize.detector
        self.register_buffer("mean", localize.mean.float())
        self.register_buffer("std", localize.std.float())

    def standardised(self, features):
        """Features (1, T, D) as the detector takes them, those of a resized video resized."""
        if self.s.resize:
            features = F.interpolate(features.mT, self.s.resize, mode="linear").mT
        return (features - self.mean) / self.std

    def forward(self, features):
        """Level by level: Detector.forward() counts the points in numbers that tracing fixes.

        Padding changes no valid output, and is left out at the end."""
        x = self.standardised(features)
        rest = torch.sym_max(x.shape[1], self.least) - x.shape[1]
        mask = F.pad(torch.ones_like(x[..., 0], dtype=torch.bool), (0, rest))
        levels = self.detector.pyramid(F.pad(x, (0, 0, 0, rest)), mask)
        parts = []
        for level, (x, valid) in enumerate(zip(*levels)):
            stride = 2.0 ** level
            cls_logits, offsets, p_tiou, p_tnd = self.detector.heads(
                x, valid, self.detector.scales[level])
            time = torch.arange(valid.shape[1]) * stride
            start, end = time - offsets[..., 0] * stride, time + offsets[..., 1] * stride
            scores = joint_score(torch.sigmoid(cls_logits), p_tiou, p_tnd, self.s.eps)
            parts.append((torch.stack([start, end], -1), scores, valid))
        segments, scores, valid = (torch.cat(part, 1) for part in zip(*parts))
        return segments[valid], scores[valid]

    def expected(self, features):
        """What forward() must give, by the Detector itself."""
        x = self.standardised(features)
        outputs = self.detector(x, torch.ones(x.shape[:2], dtype=torch.bool))
        scores = joint_score(outputs.p_cls(), outputs.p_tiou, outputs.p_tnd, self.s.eps)
        return outputs.segments()[0], scores[0]

    def made_up(self, steps):
        """Features (1, steps, D) like those of the training videos."""
        generator = torch.Generator().manual_seed(steps)
        noise = torch.randn(1, steps, len(self.mean), generator=generator)
        return self.mean + noise * self.std


# ---- The files ----------------------------------------------------------------------------------

def about(localize):
    """What a program must know beside the network: {name: value}."""
    s = localize.s
    seconds = [SECONDS]
    if s.stride == 0:
        seconds.append(OF_STRIDE_0)
    if s.resize:
        seconds.append(OF_RESIZED)
    told = {name: getattr(s, name) for name in TOLD}
    return {"classes": localize.classes, "fps": localize.fps, "seconds": "; ".join(seconds)} | told


@contextmanager
def quietly():
    """torch's notes on what it traces are not for the user of a command."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def traced(portable):
    """The torch.export program of a Portable; its length is free."""
    example = portable.made_up(2 * portable.least)
    return torch.export.export(portable, (example,), dynamic_shapes=({1: torch.export.Dim.AUTO},))


def pt2_of(portable, told):
    """(the bytes of a .pt2 file, the function that they hold)."""
    file = io.BytesIO()
    torch.export.save(traced(portable), file)
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def onnx_of(portable, told):
    """(the bytes of an ONNX file with metadata, the function that they hold)."""
    import onnxruntime  # no requirement of the project
    program = torch.onnx.export(
        traced(portable), dynamo=True, verbose=False, input_names=["features"],
        output_names=["segments", "scores"])
    for name, value in told.items():
        program.model.metadata_props[name] = json.dumps(value)
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def function(features):
        found = session.run(None, {"features": features.numpy()})
        return [torch.from_numpy(part) for part in found]
    return content, function


KINDS = {".onnx": onnx_of, ".pt2": pt2_of}


def largest_difference(function, portable, steps):
    """How far a function is from the detector on a video of so many steps; of numbers over 1 as a
    share."""
    features = portable.made_up(steps)
    largest = 0.0
    for found, expected in zip(function(features), portable.expected(features)):
        if found.shape != expected.shape:
            return float("inf")
        share = (found - expected).abs() / expected.abs().clamp(min=1)
        largest = max(largest, share.max().item())
    return largest


def check_kind(path):
    """Raise BadInput unless a file of this name can be made here."""
    if path.suffix not in KINDS:
        raise BadInput(f"--out {short(path, 200)} must end in {' or '.join(KINDS)}")
    lacking = [name for name in FOR_ONNX if path.suffix == ".onnx" and find_spec(name) is None]
    if lacking:
        raise BadInput(f"a file .onnx needs packages that are not installed: pip install "
                       f"{' '.join(lacking)}; a file .pt2 needs none")


@torch.no_grad()
def write_export(run, path):
    """Write the detector of a run as a file .onnx or .pt2 -> its largest difference to torch.

    run  as a Localizer takes it
    Measured on a shorter and a longer video than it was traced with, no multiple of the strides.
    Raises BadInput, also for a difference over MOST, and writes nothing then."""
    path = Path(path)
    check_kind(path)
    beside = path.with_suffix(".json")
    if path.suffix == ".onnx":
        check_replaced(path, "nms_sigma", "file that this wrote")
    if path.suffix == ".pt2":
        check_replaced(beside, '"nms_sigma"', f"file beside {path} that this wrote")
        if path.exists() and not beside.exists():
            raise BadInput(f"{path} exists, and this did not write it: name another --out")
    localize = Localizer(run, device="cpu", precision="float32")
    portable = Portable(localize).eval()
    told = about(localize)
    say("tracing the detector: some minutes for .onnx")
    with quietly():
        content, function = KINDS[path.suffix](portable, told)
    lengths = portable.least // 2 + 1, 3 * portable.least + 1
    largest = max(largest_difference(function, portable, steps) for steps in lengths)
    if not largest <= MOST:
        raise BadInput(f"{path} is not written: what it gives differs from torch by {largest:.1e}, "
                       f"over {MOST:g}")
    write_atomically(path, lambda file: file.write(content))
    if path.suffix == ".pt2":
        write_json(beside, told, indent=1)
    return largest


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    parser = Parser(__name__)
    parser.add_argument("run", help="a run's folder, its checkpoint.pt or detector.pt")
    parser.add_argument("--out", required=True, help="the file to write: .onnx or .pt2")
    with guard() as stop:
        args = parser.parse_args(argv)
        largest = write_export(args.run, args.out)
        say(f"{args.out} is written; largest difference to torch on other lengths than the traced "
            f"one: {largest:.1e}")
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
