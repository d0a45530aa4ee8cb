"""General tools that know nothing of images: arrays, files, processes, threads, settings."""
