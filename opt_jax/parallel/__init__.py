"""Meshes of devices, shardings, collectives, and jobs of several processes."""

from opt_jax.parallel.mesh import batch_sharding, make_mesh, replicated, use_mesh
from opt_jax.parallel.rules import param_sharding

__all__ = ["batch_sharding", "make_mesh", "param_sharding", "replicated", "use_mesh"]
