"""CT volumes: one tensor from every format and orientation, values, damaged and hostile files, sampling."""

import gzip
import itertools
import os
import pickle
import struct
import tracemalloc
import zipfile

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED

import common
from common import UserError, group_of, read_volume, sample_volume, volume_options

SPACING = (2.5, 0.75, 0.5)
CODES = ["".join(c) for p in itertools.permutations(["SI", "PA", "LR"]) for c in itertools.product(*p)]
REAL = sorted((SHARED / "data" / "ct").glob("*.nii.gz"))
needs_real = pytest.mark.skipif(not REAL, reason=f"no CT volumes at {SHARED / 'data' / 'ct'}")


def chest(shape=(12, 20, 24), seed=0) -> np.ndarray:
    """(D, H, W) int16 HU: air, a body of soft tissue with fat, two lungs; no symmetry."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    noise = np.random.default_rng(seed).normal(0, 12, shape)
    volume = np.where(y**2 + x**2 < 0.8, 40, -1000)
    volume = np.where((np.abs(x) - 0.4) ** 2 * 3 + y**2 + z**2 * 0.4 < 0.25, -850, volume)
    volume = np.where((y > 0.5) & (volume > 0), 700, volume)  # the spine, behind
    return (volume + 30 * z + 20 * x + noise).astype(np.int16)


def save_nifti(path, volume, axes="LPS", spacing=SPACING, affine=None, **header):
    """Write a (D, H, W) = S, P, L volume with the array axes pointing along `axes`."""
    array = common._reorient(volume, "SPL", axes)
    if affine is None:
        affine = np.zeros((4, 4))
        for i, a in enumerate(axes):
            world = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}[a]
            affine[world, i] = spacing["SPL".index({"I": "S", "A": "P", "R": "L"}.get(a, a))] * (
                1 if a in "RAS" else -1
            )
        affine[:, 3] = [-100, 50, 7, 1]
    image = nib.Nifti1Image(array, affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


def refused(path, **options) -> str:
    with pytest.raises(UserError) as e:
        read_volume(path, **options)
    message = str(e.value)
    assert path.name in message and "\n" not in message
    return message


# ---- formats and orientation


@pytest.mark.parametrize("axes", CODES)
def test_all_48_orientations_give_the_same_tensor(tmp_path, axes):
    volume = chest()
    got = read_volume(save_nifti(tmp_path / "v.nii", volume, axes))
    np.testing.assert_array_equal(got.array, volume)
    assert got.array.dtype == np.int16 and got.array.flags.c_contiguous
    assert got.spacing == SPACING and got.notes == (f"stored axes {axes}",)


@pytest.mark.parametrize("axes", ["LPS", "RAS", "LPI", "SAR"])
def test_orientation_agrees_with_nibabel(tmp_path, axes):
    path = save_nifti(tmp_path / "v.nii.gz", chest(), axes)
    ras = nib.as_closest_canonical(nib.load(path)).get_fdata()  # (X, Y, Z) increasing toward R, A, S
    np.testing.assert_array_equal(read_volume(path).array, ras.transpose(2, 1, 0)[:, ::-1, ::-1])


def test_orientation_of_the_result_can_be_chosen(tmp_path):
    path = save_nifti(tmp_path / "v.nii", chest(), "LPI")
    volume = read_volume(path, orientation="RAS")
    np.testing.assert_array_equal(volume.array, nib.as_closest_canonical(nib.load(path)).get_fdata())
    assert volume.spacing == SPACING[::-1]


def test_oblique_affine_takes_the_nearest_axes(tmp_path):
    turn = np.deg2rad(15)
    tilt = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.diag([-0.5, -0.75, 2.5])
    got = read_volume(save_nifti(tmp_path / "v.nii.gz", chest(), "LPS", affine=affine))
    np.testing.assert_array_equal(got.array, chest())
    assert got.spacing == SPACING


def test_every_format_gives_the_same_bits(tmp_path):
    volume = chest()
    save_nifti(tmp_path / "a.nii", volume)
    save_nifti(tmp_path / "b.nii.gz", volume, "RAS")
    np.savez_compressed(tmp_path / "c.npz", image=volume[None], spacing=np.float32(SPACING))
    np.savez(tmp_path / "d.npz", image=volume.astype(np.float32), spacing=np.array(SPACING))
    np.savez(tmp_path / "e.npz", image=np.asfortranarray(volume[None]))
    np.savez(tmp_path / "f.npz", image=np.stack([volume, volume + 1]))
    np.save(tmp_path / "g.npy", volume)
    np.save(tmp_path / "h.npy", volume[None].astype(">i2"))
    np.save(tmp_path / "i.npy", volume.astype(np.float64) + 0.2)
    np.savez(tmp_path / "j.npz", image=((volume.astype(np.float64).clip(-1000, 1500) + 1000) / 2500)[None])
    for path in sorted(tmp_path.iterdir()):
        got = read_volume(path, spacing=None if path.name[0] in "abcd" else SPACING)
        assert got.array.shape == volume.shape and got.array.dtype == np.int16, path.name
        wanted = volume.clip(-1000, 1500) if path.name[0] == "j" else volume
        np.testing.assert_array_equal(got.array, wanted, err_msg=path.name)
        assert got.spacing == SPACING
    assert read_volume(tmp_path / "f.npz").notes == ("channel 0 of 2",)


def test_files_of_the_original_tool_are_depth_last_and_ras(tmp_path):
    volume = chest((12, 20, 20))
    ras = common._reorient(volume, "SPL", "RAS")  # (X, Y, Z) as MONAI Orientationd(axcodes="RAS") leaves it
    unit = ((ras.clip(-1000, 1500) + 1000) / 2500).astype(np.float16)
    np.savez_compressed(tmp_path / "v.npz", image=unit[None])
    got = read_volume(tmp_path / "v.npz", layout="CHWD").array
    assert got.shape == volume.shape and np.abs(got - volume.astype(int).clip(-1000, 1500)).max() <= 1
    notes = read_volume(tmp_path / "v.npz").notes  # read as CDHW: 20 x 20 x 12
    assert any("depth last" in n for n in notes)


def test_a_cached_npy_is_mapped_not_loaded(tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((64, 256, 256), np.int16))
    tracemalloc.start()
    volume = read_volume(tmp_path / "v.npy")
    sample_volume(volume.array, None, 2, 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(volume.array, np.memmap) and peak < 2**20  # the file has 8 MiB


# ---- values


def test_float_values_are_rounded_and_clipped(tmp_path):
    volume = chest().astype(np.float32)
    volume[0, 0, :6] = [0.5, 1.5, -0.6, 40000, -40000, 2.4]
    np.savez(tmp_path / "v.npz", image=volume)
    assert read_volume(tmp_path / "v.npz").array[0, 0, :6].tolist() == [0, 2, -1, 32767, -32768, 2]


def test_header_scaling_is_applied_once_and_metadata_not_on_top(tmp_path):
    stored = (chest().astype(np.int32) + 1024).clip(0).astype(np.int16)
    path = save_nifti(tmp_path / "v.nii.gz", stored, scl_slope=1, scl_inter=-1024)
    with gzip.open(path) as file:  # nibabel resets the two fields on saving: write them ourselves
        raw = bytearray(file.read())
    raw[112:120] = struct.pack("<ff", 1, -1024)
    path.write_bytes(gzip.compress(bytes(raw)))
    plain, twice = read_volume(path), read_volume(path, rescale=(1, -1024))
    np.testing.assert_array_equal(plain.array, stored - 1024)
    np.testing.assert_array_equal(twice.array, plain.array)
    assert any("not applied after the header's scaling" in n for n in twice.notes)
    assert not any("warning" in n for n in plain.notes)


def padded(volume, value):
    """The corners outside a round field of view, as scanners fill them: 21 % of each slice."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in volume.shape[1:]), indexing="ij")
    return np.where(y**2 + x**2 > 1, value, volume).astype(np.int16)


@pytest.mark.parametrize("pad", [None, -2000, -3024])
@pytest.mark.parametrize("intercept", [-1000, -1024, -8192])
def test_stored_values_are_rescaled_and_hu_are_not(tmp_path, pad, intercept):
    """Both CT-RATE releases beside the same metadata: v1 files hold stored values, v2 files HU."""
    hu = chest((24, 48, 48)).clip(-1000)
    hu = hu if pad is None else padded(hu, max(pad, intercept))  # stored values of CT-RATE begin at 0
    path = save_nifti(tmp_path / "v2.nii.gz", hu)
    got = read_volume(path, rescale=(1, intercept))
    np.testing.assert_array_equal(got.array, hu)
    assert any("the values are HU already" in n for n in got.notes)
    assert not any("warning" in n for n in read_volume(path).notes)

    stored = (hu.astype(int) - intercept).astype(np.int16)
    path = save_nifti(tmp_path / "v1.nii.gz", stored)
    got = read_volume(path, rescale=(1.0, float(intercept)))
    np.testing.assert_array_equal(got.array, hu)
    assert not any("warning" in n for n in got.notes)
    assert any("looks like stored values" in n for n in read_volume(path).notes)


def test_signed_stored_values_with_padding_below_zero(tmp_path):
    hu = padded(chest((24, 48, 48)).clip(-1000), -3024)  # stored -2000 with intercept -1024, as GE does
    path = save_nifti(tmp_path / "v.nii.gz", hu + 1024)
    np.testing.assert_array_equal(read_volume(path, rescale=(1, -1024)).array, hu)
    assert any("looks like stored values" in n for n in read_volume(path).notes)


def test_hu_are_recognised_in_crops_without_air_and_with_much_contrast(tmp_path):
    rng = np.random.default_rng(0)
    soft = rng.choice([-110, 40, 60], (12, 20, 24), p=[0.3, 0.4, 0.3]) + rng.normal(0, 20, (12, 20, 24))
    bright = rng.choice([-850, 40, 1200], (12, 20, 24), p=[0.5, 0.4, 0.1])
    for hu in (soft, bright):
        path = save_nifti(tmp_path / "v.nii", hu.astype(np.int16))
        np.testing.assert_array_equal(read_volume(path, rescale=(1, -1024)).array, hu.astype(np.int16))
        path = save_nifti(tmp_path / "v.nii", hu.astype(np.int16) + 1024)
        np.testing.assert_array_equal(read_volume(path, rescale=(1, -1024)).array, hu.astype(np.int16))


def test_the_value_range_can_be_insisted_on(tmp_path):
    path = save_nifti(tmp_path / "v.nii.gz", chest())
    np.testing.assert_array_equal(read_volume(path, rescale=(1, -1024), value_range="hu").array, chest())
    np.testing.assert_array_equal(read_volume(path, rescale=(1, -1024), value_range="stored").array, chest() - 1024)
    np.savez(tmp_path / "v.npz", image=chest() / 1000)  # CT-CLIP's own scale
    assert "neither HU nor 0-1" in refused(tmp_path / "v.npz")
    assert read_volume(tmp_path / "v.npz", value_range="hu").array.min() == -1
    np.savez(tmp_path / "u.npz", image=np.ones((2, 2, 2), np.uint8))
    assert read_volume(tmp_path / "u.npz", value_range="unit").array.max() == 1500


def test_spacing_of_the_metadata_wins_and_says_so(tmp_path):
    path = save_nifti(tmp_path / "v.nii", chest(), spacing=(1, 1, 1))
    got = read_volume(path, spacing=SPACING)
    assert got.spacing == SPACING and any("another spacing" in n for n in got.notes)
    assert "not three millimetres" in refused(path, spacing=(1, 0, 1))
    assert "not three millimetres" in refused(path, spacing=(1, float("nan"), 1))


def test_missing_orientation_is_noted(tmp_path):
    path = save_nifti(tmp_path / "v.nii", chest())
    raw = bytearray(path.read_bytes())
    raw[252:256] = struct.pack("<hh", 0, 0)  # qform_code, sform_code
    path.write_bytes(raw)
    assert any("no orientation" in n for n in read_volume(path).notes)


# ---- damaged and hostile files


def test_headers_are_believed_only_up_to_the_cap(tmp_path):
    """Files that claim 2**40 voxels are refused by name, shape and cap, with next to no memory."""
    nii = bytearray(save_nifti(tmp_path / "a.nii", chest()).read_bytes())
    nii[40:48] = struct.pack("<hhhh", 3, 16384, 16384, 4096)
    (tmp_path / "a.nii").write_bytes(nii)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(bytes(nii)))
    header = b"{'descr': '<i2', 'fortran_order': False, 'shape': (4096, 16384, 16384), }".ljust(117) + b"\n"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    (tmp_path / "c.npy").write_bytes(npy)
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("image.npy", npy)
    tracemalloc.start()
    for path in sorted(tmp_path.iterdir()):
        message = refused(path)
        assert "16384" in message and "1.1e+12" in message and "1e+09" in message
        assert "--max-voxels" in message and "PLAINSCAN_MAX_VOXELS" in message
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    assert read_volume(save_nifti(tmp_path / "e.nii", chest()), max_voxels=chest().size).array.shape == chest().shape
    assert "over the cap" in refused(tmp_path / "e.nii", max_voxels=chest().size - 1)


def test_a_file_that_holds_less_than_it_claims_costs_no_memory(tmp_path):
    nii = bytearray(save_nifti(tmp_path / "a.nii", chest()).read_bytes())
    nii[40:48] = struct.pack("<hhhh", 3, 1000, 1000, 900)  # under the cap, 1.8 GB
    (tmp_path / "a.nii").write_bytes(nii)
    before = int(open("/proc/self/statm").read().split()[1]) if os.path.exists("/proc/self/statm") else 0
    assert "it ends after" in refused(tmp_path / "a.nii")
    if before:
        assert int(open("/proc/self/statm").read().split()[1]) - before < 25_000  # pages: 100 MB


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz", "v.npz", "v.npy"])
def test_cut_and_garbled_files_are_one_line(tmp_path, name):
    path = tmp_path / name
    if ".nii" in name:
        save_nifti(path, chest())
    else:
        np.savez_compressed(path, image=chest()[None]) if name.endswith("z") else np.save(path, chest())
    whole = path.read_bytes()
    for length in (0, 3, 100, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "damaged" in refused(path)
    path.write_bytes(b"\x00" * len(whole))
    assert "damaged" in refused(path)
    rng = np.random.default_rng(0)
    for _ in range(60):  # whatever a flipped byte does, it never ends in a traceback
        garbled = bytearray(whole)
        garbled[rng.integers(min(len(whole), 400))] ^= int(rng.integers(1, 256))
        path.write_bytes(garbled)
        try:
            read_volume(path, max_voxels=10**6)
        except UserError as e:
            assert name in str(e) and "\n" not in str(e)


@pytest.mark.parametrize("compress", [True, False])
def test_checksums_catch_a_flipped_voxel(tmp_path, compress):
    (np.savez_compressed if compress else np.savez)(tmp_path / "v.npz", image=chest())
    raw = bytearray((tmp_path / "v.npz").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "v.npz").write_bytes(raw)
    refused(tmp_path / "v.npz")
    for volume in (chest(), np.random.default_rng(0).integers(-999, 999, (40, 90, 90)).astype(np.int16)):
        path = save_nifti(tmp_path / "v.nii.gz", volume)  # the second is longer than a read-ahead
        raw = bytearray(path.read_bytes())
        raw[-6] ^= 1  # the checksum of the gzip trailer
        path.write_bytes(raw)
        refused(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-went-off",)


def test_pickles_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("v.npy", np.array([[[Bomb()]]], object), allow_pickle=True)
    np.savez("v.npz", image=np.array([[[Bomb()]]], object))
    (tmp_path / "w.npy").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "w.npz").write_bytes(pickle.dumps(Bomb()))
    for name in ("v.npy", "v.npz", "w.npy", "w.npz"):
        assert "damaged" in refused(tmp_path / name)
    assert not os.path.exists("bomb-went-off")


@pytest.mark.parametrize(
    "array, said",
    [
        (np.zeros((4, 4), np.int16), "was expected"),
        (np.zeros((1, 1, 4, 4, 4), np.int16), "was expected"),
        (np.zeros((0, 4, 4), np.int16), "was expected"),
        (np.zeros((40, 48, 48, 1), np.int16), "channel first"),
        (np.zeros((4, 4, 4), complex), "integers or floats"),
        (np.full((4, 4, 4), "x"), "integers or floats"),
        (np.zeros((4, 4, 4), bool), "integers or floats"),
        (np.full((4, 4, 4), np.nan), "NaN"),
        (np.where(np.arange(64) == 9, np.inf, 0.0).reshape(4, 4, 4), "infinite"),
    ],
)
def test_arrays_that_are_no_volume(tmp_path, array, said):
    np.savez(tmp_path / "v.npz", image=array)
    np.save(tmp_path / "v.npy", array)
    assert said in refused(tmp_path / "v.npz") and said in refused(tmp_path / "v.npy")


def test_other_mistakes(tmp_path):
    np.savez(tmp_path / "v.npz", arr_0=chest())
    assert "key 'image'" in refused(tmp_path / "v.npz") and "arr_0" in refused(tmp_path / "v.npz")
    assert "no such file" in refused(tmp_path / "w.npz")
    assert "not a volume by its name" in refused(tmp_path / "w.dcm")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)), tmp_path / "t.nii")
    assert "(X, Y, Z) was expected" in refused(tmp_path / "t.nii")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.complex64), np.eye(4)), tmp_path / "c.nii")
    assert "integers or floats" in refused(tmp_path / "c.nii")
    nib.save(nib.Nifti2Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "n2.nii")
    refused(tmp_path / "n2.nii")
    np.save(tmp_path / "v.npy", chest().astype(np.float32))
    assert "layout 'DHW'" in str(pytest.raises(UserError, read_volume, tmp_path / "v.npy", layout="DHW").value)
    assert "'raw'" in str(pytest.raises(UserError, read_volume, tmp_path / "v.npy", value_range="raw").value)


# ---- rows and names


def test_volume_options_and_groups():
    assert volume_options({"spacing_z": "2.5", "spacing_y": "1", "spacing_x": "1"}) == {"spacing": (2.5, 1, 1)}
    assert volume_options({"RescaleSlope": "1", "RescaleIntercept": "-1024.0"}) == {"rescale": (1, -1024)}
    assert volume_options({"spacing_z": "", "spacing_y": "", "spacing_x": ""}) == {}
    with pytest.raises(UserError, match="not all numbers"):
        volume_options({"RescaleSlope": "1", "RescaleIntercept": ""})
    assert group_of("train_1_a_2") == group_of("train_1_b_1.nii.gz") == "train_1"
    assert group_of("train_12_a_2") == "train_12" and group_of("valid_1_a_1") == "valid_1"
    assert group_of("site_1_ct_7") == "site_1_ct_7"  # a site is no patient
    table = pd.DataFrame({"patient_id": ["p", " ", ""], "name": ["train_1_a_1", "train_2_a_1", "CT9"]})
    assert common.patients_of(table, "name") == ["p", "train_2", "CT9"]
    assert common.patients_of(table[["name"]], "name") == ["train_1", "train_2", "CT9"]
    assert group_of("train_3_a_2.mha") == "train_3" and group_of("CT001") == "CT001" and group_of("scan_1") == "scan_1"


# ---- sampling


@pytest.mark.parametrize("depth, wanted", [(8, 8), (9, 4), (5, 12), (300, 16), (1, 3), (7, 1)])
def test_slices_are_the_nearest_to_the_middles_of_equal_parts(depth, wanted):
    array = np.broadcast_to(np.arange(depth, dtype=np.int16)[:, None, None], (depth, 6, 6))
    chosen = sample_volume(array, None, wanted, 6)[:, 0, 0]
    middles = (np.arange(wanted) + 0.5) * depth / wanted - 0.5
    assert (np.abs(chosen - middles) <= 0.5 + 1e-9).all()
    for jitter in (-0.5, -0.3, 0.2, 0.4999):
        moved = sample_volume(array, None, wanted, 6, jitter=jitter)[:, 0, 0]
        assert (np.abs(moved - (middles + jitter * depth / wanted)) <= 0.5 + 1e-6).all()


def test_sampling_a_sampled_volume_is_the_identity():
    array = chest((37, 61, 50))
    once = sample_volume(array, SPACING, 16, 32)
    assert once.shape == (16, 32, 32) and once.dtype == np.int16
    for jitter in (0.0, -0.5, 0.49):
        np.testing.assert_array_equal(sample_volume(once, None, 16, 32, jitter=jitter), once)
    apart = sample_volume(array, SPACING, 16, 32, slice_spacing=3.1)
    np.testing.assert_array_equal(sample_volume(apart, (3.1, 1, 1), 16, 32, slice_spacing=3.1), apart)


def test_slices_a_number_of_mm_apart_with_air_outside():
    array = np.broadcast_to(np.arange(10, dtype=np.int16)[:, None, None], (10, 4, 4))
    assert sample_volume(array, (2, 1, 1), 4, 4, slice_spacing=4)[:, 0, 0].tolist() == [2, 4, 6, 8]
    assert sample_volume(array, (2, 1, 1), 3, 4, slice_spacing=2)[:, 0, 0].tolist() == [4, 5, 6]
    assert sample_volume(array, (5, 1, 1), 7, 4, slice_spacing=10)[:, 0, 0].tolist() == [-1000, 1, 3, 5, 7, 9, -1000]
    with pytest.raises(UserError, match="spacing_z"):
        sample_volume(array, None, 3, 4, slice_spacing=2)


def test_slices_keep_their_aspect_ratio():
    array = np.full((2, 40, 20), 500, np.int16)
    got = sample_volume(array, None, 2, 16)
    assert got.shape == (2, 16, 16)
    assert (got[:, :, :3] == -1000).all() and (got[:, :, -3:] == -1000).all() and (got[:, :, 5:11] == 500).all()
    assert (sample_volume(array, None, 2, (16, 8)) == 500).all()  # the same ratio: nothing to pad


def test_resize_is_antialiased_bilinear():
    array = np.random.default_rng(0).integers(-1000, 1000, (3, 30, 30)).astype(np.int16)
    slow = F.interpolate(torch.from_numpy(array)[None].float(), (10, 10), mode="bilinear", antialias=True)[0]
    got = sample_volume(array, None, 3, 10)
    assert np.abs(got - slow.numpy()).max() <= 0.5
    # A triangle of width 3 pixels about each centre, weights 1 2 3 2 1 over 9: the inner pixels, by hand.
    weights = np.convolve([1, 1, 1], [1, 1, 1]) / 9
    rows = np.stack([weights @ array[0, 3 * i - 1 : 3 * i + 4] for i in range(1, 9)])
    hand = np.stack([rows[:, 3 * j - 1 : 3 * j + 4] @ weights for j in range(1, 9)], axis=1)
    assert np.abs(got[0, 1:9, 1:9] - hand).max() <= 0.51


def test_sampling_does_not_depend_on_the_thread_count():
    array, before = chest((20, 200, 200)), torch.get_num_threads()
    got = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        got.append(sample_volume(array, None, 8, 96))
    torch.set_num_threads(before)
    assert all(np.array_equal(g, got[0]) for g in got)


# ---- real volumes


@needs_real
def test_two_orientations_of_one_real_patient_show_the_same_body():
    """train_1_a_1 (LPS, 512 x 512 x 99) and train_1_a_2 (RAS, 128 x 128 x 64) are one scan."""
    full, small = (read_volume(p) for p in REAL[:2])
    a = sample_volume(full.array, full.spacing, 32, 64).astype(float)
    b = sample_volume(small.array, small.spacing, 32, 64).astype(float)
    agreement = np.corrcoef(a.ravel(), b.ravel())[0, 1]
    flipped = [np.corrcoef(a.ravel(), np.flip(b, axis).ravel())[0, 1] for axis in range(3)]
    assert agreement > 0.97 and max(flipped) < 0.95, (agreement, flipped)


@needs_real
@pytest.mark.parametrize("path", REAL, ids=lambda p: p.name)
def test_real_volumes_are_read_as_nibabel_reads_them(path):
    metadata = pd.read_csv(path.parent / "metadata.csv").set_index("VolumeName").loc[path.name]
    rescale = (metadata["RescaleSlope"], metadata["RescaleIntercept"])
    got = read_volume(path, rescale=rescale)
    ras = nib.as_closest_canonical(nib.load(path))
    wanted = ras.get_fdata().transpose(2, 1, 0)[:, ::-1, ::-1] + metadata["RescaleIntercept"]
    np.testing.assert_array_equal(got.array, wanted)
    np.testing.assert_allclose(got.spacing, ras.header.get_zooms()[::-1], rtol=1e-5)
    assert not any("warning" in n for n in got.notes)
    if not path.name.startswith("valid_1_a_1"):  # v2 files beside v1 metadata, the trap of CT-CLIP issue 50
        for intercept in (-1024, -8192):
            np.testing.assert_array_equal(read_volume(path, rescale=(1, intercept)).array, got.array)


@needs_real
def test_the_real_volume_of_stored_values_needs_its_metadata():
    path = next(p for p in REAL if p.name.startswith("valid_1_a_1"))
    raw, hu = read_volume(path), read_volume(path, rescale=(1, -1000))
    assert any("looks like stored values" in n for n in raw.notes)
    assert -1010 < np.percentile(hu.array, 10) < -980 and -5 < np.percentile(raw.array, 10) < 20
