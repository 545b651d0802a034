"""Checks: what is odd about a data set or about predictions; what a run says of its data."""
import unicodedata
from collections import Counter
from itertools import compress, takewhile
from numbers import Real
from statistics import median_low

import numpy as np
import torch

from plumbing import forms, sources
from plumbing.files import check_columns, columns_of, place_of, read_json
from plumbing.processes import process_count
from plumbing.words import BadInput, several, short, shown


def check_float32(x, video, start):
    """Raise BadInput where standardised features (T, D) of a Video, from a step on, overflow."""
    faulty = (~x.isfinite()).any(1).nonzero()
    if len(faulty):
        raise BadInput(f"video {short(video.id)}: feature file {video.source} is beyond float32 at "
                       f"step {start + int(faulty[0])}, standardised")


def check_channels(name, source, sums, trained, skip=0):
    """Raise BadInput where a video's features have other channels than those of all videos.

    source   of the video
    sums     of all videos, {id: files.Sums}
    trained  what has the `mean` (D,) and the `columns` of a checkpoint; None: D is that of the
             first video
    skip     leading columns that are left out"""
    mine, first = sums[name], trained or next(iter(sums.values()))
    expected, width = len(first.mean), len(mine.mean)
    columns = columns_of(source)[skip:] if trained else []
    others = "the training had" if trained else "the others have"
    check_columns(columns, trained and trained.columns, f"{place_of(source, name)} has", others)
    if width == expected:
        return
    like = mine.steps == expected or not trained and len({x.steps for x in sums.values()}) == 1
    turned = "; transposed it would fit: features are (T, D)" if like else ""
    raise BadInput(f"{place_of(source, name)} has {width} channels, {others} {expected}{turned}")


def rises_evenly(sums, channel):
    """Whether a channel grows by the same from step to step in all videos, as a clock does.

    The spread of a + b t over T steps is b^2 T (T^2 - 1) / 12."""
    T = np.array([x.steps for x in sums.values()], dtype=np.float64)
    spread = np.array([x.spread[channel] for x in sums.values()])
    b = np.sqrt(12 * spread / np.maximum(T * (T ** 2 - 1), 1))
    enough = len(T) > 2 or len(set(T)) == 2
    return enough and b.min() > 0 and b.max() < (1 + 1e-4) * b.min()


def odd_features(sums):
    """Yield warnings about features {id: files.Sums}."""
    gaps = +Counter({name: x.gaps for name, x in sums.items()})  # + leaves out zeros
    if gaps:
        yield (f"{gaps.total()} steps of {len(gaps)} videos hold NaN or infinity and were "
               f"filled from the step before: {several(gaps)}")
    channels = range(min((len(x.mean) for x in sums.values()), default=0))
    clocks = len([*takewhile(lambda channel: rises_evenly(sums, channel), channels)])
    if clocks:
        yield (f"the first {clocks} column(s) of the features rise evenly in every video, as a "
               f"clock or a row number does; --skip-columns {clocks} leaves them out")


def check_grid(a, s, where):
    """Raise BadInput where an Annotation lacks what its grid needs."""
    if s.stride == 0 and not a.duration:
        raise BadInput(f"{where} it has no duration, which --stride 0 needs")
    if s.stride and not s.fps and not a.fps:
        raise BadInput(f"{where} it has no fps; give --fps")


def likely_unit(last, duration, fps):
    """"; are its times frames, not seconds?" where the last one would fit so; else ""."""
    a_second = {"frames": fps, "milliseconds": 1e3, "microseconds": 1e6}
    for unit, number in a_second.items():
        if number and 0.1 * duration < last / number <= duration:
            return f"; are the times {unit}, not seconds?"
    return ""


def check_segments(a, video, where):
    """Raise BadInput for the segments of an Annotation that lie outside their Video."""
    duration = video.duration
    bad = a.segments[~forms.good_segments(a, duration)].tolist()
    if not bad:
        return
    others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    start, end = bad[0]
    fault = (f"ends before it starts or lies outside the video (duration {duration:g})"
             f"{likely_unit(a.segments.max(), duration, video.grid.fps)}")
    if start == end:
        fault = "is empty: give events a length"
    raise BadInput(f"{where} the segment {bad[0]}{others} {fault}; --bad-segments skip leaves "
                   "such segments out")


def left_out(annotations, videos):
    """Yield what --bad-segments skip leaves out, in words."""
    bad = +Counter({name: (~forms.good_segments(a, videos[name].duration)).sum()
                    for name, a in annotations.items()})
    if bad:
        yield f"{bad.total()} segments of {len(bad)} videos, empty or outside: {several(bad, 2)}"


def repeated(annotations):
    """Yield a warning about instances of {id: Annotation} that repeat another."""
    twice = +Counter({
        name: len(a.labels) - len({*zip(map(tuple, a.segments.tolist()), a.labels)})
        for name, a in annotations.items()})
    if twice:
        yield (f"{twice.total()} instances of {len(twice)} videos repeat another of the same "
               f"segment and label, and count as well: {several(twice)}")


def cut_off(annotations, videos):
    """Yield a warning about segments that begin before their video, or end after it, by more than
    a window or a stride."""
    beyond = Counter()
    for name, a in annotations.items():
        grid, duration = videos[name].grid, videos[name].duration
        window = max(grid.frames, grid.stride) / grid.fps
        far = np.maximum(-a.segments[:, 0], a.segments[:, 1] - duration) > window
        beyond[name] = (far & forms.good_segments(a, duration)).sum()
    cut = +beyond
    if cut:
        yield (f"{cut.total()} segments of {len(cut)} videos begin before their video or end "
               f"after it, and are cut there where they teach: {several(cut)}")


def check_spans(videos, annotations, s, dim):
    """Yield warnings where features span another time than the annotations say; raises BadInput.

    A median off by more than a window and 5 % is a warning, one off by half an error.
    dim: the features' width, their length if they are transposed."""
    known = [v for v in videos.values() if annotations[v.id].duration and s.stride]
    if not known:
        return
    spans = np.array([v.grid.span(v.steps) for v in known])
    durations = np.array([v.duration for v in known])
    ratios = spans / durations
    ratio = np.median(ratios)
    off = np.abs(spans - durations)
    frames = np.clip(s.frames, s.stride, 8 * s.stride)  # where --frames is wrong, not more
    window = frames / np.median([v.grid.fps for v in known])
    if abs(ratio - 1) > 0.05 and np.median(off) > window:
        text = (f"the features span {ratio:.2f} times the duration that the annotations say "
                f"(median of {len(known)} videos; {short(known[0].id)}: {spans[0]:.1f} s of "
                f"{durations[0]:.1f} s); are --stride, --frames and --fps right? --stride "
                f"{s.stride / ratio:.4g} would fit")
        turned = np.median([v.grid.span(dim) for v in known] / durations)
        if abs(turned - 1) < 0.05:
            text += "; transposed they would fit: features are (T, D)"
        if not 2 / 3 < ratio < 3 / 2 and not s.trust_grid:
            raise BadInput(f"{text}; --trust-grid goes on")
        yield text
        return
    far = [v.id for v in compress(known, (off > window) & (np.abs(ratios - 1) > 0.05))]
    if far:
        yield (f"the features of {len(far)} videos span another time than their annotations say, "
               f"by more than 5 %: {several(far)}; is their fps right?")


def instances_of(labelled, s):
    """The segments (N, 2) of LabelledVideos, and (N,) bool which hold a grid step, and fit a crop.
    """
    segments = [video.segments for video in labelled]
    on_step = [video.on_a_step() for video in labelled]
    in_crop = [video.in_a_crop(s) for video in labelled]
    return torch.cat(segments), torch.cat(on_step), torch.cat(in_crop)


def steps_for(lengths, s):
    """The --max-steps with which a crop holds enough of the longest of some instances."""
    return int(s.crop_keep * lengths.max()) + 1


def why_nothing(labelled, annotations, s):
    """Why LabelledVideos teach nothing, in words; "" where an instance can be learned.

    annotations  {id: Annotation} of all videos"""
    segments, on_step, in_crop = instances_of(labelled, s)
    written = sum(len(annotations[video.id].labels) for video in labelled)
    if not written:
        return "they have no instance; --split stratified draws videos that have some"
    if not len(segments):
        return (f"their {written} instances are empty or outside the video and left out, as "
                "--bad-segments skip says")
    lengths = segments.diff()
    fault = f"none of their {len(segments)} instances holds a grid step, as"
    advice = "are --stride, --frames and --fps right?"
    if not on_step.any() and (segments[:, 0] > max(video.steps for video in labelled)).any():
        return f"{fault} they begin after the last one ({advice})"
    if not on_step.any():
        return (f"{fault} the longest has {lengths.max():.2g} of a step: give events a length, or "
                f"make features more often ({advice})")
    if not (on_step & in_crop).any():
        return (f"all of their {len(segments)} instances are too long for a crop; --max-steps "
                f"{steps_for(lengths, s)} would do")
    return ""


def check_labelled(labelled, annotations, path, s):
    """Yield warnings about the LabelledVideos; raises BadInput where nothing is to be learned."""
    why = why_nothing(labelled, annotations, s)
    if why:
        names = several([video.id for video in labelled])
        raise BadInput(f"annotation file {path}: there is nothing to learn from the labelled "
                       f"videos {names}: {why}")
    silent = [video.id for video in labelled if not annotations[video.id].labels]
    if silent:
        yield (f"{len(silent)} of {len(labelled)} labelled videos teach that nothing happens in "
               f"them: {several(silent)}")
    segments, on_step, in_crop = instances_of(labelled, s)
    if not on_step.all():
        yield (f"{(~on_step).sum()} of {len(on_step)} labelled instances hold no grid step and "
               "teach nothing")
    if not in_crop.all():
        yield (f"{(~in_crop).sum()} of {len(in_crop)} labelled instances are too long for a crop "
               f"and teach nothing; --max-steps {steps_for(segments.diff(), s)} would do")


def check_raw(labelled, s):
    """Yield a warning where the LabelledVideos' features look like rows of a raw recording.

    s: also the DetectorSettings, for the levels"""
    segments, _, _ = instances_of(labelled, s)
    rate = min(video.grid.fps / video.grid.stride for video in labelled)
    last_level = s.levels()[1][-1][0]
    if rate > 20 and (segments.diff() / 2 >= last_level).all():
        yield (f"{rate:.3g} steps a second and all labelled instances in the last level look like "
               "a raw recording: python -m extras.windows makes features of one")


def usual_rate(videos):
    """The frames a second that new videos are taken to have, after Videos of training: one of
    theirs."""
    return float(median_low([video.grid.fps for video in videos]))


def odd_rates(videos):
    """Yield a warning where over a tenth of Videos has another rate than new ones get."""
    rates = [video.grid.fps for video in videos]
    usual = usual_rate(videos)
    others = [rate for rate in rates if abs(rate - usual) > 0.01 * usual]
    if len(others) > 0.1 * len(rates):
        yield (f"the training videos have {min(rates):g} to {max(rates):g} frames a second; a new "
               f"one is taken to have {usual:g}, unless evaluate.py has its --fps")


NO_ACTION = ("background", "bg", "none", "null", "nothing", "noaction", "other")


def check_classes(classes, missing):
    """Yield warnings about the names of the classes."""
    alike = {}
    for name in classes:
        plain = unicodedata.normalize("NFKC", name).lower()
        alike.setdefault("".join(plain.split()), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            yield (f"the labels {' and '.join(map(shown, names))} differ by letter case, blanks or "
                   "the coding of a letter alone")
        if "".join(c for c in names[0].lower() if c.isalnum()) in NO_ACTION:
            yield (f"the label {shown(names[0])} is learned and counted as an action; "
                   f"--ignore-labels {shown(names[0])} leaves it out")
    if missing:
        yield (f"{len(missing)} of {len(classes)} classes have no labelled instance: "
               f"{several(missing)}")


def check_known(path, test, classes):
    """Raise BadInput for a label of a test video that a checkpoint does not know."""

    def check(a, where):
        for label in a.labels:
            if label not in classes:
                raise BadInput(f"{where} the label {shown(label)} is unknown to the checkpoint")

    forms.read_each(test, check, f"annotation file {path}")


def odd_split(dataset, s):
    """Yield a warning where a JSON split names other unlabelled videos than are taken."""
    if not s.split.endswith(".json"):
        return
    content = read_json(s.split, "split file")
    named = content.get("unlabelled") if isinstance(content, dict) else None
    taken = {video.id for video in dataset.unlabelled}
    if isinstance(named, list) and taken != set(map(str, named)):
        yield (f"split file {s.split} names {len(named)} unlabelled videos, which it does not "
               f"choose: {len(taken)} are taken")


def look(dataset, videos, annotations, path, s):
    """Yield warnings about a loaded training data set; raises BadInput where it is unusable.

    videos, annotations  of all that it takes, {id: Video}, {id: Annotation}"""
    dataset.ignored += left_out(annotations, videos)
    yield from cut_off(annotations, videos)
    yield from check_spans(videos, annotations, s, dataset.dim)
    if s.dataset not in sources.LAYOUTS and not s.one_class:
        yield from repeated(annotations)
    yield from check_labelled(dataset.labelled, annotations, path, s)
    yield from check_raw(dataset.labelled, s)
    yield from odd_rates(dataset.labelled + dataset.unlabelled) if s.stride else ()
    yield from check_classes(dataset.classes, dataset.missing)
    yield from s.look(dataset)
    yield from odd_split(dataset, s)
    if s.audit and dataset.unlabelled and not dataset.hidden:
        yield "--audit: no unlabelled video has annotations to judge pseudo labels by"
    if s.stage == "all" and not dataset.unlabelled:
        yield (f"all {len(dataset.labelled)} training videos are labelled, so that there is no "
               "unlabelled video to learn from: training ends with the supervised stage. Stage 3 "
               "needs feature files without an entry (--unlabelled-features), entries without "
               "annotations, or a --ratio below 1")


def channels_of(dataset, s):
    """What the features' header calls the channels of a training data set; [] without one."""
    return columns_of(dataset.labelled[0].source)[s.skip_columns:]


def describe(dataset, s):
    """What a run has taken, what it leaves out, what it can learn from, and where: a few lines.

    s: also the DetectorSettings, for the levels that regress the labelled segments."""
    labelled, unlabelled, test = dataset.labelled, dataset.unlabelled, dataset.test
    segments, on_step, in_crop = instances_of(labelled, s)
    steps = np.array([video.steps for video in labelled + unlabelled + test])
    long = "" if in_crop.all() else f", {(~in_crop).sum()} too long for a crop"
    named = several(channels_of(dataset, s), 8)
    half = segments.diff() / 2
    shares = []
    for low, high in s.levels()[1]:
        share = ((half >= low) & (half <= high)).double().mean()
        shares.append(f"{low:g}-{high:g} {100 * share:.0f} %".replace("-inf", "+"))
    return "\n".join([
        f"{len(labelled)} labelled, {len(unlabelled)} unlabelled, {len(test)} test videos; "
        f"ignored: {'; '.join(dataset.ignored) or 'nothing'}",
        f"{len(on_step)} labelled instances, {(~on_step).sum()} of them without a grid step{long}; "
        f"{len(dataset.classes)} classes, {len(dataset.missing)} without a labelled instance",
        f"{steps.min()} to {steps.max()} steps a video, median {np.median(steps):.0f}, "
        f"of {dataset.dim} channels{named and ': '}{named}",
        f"segments by level (half their steps): {', '.join(shares)}",
        f"{s.device}, {s.precision}, {process_count()} process(es)"])


def check_positives(detector, dataset, s):
    """Raise BadInput where the detector has no positive point for any labelled instance."""
    if not any(s.can_learn(detector, v, len(dataset.classes)) for v in dataset.labelled):
        raise BadInput("no point is positive for any labelled instance, so there is nothing to "
                       f"learn: --ranges {short(s.ranges)} or --radius {s.radius:g} do not fit "
                       "their lengths")


def check_new_video(name, source, sums, trained, duration):
    """Raise BadInput for a new video of other channels, or without the duration that it needs.

    trained  an evaluate.Localizer"""
    check_channels(name, source, {name: sums}, trained, trained.s.skip_columns)
    known = isinstance(duration, Real) and 0 < duration < 10 ** 6
    if duration is not None and not known:
        raise BadInput(f"{name}: a duration must be positive seconds, not {shown(duration)}")
    if trained.s.stride == 0 and not duration:
        raise BadInput(f"{name}: give its duration in seconds, which --stride 0 needs")


def odd_video(video, note, sums, s):
    """Yield warnings about a new video; raises BadInput where its duration is another's.

    note  its Annotation, sums its files.Sums"""
    yield from odd_features({video.id: sums})
    yield from check_spans({video.id: video}, {video.id: note}, s, len(sums.mean))


def odd_tests(test, trained):
    """A warning about test videos that a checkpoint was trained on, as a list; trained: ids."""
    seen = [video.id for video in test if video.id in trained]
    told = f"{len(seen)} of {len(test)} test videos were training videos: {several(seen, 3)}"
    return [told] if seen else []


def truth_for(predictions, annotations, subset, gt):
    """(ground truth {id: Annotation}, its name): of the subset, or of the predictions' subsets.

    gt: the annotations' file. Raises BadInput where they have nothing in common."""
    common = annotations.keys() & predictions.keys()
    if predictions and not common:
        mine, theirs = next(iter(predictions)), next(iter(annotations), "")
        raise BadInput(f"none of the {len(predictions)} predicted videos, like {short(mine)}, is "
                       f"in the ground truth {gt}, which has videos like {short(theirs)}")
    judged = forms.in_subset(annotations, subset) if subset else common or annotations
    names = {annotations[video].subset.lower() for video in judged}
    truth = {video: a for video, a in annotations.items()
             if a.annotated and a.subset.lower() in names}
    if not any(a.labels for a in truth.values()):
        raise BadInput(f"ground truth {gt} has no instance in the subset "
                       f"{shown(subset or ', '.join(names))}; its subsets are "
                       f"{forms.subsets_of(annotations)}")
    return truth, ", ".join(sorted(names)) or "none"


def outside(predictions, truth):
    """Yield a warning about predictions that lie, by more than half, outside their video.

    Where the truth says no duration, all of its instances span the video."""
    odd = Counter()
    unit = ""
    for video in predictions.keys() & truth.keys():
        a = truth[video]
        duration = a.duration or a.segments.max(initial=0)
        times = np.array([d["segment"] for d in predictions[video]]).reshape(-1, 2)
        count = int((~forms.half_inside(times, duration)).sum())
        if count and (a.duration or count == len(times)):
            odd[video] = count
            unit = unit or likely_unit(times.max(), duration, a.fps or 30)
    if odd:
        yield (f"{odd.total()} predictions in {len(odd)} videos lie outside their video: "
               f"{several(sorted(odd), 2)}{unit}")


def odd_predictions(predictions, truth, annotations):
    """Yield warnings about predictions that no instance of the truth, or of all, can match.

    truth  those of the annotations that are judged"""
    stray = [video for video in predictions if video not in truth]
    silent = [video for video in truth if video not in predictions]
    if stray:
        yield (f"{len(stray)} of {len(predictions)} predicted videos are not in the ground truth: "
               f"{several(stray, 2)}")
    if silent:
        yield (f"{len(silent)} of {len(truth)} videos of the ground truth have no prediction: "
               f"{several(silent, 2)}")
    yield from outside(predictions, truth)
    known = {label for a in annotations.values() for label in a.labels}
    labels = [d["label"] for detections in predictions.values() for d in detections]
    unknown = [label for label in labels if label not in known]
    if unknown:
        yield (f"{len(unknown)} of {len(labels)} predictions are left out: their labels are "
               f"unknown to the ground truth: {several(sorted(set(unknown)), 3)}")
