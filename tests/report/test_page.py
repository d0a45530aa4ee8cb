"""The page, read back with Python's own HTML parser."""

import base64
import dataclasses
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from cryoalign.pose import Pose
from cryoalign.report.page import flags, write_report
from cryoalign.report.pictures import draw, picture
from cryoalign.results.alignment import Alignment

NASTY = """/data/<script>alert("x")</script>/{{ 7 * 7 }}/a&b 'c'.star"""


class Page(HTMLParser):
    """Tables as lists of rows of (text, data-value), all attributes, and visible text."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.tags, self.attributes, self.text = [], [], [], ""
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.in_cell = True
            self.tables[-1][-1].append(["", dict(attrs).get("data-value")])

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1][0] += data.strip()


def alignment(sizes=(30, 0, 50, 2), resolution=(8.0, np.inf, 7.5, np.nan), **changes):
    """A run with the given class sizes, three particles set aside, and shifts within 2 px."""
    rng = np.random.default_rng(0)
    number = torch.as_tensor(np.repeat(np.arange(len(sizes) + 1), [3, *sizes]))
    n, k = len(number), len(sizes)
    gone = number == 0
    angle = torch.as_tensor(rng.uniform(-180, 180, n)).masked_fill(gone, torch.nan)
    shift = torch.as_tensor(rng.uniform(-2, 2, (n, 2))).masked_fill(gone[:, None], torch.nan)
    result = Alignment(
        pose=Pose(angle, shift, torch.as_tensor(rng.random(n) < 0.5)),
        class_number=number,
        score=torch.as_tensor(rng.normal(0.3, 0.05, n)).masked_fill(gone, torch.nan),
        averages=torch.as_tensor(rng.normal(size=(k, 16, 16))).float(),
        frc=torch.linspace(1, 0, 9).repeat(k, 1),
        resolution=torch.tensor(resolution[:k]),
        class_sizes=torch.tensor(sizes),
        history=pd.DataFrame(
            {"iteration": [1, 2], "mean_score": [0.2, 0.3], "reassigned": [1.0, 0.01]}
        ),
        rejected=pd.DataFrame({"index": [0, 1, 2], "reason": ["constant", "<i>NaN</i>", "NaN"]}),
        pixel_size=3.0,
    )
    return dataclasses.replace(result, **changes)


def test_class_table_is_the_alignment(tmp_path):
    result = alignment()
    page = Page(write_report(result, tmp_path / "run").read_text(encoding="utf-8"))
    rows = page.tables[0][1:]
    assert [row[0][0] for row in rows] == ["3", "1", "4", "2"]  # largest first
    assert [int(row[2][1]) for row in rows] == [50, 30, 2, 0]
    assert [float(row[3][1]) for row in rows] == pytest.approx([50 / 82, 30 / 82, 2 / 82, 0])
    assert [row[4][0] for row in rows] == ["7.5", "8.0", "–", "–"]
    means = [result.score[result.class_number == i].mean().item() for i in (3, 1, 4)]
    assert [float(row[5][1]) for row in rows[:3]] == pytest.approx(means)
    assert rows[3][5][0] == "–"
    set_aside = page.tables[1][1:]
    assert [[cell[0] for cell in row] for row in set_aside] == [
        ["0", "constant"],
        ["1", "<i>NaN</i>"],
        ["2", "NaN"],
    ]
    for text in ("3 of 85 particles are in no class", "resolution (Å)", "7.5 / 7.8 Å", "3 of 4"):
        assert text in page.text


def test_stable_classes_stay_in_their_order(tmp_path):
    errors = pd.DataFrame({"order": [2, 1, 4, 3], "pixel_error": [0.3, 0.2, 0.4, 0.1]})
    path = write_report(alignment(class_quality=errors), tmp_path, {"method": "isac"})
    page = Page(path.read_text(encoding="utf-8"))
    assert [(row[0][0], row[-1][0]) for row in page.tables[0][1:]] == [
        ("2", "0.20"),
        ("1", "0.30"),
        ("4", "0.10"),
        ("3", "0.40"),
    ]
    assert "Classes are in an order in which neighbours look alike" in page.text
    assert "Pixel error is the mean" in page.text
    assert "Compactness" not in page.text


def test_nothing_is_fetched_and_nothing_is_taken_for_markup(tmp_path):
    config = {"particles": NASTY, "particle": {"max_shift": "3 px", "radius": None}}
    extra = picture("tsne.png", Figure(figsize=(1, 1)))
    extra = dataclasses.replace(extra, title="<b>Before</b> & after")
    pictures = [*draw(alignment()), extra]
    page = Page(write_report(alignment(), tmp_path, config, pictures).read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1  # the table's sorting
    assert "b" not in page.tags
    assert "i" not in page.tags
    assert NASTY in page.text
    assert "<b>Before</b> & after" in page.text
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "action")]
    assert len(sources) == 3 + 5  # thumbnails of the classes with particles; pictures
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    shown = [base64.b64decode(source.partition(",")[2]) for source in sources]
    assert {picture.png for picture in pictures} <= set(shown)  # none is drawn for a second time
    assert [[cell[0] for cell in row] for row in page.tables[2][1:]] == [
        ["particle.max_shift", "3 px"],
        ["particle.radius", "–"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_sound_run_raises_no_flag(tmp_path):
    sound = alignment((30, 28, 31), (8.0, 8.1, 7.9))
    assert flags(sound, 3.0) == []
    page = Page(write_report(sound, tmp_path, max_shift=3.0).read_text("utf-8"))
    assert "No warnings" in page.text
    assert flags(alignment((20,), (8.0,)), 3.0) == []  # one class has everything, rightly


def test_flags_name_what_is_wrong():
    empty, attracting, unresolved = flags(alignment(), 3.0)
    assert empty.startswith("1 of 4 classes are empty (2)")
    assert attracting.startswith("Class 3 attracts 61%")
    assert unresolved.startswith("In class 4 ")
    (piled,) = flags(alignment((30, 28, 31), (8.0, 8.1, 7.9)), 1.5)
    assert "±1.5 px" in piled
    assert "raise particle.max_shift" in piled
    (piled,) = flags(alignment((30, 28, 31), (8.0, 8.1, 7.9)), 1.5, "schedule.max_shift")
    assert "raise schedule.max_shift" in piled
    history = pd.DataFrame({"iteration": [1, 2], "reassigned": [1.0, 0.2]})
    (restless,) = flags(alignment((30, 28, 31), (8.0, 8.1, 7.9), history=history), 3.0)
    assert restless.startswith("20% of the particles still changed class")


def test_many_rejected_particles_are_cut_short_but_counted(tmp_path):
    rejected = pd.DataFrame({"index": range(50), "reason": "constant"})
    page = Page(write_report(alignment(rejected=rejected), tmp_path).read_text(encoding="utf-8"))
    assert "50 of 85 particles are in no class; the first 20 are" in page.text
    assert len(page.tables[1]) == 1 + 20
    none = alignment(rejected=rejected[:0])
    page = Page(write_report(none, tmp_path).read_text(encoding="utf-8"))
    assert "None: all 85 particles were used." in page.text
