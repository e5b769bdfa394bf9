"""Prints what the bundles pin, as requirements.

python docs/release/pins.py > pins.txt
"""

import json
from pathlib import Path

pins: dict[str, str] = {}
for path in Path(__file__).parents[2].glob("bundles/*/configs/metadata.json"):
    metadata = json.loads(path.read_text())
    names = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
    pins |= {name: metadata[key] for name, key in names.items()}
    pins |= metadata["required_packages_version"]
print(*(f"{name}=={version}" for name, version in sorted(pins.items())), sep="\n")
