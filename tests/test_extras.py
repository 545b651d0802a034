"""Tests of extras/: tables.py shares and measures runs, bench.py measures every part."""
import math

import pytest
import torch

import data
import evaluate
import icd
import train
from extras import bench, tables
from tests.helpers import own_argv, read_result

# ---- tables.py: rows ----------------------------------------------------------------------------

def table_argv(own, *more):
    """The command line of tables.py for the user's data set, two seeds."""
    argv = own_argv(own, "--theta-l", 0.0, *more)
    at = argv.index("--out")
    return [*argv[:at], *argv[at + 2:], "--runs", str(own / "tables"), "--seeds", "2"]


def printed_rows(capsys):
    """The lines of the tables that were printed."""
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]


def cells(lines):
    """The cells of the lines of a table."""
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]


def stages_in(paths):
    """How many of the folders are of each stage."""
    stages = [path.name.split("-")[0] for path in paths]
    return {stage: stages.count(stage) for stage in stages}


def test_tables_share_stages_resume_and_print_markdown(own, capsys, monkeypatch):
    assert tables.main(["3a", "3b", *table_argv(own)]) == 0
    lines = printed_rows(capsys)
    expected = []
    for table in ("3a", "3b"):
        expected += ["row", "---", *(name for name, *_ in tables.ROWS[table])]
    assert [row[0] for row in cells(lines)] == expected
    assert len({line.count("|") for line in lines[:6]}) == 1
    folders = stages_in((own / "tables").iterdir())
    assert folders == {"pretrain": 2, "supervised": 2 * 5, "all": 2 * 8}
    calibrated = stages_in(path.parent for path in (own / "tables").glob("*/calibration.json"))
    # After stage 3 the videos are no longer held out.
    assert calibrated == {"supervised": 2 * 4}
    monkeypatch.setattr(train, "main", None)  # nothing is trained again
    assert tables.main(["3a", "3b", *table_argv(own)]) == 0
    assert printed_rows(capsys) == lines


@pytest.mark.parametrize("name", [*tables.ROWS, *tables.PROBES])
def test_every_row_of_the_tables_is_a_command_of_train(own, name):
    for row in tables.ROWS.get(name, tables.PROBES.get(name)):
        assert train.parse_settings([*own_argv(own), *row[-1].split()], tables.kind_of(name))


def test_a_killed_shared_stage_goes_on_under_another_row(own):
    absolute = tables.ABSOLUTE.split()  # as fig3a has it
    assert tables.main(["S1", *table_argv(own, *absolute)]) == 0
    for path in (own / "tables").glob("*/finished.json"):
        path.unlink()
    stages = set((own / "tables").glob("supervised-*"))
    # From S1's stage 2 with BCE.
    assert tables.main(["fig3a", *table_argv(own, "--acp", "none", "--icd", "none")]) == 0
    assert set((own / "tables").glob("supervised-*")) == stages


def test_tables_refuse_what_they_do_not_know(own, capsys):
    refused = [
        ["7", *table_argv(own)],
        ["3a", *table_argv(own, "--no-such-setting", 1)],
        ["3a", *table_argv(own, "--splits", own / "absent.json")],
        ["3a", *table_argv(own, "--start", own / "x.pt")],
    ]
    refused += [["3a", *table_argv(own), "--seeds", seeds] for seeds in ("0", "-1", ",", "x")]
    for argv in refused:
        assert tables.main(argv) == 2
        assert capsys.readouterr().err.count("error: ") == 1
    assert not (own / "tables").exists()


# ---- tables.py: what is measured ----------------------------------------------------------------

def test_the_probe_tells_classes_and_the_supervised_row_needs_no_stage_3(own, capsys):
    assert tables.main(["S2", *table_argv(own, "--seeds", "1,")]) == 0
    rows = cells(printed_rows(capsys))[2:]
    assert [row[0] for row in rows] == [name for name, *_ in tables.PROBES["S2"]]
    # The made-up features shift a column by three inside each action.
    assert float(rows[0][2].split()[0]) > 80


def test_logistic_regression_parts_what_lines_part():
    x = torch.randn(300, 3)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    W = tables.logistic_regression(x, y, 3)
    predicted = (x @ W[:-1] + W[-1]).argmax(1)
    assert (predicted == y).float().mean() > 0.7


def test_complexity_is_a_table_without_runs(own, capsys):
    assert tables.main(["S6"]) == 0
    assert "26,016,768" in capsys.readouterr().out


def made_up_detections(hidden, i, case):
    """Detections of the i-th video, two for each hidden instance, whose true tIoU falls with their
    number; over all videos the scores fall ("reversed": rise) with the true tIoU."""
    number = torch.arange(2 * len(hidden.labels))
    instance = number // 2
    shift = 0.01 * (6 * i + number)
    scores = 0.9 - 0.01 * (number + 6 * i)
    if case == "reversed":
        shift = 0.01 * (6 * i + 5 - number)
        scores = 0.9 - 0.01 * (number - 6 * i)
    labels = hidden.labels[instance]
    if case == "another class" and i < 4:  # of those with the best scores
        labels = 1 - labels
    length = hidden.segments[:, 1:] - hidden.segments[:, :1]
    segments = hidden.segments[instance] + shift[:, None] * length[instance]
    # Beyond twice as many as instances: low scores of a perfect tIoU do not count.
    tail = torch.arange(3)
    return {
        "segments": torch.cat([segments, hidden.segments[tail]]),
        "labels": torch.cat([labels, hidden.labels[tail]]),
        "scores": torch.cat([scores, 0.01 - 0.001 * tail]),
    }


@pytest.mark.parametrize("case", ["ranked", "reversed", "another class"])
def test_calibration_ranks_scores_against_the_true_tiou(own, monkeypatch, case):
    folder = tables.reach(own_argv(own, "--acp", "none"), "supervised", own / "tables")
    labelled = read_result(folder / "split.json")["labelled"]

    def detect(detector, videos, d, s):
        assert len(videos) == 7
        assert not {video.id for video in videos} & set(labelled)
        return {video.id: made_up_detections(d.hidden[video.id], i, case)
                for i, video in enumerate(videos)}

    monkeypatch.setattr(evaluate, "detect", detect)
    found = tables.calibration(folder)["rank_correlation"]
    if case == "another class":
        assert found < 0
    else:
        assert found == pytest.approx(-1 if case == "reversed" else 1)


def test_auc_against_a_count_of_pairs():
    values = torch.tensor([0.1, 0.4, 0.4, 0.9])
    right = torch.tensor([False, True, False, True])
    assert tables.auc(values, right) == (1 + 0.5 + 1 + 1) / 4
    assert tables.auc(values, right | True) is None


def change_pseudo(path, pseudo):
    """Put other pseudo labels into a checkpoint."""
    content = torch.load(path, weights_only=True)
    content["pseudo"] = pseudo
    torch.save(content, path)


def four_states(hidden):
    """A record of a pseudo label in each state: the three hidden instances, and a miss."""
    c, other, third = hidden.labels.tolist()
    assert (c, third) == (c, c)
    miss = torch.tensor([[60.0, 63.0]])
    return {
        "segments": torch.cat([hidden.segments, miss]),
        "labels": torch.tensor([c, c, c, other]),
        "scores": torch.tensor([0.9, 0.8, 0.4, 0.3]),
        "similarity": torch.tensor([0.9, 0.1, 0.8, math.nan]),
        "status": torch.tensor([icd.KEPT, icd.DROPPED, icd.MINED, icd.CANDIDATE]),
    }


def test_causes_count_pseudo_labels_by_class_and_state(own, capsys):
    argv = [*table_argv(own, "--joint-epochs", 1), "--seeds", "0,"]
    assert tables.main(["causes", *argv]) == 0
    folder, = (own / "tables").glob("all-*")
    _, d, _ = tables.read_run(folder)
    hidden = d.hidden[d.unlabelled[0].id]
    record = four_states(hidden)
    c, other = record["labels"][[0, 3]].tolist()
    pseudo = {name: data.rows(record, slice(0)) for name in d.hidden}
    pseudo[hidden.id] = record
    change_pseudo(folder / "checkpoint.pt", pseudo)

    found = {row["class"]: row for row in tables.causes(folder)}
    assert list(found) == [*d.classes, "all classes"]
    n = sum(int((video.labels == c).sum()) for video in d.hidden.values())
    assert found[d.classes[c]] == {
        "class": d.classes[c],
        "labelled": sum(int((video.labels == c).sum()) for video in d.labelled),
        "hidden": n,
        "ALQA precision": 1 / 2,
        "ALQA recall": 1 / n,
        "ICD precision": 1.0,
        "ICD recall": 2 / n,
        "AUC score": 0.5,
        "AUC similarity": 1.0,
    }
    total = found["all classes"]
    assert (total["hidden"], total["ICD recall"]) == (21, 2 / 21)
    missed = found[d.classes[other]]
    assert missed["ALQA precision"] is None
    assert missed["ALQA recall"] == 0.0
    assert missed["AUC score"] is None

    capsys.readouterr()
    assert tables.main(["causes", *argv]) == 0
    rows = cells(printed_rows(capsys))
    assert [row[0] for row in rows] == ["class", "---", "A", "B", "all classes"]
    change_pseudo(folder / "checkpoint.pt", None)
    with pytest.raises(data.BadInput, match="no pseudo labels"):
        tables.causes(folder)


# ---- bench.py -----------------------------------------------------------------------------------

@pytest.fixture
def quick(monkeypatch):
    """bench.py in this process, the matrix product not measured."""
    def in_process(work, device, *arguments):
        return bench.with_memory(work, device, arguments, torch.get_num_threads())

    def product_rate(device, precision, seconds=0.5):
        return 1e9

    monkeypatch.setattr(bench, "in_child", in_process)
    monkeypatch.setattr(bench, "product_rate", product_rate)


@pytest.mark.parametrize(("work", "arguments"), [
    (bench.step_row, ("float32", 40, 1)),
    (bench.forward_row, ("float32", 40, 1)),
    (bench.epoch_row, ("float32", [40, 60])),
    (bench.detection_row, ("float32", [40, 60])),
    (bench.long_row, ("float32", 70)),
    (bench.attention_row, (64, 1)),
    (bench.nms_row, (50, 3, 1)),
    (bench.map_row, ("random", bench.random_detections, (2000,), 1)),
    (bench.kmeans_row, (80, 1)),
    (bench.loading_row, (64, 1)),
    (bench.bmn_row, (False, 1, 1)),
], ids=lambda value: getattr(value, "__name__", "small"))
def test_every_part_is_measured(quick, work, arguments):
    row = bench.in_child(work, "cpu", *arguments)
    assert {"part", "size", "seconds", "peak_MB"} <= set(row)
    assert row["seconds"] > 0


def test_the_bench_prints_and_writes_its_rows(quick, tmp_path, capsys):
    bench.main(["nms", "--device", "cpu", "--repeat", "1", "--json", str(tmp_path / "b.json")])
    rows = read_result(tmp_path / "b.json")
    assert [row["part"] for row in rows] == ["nms"] * 4
    text = capsys.readouterr().out
    for row in rows:
        assert row["size"] in text
