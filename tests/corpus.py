"""The fuzz corpus: a small valid input of every reader of the project, what spoils it, and what may come of that.

`CASES` lists them. `outcome(case, folder)` makes the input in an empty folder, spoils it, reads it as the scripts do,
and returns "refused" (a UserError of one line that names the file), "warned" or "read". Anything else, another
exception, code that ran, a hang, memory beyond the limit, is an AssertionError. No tests in here: see test_fuzz.py.
"""

import base64
import contextlib
import csv
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import lmdb
import nibabel
import numpy as np
import pandas as pd
import safetensors.torch
import torch
from conftest import ZONES, write_fundus
from PIL import Image

import common
import evaluate
import finetune_siglip
import prepare_ct
import prepare_retclip
import report
import run_task2
import train_csi
import train_ctclip
import train_retclip
from cases import cases_of_checkpoint, cases_of_files, write_tables

SECONDS = int(os.environ.get("FUZZ_SECONDS", 60))  # that a case may take; a limit against hanging
MEMORY = 200  # MiB that a case may add to the memory of the process
MAX_VOXELS = 10**6  # cap that the volume readers get
REFUSED, READ, WARNED = {"refused"}, {"read"}, {"warned"}
ANY = {"refused", "read", "warned"}  # of a flipped byte: another valid input is as good as an error


class Case(NamedTuple):
    reader: str
    fault: str
    spoil: Callable  # (path of the file) changes it
    allowed: set
    says: str | tuple | None = None  # what the error may name in place of the file

    @property
    def name(self) -> str:
        return f"{self.reader}: {self.fault}"


class Reader(NamedTuple):
    make: Callable  # (folder) -> path of the file that is spoiled
    read: Callable  # (path)
    command: Callable | None = None  # (path) -> words of a command line that reads it


class Hang(BaseException):
    """Raised by the alarm; no `except Exception` holds it."""


# ==== Outcome ==================================================================================================


def outcome(case: Case, folder: Path) -> str:
    path, before = planted(case, folder), resident()
    said, hidden, kind, message = io.StringIO(), [], "read", ""
    signals = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def late(*_):
        raise Hang

    signals[signal.SIGALRM] = signal.signal(signal.SIGALRM, late)
    peak, limit = forget_peak(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(_status("VmSize") + 4000) * 2**20, limit[1]))  # for the machine's sake
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            with warnings.catch_warnings(record=True) as hidden:
                warnings.simplefilter("default")
                READERS[case.reader].read(path)
    except common.UserError as e:
        kind, message = "refused", str(e)
    except Hang:
        raise AssertionError(f"hangs for more than {SECONDS} s") from None
    except AssertionError:
        raise
    except BaseException as e:
        raise AssertionError(f"{type(e).__name__} in place of a UserError: {' '.join(str(e).split())[:300]}") from e
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        for number, handler in signals.items():
            signal.signal(number, handler)
        for _, env in train_retclip.OPEN.values():
            env.close()
        train_retclip.OPEN.clear()
        train_retclip.CHECKED.clear()
    grown = peak() - before
    assert grown < MEMORY, f"takes {grown:.0f} MiB of memory"
    assert not (folder / "owned").exists(), "ran code of the file"
    if kind == "refused":
        line = message.strip().splitlines()
        assert len(line) == 1 and len(message) < 3000, f"not one line: {message[:300]!r}"
        names = [path.name, *([case.says] if isinstance(case.says, str) else case.says or [])]
        assert any(n in message for n in names), f"does not name {' or '.join(names)}: {message}"
        assert len(message.split()) > 3 and not message.endswith(": "), f"says nothing: {message}"
        noise = [str(w.message) for w in hidden if not issubclass(w.category, (DeprecationWarning, ResourceWarning))]
        assert not noise, f"Python's warnings beside the error: {noise}"
    elif any(line.startswith("warning") for line in said.getvalue().splitlines()):
        kind = "warned"
    assert kind in case.allowed, f"{kind}, not {' or '.join(sorted(case.allowed))}: {message or said.getvalue()}"
    return kind


def planted(case: Case, folder: Path) -> Path:
    """The case's input in `folder`, spoiled; a valid one of each reader is made once, beside the folder."""
    sample = folder.parent / f"sample of {case.reader}"
    if not sample.exists():
        sample.mkdir(parents=True)
        (sample / ".target").write_text(str(READERS[case.reader].make(sample).relative_to(sample)))
    shutil.copytree(sample, folder, dirs_exist_ok=True)
    path = folder / (folder / ".target").read_text()
    case.spoil(path)
    return path


def resident() -> float:
    return _status("VmRSS")


def _status(key: str) -> float:
    """MiB of this process in /proc, 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 1024
    return 0.0


def forget_peak() -> Callable:
    """Begin to watch the highest memory -> function that tells it in MiB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return lambda: _status("VmHWM")


# ==== Faults of any file =======================================================================================


def as_bytes(change: Callable) -> Callable:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def flipped(seed: int, n: int = 4, low: float = 0.0, high: float = 1.0) -> Callable:
    """XOR n random bytes between two shares of the file."""

    def change(data: bytes) -> bytes:
        rng, data = random.Random(seed), bytearray(data)
        for _ in range(n):
            data[rng.randrange(int(low * len(data)), max(1, int(high * len(data))))] ^= 1 << rng.randrange(8)
        return bytes(data)

    return as_bytes(change)


def instead(make: Callable) -> Callable:
    """Something that is no file in place of the file."""

    def spoil(path: Path):
        path.unlink()
        make(path)

    return spoil


PAGE = b"<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head>\n<body>Sign in, please.</body></html>\n"
NOISE = random.Random(1).randbytes(5000)
BYTE_FAULTS = {
    "empty": as_bytes(lambda b: b""),
    "one byte": as_bytes(lambda b: b[:1]),
    "cut to 10 %": as_bytes(lambda b: b[: len(b) // 10]),
    "cut to 50 %": as_bytes(lambda b: b[: len(b) // 2]),
    "cut to 90 %": as_bytes(lambda b: b[: len(b) * 9 // 10]),
    "last byte gone": as_bytes(lambda b: b[:-1]),
    "zeros": as_bytes(lambda b: bytes(len(b))),
    "noise": as_bytes(lambda b: NOISE),
    "an HTML page": as_bytes(lambda b: PAGE),
    "a gzip of text": as_bytes(lambda b: gzip.compress(PAGE)),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Evil(path))),
    "twice in a row": as_bytes(lambda b: b + b),
    "bytes flipped 1": flipped(1),
    "bytes flipped 2": flipped(2),
    "head flipped": flipped(3, 2, 0, 0.1),
    "tail flipped": flipped(4, 2, 0.9),
    "a folder": instead(Path.mkdir),
    "missing": instead(lambda path: None),
    "dangling link": instead(lambda path: path.symlink_to("nowhere")),
    "link to itself": instead(lambda path: path.symlink_to(path.name)),
    "a named pipe": instead(os.mkfifo),
    "a device": instead(lambda path: path.symlink_to("/dev/zero")),
}


class Evil:
    """Unpickled, it leaves a file `owned` in the case's folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (owned_by(self.path),)


def owned_by(path: Path) -> str:
    """The shell command; `path` lies at most three folders below the case's."""
    folder = next(f for f in path.parents if (f / ".target").exists())
    return f"touch '{folder}/owned'"


def byte_cases(reader: str, allowed: dict | None = None, without=(), says: str | None = None) -> list[Case]:
    """BYTE_FAULTS, refused, but for flipped bytes and those in `allowed`."""
    free = {k: ANY for k in BYTE_FAULTS if "flipped" in k} | (allowed or {})
    return [Case(reader, k, f, free.get(k, REFUSED), says) for k, f in BYTE_FAULTS.items() if k not in without]


def valid(reader: str, allowed=READ) -> Case:
    return Case(reader, "nothing", lambda path: None, allowed)


# ==== Volumes and slices =======================================================================================

SHAPE = (5, 6, 7)  # D, H, W
AFFINE = np.diag([-1.0, -1.5, 2.0, 1.0])


def volume() -> np.ndarray:
    return np.random.default_rng(0).normal(-400, 300, SHAPE).clip(-1000, 1000).astype(np.int16)


def write_npz(path: Path, image=None, **more) -> None:
    np.savez_compressed(path, **({"image": volume() if image is None else image} | more))


def nifti(path: Path, array=None, affine=AFFINE, **header) -> None:
    image = nibabel.Nifti1Image(volume().T if array is None else array, affine)
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)


def patched(offset: int, layout: str, *values) -> Callable:
    """Other values in the header of a NIfTI file, zipped or not."""

    def spoil(path: Path):
        zipped = path.name.endswith(".gz")
        data = bytearray(gzip.decompress(path.read_bytes()) if zipped else path.read_bytes())
        struct.pack_into(layout, data, offset, *values)
        path.write_bytes(gzip.compress(bytes(data)) if zipped else data)

    return spoil


def mha(path: Path, compressed=False, **fields) -> None:
    data = volume().tobytes()
    data = zlib.compress(data) if compressed else data
    head = {
        "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
        "CompressedData": str(compressed), "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "0 0 0",
        "ElementSpacing": "1 1.5 2", "DimSize": "7 6 5", "ElementType": "MET_SHORT",
    } | fields | {"ElementDataFile": fields.get("ElementDataFile", "LOCAL")}  # fmt: skip
    path.write_bytes("".join(f"{k} = {v}\n" for k, v in head.items()).encode() + data)


def npy_header(shape, descr="<i2", version=1) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    text = text + " " * (63 - (10 + len(text)) % 64) + "\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text.encode()


def zeros(megabytes: int) -> tuple[bytes, int, int]:
    """A raw deflate stream of so many MB of zeros, its CRC-32, and their number; a thousandth of that in size."""
    press = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = press.compress(bytes(10**6)) + press.flush(zlib.Z_FULL_FLUSH)  # refers to no other block
    crc = 0
    for _ in range(megabytes):
        crc = zlib.crc32(bytes(10**6), crc)
    return block * megabytes + press.flush(), crc, megabytes * 10**6


def zlib_zeros(megabytes: int) -> bytes:
    raw, _, size = zeros(megabytes)
    return b"\x78\xda" + raw + struct.pack(">I", (size % 65521) << 16 | 1)


def zip_bomb(path: Path, name: str, head: bytes, megabytes: int, members: dict[str, bytes] | None = None) -> None:
    """A zip whose member `name` is `head`, stored in front of so many MB of zeros; other members as they are."""
    press = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    raw, _, size = zeros(megabytes)
    crc = zlib.crc32(head)
    for _ in range(megabytes):
        crc = zlib.crc32(bytes(10**6), crc)
    whole = {k: (8, zlib.compress(v, wbits=-15), zlib.crc32(v), len(v)) for k, v in (members or {}).items()}
    whole[name] = 8, press.compress(head) + press.flush(zlib.Z_FULL_FLUSH) + raw, crc, len(head) + size
    body = index = b""
    for key, (method, data, check, length) in whole.items():
        facts = struct.pack("<HHHHIIIHH", 0, method, 0, 33, check, len(data), length, len(key), 0)
        index += (
            b"PK\1\2" + struct.pack("<HH", 20, 20) + facts + struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + key.encode()
        )
        body += b"PK\3\4" + struct.pack("<H", 20) + facts + key.encode() + data
    end = struct.pack("<HHHHIIH", 0, 0, len(whole), len(whole), len(index), len(body), 0)
    path.write_bytes(body + index + b"PK\5\6" + end)


def write_npy(path: Path, array) -> None:
    np.save(path, array, allow_pickle=True)


def zip_of(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def read_volume(path: Path) -> None:
    found = common.read_volume(path, max_voxels=MAX_VOXELS)
    assert found.array.dtype == np.int16 and found.array.ndim == 3 and 0 < found.array.size <= MAX_VOXELS
    assert found.array.min() <= found.array.max() and (found.spacing is None or min(found.spacing) > 0)
    say_notes(found.notes)


def say_notes(notes) -> None:
    import sys

    for note in notes:
        print(note, file=sys.stderr)


def read_slice(path: Path) -> None:
    found = common.read_slice(path)
    assert found.ndim == 2 and found.dtype in (np.uint8, np.int16) and found.size


def made(name: str, write: Callable) -> Callable:
    def make(folder: Path) -> Path:
        write(folder / name)
        return folder / name

    return make


VOLUMES = {"a.npz": lambda p: write_npz(p, spacing=np.float32([2, 1.5, 1])), "a.npy": lambda p: np.save(p, volume())}
VOLUMES |= {"a.nii": nifti, "a.nii.gz": nifti, "a.mha": mha, "b.mha": lambda p: mha(p, True)}
READERS = {name: Reader(made(name, write), read_volume) for name, write in VOLUMES.items()}
READERS["slice.npy"] = Reader(made("slice.npy", lambda p: np.save(p, np.full((6, 7), 9, np.uint8))), read_slice)

CASES = []
for _name in READERS:
    _free = {"twice in a row": ANY} | ({"last byte gone": ANY} if _name == "b.mha" else {})
    CASES += [valid(_name), *byte_cases(_name, _free)]

BAD_ARRAYS = {  # of the same values where they can be
    "objects (a pickle)": lambda: np.array([1, "a"], object).reshape(1, 2, 1),
    "complex": lambda: volume().astype(np.complex64),
    "bool": lambda: volume() > 0,
    "text": lambda: volume().astype("U6"),
    "structured": lambda: np.zeros(SHAPE, [("a", "<i2"), ("b", "<f4")]),
    "dates": lambda: np.zeros(SHAPE, "datetime64[s]"),
    "one axis": lambda: volume().ravel(),
    "no axis": lambda: np.int16(3),
    "five axes": lambda: volume()[None, None],
    "an empty axis": lambda: volume()[:, :0],
    "30 channels": lambda: np.repeat(volume()[None], 30, 0),
    "a NaN": lambda: np.where(np.arange(7) == 3, np.nan, volume()).astype(np.float32),
    "infinite": lambda: np.where(np.arange(7) == 3, np.inf, volume()).astype(np.float32),
    "all NaN": lambda: np.full(SHAPE, np.nan, np.float16),
    "values to 5": lambda: (volume() / 200).astype(np.float32),
}
for _fault, _make in BAD_ARRAYS.items():
    CASES += [
        Case("a.npz", _fault, lambda p, m=_make: write_npz(p, m()), REFUSED),
        Case("a.npy", _fault, lambda p, m=_make: write_npy(p, m()), REFUSED),
    ]
    if _fault not in ("one axis", "five axes", "30 channels"):
        CASES.append(Case("slice.npy", _fault, lambda p, m=_make: write_npy(p, m().squeeze()), REFUSED))

GOOD_ARRAYS = {  # other forms of a volume
    "float64": (lambda: volume().astype(np.float64), READ),
    "big-endian": (lambda: volume().astype(">i2"), READ),
    "Fortran order": (lambda: np.asfortranarray(volume()), READ),
    "uint64": (lambda: (volume().astype(np.int64) + 2000).astype(np.uint64), WARNED),
    "int64 beyond int16": (lambda: volume().astype(np.int64) * 10**6, ANY),
    "float beyond int16": (lambda: (volume() * 1e30).astype(np.float32), ANY),
    "a voxel": (lambda: volume()[:1, :1, :1], ANY),
    "constant": (lambda: np.full(SHAPE, -1000, np.int16), ANY),
    "0 to 1": (lambda: ((volume() + 1000) / 2500).astype(np.float32), READ),
    "two channels": (lambda: np.stack([volume()] * 2), READ),
}
for _fault, (_make, _allowed) in GOOD_ARRAYS.items():
    CASES.append(Case("a.npz", _fault, lambda p, m=_make: write_npz(p, m()), _allowed))

HUGE = (1, 2**20, 2**20)
NPY_FAULTS = {
    "claims 2**40 voxels": lambda p: p.write_bytes(npy_header(HUGE) + bytes(99)),
    "claims more than it has": lambda p: p.write_bytes(npy_header((9, 99, 99)) + bytes(99)),
    "negative axis": lambda p: p.write_bytes(npy_header((-1, 6, 7)) + bytes(99)),
    "an axis of 2**70": lambda p: p.write_bytes(npy_header((2**70, 1, 1)) + bytes(99)),
    "an axis that is text": lambda p: p.write_bytes(npy_header(("a", 6, 7)) + bytes(99)),
    "header that calls": lambda p: p.write_bytes(npy_header(f"__import__('os').system({owned_by(p)!r})") + bytes(99)),
    "header of 60 kB": lambda p: p.write_bytes(npy_header("(" * 60000) + bytes(99)),
    "format 9": lambda p: p.write_bytes(npy_header(SHAPE, version=9) + bytes(999)),
    "type of no size": lambda p: p.write_bytes(npy_header(SHAPE, "<V0") + bytes(999)),
    "object type": lambda p: p.write_bytes(npy_header(SHAPE, "|O") + pickle.dumps(Evil(p))),
}
for _fault, _write in NPY_FAULTS.items():
    CASES.append(Case("a.npy", _fault, _write, REFUSED))

    def _in_zip(path, write=_write):
        write(path)
        zip_of(path, {"image.npy": path.read_bytes()})

    CASES.append(Case("a.npz", _fault, _in_zip, REFUSED))
    if _fault in ("claims 2**40 voxels", "header that calls", "object type"):
        CASES.append(Case("slice.npy", _fault, _write, REFUSED))
CASES += [
    Case("slice.npy", "floats beyond 1", lambda p: np.save(p, np.full((6, 7), 3.0)), REFUSED),
    Case("slice.npy", "three slices", lambda p: np.save(p, np.zeros((3, 6, 7), np.uint8)), REFUSED),
    Case("slice.npy", "int64", lambda p: np.save(p, np.zeros((6, 7), np.int64)), REFUSED),
]


CASES += [
    Case("a.npz", "a bomb", lambda p: zip_bomb(p, "image.npy", npy_header((150, 1000, 1000)), 300), REFUSED),
    Case("a.npz", "a bomb that claims little", lambda p: zip_bomb(p, "image.npy", npy_header(SHAPE), 300), ANY),
    Case("a.npz", "a bomb for spacing", lambda p: write_npz(p, spacing=np.zeros(5 * 10**6)), REFUSED),
    Case("a.npz", "without the key", lambda p: np.savez(p, volume=volume()), REFUSED),
    Case("a.npz", "no member", lambda p: zip_of(p, {}), REFUSED),
    Case(
        "a.npz", "a member that leads out", lambda p: zip_of(p, {"../../image.npy": b"x", "image.npy": b"y"}), REFUSED
    ),
    Case("a.npz", "spacing of text", lambda p: write_npz(p, spacing=np.array(["a", "b", "c"])), REFUSED),
    Case("a.npz", "spacing of objects", lambda p: write_npz(p, spacing=np.array([1, "b", None], object)), REFUSED),
    Case("a.npz", "spacing 0", lambda p: write_npz(p, spacing=np.zeros(3)), REFUSED),
    Case("a.npz", "spacing below 0", lambda p: write_npz(p, spacing=-np.ones(3)), REFUSED),
    Case("a.npz", "spacing NaN", lambda p: write_npz(p, spacing=np.full(3, np.nan)), REFUSED),
    Case("a.npz", "two spacings", lambda p: write_npz(p, spacing=np.ones(2)), REFUSED),
]

NII_FAULTS = {  # offsets in the header of NIfTI-1: dim 40, datatype 70, pixdim 76, vox_offset 108, slope 112, codes 252
    "claims 2**40 voxels": (patched(40, "<8h", 3, 32767, 32767, 1024, 1, 1, 1, 1), REFUSED),
    "claims more than it has": (patched(40, "<8h", 3, 70, 60, 50, 1, 1, 1, 1), REFUSED),
    "an empty axis": (patched(40, "<8h", 3, 7, 0, 5, 1, 1, 1, 1), REFUSED),
    "a negative axis": (patched(40, "<8h", 3, 7, -6, 5, 1, 1, 1, 1), REFUSED),
    "99 dimensions": (patched(40, "<h", 99), REFUSED),
    "no dimension": (patched(40, "<h", 0), REFUSED),
    "one slice": (patched(40, "<8h", 2, 7, 6, 1, 1, 1, 1, 1), REFUSED),
    "colour": (patched(70, "<2h", 128, 24), REFUSED),
    "complex": (patched(70, "<2h", 32, 64), REFUSED),
    "an unknown type": (patched(70, "<2h", 12345, 16), REFUSED),
    "data begin at 2**60": (patched(108, "<f", 2.0**60), REFUSED),
    "data begin at NaN": (patched(108, "<f", float("nan")), REFUSED),
    "data begin below 0": (patched(108, "<f", -352.0), REFUSED),
    "slope NaN": (patched(112, "<2f", float("nan"), float("nan")), ANY),
    "slope infinite": (patched(112, "<2f", float("inf"), 0), ANY),
    "slope 1e30": (patched(112, "<2f", 1e30, 0), ANY),
    "singular affine": (patched(252, "<2h4x20x12f", 0, 1, *[0.0] * 12), REFUSED),
    "affine NaN": (patched(252, "<2h4x20x12f", 0, 1, *[float("nan")] * 12), REFUSED),
    "affine 1e38": (patched(252, "<2h4x20x12f", 0, 1, *[1e38, 0, 0, 0, 0, 1e38, 0, 0, 0, 0, 1e38, 0]), ANY),
    "no orientation": (patched(252, "<2h", 0, 0), WARNED),
    "spacing 0 and no affine": (lambda p: (patched(76, "<4f", 1, 0, 0, 0)(p), patched(252, "<2h", 0, 0)(p)), REFUSED),
    "spacing NaN": (lambda p: (patched(76, "<4f", 1, *[float("nan")] * 3)(p), patched(252, "<2h", 0, 0)(p)), REFUSED),
    "spacing below 0": (lambda p: (patched(76, "<4f", 1, -1, -1, -1)(p), patched(252, "<2h", 0, 0)(p)), ANY),
    "qform beyond 1": (lambda p: patched(252, "<2h3f", 1, 0, 9, 9, 9)(p), ANY),
    "floats with NaN": (lambda p: nifti(p, np.full(SHAPE[::-1], np.nan, np.float32)), REFUSED),
    "a pair's header": (patched(344, "4s", b"ni1\0"), REFUSED),
    "big-endian by half": (patched(0, "<i", 1543569408), ANY),
}
for _fault, (_spoil, _allowed) in NII_FAULTS.items():
    CASES.append(Case("a.nii", _fault, _spoil, _allowed))
for _fault in ("claims 2**40 voxels", "claims more than it has", "data begin at 2**60", "singular affine"):
    CASES.append(Case("a.nii.gz", _fault, *NII_FAULTS[_fault]))


def nii_bomb(path: Path) -> None:
    """300 MB of zeros behind a header, in 300 kB; the header claims them all."""
    patched(40, "<8h", 3, 1000, 1000, 150, 1, 1, 1, 1)(path)
    head = gzip.decompress(path.read_bytes())[:352]
    path.write_bytes(gzip.compress(head) + gzip.compress(bytes(2 * 10**6)) * 150)


def nii_tail(path: Path) -> None:
    """A valid volume with 300 MB of zeros behind it."""
    path.write_bytes(path.read_bytes() + gzip.compress(bytes(2 * 10**6)) * 150)


CASES += [
    Case("a.nii.gz", "a bomb", nii_bomb, REFUSED),
    Case("a.nii.gz", "a bomb behind the volume", nii_tail, ANY),
    Case("a.nii.gz", "not zipped", as_bytes(gzip.decompress), ANY),
    Case("a.nii", "zipped", as_bytes(gzip.compress), REFUSED),
]

MHA_FAULTS = {
    "claims 2**40 voxels": ({"DimSize": "1048576 1048576 1"}, REFUSED),
    "claims more than it has": ({"DimSize": "70 60 50"}, REFUSED),
    "an empty axis": ({"DimSize": "7 0 5"}, REFUSED),
    "a negative axis": ({"DimSize": "-7 -6 5"}, REFUSED),
    "axes of text": ({"DimSize": "a b c"}, REFUSED),
    "axes infinite": ({"DimSize": "inf 6 5"}, REFUSED),
    "two axes": ({"DimSize": "42 5", "NDims": "2"}, REFUSED),
    "no axes": ({"DimSize": ""}, REFUSED),
    "an unknown type": ({"ElementType": "MET_COMPLEX"}, REFUSED),
    "colour": ({"ElementNumberOfChannels": "3"}, REFUSED),
    "data elsewhere": ({"ElementDataFile": "../../etc/passwd"}, REFUSED),
    "a list of files": ({"ElementDataFile": "LIST"}, REFUSED),
    "spacing 0": ({"ElementSpacing": "0 0 0"}, REFUSED),
    "spacing NaN": ({"ElementSpacing": "nan nan nan"}, REFUSED),
    "spacing of text": ({"ElementSpacing": "1 mm"}, REFUSED),
    "spacing below 0": ({"ElementSpacing": "-1 -1 -1"}, ANY),
    "singular affine": ({"TransformMatrix": "1 0 0 1 0 0 1 0 0"}, REFUSED),
    "affine of two axes": ({"TransformMatrix": "1 0 0 1"}, REFUSED),
    "affine of text": ({"TransformMatrix": "a b c"}, REFUSED),
    "big-endian": ({"BinaryDataByteOrderMSB": "True"}, ANY),
    "says it is compressed": ({"CompressedData": "True"}, REFUSED),
    "a line of 1 MB": ({"Comment": "x" * 10**6}, REFUSED),
    "100,000 lines": ({"Comment": "x\nk = v" * 10**5}, REFUSED),
}
for _fault, (_fields, _allowed) in MHA_FAULTS.items():
    CASES.append(Case("a.mha", _fault, lambda p, f=_fields: mha(p, **f), _allowed))


def mha_bomb(path: Path) -> None:
    """A header that claims 420 bytes before 300 MB of zeros."""
    head = path.read_bytes().partition(b"LOCAL\n")
    path.write_bytes(head[0] + head[1] + zlib_zeros(300))


CASES.append(Case("b.mha", "a bomb", mha_bomb, REFUSED))


# ==== Tables ===================================================================================================


def table_of(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file, delimiter=";" if ";" in file.readline() + str(file.seek(0)) else ","))


def cells(change: Callable) -> Callable:
    """Spoil a table by its rows, [[cell]]."""

    def spoil(path: Path):
        separator = ";" if b";" in path.read_bytes().partition(b"\n")[0] else ","
        rows = change(table_of(path))
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=separator, lineterminator="\n").writerows(rows)

    return spoil


def cell(column: str, text: str, row: int = 1) -> Callable:
    def change(rows):
        rows[row][rows[0].index(column)] = text
        return rows

    return cells(change)


def more_column(name: str, text: str) -> Callable:
    return cells(lambda rows: [[*row, text if i else name] for i, row in enumerate(rows)])


def in_text(change: Callable) -> Callable:
    return as_bytes(lambda b: change(b.decode()).encode())


def unquoted(rows) -> str:
    return "\n".join(",".join(row) for row in rows) + "\n"


TABLE_FAULTS = {
    "BOM": (as_bytes(lambda b: b"\xef\xbb\xbf" + b), READ),
    "CRLF": (as_bytes(lambda b: b.replace(b"\n", b"\r\n")), READ),
    "CR alone": (as_bytes(lambda b: b.replace(b"\n", b"\r")), READ),
    "no last line end": (as_bytes(lambda b: b.rstrip(b"\n")), READ),
    "blank lines": (as_bytes(lambda b: b.replace(b"\n", b"\n\n")), READ),
    "a comment in Latin-1": (as_bytes(lambda b: b.replace(b"\n", ",é\n".encode("latin-1"))), REFUSED),
    "UTF-16": (as_bytes(lambda b: b.decode().encode("utf-16")), REFUSED),
    "UTF-16 without BOM": (as_bytes(lambda b: b.decode().encode("utf-16-le")), REFUSED),
    "a NUL": (as_bytes(lambda b: b[:-4] + b"\0" + b[-4:]), REFUSED),
    "U+2028 in a cell": (more_column("comment", "one\u2028row"), READ),
    "a line end in a cell": (more_column("comment", "one\nrow"), READ),
    "a terminal's code in a name": (cells(lambda rows: [["\x1b[2J" + c for c in rows[0]], *rows[1:]]), REFUSED),
    "an open quote": (as_bytes(lambda b: b.replace(b"\n", b'\n"', 1)), REFUSED),
    "a cell too many in every row": (cells(lambda rows: [rows[0], *([*r, "x"] for r in rows[1:])]), REFUSED),
    "a cell too many in one row": (cells(lambda rows: [*rows[:-1], [*rows[-1], "x"]]), REFUSED),
    "a cell too few in one row": (cells(lambda rows: [*rows[:-1], rows[-1][:-1]]), REFUSED),
    "no rows": (cells(lambda rows: rows[:1]), REFUSED),
    "no first line": (cells(lambda rows: rows[1:]), REFUSED),
    "a column missing": (cells(lambda rows: [r[1:] for r in rows]), REFUSED),
    "a column twice": (cells(lambda rows: [[r[0], *r] for r in rows]), REFUSED),
    "an id twice": (cells(lambda rows: [*rows, rows[-1]]), REFUSED),
    "an empty id": (cells(lambda rows: [*rows[:-1], ["", *rows[-1][1:]]]), ANY),
    "a cell of 10 MB": (cells(lambda rows: [[*r, "x" * 10**7 * (i == 1)] for i, r in enumerate(rows)]), ANY),
    "500 columns": (cells(lambda rows: [r + [f"c{i}" for i in range(500)] for r in rows]), ANY),
}


def table_cases(
    reader: str, allowed: dict | None = None, labels: dict | None = None, without=(), says=None
) -> list[Case]:
    """Faults of a CSV whose first column is an id; `labels`: column -> what it may hold, such as LABELS."""
    some = {"last byte gone": ANY, "cut to 90 %": ANY, "cut to 50 %": ANY, "twice in a row": REFUSED, **(allowed or {})}
    found = [valid(reader), *byte_cases(reader, some, without, says)]
    found += [Case(reader, k, f, some.get(k, a), says) for k, (f, a) in TABLE_FAULTS.items() if k not in without]
    for column, values in (labels or {}).items():
        found += [Case(reader, f"{column} {v!r}", cell(column, v), a, says) for v, a in values.items()]
    return found


WRONG = ("2", "-2", "yes", "inf", "1e400", "0x10", "１", "1 0", "=1", "true")
LABELS = dict.fromkeys(WRONG, REFUSED) | dict.fromkeys(("", "-1", "nan", " 1 ", "1.0", "1e0"), READ)
NUMBERS = dict.fromkeys(("abc", "nan", "inf", "1e400", "0x10", "0", "-1"), REFUSED)


def ct_folder(folder: Path) -> Path:
    """t.csv of four volumes, and metadata.csv."""
    rows = []
    for i, split in enumerate(["train", "train", "val", "val"]):
        write_npz(folder / f"v{i}.npz", np.roll(volume(), i))
        rows.append([f"case{i}", split, f"v{i}.npz", i % 2, 1 - i % 2, f"p{i}", "2", "1.5", "1"])
    columns = ["series_id", "split", "img_path", "first", "second", "patient_id", *common.SPACING_COLUMNS]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "t.csv", index=False)
    rows = [[f"v{i}.nii.gz", "1", "-1000", "[1.5, 1.5]", "2"] for i in range(4)]
    columns = ["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "metadata.csv", index=False)
    return folder / "t.csv"


def ct_words(path: Path, csv_file="t.csv") -> list:
    return ["--csv", path.with_name(csv_file), "--pretrained", "none", "--arch", "siglip-tiny", "--label-columns",
            "first", "second", "--num-slices", "2", "--image-size", "32", "--num-workers", "0"]  # fmt: skip


def words(*some) -> list[str]:
    return list(map(str, some))


def check_all(datasets, n: int | None = None) -> None:
    """Every case can be read, and is numbers."""
    for dataset in datasets:
        found = [dataset.load(i) for i in range(len(dataset))]
        assert all(
            np.isfinite(np.asarray(x, np.float64)).all() for f in found for x in (f if type(f) is tuple else [f])
        )
        assert not np.isinf(np.asarray(dataset.targets, np.float64)).any()


def read_ct(path: Path) -> None:
    args = finetune_siglip.parse_args(words(*ct_words(path), "--data-root", path.parent))
    check_all(finetune_siglip.build_datasets(args))


def read_metadata(path: Path) -> None:
    args = finetune_siglip.parse_args(words(*ct_words(path), "--metadata", path))
    check_all(finetune_siglip.build_datasets(args))


READERS["t.csv"] = Reader(
    ct_folder,
    read_ct,
    lambda p: ["finetune_siglip.py", *ct_words(p), "--data-root", p.parent, "--output-dir", p.parent / "out"],
)
READERS["metadata.csv"] = Reader(lambda folder: ct_folder(folder).with_name("metadata.csv"), read_metadata)
CASES += table_cases("t.csv", {"no first line": REFUSED}, {"first": LABELS, "spacing_z": NUMBERS})
CASES += table_cases(
    "metadata.csv", labels={"RescaleSlope": {"abc": REFUSED, "nan": REFUSED, "1e400": REFUSED, "1e30": ANY}}
)
PATHS = (
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "",
    "nowhere.npz",
    "v0.npz\0",
    "x" * 5000,
    "~/v0.npz",
)
PATHS += ("t.csv", "v0.npz/x", "\u2028.npz", "C:\\v0.npz", "http://example.org/v0.npz", "https:/v0.npz", "$(id).npz")
SHOWN = "no such", "not a volume by its name", "too long", "not a regular file"  # the error names the cell's file
CASES += [Case("t.csv", f"img_path {p[:30]!r}", cell("img_path", p), REFUSED, SHOWN) for p in PATHS]
CASES += [
    Case(
        "t.csv",
        "a link that leads out",
        lambda p: ((p.parent / "v0.npz").unlink(), (p.parent / "v0.npz").symlink_to("/etc/passwd")),
        REFUSED,
    ),
    Case(
        "t.csv",
        "a patient in two splits",
        cells(lambda rows: [*rows[:-1], [*rows[-1][:5], "p0", *rows[-1][6:]]]),
        REFUSED,
    ),
    Case(
        "t.csv", "a volume that is cut", lambda p: as_bytes(lambda b: b[:99])(p.with_name("v0.npz")), REFUSED, "v0.npz"
    ),
]


# ---- the slices of Task 2


def slice_folder(folder: Path, packed=True) -> Path:
    (folder / "splits").mkdir()
    (folder / "packed").mkdir()
    labels, levels = [], np.random.default_rng(0).integers(0, 255, (4, 8, 8), np.uint8)
    for split in ("train", "valid"):
        rows = []
        (folder / "slices" / split).mkdir(parents=True)
        for i in range(4):
            volume = f"{split}_{i // 2}_a_1"
            name = f"slices/{split}/{volume}_{i}.npy"
            np.save(folder / name, levels[i])
            rows.append([f"{volume}_{i}", volume, name, *([i] if packed else [])])
            labels += [[volume, i // 2, 1 - i // 2]] * (i % 2)
        columns = ["slice_id", "volume_name", "file_path", *(["packed_row"] if packed else [])]
        pd.DataFrame(rows, columns=columns).to_csv(folder / "splits" / f"{split}_slices.csv", index=False)
        if packed:
            np.save(folder / "packed" / f"{split}.npy", levels)
    pd.DataFrame(labels, columns=["VolumeName", "first", "second"]).to_csv(
        folder / "multi_abnormality_labels.csv", index=False
    )
    (folder / "slice_extraction_stats.json").write_text(json.dumps({"settings": {"window": [-300, 1400]}}))
    return folder / "splits" / "train_slices.csv"


def read_slices(path: Path) -> None:
    folder = next(f for f in path.parents if (f / "splits").is_dir())
    check_all_slices(folder)


def slice_words(folder: Path) -> list:
    return [
        "--slice-dir",
        folder,
        "--mode",
        "train",
        "--model",
        "efficientnet_b0",
        "--pretrained",
        "none",
        "--label-columns",
        "first",
        "second",
        "--num-workers",
        "0",
        "--no-tensorboard",
    ]


def check_all_slices(folder: Path) -> None:
    for dataset in run_task2.build_datasets(run_task2.parse_args(words(*slice_words(folder)))):
        for i in range(len(dataset)):
            assert dataset.image(i).shape[1:] == (dataset.args.image_size,) * 2
        assert not np.isinf(dataset.targets).any()


def _slice_command(path: Path) -> list:
    folder = next(f for f in path.parents if (f / "splits").is_dir())
    return ["run_task2.py", *slice_words(folder), "--output-dir", folder / "out"]


READERS["slices.csv"] = Reader(lambda f: slice_folder(f, False), read_slices)
READERS["packed.npy"] = Reader(
    lambda f: slice_folder(f).parents[1] / "packed" / "train.npy", read_slices, _slice_command
)
READERS["packed.csv"] = Reader(slice_folder, read_slices)
READERS["a slice"] = Reader(
    lambda f: slice_folder(f, False).parents[1] / "slices" / "train" / "train_0_a_1_0.npy", read_slices
)
READERS["labels of slices"] = Reader(lambda f: slice_folder(f).parents[1] / "multi_abnormality_labels.csv", read_slices)
READERS["stats.json"] = Reader(lambda f: slice_folder(f).parents[1] / "slice_extraction_stats.json", read_slices)
CASES += table_cases("slices.csv", {"an empty id": ANY})
CASES += table_cases(
    "labels of slices", labels={"first": LABELS}, without=("missing", "dangling link", "link to itself")
)
CASES += [
    valid("packed.npy"),
    *byte_cases("packed.npy", {"missing": READ, "dangling link": READ, "link to itself": READ, "twice in a row": ANY}),
]
CASES += [valid("a slice"), *byte_cases("a slice", {"twice in a row": ANY})]
CASES += [Case("slices.csv", f"file_path {p[:30]!r}", cell("file_path", p), REFUSED, SHOWN) for p in PATHS[:9]]
CASES += [
    Case("packed.csv", f"packed_row {v!r}", cell("packed_row", v), REFUSED)
    for v in ("4", "-1", "abc", "", "1.5", "1e400", "99999999999999999999", "nan")
]
for _fault in ("objects (a pickle)", "complex", "bool", "one axis", "five axes", "a NaN", "an empty axis"):
    CASES.append(Case("packed.npy", _fault, lambda p, m=BAD_ARRAYS[_fault]: write_npy(p, m()), REFUSED, "slice_store"))
for _fault in (
    "claims 2**40 voxels",
    "claims more than it has",
    "header that calls",
    "object type",
    "an axis of 2**70",
):
    CASES.append(Case("packed.npy", _fault, NPY_FAULTS[_fault], REFUSED))
CASES += [
    Case("packed.npy", "fewer rows than the table", lambda p: np.save(p, np.zeros((2, 8, 8), np.uint8)), REFUSED),
    Case("packed.npy", "one slice of HU", lambda p: np.save(p, np.zeros((4, 8, 8), np.int16)), REFUSED, "slice"),
]
JSON_TEXT = {
    "a list": "[1]",
    "a number": "3",
    "null": "null",
    "NaN": '{"settings": NaN}',
    "settings of text": '{"settings": "a"}',
}
JSON_TEXT |= {"window of text": '{"settings": {"window": "lung"}}', "window of one": '{"settings": {"window": [3]}}'}
JSON_TEXT |= {
    "window below 0": '{"settings": {"window": [0, -3]}}',
    "deep": "[" * 10**5,
    "window NaN": '{"settings": {"window": [0, NaN]}}',
}
JSON_TEXT |= {"a number of 5,000 digits": '{"settings": {"window": [0, ' + "1" * 5000 + "]}}"}
CASES += [Case("stats.json", k, lambda p, t=t: p.write_text(t), REFUSED) for k, t in JSON_TEXT.items()]
CASES += [
    valid("stats.json"),
    *byte_cases("stats.json", {k: ANY for k in ("missing", "dangling link", "link to itself")}),
]


# ---- films and their scores


def film_folder(folder: Path) -> Path:
    rng, rows = np.random.default_rng(0), []
    (folder / "images").mkdir()
    for i, split in enumerate(["train", "train", "val", "val"]):
        film = rng.integers(0, 255, (12, 10), np.uint8)
        Image.fromarray(film).save(folder / "images" / f"{i}.png")
        rows.append([i, *rng.integers(0, 4, 6), f"p{i}", split])
    pd.DataFrame(rows, columns=["FileID", *ZONES, "patient", "split"]).to_csv(
        folder / "labels.csv", index=False, sep=";"
    )
    return folder / "labels.csv"


def film_words(folder: Path) -> list:
    return ["--csv", folder / "labels.csv", "--image-dir", folder / "images", "--model", "Custom_1", "--pretrained",
            "none", "--image-size", "32", "--num-workers", "0", "--no-tensorboard"]  # fmt: skip


def read_films(path: Path) -> None:
    folder = path.parent if path.name == "labels.csv" else path.parents[1]
    check_all(train_csi.build_datasets(train_csi.parse_args(words(*film_words(folder)))))


def film(suffix: str, write: Callable) -> Callable:
    def make(folder: Path) -> Path:
        path = film_folder(folder).parent / "images" / f"0{suffix}"
        path.with_name("0.png").unlink()
        write(path)
        return path

    return make


def picture(path: Path, mode="L", size=(10, 12), **options) -> None:
    array = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(array)
    if mode.startswith("I"):
        image = Image.fromarray(array[..., 0].astype(np.uint16) * 200)
    else:
        image = image.convert(mode)
    image.save(path, **options)


def dicom(path: Path, **fields) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = fields.pop("syntax", ExplicitVRLittleEndian)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 12, 10, 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 0
    data.PixelData = np.arange(120, dtype=np.uint16).tobytes()
    with warnings.catch_warnings(action="ignore"):
        for name, value in fields.items():
            setattr(data, name, value)
        data.save_as(path, enforce_file_format=True)


def flat_nifti(path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.arange(120, dtype=np.float32).reshape(12, 10, 1), np.eye(4)), path)


FILMS = {".png": picture, ".jpg": picture, ".dcm": dicom, ".nii.gz": flat_nifti}
for _suffix, _write in FILMS.items():
    READERS[f"film{_suffix}"] = Reader(
        film(_suffix, _write),
        read_films,
        lambda p: [
            "train_csi.py",
            *film_words(p.parents[1]),
            "--batch-size",
            "2",
            "--output-dir",
            p.parents[1] / "out",
        ],
    )
    _free = {"twice in a row": ANY, "last byte gone": ANY} | (
        {"cut to 90 %": ANY} if _suffix in (".jpg", ".png") else {}
    )
    _says = {"missing": "labels.csv", "dangling link": "labels.csv", "link to itself": "labels.csv"}
    CASES.append(valid(f"film{_suffix}"))
    CASES += [c._replace(says="0") for c in byte_cases(f"film{_suffix}", _free)]
SCORES = dict.fromkeys(("4", "-1", "-2", "yes", "inf", "1e400", "0x10", "１", "2.5", "=1", "1 2"), REFUSED)
SCORES |= dict.fromkeys(("", " 3 ", "2.0", "2,0"), READ)
READERS["films.csv"] = Reader(film_folder, read_films)
CASES += table_cases("films.csv", {"a comment in Latin-1": REFUSED}, {"right_sup": SCORES})
CASES += [Case("films.csv", f"FileID {p[:30]!r}", cell("FileID", p), REFUSED, SHOWN) for p in PATHS[:10]]
PICTURES = {  # mode, more
    "one pixel": (lambda p: picture(p, size=(1, 1)), ANY),
    "one row": (lambda p: picture(p, size=(10, 1)), ANY),
    "colour": (lambda p: picture(p, "RGB"), READ),
    "black and white": (lambda p: picture(p, "1"), READ),
}
PNGS = {
    "16 bits": (lambda p: picture(p, "I;16"), READ),
    "palette": (lambda p: picture(p, "P"), READ),
    "alpha": (lambda p: picture(p, "RGBA"), READ),
    "grey and alpha": (lambda p: picture(p, "LA"), READ),
    "animated": (lambda p: picture(p, save_all=True, append_images=[Image.new("L", (10, 12))]), READ),
    "constant": (lambda p: Image.new("L", (10, 12)).save(p), REFUSED),
    "a JPEG by another name": (lambda p: picture(p, format="JPEG"), READ),
    "a GIF by another name": (lambda p: picture(p, format="GIF"), REFUSED),
    "a TIFF by another name": (lambda p: picture(p, format="TIFF"), REFUSED),
    "SVG": (lambda p: p.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'), REFUSED),
    "EPS": (lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n"), REFUSED),
    "claims 60,000 x 60,000": (lambda p: png_header(p, 60000, 60000), REFUSED),
    "claims 10,000 x 10,000": (lambda p: png_header(p, 10000, 10000), REFUSED),
    "claims 2**31 x 1": (lambda p: png_header(p, 2**31 - 1, 1), REFUSED),
    "no width": (lambda p: png_header(p, 0, 12), REFUSED),
    "a bomb": (lambda p: Image.new("1", (14000, 14000)).save(p), REFUSED),
    "text that is a bomb": (lambda p: png_text(p), ANY),
}
JPEGS = {
    "four inks": (lambda p: picture(p, "CMYK"), READ),
    "progressive": (lambda p: picture(p, progressive=True), READ),
    "turned by EXIF": (lambda p: picture(p, exif=exif(6)), READ),
    "EXIF of noise": (lambda p: picture(p, exif=b"Exif\0\0" + NOISE[:500]), ANY),
    "a PNG by another name": (lambda p: picture(p, format="PNG"), READ),
    "claims 60,000 x 60,000": (lambda p: jpeg_size(p, 60000, 60000), REFUSED),
    "claims 2,000 x 2,000": (lambda p: jpeg_size(p, 2000, 2000), ANY),
}
DICOMS = {
    "claims 65,535 x 65,535": ({"Rows": 65535, "Columns": 65535}, REFUSED),
    "no rows": ({"Rows": 0}, REFUSED),
    "colour": ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}, REFUSED),
    "frames": ({"NumberOfFrames": "9"}, REFUSED),
    "frames of text": ({"NumberOfFrames": "0"}, ANY),
    "13 bits": ({"BitsAllocated": 13}, REFUSED),
    "no pixels": ({"PixelData": b""}, REFUSED),
    "fewer pixels": ({"PixelData": bytes(100)}, REFUSED),
    "all padding": ({"PixelData": bytes(240), "PixelPaddingValue": 0}, REFUSED),
    "slope NaN": ({"RescaleSlope": "nan", "RescaleIntercept": "0"}, REFUSED),
    "slope 1e300": ({"RescaleSlope": "1e300", "RescaleIntercept": "0"}, REFUSED),
    "inverted": ({"PhotometricInterpretation": "MONOCHROME1"}, READ),
}


def png_header(path: Path, width: int, height: int) -> None:
    """The head of a PNG of this size, and no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND")
    )


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_text(path: Path) -> None:
    """A film with a comment of 300 MB, compressed."""
    whole = path.read_bytes()
    path.write_bytes(whole[:33] + chunk(b"zTXt", b"comment\0\0" + zlib_zeros(300)) + whole[33:])


def jpeg_size(path: Path, width: int, height: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    path.write_bytes(data)


def exif(turn: int) -> bytes:
    facts = Image.Exif()
    facts[0x0112] = turn
    return facts.tobytes()


def deflated_bomb(path: Path) -> None:
    """A DICOM file of the deflated syntax that inflates to 400 MB."""
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    dicom(path, syntax=DeflatedExplicitVRLittleEndian)
    data = path.read_bytes()
    head = data[: 132 + 12 + struct.unpack_from("<I", data, 140)[0]]
    press = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    element = press.compress(struct.pack("<HH2sHI", 0x0009, 0x1001, b"OB", 0, 400 * 10**6))
    path.write_bytes(head + element + press.flush(zlib.Z_FULL_FLUSH) + zeros(400)[0])


for _suffix, _faults in ((".png", PICTURES | PNGS), (".jpg", PICTURES | JPEGS)):
    for _fault, (_spoil, _allowed) in _faults.items():
        if (_suffix, _fault) != (".jpg", "black and white"):
            CASES.append(Case(f"film{_suffix}", _fault, _spoil, _allowed))
for _fault, (_fields, _allowed) in DICOMS.items():
    CASES.append(Case("film.dcm", _fault, lambda p, f=_fields: dicom(p, **f), _allowed))
CASES += [
    Case("film.dcm", "a deflated bomb", deflated_bomb, REFUSED),
    Case("film.dcm", "an unknown syntax", as_bytes(lambda b: b.replace(b"10008.1.2.1\0", b"10008.1.2.9\0")), REFUSED),
    Case(
        "film.dcm", "big-endian by its head", as_bytes(lambda b: b.replace(b"10008.1.2.1\0", b"10008.1.2.2\0")), REFUSED
    ),
    Case("film.dcm", "implicit by its head", as_bytes(lambda b: b.replace(b"10008.1.2.1\0", b"10008.1.2\0\0\0")), ANY),
    Case("film.dcm", "JPEG 2000 by its head", as_bytes(lambda b: b.replace(b"10008.1.2.1\0", b"10008.1.2.4")), REFUSED),
    Case("film.nii.gz", "three axes", lambda p: nifti(p), REFUSED),
    Case("film.nii.gz", "NaN", lambda p: nifti(p, np.full((4, 5, 1), np.nan)), REFUSED),
    Case("film.nii.gz", "claims 2**40 pixels", patched(40, "<8h", 3, 32767, 32767, 1, 1, 1, 1, 1), REFUSED),
    Case("film.nii.gz", "claims more than it has", patched(40, "<8h", 3, 5000, 5000, 1, 1, 1, 1, 1), REFUSED),
    Case("film.nii.gz", "an unknown type", patched(70, "<2h", 12345, 16), REFUSED),
    Case("film.nii.gz", "slope infinite", patched(112, "<2f", float("inf"), 0), ANY),
    Case("film.nii.gz", "a bomb behind the film", nii_tail, ANY),
    Case("film.png", "two files for a film", lambda p: picture(p.with_name("0.jpg")), REFUSED),
]


# ---- pairs of photographs and reports

VOCAB = "[PAD] [UNK] [CLS] [SEP] [MASK] . : left right eye both first second case 0 1 2 3".split()


def eye(seed=0, mode="RGB", **options) -> bytes:
    file = io.BytesIO()
    array = np.random.default_rng(seed).integers(0, 255, (12, 10, 3), np.uint8)
    Image.fromarray(array).convert(mode).save(file, **({"format": "PNG"} | options))
    return file.getvalue()


def fundus_folder(folder: Path) -> Path:
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    for k, split in enumerate(("train", "val")):
        numbers = range(2 * k, 2 * k + 2)
        images = {f"P{i}": (eye(10 + i), eye(20 + i)) for i in numbers}
        pairs = [(f"P{i}", i, f"case {i}. left eye: first") for i in numbers]
        labels = pd.DataFrame(
            [[f"P{i}", f"p{i}", "first"] for i in numbers], columns=["image_id", "patient_id", "label"]
        )
        write_fundus(folder / split, pairs, images, labels)
    return folder / "train_imgs.tsv"


def fundus_words(folder: Path, train="train_imgs.tsv") -> list:
    val = folder / ("val" if train == "train" else "val_imgs.tsv")
    return ["--train-data", folder / train, "--val-data", val, "--vision-model", "tiny", "--text-model", "tiny",
            "--image-size", "16", "--vocab", folder / "vocab.txt", "--num-workers", "0",
            "--batch-size", "2"]  # fmt: skip


def read_fundus(path: Path) -> None:
    folder = next(f for f in path.parents if (f / "vocab.txt").parent.is_dir() and (f / ".target").exists())
    lmdb_too = path.suffix == ".mdb" or path.parent.name == "train"
    args = train_retclip.parse_args(
        words(*fundus_words(folder, "train" if lmdb_too else "train_imgs.tsv"), "--epochs", 9, "--warmup", 0)
    )
    datasets = train_retclip.build_datasets(args)
    for dataset in datasets:
        for i in range(len(dataset)):
            images, _ = dataset.load(i)
            assert images.shape[1:] == (3, 16, 16)
        assert not np.isinf(dataset.targets).any()
    say_notes(f"warning: {w}" for w in datasets[0].warnings)
    datasets[0].notes()


def _fundus(name: str) -> Reader:
    return Reader(
        lambda folder: fundus_folder(folder).parent / name, read_fundus,
        lambda p: ["train_retclip.py", *fundus_words(next(f for f in p.parents if (f / ".target").exists()),
                   "train" if name.startswith("train/") else "train_imgs.tsv"), "--output-dir", p.parent / "out"],
    )  # fmt: skip


for _name, _file in {
    "pairs.mdb": "train/pairs/data.mdb",
    "imgs.mdb": "train/imgs/data.mdb",
    "imgs.tsv": "train_imgs.tsv",
    "texts.jsonl": "train_texts.jsonl",
    "labels of eyes": "train/labels.csv",
    "vocab.txt": "vocab.txt",
}.items():
    READERS[_name] = _fundus(_file)
_gone = ("missing", "dangling link", "link to itself")


def pointers_changed(seed: int) -> Callable:
    """Other bytes in the heads of LMDB's pages, in their tables of nodes, or in the nodes."""

    def change(data: bytes) -> bytes:
        rng, data = random.Random(seed), bytearray(data)
        for _ in range(3):
            place = rng.choice([rng.randrange(152), rng.randrange(40), 4095 - rng.randrange(400)])
            data[rng.randrange(len(data) // 4096) * 4096 + place] = rng.choice([0, 255, rng.randrange(256)])
        return bytes(data)

    return as_bytes(change)


for _name in ("pairs.mdb", "imgs.mdb"):
    CASES.append(valid(_name))
    CASES += byte_cases(_name, {"twice in a row": ANY}, says=("train", "vocab"))
    CASES += [Case(_name, f"pointers changed {i}", pointers_changed(i), ANY, ("train", "pair", "P")) for i in range(30)]
CASES += [valid("imgs.tsv"), *byte_cases("imgs.tsv", {"last byte gone": ANY, "cut to 90 %": ANY, "a folder": REFUSED})]
CASES += [
    valid("texts.jsonl"),
    *byte_cases(
        "texts.jsonl", {"last byte gone": ANY, "twice in a row": ANY, "cut to 50 %": ANY}, says="train_imgs.tsv"
    ),
]
CASES += table_cases("labels of eyes", {k: ANY for k in _gone})  # fmt: skip
CASES += [valid("vocab.txt"), *byte_cases("vocab.txt", {k: ANY for k in (
    "last byte gone", "cut to 90 %", "cut to 50 %", "twice in a row", "noise")})]  # fmt: skip
CASES += [
    Case("vocab.txt", "BOM", TABLE_FAULTS["BOM"][0], READ),
    Case("vocab.txt", "CRLF", TABLE_FAULTS["CRLF"][0], READ),
    Case("vocab.txt", "U+2028 is a word", in_text(lambda t: t + "\u2028\n"), READ),
    Case("vocab.txt", "UTF-16", TABLE_FAULTS["UTF-16"][0], REFUSED),
    Case("vocab.txt", "Latin-1", as_bytes(lambda b: b + "é".encode("latin-1")), REFUSED),
    Case("vocab.txt", "without [CLS]", in_text(lambda t: t.replace("[CLS]", "cls")), REFUSED),
    Case("vocab.txt", "a word of 10 MB", in_text(lambda t: t + "x" * 10**7), ANY),
]


def put(key: str, value: Callable) -> Callable:
    """Another value in an LMDB; value(path of data.mdb) -> bytes, or None to delete."""

    def spoil(path: Path):
        with lmdb.open(str(path.parent), map_size=2**24) as env, env.begin(write=True) as txn:
            data = value(path)
            txn.delete(key.encode()) if data is None else txn.put(key.encode(), data)

    return spoil


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode()


PAIR_VALUES = {
    "a foreign pickle": lambda p: pickle.dumps(Evil(p)),
    "a pickle of a class": lambda p: pickle.dumps(Path("x")),
    "a list": lambda p: pickle.dumps(["P0", 0, "text"]),
    "two fields": lambda p: pickle.dumps(("P0", 0)),
    "bytes for text": lambda p: pickle.dumps(("P0", 0, b"text")),
    "no pickle": lambda p: b"P0",
    "a cut pickle": lambda p: pickle.dumps(("P0", 0, "text"))[:-3],
    "no bytes": lambda p: b"",
    "None": lambda p: None,
    "an image that is not there": lambda p: pickle.dumps(("P9", 0, "text")),
    "a pickle that asks for 2**40 bytes": lambda p: b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "a pickle that doubles a tuple": lambda p: b"\x80\x02(" + b"K\x01K\x01\x86" + b"2\x86" * 40 + b".",
    "deep tuples": lambda p: b"\x80\x02" + b")" + b"\x85" * 10**5 + b".",
}
CASES += [
    Case("pairs.mdb", k, put("0", v), REFUSED, "pairs" if "not there" not in k else "P9")
    for k, v in PAIR_VALUES.items()
]
CASES += [
    Case("pairs.mdb", f"num_samples {v[:20]!r}", put("num_samples", lambda p, v=v: v or None), REFUSED, "pairs")
    for v in (b"", b"-1", b"3", b"1e9", b"9" * 11, b"9" * 40, b"\xff\xfe", "２".encode())
] + [Case("pairs.mdb", "num_samples b'0'", put("num_samples", lambda p: b"0"), REFUSED, "train")]
IMAGE_VALUES = {
    "a foreign pickle": lambda p: pickle.dumps(Evil(p)),
    "one eye in a pickle": lambda p: pickle.dumps((b64(eye()),)),
    "three eyes": lambda p: pickle.dumps((b64(eye()),) * 3),
    "bytes in a pickle": lambda p: pickle.dumps((eye(), eye())),
    "not base64": lambda p: pickle.dumps(("%%%", "é")),
    "text that is no image": lambda p: pickle.dumps((b64(PAGE), b64(PAGE))),
    "no eye": lambda p: pickle.dumps(("", "")),
    "cut images": lambda p: pickle.dumps((b64(eye()[:200]),) * 2),
    "a photograph for the second patient": lambda p: b64(eye()).encode(),
    "bytes of noise": lambda p: NOISE,
    "no bytes": lambda p: b"",
}
CASES += [Case("imgs.mdb", k, put("P1", v), REFUSED, "P1") for k, v in IMAGE_VALUES.items()]
CASES.append(Case("imgs.mdb", "an image missing", put("P1", lambda p: None), REFUSED, "P1"))


def photograph(data: Callable) -> Callable:
    """Another photograph in the second line of the TSV."""

    def spoil(path: Path):
        lines = path.read_text().splitlines(keepends=True)
        lines[1] = f"P1\t{b64(data())}\t{b64(eye())}\n"
        path.write_text("".join(lines))

    return spoil


def made_picture(write: Callable) -> Callable:
    """What a function writes to a file that has a film in it already."""

    def data() -> bytes:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            picture(Path(folder) / "x.png")
            write(Path(folder) / "x.png")
            return (Path(folder) / "x.png").read_bytes()

    return data


EYES = {
    "16 bits": (made_picture(lambda p: picture(p, "I;16")), READ),
    "four inks": (lambda: eye(mode="CMYK", format="JPEG"), READ),
    "palette": (lambda: eye(mode="P"), READ),
    "alpha": (lambda: eye(mode="RGBA"), READ),
    "grey": (lambda: eye(mode="L"), READ),
    "black and white": (lambda: eye(mode="1"), READ),
    "a GIF": (lambda: eye(format="GIF", mode="P"), READ),
    "a WebP": (lambda: eye(format="WEBP"), READ),
    "animated": (lambda: eye(save_all=True, append_images=[Image.new("RGB", (10, 12))]), READ),
    "one pixel": (made_picture(lambda p: picture(p, size=(1, 1))), READ),
    "claims 60,000 x 60,000": (made_picture(lambda p: png_header(p, 60000, 60000)), REFUSED),
    "claims 10,000 x 10,000": (made_picture(lambda p: png_header(p, 10000, 10000)), REFUSED),
    "claims 2**31 x 1": (made_picture(lambda p: png_header(p, 2**31 - 1, 1)), REFUSED),
    "a bomb": (made_picture(lambda p: Image.new("1", (14000, 14000)).save(p)), REFUSED),
    "a TIFF that claims much": (lambda: tiff(60000, 60000), REFUSED),
    "text that is a bomb": (made_picture(png_text), ANY),
    "cut to 50 %": (lambda: eye()[: len(eye()) // 2], REFUSED),
    "flipped": (lambda: eye()[:60] + bytes([eye()[60] ^ 1]) + eye()[61:], ANY),
    "SVG": (lambda: b"<svg/>", REFUSED),
    "EPS": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n", REFUSED),
    "empty": (lambda: b" ", REFUSED),
}
CASES += [
    Case("imgs.tsv", f"photograph: {k}", photograph(d), a, "P1" if a == REFUSED else None) for k, (d, a) in EYES.items()
]


def tiff(width: int, height: int) -> bytes:
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (278, 4, height),
        (279, 4, 9),
    ]
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(tags)) + body + bytes(4)


TSV_TEXT = {
    "CRLF": (lambda t: t.replace("\n", "\r\n"), READ),
    "BOM": (lambda t: "\ufeff" + t, READ),
    "an id twice": (lambda t: t + t.splitlines()[0] + "\n", REFUSED),
    "no tab": (lambda t: t.replace("\t", " "), REFUSED),
    "an empty id": (lambda t: "\tx\ty\n" + t, REFUSED),
    "a blank line": (lambda t: t + "\n", REFUSED),
    "three images": (lambda t: t.replace("\n", "\tAAAA\n"), REFUSED),
    "other base64": (lambda t: t.replace("-", "+").replace("_", "/"), READ),
    "not base64": (lambda t: t.replace("\t", "\t!", 1).replace("A", "é"), REFUSED),
    "an image missing": (lambda t: t.replace("P1\t", "P7\t"), REFUSED),
    "U+2028 in an id": (lambda t: t + "P\u20288\tAAAA\tAAAA\n", READ),
}
CASES += [Case("imgs.tsv", k, in_text(f), a, "train") for k, (f, a) in TSV_TEXT.items()]
JSONL_TEXT = {
    "CRLF": (lambda t: t.replace("\n", "\r\n"), READ),
    "BOM": (lambda t: "\ufeff" + t, READ),
    "blank lines": (lambda t: t.replace("\n", "\n\n"), READ),
    "U+2028 in a text": (lambda t: t.replace("left", "left\u2028"), READ),
    "a NUL in a text": (lambda t: t.replace("left", "left\\u0000"), ANY),
    "half a surrogate": (lambda t: t.replace("left", "left\\ud800"), ANY),
    "a list": (lambda t: "[1, 2]\n" + t, REFUSED),
    "a number": (lambda t: "3\n" + t, REFUSED),
    "text missing": (lambda t: t.replace('"text":', '"words":'), REFUSED),
    "text is a number": (lambda t: t.replace('"text": "case 0. left eye: first"', '"text": 3'), REFUSED),
    "image_ids is text": (lambda t: t.replace('["P0"]', '"P0"'), REFUSED),
    "an id that is a list": (lambda t: t.replace('["P0"]', "[[1]]"), REFUSED),
    "an id that is true": (lambda t: t.replace('["P0"]', "[true]"), REFUSED),
    "an id that is NaN": (lambda t: t.replace('"text_id": 0', '"text_id": NaN'), REFUSED),
    "an id that is null": (lambda t: t.replace('"text_id": 0', '"text_id": null'), REFUSED),
    "an id of 5,000 digits": (lambda t: t.replace('["P0"]', "[" + "1" * 5000 + "]"), REFUSED),
    "an image that is not there": (lambda t: t.replace('["P0"]', '["../../etc/passwd"]'), REFUSED),
    "no images": (lambda t: t.replace('["P0"]', "[]").replace('["P1"]', "[]"), REFUSED),
    "deep": (lambda t: "[" * 10**5 + "\n", REFUSED),
    "a text of 500 kB": (lambda t: t.replace("left", "left " * 10**5, 1), ANY),
    "UTF-16": (None, REFUSED),
    "Latin-1": (None, REFUSED),
}
for _fault, (_change, _allowed) in JSONL_TEXT.items():
    _code = {"UTF-16": "utf-16", "Latin-1": "latin-1"}.get(_fault)
    _spoil = as_bytes(lambda b, c=_code: b.decode().replace("left", "é").encode(c)) if _code else in_text(_change)
    CASES.append(Case("texts.jsonl", _fault, _spoil, _allowed, "train"))


# ---- volumes with reports


def report_folder(folder: Path, cached: bool) -> Path:
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    for k, split in enumerate(("train", "valid")):
        (folder / split).mkdir()
        rows = []
        for i in range(2 * k, 2 * k + 2):
            array = np.random.default_rng(i).normal(-400, 300, (24, 96, 96)).clip(-1000, 1000).astype(np.int16)
            if cached:
                np.save(folder / split / f"c{i}.npy", array)
            else:
                nifti(folder / split / f"c{i}.nii.gz", array[:12, :24, :24].T, np.diag([-3.0, -3.0, 3.0, 1.0]))
            rows.append([f"c{i}", f"p{i}", f"c{i}.npy", f"case {i}. first", "", i % 2, 1 - i % 2])
        columns = ["series_id", "patient_id", "img_path", "findings", "impression", "first", "second"]
        table = pd.DataFrame(rows, columns=columns)
        if cached:
            table.to_csv(folder / split / "volumes.csv", index=False)
            continue
        name = table["series_id"] + ".nii.gz"
        pd.DataFrame({"VolumeName": name, "Findings_EN": table["findings"], "Impressions_EN": ""}).to_csv(
            folder / split / "reports.csv", index=False)  # fmt: skip
        pd.DataFrame({"VolumeName": name, **table[["first", "second"]]}).to_csv(
            folder / split / "labels.csv", index=False
        )
        pd.DataFrame(
            {"VolumeName": name, "RescaleSlope": 1, "RescaleIntercept": 0, "XYSpacing": "[3, 3]", "ZSpacing": 3}
        ).to_csv(folder / split / "metadata.csv", index=False)
    return folder / "train" / "volumes.csv"


def report_words(folder: Path) -> list:
    return ["--preset", "tiny", "--train-data", folder / "train", "--valid-data", folder / "valid", "--vocab",
            folder / "vocab.txt", "--label-columns", "first", "second", "--num-workers", "0"]  # fmt: skip


def read_reports(path: Path) -> None:
    check_all(train_ctclip.build_datasets(train_ctclip.parse_args(words(*report_words(path.parents[1])))))


READERS["volumes.csv"] = Reader(
    lambda f: report_folder(f, True), read_reports,
    lambda p: ["train_ctclip.py", *report_words(p.parents[1]), "--output-dir", p.parent / "out"],
)  # fmt: skip
READERS["cached volume"] = Reader(lambda f: report_folder(f, True).with_name("c0.npy"), read_reports)
for _kind in ("reports", "labels", "metadata"):
    READERS[f"{_kind} of scans"] = Reader(
        lambda f, k=_kind: report_folder(f, False).with_name(f"{k}.csv"), read_reports
    )
_free = {"last byte gone": ANY}
CASES += table_cases("volumes.csv", {k: REFUSED for k in _gone}, {"first": LABELS})
CASES += [Case("volumes.csv", f"img_path {p[:30]!r}", cell("img_path", p), REFUSED, SHOWN) for p in PATHS[:10]]
CASES += [valid("cached volume"), *byte_cases("cached volume", {"twice in a row": ANY})]
CASES += table_cases("reports of scans")
CASES += table_cases("labels of scans", {k: ANY for k in _gone}, {"first": LABELS}, _gone)
CASES += table_cases(
    "metadata of scans", {k: ANY for k in _gone}, {"RescaleSlope": {"abc": REFUSED, "nan": REFUSED}}, _gone
)
for _fault in ("objects (a pickle)", "one axis", "a NaN", "all NaN", "an empty axis"):
    CASES.append(Case("cached volume", _fault, lambda p, m=BAD_ARRAYS[_fault]: write_npy(p, m()), REFUSED))
CASES.append(Case("cached volume", "another size", lambda p: np.save(p, volume()), REFUSED))
CASES.append(Case("cached volume", "claims 2**40 voxels", NPY_FAULTS["claims 2**40 voxels"], REFUSED))


# ---- the prepare scripts


def prepare_words(path: Path) -> list:
    return ["cache", "--csv", path, "--out", path.parent / "out", "--num-workers", "0"]


def run_prepare_ct(path: Path) -> None:
    assert prepare_ct.main(words(*prepare_words(path))) == 0
    check_no_formula(path.parent / "out" / "volumes.csv")
    inside(path.parent, path.parent / "out")


def check_no_formula(path: Path) -> None:
    for row in table_of(path):
        assert not any(c[:1] in ("=", "+", "@", "\t", "\r") for c in row), row


def inside(folder: Path, out: Path) -> None:
    """Nothing was written beside the output."""
    before = {".target", "t.csv", "metadata.csv", "v0.npz", "v1.npz", "v2.npz", "v3.npz", "p.csv", "pictures"}
    assert {p.name for p in folder.iterdir()} - before <= {out.name}, sorted(folder.iterdir())
    assert all(p.resolve().is_relative_to(out) for p in out.rglob("*"))


READERS["prepare_ct.py"] = Reader(ct_folder, run_prepare_ct, lambda p: ["prepare_ct.py", *prepare_words(p)])
_not = [k for k in BYTE_FAULTS if "flipped" in k or "cut" in k]
CASES += table_cases("prepare_ct.py", without=[*_not, "500 columns"], says="series_id")
CASES += [Case("prepare_ct.py", f"img_path {p[:30]!r}", cell("img_path", p), REFUSED, SHOWN) for p in PATHS]
IDS = {
    "=cmd()": READ,
    "../../x": READ,
    "/etc/x": READ,
    ".hidden": READ,
    "x" * 300: REFUSED,
    "-rf": READ,
    "a\u2028b": READ,
    "a\nb": READ,
    "\x1b[2Jx": READ,
    "@x": READ,
    "case1": REFUSED,
    "CON": READ,
    "é" * 200: ANY,
    "..": READ,
}
CASES += [
    Case("prepare_ct.py", f"series_id {i[:20]!r}", cell("series_id", i), a, "t.csv" if a == READ else i[:9])
    for i, a in IDS.items()
]


def pair_folder(folder: Path) -> Path:
    (folder / "pictures").mkdir()
    rows = []
    for i in range(3):
        (folder / "pictures" / f"{i}.png").write_bytes(eye(i))
        rows.append([f"e{i}", f"pictures/{i}.png", f"pictures/{i}.png", f"case {i}", f"p{i}"])
    columns = ["image_id", "left", "right", "text", "patient"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "p.csv", index=False)
    return folder / "p.csv"


def pair_words(path: Path) -> list:
    return ["--csv", path, "--out", path.parent / "out", "--left-column", "left", "--right-column", "right"]


def run_prepare_pairs(path: Path) -> None:
    code = prepare_retclip.main(words(*pair_words(path)))
    assert code == 0, code
    for file in (path.parent / "out").glob("*labels.csv"):
        check_no_formula(file)
    inside(path.parent, path.parent / "out")


READERS["prepare_retclip.py"] = Reader(pair_folder, run_prepare_pairs, lambda p: ["prepare_retclip.py", *pair_words(p)])
READERS["picture to prepare"] = Reader(
    lambda f: pair_folder(f).parent / "pictures" / "0.png", lambda p: run_prepare_pairs(p.parents[1] / "p.csv")
)
CASES += table_cases("prepare_retclip.py", {"an id twice": ANY, "a column missing": ANY}, without=_not)
CASES += [Case("prepare_retclip.py", f"left {p[:30]!r}", cell("left", p), REFUSED if p else ANY, SHOWN) for p in PATHS]
IDS = {
    "=cmd()": REFUSED,
    "../../x": READ,
    "": REFUSED,
    "a\tb": REFUSED,
    "a\nb": REFUSED,
    "x" * 600: REFUSED,
    "e1": REFUSED,
    "\x1b[2Jx": ANY,
    "a\u2028b": READ,
}
CASES += [Case("prepare_retclip.py", f"image_id {i[:20]!r}", cell("image_id", i), a) for i, a in IDS.items()]
CASES.append(Case("prepare_retclip.py", "text is a formula", cell("text", "=cmd()"), READ))
CASES.append(Case("prepare_retclip.py", "U+2028 in a text", cell("text", "a\u2028b"), READ))
CASES += [
    valid("picture to prepare"),
    *byte_cases("picture to prepare", {"twice in a row": ANY, "last byte gone": ANY}),
]
for _fault, (_data, _allowed) in EYES.items():
    if _fault not in ("text that is a bomb", "animated", "empty", "cut to 50 %"):
        CASES.append(Case("picture to prepare", _fault, lambda p, d=_data: p.write_bytes(d()), _allowed))


# ==== Results ==================================================================================================


def score_folder(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    ids = [f"case{i}" for i in range(12)]
    labels = pd.DataFrame({"id": ids, "first": np.arange(12) % 2, "second": np.arange(12) // 2 % 2})
    probs = pd.DataFrame({"id": ids, "first_prob": rng.random(12), "second_prob": rng.random(12)})
    labels.to_csv(folder / "labels.csv", index=False)
    probs.to_csv(folder / "predictions.csv", index=False)
    results = {"per_label": {"first": {}, "second": {}}, "failed": []}
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "predictions.csv"


def score_words(folder: Path) -> list:
    return ["--predictions", folder / "predictions.csv", "--labels", folder / "labels.csv", "--output", folder / "out",
            "--no-bootstrap"]  # fmt: skip


def read_scores(path: Path) -> None:
    args = evaluate.parse_args(words(*score_words(path.parent)))
    cases = cases_of_files(args)
    assert np.isfinite(cases.probs).all() and not np.isinf(cases.targets).any()
    (path.parent / "out").mkdir()
    write_tables(path.parent / "out", cases)
    check_no_formula(path.parent / "out" / "predictions.csv")
    check_no_formula(path.parent / "out" / "labels.csv")


for _name in ("predictions.csv", "labels.csv"):
    READERS[_name] = Reader(
        lambda f, n=_name: score_folder(f).with_name(n), read_scores, lambda p: ["evaluate.py", *score_words(p.parent)]
    )
PROBS = dict.fromkeys(("2", "-1", "", "nan", "inf", "yes", "1e400", "0x10", "１", "=1", "0,5", "1.0000001"), REFUSED)
PROBS |= dict.fromkeys(("0", "1", " 0.5 ", "1e-300", "5e-1"), READ)
CASES += table_cases("predictions.csv", labels={"first_prob": PROBS}, says="labels.csv")
_comment = {k: REFUSED for k in ("U+2028 in a cell", "a line end in a cell", "a cell of 10 MB", "500 columns")}
CASES += table_cases("labels.csv", _comment, {"first": LABELS})


def formula(path: Path) -> None:
    """The same formula for an id of both tables."""
    for name in ("predictions.csv", "labels.csv"):
        cell("id", '=HYPERLINK("http://x","y")')(path.with_name(name))


CASES += [
    Case("predictions.csv", "an id that is a formula", formula, READ),
    Case("predictions.csv", "an id that the labels do not have", cell("id", "../../etc/passwd"), REFUSED),
    Case("predictions.csv", "an id with line ends", cell("id", "a\nerror: b\n"), REFUSED),
]


def read_results(path: Path) -> None:
    folder = path.parent
    made = report.main(words("--results", path, "--predictions", folder / "predictions.csv", "--labels",
                             folder / "labels.csv", "--out", folder / "report.html"))  # fmt: skip
    assert made == 0


def results_folder(folder: Path) -> Path:
    score_folder(folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        evaluate.main(words(*score_words(folder)))
    shutil.copy(folder / "out" / "results.json", folder / "results.json")
    shutil.rmtree(folder / "out")
    return folder / "results.json"


READERS["results.json"] = Reader(results_folder, read_results, lambda p: ["report.py", "--results", p])
RESULTS = {
    "a list": "[1]",
    "a number": "3",
    "null": "null",
    "deep": "[" * 10**5,
    "other keys": '{"a": 1}',
    "NaN": "NaN",
}
RESULTS |= {
    "labels of text": '{"per_label": "ab", "failed": []}',
    "failed is a number": '{"per_label": {}, "failed": 3}',
}
RESULTS |= {"nothing but labels": '{"per_label": {"first": {}, "second": {}}, "failed": []}', "surrogate": '"\\ud800"'}
RESULTS |= {
    "null labels": '{"per_label": {"first": null}, "failed": []}',
    "no labels": '{"per_label": {}, "failed": []}',
}
RESULTS |= {"a number of 5,000 digits": "1" * 5000, "a formula": '{"per_label": {"=cmd()": {}}, "failed": []}'}
CASES += [valid("results.json"), *byte_cases("results.json", {"last byte gone": ANY})]
CASES += [
    Case("results.json", k, lambda p, t=t: p.write_text(t), REFUSED, ("labels.csv", "predictions.csv"))
    for k, t in RESULTS.items()
]


# ==== Configurations ===========================================================================================


def config_folder(folder: Path) -> Path:
    (folder / "c.yaml").write_text("training:\n  lr: 1.0e-4\n  epochs: 3\n  loss: focal\nlabel_columns: [a, b]\n")
    (folder / "c.ini").write_text("[training]\nlr = 1e-4\nepochs = 3\nloss = focal\n")
    return folder / "c.yaml"


def config_words(path: Path) -> list:
    return ["--config", path, "--csv", "t.csv", "--pretrained", "none"]


def read_config(path: Path) -> None:
    args = finetune_siglip.parse_args(words(*config_words(path)))
    assert args.epochs > 0 and args.lr >= 0


for _name in ("c.yaml", "c.ini"):
    READERS[_name] = Reader(
        lambda f, n=_name: config_folder(f).with_name(n),
        read_config,
        lambda p: ["finetune_siglip.py", *config_words(p)],
    )
    _free = {k: ANY for k in ("last byte gone", "cut to 90 %", "cut to 50 %", "empty", "twice in a row")}
    CASES += [valid(_name), *byte_cases(_name, _free)]
    CASES += [Case(_name, k, TABLE_FAULTS[k][0], a) for k, a in {"BOM": READ, "CRLF": READ, "UTF-16": ANY}.items()]
FLAGS = "--lr", "--epochs"  # errors in values that a flag takes, but the script does not
LAUGHS = "label_columns: [&a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]" + "".join(
    f", &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)
)
MAPS = "a0: &a0 {lr: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 40))
YAML_TEXT = {
    "an unknown key": ("learning_rat: 3\n", REFUSED),
    "lr of text": ("lr: fast\n", REFUSED),
    "lr of a list": ("lr: [1, 2]\n", REFUSED),
    "lr of a map": ("lr: {a: 1}\n", REFUSED),
    "lr NaN": ("lr: .nan\n", REFUSED),
    "lr below 0": ("lr: -1\n", REFUSED),
    "lr 1e400": ("lr: 1e400\n", ANY),
    "epochs 0": ("epochs: 0\n", REFUSED),
    "epochs of a float": ("epochs: 2.5\n", REFUSED),
    "epochs of a date": ("epochs: 2020-01-01\n", REFUSED),
    "epochs in hexadecimal": ("epochs: 0x10\n", ANY),
    "epochs of 5,000 digits": (f"epochs: {'1' * 5000}\n", REFUSED),
    "a flag of text": ("augment: perhaps\n", REFUSED),
    "a flag of a list": ("augment: [1]\n", REFUSED),
    "loss of another": ("loss: mse\n", REFUSED),
    "lists in a list": ("label_columns: [[1], [2]]\n", REFUSED),
    "a map in a list": ("label_columns: [{a: 1}]\n", REFUSED),
    "nothing in a list": ("label_columns: [null]\n", ANY),
    "a Python object": ("lr: !!python/object/apply:os.system [{owned}]\n", REFUSED),
    "a Python name": ("lr: !!python/name:os.system\n", REFUSED),
    "a foreign tag": ("lr: !secret 3\n", REFUSED),
    "binary": ("lr: !!binary aGk=\n", REFUSED),
    "a million laughs": (LAUGHS + "]\n", REFUSED),
    "a million laughs in maps": (MAPS, REFUSED),
    "a map in itself": ("a: &a {b: *a}\n", REFUSED),
    "a list in itself": ("label_columns: &a [*a]\n", REFUSED),
    "a key twice": ("lr: 1\nlr: 2\n", REFUSED),
    "a key in two spellings": ("weight-decay: 1\nweight_decay: 2\n", REFUSED),
    "deep lists": ("lr: " + "[" * 5000 + "]" * 5000 + "\n", REFUSED),
    "deep maps": ("".join(" " * i + f"k{i}:\n" for i in range(1500)), REFUSED),
    "a list": ("- lr\n- 3\n", REFUSED),
    "a word": ("lr\n", REFUSED),
    "a number": ("3\n", REFUSED),
    "two documents": ("lr: 1\n---\nlr: 2\n", REFUSED),
    "a tab": ("training:\n\tlr: 1\n", REFUSED),
    "an open quote": ('loss: "focal\n', REFUSED),
    "an unknown anchor": ("lr: *x\n", REFUSED),
    "a key that is a list": ("[1, 2]: 3\n", REFUSED),
    "a key that is null": ("null: 3\n", REFUSED),
    "another config": ("config: /dev/zero\n", REFUSED),
    "help": ("help: true\n", REFUSED),
    "5 MB": ("# " + "x" * 5 * 10**6 + "\nlr: 1\n", ANY),
    "a merge key": ("base: &b {lr: 1}\ntraining:\n  <<: *b\n", ANY),
}
for _fault, (_text, _allowed) in YAML_TEXT.items():
    CASES.append(
        Case(
            "c.yaml",
            _fault,
            lambda p, t=_text: p.write_text(t.replace("{owned}", json.dumps(owned_by(p)))),
            _allowed,
            FLAGS,
        )
    )
INI_TEXT = {
    "an unknown key": ("[a]\nlearning_rat = 3\n", REFUSED),
    "lr of text": ("[a]\nlr = fast\n", REFUSED),
    "lr NaN": ("[a]\nlr = nan\n", REFUSED),
    "epochs full width": ("[a]\nepochs = １\n", ANY),
    "a flag of text": ("[a]\naugment = perhaps\n", REFUSED),
    "a key twice": ("[a]\nlr = 1\nlr = 2\n", REFUSED),
    "a key in two sections": ("[a]\nlr = 1\n[b]\nlr = 2\n", REFUSED),
    "a section twice": ("[a]\nlr = 1\n[a]\nepochs = 2\n", REFUSED),
    "no sections": ("lr = 1\n", READ),
    "an open section": ("[a\nlr = 1\n", REFUSED),
    "a key without value": ("[a]\nlr\n", REFUSED),
    "interpolation": ("[a]\nlr = %(lr)s\n", REFUSED),
    "a value of two lines": ("[a]\nlr = 1\n  2\n", REFUSED),
    "U+2028 in a value": ("[a]\nloss = focal\u2028\n", ANY),
    "a default section": ("[DEFAULT]\nlr = 1\n[a]\nepochs = 2\n[b]\nloss = focal\n", ANY),
}
for _fault, (_text, _allowed) in INI_TEXT.items():
    CASES.append(Case("c.ini", _fault, lambda p, t=_text: p.write_text(t), _allowed, FLAGS))


# ==== Checkpoints and weights ==================================================================================


def quietly(work: Callable):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return work()


def ct_run(folder: Path) -> Path:
    """A run of finetune_siglip.py of one epoch: run/ with its checkpoints."""
    path, step = ct_folder(folder), ["--batch-size", "2", "--epochs", "1", "--output-dir", folder / "run"]
    quietly(lambda: finetune_siglip.main(words(*ct_words(path), *step)))
    return folder / "run" / finetune_siglip.LAST


def evaluated(path: Path, *given) -> None:
    """The cases that evaluate.py has of a checkpoint."""
    args = evaluate.parse_args(
        words("--test-only", path, "--device", "cpu", "--no-pictures", "--num-workers", 0, *given)
    )
    with common.process_group("cpu") as ctx:
        cases = cases_of_checkpoint(args, ctx)
    assert len(cases.ids) > 0 and not np.isinf(cases.probs).any()


def read_checkpoint(path: Path) -> None:
    evaluated(path, "--csv", path.parents[1] / "t.csv")


def resume_words(path: Path) -> list:
    return [*ct_words(path.parents[1] / "t.csv"), "--batch-size", "2", "--epochs", "2", "--output-dir", path.parent,
            "--resume"]  # fmt: skip


def read_resume(path: Path) -> None:
    finetune_siglip.main(words(*resume_words(path), path))


def read_auto(path: Path) -> None:
    finetune_siglip.main(words(*resume_words(path), "auto"))


READERS["checkpoint"] = Reader(
    ct_run, read_checkpoint, lambda p: ["evaluate.py", "--test-only", p, "--csv", p.parents[1] / "t.csv"]
)
READERS["resumed"] = Reader(ct_run, read_resume, lambda p: ["finetune_siglip.py", *resume_words(p), p])
READERS["resumed by auto"] = Reader(ct_run, read_auto, lambda p: ["finetune_siglip.py", *resume_words(p), "auto"])
# what has changed since the run began is said in a warning: here the folder of its data
CASES += [valid("checkpoint"), valid("resumed", WARNED), valid("resumed by auto", WARNED)]
CASES += byte_cases("checkpoint", {"twice in a row": ANY})
CASES += [
    c for c in byte_cases("resumed") if c.fault in ("cut to 50 %", "missing", "a folder", "a named pipe", "a pickle")
]
CASES += [
    c for c in byte_cases("resumed by auto", {k: READ for k in _gone})
    if c.fault in ("cut to 50 %", *_gone, "a folder", "a named pipe", "a pickle")
]  # fmt: skip


def edited(change: Callable) -> Callable:
    """Another content of a checkpoint, rightly saved: change(checkpoint) alters it, or gives another one."""

    def spoil(path: Path):
        saved = common.load_checkpoint(path)
        torch.save(change(saved) or saved, path)

    return spoil


def put_in(*place_and_value) -> Callable:
    *place, last, value = place_and_value

    def change(saved):
        for key in place:
            saved = saved[key]
        saved[last] = value

    return edited(change)


def without(*place) -> Callable:
    *place, last = place

    def change(saved):
        for key in place:
            saved = saved[key]
        del saved[last]

    return edited(change)


def first_tensor(make: Callable) -> Callable:
    def change(saved):
        key = next(iter(saved["model"]))
        saved["model"][key] = make(saved["model"][key])

    return edited(change)


def entries_flipped(path: Path) -> None:
    """A byte in each entry of the archive."""
    with zipfile.ZipFile(path) as archive:
        entries = [(i.header_offset, i.compress_size) for i in archive.infolist()]
    data = bytearray(path.read_bytes())
    for start, size in entries:
        name, extra = struct.unpack_from("<HH", data, start + 26)
        data[start + 30 + name + extra + size // 2] ^= 1
    path.write_bytes(data)


def one_entry_flipped(number: int) -> Callable:
    def spoil(path: Path):
        with zipfile.ZipFile(path) as archive:
            entry = archive.infolist()[number]
        data = bytearray(path.read_bytes())
        name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
        data[entry.header_offset + 30 + name + extra + entry.compress_size // 2] ^= 1
        path.write_bytes(data)

    return spoil


def torch_bomb(path: Path) -> None:
    """A torch file that is deflated, and inflates to 400 MB."""
    torch.save({"model": {"a": torch.zeros(10)}}, path)
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    name = next(n for n in members if n.endswith("data/0"))
    del members[name]
    pickled = next(n for n in members if n.endswith("data.pkl"))
    members[pickled] = members[pickled].replace(b"K\n", b"J" + struct.pack("<i", 10**8))
    zip_bomb(path, name, b"", 400, members)


class Plain:
    """A class that no reader knows."""


SAVED_FAULTS = {
    "foreign pickle": lambda p: torch.save({"model": Evil(p)}, p),
    "foreign pickle inside": lambda p: edited(lambda s: s["args"].update(x=Evil(p)))(p),
    "foreign pickle in the old format": lambda p: torch.save(Evil(p), p, _use_new_zipfile_serialization=False),
    "a path in args": put_in("args", "x", Path("x")),
    "an array in metrics": put_in("metrics", "x", np.float64(1)),
    "a class of another program": put_in("x", Plain()),
    "a TorchScript archive": lambda p: torch.jit.script(torch.nn.Linear(2, 2)).save(str(p)),
    "entries flipped": entries_flipped,
    **{f"entry {i} flipped": one_entry_flipped(i) for i in (0, 1, 2, 3, 5, -1)},
    "a bomb": torch_bomb,
    "a zip of text": lambda p: zip_of(p, {"x/data.pkl": PAGE, "x/version": b"3"}),
    "a zip without entries": lambda p: zip_of(p, {}),
    "bare weights": edited(lambda s: s["model"]),
    "a list": lambda p: torch.save([1, 2], p),
    "a tensor": lambda p: torch.save(torch.ones(3), p),
    "no task": without("task"),
    "no args": without("args"),
    "no model": without("model"),
    "no class names": without("class_names"),
    "a later format": put_in("format", 99),
    "an unknown task": put_in("task", "os"),
    "a task that is a list": put_in("task", ["siglip"]),
    "args that are text": put_in("args", "abc"),
    "args that are empty": put_in("args", {}),
    "args of numbers": edited(lambda s: s["args"].update({1: 2})),
    "a model that is text": put_in("model", "abc"),
    "a model that is empty": put_in("model", {}),
    "a model of numbers": put_in("model", {"a": 1}),
    "a model of lists": edited(lambda s: s["model"].update(dict.fromkeys(s["model"], [1.0]))),
    "ema that is text": put_in("ema", "abc"),
    "class names of numbers": put_in("class_names", [1, 2]),
    "class names that are text": put_in("class_names", "ab"),
    "thresholds that are text": put_in("thresholds", "abc"),
    "thresholds of another number": put_in("thresholds", [0.5] * 7),
    "temperatures of lists": put_in("temperatures", [[1], [2]]),
    "versions that are text": put_in("versions", "abc"),
    "a tensor missing": edited(lambda s: [s["model"].pop(next(iter(s["model"])))] and None),
    "a tensor too many": put_in("model", "extra", torch.ones(2)),
    "a tensor of another shape": first_tensor(lambda t: torch.ones(3, 3)),
    "a tensor of no axis": first_tensor(lambda t: torch.tensor(1.0)),
    "a tensor of integers": first_tensor(lambda t: t.long()),
    "a complex tensor": first_tensor(lambda t: t.to(torch.complex64)),
    "a sparse tensor": first_tensor(lambda t: t.to_sparse()),
    "a tensor on the meta device": first_tensor(lambda t: t.to("meta")),
    "NaN": first_tensor(lambda t: torch.full_like(t, float("nan"))),
    "an unknown architecture": put_in("args", "model_config", {"family": "none"}),
    "a config of text": put_in("args", "model_config", "abc"),
    "a width of text": put_in("args", "model_config", "width", "x"),
    "a width below 0": put_in("args", "model_config", "width", -8),
    "a width of 0": put_in("args", "model_config", "width", 0),
    "a width of 2**40": put_in("args", "model_config", "width", 2**40),
    "2**40 layers": put_in("args", "model_config", "layers", 2**40),
    "a width of 60,000": put_in("args", "model_config", "width", 61440),
    "slices of text": put_in("args", "num_slices", "x"),
    "image size of a list": put_in("args", "image_size", [1, 2]),
    "image size below 0": put_in("args", "image_size", -32),
    "labels of numbers": put_in("args", "label_columns", [1, 2]),
    "no labels": put_in("args", "label_columns", []),
    "another label": put_in("args", "label_columns", ["first", "third"]),
    "args that lead out": put_in("args", "data_root", "/nowhere"),
    "windows of text": put_in("args", "windows", "abc"),
    "batch size of text": put_in("args", "batch_size", "x"),
}
_maybe = (
    "a tensor of integers",
    "args that lead out",
    "no class names",
    "args of numbers",
    "versions that are text",
    "NaN",
    "temperatures of lists",
)
_maybe += ("class names of numbers", "class names that are text", "thresholds of another number")
for _fault, _spoil in SAVED_FAULTS.items():
    CASES.append(
        Case(
            "checkpoint",
            _fault,
            _spoil,
            ANY if _fault in _maybe else REFUSED,
            ("t.csv", "not an option", "finite", "in training"),
        )
    )
RUN_FAULTS = {
    "foreign pickle": (SAVED_FAULTS["foreign pickle"], REFUSED),
    "no state": (without("state"), REFUSED),
    "state that is text": (put_in("state", "abc"), REFUSED),
    "state that is empty": (put_in("state", {}), REFUSED),
    "no step": (without("state", "step"), REFUSED),
    "no best list": (without("state", "best"), REFUSED),
    "no global batch": (without("state", "global_batch"), REFUSED),
    "step of text": (put_in("state", "step", "x"), REFUSED),
    "step below 0": (put_in("state", "step", -5), REFUSED),
    "best list of text": (put_in("state", "best", "abc"), REFUSED),
    "best that leads out": (
        put_in("state", "best", [{"score": 1.0, "step": 1, "path": "../../../../etc/passwd"}]),
        WARNED,
    ),
    "no optimizer": (without("optimizer"), REFUSED),
    "optimizer that is text": (put_in("optimizer", "abc"), REFUSED),
    "optimizer that is empty": (put_in("optimizer", {}), REFUSED),
    "optimizer of another model": (edited(lambda s: s["optimizer"]["param_groups"][0]["params"].append(99)), REFUSED),
    "no scaler": (without("scaler"), REFUSED),
    "no args": (without("args"), REFUSED),
    "args that are empty": (put_in("args", {}), REFUSED),
    "a tensor missing": (SAVED_FAULTS["a tensor missing"], REFUSED),
    "a tensor of another shape": (SAVED_FAULTS["a tensor of another shape"], REFUSED),
    "a model config of text": (put_in("args", "model_config", "abc"), REFUSED),
    "another model": (put_in("args", "model_config", "width", 128), REFUSED),
    "another global batch": (put_in("state", "global_batch", 7), REFUSED),
}
for _fault, (_spoil, _allowed) in RUN_FAULTS.items():
    _says = {"another global batch": "global batch", "another model": "last"}.get(_fault)
    CASES.append(Case("resumed", _fault, _spoil, _allowed, _says))


def cut_with_previous(path: Path) -> None:
    shutil.copy(path, common.previous_of(path))
    as_bytes(lambda b: b[: len(b) // 2])(path)


CASES.append(Case("resumed by auto", "the last is cut, one before is whole", cut_with_previous, WARNED))


# ---- checkpoints of the other scripts


def saved_by(script, make_data: Callable, given: Callable) -> Callable:
    """A checkpoint of an untrained model of a script, beside its data."""

    def make(folder: Path) -> Path:
        make_data(folder)
        args = script.parse_args(words(*given(folder), "--output-dir", folder / "out"))
        quietly(lambda: script.build_datasets(args))
        model = quietly(lambda: script.build_model(args, lambda text: None))
        common.save_checkpoint(folder / "c.pt", common.model_checkpoint(script.TASK, args, model, {}))
        common.save_weights(folder / "w.pth", script.export_weights(model))
        return folder / "c.pt"

    return make


OTHERS = {  # data, the script's words, evaluate.py's words
    run_task2: (lambda f: slice_folder(f), slice_words, lambda f: ["--slice-dir", f, "--split", "valid"]),
    train_ctclip: (lambda f: report_folder(f, True), report_words, lambda f: ["--valid-data", f / "valid"]),
    train_retclip: (fundus_folder, lambda f: fundus_words(f, "train"), lambda f: ["--valid-data", f / "val"]),
    train_csi: (film_folder, film_words, lambda f: ["--csv", f / "labels.csv", "--image-dir", f / "images"]),
}
OTHER_FAULTS = [
    "args that are text",
    "args that are empty",
    "a model that is empty",
    "a tensor missing",
    "a tensor of another shape",
    "ema that is text",
    "labels of numbers",
    "no labels",
]
OWN_ARGS = {  # arguments that say what the model is
    run_task2: [("model", "vgg"), ("model", 3), ("image_size", "x"), ("window_values", "x"), ("aggregate", "x")],
    train_ctclip: [("model_config", None), ("model_config", {"size": [1]}), ("model_config", "abc")],
    train_retclip: [("model_config", None), ("model_config", {"image_size": 16}), ("templates", "/etc/passwd")],
    train_csi: [("model", "vgg"), ("image_size", "x"), ("loss", "x"), ("num_classes", "x"), ("mean", "x")],
}
for _script, (_data, _given, _words) in OTHERS.items():
    _name = f"checkpoint of {_script.TASK}"
    READERS[_name] = Reader(
        saved_by(_script, _data, _given), lambda p, w=_words: evaluated(p, *w(p.parent)),
        lambda p, w=_words: ["evaluate.py", "--test-only", p, *w(p.parent)],
    )  # fmt: skip
    CASES.append(valid(_name))
    for _fault in OTHER_FAULTS:
        if (_script, _fault) not in [(train_retclip, "labels of numbers"), (train_retclip, "no labels")]:
            CASES.append(Case(_name, _fault, SAVED_FAULTS[_fault], REFUSED, "not an option"))
    for _key, _value in OWN_ARGS[_script]:
        CASES.append(
            Case(_name, f"{_key} {_value!r}", put_in("args", _key, _value), REFUSED, ("passwd", "in training"))
        )


# ---- weights


def weight_args(script, path: Path):
    folder = path.parent
    given = {finetune_siglip: lambda f: [*ct_words(f / "t.csv"), "--pretrained", path]}
    given |= {s: (lambda f, g=g: [*g(f), "--pretrained", path]) for s, (_, g, _) in OTHERS.items()}
    given[train_ctclip] = lambda f: [*report_words(f), "--pretrained", path]
    return script.parse_args(words(*given[script](folder), "--output-dir", folder / "out"))


def read_weights(script) -> Callable:
    def read(path: Path):
        args = weight_args(script, path)
        if script is run_task2:
            script.build_datasets(args)  # says what the pixels are
        model = script.build_model(args, lambda text: None)
        assert all(torch.isfinite(v).all() for v in model.state_dict().values() if v.is_floating_point())

    return read


def weights_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def resaved(change: Callable) -> Callable:
    def spoil(path: Path):
        state = common.load_weights(str(path))
        common.save_weights(path, change(state))

    return spoil


WEIGHT_FAULTS = {
    "foreign pickle": (lambda p: torch.save({"a": Evil(p)}, p), REFUSED),
    "of no axis": (resaved(lambda s: {k: torch.tensor(1.0) for k in s}), REFUSED),
    "of one axis": (resaved(lambda s: {k: torch.ones(7) for k in s}), REFUSED),
    "empty tensors": (resaved(lambda s: {k: torch.ones(0) for k in s}), REFUSED),
    "half of them": (resaved(lambda s: dict(list(s.items())[: len(s) // 2])), REFUSED),
    "only the first": (resaved(lambda s: dict(list(s.items())[:1])), REFUSED),
    "only the last": (resaved(lambda s: dict(list(s.items())[-1:])), REFUSED),
    "transposed": (resaved(lambda s: {k: v.T.contiguous() if v.ndim == 2 else v for k, v in s.items()}), REFUSED),
    "of another program": (resaved(lambda s: {f"x.{k}.y": v for k, v in s.items()}), REFUSED),
    "NaN": (resaved(lambda s: {k: v * float("nan") if v.is_floating_point() else v for k, v in s.items()}), REFUSED),
    "text for tensors": (lambda p: torch.save({"a": "b"}, p), REFUSED),
    "keys that are numbers": (lambda p: torch.save({1: torch.ones(2)}, p), REFUSED),
    "in a list": (lambda p: torch.save([torch.ones(2)], p), REFUSED),
}
_convs = run_task2, train_csi  # no matrix in their backbones
for _script in (finetune_siglip, *OTHERS):
    _name = f"weights of {_script.TASK}"
    if _script is finetune_siglip:
        _make = saved_by(_script, ct_folder, lambda f: ct_words(f / "t.csv"))
    else:
        _make = saved_by(_script, *OTHERS[_script][:2])
    READERS[_name] = Reader(lambda f, m=_make: m(f).with_name("w.pth"), read_weights(_script))
    CASES.append(valid(_name))
    for _fault, (_spoil, _allowed) in WEIGHT_FAULTS.items():
        CASES.append(
            Case(_name, _fault, _spoil, ANY if _fault == "transposed" and _script in _convs else _allowed, "vocab")
        )
CASES += byte_cases("weights of siglip", {"twice in a row": ANY})
CASES += [Case("weights of siglip", k, SAVED_FAULTS[k], REFUSED) for k in (
    "foreign pickle in the old format", "a class of another program", "a TorchScript archive", "a bomb", "a tensor",
    "a zip of text", "a zip without entries") if k != "a class of another program"]  # fmt: skip


def other_form(suffix: str, write: Callable) -> Callable:
    """The weights of SigLIP in another kind of file."""

    def make(folder: Path) -> Path:
        saved_by(finetune_siglip, ct_folder, lambda f: ct_words(f / "t.csv"))(folder)
        path = folder / f"w{suffix}"
        write(path, weights_of(folder / "w.pth"))
        return path

    return make


def write_shards(path: Path, state: dict) -> None:
    """A Hugging Face folder of two files and their index."""
    path.mkdir()
    keys, places = list(state), {}
    for i, part in enumerate((keys[::2], keys[1::2])):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        safetensors.torch.save_file({k: state[k] for k in part}, path / name)
        places |= dict.fromkeys(part, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


FORMS = {
    "weights.safetensors": (".safetensors", lambda p, s: safetensors.torch.save_file(s, p)),
    "weights.npz": (".npz", lambda p, s: np.savez(p, **{k: v.numpy() for k, v in s.items()})),
    "weights folder": ("", write_shards),
}
for _name, (_suffix, _write) in FORMS.items():
    READERS[_name] = Reader(other_form(_suffix, _write), read_weights(finetune_siglip))
    CASES.append(valid(_name))
_pth = [k for k in BYTE_FAULTS if k not in ("a device", "link to itself", "head flipped")]
CASES += byte_cases("weights.safetensors", {"tail flipped": ANY})
CASES += byte_cases("weights.npz", {"twice in a row": ANY}, ["a device", "link to itself"])


def tensors_file(header, data=bytes(64), length=None) -> Callable:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return lambda path: path.write_bytes(struct.pack("<Q", size) + text + data)


def entry(shape, start, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


SAFETENSORS = {
    "header of 2**60 bytes": tensors_file(b"{}", length=2**60),
    "header of 90 MB": tensors_file(b"{}", length=90 * 10**6),
    "header that is no JSON": tensors_file(b"{'a': 1}"),
    "header that is a list": tensors_file([1, 2]),
    "header that is deep": tensors_file(b'{"a":' + b"[" * 10**5),
    "no tensors": tensors_file({}, b""),
    "tensors that overlap": tensors_file({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, bytes(24)),
    "tensors with a gap": tensors_file({"a": entry([4], 0, 16), "b": entry([4], 32, 48)}, bytes(48)),
    "offsets behind the end": tensors_file({"a": entry([2**38], 0, 2**40)}),
    "offsets below 0": tensors_file({"a": entry([4], -16, 0)}),
    "an axis below 0": tensors_file({"a": entry([-4], 0, 16)}),
    "an unknown type": tensors_file({"a": entry([4], 0, 16, "F99")}, bytes(16)),
    "a shape that is too large": tensors_file({"a": entry([2**63, 2], 0, 16)}, bytes(16)),
    "bytes too many": tensors_file({"a": entry([4], 0, 16)}, bytes(99)),
    "a pickle": lambda p: p.write_bytes(pickle.dumps(Evil(p))),
}
CASES += [Case("weights.safetensors", k, f, REFUSED) for k, f in SAFETENSORS.items() if k != "a pickle"]
CASES += [
    Case("weights.npz", "a bomb", lambda p: zip_bomb(p, "a.npy", npy_header((100 * 10**6,), "<f4"), 400), REFUSED),
    Case(
        "weights.npz",
        "claims 2**40 numbers",
        lambda p: zip_of(p, {"a.npy": npy_header((2**40,), "<f4") + bytes(99)}),
        REFUSED,
    ),
    Case("weights.npz", "objects", lambda p: np.savez(p, a=np.array([Evil(p)], object)), REFUSED),
    Case("weights.npz", "text", lambda p: np.savez(p, a=np.array(["a"])), REFUSED),
    Case("weights.npz", "no arrays", lambda p: zip_of(p, {}), REFUSED),
    Case("weights.npz", "a member that leads out", lambda p: zip_of(p, {"../../../etc/x.npy": NOISE}), REFUSED),
]


def in_folder(name: str, spoil: Callable) -> Callable:
    return lambda folder: spoil(folder / name)


INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
FOLDERS = {
    "a shard is missing": in_folder(SHARD, Path.unlink),
    "a shard is cut": in_folder(SHARD, as_bytes(lambda b: b[: len(b) // 2])),
    "a shard is a named pipe": in_folder(SHARD, instead(os.mkfifo)),
    "the index is no JSON": in_folder(INDEX, lambda p: p.write_text("{")),
    "the index is a list": in_folder(INDEX, lambda p: p.write_text("[1]")),
    "the index has no map": in_folder(INDEX, lambda p: p.write_text("{}")),
    "the index leads out": in_folder(INDEX, lambda p: p.write_text('{"weight_map": {"a": "../../../etc/passwd"}}')),
    "the index names numbers": in_folder(INDEX, lambda p: p.write_text('{"weight_map": {"a": 3}}')),
    "no weights in it": lambda p: [f.unlink() for f in p.iterdir()],
    "config.json is no JSON": in_folder("config.json", lambda p: p.write_text("{")),
    "config.json is a list": in_folder("config.json", lambda p: p.write_text("[1]")),
    "config.json has 0 heads": in_folder("config.json", lambda p: p.write_text('{"num_attention_heads": 0}')),
    "config.json has heads of text": in_folder("config.json", lambda p: p.write_text('{"num_attention_heads": "x"}')),
    "config.json has 7 heads": in_folder("config.json", lambda p: p.write_text('{"num_attention_heads": 7}')),
    "config.json is a folder": in_folder("config.json", Path.mkdir),
}
_free = {"config.json is a folder": ANY, "the index has no map": ANY}
CASES += [Case("weights folder", k, f, _free.get(k, REFUSED), "w") for k, f in FOLDERS.items()]


# ---- tokenizers


def tokenizer_file(folder: Path) -> Path:
    (folder / "vocab.txt").write_text("\n".join(VOCAB))
    common.load_tokenizer(folder / "vocab.txt").save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def read_tokenizer(path: Path) -> None:
    ids = common.load_tokenizer(path).encode("case 1. left eye").ids
    assert len(ids) > 2


READERS["tokenizer.json"] = Reader(tokenizer_file, read_tokenizer)
TOKENIZERS = {"a list": "[1]", "null": "null", "deep": "[" * 10**5, "no model": '{"version": "1.0"}', "a number": "3"}
CASES += [valid("tokenizer.json"), *byte_cases("tokenizer.json", {"last byte gone": ANY})]
CASES += [Case("tokenizer.json", k, lambda p, t=t: p.write_text(t), REFUSED) for k, t in TOKENIZERS.items()]
CASES += [
    Case(
        "tokenizer.json", "a model of another kind", in_text(lambda t: t.replace('"WordPiece"', '"Unigram"')), REFUSED
    ),
    Case("tokenizer.json", "an unknown piece", in_text(lambda t: t.replace('"BertNormalizer"', '"Evil"')), ANY),
    Case(
        "tokenizer.json",
        "ids that are text",
        in_text(lambda t: t.replace('"[PAD]": 0', '"[PAD]": "x"').replace('"[PAD]":0', '"[PAD]":"x"')),
        REFUSED,
    ),
]
