"""cryoalign: alignment and classification of 2D cryo-EM particle images with PyTorch.

    from cryoalign.methods.mra import align_multi_reference
    from cryoalign.io.stack import read_particles

    particles = read_particles("particles.star")
    alignment = align_multi_reference(particles, n_classes=10)
    alignment.to_frame()

Every stage is a function of tensors; the modules, in reading order, are listed in docs/design.md.
"""

from importlib.metadata import PackageNotFoundError, version

from cryoalign.images.geometry import transform
from cryoalign.images.polar import Rings, ring_spectra, to_polar
from cryoalign.io.formats import read_images, write_images
from cryoalign.io.stack import read_particles
from cryoalign.learn.dataset import ParticleDataset
from cryoalign.methods.assignment import Assignment
from cryoalign.methods.classify.classify import classify
from cryoalign.methods.classify.split_and_merge import Likelihood
from cryoalign.methods.isac.generations import Isac
from cryoalign.methods.isac.isac import StableClasses, classify_stable
from cryoalign.methods.mra import align_multi_reference
from cryoalign.methods.rfa import align_reference_free
from cryoalign.operators.correlation import correlation_at, correlation_peaks, correlation_table
from cryoalign.particles.settings import Images
from cryoalign.particles.simulate import simulate
from cryoalign.pose import Pose, compose, pixel_error
from cryoalign.results.alignment import Alignment
from cryoalign.results.averages import Averaging
from cryoalign.results.pose_errors import pose_covariance
from cryoalign.results.quality import Quality
from cryoalign.search.joint_refinement import refine_jointly
from cryoalign.search.match import match
from cryoalign.search.settings import Schedule, Search

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
