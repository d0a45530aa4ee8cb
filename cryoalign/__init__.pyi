from .images.geometry import transform
from .images.polar import Rings, ring_spectra, to_polar
from .io import read_images, read_particles, write_images
from .learn.dataset import ParticleDataset
from .methods.assignment import Assignment
from .methods.base import Method, align
from .methods.classify.classify import Classification, classify
from .methods.classify.settings import Likelihood
from .methods.isac.isac import StableClasses, StableClassification, classify_stable
from .methods.isac.settings import Isac
from .methods.mra import MultiReference, align_multi_reference
from .methods.rfa import ReferenceFree, align_reference_free
from .methods.state import State
from .operators.correlation import correlation_at, correlation_peaks, correlation_table
from .particles.prepare import prepare
from .particles.settings import Images, Particle
from .particles.simulate import simulate
from .pose import Pose, compose, pixel_error
from .results.alignment import Alignment
from .results.averages import Averaging
from .results.pose_errors import pose_covariance
from .results.quality import Quality
from .search.joint_refinement import refine_jointly
from .search.match import match
from .search.settings import Schedule, Search, SearchSettings

__version__: str
__all__ = [
    "Alignment",
    "Assignment",
    "Averaging",
    "Classification",
    "Images",
    "Isac",
    "Likelihood",
    "Method",
    "MultiReference",
    "Particle",
    "ParticleDataset",
    "Pose",
    "Quality",
    "ReferenceFree",
    "Rings",
    "Schedule",
    "Search",
    "SearchSettings",
    "StableClasses",
    "StableClassification",
    "State",
    "align",
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
    "prepare",
    "read_images",
    "read_particles",
    "refine_jointly",
    "ring_spectra",
    "simulate",
    "to_polar",
    "transform",
    "write_images",
]
