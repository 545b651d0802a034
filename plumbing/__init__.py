"""The ground floor: files, forms, checks, checkpoints, runs, words. It knows no method."""
