"""cryoalign: alignment and classification of 2D cryo-EM particle images with PyTorch.

    from cryoalign import align_multi_reference, read_particles

    particles = read_particles("particles.star")
    alignment = align_multi_reference(particles, n_classes=10)
    alignment.to_frame()

Every stage is a function of tensors; the modules, in reading order, are listed in docs/design.md.
"""

from importlib.metadata import PackageNotFoundError, version

from cryoalign.alignment import Alignment
from cryoalign.assign import Assignment
from cryoalign.average import Averaging
from cryoalign.classification import classify
from cryoalign.climb import Likelihood
from cryoalign.correlate import correlation_at, correlation_peaks, correlation_table
from cryoalign.dataset import ParticleDataset
from cryoalign.generations import Isac
from cryoalign.geometry import transform
from cryoalign.io import read_images, read_particles, write_images
from cryoalign.isac import StableClasses, classify_stable
from cryoalign.joint import refine_jointly
from cryoalign.mra import align_multi_reference
from cryoalign.particles import Images
from cryoalign.polar import Rings, ring_spectra, to_polar
from cryoalign.pose import Pose, compose, pixel_error
from cryoalign.quality import Quality
from cryoalign.rfa import align_reference_free
from cryoalign.schedule import Schedule
from cryoalign.search import Search, match
from cryoalign.synthetic import simulate
from cryoalign.uncertainty import pose_covariance

try:
    __version__ = version("cryoalign")
except PackageNotFoundError:
    __version__ = "(not installed)"

__all__ = [
    "Alignment",
    "Assignment",
    "Averaging",
    "Images",
    "Isac",
    "Likelihood",
    "ParticleDataset",
    "Pose",
    "Quality",
    "Rings",
    "Schedule",
    "Search",
    "StableClasses",
    "align_multi_reference",
    "align_reference_free",
    "classify",
    "classify_stable",
    "compose",
    "correlation_at",
    "correlation_peaks",
    "correlation_table",
    "match",
    "pixel_error",
    "pose_covariance",
    "read_images",
    "read_particles",
    "refine_jointly",
    "ring_spectra",
    "simulate",
    "to_polar",
    "transform",
    "write_images",
]
