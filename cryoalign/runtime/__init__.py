"""What every program needs and no image does: arrays, files, processes, threads, settings."""
