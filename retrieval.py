"""What evaluate.py adds for models of images and reports: retrieval, its gallery, files of features, the probe's eyes.

Chance is a random order of the gallery, with the very answers that count as right. Every number has _chance, _low and
_high: percentile bootstrap over the patients of the queries, while the gallery stays (none with --no-bootstrap).
Equal scores count as if in random order. `retrieval` of the results file, null = undefined:

train_ctclip.py (--retrieval): {report_to_volume, volume_to_report: {n, n_gallery, recall@K, median_rank},
    volume_to_volume: {n, n_gallery, map@K}}, K of 1, 5, 10, 50, 100 below n_gallery; null where there is no query.
    report_to_volume      gallery: every volume; right are those with word for word the query's report
    volume_to_report      gallery: every distinct report
    volume_to_volume      map@K: the mean label overlap of a query with its K nearest (common.overlap_at_k), which
                          CT-CLIP calls MAP@K; queries and gallery: volumes with a positive label; none of the query's
                          own patient
    as_published          {recall@K, map@K} counted as CT-CLIP's scripts do, to be compared with its paper: only the
                          report's own volume is right; every volume is a query and finds itself first; map@K is the
                          mean of the values for 1, 5, 10 and 50 up to K (the scripts keep one list)

train_retclip.py (always): {image_to_text, text_to_image: {patient, left, right: {
    n, n_gallery, distinct_texts, recall@K, mean_recall, median_rank,       # right: the same report
    class_n, class_n_gallery, class_recall@K, class_map,                    # right: the same class
    per_class: {class of the query: {all of the above but distinct_texts}}}}}
    K of 1, 5, 10 below the size of the gallery; mean_recall: of all three, else null; null for a head without features.
    Each number also has _fixed: the same order of the gallery for every query, what is right most often first. A model
    that does not look at the query can get that by luck (chance is the mean of it), and no interval over patients
    shows it: evidence is a number above both.
    the same report       the text is one of the image's, or word for word the same but for case and spaces
    the same class        of the image at that level (patient: of the pair; left, right: of the eye); a text has the
                          class of the images that have it, and none if they disagree; what has no class is neither
                          query nor gallery. class_map: mean over the queries of the average precision over all right
                          answers. Without two classes at least: class_n 0, class_map and per_class null
    image_to_text         gallery: every distinct text, for both. A duplicate has the features of its twin, so that all
                          its copies come as one block, and no random order of copies does: chance would be too low
    text_to_image         queries: every text, duplicates too (a frequent report weighs more); gallery: every image. A
                          text of several patients weighs the mean of their numbers in a resample
"""

import base64
import dataclasses
import functools
import io

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_array

from common import (
    UserError,
    average_precision,
    average_precision_chance,
    bootstrap_counts,
    hit_chance,
    overlap_at_k,
    recall_at_k,
    retrieval_ranks,
    same_words,
    write_atomic,
)
from page import number
from report import RETRIEVAL

LEVEL = 0.95  # of the intervals
KS = (1, 5, 10, 50, 100)  # of volumes
PAIR_KS = (1, 5, 10)  # of fundus pairs
SIDES = ("left", "right")
SHOWN, TOP = 6, 5  # queries of each direction in the gallery of the report, and answers to each
THUMBNAIL = 112  # pixels


# ==== Numbers ==================================================================================================


def with_spread(columns: dict, weights: np.ndarray | None) -> dict:
    """{metric: (values of the queries (n,), chance)} -> their means, medians of ranks, with _low, _high and _chance.

    weights: (n, B) of the queries in B resamples; None: no intervals. A third entry are the values of _fixed.
    """
    found = {}
    for metric, (values, chance, *fixed) in columns.items():
        middle = _median if metric == "median_rank" else lambda x, weights: x @ weights / weights.sum(0)
        found[metric] = middle(values, np.ones((len(values), 1)))[0]
        if weights is not None:
            spread = np.quantile(middle(values, weights), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            found[f"{metric}_low"], found[f"{metric}_high"] = spread
        found[f"{metric}_chance"] = chance
        found |= {f"{metric}_fixed": middle(x, np.ones((len(x), 1)))[0] for x in fixed}
    return found


def _median(values, weights) -> np.ndarray:
    """Median of values (n,), each as often as each column of weights (n, B) says, fractions too: (B,)."""
    order = np.argsort(values, kind="stable")
    values, upto = values[order], weights[order]
    np.cumsum(upto, axis=0, out=upto)
    low, high = upto[-1] / 2 * (1 - 1e-12), upto[-1] / 2 * (1 + 1e-12)  # sums of fractions are not exact
    return (values[(upto > low).argmax(0)] + values[(upto > high).argmax(0)]) / 2


def recall_columns(ranks: dict, n_gallery: int, ks) -> dict:
    """Columns for `with_spread`, of queries that have a right answer: recall@K, K below n_gallery, and median_rank."""
    rights, many = np.unique(ranks["right"], return_counts=True)
    by_chance = many / many.sum() @ hit_chance(rights[:, None], n_gallery, np.arange(1, n_gallery + 1))  # up to a rank
    ks = [k for k in ks if k < n_gallery]
    hits = recall_at_k(ranks, ks).T if ks else []
    columns = {f"recall@{k}": (column, by_chance[k - 1]) for k, column in zip(ks, hits, strict=True)}
    return columns | {"median_rank": (ranks["rank"], 1 + int(np.searchsorted(by_chance, 0.5)))}


# ---- volumes and reports


def volume_retrieval(cases, n_resamples: int, seed: int) -> dict:
    """The `retrieval` of a CT-CLIP's cases, to the last digit the same in any order of the cases."""
    read = np.isfinite(cases.image_features).all(1)
    order = np.array(sorted(np.flatnonzero(read), key=lambda i: cases.ids[i]), int)
    images, texts, labels = cases.image_features[order], cases.text_features[order], cases.targets[order]
    groups, words = np.array(cases.groups, object)[order], np.array([t.strip() for t in cases.texts], object)[order]
    told = (words != "") & np.isfinite(texts).all(1)
    ill = (labels == 1).any(1)

    def numbers(columns: dict, patients) -> dict:
        return with_spread(columns, bootstrap_counts(patients, n_resamples, seed) if n_resamples else None)

    def search(queries, gallery, wanted, held, patients) -> dict | None:
        if not len(queries):
            return None
        ranks, n = retrieval_ranks(queries, gallery, wanted, held), len(gallery)
        return {"n": len(queries), "n_gallery": n} | numbers(recall_columns(ranks, n, KS), patients)

    def nearest(rows) -> dict | None:
        if len(set(groups[rows])) < 2:  # nobody to find
            return None
        ks, patients, n = [k for k in KS if k < rows.sum()], groups[rows], int(rows.sum())
        pairs = images[rows], images[rows], labels[rows], labels[rows]
        values, chance = overlap_at_k(*pairs, ks, patients, patients)
        columns = {f"map@{k}": (column, chance.mean()) for k, column in zip(ks, values.T, strict=True)}
        return {"n": n, "n_gallery": n} | numbers(columns, patients)

    published = {}
    if told.any():
        ranks = retrieval_ranks(texts[told], images, np.flatnonzero(told), np.arange(len(images)))
        ks = [k for k in KS if k < len(images)]
        published = {f"recall@{k}": v for k, v in zip(ks, recall_at_k(ranks, ks).mean(0), strict=True)}
    ks = [k for k in KS[:-1] if k < ill.sum()]
    if ks:
        overlaps = overlap_at_k(images, images[ill], labels, labels[ill], ks)[0].mean(0)
        published |= {f"map@{k}": v for k, v in zip(ks, np.cumsum(overlaps) / np.arange(1, len(ks) + 1), strict=True)}
    distinct = np.flatnonzero(told & ~pd.Series(np.where(told, words, "")).duplicated())
    return {
        "report_to_volume": search(texts[told], images, words[told], words, groups[told]),
        "volume_to_report": search(images[told], texts[distinct], words[told], words[distinct], groups[told]),
        "volume_to_volume": nearest(ill),
        "as_published": published,
    }


# ---- pairs of eyes and their texts


@dataclasses.dataclass
class Right:
    """Which of a gallery (m) are right for which queries (n): those of the same key. Indexed by c rows: (c, m) bool.

    All of it at once would be 10 GB of 100 000 pairs.
    """

    queries: csr_array  # (n, C) bool: keys of the queries
    gallery: csr_array  # (C, m) bool: keys of the gallery; no two are common to a query and one of these

    def __getitem__(self, rows) -> np.ndarray:
        return (self.queries[rows] @ self.gallery).toarray()

    def share(self, rows: np.ndarray) -> np.ndarray:
        """(m,): for what share of these queries, bool (n,), each of the gallery is right."""
        return (self.queries[rows].sum(0) @ self.gallery) / rows.sum()


def keys(codes: np.ndarray, n_codes: int) -> csr_array:
    """(n, C) bool, sparse: one key each, codes (n,)."""
    return csr_array((np.ones(len(codes), bool), (np.arange(len(codes)), codes)), (len(codes), n_codes))


@dataclasses.dataclass
class Truth:
    """Who belongs to whom, in the order of the ids, so that the order of the data changes no digit."""

    images: np.ndarray  # (n,) rows of what `predict` returned
    texts: np.ndarray  # (m,) the same of texts; empty ones are left out
    codes: np.ndarray  # (m,) number of each text among the D distinct ones
    first: np.ndarray  # (D,) place in `texts` of the first of each
    holds: csr_array  # (n, D) bool: the image has that text, or one that is word for word the same
    pairs: np.ndarray  # (p, 2) place of an image, number of its text
    owners: list[set[str]]  # (m,) patients of the images of each text

    def text_classes(self, classes: np.ndarray) -> np.ndarray:
        """Class (D,) of each distinct text, of those of the images (n,); '' where they disagree, or none has one."""
        found = [set() for _ in self.first]
        for i, code in self.pairs:
            found[code].add(classes[i])
        return np.array([some.pop() if len(some) == 1 else "" for some in found], object)


def truth(out: dict, ids) -> Truth:
    """The truth about the images of some ids, and about the texts that are theirs, or nobody's."""
    ids, pairs = set(ids), np.asarray(out["pairs"]).reshape(-1, 2).tolist()
    images = sorted((i for i, name in enumerate(out["ids"]) if name in ids), key=lambda i: out["ids"][i])
    words, owners, paired = [same_words(text) for text in out["texts"]], [set() for _ in out["texts"]], set()
    for i, j in pairs:
        paired.add(j)
        owners[j] |= {out["groups"][i]} if out["ids"][i] in ids else set()
    texts = [j for j in range(len(words)) if words[j] and (owners[j] or j not in paired)]
    texts = sorted(texts, key=lambda j: (str(out["text_ids"][j]), words[j]))
    row, place = ({name: i for i, name in enumerate(names)} for names in (images, texts))
    pairs = np.array([(row[i], place[j]) for i, j in pairs if i in row and j in place], int).reshape(-1, 2)
    words, owners = [words[j] for j in texts], [owners[j] for j in texts]
    codes = pd.factorize(np.array(words, object))[0]
    first = np.unique(codes, return_index=True)[1]
    pairs[:, 1] = codes[pairs[:, 1]]
    holds = csr_array((np.ones(len(pairs), bool), pairs.T), (len(images), len(first)))
    return Truth(np.array(images, int), np.array(texts, int), codes, first, holds, pairs, owners)


def pair_retrieval(out: dict, ids, n_resamples: int, seed: int) -> dict:
    """The `retrieval` of a RET-CLIP's predictions `out`, of the images of these ids, in any order of the data."""
    t, found = truth(out, ids), {"image_to_text": {}, "text_to_image": {}}
    patients = [{out["groups"][i]} for i in t.images]
    for level in out["image_features"]:
        images, texts = out["image_features"][level][t.images], out["text_features"][level][t.texts]
        classes = np.array(out["classes"][level], object)[t.images]
        of_texts = t.text_classes(classes)
        read, told = np.isfinite(images).all(1), np.isfinite(texts).all(1)
        first = t.first[told[t.first]]
        codes, asked, holds = t.codes[first], keys(t.codes[told], len(t.first)), t.holds[read]
        directions = {  # rows of the queries, of the gallery, ...
            "image_to_text": (
                (images, read),
                (texts, first),
                Right(holds, keys(codes, len(t.first)).T),
                classes[read],
                of_texts[codes],
                patients,
            ),
            "text_to_image": (
                (texts, told),
                (images, read),
                Right(asked, holds.T),
                of_texts[t.codes[told]],
                classes[read],
                t.owners,
            ),
        }
        for name, ((asking, rows), (held, others), *some, owners) in directions.items():
            owners = [owners[i] for i in np.flatnonzero(rows)]
            row = search(asking[rows], held[others], *some, owners, n_resamples, seed)
            found[name][level] = row and row | {"distinct_texts": len(first)}
    return found


def search(queries, gallery, right, query_classes, gallery_classes, owners, n_resamples: int, seed: int) -> dict | None:
    """One direction at one level; None without a query. right: a Right; owners: the patients of each query (n,)."""
    if not len(queries) or not len(gallery):
        return None
    told, owned = gallery_classes != "", np.array([len(some) > 0 for some in owners])
    kinds = {"": (queries, gallery, right)}  # prefix of the metrics
    if len(set(gallery_classes[told])) > 1:
        codes, names = pd.factorize(np.append(gallery_classes[told], query_classes))  # '' has one that no answer has
        answers, asked = (keys(some, len(names)) for some in np.split(codes, [told.sum()]))
        kinds["class_"] = queries, gallery[told], Right(asked, answers.T)
    ranks = {}
    for prefix, (asking, held, hits) in kinds.items():
        model, often = retrieval_ranks(asking, held, right=hits), hits.share(owned)[:, None]  # as the fixed scores
        alike = query_classes if prefix else np.arange(len(asking))  # to them all queries of a class are the same
        _, first, back = np.unique(alike, return_index=True, return_inverse=True)
        once = Right(hits.queries[first], hits.gallery)
        fixed = retrieval_ranks(np.ones((len(first), 1)), often, right=once)
        if prefix:
            model["map"] = average_precision(asking, held, right=hits)
            fixed["map"] = average_precision(np.ones((len(first), 1)), often, right=once)
        ranks[prefix] = model, {k: v[back] for k, v in fixed.items()}

    def numbers(rows) -> dict:
        found = {"n": 0, "n_gallery": len(gallery), "mean_recall": None}
        found |= {"class_n": 0, "class_n_gallery": int(told.sum()), "class_map": None}
        for prefix, (model, fixed) in ranks.items():
            asked, n_gallery = np.flatnonzero(rows & owned & (model["right"] > 0)), found[f"{prefix}n_gallery"]
            if not len(asked):
                continue
            model, fixed = ({k: v[asked] for k, v in some.items()} for some in (model, fixed))
            columns, others = (recall_columns(some, n_gallery, PAIR_KS) for some in (model, fixed))
            columns = {k: (*column, others[k][0]) for k, column in columns.items()}
            if prefix:
                del columns["median_rank"]
                columns["map"] = model["map"], average_precision_chance(model["right"], n_gallery).mean(), fixed["map"]
            elif len(columns) > len(PAIR_KS):  # all K, and the rank
                recalls = [columns[f"recall@{k}"] for k in PAIR_KS]
                columns["mean_recall"] = tuple(sum(x) / len(x) for x in zip(*recalls, strict=True))
            columns, patients = {prefix + name: column for name, column in columns.items()}, [owners[i] for i in asked]
            found |= {f"{prefix}n": len(asked)} | with_spread(columns, _resamples(patients, n_resamples, seed))
        return found

    whole = numbers(np.full(len(queries), True))
    names = sorted(set(query_classes) - {""}) if "class_" in ranks else None
    whole["per_class"] = None if names is None else {name: numbers(query_classes == name) for name in names}
    return whole if whole["n"] or whole["class_n"] else None


def _resamples(owners, n_resamples: int, seed: int) -> np.ndarray | None:
    """(n, B) weights of queries with these patients: the mean of how often its patients were drawn."""
    if not n_resamples:
        return None
    sizes, flat = np.array([len(some) for some in owners]), [name for some in owners for name in sorted(some)]
    names, inverse = np.unique(np.array(flat, object), return_inverse=True)
    counts = bootstrap_counts(names, n_resamples, seed)[inverse]
    counts = np.add.reduceat(counts, np.cumsum(sizes) - sizes)
    counts /= sizes[:, None]
    return counts


def retrieval_lines(found: dict, with_level: bool) -> list[str]:
    """The numbers of `retrieval` as lines of text; of pairs, recall of classes at 1 alone and no mean over K."""
    level = f" [{100 * LEVEL:.0f} %]" if with_level else ""
    rows = {title.lower(): found[key] for key, (title, *_) in RETRIEVAL.items() if key in found}
    for direction in ("image_to_text", "text_to_image"):
        heads = found.get(direction, {}).items()
        rows |= {f"{direction.replace('_', ' ')}, {head}": row for head, row in heads}
    width = max([17, *map(len, rows)])
    lines = [f"{'retrieval':<{width}}  {'queries':>7}  {'gallery':>7}  {'':<11}  {'found' + level:<22}  chance"]
    lines[0] += "  fixed order" * ("image_to_text" in found)
    for title, row in rows.items():
        row, counted = row or {}, None
        for name in [name.removesuffix("_chance") for name in row if name.endswith("_chance")]:
            if name in ("mean_recall", "class_recall@5", "class_recall@10"):
                continue
            digits, count = 1 if "rank" in name else 3, "class_" * name.startswith("class_")
            value = number(row[name], digits)
            if f"{name}_low" in row:
                value += f" [{number(row[f'{name}_low'], digits)}, {number(row[f'{name}_high'], digits)}]"
            said = name.replace("recall@", "R@").replace("map", "MAP").replace("_", " ")
            counts = " " * 16 if count == counted else f"{row[count + 'n']:>7}  {row[count + 'n_gallery']:>7}"
            chance = number(row[name + "_chance"], digits)
            if f"{name}_fixed" in row:
                chance = f"{chance:<6}  {number(row[name + '_fixed'], digits)}"
            lines.append(f"{title:<{width}}  {counts}  {said:<11}  {value:<22}  {chance}")
            title, counted = "", count
        lines += [f"{title:<{width}}  undefined"] if title else []
    return lines


# ==== Linear probe =============================================================================================


def eyes_of(names: list[str], *outs: dict) -> tuple:
    """Class names, and the cases of the linear probe from each of the outs of `predict` of train_retclip.py.

    Where all of them label eyes, a case is an eye, "<id>_left" or "<id>_right" ("<id>" if there is one a patient), with
    the raw output of the visual tower; an eye that is missing is no case. Else it is a pair, with both eyes' output
    side by side, and names are the classes of its targets. A label "one / other" is of both classes.
    """
    by_eye = all(any(any(some) for some in out["eye_labels"]) for out in outs)
    if by_eye:
        labels = [label for out in outs for some in out["eye_labels"] for label in some]
        names = sorted({name for label in labels for name in label.split(" / ")} - {""})
    if len(names) < 2:
        raise UserError("--linear-probe: the data have no two classes (labels.csv beside the images)")
    found = []
    for out in outs:
        eyes, places, x, targets = out["eye_features"], [], [], []  # (n, eyes, V)
        for i, e in np.ndindex(len(eyes), eyes.shape[1] if by_eye else 1):
            own = eyes[i, e] if by_eye else eyes[i].ravel()
            if not by_eye or np.isfinite(own).all() or i in out["failed"]:
                label = out["eye_labels"][i][e].split(" / ") if by_eye else []
                known = [float(name in label) if any(label) else np.nan for name in names]
                places.append((i, e)), x.append(own), targets.append(known if by_eye else out["targets"][i])
        ends = [f"_{side}" for side in SIDES] if by_eye and eyes.shape[1] == 2 else [""]
        found.append({
            "ids": [out["ids"][i] + ends[e] for i, e in places], "groups": [out["groups"][i] for i, _ in places],
            "targets": np.array(targets), "probs": np.full((len(x), len(names)), np.nan),
            "image_features": np.stack(x), "pair_rows": [i for i, _ in places],
            "failed": [k for k, (i, _) in enumerate(places) if i in out["failed"]],
        })  # fmt: skip
    return names, *found


# ==== Files and pictures =======================================================================================


def export_features(path, cases) -> None:
    """--export-features: npz of ids, patient_ids, class_names, image_features (n, E), text_features, targets (n, K).

    NaN where a case failed to load or has no report. Names are unicode arrays: it opens without pickle. Of
    train_retclip.py the patient's features (with --linear-probe what the probe reads), and no text_features.
    """
    arrays = {"ids": cases.ids, "patient_ids": cases.groups, "class_names": cases.class_names}
    arrays = {name: np.array(values, str) for name, values in arrays.items()} | {
        "image_features": np.asarray(cases.image_features, np.float32),
        "targets": np.asarray(cases.targets, np.float32),
    }
    if cases.text_features is not None:
        arrays["text_features"] = np.asarray(cases.text_features, np.float32)
    write_atomic(path, lambda file: np.savez_compressed(file, **arrays))


def write_features(folder, out: dict) -> None:
    """test_imgs_features.pt and test_texts_features.pt: dicts that torch.load reads with weights_only=True.

    Row i of every tensor, and entry i of every list, belongs to ids[i]. imgs: ids, patient_ids, classes {level: list},
    features {level: (n, E) float32, L2-normalised}, eyes (n, eyes, V) float32, the visual tower's own output; texts:
    ids, texts, features {level: (m, E)}, image_ids (m lists: the images of each). NaN: unreadable, or no such eye.
    """
    images_of = [[] for _ in out["texts"]]
    for i, j in out["pairs"]:
        images_of[j].append(out["ids"][i])

    def tensors(features):
        return {level: torch.from_numpy(np.array(values, np.float32)) for level, values in features.items()}

    images = {"ids": list(out["ids"]), "patient_ids": list(out["groups"]), "features": tensors(out["image_features"])}
    images |= {"eyes": torch.from_numpy(np.array(out["eye_features"], np.float32))}
    images |= {"classes": {level: list(names) for level, names in out["classes"].items()}}
    texts = {
        "ids": list(map(str, out["text_ids"])),
        "texts": list(out["texts"]),
        "features": tensors(out["text_features"]),
    }
    texts["image_ids"] = images_of
    for name, content in (("imgs", images), ("texts", texts)):
        write_atomic(folder / f"test_{name}_features.pt", lambda file, content=content: torch.save(content, file))


def gallery(out: dict, ids, pictures) -> list[dict]:
    """Queries of both directions and the best answers to each by the patient head, for `report.gallery_section`.

    The queries are every k-th by id, of the distinct texts and of the images that have one: not the best. pictures: row
    -> PIL images of its eyes. -> {kind: "text" or "image", query, answers, gallery: its size, rank: of the first with
    the same report}; query and answers: {id, text, class, pictures: [JPEG data URI or None]}, an answer also score
    (cosine) and mark: "report" (the same), "class" (the same), "other" (another class), "wrong" (no class is known).
    """
    t, shown = truth(out, ids), []
    images, texts = out["image_features"]["patient"][t.images], out["text_features"]["patient"][t.texts]
    classes = np.array(out["classes"]["patient"], object)[t.images]
    of_texts, told = t.text_classes(classes), np.isfinite(texts).all(1)
    read, first = np.flatnonzero(np.isfinite(images).all(1)), t.first[told[t.first]]
    images, texts, right = images[read], texts[first], t.holds[read] @ keys(t.codes[first], len(t.first)).T
    drawn = functools.cache(lambda row: thumbnails(pictures, row))

    def image(k: int) -> dict:
        row = int(t.images[read[k]])
        return {"id": out["ids"][row], "text": "", "class": classes[read[k]], "pictures": drawn(row)}

    def text(k: int) -> dict:
        row, kind = t.texts[first[k]], of_texts[t.codes[first[k]]]
        return {"id": str(out["text_ids"][row]), "text": out["texts"][row], "class": kind, "pictures": []}

    sides = (("text", text, texts, image, images, right.T.tocsr()), ("image", image, images, text, texts, right))
    for kind, asker, queries, answerer, held, right in sides:
        asked = np.flatnonzero(right.sum(1))
        for q in asked[np.unique(np.linspace(0, max(len(asked) - 1, 0), SHOWN).astype(int))] if len(asked) else []:
            query, answers, scores = asker(q), [], held @ queries[q]
            for g in np.argsort(-scores, kind="stable")[:TOP]:  # equal scores: by id
                one = answerer(g)
                other = "class" if query["class"] == one["class"] else "other"
                mark = "report" if right[q, g] else other if query["class"] and one["class"] else "wrong"
                answers.append(one | {"score": float(scores[g]), "mark": mark})
            rank = float(retrieval_ranks(queries[q : q + 1], held, right=right[[q]].toarray())["rank"][0])
            shown.append({"kind": kind, "query": query, "answers": answers, "gallery": len(held), "rank": rank})
    return shown


def thumbnails(pictures, row: int) -> list[str | None]:
    """Data URIs of small JPEGs of one case; None where an eye is missing; [] where the case cannot be read."""
    found = []
    try:
        for picture in pictures(row):
            if picture is None:
                found.append(None)
                continue
            small, file = picture if picture.mode in ("RGB", "L") else picture.convert("RGB"), io.BytesIO()
            small.thumbnail((THUMBNAIL, THUMBNAIL))  # of a JPEG that is not decoded yet: at a fraction of its size
            small.convert("RGB").save(file, "JPEG", quality=82)
            found.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    except (UserError, OSError):
        return []
    return found
