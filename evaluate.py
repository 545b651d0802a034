"""Detection, mAP exactly as the ActivityNet toolkit computes it, the audit, the Localizer.

    python evaluate.py --checkpoint runs/my                        mAP on its test videos
    python evaluate.py --checkpoint runs/my --features new.npy     what happens in a new video
    python evaluate.py --pred pred.json --gt gt.json --subset test --tiou 0.3:0.7:0.1

Evaluating changes nothing: no checkpoint is written, no epoch is chosen. Only detections of equal
score may be ranked otherwise than in the toolkit, whose sort is not stable.
"""
import sys
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from alqa import joint_score
from data import DataSettings, collate, load_item, place_video, take, test_data
from model import Detector, DetectorSettings, forward, soft_nms, tiou, vote
from plumbing import checkpoints, checks, forms, settings, tables
from plumbing.arguments import evaluation_of
from plumbing.files import source_of, sum_features, write_json
from plumbing.listing import TIOU, find_actions, trust_of
from plumbing.processes import dict_of_all, pick_device, prefetch, share_of
from plumbing.runs import guard
from plumbing.settings import Count, Flag, NotNegative, Positive, Share, Text
from plumbing.sources import whole_paths
from plumbing.words import BadInput, say, several, warn

# ---- Settings -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class DetectionSettings(DetectorSettings, DataSettings):
    """All that evaluation needs of a detector. [S] the paper, [A] ActionFormer, [J] neither."""
    since = "supervised"
    heading = "detection and mAP"
    eps: Positive("least reliability P_tiou - P_tnd in Eq. (4) and (5) [J]") = 1e-6
    pre_nms: Count("(point, class) pairs of a level before Soft-NMS [A]") = 2000
    min_score: NotNegative("least joint score, before and in Soft-NMS [A]") = 0.001
    min_length: NotNegative("least length of a segment, in steps [A]") = 0.05
    nms_sigma: Positive("sigma of Soft-NMS [A]") = 0.5
    nms_agnostic: Flag("Soft-NMS over all classes at once [A: ActivityNet]") = False
    vote: Share(
        "tIoU from which class-agnostic Soft-NMS averages a segment with its neighbours; 0: "
        "none [A: 0.9 ActivityNet]") = 0.0
    max_detections: Count("detections kept a video [A]") = 200
    tiou: Text("thresholds of mAP [S]") = "0.3:0.7:0.1"

    def __post_init__(self):
        super().__post_init__()
        settings.thresholds_of(self.tiou)

    def build(self, dim, num_classes):
        """The detector that these settings are of."""
        return Detector(dim, num_classes, self)


# ---- Detection ----------------------------------------------------------------------------------

def best_pairs(scores, sizes, most):
    """The best (point, class) pairs of each level: scores (P, K) -> points (N,), labels (N,).

    sizes  how many points each level has
    most   pairs of a level"""
    points = []
    labels = []
    first = 0
    for level in scores.split(sizes):
        _, index = level.flatten().topk(min(most, level.numel()))
        point, label = torch.unravel_index(index, level.shape)
        points.append(first + point)
        labels.append(label)
        first += len(level)
    return torch.cat(points), torch.cat(labels)


def suppress(outputs, s):
    """Outputs of a batch -> B records, as detect() has them: the best pairs, then Soft-NMS."""
    p_cls = outputs.p_cls()
    joint = joint_score(p_cls, outputs.p_tiou, outputs.p_tnd, s.eps)  # (B, P, K)
    segments = outputs.segments()
    records = []
    for b, scores in enumerate(joint * outputs.mask[..., None]):
        point, label = best_pairs(scores, outputs.sizes(), s.pre_nms)
        record = {
            "segments": segments[b, point],
            "labels": label,
            "scores": scores[point, label],
            "p_cls": p_cls[b, point, label],
            "p_tiou": outputs.p_tiou[b, point],
            "p_tnd": outputs.p_tnd[b, point],
        }
        length = record["segments"][:, 1] - record["segments"][:, 0]
        record = take(record, (record["scores"] > s.min_score) & (length > s.min_length))
        group = torch.zeros_like(record["labels"]) if s.nms_agnostic else record["labels"]
        chosen, decayed = soft_nms(record["segments"], record["scores"], group, s.nms_sigma,
                                   s.min_score, s.max_detections)
        kept = take(record, chosen) | {"scores": decayed}
        if s.vote and s.nms_agnostic:
            kept["segments"] = vote(kept["segments"], record["segments"], record["scores"], s.vote)
        records.append(take(kept, slice(s.max_detections)))
    return records


@torch.no_grad()
def detect(detector, videos, data, s):
    """Detections of whole videos {id: record}, best joint score first, on the CPU.

    O(T) memory. Of many processes each takes its share of the videos, and all get all detections.
    Keeps joint scores over s.min_score, the best s.pre_nms (point, class) pairs of each level,
    segments longer than s.min_length, and after Soft-NMS s.max_detections.
    A record: "segments" (N, 2) in grid steps, "labels", "scores" (joint, after Soft-NMS), "p_cls",
    "p_tiou", "p_tnd"."""
    training = detector.training
    detector.eval()
    order = sorted(videos, key=lambda video: video.steps)  # videos of like length share a batch
    firsts = share_of(range(0, len(order), s.batch))

    def load(first):
        return collate([load_item(video, data, s) for video in order[first:first + s.batch]])
    found = {}
    for batch in prefetch(load, firsts):
        outputs = forward(detector, batch, s)
        if not all(x.isfinite().all() for x in outputs.predictions()):
            raise BadInput(f"the detector gives NaN or infinity for the videos "
                           f"{several([video.id for video in batch['video']])}: their features, "
                           "standardised, or its weights are too large")
        for video, record in zip(batch["video"], suppress(outputs, s)):
            found[video.id] = {key: value.cpu() for key, value in record.items()}
    detector.train(training)
    found = dict_of_all(found)
    return {video.id: found[video.id] for video in videos}


def with_seconds(record, video):
    """A record with its segments in seconds, within the video, and without those of no length."""
    segments = video.in_seconds(record["segments"])
    return take(record | {"segments": segments}, segments[:, 1] > segments[:, 0])


def export(videos, records, columns, names):
    """Records {id: record} as lists of what happens, in seconds: {id: [{key: value}]}.

    records  None gives {}; NaN in them becomes None
    columns  {key: column of a record}
    names    {column: what its numbers are called}, the classes and what else has names"""
    found = {}
    for video in videos if records else ():
        record = with_seconds(records[video.id], video)
        lists = []
        for column in columns.values():
            values = record[column].tolist()
            if column in names:
                values = [names[column][value] for value in values]
            lists.append([None if value != value else value for value in values])
        found[video.id] = [dict(zip(columns, row)) for row in zip(*lists)]
    return found


# ---- mAP ----------------------------------------------------------------------------------------

def interpolated_ap(tp, positives):
    """Interpolated average precision of detections in descending order of score.

    tp         (M,) bool, which are true positives
    positives  > 0, the number of instances"""
    precision = np.cumsum(tp) / np.arange(1, len(tp) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a larger one
    return float(highest[tp].sum() / positives)  # each true positive is a step of 1 / positives


def toolkits_tiou(a, b):
    """tIoU without a floor under the union: where neither has a length, 0 / 0 is a hit."""
    with np.errstate(invalid="ignore"):
        overlap = tiou(a, b, eps=-np.inf)
    return np.where(np.isnan(overlap), np.inf, overlap)


def assign(segments, truth, tious):
    """The instance that each detection of a class in a video takes, at each threshold.

    Each, best score first, takes the free instance of largest tIoU, of equals the one that numpy
    sorts last (the toolkit's), if it reaches the threshold.
    segments  (M, 2), best score first
    truth     (N, 2)
    ->        (thresholds, M) numbers of instances, -1 without one"""
    overlap = toolkits_tiou(segments[:, None], truth)  # (M, N)
    free = np.ones((len(tious), len(truth)), dtype=bool)
    taken = np.full((len(tious), len(segments)), -1)
    reaching = overlap >= tious.min()  # few do, and only these need the loop
    for i in np.nonzero(reaching.any(1))[0]:
        near = np.nonzero(reaching[i])[0]
        near = near[overlap[i, near].argsort()[::-1]]
        if (overlap[i, near[1:]] == overlap[i, near[:-1]]).any():  # equals: as in the whole row
            near = overlap[i].argsort()[::-1][:len(near)]
        open_to = free[:, near] & (overlap[i, near] >= tious[:, None])  # (thresholds, near)
        hit = np.nonzero(open_to.any(1))[0]
        taken[hit, i] = near[open_to[hit].argmax(1)]
        free[hit, taken[hit, i]] = False
    return taken


def match(segments, truth, tious):
    """Which detections are true positives: assign(), as (thresholds, M) bool."""
    return assign(segments, truth, tious) >= 0


def ranked_hits(truth, found, tious):
    """The detections of one class by their score, and which are true positives.

    truth  {video: N segments}, one instance or more
    found  [(video, score, segment)], in any order
    ->     scores (M,), descending, and (thresholds, M) bool"""
    found = sorted(found[::-1], key=lambda detection: -detection[1])  # ties: the last comes first
    rows_of = {video: [] for video in truth}
    for row, (video, _, _) in enumerate(found):
        if video in truth:
            rows_of[video].append(row)
    scores = np.array([score for _, score, _ in found], dtype=np.float64)
    segments = np.array([segment for _, _, segment in found], dtype=np.float64).reshape(-1, 2)
    tp = np.zeros((len(tious), len(found)), dtype=bool)
    for video, mine in rows_of.items():
        tp[:, mine] = match(segments[mine], np.array(truth[video]), tious)
    return scores, tp


def mean_average_precision(truth, predictions, tious):
    """mAP as the ActivityNet toolkit computes it, over the classes of the ground truth.

    A detection in a video without ground truth is a false positive, one of a class without ground
    truth counts nowhere.
    truth        {id: Annotation}, one instance or more
    predictions  {id: [{"label", "score", "segment"}]}, times in seconds as those of the truth
    ->           the content of metrics.json, as fractions"""
    tious = np.asarray(tious, dtype=np.float64)
    instances = defaultdict(lambda: defaultdict(list))  # {class: {video: [segment]}}
    for video, a in truth.items():
        for label, segment in zip(a.labels, a.segments):
            instances[label][video].append(segment)
    found = defaultdict(list)  # {class: [(video, score, segment)]}
    for video, detections in predictions.items():
        for d in detections:
            found[d["label"]].append((video, d["score"], d["segment"]))
    ap, ranked = {}, {}
    for label, segments in instances.items():
        number = sum(map(len, segments.values()))
        scores, tp = ranked_hits(segments, found[label], np.append(tious, TIOU))
        ap[label] = [interpolated_ap(hits, number) for hits in tp[:-1]]
        ranked[label] = scores, tp[-1], number
    mAP = np.mean(list(ap.values()), axis=0)
    return {
        "tiou": tious.tolist(),
        "mAP": mAP.tolist(),
        "average_mAP": float(mAP.mean()),
        "ap": ap,
        "videos": len(truth),
        "instances": sum(len(a.labels) for a in truth.values()),
        "trust": trust_of(ranked),
    }


def evaluate_detector(detector, data, s):
    """(metrics, predictions) of a detector on the test videos; metrics None without annotations."""
    records = detect(detector, data.test, data, s)
    columns = {"label": "labels", "score": "scores", "segment": "segments"}
    found = export(data.test, records, columns, {"labels": data.classes})
    external = {}
    if s.ext_scores:
        found = forms.with_video_scores(found, forms.read_video_scores(s.ext_scores))
        external = {"used": True}
    predictions = forms.result_format(found, external)
    if not data.truth:
        return None, predictions
    judged = {name: found[name] for name in data.truth}
    metrics = mean_average_precision(data.truth, judged, settings.thresholds_of(s.tiou))
    return metrics | {"external_scores": s.ext_scores}, predictions


# ---- The audit of pseudo labels -----------------------------------------------------------------

def matched(record, video):
    """Which pseudo labels of a record match an instance of their class in a LabelledVideo.

    -> (N,) bool: at tIoU 0.5, one to one, the best score first"""
    right = torch.zeros(len(record["labels"])).bool()
    order = torch.argsort(record["scores"], descending=True, stable=True)
    for c in video.labels.unique():
        mine = order[record["labels"][order] == c]
        segments = record["segments"][mine].double().numpy()
        truth = video.segments[video.labels == c].double().numpy()
        right[mine] = torch.from_numpy(match(segments, truth, np.array([0.5]))[0])
    return right


def pseudo_label_quality(records, hidden):
    """Quality of pseudo labels against labels that training never sees, as Fig. 3(c) has it.

    records  {id: record}, hidden {id: LabelledVideo}
    ->       class accuracy (of the instance that overlaps most), mean tIoU with it, positive
             accuracy (its class, and tIoU over 0.5), precision and recall of one-to-one matches
             of the class at tIoU 0.5"""
    total = torch.zeros(4).double()
    found = instances = 0
    for name, video in hidden.items():
        record = records[name]
        overlap = tiou(record["segments"][:, None], video.segments)  # (M, N)
        best, nearest = F.pad(overlap, (0, 1)).max(1)  # one more: 0 without an instance
        labels = F.pad(video.labels, (0, 1), value=-1)
        right = (labels[nearest] == record["labels"]) & (best > 0)
        columns = right, best, right & (best > 0.5), matched(record, video)
        total += torch.stack([column.double().sum() for column in columns])
        found += len(best)
        instances += len(video.labels)
    names = ("class_accuracy", "mean_tIoU", "positive_accuracy", "precision")
    quality = dict(zip(names, (total / max(found, 1)).tolist()))
    return quality | {"recall": float(total[3]) / max(instances, 1)}


# ---- New videos ---------------------------------------------------------------------------------

class Localizer:
    """A trained detector that says what happens from when to when in a new video.

        localize = Localizer("runs/my")
        segments, labels, scores = localize(np.load("video.npy"))

    path     a run's folder, its checkpoint.pt, or its small detector.pt
    kind     the class of its settings, whose `weights` choose the raw or the averaged ones
    changes  settings that differ from the training's, as fps, stride and frames of other features,
             min_score (0.001), max_detections (200); an unknown one raises BadInput"""

    def __init__(self, path, kind=DetectionSettings, **changes):
        content = checkpoints.load(path, kind)
        s = settings.settings_from(content["settings"], kind, f"checkpoint {path}")
        device = pick_device(changes.pop("device", "auto"))
        self.s = settings.changed(s, {"device": device} | changes)
        self.fps = self.s.fps or content["fps"]  # of the training videos
        self.classes = content["classes"]
        self.mean, self.std = content["mean"], content["std"]
        self.columns = content.get("columns")  # of the features, where their header names them
        self.seen = content.get("fingerprint", {})  # the training videos, where it names them
        self.trust = checkpoints.trust_of(content, self.s.weights)
        warn(checkpoints.unfinished(content, path))
        self.detector = self.s.build(len(self.mean), len(self.classes)).to(device)
        self.detector.load_state_dict(checkpoints.weights_of(content, self.s.weights))

    def __call__(self, feats, duration=None, name="given"):
        """Find the actions of a video, best joint score first.

        feats     (T, D), an array or a feature file, not standardised
        duration  seconds; without it the features' span
        ->        segments (N, 2) in seconds, N labels, scores (N,)
        Raises BadInput for another D."""
        return self.find(self.open(feats, duration, name))

    def open(self, feats, duration, name):
        """The Video of such features; raises BadInput."""
        feats = source_of(feats)
        sums = sum_features(feats, self.s.reading(), name)
        checks.check_new_video(name, feats, sums, self, duration)
        note = forms.unknown_video(duration, self.fps)
        video = place_video(name, note, feats, sums.steps, self.s)
        warn(checks.odd_video(video, note, sums, self.s))
        return video

    def find(self, video):
        """What __call__() gives, of a Video."""
        record = with_seconds(detect(self.detector, [video], self, self.s)[video.id], video)
        labels = [self.classes[label] for label in record["labels"]]
        return record["segments"].numpy(), labels, record["scores"].numpy()


# ---- The command line ---------------------------------------------------------------------------

def evaluate_checkpoint(args, changes, kind):
    """(metrics, title) of --checkpoint: detect on its test videos; raises BadInput."""
    trained = Localizer(args.checkpoint, kind, **whole_paths(changes))
    s = trained.s
    if s.test_subset == "none":
        raise BadInput("the run was trained without a test set: name one by --subset")
    data = test_data(s, trained)
    warn(data.warnings + checks.odd_tests(data.test, trained.seen))
    metrics, _ = evaluate_detector(trained.detector, data, s)
    if metrics is None:
        raise BadInput(f"no test video of {s.annotations or s.dataset} has annotations: there is "
                       "no mAP")
    return metrics, f"{args.checkpoint} ({s.weights} weights)"


def evaluate_predictions(args):
    """(metrics, title) of --pred against --gt; raises BadInput."""
    annotations = tables.read_any(args.gt, args.ignore_labels, args.fps)
    predictions = forms.read_predictions(args.pred)
    truth, subset = checks.truth_for(predictions, annotations, args.subset, args.gt)
    warn(checks.odd_predictions(predictions, truth, annotations))
    warn(forms.never_ignored(annotations, args.ignore_labels or "", args.gt))
    tious = settings.thresholds_of(args.tiou or DetectionSettings.tiou)
    return mean_average_precision(truth, predictions, tious), f"{args.pred}, subset {subset}"


def main(argv=None, kind=DetectionSettings):
    """The command line -> the exit code; kind: the class of a checkpoint's settings."""
    with guard() as stop:
        args, changes, mode = evaluation_of(argv, kind)
        if mode == "new":
            find_actions(Localizer(args.checkpoint, kind, **changes), args)
        else:
            metrics, title = (evaluate_predictions(args) if mode == "predictions"
                              else evaluate_checkpoint(args, changes, kind))
            if args.json:
                write_json(args.json, metrics)
            say(forms.table(metrics, title))
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
