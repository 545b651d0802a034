"""The list of what happens in new videos: from which score on, how far to trust it; in and out."""
from pathlib import Path

import numpy as np

from plumbing import forms
from plumbing.sources import files_of_videos
from plumbing.words import BadInput, refuse, say, short, warn

LEAST_SCORE = 0.3  # of what is listed, where no test says a better one
SAME = 0.5  # tIoU over which two detections are one
TIOU = 0.5  # from which a detection that is listed is right
SCORES = np.arange(1, 20) / 20  # at which the curves are given


# ---- How far to trust it ------------------------------------------------------------------------

def points_of(scores, hits, instances, least):
    """Precision, recall and F1 of what has at least these scores.

    scores (M,), descending, hits (M,) bool, instances: how many there are, least (S,)
    -> {"score", "precision", "recall", "f1"}, each (S,)"""
    listed = np.searchsorted(-scores, -least, side="right")
    right = np.concatenate([[0], np.cumsum(hits)])[listed]
    precision, recall = right / np.maximum(listed, 1), right / max(instances, 1)
    f1 = 2 * right / np.maximum(listed + instances, 1)
    return {"score": least, "precision": precision, "recall": recall, "f1": f1}


def operating_point(scores, hits, instances):
    """The point of the best F1, and "curve", the points at SCORES; numbers as JSON has them."""
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], hits[order]
    every = points_of(scores, hits, instances, np.floor(1000 * np.append(scores, 1)) / 1000)
    best = every["f1"].argmax()
    curve = points_of(scores, hits, instances, SCORES)
    return {key: float(values[best]) for key, values in every.items()} | {
        "curve": {key: values.tolist() for key, values in curve.items()}}


def trust_of(ranked):
    """The operating_point() of all classes and of each: {class: (scores, hits, instances)}."""
    scores, hits, instances = zip(*ranked.values())
    whole = operating_point(np.concatenate(scores), np.concatenate(hits), sum(instances))
    classes = {label: operating_point(*row) for label, row in ranked.items()}
    return {"tiou": TIOU} | whole | {"classes": classes}


# ---- The list -----------------------------------------------------------------------------------

def are_one(a, b):
    """Whether the tIoU of two segments [start, end] is over SAME."""
    starts, ends = zip(a, b)
    return min(ends) - max(starts) > SAME * (max(ends) - min(starts))


def once(actions):
    """Actions [{"segment", "label", "score"}] without those that are mostly one of a better score.
    """
    kept = []
    for a in sorted(actions, key=lambda a: -a["score"]):
        if not any(are_one(a["segment"], b["segment"]) for b in kept):
            kept.append(a)
    return kept


def actions_of(found, least, exclusive):
    """(the actions listed of a video, in order of time, whether none of them has the score).

    found      segments (N, 2), labels, scores
    least      score; without an action of it the best there is
    exclusive  whether a segment is listed under one class alone"""
    actions = forms.actions(*found, least)
    below = not actions and len(found[2]) > 0
    if below:
        actions = forms.actions(*found, max(found[2]).item())[:1]
    if exclusive:
        actions = once(actions)
    return sorted(actions, key=lambda a: a["segment"]), below


def id_of(name, s):
    """The id of a video by the name of its feature file, without what the settings add to ids."""
    place = Path(name)  # the last ending is gone
    bare = place.name.removeprefix(s.prefix).removesuffix(s.extension.rpartition(".")[0])
    return place.with_name(bare or place.name).as_posix()


def videos_of(localize, args):
    """{id: Video} of the feature files of args.features, all looked at before the first is
    searched; raises BadInput."""
    files = files_of_videos(args.features)
    if args.duration and localize.s.stride and len(files) > 1:
        raise BadInput(f"--duration is of one video, and {args.features} holds {len(files)}")
    if args.duration and len(files) > 1:
        warn([f"--duration {args.duration:g} is taken for each of the {len(files)} videos"])
    videos = {}
    faults = {}
    for name, file in files.items():
        try:
            video = localize.open(file, args.duration, id_of(name, localize.s))
            if video.id in videos:
                raise BadInput(f"{args.features} holds two files of the video {short(video.id)}")
            localize.s.look_at(video)
            videos[video.id] = video
        except BadInput as fault:
            faults[name] = fault
    refuse(faults)
    return videos


def find_actions(localize, args):
    """Print, and write to args.out, what happens in the feature files of args.features.

    localize  an evaluate.Localizer; args: of evaluate.py"""
    videos = videos_of(localize, args)
    if args.out:
        forms.check_ending(args.out, len(videos))
        forms.check_new(args.out)
    trust = localize.trust
    least = args.min_score
    if least is None:
        least = trust.get("score", LEAST_SCORE)
        if trust.get("videos"):
            say(f"of such actions {100 * trust['precision']:.0f} % were right on {trust['videos']} "
                f"test videos, {100 * trust['recall']:.0f} % were found")
    found = {}
    for name, video in videos.items():
        listed, below = actions_of(localize.find(video), least, trust.get("exclusive", False))
        found[name] = [] if below else listed
        count = 0 if below else len(listed)
        say(f"{short(name)}: {count} actions of a score of at least {least:.3g}"
            f"{'; the best there is:' if below else ''}")
        if listed:
            say(forms.listing(listed))
    if args.out:
        forms.write_found(args.out, found)
