"""Prepare chest CT volumes: NIfTI or npz files -> what the training scripts read, and a check of a data set.

    python prepare_ct.py volumes --nifti-dir dataset/ --metadata metadata.csv --labels labels.csv --out npz/
        A folder of .nii.gz, .nii or .mha (the CT-RATE tree or flat) -> one .npz a volume (`image` (1, D, H, W) int16
        HU, `spacing`) and npz/all_ct_wlabels.csv, the CSV that finetune_siglip.py reads.
    python prepare_ct.py cache --csv npz/all_ct_wlabels.csv --out cache/ --num-slices 160 --image-size 224
        The volumes of a CSV -> one int16 .npy a volume, which is memory-mapped in training, and cache/volumes.csv, the
        same CSV pointing there. Without the two sizes the native grid is kept and sampled in training.
    python prepare_ct.py slices --data-dir ct_rate_data/ --output-dir ct_rate_2d/ --strategy multi_slice
        A folder of .nii.gz, .nii or .mha -> what run_task2.py reads: packed/{train,valid}.npy, one memory-mapped array
        of slices each, splits/{train,valid}_slices.csv, multi_abnormality_labels.csv, and slices/ with a .npy a slice.
    python prepare_ct.py ctclip --data-root dataset/train --reports train_reports.csv --metadata train_metadata.csv \
            --labels train_predicted_labels.csv --out cache/train
        A CT-RATE folder -> what train_ctclip.py reads: one .npy a volume, 240 x 480 x 480 voxels of 1.5 x 0.75 x 0.75
        mm toward superior, left, posterior, air outside, as int16 (whole HU: that rounding is all that differs from
        reading the scans in training; 110 MB each, memory-mapped), volumes.csv with texts and labels, and preview.png
        to look at. The CSV files may be paths, or names in the folders of the hub (dataset/radiology_text_reports/
        ...); not given, those that are there are taken.
    python prepare_ct.py check --csv npz/all_ct_wlabels.csv
        Labels per split, shapes, spacings, orientations, suspicious intercepts, missing files, patients in two splits.

Volumes are turned to increase toward superior, posterior, left (ctclip: superior, left, posterior), and the rescale
slope and intercept of `--metadata` (CSV with VolumeName, RescaleSlope, RescaleIntercept, and, if they are to replace
those of the files, XYSpacing and ZSpacing) are applied once. A killed run continues with the same command: volumes that
are finished and whose source and settings are the same are kept (progress.jsonl), and new ones are added. Paths in a
CSV are absolute or relative to its folder.
Exit codes: 0 done (`check`: perhaps with warnings), 2 bad input, 3 finished but volumes failed (bad_samples.csv), 143
stopped by a signal.
"""

import argparse
import contextlib
import fcntl
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import common
from common import UserError

SLICE_SPLITS = {"train": "train", "val": "valid", "test": "test"}  # as in the file names of Task 2
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
UNKNOWN = {"-1": "", "-1.0": "", "nan": "", "NaN": ""}  # other signs for an unknown label; we write an empty cell


# ==== Arguments ================================================================================================


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog="`prepare_ct.py COMMAND --help` lists the flags of a command."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("volumes", help="NIfTI files and a label CSV -> npz files and the training CSV")
    add = command.add_argument
    add("--nifti-dir", type=Path, required=True, help="folder searched for .nii.gz and .nii at any depth")
    add_labels(command)
    add("--compress", action=argparse.BooleanOptionalAction, default=True, help="deflate the npz files (half the size)")
    add_reading(command)
    add_output(command, "the npz files and all_ct_wlabels.csv")

    command = commands.add_parser("cache", help="volumes of a CSV -> memory-mapped int16 .npy files and their CSV")
    add = command.add_argument
    add("--csv", type=Path, required=True, help="CSV with series_id, split, img_path and labels")
    add("--num-slices", type=int, help="slices kept of a volume, evenly over its depth (with --image-size)")
    add("--image-size", type=int, help="height and width of a slice in pixels (with --num-slices)")
    add("--slice-spacing", type=float, help="mm between the kept slices, around the middle of the volume")
    add_reading(command)
    add_output(command, "the npy files and volumes.csv")

    command = commands.add_parser("slices", help="NIfTI files and a label CSV -> slices for run_task2.py")
    add = command.add_argument
    add("--data-dir", type=Path, required=True, help="folder searched for .nii.gz, .nii and .mha at any depth")
    add_labels(command)
    add("--strategy", choices=["multi_slice", "best_slice", "anatomical"], default="multi_slice", help="slices over "
        "the chest, denser in the middle; the one with most structure; at six levels")  # fmt: skip
    add("--slices-per-volume", type=int, default=12, help="slices of a volume with multi_slice")
    add("--splits", nargs="+", choices=list(SLICE_SPLITS.values()), default=["train", "valid"], help="what to extract")
    add("--image-size", type=int, default=224, help="height and width of a slice in pixels")
    add("--store", choices=["uint8", "hu"], default="uint8", help="grey levels of one window, or int16 HU, from which "
        "training makes any windows")  # fmt: skip
    add("--window", default="chest", help=f"{', '.join(common.WINDOWS)} or centre,width in HU, with --store uint8")
    add("--slice-files", action=argparse.BooleanOptionalAction, default=True, help="also one .npy a slice, as the "
        "original tool reads them (four times the space of the packed array)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace slices of other settings in the folder")
    add_reading(command)
    add_output(command, "the slices, their tables and labels")

    command = commands.add_parser("ctclip", help="a CT-RATE folder -> memory-mapped int16 volumes for train_ctclip.py")
    add = command.add_argument
    add("--data-root", type=Path, required=True, help="folder searched for .nii.gz, .nii and .mha at any depth")
    add("--reports", nargs="+", help="CSV files with VolumeName, Findings_EN, Impressions_EN (default: those found)")
    add("--metadata", nargs="+", help="CSV files with VolumeName, RescaleSlope, RescaleIntercept[, XYSpacing, "
        "ZSpacing] (default: those found)")  # fmt: skip
    add("--labels", nargs="+", help="CSV files with VolumeName and the labels: 0, 1, or empty for unknown "
        "(default: those found)")  # fmt: skip
    add("--label-columns", nargs="+", default=common.CT_RATE_LABELS, help="columns of --labels that are kept")
    add("--hu-source", choices=["auto", "csv", "header", "none"], default="auto", help="what makes HU of the values: "
        "slope and intercept of --metadata unless they are HU already (CT-RATE v2); those in any case (v1); only the "
        "file's own; nothing")  # fmt: skip
    add("--size", type=int, nargs=3, default=common.CTCLIP_SIZE, metavar=("D", "H", "W"), help="voxels along S, L, P: "
        f"{common.CTCLIP_SIZE}, or less by whole factors, which are averaged")  # fmt: skip
    add_running(command)
    add_output(command, "the npy files, volumes.csv and preview.png")

    command = commands.add_parser("check", help="look for what would spoil a training: labels, files, values, splits")
    add = command.add_argument
    add("--csv", type=Path, required=True, help="CSV with series_id, split, img_path and labels")
    add("--label-columns", nargs="+", help="label columns (default: those of CT-RATE that are there)")
    add("--read", action=argparse.BooleanOptionalAction, default=True, help="read every volume, not only the CSV")
    add_reading(command)
    for command in commands.choices.values():
        command.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    return parser.parse_args(argv)


def add_labels(command) -> None:
    add = command.add_argument
    add("--labels", type=Path, help="CSV with VolumeName and the labels: 0, 1, or empty for unknown")
    add("--unlabelled", choices=["error", "keep"], default="error", help="a volume that has no row in --labels: "
        "an error, or kept with all labels unknown")  # fmt: skip
    add("--label-columns", nargs="+", help="columns of --labels that are labels (default: those of CT-RATE)")
    add("--split-column", help="column of --labels or --metadata with train, val or test (default: split, if it is "
        "there; without it, names begin with train_ or valid_)")  # fmt: skip


def add_reading(command) -> None:
    add = command.add_argument
    add("--metadata", type=Path, help="CSV with VolumeName, RescaleSlope, RescaleIntercept[, XYSpacing, ZSpacing]")
    add("--layout", choices=["CDHW", "CHWD"], default="CDHW", help="axes of .npz and .npy files: depth first "
        "(S, P, L), or depth last (R, A, S) as the original SigLIP tool wrote them")  # fmt: skip
    add("--value-range", choices=["auto", "hu", "unit", "stored"], default="auto", help="what the values are: "
        "detect it, HU, 0-1 (HU = 2500 v - 1000), or scanner values that the metadata rescales")  # fmt: skip
    add_running(command)


def add_running(command) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add = command.add_argument
    add("--max-voxels", type=int, default=common.MAX_VOXELS, help="a file whose header claims more voxels is refused")
    add("--num-workers", type=int, default=cores, help="processes; 0 works in this one")


def add_output(command, what: str) -> None:
    command.add_argument("--out", "--output-dir", type=Path, required=True, help=f"folder for {what}")
    command.add_argument("--on-bad-sample", choices=["fail", "skip"], default="fail", help="a volume that cannot be "
        "read: end the run, or leave it out and list it in bad_samples.csv")  # fmt: skip


# ==== Tables ===================================================================================================


def csv_jobs(args) -> tuple[pd.DataFrame, list[dict]]:
    """The CSV of a training set as text, and one job, {id, source, options}, for each of its rows."""
    table = common.read_table(args.csv)
    common.need_columns(table, ["series_id", "split", "img_path"], args.csv)
    empty = table["series_id"].str.strip() == ""
    if empty.any():
        raise UserError(f"{args.csv}: row {empty.idxmax() + 2}: series_id is empty")
    sources = common.volume_sources(table, args.csv, args.metadata)
    jobs = [
        {"id": series_id, "source": str(path), "options": reading_options(args) | options}
        for series_id, (path, options) in zip(table["series_id"], sources, strict=True)
    ]
    return table, jobs


def reading_options(args) -> dict:
    return {"layout": args.layout, "value_range": args.value_range, "max_voxels": args.max_voxels}


def output_names(ids, suffix: str) -> list[str]:
    """A file name for each id; characters that could leave the folder or hide a file are replaced."""
    names = [re.sub(r"[^\w.-]|^\.", "_", i) + suffix for i in ids]
    twice = [n for n, count in Counter(names).items() if count > 1]
    if twice:
        same = [i for i, n in zip(ids, names, strict=True) if n == twice[0]]
        raise UserError(f"series_id {', '.join(same[:3])}: the same output file {twice[0]} (ids must differ)")
    return names


# ==== Running jobs =============================================================================================


@contextlib.contextmanager
def output_folder(folder: Path, table: str, read=()):
    """Create the folder, keep other runs out of it, and clear what a killed one left.

    Raises UserError if the table that will be written there is one of the files that are read.
    """
    for path in filter(None, read):
        if (folder / table).resolve() == Path(path).resolve():
            raise UserError(f"{path}: is read, and would be overwritten (choose another folder for the output)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as e:
        raise UserError(f"{folder}: {e.strerror}") from e
    with lock:
        for attempt in range(20):  # the workers of a killed run hold the lock until they notice
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as e:
                if attempt == 19:
                    raise UserError(f"{folder}: another run is writing here (choose another --out, or wait)") from e
                time.sleep(0.25)
        common.remove_stale([folder, *folder.glob("slices/*")])
        yield


def start_worker() -> None:
    """A worker leaves Ctrl-C to its parent, and ends when the parent is gone: a kill -9 leaves no orphans behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def attempt(work, job: dict):
    """The result of a job, or the UserError that it raised."""
    try:
        return work(job)
    except UserError as e:
        return e


def run_jobs(work, jobs: list[dict], args, done, on_bad_sample: str) -> list[tuple[dict, str]]:
    """Call `work(job)` for all jobs in worker processes, and `done(job, result)` here as each finishes.

    Returns (job, message) of those that failed. With "fail" the first failure, and always a signal, ends the run once
    the jobs under way are finished and noted: UserError or KeyboardInterrupt.
    """
    failed = []

    def receive(job, result) -> bool:
        if isinstance(result, UserError):
            failed.append((job, str(result)))
        else:
            done(job, result)
        bar.update()
        return not args.stop and not (failed and on_bad_sample == "fail")

    with tqdm(total=len(jobs), desc=args.command, unit="volume", disable=None) as bar:
        if args.num_workers == 0:
            all(receive(job, attempt(work, job)) for job in jobs)  # until the first that says stop
        elif jobs:
            pool = ProcessPoolExecutor(min(args.num_workers, len(jobs)), initializer=start_worker)
            try:
                futures = {pool.submit(attempt, work, job): job for job in jobs}
                for future in as_completed(futures):
                    if not future.cancelled() and not receive(futures[future], future.result()):
                        for other in futures:
                            other.cancel()
            except BrokenProcessPool as e:
                raise UserError("a worker was killed, perhaps out of memory (use fewer --num-workers)") from e
            finally:
                pool.shutdown(cancel_futures=True)
    if args.stop:
        raise KeyboardInterrupt
    if failed and on_bad_sample == "fail":
        raise UserError(failed[0][1])
    return failed


def job_key(job: dict) -> dict:
    """All that the output of a job depends on; equal keys mean that it need not be done again."""
    stat = os.stat(job["source"])
    places = {"source": os.path.abspath(job["source"]), "output": os.path.basename(job["output"])}
    options = {k: v for k, v in job["options"].items() if k != "max_voxels"}
    file = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    key = {**job, **places, **file, "options": options}
    key.pop("files", None)  # where else the output goes
    return json.loads(json.dumps(key))  # as it will be read back


def is_whole(path: Path, record: dict) -> bool:
    """Whether an output is still there, of the size that was written, and opens."""
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)  # the header of an .npy, the directory of an .npz
        return path.stat().st_size == record["output_bytes"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return False


def convert_all(args, jobs: list[dict], work, whole, keep=None) -> tuple[dict[str, dict], list[tuple[dict, str]]]:
    """Run `work` on the jobs that progress.jsonl does not show as done -> records by series_id, failures.

    whole(path, record): whether an output is still there; keep(job, record): what to do with a result in this process.
    """
    journal = args.out / "progress.jsonl"
    done, keys, records, waiting, failed = {}, {}, {}, [], []
    for line in journal.read_text().splitlines() if journal.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line of a killed run may be half
            entry = json.loads(line)
            done[entry["key"]["id"]] = entry
    for job in jobs:
        if not os.path.isfile(job["source"]):
            failed.append((job, f"{job['source']}: no such file"))
            continue
        if os.path.realpath(job["source"]) == os.path.realpath(job["output"]):
            raise UserError(f"{job['source']}: would be overwritten by its own copy (choose another --out)")
        keys[job["id"]], entry = job_key(job), done.get(job["id"])
        if entry and entry["key"] == keys[job["id"]] and whole(Path(job["output"]), entry["record"]):
            records[job["id"]] = entry["record"]
        else:
            waiting.append(job)
    if failed and args.on_bad_sample == "fail":
        raise UserError(f"{failed[0][1]} ({len(failed)} of {len(jobs)} volumes are missing)")
    if records:
        print(f"{len(records)} of {len(jobs)} volumes are there already", file=sys.stderr)

    with journal.open("a") as file:
        file.write("\n" if file.tell() else "")  # ends the half line of a killed run

        def write_down(job, record):
            records[job["id"]] = record = keep(job, record) if keep else record
            file.write(json.dumps({"key": keys[job["id"]], "record": record}) + "\n")
            file.flush()
            os.fsync(file.fileno())

        failed += run_jobs(work, waiting, args, write_down, args.on_bad_sample)
    for note, names in grouped_notes(records).items():
        if note.startswith("warning: "):
            print(f"{note} [{len(names)} volumes, first {names[0]}]", file=sys.stderr)
    return records, failed


def grouped_notes(records: dict[str, dict]) -> dict[str, list[str]]:
    """Note -> ids of the volumes that have it, the commonest first."""
    notes = {}
    for name, record in sorted(records.items()):
        for note in record["notes"]:
            notes.setdefault(note, []).append(name)
    return dict(sorted(notes.items(), key=lambda item: -len(item[1])))


def convert(job: dict) -> dict:
    """Read one volume, sample it if asked, write it as .npy or .npz -> its shape, spacing, notes and bytes."""
    volume = common.read_volume(job["source"], **job["options"])
    array, spacing, output = volume.array, volume.spacing, Path(job["output"])
    if "sample" in job:
        slices, size, slice_spacing = job["sample"]
        try:
            array = common.sample_volume(volume.array, spacing, slices, size, slice_spacing)
        except UserError as e:
            raise UserError(f"{job['source']}: {e}") from e
        if spacing:
            depth, side = volume.array.shape[0], max(volume.array.shape[1:])  # slices are padded to squares
            spacing = (slice_spacing or spacing[0] * depth / slices, spacing[1] * side / size, spacing[2] * side / size)
            spacing = tuple(round(s, 6) for s in spacing)
    if output.suffix == ".npy":
        common.write_atomic(output, lambda file: np.save(file, array, allow_pickle=False))
    else:
        arrays = {"image": array[None]} | ({"spacing": np.array(spacing, np.float32)} if spacing else {})
        common.write_atomic(output, lambda file: write_npz(file, arrays, job["compress"]))
    record = {"shape": list(array.shape), "spacing": spacing and list(spacing), "notes": list(volume.notes)}
    return record | {"output_bytes": output.stat().st_size}


def write_npz(file, arrays: dict, compress: bool) -> None:
    """np.savez with the fastest deflate: a quarter of the time of np.savez_compressed, files a few percent larger."""
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(name + ".npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def finish(args, failed: list[tuple[dict, str]], written: int) -> int:
    """List the failures, or remove the list of an earlier run; the exit code."""
    bad = args.out / "bad_samples.csv"
    if not failed:
        bad.unlink(missing_ok=True)
        return 0
    rows = [{"series_id": job["id"], "path": job["source"], "error": message} for job, message in failed]
    common.write_csv(bad, pd.DataFrame(rows))
    print(f"{len(failed)} volumes failed, {written} are written: see {bad}", file=sys.stderr)
    return 3


# ==== volumes ==================================================================================================


def split_of(name: str, row: dict, column: str | None) -> str:
    column = column or ("split" if row.get("split", "").strip() else None)
    word = row.get(column, "").strip().lower() if column else name.split("_")[0].lower()
    if word not in SPLITS:
        where = f"column '{column}' says '{word}'" if column else "its name does not begin with train_ or valid_"
        raise UserError(f"{name}: no split, {where} (--split-column names a column with train, val or test)")
    return SPLITS[word]


def read_labels(args, found: dict[str, Path], files: list[Path], columns) -> tuple[dict, dict]:
    """Rows of the label files and of --metadata by volume; every volume found has labels, or --unlabelled keeps it."""
    metadata, labels = common.rows_by_name(args.metadata, common.RESCALE_COLUMNS), {}
    for file in files:
        rows = common.rows_by_name(file, columns)
        common.label_array(pd.DataFrame(rows.values()), columns, file)
        labels |= rows
    if files:
        where, absent = ", ".join(map(str, files)), [name for name in found if name not in labels]
        if absent and args.unlabelled == "error":
            raise UserError(
                f"{where}: no row for {len(absent)} of {len(found)} volumes, first {', '.join(absent[:3])} "
                "(add them, or --unlabelled keep)"
            )
        print(f"{len(labels.keys() - found.keys())} rows of {where} have no volume here", file=sys.stderr)
    known = [c for rows in (labels, metadata) for row in list(rows.values())[:1] for c in row]
    if args.split_column and args.split_column not in known:
        raise UserError(f"--split-column {args.split_column}: no such column in --labels or --metadata")
    return labels, metadata


def run_volumes(args) -> int:
    found, columns = common.find_volumes(args.nifti_dir), args.label_columns or common.CT_RATE_LABELS
    labels, metadata = read_labels(args, found, [args.labels] if args.labels else [], columns)
    jobs, rows = [], []
    for (name, path), file in zip(found.items(), output_names(found, ".npz"), strict=True):
        options = reading_options(args)
        if args.metadata:
            options |= common.metadata_options(metadata, name, args.metadata)
        source, output = str(path), str(args.out / file)
        jobs.append({"id": name, "source": source, "output": output, "options": options, "compress": args.compress})
        row = metadata.get(name, {}) | labels.get(name, {})
        values = {c: row.get(c, "").strip() for c in columns}
        values = {c: UNKNOWN.get(v, v) for c, v in values.items()}
        values |= {c: row[c] for c in row if c == "patient_id"}
        rows.append({"series_id": name, "split": split_of(name, row, args.split_column), "img_path": file, **values})
    with output_folder(args.out, "all_ct_wlabels.csv", [args.labels, args.metadata]):
        records, failed = convert_all(args, jobs, convert, is_whole)
        table = pd.DataFrame(rows)
        common.write_csv(args.out / "all_ct_wlabels.csv", table[table["series_id"].isin(records.keys())])
        return finish(args, failed, len(records))


# ==== cache ====================================================================================================


def run_cache(args) -> int:
    if (args.num_slices is None) != (args.image_size is None) or (args.slice_spacing and args.num_slices is None):
        raise UserError("--num-slices and --image-size belong together, --slice-spacing needs both")
    if any(n is not None and n <= 0 for n in (args.num_slices, args.image_size, args.slice_spacing)):
        raise UserError("--num-slices, --image-size and --slice-spacing must be above 0")
    table, jobs = csv_jobs(args)
    files = output_names(table["series_id"], ".npy")
    for job, file in zip(jobs, files, strict=True):
        job["output"] = str(args.out / file)
        if args.num_slices:
            job["sample"] = [args.num_slices, args.image_size, args.slice_spacing]
    with output_folder(args.out, "volumes.csv", [args.csv, args.metadata]):
        records, failed = convert_all(args, jobs, convert, is_whole)
        table = table.assign(img_path=files).drop(columns=list(common.RESCALE_COLUMNS), errors="ignore")  # applied
        for axis, column in enumerate(common.SPACING_COLUMNS):
            table[column] = [(records.get(i, {}).get("spacing") or [""] * 3)[axis] for i in table["series_id"]]
        for column in set(common.CT_RATE_LABELS) & set(table.columns):
            table[column] = table[column].str.strip().replace(UNKNOWN)
        common.write_csv(args.out / "volumes.csv", table[table["series_id"].isin(records.keys())])
        return finish(args, failed, len(records))


# ==== slices ===================================================================================================


class Pack:
    """packed/{split}.npy: slices, appended a volume at a time by one process; which rows count says the journal.

    The header always tells the number of whole slices, so that np.load can map the file at any moment.
    """

    HEADER = 128  # bytes

    def __init__(self, path: Path, dtype: str, size: int):
        path.parent.mkdir(exist_ok=True)
        self.file, self.dtype, self.size = open(path, "r+b" if path.exists() else "w+b"), np.dtype(dtype), size
        self.row_bytes = size * size * self.dtype.itemsize
        self.n = max(0, self.file.seek(0, os.SEEK_END) - self.HEADER) // self.row_bytes
        self.file.truncate(self.HEADER + self.n * self.row_bytes)  # half a slice of a killed run

    def append(self, slices: np.ndarray) -> int:
        """Write (S, size, size) behind the others -> its first row."""
        first, self.n = self.n, self.n + len(slices)
        self.file.seek(self.HEADER + first * self.row_bytes)
        self.file.write(np.ascontiguousarray(slices, self.dtype).tobytes())
        shape = (self.n, self.size, self.size)
        text = repr({"descr": self.dtype.str, "fortran_order": False, "shape": shape})
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + (self.HEADER - 10).to_bytes(2, "little"))
        self.file.write(text.ljust(self.HEADER - 11).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        return first


def slice_name(volume: str, index: int) -> str:
    return f"{volume}_slice_{index:03d}"


def extract(job: dict) -> dict:
    """Read a volume, choose and store its slices -> their indices and pixels, and the volume's shape and notes."""
    volume, s = common.read_volume(job["source"], **job["options"]), job["settings"]
    index = common.pick_slices(volume.array, s["strategy"], s["slices_per_volume"])
    pixels = common.stored_slices(volume.array, index, s["image_size"], s["store"], s["window"])
    for i, image in zip(index, pixels, strict=True) if job["files"] else ():
        path = Path(job["files"]) / f"{slice_name(Path(job['source']).name, i)}.npy"
        temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.save(file, image if s["store"] == "hu" else image.astype(np.float32) / 255, allow_pickle=False)
            os.replace(temporary, path)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise UserError(f"{path}: could not be written: {e.strerror} (--no-slice-files needs a fifth)") from e
    return {"index": index, "pixels": pixels, "shape": list(volume.array.shape), "notes": list(volume.notes)}


def run_slices(args) -> int:
    if args.slices_per_volume < 1 or args.image_size < 8:
        raise UserError("--slices-per-volume must be at least 1 and --image-size at least 8")
    found = common.find_volumes(args.data_dir)
    hub = args.data_dir / "multi_abnormality_labels"
    files = [args.data_dir / "multi_abnormality_labels.csv", *sorted(hub.glob("*_predicted_labels.csv"))]
    files = [args.labels] if args.labels else [f for f in files if f.exists()]
    if not files and args.unlabelled == "error":
        raise UserError(f"{args.data_dir}: no multi_abnormality_labels.csv in it (--labels, or --unlabelled keep)")
    there = common.read_table(files[0]).columns if files else []
    there = [c for c in there if c not in ("VolumeName", "split", "patient_id", args.split_column)]
    columns = args.label_columns or [c for c in common.CT_RATE_LABELS if c in there] or there
    others = [c for c in there if c not in columns]
    if others:
        print(f"{files[0]}: not taken as labels: {', '.join(others)} (--label-columns)", file=sys.stderr)
    labels, metadata = read_labels(args, found, files, columns)
    rows = {name: metadata.get(name, {}) | labels.get(name, {}) for name in found}
    splits = {name: SLICE_SPLITS[split_of(name, row, args.split_column)] for name, row in rows.items()}
    patients = {name: rows[name].get("patient_id", "").strip() or common.group_of(name) for name in found}
    seen = {}
    for name, split in splits.items():
        if seen.setdefault(patients[name], split) != split:
            raise UserError(f"{name}: patient {patients[name]} is in {split} and in {seen[patients[name]]} (leaks)")
    chosen = [name for name in found if splits[name] in args.splits]
    if not chosen:
        raise UserError(f"{args.data_dir}: none of {len(found)} volumes is in {' or '.join(args.splits)} (--splits)")
    settings = {"strategy": args.strategy, "slices_per_volume": args.slices_per_volume, "image_size": args.image_size}
    settings |= {"store": args.store, "window": list(common.parse_windows([args.window])[0])}
    jobs = []
    for name in chosen:
        options = reading_options(args)
        if args.metadata:
            options |= common.metadata_options(metadata, name, args.metadata)
        folder = str(args.out / "slices" / splits[name]) if args.slice_files else None
        output = str(args.out / "packed" / f"{splits[name]}.npy")
        jobs.append({"id": name, "source": str(found[name]), "output": output, "options": options, "files": folder})
        jobs[-1]["settings"] = settings
    with output_folder(args.out, "multi_abnormality_labels.csv", files):
        begin_slices(args, settings)
        packs = {}

        def whole(path: Path, record: dict) -> bool:
            rows = record["row"] + len(record["index"])
            end = Pack.HEADER + rows * settings["image_size"] ** 2 * record["item_bytes"]
            files = [args.out / "slices" / path.stem / f for f in record["files"] if args.slice_files]
            return path.exists() and path.stat().st_size >= end and all(f.is_file() and f.stat().st_size for f in files)

        def keep(job: dict, record: dict) -> dict:
            pixels, path = record.pop("pixels"), Path(job["output"])
            if path not in packs:
                packs[path] = Pack(path, pixels.dtype.str, args.image_size)
            names = [f"{slice_name(Path(job['source']).name, i)}.npy" for i in record["index"]]
            try:
                row = packs[path].append(pixels)
            except OSError as e:
                raise UserError(f"{path}: could not be written: {e.strerror} (the same command goes on)") from e
            return record | {"row": row, "item_bytes": pixels.dtype.itemsize, "files": names}

        records, failed = convert_all(args, jobs, extract, whole, keep)
        for pack in packs.values():
            pack.file.close()
        tables = slice_tables(args, records, found, splits, patients, labels, columns)
        summary = {split: {"volumes": int(t["volume_name"].nunique()), "slices": len(t)} for split, t in tables.items()}
        note = {"settings": settings, "splits": summary, "failed": [job["id"] for job, _ in failed]}
        common.write_atomic(args.out / "slice_extraction_stats.json", json.dumps(note, indent=1) + "\n")
        if tables:
            draw_slices(args.out, tables)
        print(", ".join(f"{split}: {s['slices']} slices of {s['volumes']} volumes" for split, s in summary.items()))
        return finish(args, failed, len(records))


def begin_slices(args, settings: dict) -> None:
    """Refuse to mix slices of two settings; note the settings, so that an interrupted run knows them."""
    notes = args.out / "slice_extraction_stats.json"
    before = json.loads(notes.read_text()).get("settings") if notes.exists() else settings
    if before != settings:
        if not args.overwrite:
            raise UserError(
                f"{args.out}: holds slices of other settings, {before} (another --output-dir, or --overwrite)"
            )
        (args.out / "progress.jsonl").unlink(missing_ok=True)
        for name in ("packed", "slices", "splits"):
            shutil.rmtree(args.out / name, ignore_errors=True)
    common.write_atomic(notes, json.dumps({"settings": settings}, indent=1) + "\n")
    for split in args.splits if args.slice_files else ():
        (args.out / "slices" / split).mkdir(parents=True, exist_ok=True)


def slice_tables(args, records, found, splits, patients, labels, columns) -> dict[str, pd.DataFrame]:
    """Write splits/{split}_slices.csv and multi_abnormality_labels.csv -> the former by split."""
    rows, of_volumes = {split: [] for split in args.splits}, []
    for name in sorted(found):  # labels of all volumes: another call may have extracted another split
        volume, split = found[name].name, splits[name]
        values = {c: labels.get(name, {}).get(c, "").strip() for c in columns}
        values = {c: UNKNOWN.get(v, v) for c, v in values.items()}
        of_volumes.append({"VolumeName": volume, **values, "split": split})
        record = records.get(name, {"index": []})
        for j, i in enumerate(record["index"]):
            rows[split].append({
                "slice_id": slice_name(volume, i), "volume_name": volume, "slice_index": i,
                "relative_position": round(i / max(1, record["shape"][0] - 1), 4),
                "file_path": f"slices/{split}/{slice_name(volume, i)}.npy", "slice_shape": str([args.image_size] * 2),
                "original_volume_shape": str(record["shape"]), "split": split, "patient_id": patients[name],
                "packed_row": record["row"] + j, **values,
            })  # fmt: skip
    (args.out / "splits").mkdir(exist_ok=True)
    tables = {split: pd.DataFrame(part) for split, part in rows.items() if part}
    for split, table in tables.items():
        common.write_csv(args.out / "splits" / f"{split}_slices.csv", table)
    if columns:
        common.write_csv(args.out / "multi_abnormality_labels.csv", pd.DataFrame(of_volumes))
    return tables


def draw_slices(out: Path, tables: dict[str, pd.DataFrame]) -> None:
    """sample_slices_visualization.png: up to six slices of up to four volumes, to look at."""
    split, table = next(iter(tables.items()))
    pack = np.load(out / "packed" / f"{split}.npy", mmap_mode="r", allow_pickle=False)
    volumes = list(table.groupby("volume_name", sort=False))[:4]
    figure = Figure((9, 1.7 * len(volumes)), layout="constrained")
    for axes, (name, part) in zip(figure.subplots(len(volumes), 6, squeeze=False), volumes, strict=True):
        shown = part.iloc[np.linspace(0, len(part) - 1, 6).astype(int)]
        for ax, (_, row) in zip(axes, shown.iterrows(), strict=True):
            ax.imshow(pack[row["packed_row"]], cmap="gray")
            ax.set_title(f"{common.volume_name(name)[:18]} {row['slice_index']}", fontsize=6)
        for ax in axes:
            ax.set_axis_off()
    figure.savefig(out / "sample_slices_visualization.png", dpi=110)


# ==== ctclip ===================================================================================================


def convert_ctclip(job: dict) -> dict:
    """Read one volume as CT-CLIP sees it and write it in whole HU -> its shape, notes and bytes."""
    array, notes = common.ctclip_volume(job["source"], job["size"], **job["options"])
    output, whole = Path(job["output"]), np.rint(array, out=array).astype(np.int16)
    common.write_atomic(output, lambda file: np.save(file, whole, allow_pickle=False))
    return {"shape": list(whole.shape), "notes": list(notes), "output_bytes": output.stat().st_size}


def run_ctclip(args) -> int:
    columns = list(args.label_columns)
    table, csv = common.ctclip_cases(
        args.data_root, args.reports, args.metadata, args.labels, columns, hu_source=args.hu_source
    )
    if not common.is_scan(Path(table["img_path"][0])):
        raise UserError(f"{csv}: a table of prepared volumes (--data-root takes the folder of the scans)")
    if any(n < 1 or whole % n for n, whole in zip(args.size, common.CTCLIP_SIZE, strict=True)):
        raise UserError(f"--size {args.size}: must divide {common.CTCLIP_SIZE} by whole numbers")
    files, jobs = output_names(table["series_id"], ".npy"), []
    for row, file in zip(table.to_dict("records"), files, strict=True):
        options = {"hu_source": args.hu_source, "max_voxels": args.max_voxels, **common.volume_options(row)}
        job = {"id": row["series_id"], "source": row["img_path"], "output": str(args.out / file), "options": options}
        jobs.append({**job, "size": list(args.size)})
    n, size = len(table), 2 * math.prod(args.size) * len(table) / 1e9
    silent = ((table["findings"] == "") & (table["impression"] == "")).sum()
    unlabelled = (table[columns] == "").all(axis=1).sum()
    print(f"{n} volumes, {size:.1f} GB; {silent} have no report, {unlabelled} no labels ({csv} ...)", file=sys.stderr)
    with output_folder(args.out, "volumes.csv"):
        records, failed = convert_all(args, jobs, convert_ctclip, is_whole)
        table = table.assign(img_path=files).drop(columns=[*common.RESCALE_COLUMNS, *common.SPACING_COLUMNS])  # applied
        table = table[table["series_id"].isin(records.keys())]
        common.write_csv(args.out / "volumes.csv", table)
        if len(table):
            draw_volumes(args.out, table)
        return finish(args, failed, len(records))


def draw_volumes(out: Path, table: pd.DataFrame) -> None:
    """preview.png: the middle axial, coronal and sagittal slice of up to four volumes, with the patient's sides."""
    shown = table.iloc[np.unique(np.linspace(0, len(table) - 1, 4).astype(int))]
    figure = Figure((9, 3 * len(shown)), layout="constrained")
    for axes, row in zip(figure.subplots(len(shown), 3, squeeze=False), shown.itertuples(), strict=True):
        volume = np.load(out / row.img_path, mmap_mode="r", allow_pickle=False)  # (S, L, P)
        depth, side, front = (n // 2 for n in volume.shape)
        views = {"axial": volume[depth].T, "coronal": volume[::-1, :, front], "sagittal": volume[::-1, side]}
        z, x, y = (s * n for s, n in zip(common.CTCLIP_SPACING, common.CTCLIP_SIZE, strict=True))  # mm of an axis
        for ax, (view, image), (width, height) in zip(axes, views.items(), ((x, y), (x, z), (y, z)), strict=True):
            ax.imshow(image, cmap="gray", vmin=-1000, vmax=400, extent=(0, width, 0, height))
            ends = ("A", "P", "S", "I") if view == "sagittal" else ("R", "L", "A" if view == "axial" else "S", None)
            for text, at in zip(ends, ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02)), strict=True):
                where = {"ha": "left" if at[0] < 0.5 else "right" if at[0] > 0.5 else "center"}
                where["va"] = "bottom" if at[1] < 0.5 else "top" if at[1] > 0.5 else "center"
                ax.text(*at, text or "", transform=ax.transAxes, color="yellow", backgroundcolor="black", **where)
            ax.set_title(f"{row.series_id} {view}", fontsize=8)
            ax.set_axis_off()
    figure.savefig(out / "preview.png", dpi=110)


# ==== check ====================================================================================================


def inspect(job: dict) -> dict:
    volume = common.read_volume(job["source"], **job["options"])
    return {"shape": list(volume.array.shape), "spacing": volume.spacing, "notes": list(volume.notes)}


def label_report(table: pd.DataFrame, columns: list[str], path: Path) -> tuple[list[str], list[str]]:
    """Lines of the table positives / negatives / unknowns per split, and warnings."""
    values, splits = common.label_array(table, columns, path), sorted(set(table["split"]))
    width = max(map(len, columns))
    lines, cells, warnings = [" " * width], {c: f"{c:{width}}" for c in columns}, []
    for split in splits:
        lines[0] += f"{split + ' (1 / 0 / ?)':>24}"
        part = values[(table["split"] == split).to_numpy()]
        counts = [(part == 1).sum(0), (part == 0).sum(0), np.isnan(part).sum(0)]
        for column, numbers in zip(columns, zip(*counts, strict=True), strict=True):
            cells[column] += f"{' / '.join(map(str, numbers)):>24}"
        for word, count in (("positive", counts[0]), ("negative", counts[1])):
            none = [c for c, n in zip(columns, count, strict=True) if n == 0]
            if none:
                warnings.append(f"{split}: no {word} for {len(none)} labels, so no AUROC: {', '.join(none[:3])} ...")
    return lines + list(cells.values()), warnings


def table_problems(table: pd.DataFrame, jobs: list[dict], path: Path) -> tuple[list[str], list[str]]:
    """What is wrong with the rows themselves -> errors, warnings."""
    errors, warnings = [], []
    for name, part in table.groupby("series_id"):
        if len(part) > 1:
            errors.append(f"{path}: series_id {name} stands in rows {', '.join(str(i + 2) for i in part.index)}")
    for name, part in table.groupby("img_path"):
        if part["series_id"].nunique() > 1:
            warnings.append(f"{name} is the volume of {', '.join(part['series_id'][:3])}")
    for split, part in table.groupby("split"):
        if split not in ("train", "val", "test"):
            errors.append(f"{path}: row {part.index[0] + 2}: split '{split}' is not known (train, val or test)")
    for split in ("train", "val"):
        if split not in set(table["split"]):
            warnings.append(f"no row with split {split}")
    errors += [f"{path}: {leak}" for leak in common.leaks(table)]
    gone = [job for job in jobs if not os.path.isfile(job["source"])]
    errors += [f"{job['source']}: no such file (volume {job['id']})" for job in gone]
    return errors, warnings


def run_check(args) -> int:
    table, jobs = csv_jobs(args)
    columns = args.label_columns or [c for c in common.CT_RATE_LABELS if c in table.columns]
    if not columns:
        raise UserError(f"{args.csv}: none of the 18 CT-RATE labels is a column (name yours with --label-columns)")
    errors, warnings = table_problems(table, jobs, args.csv)
    lines, label_warnings = label_report(table, columns, args.csv)
    patients = set(common.patients_of(table, "series_id"))
    print(f"{args.csv}: {len(table)} volumes of {len(patients)} patients", *lines, sep="\n")
    warnings += label_warnings
    if args.read:
        records = {}
        there = [job for job in jobs if os.path.isfile(job["source"])]

        def keep(job, record):
            records[job["id"]] = record

        failed = run_jobs(inspect, there, args, keep, "skip")
        errors += [message for _, message in failed]
        print(*volume_report(records), sep="\n")
        for note, names in grouped_notes(records).items():
            if note.startswith("warning: "):
                warnings.append(f"{note.removeprefix('warning: ')}: {len(names)} volumes, first {names[0]}")
        unknown = [name for name, r in records.items() if not r["spacing"]]
        if unknown:
            warnings.append(f"no spacing known: {len(unknown)} volumes, first {unknown[0]}")
    for text in warnings:
        print(f"warning: {text}")
    for text in errors:
        print(f"error: {text}", file=sys.stderr)
    print(f"{len(errors)} errors, {len(warnings)} warnings")
    return 2 if errors else 0


def volume_report(records: dict[str, dict]) -> list[str]:
    """Lines on the shapes, spacings and notes of the volumes."""
    if not records:
        return []
    shapes = Counter(" x ".join(map(str, r["shape"])) for r in records.values())
    lines = ["", "shapes D x H x W: " + ", ".join(f"{s} ({n})" for s, n in shapes.most_common(8))]
    if len(shapes) > 8:
        lines[-1] += f" and {len(shapes) - 8} others"
    spacings = np.array([r["spacing"] or [math.nan] * 3 for r in records.values()], float)
    for axis, name in enumerate("zyx"):
        known = spacings[~np.isnan(spacings[:, axis]), axis]
        if len(known):
            lines.append(f"spacing {name}: {known.min():g} to {known.max():g} mm, median {np.median(known):g}")
    notes = grouped_notes(records)
    return lines + [f"{note}: {len(names)} volumes" for note, names in notes.items() if not note.startswith("warning")]


# ==== Main =====================================================================================================


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.num_workers < 0 or args.max_voxels < 1:
        raise UserError("--num-workers must be 0 or more and --max-voxels above 0")
    args.stop = common.StopSignal()
    try:
        run = {"volumes": run_volumes, "cache": run_cache, "slices": run_slices, "ctclip": run_ctclip}
        run["check"] = run_check
        return run[args.command](args)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 143
    except OSError as e:  # a full disk, say
        raise UserError(f"{e.filename or args.out}: {e.strerror or e} (the same command continues)") from e


if __name__ == "__main__":
    sys.exit(common.run_main(main))
