"""The demo's model beside what brightness alone gives away, on the test phantoms.

    python benchmarks/bench_demo.py [--csv demo/ct/all_ct_wlabels.csv] [--predictions outputs/demo/eval/predictions.csv]

The peer is a logistic regression per label on the mean and standard deviation of each volume's HU, fitted on the
training rows. Prints both macro AUROCs. Required: the model at least 0.75, and at least 0.10 above the peer.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=Path("demo/ct/all_ct_wlabels.csv"), help="table of the phantoms")
    parser.add_argument(
        "--predictions", type=Path, default=Path("outputs/demo/eval/predictions.csv"), help="the model's"
    )
    args = parser.parse_args()
    table, names = common.read_table(args.csv), common.CT_RATE_LABELS
    volumes = [common.read_volume(path, **how).array for path, how in common.volume_sources(table, args.csv)]
    brightness = np.array([[v.mean(), v.std()] for v in volumes])  # (n, 2)
    labels = common.label_array(table, names, args.csv)
    train, test = ((table["split"] == s).to_numpy() for s in ("train", "test"))
    scaled = StandardScaler().fit(brightness[train]).transform(brightness)
    peer = np.stack(
        [LogisticRegression().fit(scaled[train], y[train]).predict_proba(scaled[test])[:, 1] for y in labels.T], 1
    )
    predictions = pd.read_csv(args.predictions).set_index("id").loc[table["series_id"][test]]
    probs = predictions[[f"{n}_prob" for n in names]].to_numpy()
    ours, theirs = (common.multilabel_metrics(labels[test], p, names)["macro_auroc"] for p in (probs, peer))
    print(f"{test.sum()} test phantoms: macro AUROC {ours:.3f}, mean and standard deviation alone {theirs:.3f}")
    return int(ours < 0.75 or ours < theirs + 0.10)


if __name__ == "__main__":
    sys.exit(main())
