"""evaluate.py: two CSV files or a checkpoint -> numbers equal to scikit-learn, complete files, one-line errors."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LABELS, run, tiny_args
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

import common
import evaluate

NAMES = ["Cardiomegaly", "Lung nodule", "never", "macro"]  # 'macro' must not be taken for the average


def make_files(folder, n=200, seed=0, **changes):
    """predictions and labels of four labels: one rare, one never positive, some unknown; two scans of each patient."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, 4)) < [0.4, 0.1, 0, 0.3]).astype(float)
    p = np.round(1 / (1 + np.exp(-(rng.normal(size=(n, 4)) + 1.5 * y - 1))), 3)
    unknown = rng.random((n, 4)) < 0.1
    ids = [f"valid_{i // 2}_a_{i % 2 + 1}" for i in range(n)]
    labels = pd.DataFrame(y.astype(int).astype(str), columns=NAMES).mask(unknown, "").assign(id=ids)
    labels.loc[0, "Cardiomegaly"] = "-1"
    unknown[0, 0] = True
    predictions = pd.DataFrame(p, columns=[f"{name}_prob" for name in NAMES]).assign(id=ids)
    for change in changes.values():
        predictions, labels = change(predictions, labels)
    predictions.to_csv(folder / "preds.csv", index=False)
    labels.to_csv(folder / "labels.csv", index=False)
    return np.where(unknown, np.nan, y), p


def score(folder, *words, code=0):
    """evaluate.py on the two files of a folder, in this process -> results.json."""
    words = [
        "--predictions",
        folder / "preds.csv",
        "--labels",
        folder / "labels.csv",
        "--output",
        folder / "eval",
        *words,
    ]
    assert common.run_main(lambda: evaluate.main([str(w) for w in words])) == code
    return json.loads((folder / "eval" / "results.json").read_text()) if code == 0 else None


def without_provenance(results):
    return {k: v for k, v in results.items() if k != "provenance"}


# ---- two CSV files ----


def test_two_files_end_to_end(tmp_path):
    """As a user calls it; the numbers are scikit-learn's, label by label and on average."""
    y, p = make_files(tmp_path)
    done = run("evaluate.py", "--predictions", tmp_path / "preds.csv", "--labels", tmp_path / "labels.csv",
               "--output", tmp_path / "eval", "--threshold", 0.4)  # fmt: skip
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert {f.name for f in (tmp_path / "eval").iterdir()} == {
        "results.json",
        "predictions.csv",
        "labels.csv",
        "report.html",
    }
    assert "Thresholds: 0.4" in done.stdout and "undefined" in done.stdout and "macro" in done.stdout
    assert "no positive case" in done.stderr

    expected = {"auroc": [], "auprc": [], "f1": []}
    for k, name in enumerate(NAMES):
        known, row = ~np.isnan(y[:, k]), results["per_label"][name]
        t, s = y[known, k], p[known, k]
        assert (row["n"], row["positives"], row["threshold"]) == (known.sum(), t.sum(), 0.4)
        assert row["f1"] == pytest.approx(f1_score(t, s >= 0.4, zero_division=0), abs=1e-12)
        expected["f1"].append(row["f1"])
        if name == "never":
            assert row["auroc"] is row["auprc"] is row["auroc_low"] is None
            continue
        assert row["auroc"] == pytest.approx(roc_auc_score(t, s), abs=1e-12)
        assert row["auprc"] == pytest.approx(average_precision_score(t, s), abs=1e-12)
        assert row["auroc_low"] < row["auroc"] < row["auroc_high"]
        expected["auroc"].append(row["auroc"]), expected["auprc"].append(row["auprc"])
    for metric, values in expected.items():
        assert results["macro"][metric] == pytest.approx(np.mean(values), abs=1e-12)
    known = ~np.isnan(y)
    assert results["micro"]["auroc"] == pytest.approx(roc_auc_score(y[known], p[known]), abs=1e-12)
    assert (results["n"], results["n_patients"], results["macro"]["n_defined"]) == (200, 100, 3)
    assert results["provenance"]["predictions"]["sha256"] == common.file_sha256(tmp_path / "preds.csv")
    written = pd.read_csv(tmp_path / "eval" / "predictions.csv")
    assert list(written.columns[:3]) == ["id", "Cardiomegaly_prob", "Cardiomegaly_pred"]
    assert (written["macro_pred"] == (p[:, 3] >= 0.4)).all()


def test_order_of_rows_changes_nothing(tmp_path):
    make_files(tmp_path)
    first = score(tmp_path, "--n-bootstrap", 20)
    make_files(tmp_path, shuffle=lambda p, t: (p.sample(frac=1, random_state=1), t.sample(frac=1, random_state=2)))
    assert without_provenance(score(tmp_path, "--n-bootstrap", 20)) == without_provenance(first)


def test_its_own_files_give_the_same_numbers(tmp_path):
    """predictions.csv and labels.csv are complete, also with names that a spreadsheet would run."""

    def formulas(p, t):
        p, t = p.rename(columns={"macro_prob": "=1+1_prob"}), t.rename(columns={"macro": "=1+1"})
        p["id"], t["id"] = "=" + p["id"], "=" + t["id"]
        return p, t.assign(patient_id="@" + t["id"].str[:9])

    make_files(tmp_path, formulas=formulas)
    first = score(tmp_path, "--n-bootstrap", 20)
    text = (tmp_path / "eval" / "predictions.csv").read_text()
    assert "\n'=valid" in text and ",'=1+1_prob" in text and "\n=" not in text and ",=" not in text
    (tmp_path / "eval" / "predictions.csv").rename(tmp_path / "preds.csv")
    (tmp_path / "eval" / "labels.csv").rename(tmp_path / "labels.csv")
    again = score(tmp_path, "--n-bootstrap", 20)
    assert again["per_label"] == first["per_label"] and "=1+1" in again["per_label"]
    assert again["n_patients"] == first["n_patients"]


def test_output_forms_and_bootstrap_switches(tmp_path):
    make_files(tmp_path)
    score(tmp_path)
    plain = score(tmp_path, "--no-bootstrap", "--threshold", 0.5)
    lows = [k for k in plain["per_label"]["Cardiomegaly"] if k.endswith("_low")]
    assert plain["interval"] is None and lows == ["auroc_delong_low"]  # which needs no resamples
    assert "_low" not in json.dumps(without_provenance(plain)).replace("auroc_delong_low", "")
    score(tmp_path, "--output", tmp_path / "deep" / "er" / "numbers.json", "--bootstrap", "--n_bootstrap", 7)
    assert {f.name for f in (tmp_path / "deep" / "er").iterdir()} == {
        "numbers.json", "predictions.csv", "labels.csv", "report.html"}  # fmt: skip
    assert json.loads((tmp_path / "deep" / "er" / "numbers.json").read_text())["interval"]["n_resamples"] == 7
    (tmp_path / "c.yaml").write_text("n-bootstrap: 9\nevaluation:\n  threshold: 0.3\n")
    chosen = score(tmp_path, "--config", tmp_path / "c.yaml", "--threshold", 0.2)
    assert chosen["interval"]["n_resamples"] == 9 and chosen["per_label"]["never"]["threshold"] == 0.2


def test_patients_are_resampled_together(tmp_path):
    """Every case written four times: intervals over patients stay, intervals over cases would halve."""
    make_files(tmp_path, n=150)
    one = score(tmp_path)["per_label"]["Cardiomegaly"]

    def four_times(p, t):
        t = t.assign(patient_id=t["id"].map(common.group_of))
        return tuple(pd.concat([x.assign(id=x["id"] + f"x{i}") for i in range(4)]) for x in (p, t))

    make_files(tmp_path, n=150, four=four_times)
    four = score(tmp_path)
    assert four["n"] == 600 and four["n_patients"] == 75
    width = [row["auroc_high"] - row["auroc_low"] for row in (one, four["per_label"]["Cardiomegaly"])]
    assert width[1] == pytest.approx(width[0], rel=0.02)


def test_a_label_table_of_the_data_is_not_overwritten(tmp_path, capsys):
    """labels.csv of a data set in the output folder; that of an earlier evaluation is replaced."""
    make_files(tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "labels.csv").write_text("image,score\n")
    score(tmp_path, code=2)
    assert "labels.csv is of no evaluation" in capsys.readouterr().err
    assert (tmp_path / "eval" / "labels.csv").read_text() == "image,score\n"
    (tmp_path / "eval" / "labels.csv").unlink()
    score(tmp_path)
    score(tmp_path)


def edit(table, row, column, value):
    table = table.astype(object)
    table.loc[row, column] = value
    return table


MISTAKES = {
    "missing": (lambda p, t: (p.drop(index=[3, 4]), t), "preds.csv: has no row for 2 ids of .*labels.csv: 'valid_1_a"),
    "extra": (lambda p, t: (p, t.drop(index=5)), "labels.csv: has no row for 1 id of .*preds.csv: 'valid_2_a_2'"),
    "twice": (lambda p, t: (pd.concat([p, p[:1]]), t), "preds.csv: row 202: id 'valid_0_a_1' comes twice"),
    "range": (lambda p, t: (edit(p, 7, "never_prob", 1.2), t), "row 9, column 'never_prob': '1.2' is no probability"),
    "nan": (lambda p, t: (edit(p, 7, "never_prob", "nan"), t), "row 9, column 'never_prob': 'nan' is no probability"),
    "empty": (lambda p, t: (edit(p, 7, "never_prob", ""), t), "row 9, column 'never_prob': '' is no probability"),
    "formula": (lambda p, t: (edit(p, 0, "never_prob", "=1/2"), t), "row 2, column 'never_prob': '=1/2' is no prob"),
    "label": (lambda p, t: (p, edit(t, 2, "never", "yes")), "labels.csv: row 4, column 'never': 'yes' is no label"),
    "typo": (lambda p, t: (p.rename(columns={"never_prob": "nevr_prob"}), t), "'nevr' is missing .*mean 'never'"),
    "no_prob": (lambda p, t: (p.drop(columns="never_prob"), t), "column 'never' has no 'never_prob' in .*preds.csv"),
    "meta": (lambda p, t: (p, t.assign(split="val")), "column 'split' has no 'split_prob'.*--label-columns"),
    "no_labels": (lambda p, t: (p[["id"]], t[["id"]]), "labels.csv: has no label column"),
    "no_id": (lambda p, t: (p.rename(columns={"id": "series"}), t), "preds.csv: column 'id' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_one_line(tmp_path, capsys, kind):
    change, message = MISTAKES[kind]
    make_files(tmp_path, change=change)
    score(tmp_path, code=2)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert re.search(message, said), said
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--labels", "x.csv"], "either --test-only CKPT, or --predictions"),
        (["--predictions", "x.csv"], "--predictions and --labels go together"),
        (["--predictions", "no.csv", "--labels", "no.csv"], "no.csv: no such file"),
        (["--predictions", "a.csv", "--labels", "b.csv", "--threshold", "3"], "not a probability"),
        (["--predictions", "a.csv", "--labels", "b.csv", "--n-bootstrap", "0"], "--no-bootstrap"),
        (["--predictions", "a.csv", "--labels", "b.csv", "--seed", "-1"], "--seed must not be negative"),
        (["--test-only", "no.pth"], "no.pth: no such checkpoint"),
        (["--test-only", "a.pth", "--label-columns", "x"], "the labels of a checkpoint are fixed"),
        (["--predictions", "a.csv", "--labels", "b.csv", "--split", "test"], "--split: needs a checkpoint"),
        (["--predictions", "a.csv", "--labels", "b.csv", "--pictures"], "--pictures: are of a checkpoint's own scores"),
        (["--predictions", "a.csv", "--labels", "b.csv", "--label-columns", "x", "x"], "names a label twice"),
        (["--predictions", "a.csv", "--labels", "e/labels.csv", "--output", "e"], "labels.csv is read, and would be"),
    ],
)
def test_wrong_commands_are_one_line(capsys, words, message):
    assert common.run_main(lambda: evaluate.main(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said


def test_a_row_without_probabilities_failed_to_load(tmp_path):
    """As evaluate.py writes it: listed, in no number, and exit code 3; so its own files can be scored again."""
    columns = [f"{name}_prob" for name in NAMES]
    make_files(tmp_path, blank=lambda p, t: (p.astype(object).mask(p["id"].eq("valid_1_a_2"), ""), t))
    table = pd.read_csv(tmp_path / "preds.csv", dtype=str, keep_default_na=False)
    table["id"] = [f"valid_{i // 2}_a_{i % 2 + 1}" for i in range(200)]
    assert (table.loc[3, columns] == "").all()
    table.to_csv(tmp_path / "preds.csv", index=False)
    score(tmp_path, "--no-bootstrap", code=3)
    first = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert [f["id"] for f in first["failed"]] == ["valid_1_a_2"] and first["n"] == 200
    for name, to in (("predictions", "preds"), ("labels", "labels")):
        (tmp_path / "eval" / f"{name}.csv").rename(tmp_path / f"{to}.csv")
    score(tmp_path, "--no-bootstrap", code=3)
    again = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert again["per_label"] == first["per_label"] and again["failed"] == first["failed"]


def test_label_columns_choose(tmp_path):
    make_files(tmp_path, extra=lambda p, t: (p, t.assign(split="val")))
    results = score(tmp_path, "--label-columns", "macro", "Cardiomegaly", "--no-bootstrap")
    assert list(results["per_label"]) == ["macro", "Cardiomegaly"]
    assert results["per_label"]["macro"]["auroc"] != results["macro"]["auroc"]


def test_output_that_cannot_be_made(tmp_path, capsys):
    make_files(tmp_path)
    (tmp_path / "file").write_text("")
    score(tmp_path, "--output", tmp_path / "file" / "eval", code=2)
    assert capsys.readouterr().err.startswith("error: ")


# ---- thresholds and temperatures ----


def test_oracle_thresholds_are_marked_everywhere(tmp_path, capsys):
    """The best F1 on the scored cases, said in the title, first among the notes, in both files and on the terminal."""
    y, p = make_files(tmp_path)
    plain, oracle = score(tmp_path, "--no-bootstrap"), score(tmp_path, "--no-bootstrap", "--oracle-thresholds")
    assert not plain["oracle_thresholds"] and oracle["oracle_thresholds"]
    found = [row["threshold"] for row in oracle["per_label"].values()]
    assert found == common.f1_thresholds(y, p).tolist() and oracle["macro"]["f1"] > plain["macro"]["f1"]
    assert oracle["macro"]["auroc"] == plain["macro"]["auroc"]
    assert "upper bound" in oracle["notes"][0] and oracle["evaluated"].endswith("oracle thresholds")
    columns = pd.read_csv(tmp_path / "eval" / "predictions.csv").columns
    assert "macro_pred_oracle" in columns and not any(c.endswith("_pred") for c in columns)
    page, said = (tmp_path / "eval" / "report.html").read_text(), capsys.readouterr()
    assert page.index("upper bound") < page.index("Numbers by label") and "oracle thresholds</h1>" in page
    assert "upper bound" in said.err and "oracle thresholds on labels.csv" in said.out


def test_thresholds_and_temperatures_of_validation_files(tmp_path, capsys):
    """--validation: thresholds and temperatures of other patients; of scored ones they are refused."""
    (tmp_path / "val").mkdir()
    other = lambda p, t: (p.assign(id="v" + p["id"]), t.assign(id="v" + t["id"]))  # noqa: E731
    y, p = make_files(tmp_path / "val", seed=1, other=other)
    make_files(tmp_path, halved=lambda p, t: (p.assign(**{f"{NAMES[0]}_prob": p[f"{NAMES[0]}_prob"] / 2}), t))
    words = ["--no-bootstrap", "--validation", tmp_path / "val" / "preds.csv", tmp_path / "val" / "labels.csv"]
    results = score(tmp_path, *words)
    rows = results["per_label"]
    assert [row["threshold"] for row in rows.values()] == common.f1_thresholds(y, p).tolist()
    assert "200 cases of 100 patients in preds.csv" in results["thresholds_source"]
    expected = common.fit_temperatures(y, p)
    assert rows["never"]["temperature"] is rows["never"]["calibrated"] is None and np.isnan(expected[2])
    assert rows["macro"]["temperature"] == pytest.approx(expected[3])
    y, p = make_files(tmp_path)
    known = ~np.isnan(y[:, 3])
    z = np.log(p[known, 3] / (1 - p[known, 3])) / expected[3]
    assert rows["macro"]["calibrated"]["brier"] == pytest.approx(np.mean((1 / (1 + np.exp(-z)) - y[known, 3]) ** 2))
    assert {"validation", "validation_labels"} <= results["provenance"].keys()

    score(tmp_path, "--validation", tmp_path / "preds.csv", tmp_path / "labels.csv", code=2)
    assert "patient valid_0 is scored too (100 are)" in capsys.readouterr().err
    table = pd.read_csv(tmp_path / "labels.csv", dtype=str)
    table.assign(patient_id="q" + table["id"]).to_csv(tmp_path / "renamed.csv", index=False)
    score(tmp_path, "--validation", tmp_path / "preds.csv", tmp_path / "renamed.csv", code=2)
    assert "case valid_0_a_1 is scored too (200 are)" in capsys.readouterr().err
    for flag in (["--threshold", 0.5], ["--threshold-part", 0.3], ["--oracle-thresholds"]):
        score(tmp_path, *words, *flag, code=2)
        assert "brings its own thresholds" in capsys.readouterr().err
    part = score(tmp_path, "--threshold-part", 0.5, "--no-bootstrap")["per_label"]["macro"]
    assert part["temperature"] > 0 and score(tmp_path, "--no-bootstrap")["per_label"]["macro"]["temperature"] is None


# ---- a checkpoint ----


@pytest.fixture(scope="module")
def trained(tiny_ct, tmp_path_factory):
    """best_model.pth of a run of seconds."""
    out = tmp_path_factory.mktemp("run")
    run(*tiny_args(tiny_ct, out, "--epochs", 1))
    return out / "best_model.pth"


def test_checkpoint(trained, tiny_ct, tmp_path, capsys):
    """Nothing but the checkpoint is needed; its thresholds are used, but for the cases that they were fitted to."""
    words = ["--test-only", str(trained), "--device", "cpu", "--n-bootstrap", "50"]
    assert evaluate.main([*words, "--output", str(tmp_path / "val")]) == 0
    results = json.loads((tmp_path / "val" / "results.json").read_text())
    saved = common.load_checkpoint(trained)
    assert {results["per_label"][name]["threshold"] for name in LABELS} == {0.5}
    assert "fitted to these cases" in results["thresholds_source"] and results["evaluated_on"] == "split 'val' of t.csv"
    assert "training chose the model" in results["notes"][0] and results["n"] == 7
    (tmp_path / "copy.csv").write_text(re.sub(r",(v\d+\.npz)", rf",{tiny_ct}/\1", (tiny_ct / "t.csv").read_text()))
    assert evaluate.main([*words, "--output", str(tmp_path / "c"), "--csv", str(tmp_path / "copy.csv")]) == 0
    copied = json.loads((tmp_path / "c" / "results.json").read_text())
    assert copied["notes"] == results["notes"] and copied["thresholds_source"] == results["thresholds_source"]
    assert evaluate.main([*words, "--output", str(tmp_path / "t"), "--split", "test"]) == 0
    results = json.loads((tmp_path / "t" / "results.json").read_text())
    assert [results["per_label"][name]["threshold"] for name in LABELS] == saved["thresholds"]
    assert results["provenance"]["checkpoint"]["sha256"] == common.file_sha256(trained)
    assert evaluate.main([*words, "--output", str(tmp_path / "t"), "--split", "test", "--threshold", "0.5"]) == 0
    results = json.loads((tmp_path / "t" / "results.json").read_text())
    temperatures = [results["per_label"][name]["temperature"] for name in LABELS]
    assert temperatures == common.json_safe(saved["temperatures"])
    assert results["notes"] == [] and results["n"] == 3 and results["per_label"]["first"]["threshold"] == 0.5

    files = ["--predictions", tmp_path / "val" / "predictions.csv", "--labels", tmp_path / "val" / "labels.csv"]
    assert evaluate.main([*map(str, files), "--no-bootstrap", "--output", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    first = json.loads((tmp_path / "val" / "results.json").read_text())
    assert all(again["per_label"][name]["auroc"] == first["per_label"][name]["auroc"] for name in LABELS)


def test_training_config_serves(trained, tiny_ct, tmp_path, capsys):
    """The file of a training run: data keys are used, the rest is named, and a misspelt key is an error."""
    config = tmp_path / "c.yaml"
    config.write_text(f"data:\n  csv: {tiny_ct / 't.csv'}\n  num_workers: 0\ntrain:\n  learning_rate: 1.0e-3\n")
    words = ["--checkpoint", str(trained), "--config", str(config), "--output", str(tmp_path / "e"), "--no-bootstrap"]
    assert evaluate.main([*words, "--device", "cpu"]) == 0
    assert "not used, the checkpoint has its own: lr" in capsys.readouterr().out
    config.write_text("learning_rat: 3\n")
    assert common.run_main(lambda: evaluate.main(words)) == 2
    assert "did you mean 'learning_rate'" in capsys.readouterr().err


def test_unreadable_cases_are_listed(trained, tiny_ct, tmp_path, capsys):
    """Exit code 3; the case stays in every file, without a number, and the others keep theirs."""
    table = pd.read_csv(tiny_ct / "t.csv")
    table["img_path"] = [str(tiny_ct / p) for p in table["img_path"]]
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    rows = table.index[table["split"] == "val"]
    table.loc[rows[1], "img_path"], table.loc[rows[3], "img_path"] = (
        str(tmp_path / "bad.npz"),
        str(tmp_path / "gone.npz"),
    )
    table.to_csv(tmp_path / "t.csv", index=False)
    words = [
        "--test-only",
        str(trained),
        "--csv",
        str(tmp_path / "t.csv"),
        "--output",
        str(tmp_path / "e"),
        "--device",
        "cpu",
    ]
    assert common.run_main(lambda: evaluate.main(words)) == 3
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    failed = {f["id"]: f["reason"] for f in results["failed"]}
    assert list(failed) == [table["series_id"][rows[1]], table["series_id"][rows[3]]]
    assert "bad.npz" in failed[table["series_id"][rows[1]]] and "no such file" in failed[table["series_id"][rows[3]]]
    assert results["n"] == 7 and results["per_label"]["first"]["n"] == 5
    assert "2 of 7 cases failed to load" in capsys.readouterr().err
    predictions = pd.read_csv(tmp_path / "e" / "predictions.csv")
    assert (
        len(predictions) == 7 and predictions["first_prob"].isna().tolist() == [False, True, False, True] + [False] * 3
    )
    page = (tmp_path / "e" / "report.html").read_text()
    assert "2 of 7 cases failed to load" in page


def test_checkpoint_of_another_task(tmp_path, capsys):
    common.save_checkpoint(tmp_path / "x.pth", {"task": "weather", "args": {}, "model": {"w": torch.zeros(1)}})
    assert common.run_main(lambda: evaluate.main(["--test-only", str(tmp_path / "x.pth")])) == 2
    assert "unknown task 'weather'" in capsys.readouterr().err
