"""Launchers: `python -m launch.{local,slurm,tpu,gke} … -- FLAGS OF RUN`, all ending in the same `python -m llm_jax run …`.

They need absl-py alone, and run where the code does not: on a laptop, or on a cluster's login node.
"""
