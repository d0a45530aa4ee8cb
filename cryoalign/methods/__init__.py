"""The four methods: multi-reference and reference-free alignment, classification, ISAC."""
