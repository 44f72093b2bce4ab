"""Prepare fundus pictures and reports for RET-CLIP: CSV + images -> TSV and JSONL -> LMDB.

    python prepare_retclip.py --csv pairs.csv --image-dir DIR --split-column split --out data --lmdb lmdb
        A row is a patient: id, left and right picture (paths in DIR; default: the CSV's folder), text, and, if it has
        them, patient_id, label, left and right label. Columns are found by their names, or named by flags. A row with
        one picture shows it to both eyes, unless --missing-eye mask or --monocular.
    python prepare_retclip.py --train-csv retclip_prompts_full.csv --test-csv retclip_prompts_test.csv \
            --dataset OWNER/NAME --out data --lmdb lmdb --resume
        A row is `dataset_index`, `label`, `prompt`; the index, in any order, counts the rows of a data set's split of
        the same name (--dataset-split: of another one): of a folder of parquet files (needs pyarrow), or of an id of
        the Hugging Face hub, which is streamed (needs datasets; HF_TOKEN of the environment; tested with a stand-in
        and with local files, never run against the hub itself). With --image-dir instead, the picture is
        DIR/{dataset_index}.jpg (or .png, ...).

Written to --out, for each split: {split}_imgs.tsv (`id<TAB>left<TAB>right`, or `id<TAB>image` with --monocular;
url-safe base64 of the file as it is, an empty field for a masked eye), {split}_texts.jsonl ({"text_id": row number,
"text": ..., "image_ids": [id]}), {split}_labels.csv (image_id[, patient_id, label, left_label, right_label]),
{split}_left_out.csv (rows without text, duplicates, bad pictures) and {split}_source.json (what all this was made of).
Written to --lmdb: {split}/imgs, {split}/pairs as the original RET-CLIP (Chinese-CLIP with --monocular) reads them,
{split}/labels.csv, {split}/source.json.
A stopped or killed run continues with --resume, which also leaves alone what is finished; --force starts from nothing.
Exit codes: 0 done, 2 bad input, 3 done, but rows were left out for bad pictures, 143 stopped by a signal.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import json
import mmap
import os
import pickle
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

import lmdb
import pandas as pd
from PIL import Image
from tqdm import tqdm

import common
from common import UserError

COLUMNS = {  # names a column may have, lower-case with _ for other signs; the first that is there is taken
    "id": ["dataset_index", "patient_id", "image_id", "id"],
    "text": ["prompt", "text", "report", "caption", "findings", "prompt_patient"],
    "left": ["left_image", "left", "left_fundus"],
    "right": ["right_image", "right", "right_fundus"],
    "image": ["image", "image_path", "path", "file_name"],
    "label": ["label", "diagnosis", "class"],
    "left_label": ["left_diagnosis", "left_label", "left_diagnostic_keywords", "left_keywords"],
    "right_label": ["right_diagnosis", "right_label", "right_diagnostic_keywords", "right_keywords"],
    "patient": ["patient_id", "patient"],
}
LABELS = {"patient_id": "patient", "label": "label", "left_label": "left_label", "right_label": "right_label"}
NO_TEXT = {"", "nan", "null", "none"}
FORMATS = ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF"]  # what is read
KEPT = ["JPEG", "MPO", "PNG"]  # what goes into the TSV as it is (MPO: some cameras' JPEG)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
MAX_PIXELS, MAX_BYTES = Image.MAX_IMAGE_PIXELS, 2**28  # of one picture: 89 million, 256 MiB
SYNC_EVERY = 2**25  # bytes of TSV or LMDB between two commits


# ==== Arguments ================================================================================================


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("data").add_argument
    add("--csv", type=Path, help="one CSV for all splits")
    add("--split-column", help="column of --csv with the split of a row (without it, all are split train)")
    add("--train-csv", type=Path, help="CSV of split train, instead of --csv")
    add("--val-csv", type=Path, help="CSV of split val")
    add("--test-csv", type=Path, help="CSV of split test")
    add("--image-dir", type=Path, help="folder that paths are relative to and may not leave (default: the CSV's)")
    add("--dataset", help="folder or file of parquet, or hub id OWNER/NAME, whose rows the ids count")
    add("--dataset-split", help="split of --dataset that all ids count (default: the split of that name; train for "
        "--csv)")  # fmt: skip
    add("--dataset-image-column", help="column of --dataset with the pictures (default: image, or the only one)")
    for role, names in COLUMNS.items():
        add(f"--{role.replace('_', '-')}-column", help=f"column of the {role.replace('_', ' ')} (default: the first "
            f"there is of {', '.join(names)})")  # fmt: skip
    add = parser.add_argument_group("pictures").add_argument
    add("--monocular", action="store_true", help="one picture a row, in the form of Chinese-CLIP")
    add("--missing-eye", choices=["same", "mask"], default="same", help="a row with one picture: show it to both "
        "eyes, or leave the other one empty (a picture of no known side counts as left)")  # fmt: skip
    add("--max-side", type=int, default=0, help="longer side in pixels above which a picture is made smaller and "
        "encoded again; 0 keeps every file as it is")  # fmt: skip
    add("--on-bad-sample", choices=["fail", "skip"], default="fail", help="a picture that is missing or unreadable: "
        "end the run, or leave its rows out and list them")  # fmt: skip
    add = parser.add_argument_group("hub").add_argument
    add("--delay", type=float, default=0.0, help="seconds to wait between two pictures taken from the hub")
    add("--retries", type=int, default=6, help="attempts after a failure of the hub, after 1, 2, 4 ... seconds")
    add = parser.add_argument_group("output").add_argument
    add("--out", "--output-dir", type=Path, required=True, help="folder for TSV, JSONL and labels")
    add("--lmdb", type=Path, help="folder for the LMDB of each split (without it, only TSV and JSONL are written)")
    add("--resume", action="store_true", help="continue an interrupted run; what is finished stays")
    add("--force", action="store_true", help="remove what is there of these splits and start from nothing")
    add("--config", nargs="+", help="YAML or INI files with defaults for these flags")
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    args = common.parse_with_config(build_parser(), argv)
    given = {"train": args.train_csv, "val": args.val_csv, "test": args.test_csv}
    args.csvs = {split: path for split, path in given.items() if path}
    for wrong, message in (
        (bool(args.csv) == bool(args.csvs), "either --csv, or --train-csv, --val-csv, --test-csv must be given"),
        (args.split_column and not args.csv, "--split-column belongs to --csv (the others are splits themselves)"),
        (args.dataset and args.image_dir, "--dataset and --image-dir: the pictures come from one of them"),
        (args.resume and args.force, "--resume and --force: continue, or start from nothing"),
        (args.monocular and args.missing_eye == "mask", "--missing-eye mask: --monocular knows no other eye"),
        (min(args.max_side, args.delay, args.retries) < 0, "--max-side, --delay, --retries must not be negative"),
        (args.image_dir and not args.image_dir.is_dir(), f"{args.image_dir}: no such folder (--image-dir)"),
    ):
        if wrong:
            raise UserError(message)
    return args


# ==== Tables ===================================================================================================


def find_columns(table: pd.DataFrame, csv: Path, args) -> dict[str, str | None]:
    """Role (a key of COLUMNS) -> the column of the table, None if there is none."""
    named = {re.sub(r"\W", "_", str(c).strip().lower()): c for c in reversed(table.columns)}
    there = f"it has {', '.join(map(str, table.columns[:20]))}"
    found = {}
    for role, names in COLUMNS.items():
        flag = getattr(args, f"{role}_column")
        if flag and flag not in table.columns:
            raise UserError(f"{csv}: no column '{flag}' ({there}; --{role.replace('_', '-')}-column)")
        found[role] = flag or next((named[n] for n in names if n in named), None)
    texts = found["text"] or (found["left_label"] and found["right_label"])
    for role, is_there in (("id", found["id"]), ("text", texts)):
        if not is_there:
            raise UserError(f"{csv}: no column for the {role} ({there}; --{role}-column names it)")
    return found


def typed_ids(words: list[str], csv: Path) -> list:
    """int if all are, else str; empty ones, and those that a TSV or a spreadsheet would change, raise UserError."""
    for k, word in enumerate(words):
        if not word or re.search(r"[\t\r\n\0]", word) or common.safe_cell(word) != word or len(word.encode()) > 500:
            raise UserError(f"{csv}: row {k + 2}: '{word[:40]}' is no id (give each row one without tabs)")
    if all(re.fullmatch(r"(0|-?[1-9]\d{0,8})(\.0)?", word) for word in words):
        return [int(float(word)) for word in words]
    return words


def read_rows(csv: Path, split: str | None, args) -> list[dict]:
    """Rows of a CSV as dicts: row (spreadsheet), split, id, text and, if it has them, cells (left, right), LABELS."""
    table = common.read_table(csv)
    columns = find_columns(table, csv, args)
    cells = {role: table[c].str.strip().tolist() for role, c in columns.items() if c}
    if split is None and args.split_column:
        common.need_columns(table, [args.split_column], csv)
        splits = table[args.split_column].str.strip().tolist()
    else:
        splits = [split or "train"] * len(table)
        if split is None and "split" in table:
            print(f"warning: {csv}: its column 'split' is not used (--split-column split)", file=sys.stderr)
    for k, name in enumerate(splits):
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name):
            raise UserError(f"{csv}: row {k + 2}: split '{name}' is no file name (letters, digits, - and _)")
    if "text" not in cells:
        print(f"{csv}: no text column, texts are made of {columns['left_label']} and {columns['right_label']}")
        both = zip(cells["left_label"], cells["right_label"], strict=True)
        cells["text"] = [f"Both eyes: {a}." if a == b else f"Left eye: {a}. Right eye: {b}." for a, b in both]
    rows = []
    for k, name in enumerate(typed_ids(cells["id"], csv)):
        row = {"row": k + 2, "split": splits[k], "id": name, "text": cells["text"][k]}
        row |= {key: cells[role][k] for key, role in LABELS.items() if role in cells}
        left, right, image = (cells[role][k] if role in cells else "" for role in ("left", "right", "image"))
        if cells.keys() & {"left", "right", "image"}:
            row["cells"] = (left, right) if left or right else (image, "")
        if "label" not in row and {"left_label", "right_label"} <= row.keys():
            a, b = row["left_label"], row["right_label"]
            row["label"] = " / ".join(dict.fromkeys(filter(None, (a, b))))
        if args.dataset and (not isinstance(name, int) or name < 0):
            raise UserError(f"{csv}: row {k + 2}: '{name}' is no row number of --dataset (--id-column names the index)")
        rows.append(row)
    return rows


def read_splits(args) -> list[dict]:
    """[{name, csv, part (of --dataset), rows (with a text, no duplicates), left_out}]; leaking raises UserError."""
    splits, where = {}, {}
    for given, csv in [(None, args.csv)] if args.csv else args.csvs.items():
        part = dataset_part(args, args.dataset_split or given or "train") if args.dataset else None
        for row in read_rows(csv, given, args):
            split = {"name": row["split"], "csv": csv, "part": part, "rows": [], "left_out": []}
            split = splits.setdefault(row["split"], split)
            patient = row.get("patient_id") or row["id"]
            key = patient if row.get("patient_id") else (str(part), patient)  # ids of two parts are two pictures
            other, place = where.setdefault(key, (row["split"], f"row {row['row']} of {csv}"))
            if other != row["split"]:
                raise UserError(
                    f"{csv}: row {row['row']}: patient {patient} is in split {row['split']} and, {place}, in {other} "
                    "(a patient belongs in one split)"
                )
            split["rows"].append(row)
    for split in splits.values():
        rows, seen = split["rows"], {}
        split["rows"] = []
        for row in rows:
            first = seen.setdefault((row["id"], row["text"]), row)
            if row["text"].lower() in NO_TEXT:
                split["left_out"].append(row | {"reason": "no text"})
            elif first is not row:
                split["left_out"].append(row | {"reason": f"same id and text as row {first['row']}"})
            else:
                split["rows"].append(row)
    return list(splits.values())


# ==== Pictures =================================================================================================


def find_pictures(split: dict, args) -> int:
    """split["pictures"]: id -> paths, one for each field of the TSV, None for an empty one; rows with one picture."""
    folder = args.image_dir or split["csv"].parent
    base, names, first, single = folder.resolve(), None, {}, 0
    for row in split["rows"]:
        where, cells = f"{split['csv']}: row {row['row']}", row.get("cells")
        if cells is None:
            names = files_by_stem(folder) if names is None else names
            same = names.get(str(row["id"]), [f"{row['id']}.jpg"])
            if len(same) > 1:
                raise UserError(f"{where}: {folder} has {same[0]} and {same[1]} (keep one)")
            cells = (same[0], "")
        paths = [folder / cell if cell else None for cell in cells]
        given = list(filter(None, paths))
        for path in given:
            if not Path(os.path.realpath(path)).is_relative_to(base):
                raise UserError(f"{where}: {path} leads out of {folder} (--image-dir)")
        if args.monocular and len(set(given)) > 1:
            raise UserError(f"{where}: a left and a right picture, but --monocular (one picture a row)")
        single += len(given) == 1
        if args.monocular or not given:
            paths = given[:1]
        elif args.missing_eye == "same":
            paths = [path or given[0] for path in paths]
        known, number = first.setdefault(row["id"], (paths, row["row"]))
        if known != paths:
            raise UserError(f"{where}: id {row['id']} has other pictures than row {number} (--id-column)")
        split["pictures"][row["id"]] = paths
    return single


def files_by_stem(folder: Path) -> dict[str, list[str]]:
    """Name without suffix -> the pictures of that name in a folder; 0007.jpg is also 7."""
    names = {}
    for stem, suffix in sorted(os.path.splitext(entry.name) for entry in os.scandir(folder)):
        if suffix.lower() in SUFFIXES:
            names.setdefault(str(int(stem)) if re.fullmatch("[0-9]+", stem) else stem, []).append(stem + suffix)
    return names


def picture_problem(picture: Path | bytes) -> str:
    """Why a file is no picture to train on, judged by its header and its end; '' if nothing is wrong."""
    if isinstance(picture, Path) and os.path.exists(picture) and not os.path.isfile(picture):
        return "not a regular file"
    try:
        file = picture.open("rb") if isinstance(picture, Path) else io.BytesIO(picture)
        with warnings.catch_warnings(), file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            size = file.seek(0, os.SEEK_END)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS or size > MAX_BYTES:
                    return f"{image.width} x {image.height} pixels in {size} bytes are too many"
                image.verify()
            ends = (max(0, size - 2**16), size // 2) if image.format in KEPT[:2] else ()  # verify() skips JPEG
            if ends and not any(file.seek(start) >= 0 and b"\xff\xd9" in file.read() for start in ends):
                return "the file is cut short"
    except FileNotFoundError:
        return "no such file"
    except Exception as e:  # plugins raise what they like at damaged files
        return f"no readable image ({type(e).__name__})"
    return ""


def encode(picture: Path | bytes, max_side: int) -> bytes:
    """The field of the TSV: url-safe base64 of the file as it is, or of a JPEG or 16-bit PNG made of it."""
    data = picture.read_bytes() if isinstance(picture, Path) else picture
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.format not in KEPT or 0 < max_side < max(image.size):
            if max_side:
                image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
            buffer, deep = io.BytesIO(), image.mode.startswith("I")
            image = image if deep else image.convert("L" if image.mode in ("1", "L") else "RGB")
            image.save(buffer, **({"format": "PNG"} if deep else {"format": "JPEG", "quality": 95}))
            data = buffer.getvalue()
    return base64.urlsafe_b64encode(data)


def pictures_of(splits: list[dict], have: dict[str, set[str]], args):
    """(split, id, picture of each field) of those ids that are not in have[split]; [] for a null picture.

    A picture is a path or bytes, None for an empty field. From a folder they come in the order of the CSV; from a data
    set in its own, and splits that count the rows of one part of it are filled in one pass.
    """
    if not args.dataset:
        yield from ((s, i, p) for s in splits for i, p in s["pictures"].items() if str(i) not in have[s["name"]])
        return
    for part in {str(s["part"]): s["part"] for s in splits}.values():
        same = [s for s in splits if s["part"] == part]
        wanted = {r["id"]: s for s in same for r in s["rows"] if str(r["id"]) not in have[s["name"]]}
        read = hub_pictures if isinstance(part, str) else parquet_pictures
        for name, data in read(part, wanted.keys(), args) if wanted else ():
            other = [] if args.monocular else [data if args.missing_eye == "same" else None]
            yield wanted[name], name, [data, *other] if data else []


def check_pictures(splits: list[dict], args) -> None:
    """Look at every picture before anything is written; those of the hub are looked at as they come."""
    splits = [s for s in splits if not isinstance(s["part"], str)]
    seen = {s["name"]: set() for s in splits}
    for split, name, pictures in tqdm(pictures_of(splits, seen, args), "check", disable=None):
        problem = first_problem(pictures)
        split["problems"] |= {name: problem} if problem else {}
        seen[split["name"]].add(name)
        if args.stop:
            raise KeyboardInterrupt
    for split in splits:
        drop_bad(split, seen[split["name"]], args)


def first_problem(pictures: list) -> str:
    """picture_problem() of the first that has one, with its path if it has one; '' if all are well."""
    for picture in dict.fromkeys(filter(None, pictures)):
        problem = picture_problem(picture)
        if problem:
            return f"{picture}: {problem}" if isinstance(picture, Path) else problem
    return "" if pictures else "no picture is given"


def drop_bad(split: dict, got: set, args) -> None:
    """Leave out the rows whose id is not in `got`, or raise UserError that names the first and split["problems"]."""
    bad = [r | {"reason": split["problems"].get(r["id"], "there is no such row in the data set")}
           for r in split["rows"] if r["id"] not in got or r["id"] in split["problems"]]  # fmt: skip
    if bad and args.on_bad_sample == "fail":
        names = "; ".join(f"row {r['row']} (id {r['id']}): {r['reason']}" for r in bad[:3])
        raise UserError(
            f"{split['csv']}: unequal numbers of images and texts: {names} ({len(bad)} rows in all; put them right, or "
            "--on-bad-sample skip leaves them out)"
        )
    gone = {r["id"] for r in bad}
    split["rows"] = [r for r in split["rows"] if r["id"] not in gone]
    split["pictures"] = {k: v for k, v in split["pictures"].items() if k not in gone}
    split["left_out"] += bad
    split["bad"] += len(bad)
    if not split["rows"]:
        raise UserError(f"{split['csv']}: no row of split {split['name']} is left")


# ==== Pictures of a data set ===================================================================================


def dataset_part(args, split: str) -> list[Path] | str:
    """Files of a split of a local --dataset, in order; of a hub id, the split's name there."""
    root = Path(args.dataset)
    words = {"val": "(val|valid|validation)", "validation": "(val|valid|validation)"}.get(split, re.escape(split))
    if not root.exists():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", args.dataset):
            raise UserError(f"{args.dataset}: no such folder, and no hub id OWNER/NAME (--dataset)")
        return "validation" if split == "val" else split
    files = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
    places = [(f, *f.relative_to(root).parts) for f in files]
    own = [f for f, *parts in places if any(re.match(rf"{words}([-_.]|$)", part) for part in parts)]
    named = any(re.match(r"(train|val|valid|validation|test)([-_.]|$)", part) for _, *parts in places for part in parts)
    if not files or (named and not own):
        names = ", ".join("/".join(parts) for _, *parts in places[:4])
        raise UserError(f"{root}: no parquet files of split {split} ({names or 'none at all'}; --dataset-split)")
    return own or files


def parquet_pictures(files: list[Path], wanted, args):
    """(row number, bytes or None) of the wanted rows, in order, from row groups that hold any."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise UserError("--dataset: parquet files are read with pyarrow (pip install pyarrow)") from e
    start = 0
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                fields = {f.name: f.type for f in file.schema_arrow}
                images = [n for n, t in fields.items() if pa.types.is_binary(t) or pa.types.is_large_binary(t)
                          or (pa.types.is_struct(t) and t.get_field_index("bytes") >= 0)]  # fmt: skip
                column = image_column(args, list(fields), images)
                for group in range(file.num_row_groups):
                    stop = start + file.metadata.row_group(group).num_rows
                    if not wanted.isdisjoint(range(start, stop)):
                        for batch in file.iter_batches(16, [group], [column], use_threads=False):
                            for k, value in enumerate(batch.column(0), start):
                                if k in wanted:
                                    value = value.as_py()
                                    yield k, value["bytes"] if isinstance(value, dict) else value
                            start += batch.num_rows
                    start = stop
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path}: not a readable parquet file ({first_line(e)})") from e


def image_column(args, names: list[str], images: list[str]) -> str:
    column = args.dataset_image_column or ("image" if "image" in names else images[0] if len(images) == 1 else None)
    if column is None or column not in names:
        raise UserError(f"{args.dataset}: no column of pictures ({', '.join(names)}; --dataset-image-column names it)")
    return column


def hub_pictures(split: str, wanted, args):
    """(row number, bytes or None) of the wanted rows of a streamed hub data set; a failure is tried again."""
    try:
        import datasets
        import fsspec
    except ImportError as e:
        raise UserError("--dataset: hub data sets are streamed with datasets (pip install datasets)") from e
    position, last, failures = min(wanted), max(wanted), 0
    while position <= last:
        try:
            try:
                token = os.environ.get("HF_TOKEN")
                stream = datasets.load_dataset(args.dataset, split=split, streaming=True, token=token)
            except (FileNotFoundError, ValueError) as e:  # no such data set, no such split
                raise UserError(f"{args.dataset}: {first_line(e)} (--dataset, --dataset-split, HF_TOKEN)") from e
            kinds = stream.features or {}
            images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
            column = image_column(args, list(kinds) or [args.dataset_image_column or "image"], images)
            stream = stream.select_columns([column]).cast_column(column, datasets.Image(decode=False))
            for value in stream.skip(position) if position else stream:
                failures = 0
                if position in wanted:
                    picture = value[column] or {}
                    data, path = picture.get("bytes"), picture.get("path") or ""
                    if data is None and path.rpartition("::")[2].startswith("hf://"):  # a folder of images on the hub
                        with fsspec.open(path, "rb") as file:
                            data = file.read()
                    yield position, data
                    time.sleep(args.delay)
                position += 1
                if position > last:
                    break
            return
        except UserError:
            raise
        except Exception as e:  # whatever the hub, the network or a decoder raises
            where = f"{args.dataset}: row {position}: {first_line(e)}"
            if failures == args.retries:
                raise UserError(f"{where} (after {failures} more attempts; --resume continues)") from e
            wait, failures = 2**failures, failures + 1
            tqdm.write(f"{where}; again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


# ==== TSV and JSONL ============================================================================================


def is_there(args, split: str) -> list[Path]:
    """Files of a split that a run would write."""
    names = [f"{split}_{end}" for end in ("imgs.tsv", "texts.jsonl", "labels.csv", "left_out.csv", "source.json")]
    return [p for p in [*(args.out / n for n in names), *([args.lmdb / split] if args.lmdb else [])] if p.exists()]


def source_of(split: dict, args) -> dict:
    """All that the files of a split depend on; equal ones mean that it need not be done again."""
    hub = isinstance(split["part"], str)
    files = {p for paths in split["pictures"].values() for p in paths if p}.union(() if hub else split["part"] or ())
    stats = [(str(p.name), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(files) if p.is_file()]
    source = {"the rows of the CSV": [split["rows"], split["left_out"]], "the pictures": stats}
    source = {k: hashlib.sha256(json.dumps(v).encode()).hexdigest() for k, v in source.items()}
    source |= {"--dataset": hub and args.dataset, "--dataset-split": hub and split["part"]}
    source |= {"--dataset-image-column": args.dataset_image_column, "--monocular": args.monocular}
    return source | {"--missing-eye": args.missing_eye, "--max-side": args.max_side}


def finished(split: dict, args) -> dict | None:
    """The state of a split that is finished, None if it is not; one that was made of anything else raises UserError."""
    path = args.out / f"{split['name']}_source.json"
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
        changed = [key for key, value in split["source"].items() if state["source"].get(key) != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: damaged (--force starts from nothing)") from e
    if changed:
        raise UserError(f"{path}: changed since: {', '.join(changed)} (undo that, or --force to start from nothing)")
    return state if state.get("bytes") == sizes_of(split, args) else None


def sizes_of(split: dict, args) -> list[int]:
    """Bytes of TSV, JSONL and labels, -1 for what is not there."""
    files = [args.out / f"{split['name']}_{end}" for end in ("imgs.tsv", "texts.jsonl", "labels.csv")]
    return [p.stat().st_size if p.exists() else -1 for p in files]


def scan_tsv(path: Path, fields: int) -> set[str]:
    """Ids of the whole lines of a TSV, as text; what a killed run left after them is cut off."""
    whole, ids, size = re.compile(rb"([^\t\n]+)" + rb"\t([A-Za-z0-9_=-]*)" * fields + rb"\n"), set(), 0
    if path.exists():
        with path.open("r+b") as file:
            for line in file:
                match = whole.fullmatch(line)
                if not match:
                    break
                ids.add(match[1].decode())
                size += len(line)
            file.truncate(size)
    return ids


def write_pictures(splits: list[dict], args) -> None:
    """Append to the TSV of each split what it does not hold yet; split["got"]: the ids, as text, that it then holds."""
    have, files, pending = {}, {}, 0
    total = sum(len({r["id"] for r in s["rows"]}) for s in splits)
    with contextlib.ExitStack() as stack:
        for split in splits:
            path = args.out / f"{split['name']}_imgs.tsv"
            have[split["name"]] = split["got"] = scan_tsv(path, 1 if args.monocular else 2)
            files[split["name"]] = stack.enter_context(path.open("ab"))
        bar = stack.enter_context(tqdm(total=total, initial=sum(map(len, have.values())), unit="picture", disable=None))
        for split, name, pictures in pictures_of(splits, have, args):
            problem = first_problem(pictures) if isinstance(split["part"], str) else ""  # others are checked before
            try:
                done = {} if problem else {p: encode(p, args.max_side) for p in set(filter(None, pictures))}
            except Exception as e:  # as in picture_problem()
                problem = f"no readable image ({type(e).__name__})"
            if problem:
                split["problems"][name] = problem
            else:
                line = b"\t".join([str(name).encode(), *(done.get(p, b"") for p in pictures)]) + b"\n"
                pending += files[split["name"]].write(line)
                split["got"].add(str(name))
            bar.update()
            if pending > SYNC_EVERY:
                pending = 0
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
            if args.stop:
                raise KeyboardInterrupt


def write_texts(split: dict, args) -> None:
    """{split}_texts.jsonl, {split}_labels.csv and {split}_left_out.csv, for the rows whose pictures are in the TSV."""
    rows, name = split["rows"], split["name"]
    lines = ({"text_id": r["row"] - 2, "text": r["text"], "image_ids": [r["id"]]} for r in rows)
    lines = ((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)
    common.write_atomic(args.out / f"{name}_texts.jsonl", lambda file: file.writelines(lines))
    columns = [c for c in LABELS if any(r.get(c) for r in rows)]
    labels, other = {}, []
    for row in rows:
        first = labels.setdefault(row["id"], row)
        other += [(first, row)] * any(first[c] != row[c] for c in columns)
    if other:
        print(f"warning: {split['csv']}: {len(other)} rows have other labels than an earlier row of the same id, which "
              f"counts (first: rows {other[0][0]['row']} and {other[0][1]['row']})", file=sys.stderr)  # fmt: skip
    table = pd.DataFrame([[i, *(r[c] for c in columns)] for i, r in labels.items()], columns=["image_id", *columns])
    common.write_csv(args.out / f"{name}_labels.csv", table)
    out = args.out / f"{name}_left_out.csv"
    out.unlink(missing_ok=True)
    if split["left_out"]:
        split["left_out"].sort(key=lambda r: r["row"])
        common.write_csv(out, pd.DataFrame(split["left_out"])[["row", "id", "reason", "text"]])
        print(f"{name}: {len(split['left_out'])} rows of {split['csv']} are left out, listed in {out}:")
        print(*(f"  row {r['row']} (id {r['id']}): {r['reason']}" for r in split["left_out"][:10]), sep="\n")


# ==== LMDB =====================================================================================================


def write_lmdb(folder: Path, items, count: bytes, size: int, args) -> int:
    """An LMDB of `items`, (key, value) bytes, and their number under `count`; `size`: no file will be larger."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=size, lock=False, sync=False) as env:
        n, pending, txn = 0, 0, env.begin(write=True)
        for key, value in items:
            txn.put(key, value)
            n, pending = n + 1, pending + len(value)
            if pending > SYNC_EVERY:
                txn.commit()
                pending, txn = 0, env.begin(write=True)
            if args.stop:
                raise KeyboardInterrupt
        txn.put(count, str(n).encode())
        txn.commit()
        env.sync(True)
    return n


def image_items(path: Path):
    """Key and value of each picture: RET-CLIP's pickled (left, right), or Chinese-CLIP's plain base64."""
    with path.open("rb") as file:
        for line in file:
            name, *fields = line.rstrip(b"\n").split(b"\t")
            pair = tuple(field.decode() for field in fields)
            yield name, fields[0] if len(fields) == 1 else pickle.dumps(pair, protocol=4)


def pair_items(path: Path):
    with path.open(encoding="utf-8", newline="\n") as file:
        n = 0
        for line in file:
            entry = json.loads(line)
            for image_id in entry["image_ids"]:
                yield str(n).encode(), pickle.dumps((image_id, entry["text_id"], entry["text"]), protocol=4)
                n += 1


def build_lmdb(name: str, state: dict, args) -> int:
    """{lmdb}/{split} of the finished TSV, JSONL and labels, built beside it and moved; its number of pairs."""
    final, temporary = args.lmdb / name, args.lmdb / f".{name}.tmp"
    data = [Path("imgs", "data.mdb"), Path("pairs", "data.mdb"), Path("labels.csv")]
    if final.exists():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            built = json.loads((final / "source.json").read_text())
            if built["made_from"] == state and built["bytes"] == [(final / p).stat().st_size for p in data]:
                print(f"{name}: {final} is there already")
                return built["pairs"]
        raise UserError(f"{final}: was not made of these files (--force builds it again, or choose another --lmdb)")
    tsv, jsonl = args.out / f"{name}_imgs.tsv", args.out / f"{name}_texts.jsonl"
    try:
        room = 2**26 + 3 * tsv.stat().st_size + 2 * mmap.PAGESIZE * state["images"]  # a value takes whole pages
        write_lmdb(temporary / "imgs", image_items(tsv), b"num_images", room, args)
        room = 2**26 + 3 * jsonl.stat().st_size + 2 * mmap.PAGESIZE * state["texts"]
        pairs = write_lmdb(temporary / "pairs", pair_items(jsonl), b"num_samples", room, args)
        shutil.copyfile(args.out / f"{name}_labels.csv", temporary / "labels.csv")
        record = {"made_from": state, "pairs": pairs, "bytes": [(temporary / p).stat().st_size for p in data]}
        common.write_atomic(temporary / "source.json", json.dumps(record, indent=1))
        os.replace(temporary, final)
        folder = os.open(args.lmdb, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, lmdb.Error) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{final}: could not be written: {e} (--resume continues)") from e
    return pairs


# ==== Main =====================================================================================================


def remove_old(splits: list[dict], args) -> None:
    """--force: delete the files of these splits, and their LMDB if there is nothing else in its folder."""
    old = [path for split in splits for path in is_there(args, split["name"])]
    for path in filter(Path.is_dir, old):
        strange = {p.name for p in path.iterdir()} - {"imgs", "pairs", "labels.csv", "source.json"}
        if strange:
            raise UserError(f"{path}: holds {sorted(strange)[0]}, which is no part of an LMDB (remove it)")
    for path in old:
        if path.is_dir():
            gone = path.with_name(f".{path.name}.old")
            os.replace(path, gone)
            shutil.rmtree(gone)
        else:
            path.unlink()


def prepare(splits: list[dict], args) -> int:
    """Everything that is written; the exit code."""
    for name in (split["name"] for split in splits):  # what a killed run left
        for path in args.out.glob(f".{name}_*.tmp*"):
            path.unlink()
        for end in ("tmp", "old") if args.lmdb else ():
            shutil.rmtree(args.lmdb / f".{name}.{end}", ignore_errors=True)
    if args.force:
        remove_old(splits, args)
    todo = []
    for split in splits:
        split["state"] = finished(split, args)
        if split["state"]:
            print(f"{split['name']}: {args.out / split['name']}_imgs.tsv and _texts.jsonl are there already")
        else:
            todo.append(split)
            common.write_atomic(args.out / f"{split['name']}_source.json", json.dumps({"source": split["source"]}))
    write_pictures(todo, args)
    for split in todo:
        drop_bad(split, {r["id"] for r in split["rows"] if str(r["id"]) in split["got"]}, args)
        write_texts(split, args)
        counts = {"images": len(split["got"]), "texts": len(split["rows"]), "bad": split["bad"]}
        split["state"] = {"source": split["source"], **counts, "bytes": sizes_of(split, args)}
        common.write_atomic(args.out / f"{split['name']}_source.json", json.dumps(split["state"], indent=1))
    for split in splits:
        name, state = split["name"], split["state"]
        pairs = build_lmdb(name, state, args) if args.lmdb else state["texts"]
        where = args.lmdb / name if args.lmdb else f"{args.out / name}_imgs.tsv"
        print(f"{name}: {state['images']} images, {state['texts']} texts, {pairs} pairs -> {where}")
    if args.lmdb:
        names = [s["name"] for s in splits]
        val = next((f" --val-data {args.lmdb / n}" for n in ("val", "valid", "validation", "test") if n in names), "")
        train = args.lmdb / ("train" if "train" in names else names[0])
        print(f"next: python train_retclip.py --train-data {train}{val} --vocab vocab.txt")
    else:
        print("next: the same command with --lmdb FOLDER --resume")
    return 3 if any(s["state"]["bad"] for s in splits) else 0


def main(argv=None) -> int:
    args = parse_args(argv)
    args.stop = common.StopSignal()
    try:
        splits = read_splits(args)
        for split in splits:
            split |= {"pictures": {}, "problems": {}, "bad": 0}
            single = len(split["rows"]) if args.dataset else find_pictures(split, args)
            if single and not args.monocular:
                how = "the other eye is left empty" if args.missing_eye == "mask" else "it is shown to both eyes"
                print(f"{split['name']}: {single} rows have one picture, {how}")
            split["source"] = source_of(split, args)
            there = is_there(args, split["name"])
            if there and not (args.force or (args.resume and (args.out / f"{split['name']}_source.json").exists())):
                how = "is not of an interrupted run" if args.resume else "is there already, --resume continues"
                raise UserError(f"{there[0]}: {how} (--force starts from nothing)")
        check_pictures([s for s in splits if args.force or not finished(s, args)], args)
        with contextlib.ExitStack() as stack:
            for folder in {f.resolve() for f in (args.out, args.lmdb) if f}:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(common.lock_folder(folder))
            return prepare(splits, args)
    except KeyboardInterrupt:
        print("stopped; --resume continues", file=sys.stderr)
        return 143
    except OSError as e:
        raise UserError(f"{e.filename or args.out}: {e.strerror or e} (--resume continues)") from e


if __name__ == "__main__":
    sys.exit(common.run_main(main))
