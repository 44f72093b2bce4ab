"""Bad input of every kind (corpus.py): a one-line error and exit code 2, a documented warning, or a valid reading."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT
from corpus import CASES, READERS, REFUSED, outcome, planted
from test_faults import zygote  # noqa: F401

CORE = [case for i, case in enumerate(CASES) if case.fault == "nothing" or i % 8 == 0]  # of every reader, for CI
PARTS = 4
# one or two of each script in a process of its own, the first as a user starts it
COMMANDS = [
    "t.csv: a cell too many in every row", "checkpoint: a tensor missing", "prepare_retclip.py: UTF-16",
    "packed.npy: a named pipe",
    "t.csv: img_path '../../../../../../etc/passwd'", "checkpoint: foreign pickle", "checkpoint: entries flipped",
    "resumed: cut to 50 %", "resumed: no optimizer", "packed.npy: objects (a pickle)", "volumes.csv: first 'yes'",
    "imgs.mdb: a foreign pickle", "pairs.mdb: cut to 50 %", "texts.jsonl: deep", "film.png: claims 10,000 x 10,000",
    "film.dcm: a deflated bomb", "film.nii.gz: a named pipe", "prepare_ct.py: an id twice",
    "predictions.csv: an id with line ends",
    "results.json: NaN", "c.yaml: a Python object", "c.yaml: lr of text", "checkpoint of csi: model 'vgg'",
]  # fmt: skip

LOG = r"\d{4}-\d\d-\d\d .* - INFO - |warning: |csi:|retclip:|\s*$"  # and the progress bar
MET_LATER = ("film.png", "film.dcm", "film.nii.gz", "imgs.mdb")  # a sample of many: read when it is due, in training


def failures(cases, folder) -> tuple[list[str], Counter]:
    found, counts = [], Counter()
    for i, case in enumerate(cases):
        place = folder / str(i)
        place.mkdir()
        try:
            counts[outcome(case, place)] += 1
        except AssertionError as e:
            found.append(f"{case.name}: {e}")
        shutil.rmtree(place)
    return found, counts


def test_the_corpus_is_large_and_its_names_are_its_own():
    names = [case.name for case in CASES]
    assert len(CASES) >= 300 and len(set(names)) == len(names)
    assert {case.reader for case in CASES} == set(READERS)
    assert len(CORE) >= 300


def test_bad_input_of_every_reader(tmp_path):
    """An eighth of the corpus and every valid sample; in one process, for the imports' sake."""
    found, counts = failures(CORE, tmp_path)
    assert not found, "\n".join([f"{len(found)} of {len(CORE)}", *found])
    assert counts["refused"] > counts["read"] > counts["warned"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_bad_input_all(part, tmp_path):
    cases = CASES[part * len(CASES) // PARTS : (part + 1) * len(CASES) // PARTS]
    found, _ = failures(cases, tmp_path)
    assert not found, "\n".join([f"{len(found)} of {len(cases)}", *found])


def check_command(case, folder, code: int, out: str, text: str) -> None:
    assert case.allowed == REFUSED and code == 2, (code, text[-2000:])
    said = [line for line in text.splitlines() if not re.match(LOG, line)]
    assert len(said) == 1 and said[0].startswith("error: ") and "Traceback" not in out, text
    assert case.reader in MET_LATER or text.startswith("error: "), text
    assert not (folder / "owned").exists()


@pytest.fixture
def planted_in(tmp_path):
    """planted_in(name of a case) -> the case, its folder, and the command that reads it."""

    def plant(name: str):
        case, folder = next(case for case in CASES if case.name == name), tmp_path / "case"
        folder.mkdir()
        return case, folder, [str(word) for word in READERS[case.reader].command(planted(case, folder))]

    return plant


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_with_one_line(name, planted_in, zygote, tmp_path):  # noqa: F811
    case, folder, words = planted_in(name)
    child = zygote.start(words, tmp_path / "text", out=tmp_path / "out")[0]
    code = child.wait()
    check_command(case, folder, code, (tmp_path / "out").read_text(), child.text)


@pytest.mark.parametrize("name", COMMANDS[:1])
def test_a_command_of_a_user_ends_with_one_line(name, planted_in):
    case, folder, words = planted_in(name)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, capture_output=True, env=env, timeout=300)
    check_command(case, folder, done.returncode, done.stdout, done.stderr)
