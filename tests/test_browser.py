"""The pages that evaluate.py writes, in a headless Chromium: everything visible, nothing wider than the screen, no
console message, nothing from outside, and a PDF without empty pages."""

import html
import json
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from test_evaluate_retclip import score as score_pairs  # noqa: F401
from test_evaluate_retclip import world  # noqa: F401
from test_zones import Films
from test_zones import score as score_films  # noqa: F401

import evaluate

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium, chromium-browser or google-chrome")
WIDTHS = (1280, 390)  # pixels of a desktop's and of a phone's window
HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "it's \"quoted\" & 'more'", "</td></table></style>",
    "a label with a name that goes on and on, as those do that were sentences in somebody's spreadsheet" * 2,
    "Averylongnamewithoutanyplacetobreakit" * 4, "肺结节与胸腔积液", "=1+1", "{label}%s\\n",
]  # fmt: skip

# Puts what a reader would not see, or would have to scroll sideways for, into <pre id="found">.
WRAPPER = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe src="%(page)s" style="border:0;width:1280px;height:900px"></iframe>
<iframe src="%(page)s" style="border:0;width:390px;height:900px"></iframe>
<pre id="found"></pre>
<script>
function problems(frame) {
  const doc = frame.contentDocument, width = frame.clientWidth, found = [], seen = {};
  doc.querySelectorAll('details').forEach(d => d.open = true);
  const say = (what, e) => found.push(what + ': ' + e.outerHTML.slice(0, 150));
  for (const e of doc.querySelectorAll('img, svg, table')) {
    const box = e.getBoundingClientRect(), name = e.tagName.toLowerCase();
    seen[name] = (seen[name] || 0) + 1;
    if (name == 'img' && !(e.complete && e.naturalWidth > 0)) say('not drawn', e);
    if (box.width < 1 || box.height < 1) say('no size', e);
  }
  for (const e of doc.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect();
    if (!e.closest('.scroll') && box.width && (box.right > width + 1 || box.left < -1)) say('off the page', e);
  }
  if (doc.documentElement.scrollWidth > width) found.push('scrolls sideways: ' + doc.documentElement.scrollWidth);
  return {width, seen, found: found.slice(0, 8)};
}
addEventListener('load', () => {
  const all = [...document.querySelectorAll('iframe')].map(problems);
  document.getElementById('found').textContent = JSON.stringify(all);
});
</script>"""


def chromium(folder, *words):
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --disable-extensions --enable-logging=stderr --v=0 "
    flags += f"--hide-scrollbars --virtual-time-budget=5000 --user-data-dir={folder / 'profile'}"
    done = subprocess.run([CHROMIUM, *flags.split(), *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def seen_in_browser(page, folder) -> tuple[list[dict], list[str]]:
    """-> for each of WIDTHS {width, seen: {tag: how many}, found: problems}, and the console's lines."""
    wrapper = folder / "wrapper.html"
    wrapper.write_text(WRAPPER % {"page": page.as_uri()})
    words = ("--disable-web-security", "--allow-file-access-from-files", "--window-size=1700,900", "--dump-dom")
    done = chromium(folder, *words, wrapper.as_uri())
    said = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)[1]
    return json.loads(html.unescape(said)), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def printed(page, folder) -> list[bytes]:
    """The drawing commands of each page of the PDF."""
    chromium(folder, f"--print-to-pdf={folder / 'p.pdf'}", "--no-pdf-header-footer", page.as_uri())
    pdf = (folder / "p.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    objects = dict(re.findall(rb"\n(\d+) 0 obj\n(.*?)\nendobj", pdf, re.S))
    leaves = [text for text in objects.values() if re.search(rb"/Type /Page\b", text)]
    streams = [objects[re.search(rb"/Contents (\d+) 0 R", leaf)[1]] for leaf in leaves]
    return [zlib.decompress(stream.partition(b"stream\n")[2]) for stream in streams]


class Addresses(HTMLParser):
    """`found`: what the page would load or leads to, other than its own data and places."""

    def __init__(self, text):
        super().__init__()
        self.found = re.findall(r"@import.*|url\((?!data:|#)[^)]*", text)
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [f"{tag} {name}={value}" for name, value in attributes
                       if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
                       and not (value or "").startswith(("data:image/", "#"))]  # fmt: skip


def check(page, folder, least: dict, pages: range) -> None:
    """least: how many of each tag there must be; pages: how many the PDF may have."""
    text = page.read_text(encoding="utf-8")
    assert 20e3 < len(text.encode()) < 5e6, f"{len(text.encode()):,} bytes"
    assert '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'' in text
    outside = Addresses(text).found
    assert not outside, outside[:3]
    views, console = seen_in_browser(page, folder)
    assert not console, console[:3]
    assert [view["width"] for view in views] == list(WIDTHS)
    for view in views:
        assert not view["found"], (view["width"], view["found"])
        assert all(view["seen"].get(tag, 0) >= n for tag, n in least.items()), view["seen"]
    drawn = printed(page, folder)
    assert len(drawn) in pages, len(drawn)
    empty = [i + 1 for i, commands in enumerate(drawn) if b"Tj" not in commands and b" Do" not in commands]
    assert not empty, f"empty pages {empty} of {len(drawn)}"


# ---- the checks find what is wrong


DEFECTS = {
    "broken picture": ('<img src="data:image/png;base64,AAAA">', "not drawn"),
    "empty table": ("<table></table>", "no size"),
    "too wide": ('<div style="width:1500px">x</div>', "off the page"),
    "wide on a phone": ('<div style="width:700px">x</div>', "off the page"),
    "hidden figure": ('<svg style="display:none"></svg>', "no size"),
}


def test_planted_defects_are_found(tmp_path):
    """All in one call of the browser: one page, whose sections are the defects; and what is right is left alone."""
    picture = (
        "data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciIHdpZHRoPSI5IiBoZWlnaHQ9IjkiLz4="
    )
    wide = '<table class="inner" style="width:1900px"><tr><td>x</td></tr></table>'
    right = f'<img src="{picture}"><div class="scroll" style="overflow-x:auto">{wide}</div>'
    page = tmp_path / "page.html"
    body = "".join(f'<section title="{name}">{defect}</section>' for name, (defect, _) in DEFECTS.items())
    page.write_text(f"<!DOCTYPE html><body style='margin:0'>{right}{body}<script>console.error('planted')</script>")
    text = '<img src=x><a href="http://a.b">src="y"</a><img src="data:image/png;base64,A" alt="src=z">'
    assert Addresses(text).found == ["img src=x", "a href=http://a.b"]
    (desktop, phone), console = seen_in_browser(page, tmp_path)
    assert any("planted" in line for line in console)
    for name, (defect, word) in DEFECTS.items():
        start = f"{word}: {defect.replace(' src', ' src')}"[:60]
        assert any(problem.startswith(start) for problem in phone["found"]), (name, phone["found"])
        assert any(problem.startswith(start) for problem in desktop["found"]) == (name != "wide on a phone"), name
    said = " ".join(desktop["found"] + phone["found"])
    assert "inner" not in said and picture[:50] not in said
    assert any(problem.startswith("scrolls sideways") for problem in desktop["found"])
    assert desktop["seen"] == {"img": 2, "table": 2, "svg": 1}


# ---- the pages


def make_files(folder, n, names, seed=0):
    """preds.csv, other.csv and labels.csv; the last name but one is never positive."""
    rng, ids = np.random.default_rng(seed), [f"valid_{i // 2}_a_{i % 2 + 1}" for i in range(n)]
    y = (rng.random((n, len(names))) < np.linspace(0.07, 0.45, len(names))).astype(int)
    y[:, -2] = 0
    pd.DataFrame(y, columns=names).assign(id=ids).to_csv(folder / "labels.csv", index=False)
    for file in ("preds", "other"):
        p = 1 / (1 + np.exp(-(rng.normal(size=y.shape) + 1.5 * y - 1)))
        columns = [f"{name}_prob" for name in names]
        pd.DataFrame(p.round(3), columns=columns).assign(id=ids).to_csv(folder / f"{file}.csv", index=False)


def test_page_of_18_hostile_labels(tmp_path):
    """Its size is what is promised of a real one: 200 kB to 5 MB."""
    make_files(tmp_path, 500, [*HOSTILE, *(f"label {k}" for k in range(18 - len(HOSTILE)))])
    words = ["--predictions", tmp_path / "preds.csv", "--labels", tmp_path / "labels.csv"]
    words += ["--output", tmp_path / "eval"]
    assert evaluate.main([*map(str, words), "--n-bootstrap", "20"]) == 0
    assert (tmp_path / "eval/report.html").stat().st_size > 200e3
    check(tmp_path / "eval/report.html", tmp_path, {"img": 4 * 16, "table": 2}, range(5, 31))


def test_page_of_films(score_films, tmp_path):  # noqa: F811
    films = Films()
    films.fail(3)
    films.ids = [HOSTILE[i] if i < 2 else name for i, name in enumerate(films.ids)]
    score_films(films, code=3, page=True)
    check(score_films.folder / "report.html", tmp_path, {"img": 6, "table": 3}, range(3, 31))


def test_page_of_pairs(score_pairs, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluate, "draw", lambda *given: None)  # the stand-in has no model to explain
    score_pairs("--threshold-part", 0.3, page=True)
    check(tmp_path / "report.html", tmp_path, {"img": 12, "table": 3}, range(3, 31))


def test_page_of_a_comparison(tmp_path):
    make_files(tmp_path, 160, HOSTILE)
    words = ["--compare", tmp_path / "preds.csv", tmp_path / "other.csv", "--labels", tmp_path / "labels.csv"]
    assert evaluate.main([*map(str, words), "--output", str(tmp_path / "eval"), "--n-bootstrap", "20"]) == 0
    check(tmp_path / "eval/report.html", tmp_path, {"img": 4, "table": 2}, range(2, 31))
