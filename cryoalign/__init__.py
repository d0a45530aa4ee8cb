"""cryoalign: alignment and classification of 2D cryo-EM particle images with PyTorch.

    from cryoalign.methods.mra import align_multi_reference
    from cryoalign.io.stack import read_particles

    particles = read_particles("particles.star")
    alignment = align_multi_reference(particles, n_classes=10)
    alignment.to_frame()

Every stage is a function of tensors. The folders, from the ground up, are listed in docs/design.md.
Names are imported when they are first used; ``__init__.pyi`` says where each comes from.
"""

from importlib.metadata import PackageNotFoundError, version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

try:
    __version__ = version("cryoalign")
except PackageNotFoundError:
    __version__ = "(not installed)"
