"""Particles and images in files: MRC stacks, RELION STAR files, NumPy arrays."""

from cryoalign.io.formats import image_pixel_size, read_images, write_images
from cryoalign.io.problems import InputError, Problem
from cryoalign.io.relion import read_pose, write_class_averages_star, write_particles_star
from cryoalign.io.stack import ParticleStack, read_particles

__all__ = [
    "InputError",
    "ParticleStack",
    "Problem",
    "image_pixel_size",
    "read_images",
    "read_particles",
    "read_pose",
    "write_class_averages_star",
    "write_images",
    "write_particles_star",
]
