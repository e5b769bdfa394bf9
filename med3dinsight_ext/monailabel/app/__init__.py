"""A MONAI Label app for local bundles, and the environment that it runs in."""
