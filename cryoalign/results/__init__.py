"""What comes out: class averages, the alignment, quality of particles, errors of poses."""
