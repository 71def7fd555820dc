"""Meshes of devices, what each device holds and sends, and jobs of several processes."""
