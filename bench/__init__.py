"""What cryoalign costs and what it reaches: ``python -m bench``; see README.md beside this file."""
