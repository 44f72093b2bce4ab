"""benchmarks/bench_retclip.py: its peers compute what ours does and what the original's own code computed."""

import importlib.util
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run

pytest.importorskip("transformers", reason="the peer's encoders (requirements-dev.txt)")
spec = importlib.util.spec_from_file_location("bench_retclip", ROOT / "benchmarks" / "bench_retclip.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def two_forms(steps, length):
    """{(name, padding): texts} of as many tokens in all rows."""
    ids = steps.words[:, :length]
    return {(name, "batch"): {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for name in ("peer", "ours")}


def test_a_quick_run_prints_every_ratio():
    """Ratios are not judged here: a run of one round may miss a requirement (exit code 1), and then says which."""
    words = ("--sizes", "tiny", "--rounds", 1, "--sides", 64)
    result = run("benchmarks/bench_retclip.py", *words, check=None)
    assert result.returncode in (0, 1), result.stderr
    assert ("requirement missed" in result.stdout) == (result.returncode == 1)
    ratios = [float(x) for x in re.findall(r"CPU-s: +([\d.]+) x  \(wall +[\d.]+ x\)", result.stdout)]
    assert len(ratios) == 2 * 2 * 4 + 2 and min(ratios) > 0  # texts, types, rows of the step; augmented or not
    for words in ("both padded to the context", "gain of padding to the batch", "both gains together"):
        assert result.stdout.count(f"fp32, {words}") == result.stdout.count(f"bf16, {words}") == 2
    assert len(re.findall(r"images per CPU-second:  peer \d+  ours \d+\n", result.stdout)) == 2


def test_the_peer_computes_what_ours_does():
    """Same loss and gradients in fp32, also after a step and with more padding; nearly the same loss in bf16."""
    steps = bench.Steps("tiny")
    forms = two_forms(steps, 7)
    for (name, _), texts in forms.items():
        steps.step(name, texts, "bf16")
    ids, mask = (torch.nn.functional.pad(x, (0, 5)) for x in forms["ours", "batch"].values())
    forms |= {(name, "context"): {"input_ids": ids, "attention_mask": mask} for name in ("peer", "ours")}
    steps.compare(forms)
    losses = [steps.models[k[0]].eval() and steps.step(k[0], v, "bf16") for k, v in two_forms(steps, 7).items()]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("what", ["texts", "an eye", "a weight"])
def test_the_comparison_sees_a_difference(what, monkeypatch):
    steps = bench.Steps("tiny")
    forms = two_forms(steps, 7)
    if what == "texts":
        forms["peer", "batch"] = {**forms["peer", "batch"], "input_ids": steps.words[:, 7:14]}
    elif what == "an eye":
        steps.eyes = steps.eyes[::-1]
    else:
        loaded = steps.models["ours"].load_state_dict

        def load_and_change(state):
            loaded(state)
            steps.models["ours"].visual.ln_post.weight.data[0] += 0.1

        monkeypatch.setattr(steps.models["ours"], "load_state_dict", load_and_change)
    with pytest.raises(AssertionError):
        steps.compare(forms)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Flags of train_retclip.py for an LMDB of 12 drawn pairs of 64 pixels."""
    folder = tmp_path_factory.mktemp("bench_retclip")
    bench.demo_data.main(f"fundus --out {folder} --n 12 --size 64 --num-workers 1".split())
    bench.prepare_retclip.main(f"--csv {folder}/pairs.csv --out {folder}/data --lmdb {folder}/lmdb".split())
    return f"--train-data {folder}/lmdb/train --val-data {folder}/lmdb/train --vocab {folder}/vocab.txt".split()


def test_augmented_images_are_alike(pairs, capsys):
    """Over 984 images of each; the limit of data_row is then 6 % of the spread."""
    assert bench.data_row(bench.retclip.parse_args([*pairs, "--image-size", "64"]), 40) > 0
    assert float(re.search(r"differ by ([\d.]+)%", capsys.readouterr().out)[1]) < 6.2


def test_images_without_augmentation_are_equal_and_a_difference_is_seen(pairs, monkeypatch):
    args = bench.retclip.parse_args([*pairs, "--no-augment", "--image-size", "64"])
    bench.data_row(args, 1)
    plain = bench.retclip.plain_colour
    monkeypatch.setattr(bench.retclip, "plain_colour", lambda: plain() * 1.001)
    with pytest.raises(AssertionError):
        bench.data_row(args, 1)


def test_the_literal_data_set_equals_the_original(shared):
    """Without augmentation: the tensors of the original's own data set class, JPEG, PNG and grey levels."""
    folder = shared / "golden" / "retclip_lmdb"
    golden = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["retclip"]
    items = golden["dataset_items (official LMDBDataset, split='val' transform)"]
    lengths = iter(len(item["tokens_without_padding"]) for item in items)
    tokenizer = SimpleNamespace(encode=lambda text: SimpleNamespace(ids=[1] * next(lengths)))
    settings = SimpleNamespace(augment=False, max_text_length=items[0]["len"])
    literal = bench.Literal(folder / golden["path"], SimpleNamespace(tokenizer=tokenizer, args=settings, size=224))
    for item in items:
        left, right, ids = literal[item["index"]]
        assert len(ids) == item["len"] and int(ids.sum()) == item["eos_index"] + 1
        for image, want in ((left, item["img_l"]), (right, item["img_r"])):
            assert list(image.shape) == want["shape"]
            assert [image.mean().item(), image.std().item()] == pytest.approx([want["mean"], want["std"]], abs=1e-4)
            sample = torch.tensor(want["sample[:, ::56, ::56]"])
            torch.testing.assert_close(image[:, ::56, ::56].flatten(), sample.flatten(), rtol=0, atol=1e-4)


def test_rectangles_stay_inside():
    bench.random.seed(0)
    for width, height, share, ratio in ((50, 40, (0.9, 1), 3 / 4), (64, 64, (0.02, 1 / 3), 0.3), (100, 10, (1, 1), 1)):
        found = [bench.rectangle(width, height, share, ratio) for _ in range(300)]
        assert all(w > 0 < h and 0 <= x <= width - w and 0 <= y <= height - h for x, y, w, h in found)
    assert set(found) == {(45, 0, 10, 10)}  # none of ten fits: the middle
