"""Submission of a story to where the accelerators are: Ray, KubeRay, Slurm, clouds (layer 6; light imports)."""
