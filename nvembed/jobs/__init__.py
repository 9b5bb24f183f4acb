"""Submission of pipelines as jobs: Ray, KubeRay, Slurm, clouds. Imports are light."""
