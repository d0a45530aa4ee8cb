"""How far a result's own judgement holds: junk, error bars and flags against the truth of a set."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from bench.agreement import pose_errors
from bench.data import particle_of, truth_of
from bench.result import Result, Row
from cryoalign.io.stack import read_particles
from cryoalign.methods.classify.classify import classify
from cryoalign.report.page import flags
from cryoalign.results.alignment import Alignment
from cryoalign.results.quality import effective_classes

SIDES = 1.959964  # deviations on either side hold 95 % of a normal distribution


def run(
    data: Annotated[tuple[Path, ...], "PREFIXes of .star, .mrcs and _truth.npz"] = (),
    k: Annotated[int | None, "classes; else as many as there are true views"] = None,
    result: Annotated[Path | None, "an alignment.npz to judge, instead of classifying"] = None,
    mask_radius: Annotated[float | None, "of the particle, px; else 0.4 of the box"] = None,
    seed: Annotated[int, "of the classification"] = 0,
    device: Annotated[str, "cpu or cuda"] = "cpu",
) -> Result:
    """Junk score, error bars and flags, held against the truth.

    AUC: of the junk score, junk (particles without a true view) against the others. Caught, lost:
    shares of junk and of the others with a score above zero. Last classes: the same shares in the
    classes ranked last, as many as hold no more than 5 % of the good ones. Covered: share of the
    95 % intervals that hold the truth, of particles of right class, hand, within 10 degrees and
    2 px; their class's own turn and place are taken out. Flags are listed below.
    """
    rows: list[Row] = []
    notes: list[str] = []
    for prefix in data:
        stack, (view, truth) = read_particles(f"{prefix}.star"), truth_of(prefix)
        clock = time.process_time()
        if result is None:
            classes = k or int(view.max()) + 1
            particle = particle_of(mask_radius)
            found = classify(stack, classes, particle=particle, seed=seed, device=device)
        else:
            found = Alignment.load(result)
        seconds = time.process_time() - clock
        frame = found.to_frame()
        rows.append(
            {"set": prefix.name, "K": len(found.averages)}
            | _junk(frame, found.class_frame(), view < 0)
            | _coverage(frame, *pose_errors(found.class_number - 1, found.pose, view, truth))
            | {
                "effective classes": effective_classes(found.class_sizes),
                "flags": len(flags(found)),
                "CPU seconds": seconds,
            }
        )
        notes += [f"{prefix.name}: {flag}" for flag in flags(found)]
        aside = int((found.class_number == 0).sum())
        if int(found.class_sizes.sum()) + aside != len(stack):
            raise AssertionError(f"{prefix}: classes and particles set aside are not the input")
    if not rows:
        raise ValueError("data is missing: name at least one set, e.g. --data sets/hard")
    return Result(rows, notes)


def _junk(frame: pd.DataFrame, classes: pd.DataFrame, junk: Tensor) -> Row:
    """How well junk is told; None where there is none."""
    truth, score = junk.numpy(), frame["junk_score"].fillna(float("inf")).to_numpy()
    marked = score > 0
    row: Row = {"good lost": float(marked[~truth].mean())}
    if not truth.any():
        return row | dict.fromkeys(("AUC", "junk caught", "last classes: junk", "good"))
    worst = classes.sort_values("rank", ascending=False)["class_number"]
    good = pd.Series(~truth).groupby(frame["class_number"]).sum()
    last = worst[good.reindex(worst, fill_value=0).cumsum().to_numpy() <= 0.05 * (~truth).sum()]
    there = frame["class_number"].isin([0, *last]).to_numpy()
    return row | {
        "AUC": float(roc_auc_score(truth, score.clip(max=1e9))),
        "junk caught": float(marked[truth].mean()),
        "last classes: junk": float(there[truth].mean()),
        "good": float(there[~truth].mean()),
    }


def _coverage(frame: pd.DataFrame, right: Tensor, error: Tensor) -> Row:
    """Share of 95 % intervals that hold the truth."""
    names = ["angle_sd", "shift_x_sd", "shift_y_sd"]
    sd = torch.tensor(frame[names].to_numpy("float64"))[right]
    held = (error[right].abs() <= SIDES * sd).double().mean(0)
    median = sd.median(0).values
    return {
        "right": float(right.double().mean()),
        "covered: angle": float(held[0]),
        "x": float(held[1]),
        "y": float(held[2]),
        "sd °": float(median[0]),
        "sd px": float(median[1:].mean()),
    }
