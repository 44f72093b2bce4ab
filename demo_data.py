"""Synthetic data in the real file formats, so that every command of the README runs with no data at hand.

    python demo_data.py ct --out demo --n 500        # chest CT, 18 findings of CT-RATE -> demo/ct/all_ct_wlabels.csv,
                                                     # the CT-RATE tree demo/dataset, WordPieces demo/vocab.txt
    python demo_data.py fundus --out demo/fundus --n 400    # left and right eyes, 6 diagnoses -> pairs.csv, images/,
                                                     # vocab.txt; one eye a row: prompts_{train,test}.csv, by_index/
    python demo_data.py cxr --out demo/cxr --n 400   # frontal chest films, congestion 0-3 in six zones -> labels.csv,
                                                     # images/ (8 and 16 bits), masks/ of the right and the left lung

Every patient is a pure function of (seed, index): the same for any --n and any --num-workers. The phantoms are
stylised; they test code and teach formats, they say nothing about patients.
"""

import argparse
import gzip
import math
import os
import re
import string
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import NormalDist

import nibabel
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter

from common import CT_RATE_LABELS, UserError

# Prevalence of each finding in CT-RATE valid, in the order of CT_RATE_LABELS.
PREVALENCE = (
    [0.103, 0.285, 0.107, 0.074, 0.252, 0.137, 0.260, 0.197, 0.235]  # Medical material ... Atelectasis
    + [0.448, 0.390, 0.273, 0.124, 0.083, 0.117, 0.191, 0.109, 0.082]  # Lung nodule ... Interlobular septal thickening
)
AGEING = {1, 2, 4, 5, 7, 11}  # findings that come together: calcification, big heart, hernia, emphysema, scars
ACUTE = {3, 6, 8, 10, 12, 15}  # effusions, nodes, atelectasis, opacity, consolidation
AIR, FAT, WATER = -1000, -95, 10  # HU


# ==== Chest CT: canvas ==========================================================================================


class Canvas:
    """A CT volume being painted, in mm of a standard patient: z upward from the liver, y to the back, x to the left.

    hu: (D, H, W) float32; z (D, 1, 1), y (H, 1), x (W,) voxel centres; px, dz: voxel size in plane and along z.
    """

    def __init__(self, z, y, x):
        self.axes = [np.asarray(a, np.float32) for a in (z, y, x)]
        self.z, self.y, self.x = self.axes[0][:, None, None], self.axes[1][:, None], self.axes[2]
        self.dz, self.px = float(z[1] - z[0]), float(x[1] - x[0])
        self.hu = np.full((len(z), len(y), len(x)), AIR, np.float32)
        self.lung = np.ones_like(self.hu)

    def edge(self, distance, soft=0.0):
        """Coverage 0-1 of a voxel from the signed distance (mm, negative inside) to a border `soft` mm wide."""
        return np.clip(0.5 - distance / (self.px + soft), 0, 1)

    def paint(self, cover, hu, box=...):
        """Mix `hu` into the box by the coverage."""
        self.hu[box] += cover * (hu - self.hu[box])

    def box(self, low, high):
        """Slices and their open coordinate grid that hold the points between two corners (z, y, x)."""
        cut = [slice(*np.searchsorted(a, (lo, hi))) for a, lo, hi in zip(self.axes, low, high, strict=True)]
        z, y, x = (a[c] for a, c in zip(self.axes, cut, strict=True))
        return tuple(cut), z[:, None, None], y[:, None], x

    def ellipsoid(self, centre, radii, hu, soft=0.0, in_lung=False, turn=0.0, weight=1.0):
        """Paint an ellipsoid (z, y, x), turned by `turn` rad about z; thick slices: seen in one slice at least."""
        centre, radii = np.asarray(centre, float), np.broadcast_to(np.asarray(radii, float), 3)
        reach = np.array([radii[0], *([radii[1:].max()] * 2)]) + self.px + soft
        reach[0] += self.dz / 2
        box, z, y, x = self.box(centre - reach, centre + reach)
        z = np.maximum(np.abs(z - centre[0]) - self.dz / 2, 0)
        y, x = y - centre[1], x - centre[2]
        if turn:
            y, x = np.cos(turn) * y - np.sin(turn) * x, np.sin(turn) * y + np.cos(turn) * x
        f = np.sqrt((z / radii[0]) ** 2 + (y / radii[1]) ** 2 + (x / radii[2]) ** 2)
        cover = self.edge((f - 1) * radii.min(), soft) * (np.minimum(4 * self.lung[box], 1) if in_lung else 1)
        self.paint(weight * cover, hu, box)

    def tube(self, points, radii, hu, wall=0.0, wall_hu=0.0, in_lung=False):
        """Paint a chain of capsules through points (z, y, x), a radius each; `wall` mm of another density around."""
        points = np.asarray(points, float)
        radii = np.broadcast_to(np.asarray(radii, float), len(points))
        for p, q, r, s in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
            reach = max(r, s) + wall + self.px
            box, z, y, x = self.box(np.minimum(p, q) - reach, np.maximum(p, q) + reach)
            d = q - p
            t = np.clip(((z - p[0]) * d[0] + (y - p[1]) * d[1] + (x - p[2]) * d[2]) / (d @ d), 0, 1)
            off = (z - p[0] - t * d[0]) ** 2 + (y - p[1] - t * d[1]) ** 2 + (x - p[2] - t * d[2]) ** 2
            distance = np.sqrt(off) - (r + t * (s - r))
            mask = np.minimum(4 * self.lung[box], 1) if in_lung else 1
            if wall:
                self.paint(self.edge(distance - wall) * mask, wall_hu, box)
            self.paint(self.edge(distance) * mask, hu, box)

    def spot(self, rng, where):
        """A random point (z, y, x) of the lung voxels for which `where` holds (of all lung voxels if none does)."""
        inside = self.lung > 0.95
        flat = np.flatnonzero(inside & where)
        flat = flat if len(flat) else np.flatnonzero(inside)
        index = np.unravel_index(flat[rng.integers(len(flat))], self.hu.shape)
        return np.array([a[i] for a, i in zip(self.axes, index, strict=True)], float)

    def waves(self, rng, wavelength, n):
        """Sum of n random plane waves at the lung voxels, about unit variance: a smooth random pattern."""
        zi, yi, xi = np.nonzero(self.lung > 0.02)
        points = np.stack([a[i] for a, i in zip(self.axes, (zi, yi, xi), strict=True)], 1)  # (P, 3)
        k = rng.normal(size=(3, n))
        k *= 2 * np.pi / (wavelength * rng.uniform(0.8, 1.25, n) * np.linalg.norm(k, axis=0))
        wave = np.cos(points @ k.astype(np.float32) + rng.uniform(0, 7, n)).sum(1) * (2 / n) ** 0.5
        return (zi, yi, xi), points, wave


# ==== Chest CT: anatomy =========================================================================================


def draw_anatomy(c, rng, heart, effusion):
    """Paint a patient without findings; `heart` scales its width, `effusion` is the fluid around it in mm.

    Returns what the findings need: blood (HU), centre and radii of the heart, wall (mm inside the chest wall).
    """
    x, y, z, u = c.x, c.y, c.z, rng.uniform
    fat, muscle = u(5, 30), u(9, 15)
    blood = u(32, 50) if rng.random() < 0.7 else u(80, 190)  # most scans are without contrast
    lung_hu, top = u(-850, -780), u(285, 300)
    taper = np.sqrt(np.clip(1 - (np.maximum(z - 95, 0) / (top - 95)) ** 2, 1e-3, 1))
    a, b = u(126, 138) * taper**0.75, u(84, 94) * taper**0.6  # half width and depth of the rib cage (D, 1, 1)
    ring = np.sqrt((x / a) ** 2 + (y / b) ** 2)
    wall = (1 - ring) * np.minimum(a, b)  # mm inside the chest wall
    shoulder = 20 * np.clip((z - 200) / 80, 0, 1)
    full_a, full_b = 146 + muscle - 10 + shoulder, 98 + muscle - 10 - shoulder / 2
    body = np.sqrt((x / (full_a + fat)) ** 2.0 + (np.abs(y - 4) / (full_b + fat)) ** 2.0)

    # ---- table, skin, fat, muscle
    if rng.random() < 0.6:
        bed = y - (full_b + fat + 9) + x**2 / 2500
        c.paint(c.edge(np.abs(bed) - 2) * (np.abs(x) < 170), u(-500, -200))
    c.paint(c.edge((body - 1) * 110), 20)
    c.paint(c.edge((body - 1) * 110 + 3), FAT + u(-10, 10))
    if rng.random() < 0.5:  # breasts
        for side in (-1, 1):
            c.ellipsoid((135, -72 - muscle - fat, 62 * side), (55, 20 + fat / 3, 52), FAT)
            c.ellipsoid((135, -76 - muscle - fat, 64 * side), (22, 8 + fat / 4, 22), 10, soft=12)
    inner = np.sqrt((x / full_a) ** 2 + ((y - 4) / full_b) ** 2)
    c.paint(c.edge((inner - 1) * 100), 52)
    gap = (inner - 1) * 100 + 6 + 5 * np.sin(np.arctan2(y, x) * 6)  # fat between the muscles
    c.paint(c.edge(np.abs(gap) - 1.5) * 0.6, FAT)

    # ---- bones: ribs fall from back to front, scapulae, clavicles, sternum
    shell = c.edge(np.abs(ring * np.minimum(a, b) - np.minimum(a, b) - 6) - 4)
    phase = (z - 30 * (y / 86) + u(0, 27)) / 27 % 1
    c.paint(shell * c.edge((np.abs(phase - 0.5) - 0.2) * 27) * (z < 262), u(300, 480))
    for side in (-1, 1):
        c.tube([(165, 86, 75 * side), (235, 96, 100 * side), (265, 70, 140 * side)], (4, 4, 9), 330)
        c.tube([(248, -52, 18 * side), (262, -50, 70 * side), (272, -15, 135 * side)], 6, 380)
        c.ellipsoid((275, 5, 160 * side), (24, 19, 19), 320)
    front = -b.ravel() - 7
    for level, edge_y in zip(c.axes[0], front, strict=True):
        if 95 < level < 235:
            c.ellipsoid((level, edge_y, 0), (c.dz / 2, 6, 17), u(150, 200))

    # ---- cavity: mediastinal fat, abdomen under two domes, heart in its fat
    c.paint(c.edge(-wall), FAT)
    dome = [u(70, 88), u(56, 74)]  # right, left
    height = 4 + np.maximum(
        dome[0] * (1 - ((x + 62) / 105) ** 2 - ((y + 5) / 120) ** 2),
        dome[1] * (1 - ((x - 64) / 105) ** 2 - (y / 120) ** 2),
    )
    under, cavity = c.edge(z - height), c.edge(-wall)
    c.paint(under * cavity * c.edge(x - 35 + 0.25 * z, 4), u(48, 65))  # liver
    c.paint(under * cavity * c.edge(35 - 0.25 * z - x, 4), FAT)
    c.ellipsoid((dome[1] - 50, 40, 78), (42, 32, 26), u(42, 55))  # spleen
    c.ellipsoid((dome[1] - 48, -12, 62), (40, 38, 34), 25)  # stomach with gas in front
    c.ellipsoid((dome[1] - 45, -32, 62), (30, 16, 24), AIR + 50)
    centre, turn = np.array([104.0, -20, 16 + 18 * (heart - 1)]), -0.5
    radii = np.array([44 + 12 * (heart - 1), 36 * heart**0.7, 50 * heart]) * u(0.94, 1.04)
    yy, xx = y - centre[1], x - centre[2]
    yy, xx = np.cos(turn) * yy - np.sin(turn) * xx, np.sin(turn) * yy + np.cos(turn) * xx
    far = (np.sqrt(((z - centre[0]) / radii[0]) ** 2 + (yy / radii[1]) ** 2 + (xx / radii[2]) ** 2) - 1) * radii[1]
    pad = u(5, 12)  # epicardial fat
    c.paint(c.edge(far - pad - effusion) * cavity, FAT)
    if effusion:
        c.paint(c.edge(far - pad - effusion + 1) * c.edge(pad * 0.5 - far) * cavity, WATER)
    c.paint(c.edge(far), 48)

    # ---- lungs: what is left of the cavity above the domes
    # half width of the mediastinum, narrow in front, wide at the hila
    middle = 20 + 14 * np.clip((y + 10) / 40, 0, 1) - 16 * np.clip((-y - 45) / 30, 0, 1)
    middle = middle + 8 * np.exp(-(((z - 165) / 30) ** 2)) * np.exp(-((y / 30) ** 2))
    c.lung = c.edge(3 - wall) * c.edge(height - z) * c.edge(middle - np.abs(x), 2) * c.edge(pad + effusion - far)
    c.lung = c.lung * c.edge(26 - np.hypot(x, y - 64)) * c.edge(17 - np.hypot(x - 24, y - 44))
    c.paint(c.lung, lung_hu + u(0, 70) * (y / 80))

    # ---- spine: vertebrae, discs, canal, processes
    c.tube([(-20, 66, 0), (320, 60, 0)], 19, 280)
    disc = np.clip(np.cos(2 * np.pi * (z / 25 + u(0, 1))) * 2 - 1, 0, 1)  # discs between the vertebrae
    c.paint(c.edge(np.sqrt((y - 63) ** 2 + x**2) - 15) * (0.5 + 0.5 * disc), u(90, 190))
    c.tube([(-20, 91, 0), (320, 86, 0)], 8, 25)  # spinal canal
    for k in range(-1, 12):
        zk = 25 * k + u(8, 18)
        c.tube([(zk, 100, 0), (zk - 12, 118, 0)], 4, 350)
        for side in (-1, 1):
            c.tube([(zk, 84, 12 * side), (zk, 92, 36 * side)], 5, 330)

    # ---- chambers, great vessels, airways, oesophagus
    for dz, dy, dx, r in ((-6, -2, 24, 20), (2, -16, -8, 20), (10, 16, 2, 19), (4, 2, -34, 17)):
        c.ellipsoid(centre + (dz, dy, dx * heart), np.array([1.3, 0.9, 1.1]) * r * heart**0.6, blood, turn=turn)
    r = u(11.5, 15)
    arch = [(130, -14, -4), (175, -22, -12), (205, -14, -8), (214, 6, 4), (206, 32, 18), (190, 44, 24), (-20, 46, 20)]
    c.tube(arch, r, blood)
    c.tube([(128, -8, -30), (235, -14, -26)], 8, blood)  # superior vena cava
    c.tube([(140, -32, 10), (165, -14, 18), (166, 6, 22), (162, 14, 46)], (13, 12, 11, 8), blood)
    c.tube([(165, -8, 16), (163, 2, -20), (160, 8, -46)], (11, 10, 8), blood)
    for end in ((295, -6, -30), (295, 0, 16), (295, 14, 26)):
        c.tube([(212, -2 + end[1] / 2, end[2] / 3), end], 5, blood)
    c.tube([(295, 40, 4), (186, 38, 4), (80, 40, 8), (30, 34, 16)], 7, 36)
    c.tube([(295, 40, 4), (186, 38, 4)], 2, -300)
    carina = (u(182, 190), 16, 0)
    c.tube([(310, 8, 0), carina], u(7.5, 9.5), -990, wall=1.5, wall_hu=0)
    bronchi = []
    for side in (-1, 1):
        hilum = (160, 16, 40 * side)
        bronchi.append([carina, hilum, (128, 26, 52 * side), (96, 38, 62 * side)])
        bronchi.append([hilum, (192, 6, 58 * side), (214, 2, 66 * side)])
        bronchi.append([(150, 18, 43 * side), (136, -14, 66 * side), (126, -34, 78 * side)])
        tree(c, rng, np.array(hilum, float), side, blood)
    for line in bronchi:
        c.tube(line, (6.5, 5.0, 3.6, 2.6)[: len(line)], -970, wall=1.0, wall_hu=-250)
    return {"blood": blood, "centre": centre, "radii": radii, "turn": turn, "wall": wall, "bronchi": bronchi,
            "front": front, "aorta": r}  # fmt: skip


def tree(c, rng, hilum, side, blood):
    """Paint the pulmonary vessels of one lung: branches from the hilum that fork twice."""
    for angle in np.linspace(0, 2 * np.pi, 13)[:-1] + rng.uniform(-0.2, 0.2, 12):
        out = np.array([1.1 * np.cos(angle), 0.75 * np.sin(angle), side * rng.uniform(0.5, 1.0)])
        mid = hilum + out * rng.uniform(28, 42)
        c.tube([hilum, mid], (4.2, 2.6), blood, in_lung=True)
        for _ in range(3):
            end = mid + (out + rng.normal(0, 0.35, 3)) * rng.uniform(28, 50)
            c.tube([mid, end], (2.4, 1.0), blood, in_lung=True)


# ==== Chest CT: the 18 findings, in the order of CT_RATE_LABELS ================================================


def on_heart(a, direction):
    """Point (z, y, x) of the heart's surface in a direction given in the heart's own axes."""
    d = np.asarray(direction, float)
    z, y, x = d / np.linalg.norm(d) * a["radii"]
    cos, sin = np.cos(a["turn"]), np.sin(a["turn"])
    return a["centre"] + (z, cos * y + sin * x, cos * x - sin * y)


def medical_material(c, rng, a):
    """A port with its catheter or a pacemaker with its lead; often sternal wires and a valve ring as well."""
    skin = np.interp(222, c.axes[0], a["front"]) - 13
    cava = [(236, -15, -27), (140, -8, -30)]
    if rng.random() < 0.5:
        c.ellipsoid((222, skin, -76), (18, 8, 16), 2800)
        c.tube([(222, skin, -76), (246, -42, -42), *cava], 3.2, 2500)
    else:
        c.ellipsoid((222, skin, 80), (24, 9, 24), 3000)
        c.tube([(222, skin, 80), (246, -42, 42), *cava, on_heart(a, (-0.3, -0.3, 0.8))], 3.2, 2600)
    if rng.random() < 0.5:
        for z in np.arange(105, 235, c.dz):
            y = np.interp(z, c.axes[0], a["front"])
            c.tube([(z, y - 5, -9), (z, y - 7, 9)], 2.8, 2600)
        for t in np.linspace(0, 2 * np.pi, 9):
            c.ellipsoid(a["centre"] + (10 * np.sin(t), 12 * np.cos(t) - 4, 14 * np.sin(t)), 3.5, 2400)


def arterial_calcification(c, rng, a):
    """Plaques in the wall of the arch and of the descending aorta."""
    for _ in range(rng.integers(9, 16)):
        t, z = rng.uniform(0, 2 * np.pi), rng.uniform(40, 175)
        at = np.array([z, 46 + a["aorta"] * np.sin(t), 22 + a["aorta"] * np.cos(t)])
        c.tube([at, at + (rng.uniform(15, 45), 0, 0)], 3.2, rng.uniform(900, 1400))
    for t in rng.uniform(0, 1, rng.integers(3, 7)):
        at = np.array([208, -14 + 46 * t, -8 + 26 * t + rng.choice([-1, 1]) * a["aorta"] * 0.8])
        c.tube([at - (6, 0, 0), at + (6, 9, 6)], 3.2, rng.uniform(900, 1400))


def coronary_calcification(c, rng, a):
    """Bright segments along the anterior descending artery, often along the other two."""
    lines = [((0.8, -0.8, 0.0), (-0.4, -0.9, 0.6)), ((0.5, -0.5, -0.8), (-0.5, -0.6, -0.8))]
    lines.append(((0.6, 0.2, 0.6), (-0.3, 0.4, 0.9)))
    for start, end in lines[:1] + [line for line in lines[1:] if rng.random() < 0.5]:
        for t in rng.uniform(0, 0.8, 5):
            ends = [on_heart(a, np.array(start) * (1 - s) + np.array(end) * s) for s in (t, t + 0.2)]
            c.tube(ends, 3.4, rng.uniform(900, 1400))


def hiatal_hernia(c, rng, a):
    """Stomach above the diaphragm, behind the heart in the midline, with gas in front of its fluid."""
    at = np.array([rng.uniform(84, 98), 30, rng.uniform(-6, 6)])
    radii = np.array([rng.uniform(24, 36), rng.uniform(16, 20), rng.uniform(20, 30)])
    c.ellipsoid(at, radii, 35)
    c.ellipsoid(at - (0, radii[1] * 0.3, 0), radii * (0.75, 0.5, 0.75), -900)


def lymphadenopathy(c, rng, a):
    """Four to seven enlarged nodes in the mediastinal fat and at the hila."""
    stations = [(206, 6, -20), (196, -34, 8), (186, 14, 22), (164, 26, -4)]
    stations += [(158, 12, -46), (156, 12, 50), (222, -6, -18), (216, -22, 4)]
    for k in rng.permutation(len(stations))[: rng.integers(4, 8)]:
        c.ellipsoid(stations[k] + rng.normal(0, 2, 3), rng.uniform(9, 14, 3), rng.uniform(50, 70))


def emphysema(c, rng, a):
    """Dark holes without walls, mostly in the upper lungs."""
    for _ in range(rng.integers(50, 100)):
        at = c.spot(rng, c.z > rng.uniform(130, 200))
        c.ellipsoid(at, rng.uniform(6, 14, 3), -1010, in_lung=True)


def atelectasis(c, rng, a):
    """Bands of airless lung above the diaphragm."""
    turn = rng.uniform(-0.7, 0.7)
    for _ in range(rng.integers(2, 5)):
        at = c.spot(rng, (c.z > 55) & (c.z < 125) & (a["wall"] > 12) & (c.y > -30))
        c.ellipsoid(at, (16, 4.5, rng.uniform(28, 42)), 20, in_lung=True, turn=turn + rng.normal(0, 0.15))


def lung_nodule(c, rng, a):
    """Two to five round nodules."""
    for _ in range(rng.integers(2, 6)):
        at = c.spot(rng, (a["wall"] > 10) & (a["wall"] < 38) & (c.z > 60) & (c.z < 235))
        c.ellipsoid(at, rng.uniform(7.5, 13), rng.uniform(20, 60), in_lung=True)


def lung_opacity(c, rng, a):
    """Hazy patches of ground glass through which the vessels show."""
    for _ in range(rng.integers(3, 7)):
        at = c.spot(rng, (a["wall"] < 45) & (c.z > 70) & (c.z < 230))
        c.ellipsoid(at, rng.uniform(16, 30, 3), 0, soft=14, in_lung=True, weight=rng.uniform(0.35, 0.5))


def fibrotic_sequela(c, rng, a):
    """Scars at the apex: strands towards the pleura and a thickened apical cap."""
    for side in rng.permutation([-1, 1])[: rng.integers(1, 3)]:
        here = c.x * side > 0
        c.paint((c.lung > 0.02) * here * np.clip((c.z - 232) / 12, 0, 1) * c.edge(a["wall"] - 10, 3), 20)
        for _ in range(rng.integers(2, 4)):
            at = c.spot(rng, here & (c.z > 205) & (c.z < 262))
            c.ellipsoid(at, rng.uniform(4, 7, 3), 20, in_lung=True)
            for _ in range(4):
                c.tube([at, at + rng.normal(0, 1, 3) * (10, 20, 20)], (3.0, 2.0), -20, in_lung=True)


def pleural_effusion(c, rng, a):
    """Fluid that lies at the back of the lower chest, thinner upward and forward."""
    for side in rng.permutation([-1, 1])[: rng.integers(1, 3)]:
        top, thick = rng.uniform(130, 200), rng.uniform(22, 48)
        depth = thick * np.clip((c.y + 35) / 80, 0, 1) * np.clip((top - c.z) / (top - 60), 0, 1) ** 0.7
        cover = (c.lung > 0.02) * (c.x * side > 0) * c.edge(a["wall"] - depth - 3) * (depth > 2)
        c.paint(cover, rng.uniform(4, 18))
        c.lung = c.lung * (1 - cover)


def mosaic(c, rng, a):
    """A patchwork of two lung densities with sharp borders."""
    at, _, wave = c.waves(rng, rng.uniform(60, 85), 10)
    c.hu[at] += c.lung[at] * np.clip(wave * 5, -1, 1) * rng.uniform(70, 110)


def peribronchial(c, rng, a):
    """Thick walls around the central bronchi."""
    for line in a["bronchi"]:
        c.tube(line, (6.5, 5.0, 4.0, 3.2)[: len(line)], -960, wall=rng.uniform(3.2, 4.5), wall_hu=30)


def consolidation(c, rng, a):
    """One or two solid patches of a lobe with air in the bronchi."""
    for _ in range(rng.integers(1, 3)):
        at = c.spot(rng, (c.z > 80) & (c.z < 190) & (a["wall"] > 8) & (a["wall"] < 40))
        for blob in at + rng.normal(0, 1, (6, 3)) * (14, 12, 12):
            c.ellipsoid(blob, rng.uniform(11, 22, 3), 35, soft=5, in_lung=True)
        for _ in range(5):
            c.tube([at, at + rng.normal(0, 1, 3) * (14, 16, 16)], (2.8, 2.0), -850, in_lung=True)


def bronchiectasis(c, rng, a):
    """Clusters of wide bronchi, seen as rings beside their vessel, low in the lungs."""
    for side in rng.permutation([-1, 1])[: rng.integers(1, 3)]:
        middle = c.spot(rng, (c.x * side > 0) & (c.z > 75) & (c.z < 120) & (a["wall"] > 18) & (a["wall"] < 45))
        for _ in range(rng.integers(6, 10)):
            at, r = middle + rng.normal(0, 1, 3) * (12, 16, 16), rng.uniform(4.5, 7.5)
            c.tube([at - (18, 4, 0), at + (18, -4, 0)], r, -980, wall=3.0, wall_hu=10, in_lung=True)
            c.tube([at - (18, 4, r + 5), at + (18, -4, -r - 5)], 3, a["blood"], in_lung=True)


def septal_thickening(c, rng, a):
    """A network of lines under the pleura."""
    at, points, wave = c.waves(rng, 45, 8)
    cover = np.zeros(len(points), np.float32)
    for t in rng.uniform(0, 0.6) + np.array([0, 1.05, 2.1]):
        along = (points @ np.array([0.25, np.sin(t), np.cos(t)], np.float32) + 4 * wave) / 18
        cover = np.maximum(cover, c.edge(np.abs(along - np.round(along)) * 18 - 1.2))
    near = np.clip((34 - np.broadcast_to(a["wall"], c.hu.shape)[at]) / 8, 0, 1)
    c.paint(cover * near * c.lung[at] * 0.7, 0, at)


# Drawn from the pleura inward and from the haze to the hard structures, so that none hides another.
PAINTED = [
    ("Pleural effusion", pleural_effusion), ("Mosaic attenuation pattern", mosaic), ("Emphysema", emphysema),
    ("Lung opacity", lung_opacity), ("Interlobular septal thickening", septal_thickening),
    ("Consolidation", consolidation), ("Atelectasis", atelectasis), ("Pulmonary fibrotic sequela", fibrotic_sequela),
    ("Bronchiectasis", bronchiectasis), ("Peribronchial thickening", peribronchial), ("Lung nodule", lung_nodule),
    ("Lymphadenopathy", lymphadenopathy), ("Hiatal hernia", hiatal_hernia),
    ("Arterial wall calcification", arterial_calcification),
    ("Coronary artery wall calcification", coronary_calcification), ("Medical material", medical_material),
]  # fmt: skip


def draw_labels(seed, index):
    """(18,) int: findings of one patient with the prevalences of CT-RATE, correlated by two latent factors."""
    rng = np.random.default_rng([seed, index, 0])
    ageing, acute, own = rng.normal(), rng.normal(), rng.normal(size=18)
    shared = np.array([ageing if k in AGEING else acute if k in ACUTE else own[k] for k in range(18)])
    level = np.array([NormalDist().inv_cdf(1 - p) for p in PREVALENCE])
    rho = np.array([0.25 if k in AGEING | ACUTE else 0.0 for k in range(18)])
    return (np.sqrt(rho) * shared + np.sqrt(1 - rho) * own > level).astype(int)


def draw_ct(seed, index, size=96, slices=24, labels=None):
    """One chest CT: image (D, H, W) int16 HU toward (Superior, Posterior, Left), spacing (3,) mm, labels (18,) int.

    The patient, each finding and the noise have random numbers of their own: with `labels` given, the same
    patient is drawn with other findings.
    """
    labels = draw_labels(seed, index) if labels is None else np.asarray(labels)
    has = dict(zip(CT_RATE_LABELS, labels, strict=True))
    rngs = {name: np.random.default_rng([seed, index, 10 + k]) for k, name in enumerate(CT_RATE_LABELS)}
    rng = np.random.default_rng([seed, index, 1])
    scale = rng.uniform(0.92, 1.08) * rng.uniform(0.97, 1.03, 3)  # this patient's mm in a standard mm (z, y, x)
    fov, low, high = 372 * scale[1:].mean() * rng.uniform(0.96, 1.06), rng.uniform(12, 30), rng.uniform(284, 296)
    shift = rng.normal(0, 4, 2)
    offsets = (np.arange(size) - (size - 1) / 2) * fov / size
    c = Canvas(np.linspace(low, high, slices), (offsets + shift[0]) / scale[1] + 4, (offsets + shift[1]) / scale[2])
    spacing = np.array([c.dz * scale[0], fov / size, fov / size], np.float32)

    wide, fluid = rng.uniform(0.84, 1.0), 0.0
    if has["Cardiomegaly"]:
        wide = rngs["Cardiomegaly"].uniform(1.22, 1.42)
    if has["Pericardial effusion"]:
        fluid = rngs["Pericardial effusion"].uniform(9, 16)
    anatomy = draw_anatomy(c, rng, wide, fluid)
    for name, paint in PAINTED:
        if has[name]:
            paint(c, rngs[name], anatomy)

    rng = np.random.default_rng([seed, index, 2])
    noise = rng.normal(size=c.hu.shape).astype(np.float32)
    grain = rng.uniform(0, 0.25)  # soft to sharp kernel
    noise[:, 1:-1] += grain * (noise[:, 2:] + noise[:, :-2])
    noise[:, :, 1:-1] += grain * (noise[:, :, 2:] + noise[:, :, :-2])
    c.hu += noise * rng.uniform(6, 28)
    return np.clip(np.rint(c.hu), -1024, 3071).astype(np.int16), spacing, labels


# ==== Chest CT: files ===========================================================================================

PRESENT = ["There is {}.", "{} is seen.", "{} is present.", "Findings consistent with {} are observed."]
ABSENT = ["No {} was detected.", "There is no {}.", "{} is not observed."]
NORMAL = "No abnormality was detected."
PROMPTS = ["There is {}.", "There is no {}.", "{} is present.", "{} is not present."]  # of zero-shot in CT-CLIP


def write_report(seed, index, labels):
    """(findings, impression): a sentence for each finding present and for some of those absent, in random order."""
    rng = np.random.default_rng([seed, index, 3])
    findings, impression = [], []
    for name, value in zip(CT_RATE_LABELS, labels, strict=True):
        if value or rng.random() < 0.4:
            sentence = str(rng.choice(PRESENT if value else ABSENT)).format(name.lower())
            findings.append(sentence[0].upper() + sentence[1:])
        if value:
            impression.append(f"{name}.")
    rng.shuffle(findings)
    return " ".join(findings), " ".join(impression) or NORMAL


def vocabulary(texts):
    """Lower-case WordPieces for BERT: the words of the texts, and pieces that spell any other."""
    texts = " ".join(texts).lower()
    characters = string.ascii_lowercase + string.digits
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *characters]
    pieces += [f"##{c}" for c in characters]
    return pieces + sorted(set(re.findall(r"[a-z]+", texts)) - set(pieces))


def series_of(index):
    """(split, series id) of a patient: of ten, 7 train, 1 val, 2 test, numbered as in CT-RATE, which has no test."""
    block, place = divmod(index, 10)
    if place in (2, 5, 8):
        return "val" if place == 2 else "test", f"valid_{block * 3 + place // 3 + 1}_a_1"
    return "train", f"train_{block * 7 + place - (place + 1) // 3 + 1}_a_1"


def write_ct(index, out, seed, size, slices, nifti):
    """Draw one patient and write its files; returns its row of the tables."""
    image, spacing, labels = draw_ct(seed, index, size, slices)
    split, series = series_of(index)
    np.savez(out / "ct" / "volumes" / f"{series}.npz", image=image[None], spacing=spacing)
    if nifti:
        hub = "train" if split == "train" else "valid"
        folder = out / "dataset" / hub / series.rsplit("_", 2)[0] / series.rsplit("_", 1)[0]
        folder.mkdir(parents=True, exist_ok=True)
        dz, dy, dx = (float(s) for s in spacing)
        affine = np.diag([-dx, -dy, dz, 1.0])  # NIfTI's world is right-to-left, back-to-front
        volume = nibabel.Nifti1Image(np.ascontiguousarray(image.transpose(2, 1, 0)), affine)
        volume.header.set_xyzt_units("mm")
        data = gzip.compress(volume.to_bytes(), compresslevel=1, mtime=0)
        (folder / f"{series}.nii.gz").write_bytes(data)
    rng = np.random.default_rng([seed, index, 4])
    findings, impression = write_report(seed, index, labels)
    metadata = {
        "VolumeName": f"{series}.nii.gz",
        "Manufacturer": str(rng.choice(["Siemens Healthineers", "PNMS", "SIEMENS"])),
        "PatientSex": str(rng.choice(["F", "M"])), "PatientAge": f"{rng.integers(20, 90):03d}Y",
        "Rows": size, "Columns": size, "XYSpacing": f"[{float(spacing[2]):.6f}, {float(spacing[1]):.6f}]",
        "RescaleIntercept": 0, "RescaleSlope": 1, "NumberofSlices": slices, "ZSpacing": round(float(spacing[0]), 6),
        "StudyDate": f"{rng.integers(2015, 2024)}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}",
    }  # fmt: skip
    return series, split, labels.tolist(), metadata, (findings, impression)


def run_all(one, args):
    """one(index) of all patients, in order."""
    if args.num_workers < 2:
        return [one(index) for index in range(args.n)]
    with ProcessPoolExecutor(args.num_workers) as pool:
        return list(pool.map(one, range(args.n), chunksize=8))


def make_ct(args):
    """Write all files of the chest CT demo."""
    if args.slices < 8:
        raise UserError(f"--slices {args.slices}: too few for anatomy (use 8 or more)")
    (args.out / "ct" / "volumes").mkdir(parents=True, exist_ok=True)
    one = partial(write_ct, out=args.out, seed=args.seed, size=args.size, slices=args.slices, nifti=args.nifti)
    rows = run_all(one, args)
    table = [[s, split, f"volumes/{s}.npz", s.rsplit("_", 2)[0], *labels] for s, split, labels, *_ in rows]
    columns = ["series_id", "split", "img_path", "patient_id", *CT_RATE_LABELS]
    csv = args.out / "ct" / "all_ct_wlabels.csv"
    pieces = vocabulary([NORMAL, *PRESENT, *ABSENT, *PROMPTS, *CT_RATE_LABELS])
    (args.out / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    pd.DataFrame(table, columns=columns).to_csv(csv, index=False)
    if args.nifti:
        for hub, long in (("train", "train"), ("valid", "validation")):
            chosen = [row for row in rows if row[0].startswith(hub)]
            names = [row[3]["VolumeName"] for row in chosen]
            texts = pd.DataFrame([row[4] for row in chosen], columns=["Findings_EN", "Impressions_EN"])
            labels = pd.DataFrame([row[2] for row in chosen], columns=CT_RATE_LABELS)
            for folder, name, frame in (
                ("radiology_text_reports", f"{long}_reports.csv", texts),
                ("multi_abnormality_labels", f"{hub}_predicted_labels.csv", labels),
                ("metadata", f"{long}_metadata.csv", pd.DataFrame([row[3] for row in chosen])),
            ):
                if "VolumeName" not in frame:
                    frame.insert(0, "VolumeName", names)
                (args.out / "dataset" / folder).mkdir(parents=True, exist_ok=True)
                frame.to_csv(args.out / "dataset" / folder / name, index=False)
    print(f"{args.n} volumes ({args.slices} x {args.size} x {args.size}) -> {csv}")


# ==== Fundus: drawing ===========================================================================================

FINDINGS = {"normal fundus": 0.28, "diabetic retinopathy": 0.2, "glaucoma": 0.16, "cataract": 0.14,
            "macular degeneration": 0.12, "pathological myopia": 0.1}  # share of the patients  # fmt: skip
FUNDUS_COLUMNS = ["patient_id split left_image left_diagnosis right_image right_diagnosis text".split(),
                  "dataset_index label prompt".split()]  # fmt: skip
EYES, DISC, MACULA = ("left", "right"), (0.52, 0.0), (-0.02, 0.06)  # centres in a right eye: x right, y down


def clouds(rng, cells, size):
    """(size, size, 1) float32: smooth noise of unit variance at `cells` points a side."""
    noise = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    return np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))[..., None]


class Layer:
    """Lines and dots drawn three times as large as the picture; `cover()` is their share of each pixel."""

    def __init__(self, size):
        self.size, self.scale = size, 3 * size / 2.1
        self.image = Image.new("L", (3 * size, 3 * size))
        self.draw = ImageDraw.Draw(self.image)

    def vessel(self, rng, at, heading, bend, length, width, fill, forks):
        """A branch that turns by `bend` rad a unit of length, thins out, and forks where `forks` allows."""
        n, step = max(2, int(length / 0.05)), 0.05
        for k in range(n):
            heading += step * bend * (0.4 + 1.2 * k / n) + rng.normal(0, 0.10)
            new = at[0] + step * math.cos(heading), at[1] + step * math.sin(heading)
            thick = width * (1 - 0.65 * k / n)
            ends = [(v + 1.05) * self.scale for v in (*at, *new)]
            self.draw.line(ends, fill=fill, width=max(1, round(thick * self.scale)))
            at = new
            if forks and k > 2 and rng.random() < 0.17:
                turn = rng.choice([-1, 1]) * rng.uniform(0.5, 0.9)
                left = 0.6 * length * (1 - k / n) + 0.1
                self.vessel(rng, at, heading + turn, -turn * 0.8, left, 0.6 * thick, fill, forks - 1)

    def line(self, points, width, fill=255):
        points = [(v + 1.05) * self.scale for point in points for v in point]
        self.draw.line(points, fill=fill, width=max(1, round(width * self.scale)), joint="curve")

    def dot(self, x, y, rx, ry, fill=255):
        self.draw.ellipse([(v + 1.05) * self.scale for v in (x - rx, y - ry, x + rx, y + ry)], fill=fill)

    def cover(self, blur=0.0):
        image = self.image.resize((self.size, self.size), Image.Resampling.BOX)
        return np.float32(image.filter(ImageFilter.GaussianBlur(blur * self.scale / 3)))[..., None] / 255


def draw_fundus(seed, index, side, finding, severity, cup, size=128):
    """One eye, (size, size, 3) uint8 RGB: side 0 is the left one (disc to the left of the picture), 1 the right.

    severity in (0, 1]; cup: cup-disc ratio. Pigment and camera are the patient's, the rest is the eye's own.
    """
    u = np.random.default_rng([seed, index, 1]).uniform
    pigment, warmth, radius, rim = u(0, 1), u(-1, 1), u(0.94, 1.0), u(0, 1)
    light, camera = u(0.72, 1.08), (u(-0.25, 0.25), u(-0.25, 0.25))
    rng = np.random.default_rng([seed, index, 2 + side])
    u, n = rng.uniform, rng.normal
    axis = np.linspace(-1.05, 1.05, size, dtype=np.float32)
    x, y, px = axis[None], axis[:, None], 2.1 / size
    myopic = severity if finding == "pathological myopia" else 0.0

    def paint(image, cover, colour):
        return image + cover * (np.float32(colour) - image)

    def ellipse(cx, cy, rx, ry, soft):
        far = (np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry)
        return np.clip(0.5 - far / (px + soft), 0, 1)[..., None]

    # ---- retina, choroidal vessels that shine through, macula
    skin = np.array([0.86 - 0.1 * pigment, 0.43 - 0.14 * pigment + 0.05 * warmth, 0.2 - 0.07 * pigment - 0.05 * warmth])
    image = skin.astype(np.float32) * (1 + 0.035 * clouds(rng, 6, size))
    stripes = np.exp(-((clouds(rng, 15, size) / 0.35) ** 2)) * (u(0.04, 0.14) + 0.35 * (myopic > 0) + 0.3 * myopic)
    image = paint(image, stripes, skin * (1.16, 1.28, 1.3))
    mx, my = MACULA[0] + n(0, 0.02), MACULA[1] + n(0, 0.02)
    dark = np.exp(-(((x - mx) / 0.2) ** 2 + ((y - my) / 0.18) ** 2))[..., None]
    image *= 1 - dark * np.float32([0.3, 0.42, 0.4]) * u(0.7, 1.1)
    # ---- a crescent beside a tilted disc, the disc and its cup
    cx, cy, r = DISC[0] + n(0, 0.02), DISC[1] + n(0, 0.03), u(0.145, 0.175)
    rx = r * (0.92 - 0.3 * (myopic > 0) * (0.4 + myopic))
    if finding == "pathological myopia":
        wide, high = (1.1 + 0.7 * myopic) * r, (1.2 + 0.4 * myopic) * r
        crescent = ellipse(cx - 0.45 * r - 0.1 * myopic, cy + 0.02, wide, high, 0.05)
        image = paint(image, 0.85 * crescent, (0.95, 0.86, 0.66))
    image = paint(image, ellipse(cx, cy, rx, r, 0.02), (0.93, 0.62, 0.34))
    image = paint(image, 0.9 * ellipse(cx - 0.01, cy, rx * cup, r * cup, 0.015), (1.0, 0.92, 0.72))
    # ---- under the vessels: drusen, atrophy, hard exudates; the vessels; over them: blood
    pale, blood, tree = Layer(size), Layer(size), Layer(size)
    if finding == "macular degeneration":
        for _ in range(int(14 + 50 * severity)):
            pale.dot(mx + n(0, 0.14), my + n(0, 0.13), *u(0.012, 0.022 + 0.02 * severity, 2))
        atrophy = ellipse(mx + n(0, 0.03), my, u(0.13, 0.2), u(0.12, 0.16), 0.05)
        image = paint(image, 0.75 * (severity > 0.8) * atrophy, (0.9, 0.7, 0.4))
    if finding == "diabetic retinopathy":
        for _ in range(int(12 + 28 * severity)):  # microaneurysms and blots around the macula
            angle, far, spot = u(0, 2 * np.pi), u(0.15, 0.8), u(0.009, 0.014)
            if rng.random() < 0.2 + 0.35 * severity:
                spot = u(0.016, 0.026 + 0.02 * severity)
            blood.dot(mx + far * np.cos(angle), my + far * np.sin(angle), spot * u(1, 1.7), spot)
        for _ in range(round(0.5 + 4 * (severity - 1 / 3)) if severity >= 1 / 3 else 0):  # exudates, in clusters
            angle, far = u(0, 2 * np.pi), u(0.12, 0.42)
            for dx, dy in n(0, 0.055, (rng.integers(8, 18), 2)):
                pale.dot(mx + far * np.cos(angle) + dx, my + far * np.sin(angle) + dy, *u(0.009, 0.019, 2))
    image = paint(image, 0.8 * pale.cover(0.006), (0.96, 0.82, 0.45))
    for fill in (150, 225):  # arteries, veins
        for up in (-1, 1):
            start = cx + n(0, 0.015) - 0.02, cy + 0.02 * up
            tree.vessel(rng, start, up * (1.75 + n(0, 0.1)), up * u(0.9, 1.25), 1.5, u(0.024, 0.032), fill, 2)
            tree.vessel(rng, start, up * u(0.6, 1.2), up * u(-0.2, 0.5), 0.6, u(0.017, 0.024), fill, 1)
            tree.vessel(rng, start, up * u(2.5, 3.0), up * u(-0.7, -0.3), 0.35, 0.011, fill, 1)
    image *= 1 - tree.cover() * np.float32([0.34, 0.6, 0.5])
    image = paint(image, 0.8 * blood.cover(0.004), (0.36, 0.06, 0.04))
    # ---- light, a cloudy lens, the edge of the field, noise
    image *= light * (1.1 - 0.4 * ((x - camera[0]) ** 2 + (y - camera[1]) ** 2))[..., None]
    far = np.hypot(x, y)[..., None]
    image = np.clip(paint(image, 0.5 * rim * np.clip((far - 0.72) * 2.5, 0, 1), (0.62, 0.62, 0.5)), 0, 1)
    if finding == "cataract":
        blur = ImageFilter.GaussianBlur((0.6 + 2.2 * severity) * size / 128)
        haze = light * (0.95 + 0.05 * clouds(rng, 4, size)) * np.float32([0.66, 0.55, 0.34])
        image = np.asarray(Image.fromarray(np.uint8(255 * image)).filter(blur), np.float32) / 255
        image = paint(image, 0.3 + 0.45 * severity, haze)
    image = image * np.clip((radius - far) / px + 0.5, 0, 1) + n(0, 0.008, (size, size, 1))
    return np.uint8(255 * np.clip(image, 0, 1) + 0.5)[:, :: 1 if side else -1]


# ==== Fundus: texts and files ===================================================================================

GRADES, COUNTS = ("mild", "moderate", "severe"), ("few", "several", "many")
DETAILS = {
    "normal fundus": ["normal fundus, cup-disc ratio {cup}", "normal fundus with a clear disc margin and macula"],
    "glaucoma": ["{grade} glaucoma, cup-disc ratio {cup}", "glaucoma with an enlarged pale cup, cup-disc ratio {cup}"],
    "diabetic retinopathy": ["{grade} diabetic retinopathy, {count} haemorrhages{exudates}",
                             "diabetic retinopathy with microaneurysms and {count} haemorrhages{exudates}"],
    "cataract": ["{grade} cataract, hazy view", "{grade} cataract, the vessels are blurred"],
    "macular degeneration": ["{grade} macular degeneration", "macular degeneration with {count} drusen"],
    "pathological myopia": ["{grade} pathological myopia, tessellated fundus",
                            "{grade} pathological myopia, tilted disc with a peripapillary crescent"],
}  # fmt: skip
EXUDATES = (", no exudates", " and hard exudates")
PLAIN = ("Both eyes: {left}.", "Left eye: {left}. Right eye: {right}.")
PAIRS = [*PLAIN[1:], "The right eye shows {right}. The left eye shows {left}.", "OD: {right}. OS: {left}.",
         "Fundus photographs: {left} in the left eye, {right} in the right eye."]  # fmt: skip
SINGLE = ["{plain} in the {side} eye: {detail}.", "Fundus photograph of the {side} eye showing {detail}."]


def draw_patient(seed, index):
    """(findings, severities 0-1, cup-disc ratios) of the left and right eye; one patient in four has two findings."""
    rng = np.random.default_rng([seed, index, 0])
    first = str(rng.choice(list(FINDINGS), p=list(FINDINGS.values())))
    second = str(rng.choice([name for name in FINDINGS if name != first])) if rng.random() < 0.25 else first
    findings = [first, second] if rng.random() < 0.5 else [second, first]
    severities = np.clip(rng.uniform(0, 1) + rng.normal(0, 0.2, 2), 0.02, 1)
    cups = [0.6 + 0.3 * severities[k] if findings[k] == "glaucoma" else rng.uniform(0.2, 0.45) for k in (0, 1)]
    return findings, severities.tolist(), np.round(cups, 1).tolist()


def write_fundus(index, out, seed, size):
    """Draw both eyes of one patient and write them; returns the row of pairs.csv and that of prompts_*.csv."""
    findings, severities, cups = draw_patient(seed, index)
    patient, split = f"P{index:04d}", {2: "val", 5: "test"}.get(index % 20 % 7, "train")
    single = index // 2 % 2  # the eye that is also a picture of its own
    for side, eye in enumerate(EYES):
        image = Image.fromarray(draw_fundus(seed, index, side, findings[side], severities[side], cups[side], size))
        image.save(out / "images" / f"{patient}_{eye}.jpg", quality=92)
        if side == single:
            image.save(out / "by_index" / f"{index}.jpg", quality=92)
    rng, details = np.random.default_rng([seed, index, 4]), []
    for finding, severity, cup in zip(findings, severities, cups, strict=True):
        step = min(2, int(3 * severity))
        words = {"grade": GRADES[step], "count": COUNTS[step], "cup": cup, "exudates": EXUDATES[step > 0]}
        details.append(str(rng.choice(DETAILS[finding])).format(**words))
    plain = PLAIN[findings[0] != findings[1]].format(left=findings[0], right=findings[1])
    text = plain if rng.random() < 0.25 else str(rng.choice(PAIRS)).format(left=details[0], right=details[1])
    words = {"side": EYES[single], "detail": details[single], "plain": findings[single].capitalize()}
    prompt = [index, findings[single], str(rng.choice(SINGLE)).format(**words)]
    path = f"images/{patient}_{{}}.jpg".format
    return [patient, split, path("left"), findings[0], path("right"), findings[1], text], prompt


def make_fundus(args):
    """Write all files of the fundus demo."""
    for folder in ("images", "by_index"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    rows = run_all(partial(write_fundus, out=args.out, seed=args.seed, size=args.size), args)
    texts = [*FINDINGS, *GRADES, *COUNTS, *EXUDATES, *PLAIN, *PAIRS, *SINGLE, *EYES, *sum(DETAILS.values(), [])]
    (args.out / "vocab.txt").write_text("".join(f"{piece}\n" for piece in vocabulary(texts)))
    pairs, prompts = (pd.DataFrame([row[k] for row in rows], columns=c) for k, c in enumerate(FUNDUS_COLUMNS))
    prompts = prompts.sample(frac=1, random_state=args.seed)  # in no order, as users have it
    train = pairs["split"][prompts.index] == "train"
    prompts[train].to_csv(args.out / "prompts_train.csv", index=False)
    prompts[~train].to_csv(args.out / "prompts_test.csv", index=False)
    pairs.to_csv(args.out / "pairs.csv", index=False)
    print(f"{args.n} patients, 2 eyes each ({args.size} x {args.size}) -> {args.out / 'pairs.csv'}")


# ==== Chest films: drawing ======================================================================================

ZONES = ["right_sup", "left_sup", "right_mid", "left_mid", "right_inf", "left_inf"]
CXR_COLUMNS = ["FileID", *ZONES, "csi", "patient", "view", "diagnosis"]
APEX, BOX = -0.74, 0.36  # height of the lungs' tops; half side of the square in which a zone's findings are drawn


def draw_course(seed, index):
    """(diagnosis, films) of one patient: acute heart failure 0 or 1; each film's view and six scores of ZONES.

    Scores are 0-3 and NaN where a zone cannot be graded. One patient in four has a second film.
    """
    rng = np.random.default_rng([seed, index, 0])
    level, films, means = rng.normal(), [], []
    for _ in range(1 + (rng.random() < 0.25)):
        level = 0.85 * level + 0.53 * rng.normal()
        rows, sides = 0.35 * rng.normal(size=(3, 1)) + [[0.95], [1.3], [1.65]], 0.3 * rng.normal(size=2)
        scores = np.rint(np.clip(rows + 0.8 * level + sides + 0.55 * rng.normal(size=(3, 2)), 0, 3)).ravel()
        means.append(scores.mean())
        scores[rng.random(6) < (0.02, 0.02, 0.02, 0.02, 0.06, 0.06)] = np.nan
        mishap = rng.random()  # a film of no use; a field that begins too low; one that ends too high
        scores[: 6 if mishap < 0.015 else 2 if mishap < 0.035 else 0] = np.nan
        scores[4 if 0.035 < mishap < 0.055 else 6 :] = np.nan
        films.append((str(rng.choice(["PA", "AP"], p=[0.55, 0.45])), scores))
    risk = 1 / (1 + math.exp(-2.3 * (np.mean(means) - 2.0)))
    return int(rng.random() < risk), films


def draw_congestion(rng, row, score, size):
    """(size, size) whiteness that congestion adds to a zone of row 0-2, lateral to the right; share of vessels hidden.

    1: wide vessels, cuffs around bronchi, or septal lines, by the row; 2: a network; 3: fluffy patches with bronchi.
    """
    u, n, lines = rng.uniform, rng.normal, Layer(size)
    power, noise = u(0.95, 1.3), [clouds(rng, cells, size)[..., 0] for cells in (11, 10, 7, 5)]
    for k in range(6 if score < 3 else 0):
        if row == 0:
            at, fill = (-1.0, 1 - 0.3 * k), int(u(170, 255))
            lines.vessel(rng, at, u(-0.9, -0.3), u(-0.3, 0.3), u(1.3, 1.8), u(0.13, 0.17), fill, 1)
        elif row == 1:
            at, r, fill = (u(-0.5, 0.6), -0.9 + 0.36 * k + n(0, 0.08)), u(0.13, 0.18), int(u(170, 255))
            flat = u(0.8, 1.2)
            lines.dot(*at, r, r * flat, fill)
            lines.dot(*at, 0.5 * r, 0.5 * r * flat, 60)
        else:
            at = u(0, 0.25), -0.65 + 0.24 * k + n(0, 0.04)
            lines.vessel(rng, at, n(0, 0.12), 0, u(0.8, 1.0), 0.1, 255, 0)
    early = 0.22 * power * lines.cover(0.03)[..., 0]
    if score == 1:
        return early + 0.03 * (row == 1), 0.0
    if score == 2:
        net = np.maximum(*(np.exp(-((wave / 0.22) ** 2)) for wave in noise[:2]))
        return power * (0.15 * net * np.clip(0.9 + 0.35 * noise[2], 0.3, 1.4) + 0.02) + 0.4 * early, 0.4
    bronchi = Layer(size)
    for _ in range(9):
        bronchi.vessel(rng, n(0, 0.55, 2), u(0, 2 * np.pi), 0, u(0.5, 0.9), u(0.08, 0.12), 255, 1)
    fluff = np.clip(0.8 + 0.9 * noise[2] + 0.3 * noise[3], 0, 1.8)
    return power * (0.19 * fluff + 0.05) * (1 - 0.75 * bronchi.cover(0.02)[..., 0]), 0.8


def draw_cxr(seed, index, film, view, scores, size=224):
    """One frontal film: (H, W) float32 whiteness 0-1; the masks of the right and the left lung, (H, W) uint8 0 or 255.

    view: PA or AP; scores: six of ZONES, NaN where a zone is covered or outside the field; the short side has `size`
    pixels. The patient stands on a square of +-1.05 (x right, y down), which is then turned, cut to a film and exposed.
    Exposure, contrast and soft tissue vary more than congestion's haze: a zone's brightness says little of its score.
    """
    u = np.random.default_rng([seed, index, 1]).uniform  # what the films of a patient share
    habit, broad, tall, wings, woman = u(-1, 1), u(0.58, 0.68), u(0.94, 1.06), u(0.5, 0.8), u(0, 1) < 0.5
    rng = np.random.default_rng([seed, index, 2 + film])
    u, n, ap, gone, side_px = rng.uniform, rng.normal, view == "AP", np.isnan(scores), int(1.2 * size)
    axis, px = np.linspace(-1.05, 1.05, side_px, dtype=np.float32), 2.1 / side_px
    x, y = axis[None] - 0.02 * n(), axis[:, None]
    far = np.abs(x)

    def step(distance, soft):
        return np.clip(0.5 + distance / soft, 0, 1)

    def bump(cx, cy, rx, ry):
        return np.exp(-(((x - cx) / rx) ** 2)) * np.exp(-(((y - cy) / ry) ** 2))

    # ---- body with shoulders and neck, light from the side, belly, heart, spine, windpipe, stomach, breasts
    wide = 0.82 + 0.08 * habit + 0.06 * y + 0.5 * step(u(-0.45, -0.3) - y, 0.6)
    wide = wide - (wide - 0.26) * step(-y - 0.86 - u(0, 0.06), 0.16) ** 0.5
    white = 0.74 + 0.05 * habit - 0.1 * (x / wide) ** 2 + u(0.04, 0.11) * clouds(rng, 6, side_px)[..., 0]
    white += x * u(-0.12, 0.12) + y * u(-0.12, 0.12)
    domes = [tall * level - 0.12 * ap * u(0.3, 1) + u(-0.05, 0.05) for level in (0.34, 0.4)]  # right, left
    white += 0.1 * step(y - sum(domes) / 2 - 0.2 + 0.3 * far, 0.4) + 0.05 * bump(0.12, 0.25, 0.3, 0.35)
    white += u(0.04, 0.09) * step(0.1 - far, 0.04) * (1 + 0.35 * np.sin(36 * y + u(0, 6)))
    white -= u(0.05, 0.12) * step(0.04 - np.abs(x + 0.01), 0.03) * step(-0.22 - y, 0.1)
    white -= u(-0.1, 0.2) * bump(u(0.3, 0.42), domes[1] + 0.15, 0.15, 0.07)
    for side in (-1, 1) if woman else ():
        breast = np.hypot((x - side * u(0.36, 0.42)) / 0.34, (y - u(0.05, 0.25)) / 0.36)
        white += u(0, 0.16) * step(1 - breast, 0.3)
    # ---- lungs: beside the mediastinum, under the ribs, above the domes; their thirds
    air, soft, big, lungs, thirds = 0.42 + u(-0.08, 0.08), u(0.02, 0.06), u(0.85, 1.1) + 0.15 * ap, [], []
    for side, dome in zip((-1, 1), domes, strict=True):
        t = (y - APEX) / (dome + 0.2 - APEX)  # 0 at the apex, 1 at the base
        widest = 0.34 if side > 0 else 0.2  # height of the heart's border farthest out
        heart = np.clip(1 - ((y - widest) / np.where(y > widest, 0.3, 0.5)) ** 2, 0, 1) ** 0.6
        hilum = 0.12 + u(0.02, 0.07) * np.exp(-(((y + 0.08) / 0.14) ** 2))
        hilum = hilum + 0.07 * (side > 0) * np.exp(-(((y + 0.36) / 0.09) ** 2))  # the arch of the aorta
        inner = np.maximum(hilum, 0.07 + (0.36 if side > 0 else 0.13) * big * heart)
        inner = 0.24 + (inner - 0.24) * np.clip(1 - (1 - t / 0.22) ** 2 * (t < 0.22), 0, 1) ** 0.5
        outer = broad * (1 + 0.04 * n() + 0.05 * t) - 0.24
        outer = 0.24 + outer * np.clip(1 - (1 - t / wings) ** 2 * (t < wings), 0, 1) ** 0.5
        floor = dome + 0.24 * np.abs((side * x - 0.3) / 0.38) ** 2.2 * np.where(side * x > 0.3, 1, 0.4)
        inside = np.minimum(np.minimum(side * x - inner, outer - side * x), floor - y)
        lungs.append(step(inside, soft + px) * (y > APEX))
        thirds.append([step(t - a, 0.06) * step(b - t, 0.06) for a, b in ((-1, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 9))])
        white -= (air + u(-0.05, 0.05)) * lungs[-1]
    # ---- ribs fall outward behind and inward in front; collar bones, shoulder blades, vessels from the hila
    bones, metal, tree, ribs = Layer(side_px), Layer(side_px), Layer(side_px), u(0.03, 0.11)
    cage = step(0.03 + broad * (1 - 0.25 * np.minimum(y + 0.3, 0) ** 2) - far, 0.05) * step(0.75 - y, 0.2)
    for curve, gap, share in ((0.45 * far**2 - 0.12 * far, 0.155, 1.0), (-0.5 * far, 0.17, 0.6)):
        wave = np.abs(((y - curve) / gap + u(0, 1)) % 1 - 0.5)
        white += ribs * share * cage * step(0.2 - wave, 0.08) * (0.6 + 0.4 * step(wave - 0.13, 0.05))
    for side in (-1, 1):
        lift, tip = n(0, 0.03), n(0, 0.04)
        bones.line([(side * 0.06, -0.58), (side * 0.25, -0.63 + lift), (side * 0.5, -0.72 + lift), (side, -0.8)], 0.045)
        bones.line([(side * 0.95, -0.7), (side * (0.72 + tip), -0.15), (side * 0.95, -0.3)], 0.03, 110)
        for heading in np.linspace(-1.45, 1.35, 8) + n(0, 0.1, 8):
            start = side * (0.15 + 0.02 * n()), 0.1 * math.sin(heading) - 0.08
            heading = heading if side > 0 else np.pi - heading
            tree.vessel(rng, start, heading, n(0, 0.5), u(0.45, 0.62), u(0.018, 0.028), 220, 2)
    white += u(0.06, 0.16) * bones.cover(0.012)[..., 0]
    vessels, top, bottom = u(0.05, 0.16) * tree.cover(0.006)[..., 0], -2.0, 2.0
    # ---- zone by zone: congestion, or what makes it ungradable: fluid below, a pad above, the end of the field
    for zone, score in enumerate(scores):
        row, side = divmod(zone, 2)
        third = (domes[side] + 0.2 - APEX) / 3
        cx, cy = 0.8 * side - 0.4, APEX + third * (row + 0.5)
        if score > 0:
            half = int(BOX / px)
            i, j = (int((c + 1.05) / px) - half for c in (cy, cx))
            box = slice(i, i + 2 * half), slice(j, j + 2 * half)
            own = np.random.default_rng([seed, index, 10 + 6 * film + zone])
            extra, hidden = draw_congestion(own, row, score, 2 * half)
            share = lungs[side][box] * thirds[side][row][box[0]]
            vessels[box] *= 1 - hidden * share
            white[box] += share * extra[:, :: 2 * side - 1]
        elif not gone[zone] or gone.all():
            continue
        elif row == 2 and gone[4:].all():
            bottom = APEX + 2 * third
        elif row == 2:
            white += 0.8 * air * lungs[side] * step(y - APEX - 1.8 * third + 0.25 * (far - 0.3), 0.12)
        elif row == 0 and gone[:2].all():
            top = APEX + third
        else:
            metal.line([(cx - 0.25, cy), (cx + 0.25, cy)], 0.42, 235)
            metal.line([(cx - 0.21, cy), (cx + 0.21, cy)], 0.34, 185)
    white += vessels * np.maximum(*lungs)
    # ---- wires and marker; the field; turned and cut to a film in portrait or landscape
    for _ in range(rng.integers(0, 4) if ap else 0):
        at = u(-0.6, 0.6, 2)
        metal.vessel(rng, at, u(0, 2 * np.pi), u(-1.5, 1.5), u(0.8, 1.6), 0.012, 120, 0)
        metal.dot(*at, 0.025, 0.025, 200)
    if rng.random() < 0.8:
        mx, my = u(-0.78, -0.7), u(-0.66, -0.5)
        letter = (0, 2), (0, 0), (1.2, 0), (1.2, 1), (0, 1), (1.2, 2)  # R at the patient's right
        metal.line([(mx + 0.035 * a, my + 0.035 * b) for a, b in letter], 0.015)
    white = white * step(wide - far, 0.05) + 0.7 * metal.cover()[..., 0]
    white = np.where((y > top) & (y < bottom), white, np.float32(-9))
    width, height = (size, int(size * u(1, 1.2)))[:: 1 if rng.random() < 0.6 else -1]
    turn, zoom, shift, matrix = n(0, 0.035), 0.875 / u(0.97, 1.1), n(0, 0.025, 2), []
    for k, (a, b) in enumerate(((math.cos(turn), -math.sin(turn)), (math.sin(turn), math.cos(turn)))):
        a, b = 2 * zoom * a / (width * size) ** 0.5 / px, 2 * zoom * b / (height * size) ** 0.5 / px
        matrix += [a, b, (1.05 + shift[k]) / px - (a * width + b * height) / 2]

    def cut(image, how):
        return np.asarray(Image.fromarray(image).transform((width, height), Image.Transform.AFFINE, matrix, how))

    white = cut(white, Image.Resampling.BILINEAR)
    masks = [cut(np.uint8(255 * (lung > 0.5)), Image.Resampling.NEAREST) for lung in lungs]
    # ---- a film of no use is blurred and pale; noise, exposure, contrast
    if gone.all():
        blurred = Image.fromarray(np.uint8(255 * np.clip(white, 0, 1))).filter(ImageFilter.GaussianBlur(0.05 * size))
        white = 0.4 + 0.3 * np.float32(blurred) / 255
    noise = n(0, 1, white.shape).astype(np.float32)
    noise[1:] += u(0, 0.5) * noise[:-1]
    white = white + noise * u(0.004, 0.02)
    return (1 / (1 + np.exp((u(0.4, 0.54) - white) / u(0.12, 0.27)))) ** u(0.75, 1.35), masks


# ==== Chest films: files ========================================================================================


def write_cxr(index, out, seed, size):
    """Draw the films of one patient and write them with their masks; returns their rows of labels.csv."""
    diagnosis, films = draw_course(seed, index)
    depth = np.uint16 if np.random.default_rng([seed, index, 4]).random() < 0.4 else np.uint8  # by the patient's device
    rows = []
    for film, (view, scores) in enumerate(films):
        name, known = f"P{index:04d}_{film + 1}", scores[~np.isnan(scores)]
        image, masks = draw_cxr(seed, index, film, view, scores, size)
        grey = depth(np.rint(image * np.float32(np.iinfo(depth).max)))
        Image.fromarray(grey).save(out / "images" / f"{name}.png", compress_level=1)
        for side, mask in zip(("right", "left"), masks, strict=True):
            Image.fromarray(mask).save(out / "masks" / f"{name}_{side}_lung_mask.png")
        csi = round(float(known.mean()), 4) if len(known) else None
        rows.append([name, *scores, csi, f"P{index:04d}", view, diagnosis])
    return rows


def make_cxr(args):
    """Write all files of the chest film demo."""
    if args.size < 64:
        raise UserError(f"--size {args.size}: too small for six zones (use 64 or more)")
    for folder in ("images", "masks"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    rows = sum(run_all(partial(write_cxr, out=args.out, seed=args.seed, size=args.size), args), [])
    table = pd.DataFrame(rows, columns=CXR_COLUMNS).astype(dict.fromkeys(ZONES, "Int64"))  # an empty cell: unknown
    table.to_csv(args.out / "labels.csv", sep=";", index=False)
    print(f"{len(rows)} films of {args.n} patients (short side {args.size}) -> {args.out / 'labels.csv'}")


# ==== Main =====================================================================================================


def parse_args(argv=None):
    show = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=show)
    commands = parser.add_subparsers(dest="command", required=True)
    ct = commands.add_parser("ct", help="chest CT volumes with the 18 findings of CT-RATE", formatter_class=show)
    ct.add_argument("--slices", type=int, default=16, help="slices of a volume")
    ct.add_argument("--no-nifti", dest="nifti", action="store_false", help="leave out the CT-RATE tree")
    fundus = commands.add_parser("fundus", help="left and right fundus pictures and reports", formatter_class=show)
    cxr = commands.add_parser("cxr", help="chest films, their congestion scores and lung masks", formatter_class=show)
    for command, run, out, n, size in (
        (ct, make_ct, "demo", 500, 96),
        (fundus, make_fundus, "demo/fundus", 400, 128),
        (cxr, make_cxr, "demo/cxr", 400, 224),
    ):
        command.add_argument("--out", type=Path, default=Path(out), help="folder to write to")
        command.add_argument("--n", type=int, default=n, help="patients: a volume, two pictures, or 1-2 films each")
        command.add_argument("--size", type=int, default=size, help="side in pixels; of a film, the short one")
        command.add_argument("--seed", type=int, default=42, help="seed of patients, findings and noise")
        command.add_argument("--num-workers", type=int, default=min(8, os.cpu_count() or 1), help="drawing processes")
        command.set_defaults(run=run)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.n < 10 or args.size < 32:
            raise UserError(f"--n {args.n} --size {args.size}: too few patients, too small (use 10 and 32 or more)")
        if args.seed < 0:
            raise UserError(f"--seed {args.seed}: negative (use 0 or more)")
        args.run(args)
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
