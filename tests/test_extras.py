"""Tests of extras/: tables.py shares and measures runs, bench.py measures every part."""
import math
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
import icd
import train
from extras import bench, pgcn, tables
from plumbing.arguments import settings_of
from plumbing.words import BadInput
from tests.helpers import finished, own_argv, read_result

# ---- tables.py ----------------------------------------------------------------------------------

SHORT = ("--pretrain-epochs", 1, "--supervised-epochs", 1, "--joint-epochs", 1)


def table_argv(own, *more):
    """The command line of tables.py for the user's data set, two seeds."""
    argv = own_argv(own, *SHORT, "--theta-l", 0.0, "--runs", own / "tables", "--seeds", 2, *more)
    at = argv.index("--out")
    return argv[:at] + argv[at + 2:]


def cells(text):
    """The cells of the printed tables' lines."""
    return [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]


@pytest.fixture(scope="module")
def tabled(tmp_path_factory):
    """The user's data set with Tables 3(a) and 3(b), whose runs the tests share."""
    return finished(tmp_path_factory, tables.main, lambda own: ["3a", "3b", *table_argv(own)])


def test_tables_share_stages_resume_and_print_markdown(tabled, capsys, monkeypatch):
    rows = cells((tabled / "stdout").read_text())
    names = [["row", "---", *(row[0] for row in tables.ROWS[table])] for table in ("3a", "3b")]
    assert [row[0] for row in rows] == names[0] + names[1]
    assert len({len(row) for row in rows[:6]}) == 1
    differences = [row[-1] for row in rows[2:8]]
    assert differences[0] == "-"
    assert all(re.fullmatch(r"\S+ ± \S+ \(\S+ to \S+\)", text) for text in differences[1:])
    made = [folder.name.split("-")[0] for folder in (tabled / "tables").iterdir()]
    assert Counter(made) == {"pretrain": 2, "supervised": 2 * 5, "all": 2 * 8}
    calibrated = [path.parent.name.split("-")[0] for path in tabled.rglob("calibration.json")]
    assert Counter(calibrated) == {"supervised": 2 * 4}  # stage 3 leaves no video held out
    monkeypatch.setattr(train, "main", None)  # nothing is trained again
    assert tables.main(["3a", "3b", *table_argv(tabled)]) == 0
    told = capsys.readouterr()
    assert cells(told.out) == rows and "other code" not in told.err
    monkeypatch.setattr(tables, "code_of", lambda: "later")
    assert tables.main(["3a", *table_argv(tabled)]) == 0
    assert f"{len(made)} runs that other code has trained" in capsys.readouterr().err


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_row_of_the_tables_is_a_command_of_train(own, name):
    for row in tables.TABLES[name]:
        kind = tables.kind_of(name)
        given = ["--proposals=p.json"] if kind is pgcn.Settings else []
        assert settings_of([*own_argv(own), *given, *row[-1].split()], kind)


def test_a_killed_shared_stage_goes_on_under_another_row(tabled, tmp_path):
    runs = shutil.copytree(tabled / "tables", tmp_path / "tables")
    stages = set(runs.glob("supervised-*"))
    for stage in stages:
        (stage / "finished.json").unlink()
    # The first row has another threshold than that of Table 3 which began the stage.
    argv = table_argv(tabled, "--acp", "none", "--seeds", "1", "--runs", runs)
    assert tables.main(["fig3c", *argv]) == 0
    assert set(runs.glob("supervised-*")) == stages
    assert sum((stage / "finished.json").exists() for stage in stages) == 1


@pytest.mark.parametrize("words", [
    "7", "3a --no-such-setting 1", "3a --splits absent.json", "3a --start x.pt", "3a --seeds 0",
    "3a --seeds -1", "3a --seeds ,", "3a --seeds x", "3a --seeds 0,0",
    "S6 --no-such-setting 1"])
def test_tables_refuse_what_they_do_not_know(own, capsys, words):
    table, *more = words.split()
    assert tables.main([table, *table_argv(own, *more)]) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert not (own / "tables").exists()


def test_the_probe_tells_classes(tabled, capsys):
    assert tables.main(["S2", *table_argv(tabled, "--seeds", "1,")]) == 0
    rows = cells(capsys.readouterr().out)[2:]
    assert [row[0] for row in rows] == [name for name, *_ in tables.PROBES["S2"]]
    assert float(rows[0][2].split()[0]) > 80  # features shift a column by 3 inside each action


def test_logistic_regression_parts_what_lines_part_and_auc_counts_pairs():
    x = torch.randn(300, 3)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    W = tables.logistic_regression(x, y, 3)
    assert ((x @ W[:-1] + W[-1]).argmax(1) == y).float().mean() > 0.7
    values, right = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([False, True, False, True])
    assert tables.auc(values, right) == (1 + 0.5 + 1 + 1) / 4
    assert tables.auc(values, right | True) is None


def made_up_detections(hidden, i, case):
    """Detections of the i-th video, two for each hidden instance, the best score first.

    Over all videos the true tIoU rises ("reversed": falls) with the score."""
    scores = 0.9 - 0.01 * (6 * i + torch.arange(6))
    shift = scores - 0.48 if case == "reversed" else 0.9 - scores  # in lengths of the instance
    labels = hidden.labels.repeat_interleave(2)
    if case == "another class" and i < 4:  # of those with the best scores
        labels = 1 - labels
    segments = hidden.segments.repeat_interleave(2, 0)
    segments = segments + shift[:, None] * segments.diff()
    # Beyond twice as many as instances: low scores of a perfect tIoU do not count.
    return {
        "segments": torch.cat([segments, hidden.segments]),
        "labels": torch.cat([labels, hidden.labels]),
        "scores": torch.cat([scores, 0.01 - 0.001 * torch.arange(3)])}


@pytest.mark.parametrize(("case", "low", "high"), [
    ("ranked", 1 - 1e-6, 1 + 1e-6), ("reversed", -1 - 1e-6, 1e-6 - 1), ("another class", -1, 0)])
def test_calibration_ranks_scores_against_the_true_tiou(tabled, monkeypatch, case, low, high):
    folder = tables.reach(own_argv(tabled, "--acp", "none"), "supervised", tabled / "tables")
    labelled = read_result(folder / "split.json")["labelled"]

    def detect(detector, videos, d, s):
        assert len(videos) == 7
        assert not {video.id for video in videos} & set(labelled)
        return {video.id: made_up_detections(d.hidden[video.id], i, case)
                for i, video in enumerate(videos)}

    monkeypatch.setattr(evaluate, "detect", detect)
    assert low < tables.calibration(folder)["rank_correlation"] < high


def test_causes_count_pseudo_labels_by_class_and_state(tabled, tmp_path, capsys):
    runs = shutil.copytree(tabled / "tables", tmp_path / "tables")
    argv = table_argv(tabled, "--seeds", "0,", "--runs", runs)
    folder, = tables.reach_all([own_argv(tabled, "--theta-l", 0.0)], [], "all", runs)
    _, d, _ = tables.read_run(folder)
    hidden = d.hidden[d.unlabelled[0].id]
    c, other, third = hidden.labels.tolist()
    assert c == third
    record = {  # the three hidden instances and a miss, one in each state
        "segments": torch.cat([hidden.segments, torch.tensor([[60.0, 63.0]])]),
        "labels": torch.tensor([c, c, c, other]), "scores": torch.tensor([0.9, 0.8, 0.4, 0.3]),
        "similarity": torch.tensor([0.9, 0.1, 0.8, math.nan]),
        "status": torch.tensor([icd.KEPT, icd.DROPPED, icd.MINED, icd.CANDIDATE])}
    nothing = data.take(record, slice(0))
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    pseudo = dict.fromkeys(d.hidden, nothing) | {hidden.id: record}
    torch.save(checkpoint | {"pseudo": pseudo}, folder / "checkpoint.pt")
    found = {row["class"]: row for row in tables.causes(folder)}
    assert list(found) == [*d.classes, "all classes"]
    labelled = sum(video.labels.tolist().count(c) for video in d.labelled)
    n = sum(video.labels.tolist().count(c) for video in d.hidden.values())
    assert found[d.classes[c]] == {
        "class": d.classes[c], "labelled": labelled, "hidden": n,
        "ALQA precision": 1 / 2, "ALQA recall": 1 / n, "ICD precision": 1.0, "ICD recall": 2 / n,
        "kept": 1, "dropped": 1, "mined": 1,
        "right": 2, "wrong class": 0, "boundary": 0, "background": 0, "missed": n - 2,
        "AUC score": 0.5, "AUC similarity": 1.0}
    total, missed = found["all classes"], found[d.classes[other]]
    assert (total["hidden"], total["ICD recall"]) == (21, 2 / 21)
    assert (missed["ALQA precision"], missed["ALQA recall"], missed["AUC score"]) == (None, 0, None)
    assert tables.main(["causes", *argv]) == 0
    rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["class", "---", "A", "B", "all classes"]
    torch.save(checkpoint | {"pseudo": None}, folder / "checkpoint.pt")
    with pytest.raises(BadInput, match="no pseudo labels"):
        tables.causes(folder)


@pytest.mark.parametrize(("segment", "label", "fault"), [
    ([0, 10], 0, "right"), ([0, 9], 1, "wrong class"), ([6, 14], 0, "boundary"),
    ([0, 9.5], 0, "boundary"), ([6, 14], 1, "background"), ([9.5, 60], 0, "background"),
    ([20, 30], 1, "right"), ([14, 30], 0, "wrong class")])
def test_what_is_wrong_with_a_pseudo_label(segment, label, fault):
    video = SimpleNamespace(segments=torch.tensor([[0.0, 10.0], [20.0, 30.0]]),
                            labels=torch.tensor([0, 1]))
    record = {"segments": torch.tensor([segment], dtype=torch.float32),
              "labels": torch.tensor([label])}
    right = torch.tensor([fault == "right"])
    assert tables.FAULTS[int(tables.faults_of(record, video, right))] == fault
    video = SimpleNamespace(segments=video.segments[:0], labels=video.labels[:0])
    fault = tables.faults_of(record, video, torch.tensor([False]))
    assert tables.FAULTS[int(fault)] == "background"


def test_the_truth_chooses_and_corrects_pseudo_labels():
    video = SimpleNamespace(segments=torch.tensor([[0.0, 10.0], [20.0, 30.0]]),
                            labels=torch.tensor([0, 1]))
    record = {"segments": torch.tensor([[0.0, 9.0], [0.0, 8.0], [20.0, 29.0], [40.0, 50.0]]),
              "labels": torch.tensor([0, 0, 2, 1]), "scores": torch.tensor([0.9, 0.8, 0.3, 0.7]),
              "status": torch.tensor([icd.DROPPED, icd.KEPT, icd.CANDIDATE, icd.MINED])}
    kept, dropped = icd.KEPT, icd.DROPPED
    chosen = tables.chosen_by_truth(record, video, corrected=False)
    assert chosen["status"].tolist() == [kept, dropped, dropped, dropped]
    assert chosen["labels"].tolist() == [0, 0, 2, 1]
    corrected = tables.chosen_by_truth(record, video, corrected=True)
    assert corrected["status"].tolist() == [kept, dropped, kept, dropped]
    assert corrected["labels"].tolist() == [0, 0, 1, 1]
    empty = SimpleNamespace(segments=video.segments[:0], labels=video.labels[:0])
    assert tables.chosen_by_truth(record, empty, True)["status"].tolist() == [dropped] * 4


def test_the_ceiling_trains_on_what_the_hidden_labels_chose(tabled, capsys):
    argv = table_argv(tabled, "--seeds", "0,", "--acp", "none")
    assert tables.main(["ceiling", *argv]) == 0
    rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows[2:]] == [name for name, *_ in tables.CEILINGS["ceiling"]]
    assert not list(tabled.rglob("start.pt"))
    for folder in [*tabled.rglob("all-*-right"), *tabled.rglob("all-*-corrected")]:
        checkpoint, _, d = tables.read_checkpoint(folder)
        for name, video in d.hidden.items():
            record = checkpoint["pseudo"][name]
            teaching = train.teaches(record)
            assert torch.equal(teaching, evaluate.matched(record, video))
    assert tables.main(["ceiling", *argv]) == 0  # nothing is trained again
    assert cells(capsys.readouterr().out) == rows


# ---- bench.py -----------------------------------------------------------------------------------

@pytest.mark.parametrize(("work", "arguments"), [
    (bench.step_row, ("float32", 40, 1)), (bench.forward_row, ("float32", 40, 1)),
    (bench.epoch_row, ("float32", [40, 60])), (bench.detection_row, ("float32", [40, 60])),
    (bench.long_row, ("float32", 70)), (bench.attention_row, (64, 1)), (bench.nms_row, (50, 3, 1)),
    (bench.map_row, ("random", bench.random_detections, (2000,), 1)), (bench.kmeans_row, (80, 1)),
    (bench.loading_row, (64, 1)), (bench.bmn_row, (False, 1, 1)),
], ids=lambda value: getattr(value, "__name__", "small"))
def test_every_part_is_measured(monkeypatch, work, arguments):
    monkeypatch.setattr(bench, "product_rate", lambda device, precision, seconds=0.5: 1e9)
    row = bench.with_memory(work, "cpu", arguments, 1)
    assert {"part", "size", "seconds", "peak_MB"} <= set(row)
    assert row["seconds"] > 0


def test_the_bench_prints_and_writes_its_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "in_child", lambda work, device, *arguments: bench.with_memory(
        work, device, arguments, 1))
    bench.main(["nms", "--device", "cpu", "--repeat", "1", "--json", str(tmp_path / "b.json")])
    rows = read_result(tmp_path / "b.json")
    assert [row["part"] for row in rows] == ["nms"] * 4
    text = capsys.readouterr().out
    assert all(row["size"] in text for row in rows)
