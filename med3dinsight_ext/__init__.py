"""Pre-train any 3D medical network from a frozen 2D multi-modal model."""

__version__ = "0.1.0"
