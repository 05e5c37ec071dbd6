"""What ``tools/on_gpu.py`` does: a plan of steps, processes with deadlines, and what their children measure."""
