"""Words for people: values from outside as messages show them, lines on a terminal, BadInput."""
import difflib
import os
import reprlib
import sys

import torch.distributed as dist


class BadInput(Exception):
    """Input from outside that cannot be used; the message is one sentence for the user."""


def printable(text):
    """Text without what a terminal would act on: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(text, most=60):
    """A name from outside as a message shows it: escaped, and cut to `most` letters."""
    text = printable(str(text)[:most + 1])
    return text if len(text) <= most else text[:most] + "..."


def shown(value):
    """A value from outside as a message shows it: as Python writes it, cut."""
    writer = reprlib.Repr()
    writer.maxstring = writer.maxother = writer.maxlong = 60
    return printable(writer.repr(value))


def nearest(word, words):
    """"; do you mean X?" where a word is like one of some; else ""."""
    found = difflib.get_close_matches(word.lower(), {w.lower(): w for w in words}, 1)
    return f"; do you mean {found[0]}?" if found else ""


def several(names, most=5):
    """"a, b, c, d, e and 7 more"."""
    text = ", ".join(short(name, 40) for name in list(names)[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def process_rank():
    """Which of the processes that torchrun started this one is; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    """Whether this is the process that writes and prints."""
    return process_rank() == 0


def put(text, stream):
    """Print lines at once; letters that the terminal cannot show are escaped.

    Where nobody reads any more, only the printing ends."""
    if stream is None:  # closed from the start
        return
    encoding = stream.encoding or "utf-8"
    text = "\n".join(map(printable, text.split("\n")))
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # for what follows, and for Python's own last flush


def say(text):
    """Print lines; the first process does."""
    if is_first():
        put(text, sys.stdout)


def warn(texts):
    """Print warnings, a line each; the first process does."""
    for text in texts if is_first() else ():
        put(f"warning: {text}", sys.stderr)


def complain(error):
    """Print an error as one line of at most 400 letters."""
    put("error: " + short(error, 380), sys.stderr)


def refuse(faults):
    """Raise BadInput for the faults {video: sentence}: the first, and which videos have any."""
    if faults:
        sentence = str(next(iter(faults.values())))
        if len(faults) > 1:
            sentence += f"; {len(faults)} videos have such faults: {several(faults)}"
        raise BadInput(sentence)
