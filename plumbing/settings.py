"""Settings: checked dataclasses, their help and command line; those of files and of runs.

A field is `name: Kind("comment") = default`. The Kind says what the value may be; the class that
the field stands in says from which stage on it matters (`since`, "run" if it changes no result)
and under which heading --help lists it (`heading`).
"""
import argparse
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Annotated

import numpy as np

from plumbing.files import Reading
from plumbing.words import BadInput, nearest, short, shown, warn

# ---- Kinds of settings: each makes a field's type of the comment on it --------------------------

def Text(comment):
    """Any text."""
    return Annotated[str, comment, ()]


def Flag(comment):
    """On or off."""
    return Annotated[bool, comment]


def OneOf(choices, comment):
    """One of some words."""
    return Annotated[str, comment, choices]


def number(kind, least, most, words, tiny=0):
    """A kind of numbers: type, limits, below which only 0 is left, and how a message says it."""
    return lambda comment: Annotated[kind, comment, least, most, words, tiny]


Share = number(float, 0, 1, "from 0 to 1")
ShareBelow1 = number(float, 0, 0.999, "from 0 to 0.999")
Similarity = number(float, -1, 1, "from -1 to 1")
NotNegative = number(float, 0, 1e12, "not negative")
Frames = number(float, 0, 1e12, "0 or at least 1e-6", 1e-6)
Positive = number(float, 1e-12, 1e12, "positive")
AtLeast1 = number(float, 1, 1e12, "at least 1")
Finite = number(float, -1e12, 1e12, "finite")
Whole = number(int, 0, 1e12, "not negative")
WholePositive = number(int, 1, 1e12, "positive")
Nothing = number(int, 0, 0, "0 for this detector")
Blocks = number(int, 0, 64, "from 0 to 64")
WidthOrNone = number(int, 0, 8192, "from 0 to 8192")
CountOrNone = number(int, 0, 10 ** 6, "from 0 to a million")
Width = number(int, 1, 8192, "from 1 to 8192")
Count = number(int, 1, 10 ** 6, "from 1 to a million")


def type_of(f):
    """The type of a setting's value."""
    return f.type.__origin__


def comment_of(f):
    """The comment on a setting, which is also the command line's help."""
    return f.type.__metadata__[0]


def choices_of(f):
    """The words that a setting may be; () where there is no list of them."""
    return f.type.__metadata__[1] if type_of(f) is str else ()


def rule_for(f, value):
    """What a setting must be, in words, where a value is not; else ""."""
    kind = type_of(f)
    if type(value) is not kind and (kind, type(value)) != (float, int):
        return f"of type {kind.__name__}"
    if kind is str and "\0" in value:
        return "without NUL"
    if choices_of(f) and value not in choices_of(f):
        return f"one of {', '.join(choices_of(f))}"
    if kind in (int, float):
        _, least, most, words, tiny = f.type.__metadata__
        return "" if least <= value <= most and not 0 < value < tiny else words
    return ""


class CheckedSettings:
    """Base of the settings: refuses what a setting may not be with BadInput."""
    UNUSED = ()  # settings that a class inherits and does not read: --help leaves them out
    READ_WITH = {}  # {"a setting and its values": "what is read with one of these alone"}
    GIVEN = ()  # settings beside the features that evaluation takes anew, for new or moved videos

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            rule = rule_for(f, value)
            if rule:
                raise BadInput(f"setting {f.name} must be {rule}, not {shown(value)}")

    def look(self, dataset):
        """Warnings about a data set that a run reads, which may raise BadInput; none here."""
        return ()

    def look_at(self, video):
        """Raise BadInput for a new video that lacks what the detector needs; here nothing."""


def home_of(name, kind):
    """The class, `kind` or one that it is made of, that a setting stands in."""
    return next(home for home in kind.__mro__ if name in home.__annotations__)


def settings_of_stages(kind, stages):
    """The names of the settings of a class that matter in one of the stages."""
    return [f.name for f in fields(kind) if home_of(f.name, kind).since in stages]


# What older files lack, as it was then.
LATER = {"skip_columns": 0, "fill_gaps": False, "input_jitter": 0.0, "input_view": "all",
         "passes": 0}


def settings_from(found, kind, where):
    """The settings of a class that a file's dict holds; raises BadInput where they are others."""
    found = LATER | found if isinstance(found, dict) else {}
    try:
        return kind(**{f.name: found[f.name] for f in fields(kind)})
    except KeyError as error:
        fault = f"it lacks the setting {error}"
    except BadInput as error:
        fault = error
    raise BadInput(f"{where} is not of this version: {fault}")


def check_names(given, names):
    """Raise BadInput for a name that is not one of the settings' names."""
    for name in given:
        if name not in names:
            raise BadInput(f"{short(name)} is no setting{nearest(name, names)}")


def plain(value):
    """A value as Python has it, of one that numpy may have."""
    return value.item() if isinstance(value, np.generic) else value


def changed(s, changes):
    """Settings with changes {name: value}; raises BadInput for a name that is none."""
    check_names(changes, [f.name for f in fields(s)])
    return replace(s, **{name: plain(value) for name, value in changes.items()})


# ---- Files and runs -----------------------------------------------------------------------------

SPLITS = ("", "uniform", "stratified")


@dataclass(frozen=True)
class FileSettings(CheckedSettings):
    """What is read and where, and what of it is reported."""
    since = "run"
    heading = "files, splits, crops and batches"
    dataset: Text(
        "toy, thumos, activitynet, epic-verb, epic-noun, or the path of annotations: JSON, .csv, "
        ".tsv, a folder of label tracks") = "toy"
    root: Text("folder of a published dataset, in ActionFormer's layout") = ""
    annotations: Text("annotation file, in place of the layout's") = ""
    features: Text("feature folder; none: the layout's, or the folder features beside a JSON") = ""
    unlabelled_features: Text(
        "folder whose feature files without an annotation entry are unlabelled videos, or none; "
        "not set: of own data the feature folder") = ""
    prefix: Text("what stands before a video's id in its feature file's name") = ""
    extension: Text("what stands after it: .npy, .npz, .pt, .csv or .tsv") = ".npy"
    feature_key: Text("name of the array in .npz and .pt files") = "feats"
    skip_columns: Whole("leading columns of the feature files that are left out, as a clock") = 0
    fill_gaps: Flag("a step that holds NaN or infinity takes the values of the step before") = False
    missing: OneOf(("error", "skip"), "what a video without a feature file does") = "error"
    trust_grid: Flag("go on where the features span another time than the annotations say") = False
    test_subset: Text("subset of the test videos; none: no test") = "validation"
    split: Text("how --ratio draws, uniform or stratified, or a file of labelled ids") = ""
    ext_scores: Text(
        "JSON of video-level scores from elsewhere, which name the classes of --one-class") = ""
    audit: Flag("report the pseudo labels' quality; reads hidden labels for this only") = False
    weights: OneOf(
        ("ema", "raw"), "weights that make pseudo labels, and are reported first [J]") = "ema"
    device: Text("auto, cpu, cuda, ...") = "auto"

    def reading(self):
        """How the feature files are read."""
        return Reading(self.feature_key, self.skip_columns, self.fill_gaps)


@dataclass(frozen=True)
class RunSettings(CheckedSettings):
    """What a run writes, and where it goes on."""
    since = "run"
    heading = "the run"
    out: Text(
        "folder of all that the run writes; none: runs/<dataset>, or the next free number") = ""
    overwrite: Flag("begin anew in a folder that holds a run") = False
    check: Flag("report on the data and stop") = False
    start: Text(
        "checkpoint of another run to go on from; --lr, --warmup and --clip may differ") = ""
    init: Text(
        "checkpoint to take fitting weights from: a public ActionFormer's, or another run's, whose "
        "labels and classes may be others") = ""
    resume: Text("folder of a run to go on with, with its settings") = ""
    log_every: WholePositive("steps between two rows of log.jsonl") = 20
    page: Flag("write page.html at the end, the run to look at in a browser") = True


# ---- The command line ---------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, and to which _ is -.

    module  the name of one, whose docstring --help begins with: a sentence, its commands"""

    def __init__(self, module, **more):
        doc = sys.modules[module].__doc__ or ""  # python -OO drops it
        super().__init__(
            description="\n\n".join(doc.split("\n\n")[:2]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more)

    def parse_known_args(self, args=None, namespace=None):
        """What argparse has, of flags with - in the place of _."""
        words = map(str, sys.argv[1:] if args is None else args)
        dashed = [re.sub("^--[^=]*", lambda name: name[0].replace("_", "-"), word)
                  for word in words]
        return super().parse_known_args(dashed, namespace)

    def error(self, message):
        """Raises BadInput, which names the flag that is most like an unknown one."""
        _, _, unknown = message.partition("unrecognized arguments: ")
        like = nearest(unknown.split(" ")[0], self._option_string_actions) if unknown else ""
        raise BadInput(f"{message}{like}; --help lists every setting")


def flag(name):
    """How a setting is written on the command line."""
    return "--" + name.replace("_", "-")


def unread(s, given):
    """Yield a warning about each of the settings that are given and that others leave unread."""
    for condition, names in s.READ_WITH.items():
        other, *values = condition.split()
        idle = [flag(name) for name in names.split() if name in given and name not in s.UNUSED]
        if idle and str(getattr(s, other)) not in values:
            yield (f"without effect: {' and '.join(idle)}, read where {flag(other)} is "
                   f"{' or '.join(values)}")


def argument_of(kind):
    """How argparse takes a value of a type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": kind, "metavar": kind.__name__}


def add_setting(group, f, preset, hidden):
    """Add a setting to a group of a parser.

    Its help, unless it is hidden, says what it is, its choices, the default in force."""
    default = preset.get(f.name, f.default)
    default = "not set" if default == "" else default
    choices = f"; one of {', '.join(choices_of(f))}" if choices_of(f) else ""
    text = f"{comment_of(f)}{choices} (default {default})".replace("%", "%%")
    group.add_argument(
        flag(f.name), help=argparse.SUPPRESS if hidden else text, **argument_of(type_of(f)))


def parser_of(names, kind, own):
    """The parser of some settings of a class, without defaults, and of arguments of its own.

    own  {name: (type, help)}, also in the place of a setting's"""
    parser = Parser(kind.__module__, usage=argparse.SUPPRESS)  # its commands say it
    arguments = {f.name: (type_of(f), comment_of(f)) for f in fields(kind)} | own
    for name in names:
        value, comment = arguments[name]
        parser.add_argument(flag(name), help=comment, **argument_of(value))
    return parser


def read_arguments(argv, kind):
    """(settings given, settings of the preset) of a command line, each {name: value}.

    kind: the class of the settings; it has TRAIN, its command, FIRST, the settings that
    --help lists first, before the class's own, and preset(dataset, paper). Raises BadInput."""
    first = Parser(__name__, add_help=False)
    first.add_argument("--dataset", default="toy")
    first.add_argument("--paper", action=argparse.BooleanOptionalAction)
    known, _ = first.parse_known_args(argv)
    preset = kind.preset(known.dataset, known.paper)
    parser = Parser(
        kind.__module__,
        usage=f"{kind.TRAIN} [--setting value ...]",
        epilog="[S] the paper states it, [A] the public ActionFormer has it, [J] neither.\n"
               f"The defaults are those in force for --dataset {short(known.dataset)}.",
        argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--paper", action=argparse.BooleanOptionalAction,
        help="the paper's own choices, where the defaults are others")
    group_of = cache(parser.add_argument_group)
    by_name = {f.name: f for f in fields(kind)}
    for name in dict.fromkeys([*kind.FIRST, *kind.__annotations__, *by_name]):
        heading = home_of(name, kind).heading
        group = group_of("what matters first" if name in kind.FIRST else heading)
        add_setting(group, by_name[name], preset, name in kind.UNUSED)
    given = vars(parser.parse_args(argv))
    if given.pop("paper", None) and given.get("resume"):
        raise BadInput("--paper chooses defaults of a new run: it does not go with --resume")
    idle = sorted(given.keys() & set(kind.UNUSED))
    if idle:
        warn([f"this detector reads no setting {' and no '.join(idle)}"])
    return {name: given[name] for name in given if name not in idle}, preset


def thresholds_of(text):
    """"0.3:0.7:0.1" (both ends included) or "0.3,0.5" -> tIoU thresholds; raises BadInput."""
    values = np.zeros(0)
    with suppress(ValueError, ArithmeticError):
        if ":" in text:
            first, last, step = map(float, text.split(":"))
            steps = (last - first) / step
            if abs(steps - round(steps)) < 1e-6 and 0 <= steps < 1000:
                values = np.linspace(first, last, round(steps) + 1)
        else:
            values = np.array(text.split(","), dtype=np.float64)
    if not values.size or not 0 < values.min() <= values.max() <= 1:  # nor NaN
        raise BadInput("--tiou must be start:end:step, whose step divides the range, or a list "
                       f"with commas, of thresholds over 0 and up to 1, not {shown(text)}")
    return values


def levels_of(windows, ranges):
    """The attention windows [int] and regression ranges [(low, high)] of two texts, one a level.

    Raises BadInput where they cannot be read or do not fit together."""
    try:
        sizes = [int(window) for window in windows.split(",")]
        levels = [tuple(map(float, pair.split(":"))) for pair in ranges.split(",")]
        sane = (0 <= min(sizes) and max(sizes) < 2 ** 31 and len(levels) <= 16
                and all(low <= high for low, high in levels))
    except ValueError:
        sane = False
    if not sane:
        raise BadInput(
            f"setting windows must be whole numbers with commas, not {shown(windows)}, and setting "
            f"ranges low:high pairs with commas, not {shown(ranges)}, of at most 16 levels")
    if len(sizes) == 1:
        sizes = sizes * len(levels)
    if len(sizes) != len(levels):
        raise BadInput(f"settings windows and ranges give {len(sizes)} windows for {len(levels)} "
                       "regression ranges: each level needs one of both")
    return sizes, levels
