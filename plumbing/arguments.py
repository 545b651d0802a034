"""Command lines: from arguments to the settings of a run, or to what evaluation is asked for."""
import os
from dataclasses import asdict, fields
from pathlib import Path

from plumbing import checkpoints, files, processes, runs, settings, sources, tables
from plumbing.words import BadInput, nearest, shown, warn


def resumed_settings(folder, given, kind):
    """The settings {name: value} of the run in a folder, to go on with; raises BadInput."""
    if Path(folder).is_file():
        raise BadInput(f"--resume takes the folder where a run's checkpoint.pt lies, and {folder} "
                       "is a file")
    elsewhere = Path(given.get("out", folder)) != Path(folder)
    found = checkpoints.load(folder, kind)["settings"]
    s = settings.settings_from(found, kind, f"checkpoint in {folder}")
    other = given.get("init", s.init) != s.init
    if elsewhere or other or given.get("start") or given.get("overwrite"):
        raise BadInput("--resume goes on in its own folder, with its own weights: another --out or "
                       "--init, --start and --overwrite do not go with it")
    return asdict(s) | {"out": folder, "start": "", "overwrite": False, "check": False}


def settings_of(argv, kind):
    """The settings, of a class, of a command line.

    Defaults, changed by the preset, or those of the run to resume, changed by the arguments."""
    given, preset = settings.read_arguments(argv, kind)
    dataset = given.get("dataset", "toy")
    known = ("toy", *sources.LAYOUTS)
    if dataset not in known and not tables.is_known(dataset):
        raise BadInput("--dataset must be an annotation file *.json, *.csv or *.tsv, a folder of "
                       f"label tracks or one of {', '.join(known)}, not {shown(dataset)}"
                       f"{nearest(dataset, known)}")
    of_files = ("root", "annotations", "features", "unlabelled_features", "ignore_labels")
    idle = [settings.flag(name) for name in of_files if given.get(name) not in (None, "", "none")]
    if given.get("root") and dataset not in known:
        raise BadInput("--root is where a published dataset lies; your own has --dataset and "
                       "--features")
    if idle and dataset == "toy" and not given.get("resume"):
        raise BadInput(f"{' and '.join(idle)} cannot go with the toy data: give --dataset too, the "
                       "file of the annotations")
    if given.get("start") and given.get("init"):
        raise BadInput("--start goes on with the weights of a checkpoint: --init does not go with "
                       "it")
    names = list(given)
    if given.get("resume"):
        base = resumed_settings(given["resume"], given, kind)
    else:
        folder = f"runs/{Path(os.path.abspath(dataset)).stem}"
        base = {"out": folder if given.get("overwrite") else runs.free_folder(folder)} | preset
    given = sources.whole_paths(base | given)
    given["device"] = processes.pick_device(given.get("device", "auto"))
    if given.get("precision", "auto") == "auto":
        given["precision"] = processes.pick_precision(given["device"])
    s = kind(**given)
    warn(settings.unread(s, names))
    return s


def words_of(given, kind):
    """The command line, a list of words, of settings {name: value} given in Python.

    None is not given. Raises BadInput for a name that is none, with the nearest."""
    settings.check_names(given, ["paper", *(f.name for f in fields(kind))])
    words = []
    for name, value in given.items():
        flag = settings.flag(name)
        value = settings.plain(value)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            words.append(f"{flag}={value}")
    return words


# ---- Evaluation ---------------------------------------------------------------------------------

# The arguments of each mode of evaluate.py; below, those that are no settings: type and help.
MODES = {
    "new": "checkpoint features out min_score duration fps stride frames feature_key fill_gaps "
           "trust_grid weights device".split(),
    "test": "checkpoint dataset root annotations features extension prefix feature_key fps stride "
            "frames missing fill_gaps bad_segments trust_grid subset ext_scores tiou weights "
            "device json".split(),
    "predictions": "pred gt subset ignore_labels fps tiou json".split(),
}
ARGUMENTS = {
    "checkpoint": (str, "a run's folder, its checkpoint.pt or detector.pt"),
    "features": (str, "a new video's feature file, or a folder of them: print what happens there; "
                 "with --dataset, the feature folder of its test videos"),
    "out": (str, "write what happens in new videos: .json, .csv, or for one video .srt, .txt"),
    "min_score": (float, "least score of new videos' actions (default: that of the best F1 on the "
                  "run's test videos, else 0.3)"),
    "duration": (float, "seconds of a new video (default: what its features span)"),
    "subset": (str, "test subset, in any letter case (default: the predictions', the run's)"),
    "pred": (str, "predictions in ActivityNet's result format"),
    "gt": (str, "ground truth, in a form that --dataset has"),
    "json": (str, "write the metrics here as well"),
}


def add_truth(parser, required):
    """Add to a parser what says which annotations predictions are judged by."""
    parser.add_argument("--gt", required=required, help=ARGUMENTS["gt"][1])
    parser.add_argument("--fps", type=float, default=0, help="frames a second of label tracks")
    parser.add_argument("--ignore-labels", default="", help="labels that do not count, with commas")


def mode_of(args):
    """Which mode of evaluation the arguments ask for."""
    moved = args.dataset or args.annotations or args.root  # then --features is the run's own, too
    if args.pred:
        return "predictions"
    return "new" if args.features and not moved else "test"


def evaluation_of(argv, kind):
    """(the arguments, those of them that are settings, which of MODES); raises BadInput.

    kind  the class of the settings"""
    names = dict.fromkeys([*(name for mode in MODES.values() for name in mode), *kind.GIVEN])
    parser = settings.parser_of(names, kind, ARGUMENTS)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    if bool(args.checkpoint) == bool(args.pred) or bool(args.pred) != bool(args.gt):
        parser.error("give either --checkpoint, or --pred and --gt")
    mode = mode_of(args)
    known = [*MODES[mode], *(kind.GIVEN if args.checkpoint else ())]
    other = [settings.flag(name) for name in sorted(given) if name not in known]
    if other:
        parser.error(f"{', '.join(other)} cannot go with what else is given")
    if not 0 <= given.get("min_score", 0) <= 1:
        parser.error(f"--min-score must be from 0 to 1, not {args.min_score}")
    if args.json:
        files.check_replaced(args.json, '{"tiou"', "file of metrics that this wrote")
    changes = {name: value for name, value in given.items() if name not in ARGUMENTS}
    if mode == "test":  # these two are settings of the run
        renamed = {"features": args.features, "test_subset": args.subset}
        changes |= {name: value for name, value in renamed.items() if value is not None}
    return args, changes, mode
