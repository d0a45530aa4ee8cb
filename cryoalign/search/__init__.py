"""Finding poses: all poses of a grid, coarse to fine, refined, and refined jointly with CTFs."""
