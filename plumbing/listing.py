"""The list of what happens in new videos: printed, and written for others."""
from plumbing import forms
from plumbing.sources import feature_files
from plumbing.words import say, short

LEAST_SCORE = 0.3  # of what is listed, where none is asked for


def find_actions(localize, args):
    """Print, and write to args.out, what happens in the feature files of args.features.

    localize  an evaluate.Localizer; args: of evaluate.py"""
    least = LEAST_SCORE if args.min_score is None else args.min_score
    sources = feature_files(args.features)
    if args.out:
        forms.check_ending(args.out, len(sources))
    found = {}
    for name, file in sources.items():
        found[name] = forms.actions(*localize(file, args.duration, name), least)
        say(f"{short(name)}: {len(found[name])} actions of a score of at least {least:g}")
        if found[name]:
            say(forms.listing(found[name]))
    if args.out:
        forms.write_found(args.out, found)
