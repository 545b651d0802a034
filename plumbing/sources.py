"""Sources: which videos a data set has, which of them are taken, and where their features lie."""
import os
from dataclasses import dataclass, field
from pathlib import Path

from plumbing import forms, tables
from plumbing.files import (
    READERS,
    VIDEOS,
    files_in,
    files_left,
    is_hidden,
    lies_in,
    real_paths,
)
from plumbing.settings import SPLITS
from plumbing.toy import toy_videos
from plumbing.words import BadInput, several, short, shown, warn

# Where a published dataset lies below --root, in the layout of the public ActionFormer.
LAYOUTS = {
    "thumos": ("annotations/thumos14.json", "i3d_features"),
    "activitynet": ("annotations/anet1.3_i3d_filtered.json", "i3d_features"),
    "epic-verb": ("annotations/epic_kitchens_100_verb.json", "features"),
    "epic-noun": ("annotations/epic_kitchens_100_noun.json", "features"),
}

# Where the files are: a run that moves has them elsewhere.
FILES = ("split", "ext_scores", "proposals")
PLACES = ("dataset", "root", "annotations", "features", "unlabelled_features", *FILES)


def whole_paths(given):
    """Settings {name: value} with whole paths, so that they are found from anywhere."""
    words = ("toy", "none", *LAYOUTS, *SPLITS)
    return {name: os.path.abspath(value) if name in PLACES and value not in words else value
            for name, value in given.items()}


@dataclass
class Chosen:
    """Which videos of a data set are taken, each part {id: Annotation}."""
    path: str | Path  # of the annotation file
    entries: dict  # all of the file
    sources: dict  # {id: feature file, or array (T, D)}
    annotated: dict = field(default_factory=dict)  # training videos that may be labelled
    bare: dict = field(default_factory=dict)  # training videos without annotations
    test: dict = field(default_factory=dict)
    truth: dict = field(default_factory=dict)  # the test videos with annotations
    ignored: list = field(default_factory=list)  # what was not taken, in words
    warnings: list = field(default_factory=list)

    def everything(self):
        """All videos that are taken."""
        return self.annotated | self.bare | self.test

    def subset(self, name, flag):
        """The entries of a subset; raises BadInput if there is none."""
        found = forms.in_subset(self.entries, name)
        if not found and not any(a.subset for a in self.entries.values()):
            advice = "" if flag == "--subset" else "; --test-subset none trains on all of them"
            raise BadInput(f"annotation file {self.path}: no entry has a subset{advice}")
        if not found:
            raise BadInput(f"annotation file {self.path} has no video of the subset {shown(name)} "
                           f"({flag}), only of {forms.subsets_of(self.entries)}")
        return found


def locate(s):
    """The annotation file and the feature folder of the settings.

    Raises BadInput if a published dataset lacks one."""
    if s.dataset not in LAYOUTS:
        if s.annotations:
            raise BadInput(f"--annotations {short(s.annotations, 150)} is in the place of a "
                           "published dataset's file; your own annotations are --dataset")
        path = Path(s.dataset)
        return path, Path(s.features or path.parent / "features")
    path, folder = (Path(s.root, part) for part in LAYOUTS[s.dataset])
    path = Path(s.annotations or path)
    folder = Path(s.features or folder)
    for file in (path, folder):
        if not file.exists():
            raise BadInput(
                f"--dataset {s.dataset}: {file.name} is missing; expected are {path} and {folder}/"
                f"{s.prefix}<id>{s.extension} (or --root, --annotations, --features); both are "
                "ActionFormer's: github.com/happyharrycn/actionformer_release")
    return path, folder


def feature_file(folder, name, s):
    """The feature file of a video id, which may name sub-folders, and end as its recording does.

    Raises BadInput for a way out."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise BadInput(f"the video id {shown(name)} leads out of the feature folder {folder}")
    file = Path(folder, path.parent, f"{s.prefix}{path.name}{s.extension}")
    if path.suffix.lower() in VIDEOS and not os.path.lexists(file):
        return Path(folder, path.parent, f"{s.prefix}{path.stem}{s.extension}")
    return file


def feature_ids(folder, s):
    """{id: file} of the feature files in a folder and its sub-folders."""
    found = {}
    for place, file in files_in(folder, f"*{s.extension}"):
        name = file.name.removesuffix(s.extension)
        bare = name.removeprefix(s.prefix)
        if bare and name.startswith(s.prefix):
            found[place.with_name(bare).as_posix()] = file
    return found


def read_dataset(s):
    """The Chosen of a data set, of which nothing is taken yet; raises BadInput."""
    if s.dataset == "toy":
        return Chosen("toy", *toy_videos(s.seed))
    path, folder = locate(s)
    if not path.exists():
        raise BadInput(f"annotation file not found: {path} (--dataset names it, and --features the "
                       "folder of its features)")
    if s.extension and Path(f"id{s.extension}").suffix.lower() not in (*READERS, *VIDEOS):
        raise BadInput(f"--extension {short(s.extension)} must end in one of {', '.join(READERS)}")
    entries = tables.read_any(path, s.ignore_labels, s.fps)
    if not entries:
        raise BadInput(f"annotation file {path} holds no video")
    sources = {name: feature_file(folder, name, s) for name in entries}
    first = {}
    for name, file in sources.items():
        real = os.path.realpath(file) if os.path.exists(file) else file
        other = first.setdefault(real, name)
        if other != name:
            raise BadInput(f"annotation file {path}: {short(other)} and {short(name)} are one "
                           f"video: both have the feature file {short(file, 150)}")
    return Chosen(path, entries, sources)


def take_training(chosen, s):
    """Take the training videos, annotated and bare; raises BadInput without an annotated.

    Without any subset in the file all its videos are training videos."""
    train = chosen.entries
    if s.test_subset != "none" or any(a.subset for a in train.values()):
        train = chosen.subset(s.train_subset, "--train-subset")
    chosen.annotated = {name: a for name, a in train.items() if a.annotated}
    if not chosen.annotated:
        raise BadInput(f"annotation file {chosen.path}: no video of the subset {s.train_subset!r} "
                       "has annotations")
    if s.unlabelled_subset:
        taken = chosen.subset(s.unlabelled_subset, "--unlabelled-subset")
        both = taken.keys() & chosen.annotated.keys()
        if both:
            raise BadInput(f"--unlabelled-subset {s.unlabelled_subset} names {len(both)} videos "
                           f"that --train-subset has, with their labels: {several(sorted(both))}")
        train = train | taken
    chosen.bare = {name: forms.unknown_video(a.duration, a.fps) for name, a in train.items()
                   if name not in chosen.annotated}


def labelled_share(chosen, s):
    """The share of the annotated training videos that are labelled.

    Not given, it is all of own data, and where others have no annotations, if no split is drawn."""
    every = not s.split and (chosen.bare or s.dataset not in ("toy", *LAYOUTS))
    return s.ratio or (1.0 if every else 0.1)


def given_files(s):
    """The files that the settings name, beside the annotations and the features."""
    given = (getattr(s, name, "") for name in (*FILES, "init", "start"))
    return [Path(file) for file in given if file]


def free_files(folder, chosen, s):
    """{id: file} of the feature files in a folder that no entry has."""
    taken = real_paths([chosen.path, *given_files(s), *chosen.sources.values()])
    return {name: file for name, file in feature_ids(folder, s).items()
            if os.path.realpath(file) not in taken}


def other_files(folder, path, s):
    """[path within it] of the files of a folder that are no features and are not read either.

    path: of the annotations"""
    read = real_paths([path, *given_files(s)])
    left = files_left(folder, feature_ids(folder, s).values())
    return [place for place in left if not lies_in(Path(folder, place), read)]


def take_files_without_entry(chosen, s):
    """Take the feature files without an entry, and say which feature files are ignored.

    Of own data those of the feature folder, if no other is named; of a published data set those
    of --unlabelled-features. Raises BadInput where that has none, or one lacks what its grid needs.
    """
    named = s.unlabelled_features not in ("", "none")
    path, folder = locate(s)
    here = free_files(folder, chosen, s)
    found = free_files(s.unlabelled_features, chosen, s) if named else here
    loose = {name: file for name, file in found.items() if name not in chosen.entries}
    if named and not loose:
        raise BadInput(f"--unlabelled-features {short(s.unlabelled_features, 150)} holds no file "
                       f"{s.prefix}<id>{s.extension} without an annotation entry")
    if not named and (s.unlabelled_features == "none" or s.dataset in LAYOUTS):
        loose = {}
    taken = real_paths(loose.values())
    hint = "" if named else ", which --unlabelled-features takes"
    left = {
        f"feature files without an entry{hint}": [
            name for name, file in here.items()
            if name not in chosen.entries and os.path.realpath(file) not in taken],
        "files of --unlabelled-features that have an entry": [
            name for name in found if named and name in chosen.entries],
        f"files that are no {s.prefix}*{s.extension} (--extension)": other_files(folder, path, s),
    }
    chosen.ignored += [f"{len(names)} {what}: {several(names, 2)}"
                       for what, names in left.items() if names]
    rates = {a.fps for a in chosen.entries.values()}
    fps = rates.pop() if len(rates) == 1 else None
    lack = "duration, which --stride 0 needs" if s.stride == 0 else "" if fps else "fps; give --fps"
    if loose and lack:
        raise BadInput(f"{len(loose)} feature files without an entry: {several(loose, 2)} have no "
                       f"{lack} (--unlabelled-features none leaves them out)")
    chosen.sources |= loose
    chosen.bare |= {name: forms.unknown_video(None, fps) for name in loose}


def hint_at_files(folder, name, extension):
    """What the files of a folder are called that hold a missing one's id, in words; else ""."""
    if not folder.is_dir():
        return f"; there is no folder {short(folder, 100)}"
    stem = Path(name).name
    hints = []
    for file in folder.iterdir():
        bare = file.stem
        hint = ""
        if file.name == stem:
            hint = "ids are without the ending"
        elif bare != stem and bare.lower() == stem.lower():
            hint = "of other capital letters"
        elif bare.startswith(stem):
            ending = file.name[len(stem):]
            hint = f"--extension {short(ending)}" if ending != extension else "it has no --prefix"
        elif bare.endswith(stem):
            hint = f"--prefix {short(bare.removesuffix(stem))}"
        elif stem.endswith(bare):
            hint = f"the ids have the prefix {short(stem.removesuffix(bare))}, the files not"
        if hint and file.suffix.lower() in READERS and not is_hidden(Path(file.name)):
            hints.append((max(len(bare), len(stem)), f"; there is {short(file.name)}: {hint}"))
    return min(hints, default=(0, ""))[1]


def drop_missing(chosen, s):
    """Without the videos that have no feature file, if the settings allow it; raises BadInput."""
    if s.dataset == "toy":  # its features lie in no files
        return
    taken = chosen.everything()
    absent = [name for name in taken if not os.path.lexists(chosen.sources[name])]
    if not absent:
        return
    first = chosen.sources[absent[0]]
    if s.missing == "error" or not (chosen.annotated or taken).keys() - absent:
        hint = hint_at_files(first.parent, absent[0], s.extension)
        raise BadInput(
            f"video {short(absent[0])}: feature file not found: {short(first, 150)}{hint}; of "
            f"{len(taken)} videos {len(absent)} lack theirs: {several(absent)} (--missing skip "
            "leaves them out)")
    for part in (chosen.annotated, chosen.bare, chosen.test):
        for name in absent:
            part.pop(name, None)
    chosen.warnings.append(
        f"{len(absent)} videos are left out, here and in the mAP: they have no feature file: "
        f"{several(absent)}")


def find_truth(chosen, s):
    """Set the Chosen's annotated test videos; raises BadInput if they hold no instance."""
    chosen.truth = {name: a for name, a in chosen.test.items() if a.annotated}
    if chosen.truth and not any(a.labels for a in chosen.truth.values()):
        raise BadInput(f"annotation file {chosen.path}: the subset {s.test_subset!r} holds no "
                       "instance to evaluate on")
    bare = len(chosen.test) - len(chosen.truth)
    if bare:
        chosen.warnings.append(f"{bare} of {len(chosen.test)} test videos have no annotations: "
                               "they are predicted, but not in the mAP")


def check_scores(chosen, s):
    """Let external scores fit the test videos and their classes; raises BadInput where none does.

    What some lack is a warning."""
    if not s.ext_scores:
        return
    scores = forms.read_video_scores(s.ext_scores)
    named = set().union(*scores.values())
    classes = {label for a in chosen.truth.values() for label in a.labels}
    videos = scores.keys() | {name.removeprefix("v_") for name in scores}
    for what, wanted, known in (("test videos", chosen.test.keys(), videos),
                                ("classes of the test videos", classes, named)):
        lacking = sorted(wanted - known)
        if not lacking:
            continue
        told = (f"score file {s.ext_scores} has no scores of {len(lacking)} of {len(wanted)} "
                f"{what}: {several(lacking)}")
        if len(lacking) == len(wanted):
            raise BadInput(told)
        chosen.warnings.append(told)


def forget_classes(chosen, s):
    """One class for all, where the settings say so; the truth has others for external scores."""
    if s.one_class:
        chosen.annotated = forms.as_one_class(chosen.annotated)
        chosen.test = forms.as_one_class(chosen.test)
    if s.one_class and not s.ext_scores:
        chosen.truth = forms.as_one_class(chosen.truth)


def completed(chosen, s):
    """A Chosen without what is missing, with its truth and its classes; raises BadInput."""
    drop_missing(chosen, s)
    find_truth(chosen, s)
    check_scores(chosen, s)
    forget_classes(chosen, s)
    return chosen


def choose_test_data(s):
    """The Chosen of evaluation alone; raises BadInput."""
    chosen = read_dataset(s)
    chosen.test = chosen.subset(s.test_subset, "--subset")
    return completed(chosen, s)


def choose_training_data(s):
    """The Chosen of training and of its test; raises BadInput."""
    chosen = read_dataset(s)
    chosen.warnings += forms.never_ignored(chosen.entries, s.ignore_labels, chosen.path)
    take_training(chosen, s)
    trained = (chosen.annotated | chosen.bare).keys()
    there = forms.in_subset(chosen.entries, s.test_subset) or chosen.entries.keys() - trained
    if there and s.test_subset != "none":
        chosen.test = chosen.subset(s.test_subset, "--test-subset NAME, or none")
    else:
        chosen.warnings.append("there are no test videos, so no mAP")
    overlap = trained & chosen.test.keys()
    if overlap:
        chosen.warnings.append(f"{len(overlap)} test videos are training videos too: the mAP says "
                               "nothing of new ones")
    taken = chosen.everything()
    other = {name: a for name, a in chosen.entries.items() if name not in taken}
    if other:
        chosen.ignored.append(f"{len(other)} entries of other subsets: {forms.subsets_of(other)}")
    if s.dataset != "toy":
        take_files_without_entry(chosen, s)
        chosen.ignored += tables.unused(
            chosen.path, {*chosen.sources.values(), *given_files(s)})
    return completed(chosen, s)


def files_of_videos(path, kinds=READERS):
    """{name: file} of a file, or of all of some kinds, endings, in a folder; raises BadInput if
    there is none."""
    path = Path(path)
    if not path.is_dir():
        return {path.stem: path}
    files = [row for row in files_in(path) if row[1].suffix.lower() in kinds]
    found = {place.with_suffix("").as_posix(): file for place, file in files}
    if len(found) < len(files) or not files:
        raise BadInput(f"{path} must hold one file a video ({', '.join(kinds)})")
    left = files_left(path, found.values())
    if left:
        warn([f"{len(left)} files of {path} are of another kind and not read: {several(left)}"])
    return found
