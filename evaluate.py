"""Detection with the joint score, results in ActivityNet's format, and mAP exactly as the ActivityNet toolkit computes it.

    python evaluate.py --checkpoint runs/hapt/checkpoint.pt
    python evaluate.py --pred pred.json --gt gt.json --subset test --tiou 0.3:0.7:0.1 --json out.json

Evaluating changes nothing: no checkpoint is written, no epoch is chosen.
"""
import argparse
import json
import math
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from alqa import joint_score
from data import BadInput, ahead, collate, load_dataset, load_item, read_annotations, read_json
from model import Detector, decode, soft_nms, tiou

# ---- Many processes -------------------------------------------------------------------------------------------------

def place():
    """(rank, number): which process this is of how many that torchrun started; (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join(device):
    """Join the processes that torchrun started; without torchrun nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def total(x):
    """The sum of a tensor over all processes; its gradient is that of this process's part, so that gradients can be summed."""
    if place()[1] == 1:
        return x
    everything = x.detach().clone()
    dist.all_reduce(everything)
    return x + (everything - x.detach())


def gather(x):
    """The rows (b, ...) of all processes in the order of the whole batch, (b * number, ...); gradients reach this one's rows."""
    rank, number = place()
    if number == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(number)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[rank] = x
    return torch.stack(parts, 1).flatten(0, 1)


def unite(part):
    """The dicts of all processes as one dict."""
    parts = [part]
    if place()[1] > 1:
        parts = [None] * place()[1]
        dist.all_gather_object(parts, part)
    return {key: value for part in parts for key, value in part.items()}


# ---- Detection ------------------------------------------------------------------------------------------------------

def build_detector(s, dim, num_classes):
    """The Detector that the settings `s` describe, for `dim` input channels; raises BadInput where they do not fit together."""
    try:
        windows = [int(w) for w in s.windows.split(",")]
    except ValueError:
        raise BadInput(f"setting windows must be whole numbers with commas, not {s.windows!r}") from None
    try:
        ranges = [(float(low), float(high)) for low, high in (pair.split(":") for pair in s.ranges.split(","))]
    except ValueError:
        raise BadInput(f"setting ranges must be low:high pairs with commas, not {s.ranges!r}") from None
    if not all(low <= high for low, high in ranges) or min(windows) < 0:
        raise BadInput(f"setting ranges must be low:high pairs, {s.ranges!r}, and windows not negative, {s.windows!r}")
    windows = windows * len(ranges) if len(windows) == 1 else windows
    if len(windows) != len(ranges):
        raise BadInput(f"setting windows gives {len(windows)} levels, setting ranges {len(ranges)}")
    if s.channels % s.heads:
        raise BadInput(f"setting channels, {s.channels}, is no multiple of heads, {s.heads}")
    return Detector(dim, num_classes, s.channels, s.heads, windows, s.stem, s.drop_path, ranges, s.alqa, s.tnd_bias, s.position,
                    s.offset_bias)


def forward(detector, batch, s, device):
    """The detector's Outputs of a batch, on the device and in the precision of the settings."""
    with torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bfloat16"):
        return detector(batch["feats"].to(device), batch["mask"].to(device))


def suppress(outputs, s):
    """Outputs of a batch -> one instances record a video (see detect): candidates, then Soft-NMS of all videos at once."""
    p_cls = torch.sigmoid(outputs.cls_logits)
    scores = joint_score(p_cls, outputs.p_tiou, outputs.p_tnd, s.eps) * outputs.mask[..., None]  # (B, P, K)
    B, P, K = scores.shape
    best, index = scores.flatten(1).topk(min(s.pre_nms, P * K), dim=1)  # (B, pre_nms)
    segments = decode(outputs.points, outputs.offsets).gather(1, (index // K)[..., None].expand(-1, -1, 2))
    keep = (best > s.min_score) & (segments[..., 1] - segments[..., 0] > s.min_length)
    video, column = keep.nonzero(as_tuple=True)
    index, label = index[video, column], index[video, column] % K
    group = video if s.nms_agnostic else video * K + label
    chosen, decayed = soft_nms(segments[video, column], best[video, column], group, s.nms_sigma, s.min_score, s.max_detections)
    records = []
    for b in range(B):
        mine = (video[chosen] == b).nonzero()[:s.max_detections, 0]
        rows = chosen[mine]
        point = index[rows] // K
        records.append({"segments": segments[b, column[rows]], "labels": label[rows], "scores": decayed[mine],
                        "p_cls": p_cls[b, point, label[rows]], "p_tiou": outputs.p_tiou[b, point], "p_tnd": outputs.p_tnd[b, point]})
    return records


@torch.no_grad()
def detect(detector, videos, data, s, device):
    """Detections of whole videos: a list, one instances record a video, by descending joint score, on the CPU:
    {"segments" (N, 2) in grid steps, "labels", "scores" (joint, after Soft-NMS), "p_cls", "p_tiou", "p_tnd"}.

    O(T) memory, whatever the length of a video. Of many processes each takes its share of the videos, and all get all detections.
    Keeps joint scores over s.min_score, the best s.pre_nms (point, class) pairs, segments longer than s.min_length steps, and
    after Soft-NMS s.max_detections a video."""
    detector.eval()
    (rank, number), records = place(), {}
    order = sorted(range(len(videos)), key=lambda i: videos[i].steps)  # videos of like length share a batch
    batches = [order[at:at + s.batch] for at in range(0, len(order), s.batch)][rank::number]
    load = lambda chosen: (chosen, collate([load_item(videos[i], data, s) for i in chosen]))
    for chosen, batch in ahead(load, batches):
        for i, record in zip(chosen, suppress(forward(detector, batch, s, device), s)):
            records[i] = {key: value.cpu() for key, value in record.items()}
    records = unite(records)
    return [records[i] for i in range(len(videos))]


def in_seconds(video, segments):
    """Segments (N, 2) in grid steps -> (N, 2) seconds within the video."""
    return video.grid.to_seconds(segments.double()).clamp(0, video.duration)


def export(videos, records, classes):
    """Detections in ActivityNet's result format: {"version", "results": {id: [{"label", "score", "segment"}]}, "external_data"}."""
    results = {video.id: [{"label": classes[label], "score": score, "segment": segment} for label, score, segment in
                          zip(r["labels"].tolist(), r["scores"].tolist(), in_seconds(video, r["segments"]).tolist())]
               for video, r in zip(videos, records)}
    return {"version": "VERSION 1.3", "results": results, "external_data": {}}


def export_pseudo_labels(videos, records, classes, status):
    """Pseudo labels in seconds: {id: [{"label", "segment", "score", "class_score", "tIoU", "tND", "similarity", "status"}]}.

    records: {id: record of train.make_pseudo_labels}; a similarity without labelled instances is None; `status` names the states."""
    names = {"score": "scores", "class_score": "p_cls", "tIoU": "p_tiou", "tND": "p_tnd", "similarity": "similarity"}
    found = {}
    for video in videos:
        r = {key: value.tolist() for key, value in records[video.id].items()}
        rows = zip(r["labels"], in_seconds(video, records[video.id]["segments"]).tolist(), r["status"], *(r[key] for key in names.values()))
        found[video.id] = [{"label": classes[label], "segment": segment, "status": status[state]}
                           | {name: None if math.isnan(value) else value for name, value in zip(names, values)}
                           for label, segment, state, *values in rows]
    return found


# ---- mAP ------------------------------------------------------------------------------------------------------------

def interpolated_ap(tp, positives):
    """Interpolated average precision of detections in descending order of score: tp (M,) bool, `positives` > 0 instances."""
    tp = np.cumsum(tp)
    recall = np.concatenate([[0], tp / positives, [1]])
    precision = np.concatenate([[0], tp / np.arange(1, len(tp) + 1), [0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    step = np.nonzero(recall[1:] != recall[:-1])[0] + 1
    return float(((recall[step] - recall[step - 1]) * precision[step]).sum())


def match(segments, group, truth, truth_group, tious):
    """Greedy matching within groups (a video's class): each detection, best score first, takes the free ground truth of largest
    tIoU, if that reaches the threshold.

    segments (M, 2) in descending order of score, truth (N, 2), groups integers -> true positives (thresholds, M) bool.
    All groups advance together, rank by rank, so the time is linear in M."""
    tp = np.zeros((len(tious), len(segments)), dtype=bool)
    seen = np.isin(group, truth_group)
    order = np.nonzero(seen)[0][np.argsort(group[seen], kind="stable")]
    names, first, counts = np.unique(group[order], return_index=True, return_counts=True)
    rows = np.argsort(-counts, kind="stable")  # groups with most detections first: those still active are a prefix
    names, first, counts = names[rows], first[rows], counts[rows]
    truth_order = np.argsort(truth_group, kind="stable")
    low, high = (np.searchsorted(truth_group[truth_order], names, side) for side in ("left", "right"))
    width = int((high - low).max(initial=0))
    slot = low[:, None] + np.arange(width)  # (G, width)
    real = slot < high[:, None]
    boxes = truth[truth_order][np.where(real, slot, 0)]  # (G, width, 2)
    free = np.repeat(real[None], len(tious), 0)  # (thresholds, G, width)
    for rank in range(int(counts.max(initial=0))):
        active = int((counts > rank).sum())
        rows = order[first[:active] + rank]
        overlap = tiou(segments[rows][:, None], boxes[:active])  # (active, width)
        open_ = free[:, :active] & (overlap >= tious[:, None, None])
        best = np.where(open_, overlap, -1).argmax(-1)  # (thresholds, active)
        hit = np.take_along_axis(open_, best[..., None], -1)[..., 0]
        tp[:, rows] = hit
        at, g = hit.nonzero()
        free[at, g, best[at, g]] = False
    return tp


def mean_average_precision(truth, predictions, tious):
    """mAP as the ActivityNet toolkit computes it, over the classes of the ground truth.

    truth: {id: Annotation} (segments in seconds, labels), one instance or more; predictions: {id: [{"label", "score", "segment"}]}.
    A detection in a video without ground truth is a false positive, one of a class without ground truth counts nowhere. Returns
    the content of metrics.json, as fractions."""
    tious = np.asarray(tious, dtype=np.float64)
    truth_rows = [(video, label, *segment) for video, a in truth.items() for label, segment in zip(a.labels, a.segments)]
    classes = list(dict.fromkeys(row[1] for row in truth_rows))
    class_of = {label: i for i, label in enumerate(classes)}
    rows = [d for found in predictions.values() for d in found if d["label"] in class_of]
    video_of = {video: i for i, video in enumerate(dict.fromkeys([*truth, *predictions]))}
    group = lambda pairs: np.fromiter((video_of[video] * len(classes) + class_of[label] for video, label in pairs), dtype=np.int64)
    truth_group = group(row[:2] for row in truth_rows)
    pred_group = group((video, d["label"]) for video, found in predictions.items() for d in found if d["label"] in class_of)
    truth_segments = np.array([row[2:] for row in truth_rows], dtype=np.float64).reshape(-1, 2)
    segments = np.array([d["segment"] for d in rows], dtype=np.float64).reshape(-1, 2)
    scores = np.array([d["score"] for d in rows], dtype=np.float64)
    order = np.argsort(scores, kind="stable")[::-1]
    tp = match(segments[order], pred_group[order], truth_segments, truth_group, tious)
    pred_class, ap = pred_group[order] % len(classes), {}
    for label, c in class_of.items():
        mine = tp[:, pred_class == c]
        ap[label] = [interpolated_ap(row, int((truth_group % len(classes) == c).sum())) for row in mine]
    mAP = np.mean(list(ap.values()), axis=0)
    return {"tiou": tious.tolist(), "mAP": mAP.tolist(), "average_mAP": float(mAP.mean()), "ap": ap,
            "videos": len(truth), "instances": len(truth_rows)}


def matched(record, video):
    """Which pseudo labels of a record (N,) bool match an instance of their class in a LabelledVideo at tIoU 0.5, one to one, the best
    score first."""
    order = torch.argsort(record["scores"], descending=True, stable=True)
    arrays = (record["segments"][order].double(), record["labels"][order], video.segments.double(), video.labels)
    right = torch.zeros(len(order), dtype=torch.bool)
    right[order] = torch.from_numpy(match(*(a.numpy() for a in arrays), np.array([0.5]))[0])
    return right


def pseudo_label_quality(records, hidden):
    """Quality of pseudo labels against the labels that training never sees (--audit), as Fig. 3(c) has it.

    records and hidden: one a video, {"segments", "labels"} and LabelledVideo. Returns class accuracy (of the ground truth that
    overlaps most), mean tIoU with it, positive accuracy (its class, and tIoU over 0.5), and precision and recall of one-to-one
    matches of the class at tIoU 0.5."""
    right, overlap, hits, predicted, real = [], [], 0, 0, 0
    for r, video in zip(records, hidden):
        predicted, real = predicted + len(r["labels"]), real + len(video.labels)
        if not len(r["labels"]) or not len(video.labels):
            overlap.append(torch.zeros(len(r["labels"]))), right.append(torch.zeros(len(r["labels"]), dtype=torch.bool))
            continue
        best, index = tiou(r["segments"][:, None], video.segments).max(1)
        overlap.append(best), right.append((video.labels[index] == r["labels"]) & (best > 0))
        hits += int(matched(r, video).sum())
    right, overlap = torch.cat(right), torch.cat(overlap)
    mean = lambda x: float(x.float().mean()) if len(x) else 0.0
    return {"class_accuracy": mean(right), "mean_tIoU": mean(overlap), "positive_accuracy": mean(right & (overlap > 0.5)),
            "precision": hits / max(predicted, 1), "recall": hits / max(real, 1)}


def table(metrics, title):
    """A table of mAP in percent, with the number of videos, instances and classes."""
    head = "".join(f"{t:8.2f}" for t in metrics["tiou"])
    body = "".join(f"{100 * m:8.2f}" for m in metrics["mAP"])
    return (f"{title}: {metrics['videos']} videos, {metrics['instances']} instances, {len(metrics['ap'])} classes\n"
            f"tIoU  {head}    Avg.\nmAP % {body}{100 * metrics['average_mAP']:8.2f}")


def parse_tious(text):
    """"0.3:0.7:0.1" (both ends included) or "0.3,0.5" -> thresholds; raises BadInput for anything else."""
    try:
        if ":" in text:
            first, last, step = map(float, text.split(":"))
            values = np.linspace(first, last, round((last - first) / step) + 1)
        else:
            values = np.array([float(t) for t in text.split(",")])
    except (ValueError, ZeroDivisionError, OverflowError):
        raise BadInput(f"--tiou must be start:end:step or a list with commas, not {text!r}") from None
    if not len(values) or not ((values > 0) & (values <= 1)).all():
        raise BadInput(f"--tiou {text!r} gives thresholds outside (0, 1]")
    return values


# ---- Files and commands ---------------------------------------------------------------------------------------------

def write_atomically(path, write):
    """write(temporary path), then move it to `path`: never half-written."""
    temporary = Path(f"{path}.tmp")
    write(temporary)
    os.replace(temporary, path)


def write_json(path, content, indent=None):
    """Write JSON atomically."""
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=indent), encoding="utf-8"))


CHECKPOINT = {"settings", "classes", "mean", "std", "labelled", "detector", "ema", "stage", "epoch"}


def read_checkpoint(path):
    """A checkpoint of train.py on the CPU, read without executing anything; raises BadInput if it is missing or no such file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or not CHECKPOINT <= set(checkpoint):
            raise ValueError("it is not a checkpoint of train.py")
        return checkpoint
    except FileNotFoundError:
        raise BadInput(f"checkpoint not found: {path}") from None
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        # torch.load raises all of these for a file that is cut short, pickled or foreign
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"checkpoint {path} cannot be read: {reason}") from None


def pick_device(name):
    """The device of that name, "auto" being cuda where there is one, else cpu; raises BadInput if it cannot be used. Under torchrun
    "cuda" is a device of its own for each process."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if name.startswith("cuda") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        rank, number = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if name != "cuda" or rank >= number:
            raise BadInput(f"--device {name} under torchrun: each process needs a device of its own, cuda, and {number} are here")
        torch.cuda.set_device(rank)
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


def pick_precision(device):
    """"bfloat16" where the hardware multiplies it fast (CUDA from Ampere on, CPUs with AMX or AVX512-BF16), else "float32"."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.backends.mkldnn.is_available()
        fast = fast and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return "bfloat16" if fast else "float32"


def evaluate_detector(detector, data, s, device):
    """(metrics, predictions) of a detector on the test videos."""
    predictions = export(data.test, detect(detector, data.test, data, s, device), data.classes)
    return mean_average_precision(data.ground_truth, predictions["results"], parse_tious(s.tiou)), predictions


def read_predictions(path):
    """{id: detections} of a file in ActivityNet's result format; raises BadInput for another form."""
    content = read_json(path, "prediction file")
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict):
        raise BadInput(f"prediction file {path} has no \"results\"")
    for video, found in results.items():
        if not isinstance(found, list):
            raise BadInput(f"prediction file {path}, video {video}: it must list predictions, not {found!r}")
        for d in found:
            good = isinstance(d, dict) and isinstance(d.get("segment"), list) and len(d["segment"]) == 2
            good = good and isinstance(d.get("label"), (str, int))
            if not good or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in [*d["segment"], d.get("score")]):
                raise BadInput(f"prediction file {path}, video {video}: a prediction needs a label, a score and a segment, not {d!r}")
    return {video: [d | {"label": str(d["label"])} for d in found] for video, found in results.items()}


def evaluate_checkpoint(args):
    """(metrics, title) of --checkpoint: detect on its test videos with its settings; raises BadInput."""
    device = torch.device(pick_device(args.device))
    checkpoint = read_checkpoint(args.checkpoint)
    s = SimpleNamespace(**checkpoint["settings"])
    try:
        s.tiou, s.weights = args.tiou or s.tiou, args.weights or s.weights
        data = load_dataset(s, trained=checkpoint)
        detector = build_detector(s, data.dim, len(data.classes)).to(device)
        detector.load_state_dict(checkpoint["ema" if s.weights == "ema" else "detector"])
    except (AttributeError, RuntimeError) as error:  # a setting or a weight is missing
        raise BadInput(f"checkpoint {args.checkpoint} is not of this version: {str(error).splitlines()[0]}") from None
    return evaluate_detector(detector, data, s, device)[0], f"{args.checkpoint} ({s.weights} weights)"


def evaluate_predictions(args):
    """The metrics of --pred against --gt; raises BadInput, also for a label that --gt does not know in any subset."""
    annotations, predictions = read_annotations(args.gt), read_predictions(args.pred)
    truth = {n: a for n, a in annotations.items() if args.subset is None or a.subset.lower() == args.subset.lower()}
    if not any(a.labels for a in truth.values()):
        raise BadInput(f"ground truth {args.gt} has no instance in the subset {args.subset!r}")
    known = {label for a in annotations.values() for label in a.labels}
    for video, found in predictions.items():
        for d in found:
            if d["label"] not in known:
                raise BadInput(f"prediction file {args.pred}, video {video}: the label {d['label']!r} is unknown to {args.gt}")
    return mean_average_precision(truth, predictions, parse_tious(args.tiou or "0.3:0.7:0.1"))


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", help="a checkpoint of train.py: detect on its test videos and evaluate")
    parser.add_argument("--weights", choices=("ema", "raw"), help="which weights of the checkpoint (default: as it was trained)")
    parser.add_argument("--device", default="auto", help="where to detect: auto, cpu, cuda, ...")
    parser.add_argument("--pred", help="predictions in ActivityNet's result format")
    parser.add_argument("--gt", help="ground truth in ActivityNet's annotation format")
    parser.add_argument("--subset", help="the subset of --gt to evaluate on, in any letter case (default: every video)")
    parser.add_argument("--tiou", help="thresholds, start:end:step (default: the checkpoint's, or 0.3:0.7:0.1)")
    parser.add_argument("--json", help="write the metrics here as well")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.pred) or bool(args.pred) != bool(args.gt):
        parser.error("give either --checkpoint, or --pred and --gt")
    try:
        if args.checkpoint:
            metrics, title = evaluate_checkpoint(args)
        else:
            metrics, title = evaluate_predictions(args), args.pred
        print(table(metrics, title))
        if args.json:
            write_json(args.json, metrics)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
