"""The pictures of a run, each drawn once for both the run folder and the report."""

from dataclasses import dataclass

from matplotlib.figure import Figure

from cryoalign.report import figures
from cryoalign.report.montage import montage
from cryoalign.results.alignment import Alignment

TEXTS = {
    "class_averages.png": (
        "Class averages",
        "Each average is weighted by its own Fourier ring correlation (FRC).",
    ),
    "histograms.png": (
        "Poses and class sizes",
        "Shifts are in pixels of the input. When an average is centred, the shifts of its "
        "particles change with it, so some can exceed the search limit.",
    ),
    "frc.png": (
        "Resolution",
        "Fourier ring correlation between the averages of two half-sets, for each class.",
    ),
    "quality.png": (
        "Quality of the particles",
        "Left and centre: standard deviations of the pose, computed from the noise of each "
        "particle under the assumption that its class is right. Right: the two measures by which "
        "junk is found. Evidence compares a particle with the average of the half-set that does "
        "not contain it; a low value means that the particle looks like pure noise. Oddness "
        "compares what remains of a particle after its class average is subtracted with the same "
        "for all other particles; a high value points to ice, carbon or overlapping particles. "
        "Particles with little evidence or great oddness are marked as junk: look at a few of "
        "them before you discard them.",
    ),
    "history.png": (
        "Convergence",
        "The run has converged where the curves are flat.",
    ),
    "tsne.png": (
        "Particles before and after alignment (t-SNE)",
        "After alignment, each particle is turned to match the average of its own class. This "
        "alone separates the classes, so separate groups do not prove that the classes are right.",
    ),
}
"""Title and caption of each picture, by the name of its file."""
STEPS_NOTE = (
    "The background colour shows the step of each iteration: the search for first classes (start, "
    "subset), the refinement after splitting and merging classes (cycle), and the refinement at a "
    "higher resolution (relax). Log-evidence can be compared only within one resolution. "
)
DPI = 150


@dataclass(frozen=True)
class Picture:
    """A picture of a run.

    Attributes:
        name: name of its file in the run folder.
        title: heading in the report.
        caption: text below the picture in the report.
        png: the bytes of the PNG file.
        width: width in CSS pixels on the page.
    """

    name: str
    title: str
    caption: str
    png: bytes
    width: int


def picture(name: str, figure: Figure, note: str = "") -> Picture:
    """Draw a figure once.

    Args:
        name: name of the file, a key of `TEXTS`.
        figure: what to draw.
        note: a sentence to put before the caption.
    """
    title, caption = TEXTS[name]
    width = round(110 * figure.get_figwidth())
    return Picture(name, title, note + caption, figures.to_png(figure, DPI), width)


def draw(alignment: Alignment, max_shift: float | None = None) -> list[Picture]:
    """Draw the pictures of a run; the montage of the class averages comes first.

    Args:
        alignment: the result of the run.
        max_shift: largest shift of the search in pixels of the input; None if it is not known.
    """
    frame, averages, pixel_size = alignment.to_frame(), alignment.averages, alignment.pixel_size
    shown = montage(
        alignment.filtered_averages(),
        alignment.class_sizes,
        alignment.resolution,
        pixel_size=pixel_size,
        order=alignment.class_quality.get("order"),
    )
    order = "The largest class comes first. "
    if "order" in alignment.class_quality:
        order = "Classes are in an order in which neighbours look alike. "
    size = averages.shape[-1]
    poses = figures.pose_histograms(frame, max_shift, len(averages))
    made = [
        picture("class_averages.png", shown, order),
        picture("histograms.png", poses),
        picture("frc.png", figures.frc_curves(alignment.frc, pixel_size, size=size)),
    ]
    if "junk_score" in frame:
        made.append(picture("quality.png", figures.quality(frame)))
    if set(figures.HISTORY) & set(alignment.history):
        box_length = size * pixel_size if pixel_size else None
        note = STEPS_NOTE if "log_evidence" in alignment.history else ""
        made.append(picture("history.png", figures.history(alignment.history, box_length), note))
    return made
