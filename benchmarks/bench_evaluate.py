"""What evaluate.py computes beside what people use instead, on data of the size of the CT-RATE validation split.

    python benchmarks/bench_evaluate.py                        # all parts, about 10 minutes
    python benchmarks/bench_evaluate.py --part bootstrap --rows 800 --rounds 2

bootstrap  1000 resamples of whole patients: `bootstrap_intervals`, which is every metric of every label, their means,
           the drawing and the percentiles. Beside it, scaled up from a few resamples, the two sides taking turns:
             scikit-learn        a loop: AUROC, average precision and F1 of every label, and their micro averages
             torchmetrics        BootStrapper(MultilabelAUROC): macro AUROC alone, of rows, not of patients
             confidenceinterval  bootstrap_ci of scikit-learn's macro AUROC alone, of rows
           Required, in CPU seconds: 30 times faster than the loop. Required: equal to it to 1e-12.
score      `evaluate.py --predictions --labels` as a whole: the numbers, and the page.
delong     the interval of one AUROC, beside the direct comparison of each positive with each negative, and a bootstrap.
memory     retrieval of 10 000 x 10 000 with 512 features, in a process each: the most memory beyond the features'.
           Required: 400 MB. Beside it, at 4000 x 4000, the whole matrix of scores and its argsort.
"""

import argparse
import contextlib
import io
import resource
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from confidenceinterval.bootstrap import bootstrap_ci
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torchmetrics.classification import MultilabelAUROC
from torchmetrics.wrappers import BootStrapper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clinical  # noqa: E402
import common  # noqa: E402
import evaluate  # noqa: E402
import retrieval  # noqa: E402

LIMIT_MB = 400


def make_data(n, patients, seed=0):
    """targets (n, 18), probs (n, 18) rounded to 3 decimals (so with ties), patient (n,)."""
    rng = np.random.default_rng(seed)
    prevalence = np.linspace(0.07, 0.45, 18)  # the range of CT-RATE
    targets = (rng.random((n, 18)) < prevalence).astype(float)
    logits = rng.normal(size=(n, 18)) + 1.2 * targets + np.log(prevalence)
    return targets, np.round(1 / (1 + np.exp(-logits)), 3), rng.integers(0, patients, n)


def timed(function, *args):
    """-> result, seconds, CPU seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    return function(*args), time.perf_counter() - start, time.process_time() - cpu


def line(name, seconds, cpu, more=""):
    print(f"{name:<38} {seconds:8.2f} s  {cpu:8.2f} CPU s  {more}")


# ==== Bootstrap ================================================================================================

METRICS = {
    "auroc": lambda y, p, average: roc_auc_score(y, p, average=average),
    "auprc": lambda y, p, average: average_precision_score(y, p, average=average),
    "f1": lambda y, p, average: f1_score(y, p >= 0.5, average=average, zero_division=0),
}


def sklearn_loop(targets, probs, counts):
    """(B, 3, 18 + 1): METRICS of each label and micro, of each resample, the rows really repeated."""
    out = []
    for column in counts.T.astype(int):
        index = np.repeat(np.arange(len(column)), column)
        y, p = targets[index], probs[index]
        out.append([[*metric(y, p, None), metric(y, p, "micro")] for metric in METRICS.values()])
    return np.array(out)


def torchmetrics_bootstrap(targets, probs, n_resamples):
    metric = BootStrapper(MultilabelAUROC(targets.shape[1]), n_resamples, sampling_strategy="multinomial")
    metric.update(torch.from_numpy(probs), torch.from_numpy(targets).long())
    return metric.compute()


def confidenceinterval_bootstrap(targets, probs, n_resamples):
    return bootstrap_ci(targets, probs, roc_auc_score, 0.95, n_resamples, "bootstrap_percentile")


def bootstrap(args) -> bool:
    targets, probs, patients = make_data(args.rows, args.patients)
    names = common.CT_RATE_LABELS
    counts = common.bootstrap_counts(patients, args.resamples, seed=0)
    arrays = common._metric_arrays(targets, probs, names, 0.5, counts)
    own = np.array([[arrays[f"{k}_{m}"] for k in (*names, "micro")] for m in METRICS])  # (3, 19, B)
    taken = {name: [] for name in ("bootstrap_intervals", "scikit-learn", "torchmetrics", "confidenceinterval")}
    differences, few = [], args.peer_resamples
    for i in range(args.rounds):
        given = targets, probs, names, 0.5, patients, args.resamples
        taken["bootstrap_intervals"].append(timed(common.bootstrap_intervals, *given)[1:])
        some = np.arange(i * few, (i + 1) * few) % args.resamples
        found, *seconds = timed(sklearn_loop, targets, probs, counts[:, some])
        differences.append(np.nanmax(abs(found - np.moveaxis(own[..., some], -1, 0))))
        taken["scikit-learn"].append(seconds)
        taken["torchmetrics"].append(timed(torchmetrics_bootstrap, targets, probs, few)[1:])
        taken["confidenceinterval"].append(timed(confidenceinterval_bootstrap, targets, probs, few)[1:])
    print(f"\nBootstrap: {args.rows} rows, {len(names)} labels, {args.resamples} resamples, median of {args.rounds}")
    what = {"bootstrap_intervals": f"{len(arrays)} metrics, by patient", "scikit-learn": "57 metrics, by patient",
            "torchmetrics": "macro AUROC, by row", "confidenceinterval": "macro AUROC, by row"}  # fmt: skip
    middle, ratios = {}, {}
    for name, rounds in taken.items():
        middle[name] = np.median(rounds, axis=0) * (1 if name == "bootstrap_intervals" else args.resamples / few)
        ratio, ratios[name] = middle[name] / middle["bootstrap_intervals"]
        times = "" if name == "bootstrap_intervals" else f"{ratio:.1f} x, in CPU seconds {ratios[name]:.1f} x; "
        line(name, *middle[name], times + what[name])

    macro = np.mean([arrays[f"{k}_auroc"][0] for k in names])
    index = np.repeat(np.arange(args.rows), counts[:, 0].astype(int))
    same = torch.from_numpy(probs[index]), torch.from_numpy(targets[index]).long()
    print(f"largest difference from scikit-learn {max(differences):.1e} (required: 1e-12)")
    print(f"from torchmetrics, one resample's macro AUROC {abs(float(MultilabelAUROC(18)(*same)) - macro):.1e}")
    value = confidenceinterval_bootstrap(targets, probs, 2)[0]
    plain = common.multilabel_metrics(targets, probs, names)["macro_auroc"]
    print(f"from confidenceinterval, its value of all rows {abs(value - plain):.1e}")
    targets[:, 0] = 0  # a finding that nobody has
    plain = common.multilabel_metrics(targets, probs, names)
    wrong = float(MultilabelAUROC(18)(torch.from_numpy(probs), torch.from_numpy(targets).long()))
    print(
        f"macro AUROC with one label that has no positive case: {plain['macro_auroc']:.4f}, over the "
        f"{plain['n_defined_auroc']:.0f} where it is defined; torchmetrics {wrong:.4f}, as it counts that label as 0; "
        f"scikit-learn {roc_auc_score(targets, probs)}"
    )
    return ratios["scikit-learn"] >= 30 and max(differences) <= 1e-12


# ==== All numbers, and the page ================================================================================


def score(args) -> bool:
    targets, probs, patients = make_data(args.rows, args.patients)
    names, ids = common.CT_RATE_LABELS, [f"case{i}" for i in range(args.rows)]
    taken = {}

    def watched(name):
        function = getattr(evaluate, name)

        def call(*given):
            result, *taken[name] = timed(function, *given)
            return result

        setattr(evaluate, name, call)

    watched("score")
    watched("write_report")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        table = pd.DataFrame(targets.astype(int), columns=names).assign(id=ids, patient_id=patients)
        table.to_csv(folder / "labels.csv", index=False)
        columns = [f"{name}_prob" for name in names]
        pd.DataFrame(probs, columns=columns).assign(id=ids).to_csv(folder / "preds.csv", index=False)
        words = ["--predictions", folder / "preds.csv", "--labels", folder / "labels.csv", "--output", folder]
        words = [*map(str, words), "--n-bootstrap", str(args.resamples)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code, *whole = timed(evaluate.main, words)
        size = (folder / "report.html").stat().st_size / 1e6
    print(f"\nevaluate.py of two CSV files: {args.rows} rows of {args.patients} patients, {args.resamples} resamples")
    line("all numbers", *taken["score"])
    line("the page", *taken["write_report"], f"{size:.1f} MB")
    line("with reading and writing", *whole)
    return code == 0


# ==== DeLong ===================================================================================================


def direct_delong(y, p):
    """AUROC and its variance from all pairs of a positive and a negative (DeLong 1988), in memory O(m n)."""
    a, b = p[y == 1, None], p[y == 0]
    share = (a > b) + 0.5 * (a == b)
    variance = share.mean(1).var(ddof=1) / len(a) + share.mean(0).var(ddof=1) / len(b)
    return share.mean(), variance


def sklearn_bootstrap(y, p, n_resamples):
    rng, n = np.random.default_rng(0), len(y)
    return np.var([roc_auc_score(y[i], p[i]) for i in rng.integers(n, size=(n_resamples, n))])


def delong(args) -> bool:
    targets, probs, patients = make_data(args.rows, args.patients)
    found, *own = timed(lambda: [clinical.delong(y, p[:, None]) for y, p in zip(targets.T, probs.T, strict=True)])
    _, *clustered = timed(
        lambda: [clinical.delong(y, p[:, None], patients) for y, p in zip(targets.T, probs.T, strict=True)]
    )
    direct, *slow = timed(lambda: [direct_delong(y, p) for y, p in zip(targets.T, probs.T, strict=True)])
    few = args.peer_resamples
    seconds = np.array(timed(sklearn_bootstrap, targets[:, -1], probs[:, -1], few)[1:]) * 18 * args.resamples / few
    gaps = [abs(auc[0] - a) + abs(cov[0, 0] / v - 1) for (auc, cov), (a, v) in zip(found, direct, strict=True)]
    print(f"\nDeLong: 18 labels of {args.rows} rows")
    line("clinical.delong", *own, f"largest difference from the direct one {max(gaps):.1e} (required: 1e-10)")
    line("clinical.delong, clustered by patient", *clustered)
    line("direct, all pairs", *slow, f"{slow[1] / own[1]:.0f} x")
    line(f"scikit-learn, {args.resamples} resamples by row", *seconds, f"{seconds[1] / own[1]:.0f} x")
    return max(gaps) <= 1e-10


# ==== Memory of retrieval ======================================================================================


def whole_matrix(images, texts):
    """The usual way: all scores, sorted; the place of each query's own."""
    order = np.argsort(-(images @ texts.T), axis=1)
    return (order == np.arange(len(images))[:, None]).argmax(1) + 1


def one_memory(name: str, n: int, n_resamples: int) -> None:
    """Print seconds, CPU seconds and MB beyond the features' of one call, to be run in a process of its own."""
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((2, n, 512), np.float32)
    texts += 0.15 * images
    for x in (images, texts):
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    words, groups, levels = [f"report {i % (n - n // 20)}" for i in range(n)], [f"p{i // 2}" for i in range(n)], None
    ids, labels = [f"case{i:06d}" for i in range(n)], (rng.random((n, 18)) < 0.2) * 1.0
    if name == "volume_retrieval":
        given = {"ids": ids, "groups": groups, "texts": words, "targets": labels}
        cases = types.SimpleNamespace(**given, image_features=images, text_features=texts)
        call = lambda: retrieval.volume_retrieval(cases, n_resamples, 0)  # noqa: E731
    elif name == "pair_retrieval":
        levels, classes = ("patient", "left", "right"), list(np.array([*"abcd"])[rng.integers(0, 4, n)])
        out = {"ids": ids, "groups": groups, "texts": words, "text_ids": ids, "pairs": np.arange(n)[:, None] + [0, 0],
               "image_features": dict.fromkeys(levels, images), "text_features": dict.fromkeys(levels, texts),
               "classes": dict.fromkeys(levels, classes)}  # fmt: skip
        call = lambda: retrieval.pair_retrieval(out, ids, n_resamples, 0)  # noqa: E731
    else:
        call = lambda: {"retrieval_ranks": common.retrieval_ranks, "whole": whole_matrix}[name](images, texts)  # noqa: E731
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    _, seconds, cpu = timed(call)
    print(seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before)


def memory(args) -> bool:
    large, good = args.gallery, True
    print(f"\nRetrieval: {large} x {large}, 512 features, float32; MB beyond the features'")
    for name, n, what in (
        ("retrieval_ranks", large, "one direction"),
        ("volume_retrieval", large, "train_ctclip.py: all directions, with intervals"),
        ("pair_retrieval", large, "train_retclip.py: 2 directions of 3 heads, by report and class, with intervals"),
        ("retrieval_ranks", large * 2 // 5, "one direction"),
        ("whole", large * 2 // 5, "whole matrix and argsort"),
    ):
        command = [sys.executable, __file__, "--memory-of", name, "--gallery", n, "--resamples", args.resamples]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        seconds, cpu, mb = map(float, done.stdout.split())
        line(f"{name} at {n}", seconds, cpu, f"{mb:6.0f} MB  {what}")
        good &= name == "whole" or mb <= LIMIT_MB
    print(f"required: {LIMIT_MB} MB")
    return good


PARTS = {"bootstrap": bootstrap, "score": score, "delong": delong, "memory": memory}


def main():
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--rows", type=int, default=3039, help="cases")
    parser.add_argument("--patients", type=int, default=1304, help="patients of these cases")
    parser.add_argument("--resamples", type=int, default=1000, help="of the intervals")
    parser.add_argument("--rounds", type=int, default=5, help="times each side of the bootstrap has its turn")
    parser.add_argument("--peer-resamples", type=int, default=8, help="resamples of the other sides in each round")
    parser.add_argument("--gallery", type=int, default=10000, help="queries, and gallery, of the retrieval")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.memory_of:
        one_memory(args.memory_of, args.gallery, args.resamples)
        return 0
    good = [PARTS[part](args) for part in args.part]  # all of them, also after one that fails
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
