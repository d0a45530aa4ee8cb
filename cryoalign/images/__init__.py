"""Functions of images: geometry, Fourier space, masks, polar rings, templates, CTF, FRC."""
