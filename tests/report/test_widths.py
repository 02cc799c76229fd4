"""The report in a browser: nothing is scrolled sideways on a phone, at a desk and on paper, and every
text can be read in light and dark.
"""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from written_reports import report_texts

from tests.report.test_report import PRETRAINING, TRACEBACK, failure, simulate

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), ""
)
PHONE, TABLETS, DESK, PAPER = 390, (768, 860), 1280, 718
"""Pixels; the last one is the width of A4 without margins of 1 cm."""
DARK, PRINT = "@media screen and (prefers-color-scheme:dark)", "@media print"
MEASURE = """
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);

// words of tables and headings of which one letter is in another line than the next
const broken_words = page => {
  const out = [], range = page.createRange();
  const nodes = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  for (let node = nodes.nextNode(); node; node = nodes.nextNode()) {
    if (!node.parentElement.closest("th, td, h1, h2, h3, summary")) continue;
    for (const {0: word, index} of node.data.matchAll(/[\\p{L}\\p{N}.,]{2,20}/gu)) {
      range.setStart(node, index);
      range.setEnd(node, index + word.length);
      const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
      if (lines.size > 1) out.push(word);
    }
  }
  return out;
};

// the lowest contrast of a text with what is painted behind it (WCAG 2)
const contrast = (page, view) => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const seen = {};
  const paint = colours => seen[colours] ??= (() => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return luminance(canvas.getImageData(0, 0, 1, 1).data);
  })();
  const backgrounds = new Map();
  const behind = at => {
    if (!at) return [];
    if (!backgrounds.has(at)) {
      const above = behind(at.parentElement), own = view.getComputedStyle(at).backgroundColor;
      backgrounds.set(at, own === "rgba(0, 0, 0, 0)" ? above : [...above, own]);
    }
    return backgrounds.get(at);
  };
  let lowest = {ratio: 99, text: ""};
  for (const one of page.querySelectorAll("body *")) {
    const text = [...one.childNodes].filter(node => node.nodeType === 3)
      .map(node => node.textContent.trim()).join("");
    if (!text) continue;
    const style = view.getComputedStyle(one), below = behind(one);
    const colour = one.closest("svg") ? style.fill : style.color;
    const both = [paint(below), paint([...below, colour])].sort((a, b) => b - a);
    const ratio = (both[0] + 0.05) / (both[1] + 0.05);
    if (ratio < lowest.ratio) lowest = {ratio, text: text.slice(0, 60)};
  }
  return lowest;
};

addEventListener("load", () => {
  const out = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, view = page.defaultView;
    const folded = [...page.querySelectorAll("details *:not(summary)")]
      .filter(one => !one.checkVisibility({contentVisibilityAuto: true})).length;
    page.querySelectorAll("details").forEach(one => one.open = true);
    const tables = page.querySelectorAll(".scroll, pre");
    const texts = [...page.querySelectorAll("svg text")].map(one => {
      const box = one.getBoundingClientRect(), svg = one.closest("svg").getBoundingClientRect();
      return {height: box.height, out: Math.max(svg.left - box.left, box.right - svg.right)};
    });
    return {
      width: view.innerWidth,
      page: page.documentElement.scrollWidth,
      wide: [...tables].filter(one => one.scrollWidth > one.clientWidth)
        .map(one => one.textContent.slice(0, 60)),
      broken: broken_words(page),
      text_height: Math.min(...texts.map(one => one.height)),
      text_outside: Math.max(...texts.map(one => one.out)),
      folded,
      paper: view.getComputedStyle(page.body).backgroundColor,
      contrast: contrast(page, view),
    };
  });
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = JSON.stringify(out);
  document.body.append(found);
});
"""


def measure(pages: list[tuple[str, int]], folder) -> list[dict]:
    """Return what a browser measures of pages in frames of these widths, with all details open."""
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:900px" '
        f'srcdoc="{html.escape(page, quote=True)}"></iframe>'
        for page, width in pages
    )
    (folder / "frames.html").write_text(
        f"<!doctype html><meta charset=utf-8><script>{MEASURE}</script>{frames}"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [*command, profile, f"file://{folder / 'frames.html'}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-500:]
    return json.loads(html.unescape(found[1]))


OTHERS = {
    "m": (("scratch",), {"technique": "majority", "backbone": "none"}),
    "v": (("scratch", "full"), {"backbone": "timm/vit_base_patch16_224"}),
}
"""A baseline and another backbone: end of the trial ids, the trials they are like, and what differs."""


def full_report(folder) -> str:
    """A report with every kind of block, long names and 20 classes."""
    rows, runs, curves = simulate()
    for name, (like, changed) in OTHERS.items():
        more = [
            replace(row, trial_id=f"{row.trial_id}-{name}", **changed)
            for row in rows
            if row.technique in like and row.backbone == "timm/resnet18"
        ]
        runs |= {row.trial_id: runs[row.trial_id.removesuffix(f"-{name}")] for row in more}
        rows += more
    longest = "photographs_of_everyday_clothing_2024"
    rows = [
        replace(
            row,
            target=longest if row.target == "clothing" else row.target,
            layers_trained="head.weight, head.bias, blocks.11.attention.self.query.lora_A.weight",
        )
        for row in rows
    ]
    rows += [replace(row, split="validation") for row in rows if row.metric == "accuracy"]
    rows += [failure(longest, TRACEBACK, "cl-lora-1")]
    names = tuple(f"garment number {k}" for k in range(20))
    rng = np.random.default_rng(0)

    def of_many_classes(run):
        label = np.arange(400) % 20
        right = run.predictions["scores"].argmax(1) == run.predictions["label"]
        scores = rng.normal(size=(400, 20)).astype(np.float32)
        scores[np.arange(400), label] += np.where(right, 4, -1)
        predictions = {**run.predictions, "scores": scores, "label": label}
        return replace(run, predictions=predictions, labels=names)

    runs = {
        name: of_many_classes(run) if name.startswith("cl") else replace(run, labels=("no", "yes"))
        for name, run in runs.items()
    }
    scores = {
        f"{source}|{target}": {"score_name": "logme", "score_value": value}
        for source, target, value in (
            ("garments", longest, 0.5),
            ("digits", longest, 0.1),
            ("garments", "handwriting", 0.2),
            ("digits", "handwriting", 0.6),
        )
    }
    uri = "s3://bucket/a_folder_with_a_name_that_has_no_blank_anywhere_in_it/sources/garments"
    pretraining = [replace(PRETRAINING[0], bundle=uri, transfer="kept " + "x" * 200)]
    more = {"notes": ["A note."], "versions": {"torch": "2.11.0"}, "scores": scores}
    _, page = report_texts(
        folder, rows, runs, job_name="vision", curves=curves, pretraining=pretraining, **more
    )
    return page


@pytest.mark.skipif(not CHROMIUM, reason="neither chromium nor chrome is installed")
def test_every_text_fits_and_can_be_read(tmp_path):
    """On a phone, at a desk in light and dark, and on paper."""
    page = full_report(tmp_path)
    for part in (
        "Gain over best scratch",
        "Gain over best baseline",
        "Sources by targets",
        "Class by class",
        "Calibration",
        "On the front",
        "LogME",
    ):
        assert part in page
    assert page.count(DARK) == 1 and page.count(PRINT) == 1
    dark, paper = page.replace(DARK, "@media all"), page.replace(PRINT, "@media all")
    screens = [(page, width) for width in (PHONE, *TABLETS, DESK)]
    measured = measure([*screens, (dark, DESK), (paper, PAPER)], tmp_path)
    phone, *_, desk, night, printed = measured
    assert [found["width"] for found in measured] == [PHONE, *TABLETS, DESK, DESK, PAPER]
    for found in measured:
        assert found["page"] <= found["width"]
        assert found["wide"] == [], found["width"]
        assert found["broken"] == [], found["width"]
        assert found["text_outside"] <= 1, "text of a figure is cut off"
        assert found["contrast"]["ratio"] >= 4.5, found["contrast"]
    assert phone["text_height"] >= 8, "text of a figure is too small to read"
    assert desk["paper"] != night["paper"]
    assert desk["folded"] > 0 and printed["folded"] == 0, "paper has everything that is folded"
